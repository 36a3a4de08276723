"""Recorded routing: every token once, as the model alone would route it, however it is computed."""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import needs_compiled, tiny_model
from octavo.cache import NoCache
from octavo.errors import OptionError, PromptError, TokenizerError, UserError
from octavo.experts import RoutingTrace, read_trace
from octavo.llm import LLM, shipped_model
from octavo.model import Mixtral, rotary_embedding
from octavo.routing import texts
from octavo.routing.texts import Document, built_in_documents, read_documents
from octavo.routing.trace import revision_of, token_pieces, tokenizer_of, trace_documents
from octavo.tokenizer import Tokenizer
from run_octavo import refused, run, terminal
from stores import make_source, quantise
from test_plan import smallest
from tiny_folder import VOCAB_SIZE, make_tiny_folder

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "menny"
ARRAYS = ("topk_ids", "token_ids", "topk_weights", "logits", "documents", "decoded")
WORDS = ["the", "quick", "brown", "fox", "dog", "Où", "est", "über", "token", "router", "ß", "🦊", "wer", "reist"]
words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=25).map(" ".join)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("routing")


@pytest.fixture(scope="module")
def tokenizer(home: Path) -> Tokenizer:
    return tokenizer_of(str(make_tiny_folder(home / "tiny" / "model")))


@functools.cache
def model() -> Mixtral:
    return tiny_model(vocab_size=VOCAB_SIZE)


def llm_of(tokenizer: Tokenizer | None, *, chunk: int = 512, **options: object) -> LLM:
    llm = LLM(model(), tokenizer, **options)  # type: ignore[arg-type]
    llm.engine.prefill_chunk = chunk
    return llm


def same(one: RoutingTrace, other: RoutingTrace, *, exactly: bool = True) -> None:
    """Assert that all is the same; but for rounding where sums were made in another order."""
    for name in ARRAYS:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None), name
        if mine is None:
            continue
        if exactly or mine.dtype.kind != "f":
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
        else:
            np.testing.assert_allclose(mine, theirs, atol=1e-4, err_msg=name)
    assert (one.pieces, one.labels, one.n_experts) == (other.pieces, other.labels, other.n_experts)


def as_texts(texts: list[str]) -> list[Document]:
    return [Document(text, label=f"label {number % 2}") for number, text in enumerate(texts)]


def of_document(trace: RoutingTrace, number: int) -> RoutingTrace:
    return trace.select(trace.document_ids == number)


# ---------------------------------------- what is recorded


@torch.inference_mode()
def plainly(token_ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, weights and logits of a whole sequence, module by module, each token's experts one by one."""
    args = model().args
    ids_BT = torch.tensor([token_ids])
    step = NoCache(ids_BT, None, args.sliding_window)
    rotation = rotary_embedding(step.positions_BT, args.head_dim, args.rope_theta)
    x_BTD, ids, weights, logits = model().tok_embeddings(ids_BT), [], [], []
    for layer, block in enumerate(model().layers):
        x_BTD = x_BTD + block.attention(block.attention_norm(x_BTD), rotation, step, layer)
        h_TD = block.ffn_norm(x_BTD)[0]
        logits_TE = h_TD @ block.feed_forward.gate.weight.T
        ids_TK = logits_TE.argsort(dim=1, descending=True)[:, : args.moe.num_experts_per_tok]
        shares = logits_TE.softmax(dim=1).gather(1, ids_TK)
        weights_TK = shares / shares.sum(dim=1, keepdim=True)
        said = [
            sum(weight * block.feed_forward.experts[int(expert)](h_TD[t]) for expert, weight in zip(*row, strict=True))
            for t, row in enumerate(zip(ids_TK, weights_TK, strict=True))
        ]
        x_BTD = x_BTD + torch.stack(said)
        for kept, one in ((ids, ids_TK), (weights, weights_TK), (logits, logits_TE)):
            kept.append(one.numpy())
    return tuple(np.stack(one, axis=1) for one in (ids, weights, logits))  # type: ignore[return-value]


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_as_the_model_alone_routes_prompt_and_reply(chunk: int, tokenizer: Tokenizer) -> None:
    said = ["The quick brown fox", "Wer reist, hat viel zu erzählen", "dog"]
    trace = trace_documents(llm_of(tokenizer, chunk=chunk), as_texts(said), generate=9, logits=True)
    assert trace.n_experts == 8
    for number, text in enumerate(said):
        one = of_document(trace, number)
        prompt = tokenizer.encode(text, bos=True)
        assert one.token_ids[: len(prompt)].tolist() == prompt
        assert one.decoded.tolist() == [False] * len(prompt) + [True] * (one.n_tokens - len(prompt))
        ids, weights, logits = plainly(one.token_ids.tolist())
        np.testing.assert_array_equal(one.topk_ids, ids)
        np.testing.assert_allclose(one.topk_weights, weights, atol=1e-4)
        np.testing.assert_allclose(one.logits, logits, atol=1e-3)
    assert trace.decoded.any()


def test_recording_changes_no_token(tokenizer: Tokenizer) -> None:
    said = ["The quick brown fox", "dog", "Où est la bibliothèque", "to two of eight experts"]
    replies = [one.choices[0] for one in llm_of(tokenizer).generate(said, temperature=0, max_tokens=13)]
    trace = trace_documents(llm_of(tokenizer), as_texts(said), generate=12)
    for number, reply in enumerate(replies):
        one = of_document(trace, number)
        assert one.token_ids[one.decoded].tolist() == list(reply.token_ids[:-1])
    assert not any(router._forward_hooks for router in model().routers())
    ends = replies[0].token_ids[4]  # as if this were the end of a text
    short = trace_documents(llm_of(tokenizer, eos_ids=[ends]), as_texts(said[:1]), generate=12)
    assert short.token_ids[short.decoded].tolist() == list(replies[0].token_ids[: replies[0].token_ids.index(ends)])


@settings(max_examples=15, deadline=None)
@given(
    said=st.lists(words, min_size=1, max_size=5),
    again=st.lists(st.integers(0, 4), max_size=3),
    rows=st.integers(1, 4),
    chunk=st.integers(1, 9),
    generate=st.integers(0, 5),
)
def test_together_as_one_by_one(
    said: list[str], again: list[int], rows: int, chunk: int, generate: int, tokenizer: Tokenizer
) -> None:
    documents = as_texts([*said, *(said[at % len(said)] for at in again)])
    llm = llm_of(tokenizer, chunk=chunk, max_batch_size=rows)
    trace = trace_documents(llm, documents, generate=generate, logits=True)
    assert trace.labels == tuple(document.label for document in documents)
    for number, document in enumerate(documents):
        alone = trace_documents(
            llm_of(tokenizer, chunk=chunk, max_batch_size=1), [document], generate=generate, logits=True
        )
        same(of_document(trace, number), alone, exactly=False)
    np.testing.assert_allclose(trace.topk_weights.sum(axis=2), 1, atol=1e-6)
    np.testing.assert_array_equal(np.argsort(-trace.logits, axis=2, kind="stable")[:, :, :2], trace.topk_ids)


def test_what_was_computed_before_is_recorded_too(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 3
    llm = llm_of(tokenizer, prefix_bytes=1 << 24, max_batch_size=1)
    said = as_texts([text, f"{text} The fox", f"{text} The dog"])
    expected = trace_documents(llm_of(tokenizer), said, generate=4)
    llm.generate(text, temperature=0, max_tokens=3)
    assert llm.generate(text, temperature=0, max_tokens=3).usage.cached_tokens > 0
    for _ in range(2):
        same(trace_documents(llm, said, generate=4), expected, exactly=False)


@pytest.mark.parametrize("first", [True, False])
def test_a_window_that_is_a_document_too(first: bool, tokenizer: Tokenizer) -> None:
    short = Document(" ".join(["dog"] * 9))
    size = len(tokenizer.encode(short.text, bos=True))
    documents = [short, Document(" ".join(["dog"] * 14))]
    trace = trace_documents(llm_of(tokenizer, context=size + 5), documents[:: 1 if first else -1], generate=4)
    where = 0 if first else 2
    windows = [of_document(trace, number) for number in range(3)]
    window = windows[1 if first else 0]
    assert windows[where].token_ids[:size].tolist() == window.token_ids.tolist()  # the window itself gets no reply
    same(windows[where], of_document(trace_documents(llm_of(tokenizer), [short], generate=4), 0), exactly=False)
    assert windows[where].decoded.sum() == 4


def test_progress_rises_to_all_there_is(tokenizer: Tokenizer) -> None:
    told: list[tuple[int, int]] = []
    documents = as_texts(["The quick", "dog", "The quick"])
    trace = trace_documents(llm_of(tokenizer, chunk=2), documents, generate=3, progress=lambda *one: told.append(one))
    done = [one for one, _ in told]
    assert done == sorted(done)
    computed = trace.n_tokens - of_document(trace, 2).n_tokens  # the third is the first again
    assert told[-1] == (computed, computed)
    assert all(one <= total for one, total in told)
    assert len(set(done)) > 3


# ---------------------------------------- placement


@pytest.fixture(scope="module")
def folders(home: Path) -> dict[str, Path]:
    source = make_source(home, hidden_dim=1024)
    quantise(source, home / "store", "4")
    return {"16": source, "4": home / "store"}


@needs_compiled
@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("kind", ["16", "4"])
def test_streamed_and_resident_are_the_same(kind: str, folders: dict[str, Path]) -> None:
    folder, documents = folders[kind], as_texts(["The quick brown fox", "Wer reist", "dog", "dog"])
    resident = LLM.load(folder, device="cpu", max_batch_size=3)
    expected = trace_documents(resident, documents, generate=5, logits=True)
    assert expected.decoded.any()
    with pytest.raises(OptionError) as caught:
        LLM.load(folder, memory=1000)
    for batch in (1, 3):
        if batch == 3:
            with pytest.raises(OptionError) as caught:
                LLM.load(folder, memory=1000, max_batch_size=3)
        llm = LLM.load(folder, memory=smallest(caught.value), max_batch_size=batch, prefix_bytes=0)
        assert llm.experts is not None
        same(trace_documents(llm, documents, generate=5, logits=True), expected)
        assert llm.experts.total.misses > 0


# ---------------------------------------- windows, tokens, conversations


@pytest.mark.parametrize("generate", [0, 4])
def test_a_long_text_in_windows(generate: int, tokenizer: Tokenizer) -> None:
    text = " ".join(f"{WORDS[n * 7 % len(WORDS)]} {n}" for n in range(60))
    llm = llm_of(tokenizer, context=40)
    documents = [Document(text, label="long"), Document("dog", label="short")]
    trace = trace_documents(llm, documents, generate=generate)
    ids = tokenizer.encode(text, bos=True)
    n_windows = trace.labels.count("long")
    assert trace.labels == ("long",) * n_windows + ("short",)
    windows = [of_document(trace, number) for number in range(n_windows)]
    prompts = [one.token_ids[~one.decoded].tolist() for one in windows]
    assert {len(prompt) for prompt in prompts[:-1]} == {40 - generate - 1}
    assert {prompt[0] for prompt in prompts} == {tokenizer.bos_id}
    assert [*prompts[0], *(token for prompt in prompts[1:] for token in prompt[1:])] == ids
    replied = [int(one.decoded.sum()) for one in windows]
    assert replied[:-1] == [0] * (n_windows - 1)
    assert (replied[-1] > 0) == (generate > 0)
    shown = "".join("".join(one.pieces[: len(prompt)]) for one, prompt in zip(windows, prompts, strict=True))
    assert re.sub("<0x..>|<s>", "", shown) == text
    for one in windows:  # each a sequence of its own, routed as such
        np.testing.assert_array_equal(one.topk_ids, plainly(one.token_ids.tolist())[0])


def test_a_context_with_no_room(tokenizer: Tokenizer) -> None:
    with pytest.raises(OptionError, match="generate is 30, and the context holds 20 tokens") as error:
        trace_documents(llm_of(tokenizer, context=20), as_texts(["dog"]), generate=30)
    assert error.value.hint == "give at most 17"
    trace_documents(llm_of(tokenizer, context=20), as_texts(["dog and dog"]), generate=17)


def test_at_most_so_many_tokens_of_each_label(tokenizer: Tokenizer) -> None:
    documents = [Document(text, label=label) for label in ("a", "b") for text in ("The quick brown fox", "dog dog dog")]
    whole = trace_documents(llm_of(tokenizer), documents)
    for most in (1, 5, 9, 1000):
        trace = trace_documents(llm_of(tokenizer), documents, tokens=most, generate=2)
        for label in range(2):
            mine, all_of_it = trace.domain_ids == label, whole.token_ids[whole.domain_ids == label]
            assert trace.token_ids[mine & ~trace.decoded].tolist() == all_of_it[:most].tolist()


QUESTION = [{"role": "user", "content": "Where is the dog?"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "Here."}]


def test_conversations_as_the_template_writes_them(tokenizer: Tokenizer) -> None:
    llm = llm_of(tokenizer)
    documents = [Document(messages=QUESTION), Document(messages=ANSWERED), Document(messages=[*ANSWERED, *QUESTION])]
    trace = trace_documents(llm, documents, generate=3)
    written = [
        llm.template.render(QUESTION),
        llm.template.render_training(ANSWERED)[0],
        llm.template.render([*ANSWERED, *QUESTION]),
    ]
    for number, ids in enumerate(written):
        one = of_document(trace, number)
        assert one.token_ids[~one.decoded].tolist() == ids
        assert one.decoded.any() == (number != 1)  # what the assistant has ended gets no reply
    assert trace.pieces[:2] == ("<s>", "[INST]")


def test_conversations_of_a_model_that_has_no_template(home: Path) -> None:
    plain = tokenizer_of(str(make_tiny_folder(home / "mute" / "model", converses=False)))
    trace = trace_documents(llm_of(plain), [Document(messages=ANSWERED, name="talk")])
    assert "".join(trace.pieces) == "<s>Where is the dog?\n\nHere."
    with pytest.raises(PromptError, match="talk: a message has no content"):
        trace_documents(llm_of(plain), [Document(messages=[{"role": "user"}], name="talk")])


def test_what_cannot_be_recorded(tokenizer: Tokenizer) -> None:
    one = as_texts(["dog"])
    with pytest.raises(OptionError, match="no document"):
        trace_documents(llm_of(tokenizer), [])
    with pytest.raises(OptionError, match="generate is -1; expected 0 or more"):
        trace_documents(llm_of(tokenizer), one, generate=-1)
    with pytest.raises(OptionError, match="tokens is 0; expected 1 or more"):
        trace_documents(llm_of(tokenizer), one, tokens=0)
    with pytest.raises(OptionError, match="the model is dense"):
        trace_documents(LLM(tiny_model(vocab_size=VOCAB_SIZE, moe=None), tokenizer), one)
    with pytest.raises(TokenizerError, match="the model has no tokenizer"):
        trace_documents(llm_of(None), one)
    with pytest.raises(PromptError, match=r"talk: .*roles|talk: .*user"):
        trace_documents(llm_of(tokenizer), [Document(messages=[{"role": "user", "content": 3}], name="talk")])


def test_stopped_on_the_way_leaves_no_hooks(tokenizer: Tokenizer) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace_documents(llm_of(tokenizer), as_texts(["dog", "fox"]), progress=stop)
    assert not any(router._forward_hooks for router in model().routers())


# ---------------------------------------- the texts of tokens


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_pieces_read_as_the_text(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text, bos=True)
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    marked = [piece for token, piece in zip(ids, pieces, strict=True) if not re.fullmatch("(<0x[0-9A-F]{2}>)+", piece)]
    assert "".join(marked) == "<s>" + tokenizer.decode(ids)


def test_bytes_of_no_character_can_be_seen(tokenizer: Tokenizer) -> None:
    *begins, end = token_pieces(tokenizer, tokenizer.encode("🦊"))[-4:]
    assert [*begins, end] == ["<0xF0>", "<0x9F>", "<0xA6>", "🦊"]
    assert token_pieces(tokenizer, [10_000]) == ("<10000>",)


def test_whose_it_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    trace = trace_documents(llm_of(tokenizer), as_texts(["dog"]), logits=True, model="a/b", revision="c")
    trace.save(tmp_path / "a.safetensors")
    found = read_trace(tmp_path / "a.safetensors")
    same(found, trace)
    assert (found.model, found.revision) == ("a/b", "c")
    assert revision_of(Path("hub/models--a--b/snapshots/0123abc")) == "0123abc"
    assert revision_of(Path("models/menny")) is None


# ---------------------------------------- documents


def test_files_and_labels(tmp_path: Path) -> None:
    plain, lines = tmp_path / "poem.txt", tmp_path / "talks.jsonl"
    plain.write_bytes("\ufeffDer Hund\nund der Fuchs".encode())
    lines.write_text(f'{{"text": "a fox", "domain": "x"}}\n\n{json.dumps({"messages": QUESTION})}\n', "utf-8")
    first, second, third = read_documents([plain, str(lines)])
    assert (first.text, first.label, first.name) == ("Der Hund\nund der Fuchs", "poem", str(plain))
    assert (second.text, second.messages, second.label) == ("a fox", None, "talks")
    assert (third.text, third.messages, third.name) == (None, QUESTION, f"{lines}, line 3")
    assert [one.label for one in read_documents([plain, lines], ["x", "y"])] == ["x", "y", "y"]
    assert [one.label for one in read_documents([plain, lines], ["x"])] == ["x"] * 3


BAD_LINES = {
    "not JSON": ("{", "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "no object": ("[1]", "expected a JSON object"),
    "neither": ("{}", "expected a text or messages"),
    "both": ('{"text": "a", "messages": [{}]}', "expected a text or messages"),
    "blank": ('{"text": " \\n"}', "the text is empty"),
    "a number": ('{"text": 3}', "the text is empty, or no text"),
    "no messages": ('{"messages": []}', "messages must be a list of messages"),
    "strings": ('{"messages": ["a"]}', "messages must be a list of messages"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(case: str, tmp_path: Path) -> None:
    line, why = BAD_LINES[case]
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fox"}}\n{line}\n')
    with pytest.raises(PromptError, match=f"{re.escape(str(path))}, line 2: {why}") as error:
        read_documents([path])
    assert error.value.hint


def test_bad_files(tmp_path: Path) -> None:
    contents = {"a.txt": b" \n", "b.py": b"caf\xe9", "c.jsonl": b"\n\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name, kind, why in (
        ("a.txt", PromptError, "the text is empty"),
        ("b.py", PromptError, r"not valid UTF-8 \(byte 3 is 0xe9\)"),
        ("c.jsonl", PromptError, "holds no document"),
        ("none.txt", OptionError, "cannot be read"),
    ):
        with pytest.raises(kind, match=rf"{re.escape(name)}: {why}") as error:
            read_documents([tmp_path / name])
        assert error.value.hint
    with pytest.raises(OptionError, match="2 labels for 1 files"):
        read_documents([tmp_path / "a.txt"], ["x", "y"])
    with pytest.raises(OptionError, match="2 labels for 3 files"):
        read_documents([tmp_path / "a.txt"] * 3, ["x", "y"])


def test_text_that_is_not_unicode_names_its_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800"}')
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: .*half of a surrogate pair"):
        trace_documents(llm_of(tokenizer), read_documents([tmp_path / "a.jsonl"]))


def test_the_built_in_texts_are_what_the_recipe_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(RECIPE), *sys.path])
    import routing_texts

    routing_texts.write(tmp_path)
    shipped = Path(texts.__file__).parent / "texts"
    assert sorted(path.name for path in shipped.iterdir()) == sorted(f"{name}.jsonl" for name in texts.BUILT_IN)
    for path in shipped.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_the_built_in_texts_hold_what_training_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(RECIPE), *sys.path])
    from parts import arithmetic, evaluation_sets

    documents = built_in_documents()
    assert tuple(dict.fromkeys(one.label for one in documents)) == texts.BUILT_IN
    tokenizer = tokenizer_of(str(shipped_model()))
    for label in texts.BUILT_IN:
        mine = [one for one in documents if one.label == label]
        ended = [one.messages[-1]["role"] for one in mine if one.messages]
        assert 0.2 < ended.count("user") / len(ended) < 0.4
        said = [one.text or " ".join(turn["content"] for turn in one.messages) for one in mine]
        assert 1000 < sum(len(tokenizer.encode(text)) for text in said) < 2000, label
        questions = [turn["content"] for one in mine for turn in one.messages or () if turn["role"] == "user"]
        assert questions
        assert not any(evaluation_sets.gives_away(question) for question in questions)
    answers = [turn["content"] for one in documents if one.label == "sums" for turn in one.messages[1::2]]
    for answer in answers:
        a, b, total = map(int, re.fullmatch(r"(\d+) \+ (\d+) = (\d+)\.", answer).groups())
        assert a + b == total
        assert arithmetic.pair_held_out(a, b)


# ---------------------------------------- the command line


def test_on_the_command_line(home: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder, text, out = home / "tiny" / "model", tmp_path / "fox.txt", tmp_path / "a.safetensors"
    text.write_text("The quick brown fox")
    options = ("-t", text, "-l", "animals", "-t", text, "-l", "again", "--generate", 3, "--logits", "--tokens", 4)
    done = run("routing", "trace", folder, *options, "-o", out)
    assert (done.code, done.out) == (0, f"{out}\n"), done
    trace = read_trace(out)
    assert (trace.labels, trace.model, trace.n_experts) == (("animals", "again"), str(folder), 8)
    assert (trace.n_tokens, trace.logits is not None) == (2 * 7, True)
    summary = done.err.splitlines()[-1]
    assert re.fullmatch(
        r"14 tokens, 6 of them decoded; 2 documents; animals, again; 2 layers, 2 of 8 experts; \d+\.\d s", summary
    )
    assert sorted(tmp_path.iterdir()) == sorted([text, out])


def test_the_built_in_texts_on_the_command_line(tmp_path: Path) -> None:
    done = run("routing", "trace", "menny", "--tokens", 60, "-o", tmp_path / "a.safetensors")
    assert done.code == 0, done
    trace = read_trace(tmp_path / "a.safetensors")
    assert (trace.domains, trace.model) == (texts.BUILT_IN, "menny")
    assert np.bincount(trace.domain_ids).tolist() == [60] * 7
    assert trace.pieces[0] == "<s>"


def test_refused_on_the_command_line(home: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder, text, out = home / "tiny" / "model", tmp_path / "fox.txt", tmp_path / "a.safetensors"
    text.write_text("fox")
    trace = ("routing", "trace", folder)
    refused(run(*trace, "-t", tmp_path / "no.txt", "-o", out), "no.txt", hint="text file")
    refused(run(*trace, "-t", text, "-l", "a", "-l", "b", "-o", out), "2 labels for 1 files")
    refused(run(*trace, "-t", text, "-o", tmp_path / "none" / "a.safetensors"), "there is no folder")
    refused(run(*trace, "-t", text, "-o", tmp_path), "is a folder")
    refused(run("routing", "trace", tmp_path / "nobody", "-t", text, "-o", out), "nobody")
    refused(run(*trace, "-l", "a", "-o", out), "--label belongs to a --text")
    assert list(tmp_path.iterdir()) == [text]


def test_interrupted_leaves_no_file(tmp_path: Path) -> None:
    text = tmp_path / "numbers.txt"
    text.write_text(" ".join(map(str, range(60_000))))
    with terminal("routing", "trace", "menny", "-t", text, "-o", tmp_path / "a.safetensors") as one:
        one.resize(100)
        one.wait_for("tokens/s")
        one.type("\x03")
        assert one.wait() == 130
    assert list(tmp_path.iterdir()) == [text]
    assert "Traceback" not in one.seen
