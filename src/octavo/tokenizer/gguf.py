"""The tokenizer that travels inside a GGUF file, under the keys `tokenizer.*` of its metadata.

The kind "llama" is SentencePiece's BPE: tokens, scores and types are those of a `tokenizer.model`, whose normaliser
shrinks to `add_space_prefix` and `remove_extra_whitespaces`. Unused tokens called `[PADn]` fill the vocabulary up to
the rows of the embedding; they are dropped on reading.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo.errors import TokenizerError
from octavo.tokenizer import Tokenizer
from octavo.tokenizer.files import AddedToken, Settings, find_tokenizer_file, read_bytes, read_json_object
from octavo.tokenizer.pieces import SPACE
from octavo.tokenizer.spm import SentencePiece
from octavo.tokenizer.spm_proto import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SpmModel,
    SpmPiece,
    with_added,
)

FLOAT32_MAX = 3.4e38


def tokenizer_from_gguf(metadata: Mapping[str, Any], location: str) -> Tokenizer:
    """Build the tokenizer of a GGUF file.

    Args:
        metadata: of a `GGUFFile` or `GGUFSource`.
        location: the file, for messages and `Tokenizer.path`.

    Raises:
        TokenizerError: there is none, or one of another kind, or it is damaged.
    """
    model, settings = _read(metadata, location)
    path = Path(location)
    return Tokenizer(SentencePiece(model.to_bytes(), path, settings), path, settings)


def tokenizer_files(metadata: Mapping[str, Any], location: str) -> dict[str, bytes]:
    """The same tokenizer as the files of a checkpoint folder: `tokenizer.model` and `tokenizer_config.json`.

    Args and errors: as `tokenizer_from_gguf`.
    """
    model, settings = _read(metadata, location)
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": settings.adds_bos,
        "add_eos_token": False,
        "add_prefix_space": model.add_dummy_prefix,
        "bos_token": settings.bos_token,
        "eos_token": settings.eos_token,
        "unk_token": model.pieces[model.unk_id].name,
        "added_tokens_decoder": {
            str(token.id): {"content": token.name, **plain, "special": token.special} for token in settings.added
        },
        "clean_up_tokenization_spaces": False,
        "legacy": True,  # transformers 4: a space before every text, as SentencePiece puts it
    }
    if settings.chat_template is not None:
        config["chat_template"] = settings.chat_template
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return {"tokenizer.model": model.to_bytes(), "tokenizer_config.json": text.encode()}


def _read(metadata: Mapping[str, Any], where: str) -> tuple[SpmModel, Settings]:
    model = _read_model(metadata, where)
    settings = _read_settings(metadata, model, where)
    # SentencePiece parses user-defined pieces out of text, which must not make the tokens that conversations are of.
    spoken = (piece.type == USER_DEFINED and settings.speaks(piece.name) for piece in model.pieces)
    pieces = [p._replace(type=UNUSED) if hide else p for p, hide in zip(model.pieces, spoken, strict=True)]
    return replace(model, pieces=pieces), settings


def _read_model(metadata: Mapping[str, Any], where: str) -> SpmModel:
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "llama":
        raise TokenizerError(
            f"{where}: tokenizer.ggml.model is {kind!r}; expected 'llama', SentencePiece's BPE",
            "load the checkpoint that the GGUF file was made of, with its tokenizer.json",
        )
    names = _read_list(metadata, "tokens", where, lambda name: isinstance(name, str) and name != "")
    types = _read_list(metadata, "token_type", where, lambda kind: type(kind) is int and NORMAL <= kind <= BYTE)
    scores = _read_list(metadata, "scores", where, lambda s: isinstance(s, float) and abs(s) < FLOAT32_MAX)
    if not len(names) == len(types) == len(scores):
        raise TokenizerError(f"{where}: has {len(names)} tokens, {len(types)} token types and {len(scores)} scores")
    if UNKNOWN not in types:  # some converters call it a control token
        types[_read_id(metadata, "unknown", names, 0, where)] = UNKNOWN
    pieces = [SpmPiece(*piece) for piece in zip(names, scores, types, strict=True)]
    while pieces and pieces[-1] == _padding(len(pieces) - 1)._replace(score=pieces[-1].score):
        pieces.pop()
    return SpmModel(
        pieces,
        bos_id=_read_id(metadata, "bos", pieces, _find(pieces, "<s>"), where),
        eos_id=_read_id(metadata, "eos", pieces, _find(pieces, "</s>"), where),
        pad_id=_read_id(metadata, "padding", pieces, -1, where),
        add_dummy_prefix=metadata.get("tokenizer.ggml.add_space_prefix") is not False,
        remove_extra_whitespaces=metadata.get("tokenizer.ggml.remove_extra_whitespaces") is True,
    )


def _read_list(metadata: Mapping[str, Any], key: str, where: str, fits: Any) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not values:
        raise TokenizerError(f"{where}: has no tokenizer.ggml.{key}", "convert the checkpoint anew")
    wrong = next((i for i, value in enumerate(values) if not fits(value)), None)
    if wrong is not None:
        raise TokenizerError(
            f"{where}: tokenizer.ggml.{key} holds {values[wrong]!r} for token {wrong}", "convert the checkpoint anew"
        )
    return list(values)


def _read_id(metadata: Mapping[str, Any], name: str, tokens: Sequence[Any], default: int, where: str) -> int:
    """A special token's id; the default, which may be -1, where the file does not say."""
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None:
        return default
    if type(token_id) is not int or not 0 <= token_id < len(tokens):
        raise TokenizerError(
            f"{where}: tokenizer.ggml.{name}_token_id is {token_id!r}; expected one of the {len(tokens)} tokens",
            "convert the checkpoint anew",
        )
    return token_id


def _find(pieces: Sequence[SpmPiece], name: str) -> int:
    """The control token of that name; -1 if there is none. Files made without a config do not name their own."""
    return next((i for i, piece in enumerate(pieces) if piece.type == CONTROL and piece.name == name), -1)


def _read_settings(metadata: Mapping[str, Any], model: SpmModel, where: str) -> Settings:
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{where}: tokenizer.chat_template must be a string, found {type(template).__name__}")
    special = (CONTROL, USER_DEFINED)
    return Settings(
        chat_template=template,
        bos_token=_name(model, model.bos_id),
        eos_token=_name(model, model.eos_id),
        adds_bos=metadata.get("tokenizer.ggml.add_bos_token") is not False,
        added=tuple(AddedToken(p.name, i, p.type == CONTROL) for i, p in enumerate(model.pieces) if p.type in special),
    )


def _name(model: SpmModel, token_id: int) -> str | None:
    return None if token_id < 0 or model.pieces[token_id].type == UNKNOWN else model.pieces[token_id].name


def _padding(token_id: int) -> SpmPiece:
    """A token for a row of the embedding that has none, by the name that llama.cpp's converter gives it."""
    return SpmPiece(f"[PAD{token_id}]", -1000.0, UNUSED)


def gguf_tokenizer(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Return a checkpoint folder's tokenizer as GGUF metadata.

    Args:
        folder: holds `tokenizer.model`, or a `tokenizer.json` of the same kind, and perhaps settings beside it.
        vocab_size: the rows of the embedding; llama.cpp wants as many tokens.

    Raises:
        TokenizerError: there is none, it is damaged or of another kind, or has more tokens than that.
    """
    path = find_tokenizer_file(folder)
    if path is None:
        raise TokenizerError(f"{folder}: holds no tokenizer", "put the checkpoint's tokenizer.model there")
    tokenizer, settings = Tokenizer.from_file(path), Settings.read(folder)
    if tokenizer.n_vocab > vocab_size:
        raise TokenizerError(
            f"{path}: has {tokenizer.n_vocab} tokens; the model's embedding has {vocab_size} rows",
            "is this the tokenizer that came with the weights?",
        )
    if path.suffix == ".json":
        model = _model_of_json(read_json_object(path), path)
    else:
        model = SpmModel.from_bytes(read_bytes(path), str(path))
    found = with_added(model.pieces, settings.added)
    pieces = [found.get(i) or _padding(i) for i in range(vocab_size)]
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unknown": model.unk_id, "padding": model.pad_id}
    metadata: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.name for piece in pieces],
        "scores": [piece.score for piece in pieces],
        "token_type": [piece.type for piece in pieces],
        **{f"{name}_token_id": i for name, i in ids.items() if i is not None and i >= 0},
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": False,
        "add_space_prefix": model.add_dummy_prefix,
        "remove_extra_whitespaces": model.remove_extra_whitespaces,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _model_of_json(spec: Mapping[str, Any], path: Path) -> SpmModel:
    """A tokenizer.json of SentencePiece's make. Scores are ranks: the earlier a merge stands, the higher.

    SentencePiece merges any two neighbours that together are a token, so the file must list every such pair, and
    those that give the same token one after the other.
    """
    model, prefix = spec["model"], _space_prefix(spec)
    if prefix is None or model.get("type") != "BPE" or not model.get("byte_fallback") or model.get("ignore_merges"):
        raise _not_spm(path, "it is no BPE over whole texts that falls back to bytes")
    vocab: Mapping[str, int] = model["vocab"]
    merges = [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]]
    scores: dict[str, float] = {}
    for merge in merges:
        token = "".join(merge)
        if token in scores and next(reversed(scores)) != token:
            raise _not_spm(path, f"its merges that give {token!r} stand apart")
        scores.setdefault(token, float(-len(scores)))
    added = {token["content"]: bool(token["special"]) for token in spec.get("added_tokens") or ()}
    types = {name: CONTROL if special else USER_DEFINED for name, special in added.items()}
    types |= {name: BYTE for name in (f"<0x{byte:02X}>" for byte in range(256)) if name in vocab}
    unknown = model.get("unk_token") or "<unk>"  # transformers 5 leaves it out
    if unknown not in vocab:
        raise _not_spm(path, "it has no unknown token")
    types[unknown] = UNKNOWN
    listed = set(merges)
    for name in vocab.keys() - types.keys():
        pairs = ((name[:at], name[at:]) for at in range(1, len(name)))
        missing = next((p for p in pairs if p not in listed and vocab.keys() >= set(p)), None)
        if missing is not None:
            raise _not_spm(path, f"its merges do not make {name!r} of {' and '.join(map(repr, missing))}")
    ids = {i: name for name, i in vocab.items()} | {t["id"]: t["content"] for t in spec.get("added_tokens") or ()}
    if ids.keys() != set(range(len(ids))):
        raise _not_spm(path, "its ids leave gaps")
    names = (ids[i] for i in range(len(ids)))
    pieces = [SpmPiece(name, scores.get(name, 0.0), types.get(name, NORMAL)) for name in names]
    return SpmModel(pieces, add_dummy_prefix=prefix)


def _space_prefix(spec: Mapping[str, Any]) -> bool | None:
    """Whether a text begins as if a space stood before it; None if words are cut otherwise than SentencePiece's.

    Metaspace puts no second space before a text that begins with one; nothing else sets it apart.
    """
    normalizer, cutter = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if not steps and cutter and cutter.get("type") == "Metaspace":
        whole = cutter.get("replacement") == SPACE and cutter.get("split") is False
        return cutter.get("prepend_scheme") != "never" if whole else None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if cutter or replace not in steps:
        return None
    return {1: False, 2: True}.get(len(steps)) if steps[0] in (replace, {"type": "Prepend", "prepend": SPACE}) else None


def _not_spm(path: Path, why: str) -> TokenizerError:
    return TokenizerError(
        f"{path}: cannot be put into a GGUF file: {why}",
        "put the checkpoint's tokenizer.model beside it, if it has one",
    )
