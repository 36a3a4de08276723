"""Reading one logical tensor: a router, or one expert's matrix, out of whatever holds it.

An expert of a stacked tensor takes an equal share of its rows, and so does a half of an expert; only those rows are
read. Where gate and up lie in turn or transposed, the whole expert of that tensor is read for either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.hub.families import HINT_CONFIG, Matrix
from octavo.storage.source import TensorSource

# The 16 values of e2m1 (OCP Microscaling Formats 1.0): a sign, two bits of exponent, one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS = 127
_MXFP4_GROUP = 32  # values that share a scale


@dataclass(frozen=True)
class LogicalTensor:
    """A tensor as the model means it.

    Attributes:
        source: where it is read.
        matrix: how it lies there.
        layer, expert: which.
        n_experts: of the layer.
        router: the layer's, whose rows are the experts; of a stacked matrix, which does not show their number itself.
    """

    source: TensorSource
    matrix: Matrix
    layer: int = 0
    expert: int = 0
    n_experts: int = 1
    router: str | None = None

    @property
    def name(self) -> str:
        """Of the stored tensor that holds it."""
        return self.matrix.stored(self.layer, self.expert)

    def parts(self) -> tuple[str, ...]:
        """The stored tensors that it takes: the data and, if it is quantised, the scales."""
        if self.matrix.mxfp4:
            return self.name, self.name.removesuffix("_blocks") + "_scales"
        scales = f"{self.name}_scale_inv"
        return (self.name, scales) if scales in self.source else (self.name,)

    @property
    def dtype(self) -> torch.dtype:
        """Of what `read` returns: bfloat16 for MXFP4, the scales' (float32) for blocks of 8-bit floats."""
        if self.matrix.mxfp4:
            return torch.bfloat16
        dtype = self.source.info(self.parts()[-1]).dtype
        if not dtype.is_floating_point or dtype.itemsize == 1:
            raise CheckpointError(
                f"{self.source.location}: {self.name} is kept as {dtype}, quantised in a way that is not known here",
                hint="octavo.checkpoint.open_checkpoint reads more kinds, of Mixtral-class models",
            )
        return dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what `read` returns: [out, in] for an expert's matrix."""
        _, shape = self._share(self.name)
        if self.matrix.mxfp4:
            shape = (shape[0], shape[1] * _MXFP4_GROUP)
        if self.matrix.transposed:
            shape = shape[::-1]
        return (shape[0] // 2, *shape[1:]) if self._halved_late else shape

    @property
    def nbytes(self) -> int:
        """Bytes that `read` reads, as they are stored."""
        total = 0
        for part in self.parts():
            info = self.source.info(part)
            total += info.nbytes * math.prod(self._share(part)[1]) // max(1, math.prod(info.shape))
        return total

    def read(self) -> Tensor:
        """Read it: ``dtype``, ``shape``.

        Raises:
            CheckpointError: it is not there, or its shape is not what its layout and the counts ask for.
            HubError: it cannot be fetched.
        """
        self.dtype  # noqa: B018  # refuses what could only be misread
        data, *scales = (self._read_share(part) for part in self.parts())
        if scales:
            decode = _from_mxfp4 if self.matrix.mxfp4 else _from_scaled_blocks
            data = decode(data, scales[0], f"{self.source.location}: {self.name}")
        if self.matrix.transposed:
            data = data.T
        if self._halved_late:
            rows = data.shape[0] // 2
            data = {"first": data[:rows], "second": data[rows:], "even": data[::2], "odd": data[1::2]}[
                self.matrix.half or "first"
            ]
        return data.contiguous()

    @property
    def _halved_late(self) -> bool:
        """The half is no run of stored rows, so it is taken after reading."""
        return self.matrix.half in ("even", "odd") or (self.matrix.half is not None and self.matrix.transposed)

    def _read_share(self, part: str) -> Tensor:
        rows, shape = self._share(part)
        return self.source.read(part, rows).view(shape)

    def _share(self, part: str) -> tuple[tuple[int, int] | None, tuple[int, ...]]:
        """The rows of a stored tensor to read (None: all of them), and the shape of what they hold."""
        stored, matrix, count = self.source.info(part).shape, self.matrix, self.n_experts
        if not matrix.stacked:
            return None, stored
        shape = stored
        if len(stored) == 2:
            shape = (self._experts_of_router(), stored[0] // count, stored[1])
        dims = 4 if matrix.mxfp4 and part == self.name else 3
        fits = len(shape) == dims and shape[0] == count and math.prod(shape) == math.prod(stored)
        if fits and matrix.half is not None:
            fits = (shape[-1] if matrix.transposed else shape[1]) % 2 == 0
        if not fits:
            raise CheckpointError(
                f"{self.source.location}: {part} has shape {list(stored)}, which {count} experts do not have",
                hint=HINT_CONFIG,
            )
        one, rows = shape[1:], math.prod(shape[1:-1])
        begin = self.expert * rows
        if matrix.half is not None and not self._halved_late:
            one, rows = (one[0] // 2, *one[1:]), rows // 2
            begin += rows * (matrix.half == "second")
        return (begin, begin + rows), one

    def _experts_of_router(self) -> int:
        return self.n_experts if self.router is None else next(iter(self.source.info(self.router).shape), 0)


def _from_scaled_blocks(data: Tensor, scales: Tensor, where: str) -> Tensor:
    """8-bit floats with a scale for each block of the matrix, as DeepSeek-V3 and MiniMax-M2 have them.

    Args:
        data: float8 [out, in].
        scales: [out / block, in / block].
        where: for messages.

    Returns:
        [out, in] of the scales' dtype.
    """
    if (
        len(data.shape) != 2
        or len(scales.shape) != 2
        or any(not s or d % s for d, s in zip(data.shape, scales.shape, strict=True))
    ):
        raise _misfit(data, scales, where)
    height, width = (d // s for d, s in zip(data.shape, scales.shape, strict=True))
    return data.to(scales.dtype) * scales.repeat_interleave(height, dim=0).repeat_interleave(width, dim=1)


def _from_mxfp4(blocks: Tensor, scales: Tensor, where: str) -> Tensor:
    """Groups of 32 values of 4 bits, two a byte and the lower half first, that share an exponent.

    Args:
        blocks: uint8 [out, in / 32, 16].
        scales: uint8 [out, in / 32], biased exponents of two.
        where: for messages.

    Returns:
        bfloat16 [out, in]: every product fits exactly.
    """
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8 or blocks.shape != (*scales.shape, _MXFP4_GROUP // 2):
        raise _misfit(blocks, scales, where)
    values = torch.tensor(_E2M1, dtype=torch.bfloat16)
    pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1)
    exponents = scales.to(torch.int32) - _E8M0_BIAS
    return torch.ldexp(values[pairs.int()].flatten(2), exponents.unsqueeze(-1)).flatten(1)


def _misfit(data: Tensor, scales: Tensor, where: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is {list(data.shape)} of {data.dtype}, which scales {list(scales.shape)} do not go with",
        hint="the file is damaged; fetch it again",
    )
