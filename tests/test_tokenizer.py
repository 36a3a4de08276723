"""Tokenizers against mistral-common's files, and against sentencepiece's and tokenizers' own decoding."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from octavo.errors import PromptError, TokenizerError
from octavo.tokenizer import TemplatePart, Tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
V1 = DATA / "tokenizer.model.v1"
V3 = DATA / "mistral_instruct_tokenizer_240323.model.v3"
CORPUS = [
    "The router sends each token to two of the eight experts. How much is seven and five?",
    "Combien font sept et cinq ? Sept plus cinq font douze. Où est l'été ?",
    "def add(a, b):\n    return a + b\n\n\tprint(add(2, 3))",
    "Ein Experte ist ein kleines Netz; ¿cuánto es dos más dos? Quanto fa due più due?",
    "<s> </s> [INST] [/INST] <|im_start|> <|im_end|> angle < > | brackets and the like, 0123456789",
] * 3
CONTROLS = ["[INST]", "[/INST]"]
# Text that tries: spellings of controls and bytes, blanks, the mark for a space, characters of 1 to 4 bytes.
WORDS = st.sampled_from(
    [
        *CONTROLS,
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "<|im_start|>",
        "<|im_end|>",
        "\u2581",
        " ",
        "\n",
        "\t",
        "é",
        "€",
        "😀",
    ]
)
CHARS = st.characters(exclude_categories=("Cs",))
TEXTS = st.lists(st.one_of(WORDS, st.text(CHARS, max_size=8))).map("".join)


def train_spm(folder: Path, **options: object) -> Path:
    """A small byte-fallback BPE such as Octavo's own model has, trained here."""
    defaults: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "control_symbols": CONTROLS,
        "num_threads": 1,
        "minloglevel": 2,
    }
    folder.mkdir(parents=True, exist_ok=True)
    prefix = folder / "trained"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(prefix), **(defaults | options)
    )
    return shutil.move(f"{prefix}.model", folder / "tokenizer.model")


def llama_json(spm_file: Path, folder: Path) -> Path:
    """The same BPE as a tokenizer.json of Llama's and Mixtral's make."""
    spm = sentencepiece.SentencePieceProcessor(model_file=str(spm_file))
    names = [spm.id_to_piece(i) for i in range(spm.get_piece_size())]
    vocab = {name: i for i, name in enumerate(names)}
    normal = [i for i, name in enumerate(names) if not (spm.is_control(i) or spm.is_unknown(i) or spm.is_byte(i))]
    merges = []
    for i in normal:
        cuts = [(names[i][:at], names[i][at:]) for at in range(1, len(names[i]))]
        pairs = [pair for pair in cuts if all(part in vocab for part in pair)]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-spm.get_score(i), *pair) for pair in pairs]
    merges.sort(key=lambda merge: merge[0])
    model = models.BPE(vocab, [(a, b) for _, a, b in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>", *CONTROLS])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return _save(made, folder)


def byte_level_json(folder: Path) -> Path:
    """A byte-level BPE (GPT-2's, Llama 3's and Qwen's make), with one added token that is not special."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    made.add_tokens(["<|im_start|>", "<tool>"])
    return _save(made, folder)


def metaspace_json(folder: Path) -> Path:
    """A Unigram with Metaspace, whose vocabulary knows `</s>` as a word too."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", -1.0), ("▁", -2.0), ("▁▁", -2.5)]
    pieces += [(chr(c), -4.0) for c in range(33, 127)] + [("▁the", -3.0), ("ll", -3.0)]
    made = tokenizers.Tokenizer(models.Unigram(pieces, 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _save(made, folder)


def _save(made: tokenizers.Tokenizer, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def files(home: Path) -> dict[str, Path]:
    own = train_spm(home / "own")
    return {
        "v1": V1,
        "v3": V3,
        "own": own,
        "stripping": train_spm(home / "stripping", remove_extra_whitespaces=True),
        "no prefix": train_spm(home / "plain", add_dummy_prefix=False),
        "unigram": train_spm(home / "unigram", model_type="unigram", vocab_size=350),
        "no bytes": train_spm(home / "nobytes", byte_fallback=False, vocab_size=150),
        "llama json": llama_json(own, home / "llama"),
        "byte-level json": byte_level_json(home / "bytes"),
        "metaspace json": metaspace_json(home / "metaspace"),
    }


@pytest.fixture(scope="module")
def every(files: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.from_file(path) for name, path in files.items()}


SPM = ["v1", "v3", "own", "stripping", "no prefix", "unigram", "no bytes"]
JSON = ["llama json", "byte-level json", "metaspace json"]
LOSSLESS = ["v1", "v3", "own", "no prefix", "unigram", "llama json", "byte-level json"]


@functools.cache
def awkward_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of all sorts, with bytes, blanks and control tokens far more often than chance has them."""
    names = {tokenizer.token_name(i): i for i in range(tokenizer.n_vocab)}
    bare = [names[name] for name in ("▁", "▁▁", "<s>", "</s>", "[INST]", "<unk>", "<0x20>", "Ġ") if name in names]
    begun = [names[f"<0x{b:02X}>"] for b in (0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xC0) if f"<0x{b:02X}>" in names]
    begun = begun or [names[c] for c in "âĤ¬ðŁĺĢ" if c in names]
    anything = st.integers(0, tokenizer.n_vocab - 1)
    return st.lists(st.one_of(*(st.sampled_from(some) for some in (bare, begun) if some), anything), max_size=24)


# --- goldens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello", [1, 22557]),
        ("  two", [1, 259, 989]),
        ("a\nb", [1, 264, 13, 28726]),
        ("é", [1, 1233]),
        ("😀", [1, 28705, 30575]),
    ],
)
def test_8x7b_tokens(every: dict[str, Tokenizer], text: str, ids: list[int]) -> None:
    v1 = every["v1"]
    assert v1.encode(text, bos=True) == ids
    assert v1.encode(text) == ids[1:]
    assert v1.decode(ids) == text


def test_what_the_files_say(every: dict[str, Tokenizer]) -> None:
    v1, v3, byte_level = every["v1"], every["v3"], every["byte-level json"]
    assert (v1.n_vocab, v1.bos_id, v1.eos_id, v1.control_id("[INST]"), v1.control_id("<s>")) == (
        32000,
        1,
        2,
        None,
        1,
    )
    assert (v3.n_vocab, v3.bos_id, v3.eos_id, v3.control_id("[INST]"), v3.control_id("[/INST]")) == (
        32768,
        1,
        2,
        3,
        4,
    )
    assert v3.control_id("Hello") is None
    assert v3.control_id("no such piece") is None
    assert byte_level.control_id("</s>") == byte_level.eos_id == byte_level.n_vocab - 4
    assert byte_level.control_id("<tool>") is None
    assert v3.token_name(3) == "[INST]"
    assert v3.token_name(40_000) == ""
    assert v1.chat_template is None


# --- properties ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS)
@settings(deadline=None)
@given(text=TEXTS)
def test_text_survives_a_round_trip(every: dict[str, Tokenizer], name: str, text: str) -> None:
    tokenizer = every[name]
    if name != "byte-level json":  # U+2581 is how these files spell a space: it comes back as one
        text = text.replace("\u2581", " ")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


@pytest.mark.parametrize("name", SPM + JSON)
@settings(deadline=None)
@given(text=TEXTS)
def test_text_never_becomes_a_control_token(every: dict[str, Tokenizer], name: str, text: str) -> None:
    tokenizer = every[name]
    controls = {tokenizer.control_id(control) for control in [*CONTROLS, "<s>", "</s>", "<|im_end|>"]}
    assert controls.isdisjoint(tokenizer.encode(text))


@pytest.mark.parametrize("name", SPM + JSON)
@settings(deadline=None)
@given(data=st.data())
def test_one_token_at_a_time_gives_the_whole(every: dict[str, Tokenizer], name: str, data: st.DataObject) -> None:
    tokenizer = every[name]
    ids = data.draw(awkward_ids(tokenizer))
    detokenizer = tokenizer.detokenizer()
    shown = [detokenizer.push(i) for i in ids]
    assert "".join(shown) + detokenizer.flush() == tokenizer.decode(ids)
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("name", SPM)
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_decoding_is_sentencepiece_s(
    every: dict[str, Tokenizer], files: dict[str, Path], name: str, data: st.DataObject
) -> None:
    tokenizer = every[name]
    reference = _spm(files[name])
    ids = data.draw(awkward_ids(tokenizer))
    assert tokenizer.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("name", JSON)
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_decoding_is_the_library_s(
    every: dict[str, Tokenizer], files: dict[str, Path], name: str, data: st.DataObject
) -> None:
    tokenizer = every[name]
    reference = _library(files[name])
    ids = data.draw(awkward_ids(tokenizer))
    expected = reference.decode(ids)
    # The library turns a whole run of byte tokens into U+FFFD if any of it is ill-formed, which no stream can
    # do; ill-formed runs follow SentencePiece's rule, tested above.
    if name != "llama json" or "\ufffd" not in expected:
        assert tokenizer.decode(ids) == expected


@settings(deadline=None)
@given(text=TEXTS)
def test_both_kinds_of_file_agree(every: dict[str, Tokenizer], text: str) -> None:
    ids = every["own"].encode(text)
    assert every["llama json"].encode(text) == ids
    assert every["llama json"].decode(ids) == every["own"].decode(ids)


_CACHE: dict[Path, object] = {}


def _spm(path: Path) -> sentencepiece.SentencePieceProcessor:
    if path not in _CACHE:
        _CACHE[path] = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return _CACHE[path]  # type: ignore[return-value]


def _library(path: Path) -> tokenizers.Tokenizer:
    if path not in _CACHE:
        _CACHE[path] = tokenizers.Tokenizer.from_file(str(path))
    return _CACHE[path]  # type: ignore[return-value]


# --- streaming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_stream_never_shows_half_a_character(every: dict[str, Tokenizer], name: str) -> None:
    tokenizer = every[name]
    text = "Le café coûte 3 € 😀👩🏽‍💻 漢字 \U0001f9d0"
    detokenizer = tokenizer.detokenizer()
    shown = ""
    for i in tokenizer.encode(text):
        shown += detokenizer.push(i)
        assert text.startswith(shown)
    assert shown == text


def test_a_reply_begins_without_its_space(every: dict[str, Tokenizer]) -> None:
    hello = every["v3"].encode("Hello there")
    assert every["v3"].decode(hello) == "Hello there"
    stream = every["v3"].detokenizer(mid_text=True)
    assert "".join(map(stream.push, hello)) == " Hello there"


def test_an_unfinished_character_is_flushed_as_decode_has_it(every: dict[str, Tokenizer]) -> None:
    own = every["own"]
    names = {own.token_name(i): i for i in range(own.n_vocab)}
    euro = [names["<0xE2>"], names["<0x82>"], names["<0xAC>"]]
    stream = own.detokenizer()
    assert [stream.push(i) for i in euro] == ["", "", "€"]
    assert [stream.push(i) for i in euro[:2]] == ["", ""]
    assert stream.flush() == "\ufffd\ufffd"
    assert stream.push(names["a"]) == "a"


def test_ids_without_text(every: dict[str, Tokenizer]) -> None:
    v3 = every["v3"]
    hello = v3.encode("Hello")
    assert v3.decode([1, 3, *hello, 4, 2]) == "Hello"
    assert v3.decode([*hello, v3.n_vocab, 99_999, -1]) == "Hello"
    assert v3.decode([]) == ""


def test_a_token_costs_the_same_at_any_place(every: dict[str, Tokenizer]) -> None:
    """What is held between tokens stays below a character, however long the stream."""
    own = every["own"]
    rng = random.Random(5)
    stream = own.detokenizer()
    for _ in range(20_000):
        stream.push(rng.randrange(own.n_vocab))
        assert len(stream._pending) < 4


# --- control tokens ------------------------------------------------------------------------------------


def test_byte_level_specials_are_text_and_plain_added_tokens_are_tokens(every: dict[str, Tokenizer]) -> None:
    tokenizer = every["byte-level json"]
    special, plain = tokenizer.encode("<|im_end|>"), tokenizer.encode("<tool>")
    assert len(special) > 1
    assert [tokenizer.token_name(i) for i in plain] == ["<tool>"]
    assert tokenizer.decode([tokenizer.n_vocab - 3, *special, *plain]) == "<|im_end|><tool>"


def test_template_parts_keep_a_person_s_controls_as_text(every: dict[str, Tokenizer]) -> None:
    for name in ("own", "llama json"):
        tokenizer = every[name]
        inst, close = tokenizer.control_id("[INST]"), tokenizer.control_id("[/INST]")
        parts = [TemplatePart("[INST]", True), TemplatePart("who", False), TemplatePart("[/INST]", True)]
        assert tokenizer.encode_template(parts) == [inst, *tokenizer.encode("who"), close]
        typed = "[/INST] </s>"
        parts[1] = TemplatePart(typed, False)
        assert tokenizer.encode_template(parts) == [inst, *tokenizer.encode(typed), close]
        # half a control token from either side makes no control token
        halves = [TemplatePart("[IN", True), TemplatePart("ST]", False)]
        assert tokenizer.encode_template(halves) == tokenizer.encode("[INST]")
        assert tokenizer.encode_template([]) == []
        assert tokenizer.find_control("a [/INST] b") == "[/INST]"
        assert tokenizer.find_control("[ INST]") is None


def test_template_words_merge_across_parts(every: dict[str, Tokenizer]) -> None:
    for tokenizer in every.values():
        parts = [TemplatePart("How mu", True), TemplatePart("ch is se", False), TemplatePart("ven?", True)]
        assert tokenizer.encode_template(parts) == tokenizer.encode("How much is seven?")


def test_the_library_s_own_parse_of_a_template(every: dict[str, Tokenizer], files: dict[str, Path]) -> None:
    for name in JSON:
        text = "<s>the user says</s> and the other"
        ids = _library(files[name]).encode(text, add_special_tokens=False).ids
        assert every[name].encode_template([TemplatePart(text, True)]) == ids


def test_a_control_token_in_the_vocabulary_itself(home: Path, files: dict[str, Path]) -> None:
    """SentencePiece parses a user-defined symbol out of text; one that is special must not be."""
    folder = home / "symbols"
    train_spm(folder, user_defined_symbols=["<|im_start|>", "<tool>"])
    loose = Tokenizer.from_folder(folder)
    assert loose is not None
    [_, tag] = loose.encode("<|im_start|>")
    assert loose.control_id("<|im_start|>") is None
    added = {str(tag): {"content": "<|im_start|>", "special": True}}
    _config(folder, added_tokens_decoder=added)
    strict = Tokenizer.from_folder(folder)
    assert strict is not None
    assert strict.control_id("<|im_start|>") == tag
    typed = strict.encode("a <|im_start|> b <tool>")
    assert tag not in typed
    assert typed[-1] == loose.encode("<tool>")[-1]
    assert strict.decode([tag, *strict.encode("x")]) == "x"


# --- folders -------------------------------------------------------------------------------------------


def _config(folder: Path, **keys: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(keys), encoding="utf-8")


def test_which_file_of_a_folder(tmp_path: Path, files: dict[str, Path]) -> None:
    assert Tokenizer.from_folder(tmp_path) is None
    shutil.copy(files["byte-level json"], tmp_path / "tokenizer.json")
    assert Tokenizer.from_folder(tmp_path).path.name == "tokenizer.json"
    shutil.copy(V3, tmp_path / "tokenizer.model.v3")
    shutil.copy(V3, tmp_path / "tokenizer.model.v11")
    assert Tokenizer.from_folder(tmp_path).path.name == "tokenizer.model.v11"
    shutil.copy(V1, tmp_path / "tokenizer.model")
    assert Tokenizer.from_folder(str(tmp_path)).n_vocab == 32000


@pytest.mark.parametrize("how", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_added_above_a_sentencepiece_vocabulary(tmp_path: Path, how: str) -> None:
    """ChatML fine-tunes of 8x7B: 32000 pieces in the model file, two more beside it."""
    shutil.copy(V1, tmp_path / "tokenizer.model")
    tokens = {"<|im_end|>": 32000, "<|im_start|>": 32001}
    if how == "added_tokens.json":
        (tmp_path / how).write_text(json.dumps(tokens))
        _config(tmp_path, eos_token="<|im_end|>", add_bos_token=False)
    else:
        decoder = {str(i): {"content": name, "special": i == 32000} for name, i in tokens.items()}
        decoder |= {"1": {"content": "<s>", "special": True}, "2": {"content": "</s>", "special": True}}
        _config(tmp_path, eos_token={"content": "<|im_end|>"}, bos_token="<s>", added_tokens_decoder=decoder)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.eos_id) == (32002, 1, 32000)
    assert tokenizer.adds_bos == (how != "added_tokens.json")
    assert tokenizer.control_id("<|im_start|>") == 32001
    typed = "<|im_start|>system"
    assert max(tokenizer.encode(typed)) < 32000
    assert tokenizer.decode(tokenizer.encode(typed)) == typed
    visible = "" if how == "added_tokens.json" else "<|im_start|>"
    assert tokenizer.decode([32001, 22557, 32000]) == visible + (" Hello" if visible else "Hello")
    [begin, *_, end] = tokenizer.encode_template([TemplatePart("<|im_start|>user\nHi<|im_end|>", True)])
    assert (begin, end) == (32001, 32000)


def test_a_token_that_only_the_template_speaks_is_a_control_token(tmp_path: Path, files: dict[str, Path]) -> None:
    shutil.copy(files["byte-level json"], tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert len(tokenizer.encode("<|im_start|>")) == 1
    (tmp_path / "chat_template.jinja").write_text("{{ '<|im_start|>' }}{{ messages[0].content }}")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert len(tokenizer.encode("<|im_start|>")) > 1
    assert tokenizer.control_id("<|im_start|>") is not None
    assert tokenizer.decode([tokenizer.control_id("<|im_start|>")]) == "<|im_start|>"


def test_ends_named_in_tokenizer_config(tmp_path: Path, files: dict[str, Path]) -> None:
    shutil.copy(files["byte-level json"], tmp_path)
    _config(tmp_path, bos_token=None, eos_token={"content": "<|im_end|>"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.token_name(tokenizer.eos_id) == "<|im_end|>"
    assert tokenizer.token_name(tokenizer.bos_id) == "<s>"
    shutil.copy(files["own"], tmp_path)
    with pytest.raises(TokenizerError, match=r"eos_token is '<\|im_end\|>'"):
        Tokenizer.from_folder(tmp_path)


def test_no_bos_where_there_is_none(tmp_path: Path) -> None:
    train_spm(tmp_path, bos_id=-1, eos_id=1, unk_id=0)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.bos_id is None
    assert tokenizer.encode("one", bos=True) == tokenizer.encode("one")


def test_a_saved_truncation_does_not_cut_prompts(tmp_path: Path, files: dict[str, Path]) -> None:
    cut = tokenizers.Tokenizer.from_file(str(files["llama json"]))
    cut.enable_truncation(4)
    cut.enable_padding(length=64)
    cut.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode("seven and five are twelve")) == "seven and five are twelve"


@pytest.mark.parametrize(
    "template", ["plain", [{"name": "default", "template": "plain"}, {"name": "tools", "template": "x"}]]
)
def test_where_the_chat_template_stands(tmp_path: Path, files: dict[str, Path], template: object) -> None:
    shutil.copy(files["own"], tmp_path)
    _config(tmp_path, chat_template=template)
    assert Tokenizer.from_folder(tmp_path).chat_template == "plain"
    (tmp_path / "chat_template.jinja").write_text("beside é", encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).chat_template == "beside é"


# --- bad input -----------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 493443\n"


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe garbage", POINTER, b"[1, 2]", b'{"model": 3}'])
def test_damaged_files(tmp_path: Path, files: dict[str, Path], name: str, content: bytes) -> None:
    if name == "tokenizer_config.json" and content.startswith(b"{"):
        content = b'{"added_tokens_decoder": {"x": 3}}'
    if name == "added_tokens.json" and content.startswith(b"{"):
        content = b'{"<x>": "many"}'
    if name not in ("tokenizer.model", "tokenizer.json"):
        shutil.copy(files["own"], tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert name in caught.value.message
    assert "\n" not in caught.value.message
    if content == POINTER:
        assert "git lfs pull" in caught.value.hint


def test_a_truncated_model_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(V1.read_bytes()[:200_000])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: not a SentencePiece model"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": 3},
        {"chat_template": [{"name": "default"}]},
        {"chat_template": [{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]},
        {"chat_template": {}},
        {"eos_token": ["</s>"]},
        {"bos_token": "<nothing>"},
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, files: dict[str, Path], config: dict[str, object]) -> None:
    shutil.copy(files["own"], tmp_path)
    _config(tmp_path, **config)
    with pytest.raises(TokenizerError, match=next(iter(config))):
        Tokenizer.from_folder(tmp_path)


def test_tekken_alone_is_named(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tekken\.json"):
        Tokenizer.from_folder(tmp_path)


def test_no_such_place(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"x\.model: cannot be read"):
        Tokenizer.from_file(tmp_path / "x.model")


def test_a_decoder_that_needs_the_whole_text_is_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    made = tokenizers.Tokenizer.from_file(str(files["llama json"]))
    for decoder in (
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
    ):
        made.decoder = decoder
        made.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(TokenizerError, match=r"decoder .* is not supported"):
            Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["own", "llama json", "byte-level json"])
def test_half_a_surrogate_pair(every: dict[str, Tokenizer], name: str) -> None:
    with pytest.raises(PromptError, match=r"U\+D83D at character 3"):
        every[name].encode("ab \ud83d")


def test_import_is_cheap() -> None:
    code = (
        "import sys, octavo.tokenizer, octavo.chat;"
        "print([m for m in ('torch', 'sentencepiece', 'tokenizers', 'jinja2', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
