"""SentencePiece's `ModelProto`: the few fields of `sentencepiece_model.proto` that a BPE model consists of."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from octavo.errors import TokenizerError
from octavo.tokenizer.files import AddedToken, damage_hint

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # GGUF's token types are the same numbers
UNIGRAM, BPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers


class SpmPiece(NamedTuple):
    """A token: merges that give a higher score come first."""

    name: str
    score: float
    type: int


@dataclass(frozen=True)
class SpmModel:
    """A BPE model that leaves text as it is: no normalisation table.

    Attributes:
        pieces: by id. Exactly one is UNKNOWN; BYTE pieces are all 256 or none.
        bos_id, eos_id, pad_id: -1 where there is none.
        add_dummy_prefix: a text begins as if a space stood before it.
        remove_extra_whitespaces: of several spaces only one counts.
    """

    pieces: list[SpmPiece]
    bos_id: int = -1
    eos_id: int = -1
    pad_id: int = -1
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False

    @property
    def unk_id(self) -> int:
        """The id of the unknown piece."""
        return next(i for i, piece in enumerate(self.pieces) if piece.type == UNKNOWN)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> SpmModel:
        """Read a `tokenizer.model`.

        Raises:
            TokenizerError: not such a file, or a model of another kind than described above.
        """
        try:
            model = _fields(data)
            trainer = dict(_fields(b"".join(_only_bytes(value) for field, value in model if field == 2)))
            normalizer = dict(_fields(b"".join(_only_bytes(value) for field, value in model if field == 3)))
            pieces = [_piece(_only_bytes(value)) for field, value in model if field == 1]
            bos_id, eos_id, pad_id = (_signed(trainer.get(field, ids)) for field, ids in ((41, 1), (42, 2), (43, -1)))
        except (ValueError, TypeError, IndexError, struct.error) as error:
            raise TokenizerError(f"{where}: not a SentencePiece model ({error})", damage_hint(data)) from None
        if trainer.get(3, UNIGRAM) != BPE or normalizer.get(2) or trainer.get(24):
            raise TokenizerError(
                f"{where}: is not a SentencePiece model of type BPE that leaves text as it is",
                "Mixtral's and its relatives' are; GGUF files hold no others",
            )
        if sum(piece.type == UNKNOWN for piece in pieces) != 1:
            raise TokenizerError(f"{where}: expected one unknown piece", damage_hint(data))
        return cls(pieces, bos_id, eos_id, pad_id, bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)))

    def to_bytes(self) -> bytes:
        """Return a `tokenizer.model`."""
        trainer = _number(3, BPE) + _number(4, len(self.pieces))
        trainer += _number(35, any(piece.type == BYTE for piece in self.pieces))
        named = ((40, self.unk_id), (41, self.bos_id), (42, self.eos_id), (43, self.pad_id))
        for field, token_id in named:
            trainer += _number(field, token_id)
            if token_id >= 0:
                trainer += _text(field + 5, self.pieces[token_id].name)
        normalizer = _text(1, "identity") + _number(3, self.add_dummy_prefix)
        normalizer += _number(4, self.remove_extra_whitespaces) + _number(5, True)
        pieces = (
            _text(1, name) + _tag(2, _FIXED32) + struct.pack("<f", score) + _number(3, kind)
            for name, score, kind in self.pieces
        )
        return b"".join(_bytes(1, piece) for piece in pieces) + _bytes(2, trainer) + _bytes(3, normalizer)


def with_added(pieces: Sequence[SpmPiece], added: Sequence[AddedToken]) -> dict[int, SpmPiece]:
    """By id: the vocabulary, the tokens that a checkpoint declares above it, and its words that are called special."""
    found = dict(enumerate(pieces))
    for name, token_id, special in added:
        piece = found.get(token_id, SpmPiece(name, 0.0, UNUSED))
        changes = (NORMAL, USER_DEFINED, UNUSED) if special else (UNUSED,)
        if piece.name == name and piece.type in changes:
            found[token_id] = piece._replace(type=CONTROL if special else USER_DEFINED)
    return found


def _piece(data: bytes) -> SpmPiece:
    fields = dict(_fields(data))
    (score,) = struct.unpack("<f", _only_bytes(fields.get(2, bytes(4))))
    kind = fields.get(3, NORMAL)
    if not isinstance(kind, int):
        raise TypeError("a piece's type is not a number")
    return SpmPiece(_only_bytes(fields.get(1, b"")).decode(), score, kind)


def _fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """Each field's number and value; floats as the bytes they are."""
    return list(_each_field(data))


def _each_field(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _read_varint(data, at)
            yield key >> 3, value
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if wire == _BYTES:
            length, at = _read_varint(data, at)
        if length is None or at + length > len(data):
            raise ValueError(f"byte {at} is no field's")
        yield key >> 3, data[at : at + length]
        at += length


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError(f"the number before byte {at} does not end")


def _only_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number stands where text is expected")
    return value


def _signed(value: int | bytes) -> int:
    """A 64-bit number in two's complement, which is how negative ones are written."""
    if not isinstance(value, int):
        raise TypeError("text stands where a number is expected")
    return value - 2**64 if value >= 2**63 else value


def _number(field: int, value: int) -> bytes:
    return _tag(field, _VARINT) + _varint(value & (2**64 - 1))


def _text(field: int, text: str) -> bytes:
    return _bytes(field, text.encode())


def _bytes(field: int, data: bytes) -> bytes:
    return _tag(field, _BYTES) + _varint(len(data)) + data


def _tag(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
