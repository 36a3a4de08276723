"""Quantise a matrix to the bytes that the kernels read, and undo it: in plain torch, some panels at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from octavo.errors import CheckpointError, OptionError
from octavo.quant.encode import CHUNK_ELEMENTS, METHODS, decode, encode, matrix_shape
from octavo.quant.formats import PANEL_ROWS, Format, Packed
from octavo.quant.packing import pack, unpack

__all__ = ["METHODS", "dequantize", "quantize"]


def quantize(w: Tensor, format: Format, method: str = "optimal", name: str = "the matrix") -> Packed:
    """Quantise a matrix. Besides the result, memory for a few panels is taken.

    The same weights give the same bytes, whatever the number of threads.

    Args:
        w: [rows, cols] of any floating dtype.
        format: to quantise to.
        method: ``optimal``, the least squared error without calibration, or ``rtn``, round to nearest. At 8 bits both
            are the same.
        name: of the tensor, for error messages.

    Raises:
        OptionError: the method is unknown.
        CheckpointError: ``w`` is no matrix of floating numbers, or holds one that is not finite or is 2^127 or more.
    """
    rows, cols = matrix_shape(w, name)
    data = torch.empty(format.nbytes(rows, cols), dtype=torch.uint8)

    def work(begin: int, end: int) -> None:
        data[_extent(begin, end, cols, format)] = pack(encode(w[begin:end], format, method, name), format)

    _share(work, list(_panels(0, rows, format.padded_cols(cols))))
    return Packed(data, format, (rows, cols))


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32, rows: tuple[int, int] | None = None) -> Tensor:
    """Undo `quantize`: scale * value of the code in float32, then rounded to ``dtype``.

    Args:
        packed: the quantised matrix.
        dtype: of the result.
        rows: the first and the one after the last; by default all. Only panels that hold them are read.

    Raises:
        OptionError: ``rows`` are not rows of the matrix.
        CheckpointError: there are more or fewer bytes than the shape needs.
    """
    data, format, (count, cols) = packed
    begin, end = rows or (0, count)
    if not 0 <= begin <= end <= count:
        raise OptionError(
            f"rows {begin} to {end} of a quantised matrix are asked for; it has {count}",
            hint="give a first row and the one after the last, such as rows=(0, 8)",
        )
    if data.dtype != torch.uint8 or data.shape != (format.nbytes(count, cols),):
        raise CheckpointError(
            f"a {format.name} matrix [{count}, {cols}] is kept in {data.dtype} {list(data.shape)};"
            f" expected {format.nbytes(count, cols)} bytes",
            hint="the file is damaged, or its header is that of another",
        )
    out = torch.empty((end - begin, cols), dtype=dtype)

    def work(first: int, last: int) -> None:
        codes = unpack(data[_extent(first, last, cols, format)], format, (last - first, cols))
        skipped = max(begin - first, 0)
        out[first + skipped - begin : last - begin] = decode(codes, format)[skipped:]

    _share(work, list(_panels(begin // PANEL_ROWS * PANEL_ROWS, end, format.padded_cols(cols))))
    return out


def _panels(begin: int, end: int, width: int) -> Iterator[tuple[int, int]]:
    """Split rows ``begin``, a panel's first, to ``end`` into pieces of whole panels, of about CHUNK_ELEMENTS."""
    step = max(1, CHUNK_ELEMENTS // (PANEL_ROWS * max(1, width))) * PANEL_ROWS
    for first in range(begin, end if width else begin, step):
        yield first, min(first + step, end)


def _extent(begin: int, end: int, cols: int, format: Format) -> slice:
    """Where the bytes of rows ``begin``, a panel's first, to ``end`` lie."""
    panel = format.panel_nbytes(cols)
    return slice(begin // PANEL_ROWS * panel, -(-end // PANEL_ROWS) * panel)


def _share(work: Callable[[int, int], None], pieces: list[tuple[int, int]]) -> None:
    """Do pieces of work on as many threads as torch has, each by one of them.

    Torch's own way of sharing, every operation among all threads, loses more in waiting for the slowest than it gains
    on pieces that fit in a cache.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(pieces) <= 1:
        for piece in pieces:
            work(*piece)
        return
    try:
        with ThreadPoolExecutor(threads, "octavo-quant", lambda: torch.set_num_threads(1)) as pool:
            for _ in pool.map(lambda piece: work(*piece), pieces):
                pass  # and raise what it raised
    finally:
        torch.set_num_threads(threads)  # for threads to come; that of this one was never another
