"""The low-bit formats: what a code is worth, and how many bytes a matrix takes.

A matrix [rows, cols] is cut into panels of PANEL_ROWS rows and blocks of two scale groups of columns, both padded at
the end. `octavo.quant.packing` knows where every bit of a block lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the arithmetic needs no torch
    from torch import Tensor

PANEL_ROWS = 16
SCALE_BITS = 16
SELECTOR_BITS = 4  # of the scale, in formats with several books

Book = tuple[int, ...]


@dataclass(frozen=True)
class Format:
    """One low-bit format.

    Attributes:
        name: ``q8``, ``q4``, ``q3`` or ``q2``.
        bits: of a code.
        group_size: columns of a row that share a scale.
        books: what codes are worth, in units of the scale; None where a code is worth ``code - 128``. Of several books,
            the low SELECTOR_BITS of the scale choose, one for each of ``selectors`` equal parts of the group.
    """

    name: str
    bits: int
    group_size: int
    books: tuple[Book, ...] | None

    @property
    def block_cols(self) -> int:
        """Columns of a block: two groups."""
        return 2 * self.group_size

    @property
    def book_bits(self) -> int:
        """Bits that choose a book: 0 where there is no choice."""
        return len(self.books or (0,)).bit_length() - 1

    @property
    def selectors(self) -> int:
        """Choices of a book in one scale: 1 where there is nothing to choose."""
        return SELECTOR_BITS // self.book_bits if self.book_bits else 1

    @property
    def selector_cols(self) -> int:
        """Columns of a row that share a book."""
        return self.group_size // self.selectors

    @property
    def mantissa_bits(self) -> int:
        """Bits of a scale's mantissa: bfloat16's 7, less those given to selectors."""
        return 7 - (SELECTOR_BITS if self.book_bits else 0)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a code and its part of the scale; padding left out."""
        return self.bits + SCALE_BITS / self.group_size

    @property
    def group_nbytes(self) -> int:
        """Bytes of a panel's codes in one group."""
        return PANEL_ROWS * self.group_size * self.bits // 8

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block of a panel: the scales and the codes of two groups."""
        return 2 * (PANEL_ROWS * SCALE_BITS // 8 + self.group_nbytes)

    def padded_cols(self, cols: int) -> int:
        """Columns, those of a last block filled up included."""
        return -(-cols // self.block_cols) * self.block_cols

    def panel_nbytes(self, cols: int) -> int:
        """Bytes of PANEL_ROWS rows of this many columns."""
        return self.padded_cols(cols) // self.block_cols * self.block_nbytes

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a matrix [rows, cols]."""
        return -(-rows // PANEL_ROWS) * self.panel_nbytes(cols)


_BOOK4 = (-63, -47, -37, -30, -23, -17, -11, -5, 0, 5, 11, 17, 23, 30, 39, 53)
_BOOKS3 = ((-63, -40, -24, -11, 1, 13, 27, 49), (-41, -24, -14, -6, 1, 8, 16, 30))
_BOOKS2 = ((-63, -18, 3, 32), (-42, -14, 3, 24), (-27, -9, 2, 16), (-26, -3, 15, 44))

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "q8": Format("q8", 8, 64, None),
        "q4": Format("q4", 4, 64, (_BOOK4,)),
        "q3": Format("q3", 3, 32, _BOOKS3),
        "q2": Format("q2", 2, 32, _BOOKS2),
    }
)


class Packed(NamedTuple):
    """A quantised matrix, as it lies in a store and as the kernels read it.

    Attributes:
        data: uint8 [format.nbytes(*shape)].
        format: of ``data``.
        shape: (rows, cols) of the matrix.
    """

    data: Tensor
    format: Format
    shape: tuple[int, int]
