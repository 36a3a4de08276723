"""gpt-fast's int8: w = q * scale, one scale for every output (mixtral-moe/quantize.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.storage.packing import PackedTensor, chunks, describe, misfit
from octavo.storage.source import TensorSource


class Int8Tensor(PackedTensor):
    """int8 [out, in] with scales [out], or experts stacked, [E, out, in] with [E, out].

    Before March 2024 w2 was stacked as [E, in, out], so there the scales may go along the last dimension.

    Raises:
        CheckpointError: the shapes or dtypes do not fit.
    """

    def __init__(self, source: TensorSource, name: str, scales: str) -> None:
        self._source, self._scales = source, scales
        parts = [source.info(name), source.info(scales)]
        weight, scale = parts
        if weight.dtype != torch.int8:
            raise misfit(source, name, parts, "beside scales, the weight should be int8 (gpt-fast) or uint32 (MLX)")
        self._by_row = scale.shape == weight.shape[:-1]
        by_column = len(weight.shape) == 3 and scale.shape == (weight.shape[0], weight.shape[2])
        if len(weight.shape) not in (2, 3) or not (self._by_row or by_column):
            raise misfit(source, name, parts, "expected one scale for every output")
        # The scales of experts are written as float32, but gpt-fast casts all of its model to bfloat16 to run it.
        dtype = torch.bfloat16 if scale.dtype == torch.float32 else scale.dtype
        self.info = describe(source, name, parts, weight.shape, dtype, "int8")

    def rows(self, first: int, last: int) -> Tensor:
        """Multiplies in the scales' dtype."""
        packed = self._source.read(self.info.name, (first, last))
        scales = self._source.read(self._scales).to(self.info.dtype)
        out = torch.empty(packed.shape, dtype=self.info.dtype)
        for begin, end in chunks(first, last, self.info.shape[-1]):
            if self._by_row:
                scale = scales.view(-1, 1)[begin:end]
            else:
                scale = scales[torch.arange(begin, end) // self.info.shape[1]]
            piece = slice(begin - first, end - first)
            out[piece] = packed[piece].to(out.dtype).mul_(scale)
        return out
