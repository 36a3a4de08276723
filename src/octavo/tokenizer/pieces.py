"""What a tokenizer file has to offer, whatever its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

SPACE = "\u2581"  # how both kinds of file spell a space: LOWER ONE EIGHTH BLOCK


class Piece(NamedTuple):
    """What one token writes, as UTF-8 bytes that may be a part of a character.

    `at_start` is what it writes where nothing stands yet: without the space before a first word.
    """

    text: bytes
    at_start: bytes


@dataclass(frozen=True, slots=True)
class DecodeRules:
    """How pieces are put together.

    Attributes:
        per_byte: one U+FFFD for each ill-formed byte; otherwise one for each maximal ill-formed part.
        control_breaks: a control token between two bytes ends the character that they began.
        strips_on: the start lasts until something was written (SentencePiece's remove_extra_whitespaces),
            not for one piece only.
    """

    per_byte: bool
    control_breaks: bool
    strips_on: bool


class Backend(Protocol):
    """One kind of tokenizer file.

    Attributes:
        guarded: control ids that the file's own encoder might parse out of text.
    """

    n_vocab: int
    bos_id: int | None
    eos_id: int | None
    rules: DecodeRules
    guarded: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, BOS and EOS left out."""
        ...

    def encode_controls(self, text: str) -> list[int] | None:
        """Ids of text in which control tokens are parsed; None if the file's encoder cannot do that."""
        ...

    def piece(self, token_id: int) -> Piece | None:
        """What a token (0 <= token_id < n_vocab) writes; None for a control token."""
        ...

    def name(self, token_id: int) -> str:
        """The token as the vocabulary spells it."""
        ...

    def controls(self) -> Mapping[str, int]:
        """Every control token: name to id."""
        ...

    def control_id(self, name: str) -> int | None:
        """`controls().get(name)`, without listing them all."""
        ...
