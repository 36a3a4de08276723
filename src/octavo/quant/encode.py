"""Which codes, scales and books come closest to a matrix; and what they are worth.

``rtn`` takes the scale from the largest weight of a group and rounds to the nearest code. ``optimal`` looks for the
scale, of either sign, and the books with the least squared error. What a weight loses by every candidate is read from
a table of weights in steps, and summed over the group by an embedding bag; the best candidate is fitted by least
squares where scales are fine enough for that, and taken where it beats ``rtn``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from octavo.errors import CheckpointError, OptionError
from octavo.quant.formats import Book, Format
from octavo.quant.packing import Codes

METHODS = ("optimal", "rtn")
CHUNK_ELEMENTS = 1 << 17  # at a time: temporaries stay in the cache, and calls of torch cost little beside the work
LARGEST = 2.0**127  # beyond, the nearest value could overflow
SMALLEST = 2.0**-110  # of a group's largest magnitude: below, its scale would be subnormal, and the group becomes zero

# Groups are scaled by a power of two until their largest magnitude is in [TOP / 2, TOP): about what codes are worth.
TOP_EXPONENT = 7
TOP = 2**TOP_EXPONENT
STEP = 0.5  # of scaled weights in the table of errors
LEAST_SCALE, MOST_SCALE = 0.6, 3.0  # of the candidates, for a scaled group
FINEST = 5  # bits of a candidate's mantissa; least squares do the rest
# Codes are worth whole numbers up to SPAN, so the nearest one changes at multiples of 1/2: such a table is exact.
SPAN = 64
HALVES = 4 * SPAN

# R rows, C columns; n groups of all rows, g columns of a group; S selectors of a group; K books, N candidates.


def encode(w: Tensor, format: Format, method: str = "optimal", name: str = "the matrix") -> Codes:
    """Choose codes, scales and books.

    Args:
        w: [rows, cols] of any floating dtype.
        format: to encode in.
        method: ``optimal``, or ``rtn``: round to nearest. At 8 bits both are the same.
        name: of the tensor, for error messages.

    Raises:
        OptionError: the method is unknown.
        CheckpointError: ``w`` is no matrix of floating numbers, or holds one that is not finite or is 2^127 or more.
    """
    if method not in METHODS:
        raise OptionError(f"the method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    rows, cols = matrix_shape(w, name)
    groups = -(-cols // format.group_size)
    width = groups * format.group_size
    codes_RC = torch.empty((rows, cols), dtype=torch.uint8)
    scales_RG = torch.empty((rows, groups), dtype=torch.float32)
    books_RGS = torch.empty((rows, groups, format.selectors), dtype=torch.uint8)
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    for begin in range(0, rows if cols else 0, step):
        some = slice(begin, min(begin + step, rows))
        w_RC = pad(w[some].detach().to("cpu", torch.float32), (0, width - cols)).contiguous()
        codes, scales, books = _encode_rows(w_RC, cols, format, method, name)
        codes_RC[some] = codes.view(-1, width)[:, :cols]
        scales_RG[some] = scales.view(-1, groups)
        books_RGS[some] = books.view(-1, groups, format.selectors)
    return Codes(codes_RC, scales_RG, books_RGS)


def matrix_shape(w: Tensor, name: str = "the matrix") -> tuple[int, int]:
    """Return (rows, cols) of what can be quantised.

    Raises:
        CheckpointError: ``w`` is no matrix of floating numbers.
    """
    if w.dim() != 2 or not w.is_floating_point():
        raise CheckpointError(
            f"{name} is {w.dtype} {list(w.shape)}; expected a matrix of floating numbers",
            hint="vectors, such as the weights of norms, are not quantised",
        )
    return w.shape[0], w.shape[1]


def decode(codes: Codes, format: Format) -> Tensor:
    """Return float32 [rows, cols]: scale * value of the code."""
    rows, cols = codes.codes.shape
    groups = codes.scales.shape[1]
    codes_RGg = pad(codes.codes, (0, groups * format.group_size - cols)).view(rows, groups, format.group_size)
    if format.books is None:
        values = codes_RGg.float().sub_(128)
    else:
        index = codes_RGg.to(torch.int32)
        if format.book_bits:
            books = codes.selectors.to(torch.int32) << format.bits
            index.view(rows, groups, format.selectors, format.selector_cols).add_(books[..., None])
        values = _tables(format).values.index_select(0, index.view(-1)).view_as(index)
    return values.mul_(codes.scales[..., None]).flatten(1)[:, :cols]


def _encode_rows(w_RC: Tensor, cols: int, format: Format, method: str, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [R, C], scales [n] and books [n, S] of rows of whole groups, of which the first ``cols`` columns count."""
    w_ng = w_RC.view(-1, format.group_size)
    most, least = w_ng.amax(1), w_ng.amin(1)
    magnitude = torch.maximum(most, -least)
    if not (magnitude < LARGEST).all():  # nan is not less either
        raise CheckpointError(
            f"{name} holds a number that is infinite, not a number, or 2^127 or more, and cannot be quantised",
            hint="the weights are damaged",
        )
    live = magnitude >= SMALLEST
    if format.books is None:
        scales = torch.where(live, _round_up(magnitude / 127), 0)
        codes = (w_ng / torch.where(live, scales, torch.inf)[:, None]).round_().add_(128)
        return codes, scales, scales.new_zeros((len(scales), 1))
    exponent = torch.frexp(torch.where(live, magnitude, 1)).exponent - TOP_EXPONENT
    shrink = torch.where(live, _power_of_two(-exponent), 0)
    groups = _Groups(w_ng * shrink[:, None], format, w_RC.shape[1], cols)
    found = groups.rtn(torch.where(most >= -least, most, least) * shrink)
    if method == "optimal":
        found = groups.optimal(found)
    codes = groups.tables.codes.index_select(0, found.places.view(-1))
    return codes, torch.where(live, found.scales * _power_of_two(exponent), 0), found.books * live[:, None]


class _Choice(NamedTuple):
    """Scales and books for groups.

    Attributes:
        scales: float32 [n], none of them 0.
        books: int32 [n, S].
        places: int32 [n, g] of codes and their values in the tables.
        error: float32 [n], squared, of the scaled group.
    """

    scales: Tensor
    books: Tensor
    places: Tensor
    error: Tensor

    def or_better(self, other: _Choice) -> _Choice:
        """Each group's choice with the lesser error."""
        better = other.error < self.error
        return _Choice(
            *(
                torch.where(better.view(-1, *[1] * (mine.dim() - 1)), its, mine)
                for mine, its in zip(self, other, strict=True)
            )
        )


@dataclass(frozen=True)
class _Groups:
    """Groups of rows [R, width], scaled; columns from ``cols`` on are padding."""

    u_ng: Tensor
    format: Format
    width: int
    cols: int

    @property
    def tables(self) -> _Tables:
        return _tables(self.format)

    def rtn(self, top_n: Tensor) -> _Choice:
        """The largest weight, of either sign, becomes the end of the first book."""
        books = torch.zeros((len(top_n), self.format.selectors), dtype=torch.int32)
        end = max(self.tables.books[0], key=abs)
        return self._choice(_round(torch.where(top_n == 0, 1, top_n / end), self.format), books)

    def optimal(self, found: _Choice) -> _Choice:
        """The best candidate, refined, or what was found before."""
        found = found.or_better(self._search())
        if self.format.book_bits:
            return found  # every scale that the format can hold was a candidate
        return found.or_better(self._fit(found))

    def _search(self) -> _Choice:
        tables, S = self.tables, self.format.selectors
        index = ((self.u_ng + TOP) * (1 / STEP)).add_(0.5).to(torch.int32)
        index.view(-1, self.width)[:, self.cols :] = len(tables.errors) - 1
        errors_nSKN = embedding_bag(index.view(-1, self.format.selector_cols), tables.errors, mode="sum")
        if not self.format.book_bits:
            books = torch.zeros((len(self.u_ng), 1), dtype=torch.int32)
            return self._choice(tables.candidates[errors_nSKN.argmin(1)], books)
        errors_nSKN = errors_nSKN.view(-1, S, len(tables.books), len(tables.candidates))
        chosen_n = errors_nSKN.amin(2).sum(1).argmin(1)
        errors_nSK = errors_nSKN[torch.arange(len(chosen_n)), :, :, chosen_n]
        return self._choice(tables.candidates[chosen_n], errors_nSK.argmin(2).to(torch.int32))

    def _fit(self, found: _Choice) -> _Choice:
        """The scales of least squares for the codes that were found, and the codes nearest to these."""
        values = self._values(found.places)
        product, square = (values * self.u_ng).sum(1), values.square_().sum(1)
        scales = torch.where(product == 0, found.scales, _round(product / square, self.format))
        return self._choice(scales, found.books)

    def _choice(self, scales_n: Tensor, books_nS: Tensor) -> _Choice:
        """The nearest codes for these scales and books."""
        halves = (self.u_ng * (2 / scales_n)[:, None]).clamp_(-2 * SPAN, 2 * SPAN - 1)
        S = self.format.selectors
        halves.view(-1, S, self.format.selector_cols).add_((books_nS * HALVES + 2 * SPAN)[..., None])
        places = halves.to(torch.int32)
        places.view(-1, self.width)[:, self.cols :] = len(self.tables.codes) - 1
        error = (self._values(places) * scales_n[:, None]).sub_(self.u_ng).square_().sum(1)
        return _Choice(scales_n, books_nS, places, error)

    def _values(self, places_ng: Tensor) -> Tensor:
        return self.tables.nearest.index_select(0, places_ng.view(-1)).view_as(places_ng)


@dataclass(frozen=True)
class _Tables:
    """What is known of a format beforehand.

    Attributes:
        books: of the format.
        values: float32 [K * codes], the books in one.
        codes: uint8 [K * HALVES + 1], the nearest code of a weight in halves; the last is for padding.
        nearest: float32 of the same shape: what that code is worth.
        candidates: float32 [N], scales of both signs.
        errors: float32 [2 * TOP / STEP + 2, K * N], squared, of a scaled weight for every book and candidate; the last
            is for padding.
    """

    books: tuple[Book, ...]
    values: Tensor
    codes: Tensor
    nearest: Tensor
    candidates: Tensor
    errors: Tensor


@cache
def _tables(format: Format) -> _Tables:
    books = format.books or ()
    values_KV = torch.tensor(books, dtype=torch.float32)
    halves = torch.arange(-2 * SPAN, 2 * SPAN, dtype=torch.float32) / 2 + 0.25  # the middle of each half
    codes = torch.stack([(halves[:, None] - values).abs().argmin(1) for values in values_KV])
    nearest = values_KV.gather(1, codes)
    candidates = _candidates(format)
    u = torch.arange(-TOP, TOP + STEP, STEP, dtype=torch.float32)
    index = (u[:, None] / candidates * 2).clamp(-2 * SPAN, 2 * SPAN - 1).floor().long() + 2 * SPAN
    errors = torch.cat([(values[index] * candidates - u[:, None]).square() for values in nearest], 1)
    return _Tables(
        books,
        values_KV.flatten(),
        pad(codes.flatten(), (0, 1)).to(torch.uint8),
        pad(nearest.flatten(), (0, 1)),
        candidates,
        pad(errors, (0, 0, 0, 1)),
    )


def _candidates(format: Format) -> Tensor:
    """Scales that the format can hold, or some of them, evenly spaced; either sign."""
    bits = min(FINEST, format.mantissa_bits)
    octave = 1 + torch.arange(2**bits, dtype=torch.float32) / 2**bits
    scales = torch.cat([octave / 2, octave, octave * 2])
    scales = scales[(scales >= LEAST_SCALE) & (scales <= MOST_SCALE)]
    return torch.cat((scales, -scales))


def _power_of_two(exponents: Tensor) -> Tensor:
    """Exact, as a product with it is: float32 of normal exponents, int32."""
    return (exponents + 127 << 23).view(torch.float32)


def _round(scales: Tensor, format: Format) -> Tensor:
    """The nearest float32 of those that the format can hold, ties away from zero."""
    drop = 23 - format.mantissa_bits
    return ((scales.view(torch.int32) + (1 << drop - 1)) >> drop << drop).view(torch.float32)


def _round_up(scales: Tensor) -> Tensor:
    """The next bfloat16 that is not smaller, as float32; of positive numbers."""
    return ((scales.view(torch.int32) + 0xFFFF) >> 16 << 16).view(torch.float32)
