"""A SentencePiece model as the `tokenizer.json` that the tokenizers library reads, in the form of Mixtral's own.

transformers 5 makes a tokenizer of a `tokenizer.model` alone that forgets the space before a text, so what it is to
read needs this file too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.tokenizer.files import AddedToken
from octavo.tokenizer.pieces import SPACE
from octavo.tokenizer.spm_proto import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, SpmModel, SpmPiece, with_added

ADDED = (UNKNOWN, CONTROL, USER_DEFINED)
TO_SPACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
FROM_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def tokenizer_json(model: SpmModel, added: Sequence[AddedToken], bos_id: int | None) -> bytes | None:
    """Return the file. It gives the ids that the model gives, but for the words its vocabulary calls special.

    Control tokens are found in a text that spells them, and behind one, and behind a user-defined word, the library
    begins a new text, with a space before it.

    Args:
        model: the vocabulary.
        added: tokens that the checkpoint declares beside it.
        bos_id: the token that opens every text, if one does.

    Returns:
        None for a model that takes several spaces for one, or has user-defined words with spaces: the library cannot
        follow these.
    """
    pieces = with_added(model.pieces, added)
    words = [piece.name for piece in pieces.values() if piece.type == USER_DEFINED]
    if model.remove_extra_whitespaces or any(SPACE in word or " " in word for word in words):
        return None
    prefix = [{"type": "Prepend", "prepend": SPACE}] if model.add_dummy_prefix else []
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, piece) for i, piece in sorted(pieces.items()) if piece.type in ADDED],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, FROM_SPACE]},
        "pre_tokenizer": None,
        "post_processor": None if bos_id is None else _post_processor(bos_id, pieces[bos_id].name),
        "decoder": _decoder(model),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.unk_id].name,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.type == BYTE for piece in model.pieces),
            "ignore_merges": False,
            "vocab": {piece.name: i for i, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }
    return (json.dumps(spec, ensure_ascii=False, indent=1) + "\n").encode()


def _added(token_id: int, piece: SpmPiece) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": piece.name, **flags, "special": piece.type != USER_DEFINED}


def _post_processor(bos_id: int, name: str) -> Mapping[str, Any]:
    """BOS before every text."""
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": i}} for i, which in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, {"SpecialToken": {"id": name, "type_id": 1}}, second],
        "special_tokens": {name: {"id": name, "ids": [bos_id], "tokens": [name]}},
    }


def _decoder(model: SpmModel) -> Mapping[str, Any]:
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.add_dummy_prefix else []
    return {"type": "Sequence", "decoders": [TO_SPACE, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}


def _merges(model: SpmModel) -> list[list[str]]:
    """Every two tokens that together are a third one; those that give a higher score come first."""
    scores = {piece.name: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = [
        [name[:at], name[at:]] for name in sorted(scores, key=lambda name: -scores[name]) for at in range(1, len(name))
    ]
    return [pair for pair in merges if pair[0] in scores and pair[1] in scores]
