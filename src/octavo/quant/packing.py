"""Codes and scales of a matrix, and the interleaved panels they lie in on the disk and in memory.

Panel after panel, and in a panel block after block. A block is 64 bytes of scales (uint16, one per row for its first
group, then for its second), the codes of the first group and those of the second. A group's columns come in lots of
LOT_COLS: in a lot, byte LOT_COLS * row + column % LOT_COLS belongs to that row. How the lots of a group share the bits
of vectors of LOT_BYTES depends on the format:

- q8: a vector is a lot; 16 in order.
- q4: 8 vectors; the low nibbles of the i-th are lot 2i, the high ones lot 2i + 1.
- q3: 3 vectors; bits 0-2 of the i-th are lot 2i, bits 4-6 lot 2i + 1. Its bits 3 and 7 are bit i of lots 6 and 7.
- q2: 2 vectors; bits 2j and 2j + 1 of the i-th are lot 4i + j.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from octavo.quant.formats import PANEL_ROWS, SELECTOR_BITS, Format

LOT_COLS = 4
LOT_BYTES = PANEL_ROWS * LOT_COLS
SCALE_BYTES = 64  # of a block

# R rows, C columns, G groups of columns, S selectors of a group; P panels, B blocks, L lots of a group.


class Codes(NamedTuple):
    """A quantised matrix before it is packed.

    Attributes:
        codes: uint8 [rows, cols].
        scales: float32 [rows, groups], each one of those the format can hold. The last group may be incomplete.
        selectors: uint8 [rows, groups, selectors of a group], indices of books.
    """

    codes: Tensor
    scales: Tensor
    selectors: Tensor


def pack(codes: Codes, format: Format) -> Tensor:
    """Lay codes out in panels.

    Returns:
        uint8 [format.nbytes(rows, cols)]; padding has scale 0 and code 0.
    """
    rows, cols = codes.codes.shape
    panels, width = -(-rows // PANEL_ROWS), format.padded_cols(cols)
    words_RG = _scale_words(codes.scales, codes.selectors, format)
    more_rows = panels * PANEL_ROWS - rows
    words_RG = pad(words_RG, (0, width // format.group_size - words_RG.shape[1], 0, more_rows))
    codes_RC = pad(codes.codes, (0, width - cols, 0, more_rows)).contiguous()
    blocks = (panels, width // format.block_cols)
    words = words_RG.view(panels, PANEL_ROWS, blocks[1], 2).permute(0, 2, 3, 1).contiguous()
    # Four codes of a row stay together: one int32.
    lots = codes_RC.view(torch.int32).view(panels, PANEL_ROWS, blocks[1], 2, format.group_size // LOT_COLS)
    lots = lots.permute(0, 2, 3, 4, 1).contiguous().view(torch.uint8)
    out = torch.empty((*blocks, format.block_nbytes), dtype=torch.uint8)
    out[..., :SCALE_BYTES] = words.view(torch.uint8).view(*blocks, SCALE_BYTES)
    out[..., SCALE_BYTES:].view(*blocks, 2, -1, LOT_BYTES).copy_(_join_lots(lots, format))
    return out.view(-1)


def unpack(data: Tensor, format: Format, shape: tuple[int, int]) -> Codes:
    """Undo `pack`.

    Args:
        data: uint8 [format.nbytes(*shape)].
        format: of ``data``.
        shape: (rows, cols) of the matrix.
    """
    rows, cols = shape
    panels, width = -(-rows // PANEL_ROWS), format.padded_cols(cols)
    blocks = data.view(panels, width // format.block_cols, format.block_nbytes)
    words = blocks[..., :SCALE_BYTES].clone(memory_format=torch.contiguous_format).view(torch.int16)
    words_RG = words.view(*blocks.shape[:2], 2, PANEL_ROWS).permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
    lots = _part_lots(blocks[..., SCALE_BYTES:].view(*blocks.shape[:2], 2, -1, LOT_BYTES), format)
    codes = lots.view(torch.int32).permute(0, 4, 1, 2, 3).contiguous().view(torch.uint8)
    groups = -(-cols // format.group_size)
    scales, selectors = _part_words(words_RG[:rows, :groups], format)
    return Codes(codes.view(panels * PANEL_ROWS, width)[:rows, :cols], scales, selectors)


def _scale_words(scales_RG: Tensor, selectors_RGS: Tensor, format: Format) -> Tensor:
    """The 16 bits of every scale, int16: bfloat16, its low bits given to selectors where there are books to select."""
    words = scales_RG.to(torch.bfloat16).view(torch.int16)
    for i in range(format.selectors if format.book_bits else 0):
        words = words | (selectors_RGS[..., i].to(torch.int16) << (i * format.book_bits))
    return words


def _part_words(words_RG: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Undo `_scale_words`."""
    if not format.book_bits:
        selectors = torch.zeros((*words_RG.shape, 1), dtype=torch.uint8)
        return words_RG.contiguous().view(torch.bfloat16).float(), selectors
    mask = (1 << format.book_bits) - 1
    parts = [words_RG >> shift & mask for shift in range(0, SELECTOR_BITS, format.book_bits)]
    scales = words_RG & -(1 << SELECTOR_BITS)
    return scales.contiguous().view(torch.bfloat16).float(), torch.stack(parts, -1).to(torch.uint8)


def _join_lots(lots: Tensor, format: Format) -> Tensor:
    """uint8 [P, B, 2, L, LOT_BYTES], a code in a byte, to vectors [P, B, 2, L * bits / 8, LOT_BYTES]."""
    if format.bits == 8:
        return lots
    if format.bits == 4:
        return lots[..., 0::2, :] | lots[..., 1::2, :] << 4
    if format.bits == 2:
        low, *rest = (lots[..., [j, 4 + j], :] << 2 * j for j in range(4))
        return low | rest[0] | rest[1] | rest[2]
    last = torch.stack([lots[..., 6:, :] >> i & 1 for i in range(3)], -3)  # bits [3, 2, LOT_BYTES]
    return lots[..., 0:6:2, :] | lots[..., 1:6:2, :] << 4 | last[..., 0, :] << 3 | last[..., 1, :] << 7


def _part_lots(vectors: Tensor, format: Format) -> Tensor:
    """Undo `_join_lots`; contiguous."""
    if format.bits == 8:
        return vectors.clone(memory_format=torch.contiguous_format)
    if format.bits == 4:
        return torch.stack((vectors & 15, vectors >> 4), -2).flatten(-3, -2)
    if format.bits == 2:
        return torch.stack([vectors >> 2 * j & 3 for j in range(4)], -2).flatten(-3, -2)
    first = torch.stack((vectors & 7, vectors >> 4 & 7), -2).flatten(-3, -2)
    bits = torch.stack((vectors >> 3 & 1, vectors >> 7), -3)  # [2, 3, LOT_BYTES]
    last = bits[..., 0, :] | bits[..., 1, :] << 1 | bits[..., 2, :] << 2
    return torch.cat((first, last), -2)
