"""`LLM`: text in, text out, over a random tiny model folder and a tokenizer trained here."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_model
from octavo.chat import Message, Persona
from octavo.checkpoint.config import read_eos_ids
from octavo.checkpoint.writer import save_folder
from octavo.completion import StopStrings
from octavo.errors import (
    CheckpointError,
    ConfigError,
    HubError,
    OctavoError,
    OptionError,
    PersonaError,
    PromptError,
    TokenizerError,
)
from octavo.llm import LLM, find_model, shipped_model
from octavo.sampling import SamplingParams
from octavo.storage.folder import LocalFolder

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A mixture of experts sends every token to two of eight experts, which the router chooses.",
    "Wer reist, hat viel zu erzählen; wer liest, auch. Où est la bibliothèque, s'il vous plaît ?",
    "def add(a, b):\n    return a + b\n",
] * 4
QUESTION = [{"role": "user", "content": "Who are you?"}]
FIRST_BYTE = 3  # byte pieces follow <unk>, <s> and </s>
# So that what a random model says is words, and goes on.
WORDS = dict.fromkeys([2, 419, *range(FIRST_BYTE, FIRST_BYTE + 256)], -100.0)
GREEDY = SamplingParams(temperature=0, max_tokens=40, logit_bias=WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as `octavo train` would leave it."""
    home = tmp_path_factory.mktemp("model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(home / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = tiny_model(seed=1, vocab_size=420)
    target = home / "tiny"
    save_folder(model.args, model.state_dict(), target, copy=(home / "tokenizer.model",))
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 419]}))
    return target


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM.load(folder, device="cpu")


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest):
    """Whatever a test does, the engine is idle afterwards."""
    yield
    if "llm" in request.fixturenames:
        llm = request.getfixturevalue("llm")
        assert not llm.engine.has_work
        assert not llm._requests


# ---------------------------------------- stop strings


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    starts = [text.find(stop) for stop in stops if stop in text]
    return (text[: min(starts)], True) if starts else (text, False)


@st.composite
def pieces(draw: st.DrawFn) -> list[str]:
    text = draw(st.text("ab c", max_size=30))
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[i:j] for i, j in zip([0, *places], [*places, len(text)], strict=True)]


@settings(max_examples=400, deadline=None)
@given(pieces=pieces(), stops=st.lists(st.text("ab c", min_size=1, max_size=5), max_size=4))
def test_stop_strings_cut_any_split_at_the_earliest_beginning(pieces, stops):
    text, found = cut("".join(pieces), stops)
    stopper, shown, fed = StopStrings(stops), "", ""
    for piece in pieces:
        shown += stopper.push(piece)
        fed += piece
        assert text.startswith(shown)
        if not stopper.found:
            held = fed[len(shown) :]
            assert not held or any(stop.startswith(held) for stop in stops)  # held back no more than it must
    shown += stopper.flush()
    assert (shown, stopper.found) == (text, found)


def test_stop_strings_hold_back_no_more_than_they_must():
    stopper = StopStrings(["\nUser:", "END"])
    shown = [stopper.push(piece) for piece in ["Hello", " E", "N", "glish\n", "\nUs", "er", " x", "\nUser:", "y"]]
    assert shown == ["Hello", " ", "", "ENglish", "\n", "", "\nUser x", "", ""]
    assert stopper.found
    assert stopper.flush() == ""


def test_an_earlier_beginning_wins_over_an_earlier_end():
    for text, visible in (("xabcd", "x"), ("xabcy", "xa")):
        stopper = StopStrings(["abcd", "bc"])
        assert "".join(map(stopper.push, text)) + stopper.flush() == visible
        assert stopper.found


# ---------------------------------------- generate


def test_generate_text(llm):
    done = llm.generate("The quick", GREEDY)
    ids = llm.tokenizer.encode("The quick", bos=True)
    assert done.finish_reason == "length"
    assert len(done.token_ids) == 40
    assert done.usage.prompt_tokens == len(ids)
    assert (done.usage.completion_tokens, done.usage.total_tokens) == (40, len(ids) + 40)
    assert "The quick" + done.text == llm.tokenizer.decode([*ids, *done.token_ids])
    assert done == llm.generate(ids, GREEDY).__class__(done.choices, done.usage, done.timings)
    assert llm.generate(ids, GREEDY).token_ids == done.token_ids


def test_options_are_fields_of_the_params(llm):
    done = llm.generate("The", temperature=0, max_tokens="7", logit_bias=WORDS)
    assert done.token_ids == llm.generate("The", GREEDY).token_ids[:7]
    assert llm.generate("The", GREEDY, max_tokens=3).token_ids == done.token_ids[:3]


def test_several_prompts_come_back_in_order(llm):
    texts = ["The", "A mixture of", "Où est", "def add", "x", "the lazy dog", "é", "Wer", "2", "router"]
    batched = llm.generate(texts, GREEDY)
    assert [one.token_ids for one in batched] == [llm.generate(text, GREEDY).token_ids for text in texts]
    encoded = [llm.tokenizer.encode(text, bos=True) for text in texts[:3]]
    assert [one.text for one in llm.generate(encoded, GREEDY)] == [one.text for one in batched[:3]]


def test_n_replies_have_seeds_in_a_row(llm):
    done = llm.generate("The", temperature=1.5, seed=10, n=3, max_tokens=12)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    for index, choice in enumerate(done.choices):
        alone = llm.generate("The", temperature=1.5, seed=10 + index, max_tokens=12)
        assert choice.token_ids == alone.token_ids
    assert done.usage.completion_tokens == sum(len(choice.token_ids) for choice in done.choices)
    assert done.text == done.choices[0].text


def test_timings(llm):
    timings = llm.generate("The quick", GREEDY).timings
    assert 0 < timings.prefill_seconds <= timings.time_to_first_token
    assert timings.decode_seconds > 0
    assert timings.tokens_per_second == pytest.approx(39 / timings.decode_seconds)
    assert llm.generate("The", GREEDY, max_tokens=1).timings.tokens_per_second == 0


def test_to_dict_is_json(llm):
    done = llm.generate("The", GREEDY, logprobs=2, n=2, max_tokens=3)
    told = json.loads(json.dumps(done.to_dict()))
    assert told["text"] == told["choices"][0]["text"] == done.text
    assert told["token_ids"] == list(done.token_ids)
    assert told["usage"]["total_tokens"] == done.usage.prompt_tokens + 6
    assert [len(one["top"]) for one in told["choices"][1]["logprobs"]] == [2, 2, 2]
    assert set(told["timings"]) == {
        "time_to_first_token",
        "prefill_seconds",
        "decode_seconds",
        "tokens_per_second",
    }
    assert llm.generate("The", GREEDY).to_dict()["logprobs"] is None


def test_logprobs_are_those_of_the_model(llm):
    done = llm.generate("The quick", GREEDY, logprobs=1, max_tokens=4, repetition_penalty=3.0)
    ids = llm.tokenizer.encode("The quick", bos=True)
    logits = llm.model(torch.tensor([[*ids, *done.token_ids]]))[0].log_softmax(-1)
    for offset, one in enumerate(done.logprobs):
        row = logits[len(ids) - 1 + offset]
        assert one.token_id == done.token_ids[offset]
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
        assert one.top[0][1] == pytest.approx(float(row.max()), abs=1e-4)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_stop_strings_end_generation(llm, width):
    free = llm.generate("The quick", GREEDY)
    stop = free.text[9 : 9 + width]
    done = llm.generate("The quick", GREEDY, stop=["never there", stop])
    assert done.text == free.text.partition(stop)[0]
    assert done.finish_reason == "stop"
    assert done.token_ids == free.token_ids[: len(done.token_ids)]
    assert stop in llm.tokenizer.decode([5, *done.token_ids])
    assert stop not in llm.tokenizer.decode([5, *done.token_ids[:-1]])


def test_a_stop_string_frees_its_row_at_once(llm):
    texts = ["The quick", "Wer reist"]
    free = llm.generate(texts, GREEDY)
    stop = next(free[0].text[i : i + 2] for i in range(4, 40) if free[0].text[i : i + 2] not in free[1].text)
    rows: list[int] = []
    handle = llm.model.register_forward_pre_hook(
        lambda _, args: rows.append(args[0].shape[0] if args[0].shape[1] == 1 else 0)
    )
    try:
        done = llm.generate(texts, GREEDY, stop=stop)
    finally:
        handle.remove()
    assert [one.finish_reason for one in done] == ["stop", "length"]
    assert sum(rows) == sum(len(one.token_ids) - 1 for one in done)


def test_a_stop_string_that_only_begins_is_shown_at_the_end(llm):
    free = llm.generate("The quick", GREEDY)
    done = llm.generate("The quick", GREEDY, stop=free.text[-3:] + "and more")
    assert (done.text, done.finish_reason) == (free.text, "length")


def test_end_of_text_ids_end_generation_and_stay_out_of_the_text(llm):
    free = llm.generate("The quick", GREEDY)
    assert llm.eos_ids == {2, 419}
    third = free.token_ids[2]
    for options in ({"stop_ids": [third]}, {"logit_bias": {419: 1000}}):
        done = llm.generate("The quick", GREEDY, **options)
        before = done.token_ids[:-1]
        assert done.finish_reason == "stop"
        assert done.text == llm.tokenizer.decode([5, *before])[len(llm.tokenizer.decode([5])) :]
        assert before == free.token_ids[: len(before)]


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ("", {}, PromptError, "the prompt is empty"),
        ([], {}, PromptError, "the prompt is empty"),
        (["The", ""], {}, PromptError, "prompt 2 of 2: the prompt is empty"),
        (["The", "dog " * 300], {}, PromptError, "prompt 2 of 2: the prompt has .* tokens"),
        (["The", 5], {}, PromptError, "prompt 2 of 2: a prompt must be text or a list of token ids, found int"),
        (None, {}, PromptError, "found NoneType"),
        (b"The", {}, PromptError, "found bytes"),
        ([1, 420], {}, PromptError, "420; expected 0 to 419"),
        ("\ud800", {}, PromptError, "surrogate"),
        ("The", {"temprature": 1}, OptionError, "temprature"),
        ("The", {"temperature": -1}, OptionError, "temperature is -1"),
        ("The", {"logit_bias": {420: 1}}, OptionError, "420"),
    ],
)
def test_bad_requests(llm, prompt, options, error, words):
    with pytest.raises(error, match=words) as caught:
        llm.generate(prompt, **options)
    assert "\n" not in caught.value.message


def test_an_error_while_generating_is_raised_and_forgotten(llm):
    weights = llm.model.tok_embeddings.weight
    row = weights[300].clone()
    weights[300] = math.nan
    try:
        with pytest.raises(OctavoError, match="NaN"):
            llm.generate([[5, 6], [5, 300]], GREEDY)
        with pytest.raises(OctavoError, match="NaN"):
            list(llm.stream([5, 300], GREEDY))
    finally:
        weights[300] = row
    assert llm.generate([5, 6], GREEDY).finish_reason == "length"


def test_an_interrupt_leaves_nothing_behind(llm):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for call in (lambda: llm.generate(["The", "A"], GREEDY), lambda: list(llm.stream("The", GREEDY))):
        handle = llm.model.register_forward_pre_hook(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                call()
        finally:
            handle.remove()
    assert len(llm.generate("The", GREEDY).token_ids) == 40


# ---------------------------------------- stream


def test_chunks_add_up_to_the_completion(llm):
    stream = llm.stream("The quick", GREEDY, logprobs=0)
    chunks = list(stream)
    done = llm.generate("The quick", GREEDY, logprobs=0)
    assert "".join(chunk.text for chunk in chunks) == done.text == stream.result.text
    assert tuple(i for chunk in chunks for i in chunk.token_ids) == done.token_ids == stream.result.token_ids
    assert tuple(p for chunk in chunks for p in chunk.logprobs) == done.logprobs
    assert all(chunk.text and chunk.finish_reason is None for chunk in chunks[:-1])
    last = chunks[-1]
    assert (last.finish_reason, last.usage) == ("length", done.usage)
    assert last.timings is not None
    assert last.timings.time_to_first_token > 0
    assert next(stream, None) is None


def test_a_stream_never_shows_half_a_character(llm):
    euro = [FIRST_BYTE + byte for byte in "€".encode()]
    bias = dict(zip(euro, (3000.0, 2000.0, 1000.0), strict=True))  # and each spoken once is penalised
    options = {"logit_bias": bias, "repetition_penalty": 10.0, "max_tokens": 4}
    chunks = list(llm.stream("The", GREEDY, **options))
    assert [chunk.text for chunk in chunks] == ["€", "\ufffd"]
    assert chunks[0].token_ids == tuple(euro)
    assert llm.generate("The", GREEDY, **options).text == "€\ufffd"


def test_a_stream_never_shows_a_part_of_a_stop_string(llm):
    free = llm.generate("The quick", GREEDY).text
    for at in range(0, len(free) - 4, 3):
        stop = free[at : at + 4]
        stream = llm.stream("The quick", GREEDY, stop=stop)
        assert "".join(chunk.text for chunk in stream) == free.partition(stop)[0]
        assert stream.result.finish_reason == "stop"


def test_closing_a_stream_cancels_it(llm):
    free = llm.generate("The quick", GREEDY)
    with llm.stream("The quick", GREEDY) as stream:
        first = next(stream)
        assert llm.engine.has_work
    assert not llm.engine.has_work
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text == first.text
    assert free.text.startswith(first.text)
    assert list(stream) == []
    stream.close()


def test_a_forgotten_stream_is_cancelled(llm):
    stream = llm.stream("The quick", GREEDY)
    next(stream)
    del stream
    gc.collect()
    assert not llm.engine.has_work


def test_a_stream_never_begun_can_be_closed(llm):
    stream = llm.stream("The", GREEDY)
    stream.close()
    assert stream.result.token_ids == ()
    assert stream.result.timings.tokens_per_second == 0


def test_the_result_waits_for_the_end(llm):
    with llm.stream("The", GREEDY) as stream, pytest.raises(RuntimeError, match="not finished"):
        _ = stream.result


def test_streams_may_be_read_in_turn(llm):
    texts = ["The quick", "A mixture of", "Wer reist"]
    streams = [llm.stream(text, GREEDY) for text in texts]
    shown = ["", "", ""]
    for turn in range(200):
        chunk = next(streams[turn % 3], None)
        shown[turn % 3] += chunk.text if chunk else ""
    assert shown == [one.text for one in llm.generate(texts, GREEDY)]


def test_generate_in_the_middle_of_a_stream(llm):
    stream = llm.stream("The quick", GREEDY)
    first = next(stream).text
    other = llm.generate("Wer reist", GREEDY)
    assert first + "".join(chunk.text for chunk in stream) == llm.generate("The quick", GREEDY).text
    assert other.token_ids == llm.generate("Wer reist", GREEDY).token_ids


def test_requests_for_a_stream_are_checked_at_once(llm):
    for call, error in (
        (lambda: llm.stream("", GREEDY), PromptError),
        (lambda: llm.stream("The", GREEDY, n=2), OptionError),
        (lambda: llm.stream("The", GREEDY, persona="menny"), PromptError),
        (lambda: llm.stream(["The", "A"], GREEDY), PromptError),
        (lambda: llm.stream(None, GREEDY), PromptError),
    ):
        with pytest.raises(error):
            call()


# ---------------------------------------- chat


def test_chat_renders_the_template(llm):
    done = llm.chat(QUESTION, GREEDY)
    ids = llm.template.render(QUESTION)
    assert done.usage.prompt_tokens == len(ids)
    assert done.token_ids == llm.generate(ids, GREEDY).token_ids
    assert done.text == llm.tokenizer.decode(done.token_ids)
    assert llm.chat([Message("user", "Who are you?")], GREEDY).token_ids == done.token_ids
    assert "".join(chunk.text for chunk in llm.stream(QUESTION, GREEDY)) == done.text


def test_a_persona_brings_system_prompt_and_defaults(llm):
    persona = Persona("Dry", "Be dry.", {"temperature": 0.0, "max_tokens": 9, "logit_bias": WORDS})
    done = llm.chat(QUESTION, persona=persona)
    informed = [{"role": "system", "content": "Be dry."}, *QUESTION]
    assert len(done.token_ids) == 9
    assert done.token_ids == llm.chat(informed, GREEDY).token_ids[:9]
    # What is said out loud wins over the persona.
    assert len(llm.chat(QUESTION, persona=persona, max_tokens=4).token_ids) == 4
    assert len(llm.chat(QUESTION, GREEDY, persona=persona).token_ids) == 40
    own = [{"role": "system", "content": "Be kind."}, *QUESTION]
    assert llm.chat(own, GREEDY, persona=persona).token_ids == llm.chat(own, GREEDY).token_ids
    assert llm.chat(QUESTION, persona="menny", max_tokens=3, seed=1).finish_reason == "length"
    assert len(list(llm.stream(QUESTION, persona=persona))) > 0


def test_bad_conversations(llm):
    for messages, words in (
        ([], "empty"),
        ("Who are you?", "a conversation must be a list of messages, found str"),
        (QUESTION * 2, "turn"),
        ([{"role": "user", "text": "Hi"}], "content"),
    ):
        with pytest.raises(PromptError, match=words):
            llm.chat(messages)
    with pytest.raises(PersonaError):
        llm.chat(QUESTION, persona="mennny")


# ---------------------------------------- loading


def test_without_a_tokenizer_only_ids_go_in(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    bare = LLM.load(tmp_path)
    assert bare.tokenizer is None
    assert bare.eos_ids == frozenset()
    done = bare.generate([5, 6, 7], GREEDY)
    assert (len(done.token_ids), done.text) == (40, "")
    assert len(list(bare.stream([5, 6, 7], GREEDY))) == 1
    for call in (
        lambda: bare.generate("The"),
        lambda: bare.generate([5], stop="x"),
        lambda: bare.chat(QUESTION),
        lambda: bare.stream(QUESTION),
    ):
        with pytest.raises(TokenizerError, match="no tokenizer"):
            call()
    assert not bare.engine.has_work


@pytest.mark.parametrize(
    ("value", "ids"), [("2", (2,)), ("[2, 7]", (2, 7)), ("null", ()), ('"</s>"', None), ("[true]", None)]
)
def test_eos_ids_of_generation_config(tmp_path, value, ids):
    folder = LocalFolder(tmp_path)
    assert read_eos_ids(folder) == ()
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    if ids is None:
        with pytest.raises(ConfigError, match="eos_token_id"):
            read_eos_ids(folder)
    else:
        assert read_eos_ids(folder) == ids


def test_find_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert find_model("owner/model") == Path("owner/model")
    assert find_model(tmp_path) == tmp_path
    assert find_model(Path("owner/absent")) == Path("owner/absent")
    assert find_model("./menny") == Path("menny")
    assert find_model("~/models/x") == Path.home() / "models" / "x"
    for absent in ("no-such-folder", "/no/such/folder", "./a/b"):
        with pytest.raises(CheckpointError, match="no such folder"):
            LLM.load(absent)


def test_hub_ids_go_through_the_hub(tmp_path, monkeypatch, folder):
    """The Hub itself is tested where it lives; here only who asks for what."""
    asked = []

    def snapshot(repo_id: str, *, revision: str | None = None) -> Path:
        asked.append((repo_id, revision))
        if repo_id == "nobody/nothing":
            raise HubError("no such repository", "check the spelling")
        return folder

    monkeypatch.setattr("octavo.llm.snapshot", snapshot)
    monkeypatch.chdir(tmp_path)
    assert find_model("owner/Some-Model_1.0", "main") == folder
    assert asked == [("owner/Some-Model_1.0", "main")]
    with pytest.raises(HubError, match="nor is there a folder 'nobody/nothing'"):
        find_model("nobody/nothing")


def test_the_shipped_model_or_a_plain_error(monkeypatch, tmp_path):
    monkeypatch.setattr("octavo.llm.__file__", str(tmp_path / "llm.py"))
    with pytest.raises(CheckpointError, match="ships with Octavo is not there"):
        shipped_model()
    (tmp_path / "models" / "menny").mkdir(parents=True)
    (tmp_path / "models" / "menny" / "config.json").touch()
    assert find_model("menny") == shipped_model() == tmp_path / "models" / "menny"
