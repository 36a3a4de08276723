"""The tokenizer inside a GGUF file: to metadata and back, against sentencepiece and mistral-common's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import sentencepiece
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import normalizers, pre_tokenizers

from octavo.errors import TokenizerError, UserError
from octavo.storage.files import PlainFile
from octavo.storage.gguf import GGUFFile
from octavo.storage.gguf_write import gguf_header
from octavo.tokenizer import TemplatePart, Tokenizer
from octavo.tokenizer.gguf import gguf_tokenizer, tokenizer_files, tokenizer_from_gguf
from octavo.tokenizer.spm_proto import SpmModel, SpmPiece
from test_tokenizer import CHARS, TEXTS, byte_level_json, llama_json, metaspace_json, train_spm

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
TEMPLATE = "{{ '<|im_start|>' }}{{ messages[0].content }}{{ '<|im_end|>' }}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("tokenizers")
    for name, file in FILES.items():
        (home / name).mkdir()
        shutil.copy(DATA / file, home / name / "tokenizer.model")
    train_spm(home / "own")
    train_spm(home / "no prefix", add_dummy_prefix=False)
    train_spm(home / "stripping", remove_extra_whitespaces=True)
    train_spm(home / "no bytes", byte_fallback=False, vocab_size=150)
    train_spm(home / "symbols", user_defined_symbols=["<tool>"], pad_id=3)
    llama_json(home / "own" / "tokenizer.model", home / "llama json")
    return {path.name: path for path in home.iterdir()}


NAMES = ["v1", "v3", "own", "no prefix", "stripping", "no bytes", "symbols", "llama json"]


@pytest.fixture(scope="module")
def metadata(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """As it comes out of a file, with more rows than tokens."""
    found = {}
    for name in NAMES:
        path = folders[name] / "a.gguf"
        path.write_bytes(gguf_header(gguf_tokenizer(folders[name], 32_832), [])[0])
        found[name] = GGUFFile(PlainFile(path)).metadata
        path.unlink()
    return found


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path], metadata: dict[str, dict[str, Any]]) -> dict[str, tuple[Tokenizer, Tokenizer]]:
    """Each tokenizer as its folder has it, and after a journey through GGUF."""
    return {name: (opened(folders[name]), tokenizer_from_gguf(metadata[name], "a.gguf")) for name in NAMES}


def opened(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


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
def test_8x7b_tokens(pairs: dict[str, tuple[Tokenizer, Tokenizer]], text: str, ids: list[int]) -> None:
    [_, tokenizer] = pairs["v1"]
    assert tokenizer.encode(text, bos=True) == ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(text=TEXTS)
def test_text_gives_the_same_tokens(pairs: dict[str, tuple[Tokenizer, Tokenizer]], name: str, text: str) -> None:
    before, after = pairs[name]
    ids = before.encode(text, bos=True)
    assert after.encode(text, bos=True) == ids
    assert after.decode(ids) == before.decode(ids)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_same(pairs: dict[str, tuple[Tokenizer, Tokenizer]], name: str) -> None:
    before, after = pairs[name]
    assert (after.n_vocab, after.bos_id, after.eos_id) == (before.n_vocab, before.bos_id, before.eos_id)
    ids = range(before.n_vocab)
    assert [after.token_name(i) for i in ids] == [before.token_name(i) for i in ids]
    for text in ("<s>", "</s>", "[INST]", "<tool>", "Hello"):
        assert after.control_id(text) == before.control_id(text)
    for i in {*range(0, before.n_vocab, 97), *range(300)} if name != "llama json" else ():  # its decoder is its own
        assert after.decode([i]) == before.decode([i])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "llama json"])
def test_pieces_are_sentencepiece_s(folders: dict[str, Path], metadata: dict[str, dict[str, Any]], name: str) -> None:
    data = (folders[name] / "tokenizer.model").read_bytes()
    reference, keys = sentencepiece.SentencePieceProcessor(model_proto=data), metadata[name]
    ids = list(range(reference.get_piece_size()))
    tests = ("is_unknown", "is_control", "is_unused", "is_byte")
    kinds = dict(zip(tests, (2, 3, 5, 6), strict=True))
    for token_id, piece, score, kind in zip(
        ids,
        keys["tokenizer.ggml.tokens"],
        keys["tokenizer.ggml.scores"],
        keys["tokenizer.ggml.token_type"],
        strict=False,
    ):
        assert (piece, score) == (reference.id_to_piece(token_id), reference.get_score(token_id))
        assert {getattr(reference, test)(token_id) for test in tests if kinds[test] == kind} <= {True}
        assert sum(getattr(reference, test)(token_id) for test in tests) == (kind in kinds.values())
    padding = keys["tokenizer.ggml.tokens"][len(ids) :]
    assert padding == [f"[PAD{i}]" for i in range(len(ids), 32_832)]
    assert set(keys["tokenizer.ggml.token_type"][len(ids) :]) == {5}
    model = SpmModel.from_bytes(data, name)
    written = tokenizer_files(keys, name)["tokenizer.model"]
    assert SpmModel.from_bytes(written, name) == model
    again = sentencepiece.SentencePieceProcessor(model_proto=written)
    for special in ("unk_id", "bos_id", "eos_id", "pad_id"):
        assert getattr(again, special)() == getattr(reference, special)()
    assert again.decode([again.unk_id()]) == reference.decode([reference.unk_id()])


def test_what_llama_cpp_is_told(metadata: dict[str, dict[str, Any]]) -> None:
    keys = {key: value for key, value in metadata["v1"].items() if not isinstance(value, list)}
    prefix = "tokenizer.ggml."
    assert {key.removeprefix(prefix): value for key, value in keys.items()} == {
        "model": "llama",
        "pre": "default",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": True,
        "remove_extra_whitespaces": False,
    }
    assert metadata["symbols"][f"{prefix}padding_token_id"] == 3
    assert metadata["no prefix"][f"{prefix}add_space_prefix"] is False
    assert metadata["stripping"][f"{prefix}remove_extra_whitespaces"] is True


@pytest.fixture
def chatml(tmp_path: Path) -> Path:
    """A fine-tune of 8x7B: two tokens above the vocabulary, another end, a template, no BOS."""
    shutil.copy(DATA / FILES["v1"], tmp_path / "tokenizer.model")
    names = {"<|im_end|>": 32000, "<|im_start|>": 32001, "<extra>": 32003}
    decoder = {str(i): {"content": name, "special": name == "<|im_end|>"} for name, i in names.items()}
    decoder |= {"2": {"content": "</s>", "special": True}}
    config = {"eos_token": "<|im_end|>", "add_bos_token": False, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": decoder}))
    return tmp_path


def test_tokens_added_above_the_vocabulary(chatml: Path, tmp_path: Path) -> None:
    keys, before = gguf_tokenizer(chatml, 32_004), opened(chatml)
    assert keys["tokenizer.ggml.tokens"][32_000:] == ["<|im_end|>", "<|im_start|>", "[PAD32002]", "<extra>"]
    assert keys["tokenizer.ggml.token_type"][32_000:] == [3, 4, 5, 4]
    assert keys["tokenizer.chat_template"] == TEMPLATE
    after = tokenizer_from_gguf(keys, "a.gguf")
    written = tmp_path / "written"
    written.mkdir()
    for name, data in tokenizer_files(keys, "a.gguf").items():
        (written / name).write_bytes(data)
    assert gguf_tokenizer(written, 32_004) == keys
    for tokenizer in (after, opened(written)):
        assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.eos_id) == (32_004, 1, 32_000)
        assert (tokenizer.adds_bos, tokenizer.chat_template) == (False, TEMPLATE)
        for text in ("<|im_start|>user", "a <|im_end|> b", "</s>", "two"):
            assert tokenizer.encode(text) == before.encode(text)
        parts = [TemplatePart("<|im_start|>", True), TemplatePart("Hi<|im_end|>", False)]
        assert tokenizer.encode_template(parts) == before.encode_template(parts)
        assert tokenizer.decode([32_001, 22_557, 32_000]) == before.decode([32_001, 22_557, 32_000])
        assert tokenizer.control_id("<|im_start|>") == 32_001


def test_a_word_of_the_vocabulary_that_is_special(tmp_path: Path) -> None:
    train_spm(tmp_path, user_defined_symbols=["<|im_start|>", "<tool>"])
    [_, tag] = opened(tmp_path).encode("<|im_start|>")
    config = {"added_tokens_decoder": {str(tag): {"content": "<|im_start|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    keys, before = gguf_tokenizer(tmp_path, 420), opened(tmp_path)
    assert keys["tokenizer.ggml.token_type"][tag : tag + 2] == [3, 4]
    after = tokenizer_from_gguf(keys, "a.gguf")
    typed = "a <tool> b <|im_start|>"
    assert tag not in after.encode(typed)
    assert tag + 1 in after.encode(typed)
    assert after.control_id("<|im_start|>") == before.control_id("<|im_start|>") == tag
    assert after.decode([tag, *after.encode("x")]) == before.decode([tag, *before.encode("x")]) == "x"


def test_files_that_transformers_reads(tmp_path: Path, metadata: dict[str, dict[str, Any]]) -> None:
    for name, data in tokenizer_files(metadata["v1"], "a.gguf").items():
        (tmp_path / name).write_bytes(data)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a\nb").input_ids == [1, 264, 13, 28726]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)


def test_what_a_file_may_leave_out(metadata: dict[str, dict[str, Any]]) -> None:
    prefix = "tokenizer.ggml."
    kept = {f"{prefix}{key}" for key in ("model", "tokens", "scores", "token_type")}
    keys = {key: value for key, value in metadata["v1"].items() if key in kept}
    keys[f"{prefix}token_type"] = [3, *keys[f"{prefix}token_type"][1:]]  # <unk> as a control token
    tokenizer = tokenizer_from_gguf(keys, "a.gguf")
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (32_000, 1, 2, True)
    assert tokenizer.encode("Hello", bos=True) == [1, 22_557]
    assert str(tokenizer.path) == "a.gguf"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "gpt2", "tokenizer.ggml.model is 'gpt2'; expected 'llama'"),
        ("model", None, "tokenizer.ggml.model is None"),
        ("tokens", None, "has no tokenizer.ggml.tokens"),
        ("tokens", [], "has no tokenizer.ggml.tokens"),
        ("tokens", ["a", ""], "holds '' for token 1"),
        ("tokens", ["<unk>", "a", "a"], "420 token types"),
        ("scores", [0.0, 1], "holds 1 for token 1"),
        ("scores", [0.0, float("nan")], "holds nan for token 1"),
        ("scores", [0.0, 1e300], "holds 1e+300 for token 1"),
        ("token_type", [2, 7], "holds 7 for token 1"),
        ("token_type", [2, True], "holds True for token 1"),
        ("bos_token_id", 420, "bos_token_id is 420; expected one of the 420 tokens"),
        ("eos_token_id", "2", "eos_token_id is '2'"),
        ("token_type", [2] * 420, "not a SentencePiece model"),
        ("tokens", ["same"] * 420, "not a SentencePiece model"),
        ("token_type", [2, *[1] * 418, 6], "not a SentencePiece model"),
    ],
)
def test_damaged_metadata(folders: dict[str, Path], key: str, value: Any, message: str) -> None:
    keys = gguf_tokenizer(folders["own"], 420) | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(TokenizerError) as caught:
        tokenizer_from_gguf(keys, "a.gguf")
    assert caught.value.message.startswith("a.gguf: ")
    assert message in caught.value.message


def test_a_template_that_is_no_text(metadata: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(TokenizerError, match="chat_template must be a string, found list"):
        tokenizer_files(metadata["own"] | {"tokenizer.chat_template": ["x"]}, "a.gguf")


# --- what cannot be written ----------------------------------------------------------------------------


def test_tokenizers_that_gguf_has_no_words_for(tmp_path: Path, folders: dict[str, Path]) -> None:
    def refused(folder: Path, message: str, vocab_size: int = 32_000) -> None:
        with pytest.raises(TokenizerError, match=message) as caught:
            gguf_tokenizer(folder, vocab_size)
        assert caught.value.hint

    refused(tmp_path, "holds no tokenizer")
    refused(folders["own"], "has 420 tokens; the model's embedding has 419 rows", 419)
    refused(train_spm(tmp_path / "unigram", model_type="unigram", vocab_size=350).parent, "model of type BPE")
    refused(train_spm(tmp_path / "nfkc", normalization_rule_name="nfkc").parent, "leaves text as it is")
    refused(byte_level_json(tmp_path / "bytes").parent, "no BPE over whole texts")
    refused(metaspace_json(tmp_path / "metaspace").parent, "no BPE over whole texts")


def edited(folder: Path, source: Path, **model: Any) -> Path:
    """A copy of a tokenizer.json whose model has other keys."""
    spec = json.loads((source / "tokenizer.json").read_text())
    spec["model"] |= model
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def test_merges_that_scores_cannot_say(tmp_path: Path, folders: dict[str, Path]) -> None:
    merges = json.loads((folders["llama json"] / "tokenizer.json").read_text())["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    twice = next(i for i in range(1, len(made)) if made[i] == made[i - 1])
    apart = [merges[twice], *merges[:twice], *merges[twice + 1 :]]
    with pytest.raises(TokenizerError, match=rf"give '{made[twice]}' stand apart"):
        gguf_tokenizer(edited(tmp_path / "apart", folders["llama json"], merges=apart), 420)
    fewer = [*merges[:twice], *merges[twice + 1 :]]
    with pytest.raises(TokenizerError, match=rf"do not make '{made[twice]}' of"):
        gguf_tokenizer(edited(tmp_path / "fewer", folders["llama json"], merges=fewer), 420)
    with pytest.raises(TokenizerError, match="no unknown token"):
        gguf_tokenizer(edited(tmp_path / "unknown", folders["llama json"], unk_token="<none>", byte_fallback=True), 420)


@pytest.mark.parametrize(("scheme", "prefix"), [("always", True), ("first", True), ("never", False)])
def test_the_ways_to_spell_a_space(tmp_path: Path, folders: dict[str, Path], scheme: str, prefix: bool) -> None:
    library = Library.from_file(str(folders["llama json"] / "tokenizer.json"))
    library.normalizer = None
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    library.save(str(tmp_path / "tokenizer.json"))
    keys = gguf_tokenizer(tmp_path, 420)
    assert keys["tokenizer.ggml.add_space_prefix"] is prefix
    for text in ("two of the eight", "a  b\n", "é€"):
        assert tokenizer_from_gguf(keys, "a.gguf").encode(text) == library.encode(text, add_special_tokens=False).ids
    library.pre_tokenizer = None
    library.normalizer = normalizers.Replace(" ", "▁")
    library.save(str(tmp_path / "tokenizer.json"))
    assert gguf_tokenizer(tmp_path, 420)["tokenizer.ggml.add_space_prefix"] is False
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="no BPE over whole texts"):
        gguf_tokenizer(tmp_path, 420)


# --- the protocol buffer -------------------------------------------------------------------------------


PIECES = st.builds(SpmPiece, st.text(CHARS), st.floats(width=32, allow_nan=False), st.sampled_from([1, 3, 4, 5, 6]))


@settings(deadline=None)
@given(
    pieces=st.lists(PIECES),
    ids=st.tuples(*[st.integers(-1, 0)] * 3),
    add_prefix=st.booleans(),
    remove_spaces=st.booleans(),
)
def test_any_model_survives(
    pieces: list[SpmPiece], ids: tuple[int, int, int], add_prefix: bool, remove_spaces: bool
) -> None:
    model = SpmModel([SpmPiece("<unk>", 0.0, 2), *pieces], *ids, add_prefix, remove_spaces)
    assert SpmModel.from_bytes(model.to_bytes(), "x") == model


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damaged_models_are_read_or_refused(folders: dict[str, Path], data: st.DataObject) -> None:
    mutant = bytearray((folders["no bytes"] / "tokenizer.model").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutant)))
        mutant[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=6))
    try:
        model = SpmModel.from_bytes(bytes(mutant), "x")
    except UserError:
        return
    assert model.pieces[model.unk_id].type == 2
