"""`tokenizer.model`: SentencePiece."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.errors import TokenizerError
from octavo.tokenizer.files import Settings, damage_hint
from octavo.tokenizer.pieces import SPACE, DecodeRules, Piece

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class SentencePiece:
    """A SentencePiece model, with the tokens that a fine-tune may have added above its vocabulary."""

    def __init__(self, data: bytes, path: Path, settings: Settings) -> None:
        self._model = _open(data, path)
        self._size: int = self._model.get_piece_size()
        self._added = {token.id: token for token in settings.added if token.id >= self._size}
        self.n_vocab = max(self._added, default=self._size - 1) + 1
        self.bos_id = self._own_id(self._model.bos_id())
        self.eos_id = self._own_id(self._model.eos_id())
        # Plain words of the vocabulary that the checkpoint uses as control tokens all the same.
        special = {token.name for token in settings.added if token.special} | set(settings.ends)
        spoken = {token.name for token in settings.added if settings.speaks(token.name)}
        self._promoted = {name: i for name in special | spoken if (i := self._word_id(name)) is not None}
        self._hidden = {i for name, i in self._promoted.items() if name in special}
        self.guarded = frozenset(self._promoted.values())
        self._controls: dict[str, int] | None = None
        self._unknown: str = self._model.decode([self._model.unk_id()])
        self._strips, strips_on = self._probe_strip()
        self.rules = DecodeRules(per_byte=True, control_breaks=True, strips_on=strips_on)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_controls(self, text: str) -> list[int] | None:
        return None  # SentencePiece makes no control tokens of text

    def piece(self, token_id: int) -> Piece | None:
        if token_id >= self._size:
            added = self._added.get(token_id)
            return None if added is None or added.special else _as_is(added.name)
        if self._model.is_control(token_id) or token_id in self._hidden:
            return None
        name: str = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            byte = bytes([int(name[3:5], 16)])
            return Piece(byte, byte)
        if self._model.is_unknown(token_id):
            return _as_is(self._unknown)
        first = name.removeprefix(SPACE) if self._strips else name
        return Piece(name.replace(SPACE, " ").encode(), first.replace(SPACE, " ").encode())

    def name(self, token_id: int) -> str:
        if token_id >= self._size:
            return self._added[token_id].name if token_id in self._added else ""
        name: str = self._model.id_to_piece(token_id)
        return name

    def controls(self) -> Mapping[str, int]:
        if self._controls is None:
            ids = [i for i in range(self._size) if self._model.is_control(i)]
            own = {self._model.id_to_piece(i): i for i in ids}
            self._controls = own | self._promoted | {token.name: i for i, token in self._added.items()}
        return self._controls

    def control_id(self, name: str) -> int | None:
        token_id = self._model.piece_to_id(name)  # of no such piece: the unknown piece's id
        if self._model.is_control(token_id) and self._model.id_to_piece(token_id) == name:
            return int(token_id)
        if name in self._promoted:
            return self._promoted[name]
        return next((i for i, token in self._added.items() if token.name == name), None)

    def _own_id(self, token_id: int) -> int | None:
        return token_id if 0 <= token_id < self._size else None  # -1: the model was trained without it

    def _word_id(self, name: str) -> int | None:
        """The id of a plain word of the vocabulary; None for a control piece, or if there is no such word."""
        token_id: int = self._model.piece_to_id(name)
        if self._model.is_control(token_id) or self._model.is_unknown(token_id):
            return None
        return token_id if self._model.id_to_piece(token_id) == name else None

    def _probe_strip(self) -> tuple[bool, bool]:
        """Whether decoding drops the space before a first word, and whether it goes on dropping spaces.

        The normaliser's settings are not in the model's Python interface; its decoder shows them.
        """
        names = enumerate(map(self._model.id_to_piece, range(self._size)))
        spaced, name = next(((i, name) for i, name in names if name.startswith(SPACE)), (None, ""))
        if spaced is None:
            return False, False
        strips = self._model.decode([spaced]) == name.removeprefix(SPACE).replace(SPACE, " ")
        bare = self._word_id(SPACE)
        return strips, strips and bare is not None and self._model.decode([bare, bare]) == ""


def _open(data: bytes, path: Path) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=data)
        size = model.get_piece_size()
        model.id_to_piece(list(range(size)))  # here and now, should one of them not be text
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition(":")[2].strip() or str(error)
        raise TokenizerError(f"{path}: not a SentencePiece model ({reason})", damage_hint(data)) from None
    if not size:
        raise TokenizerError(f"{path}: an empty SentencePiece model", damage_hint(data))
    return model


def _as_is(text: str) -> Piece:
    return Piece(text.encode(), text.encode())
