"""MLX's affine quantisation: w = q * scale + bias, one scale and bias for every ``group_size`` values of a row.

``.weight`` is uint32 [..., out, in * bits / 32], each row a stream of ``bits``-bit numbers, the lowest bits first;
``.scales`` and ``.biases`` are [..., out, in / group_size]. All of it is held to mlx 0.32's own CPU code, bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.errors import CheckpointError, OptionError
from octavo.storage.packing import FLOATS, PackedTensor, chunks, describe, misfit
from octavo.storage.source import TensorSource

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


class MlxTensor(PackedTensor):
    """One quantised matrix, or several stacked.

    Args:
        source: holds ``base.weight``, ``base.scales`` and ``base.biases``.
        base: their common name.
        settings: ``quantization`` of config.json: bits, group_size and mode, and the same by module name.

    Raises:
        CheckpointError: a part is absent or of another shape or dtype, or settings and shapes disagree.
    """

    def __init__(self, source: TensorSource, base: str, settings: Mapping[str, Any]) -> None:
        name = f"{base}.weight"
        own = settings.get(base)
        settings = {**settings, **own} if isinstance(own, Mapping) else settings
        if f"{base}.biases" not in source:
            raise CheckpointError(
                f"{source.location}: {name!r} is quantised without biases (mode {settings.get('mode', 'unknown')!r});"
                " expected MLX's affine mode",
                hint="of MLX's quantisations, Octavo reads the affine one: convert with --q-mode affine",
            )
        self._source, self._base = source, base
        parts = [source.info(f"{base}.{part}") for part in ("weight", "scales", "biases")]
        weight, scales, biases = parts
        if scales.shape != biases.shape or scales.dtype != biases.dtype:
            raise misfit(source, name, parts, "scales and biases should be alike")
        if len(weight.shape) < 2 or weight.shape[:-1] != scales.shape[:-1] or 0 in weight.shape + scales.shape:
            raise misfit(source, name, parts, "all should have the same rows, and at least two dimensions")
        self._bits, self._group = _settle(source, base, settings, (weight.shape[-1] * 32, scales.shape[-1]))
        shape = (*weight.shape[:-1], scales.shape[-1] * self._group)
        self.info = describe(source, name, parts, shape, scales.dtype, f"mlx {self._bits}-bit g{self._group}")

    def rows(self, first: int, last: int) -> Tensor:
        """Multiplies, rounds, adds and rounds in the scales' dtype, as mlx.core.dequantize does."""
        packed, scales, biases = (
            self._source.read(f"{self._base}.{part}", (first, last)) for part in ("weight", "scales", "biases")
        )
        width = self.info.shape[-1]
        out = torch.empty(last - first, width, dtype=self.info.dtype)
        for begin, end in chunks(0, last - first, width):
            piece = out[begin:end]
            _unpack(packed[begin:end].contiguous().view(torch.uint8), self._bits, piece)
            groups = piece.view(end - begin, -1, self._group)
            groups.mul_(scales[begin:end, :, None]).add_(biases[begin:end, :, None])
        return out


def _settle(source: TensorSource, base: str, settings: Mapping[str, Any], sizes: tuple[int, int]) -> tuple[int, int]:
    """Find bits and group size: the shapes give their product, the settings must say the rest.

    Args:
        sizes: bits and scales of a row.
    """
    row_bits, row_scales = sizes
    bits, group = settings.get("bits"), settings.get("group_size")
    fitting = [(b, g) for b in BITS for g in GROUP_SIZES if row_scales * b * g == row_bits]
    found = [(b, g) for b, g in fitting if bits in (None, b) and group in (None, g)]
    if len(found) == 1:
        return found[0]
    ways = " or ".join(f"{b} bits in groups of {g}" for b, g in (found or fitting)) or "nothing that MLX writes"
    raise CheckpointError(
        f"{source.location}: {base!r} is quantised, its shapes fit {ways}; config.json says bits {bits},"
        f" group_size {group}",
        hint='config.json should say which, such as "quantization": {"bits": 4, "group_size": 64}',
    )


def mlx_quantize(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a matrix; equal in every bit to what mlx.core.quantize gives on a CPU for finite weights.

    Args:
        weight: [out, in], float16, bfloat16 or float32.
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: 32, 64 or 128; a divisor of ``in``.

    Returns:
        packed uint32 [out, in * bits / 32], scales and biases [out, in / group_size] of the weight's dtype.

    Raises:
        OptionError: other bits, group size, dtype or shape.
    """
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise OptionError(
            f"MLX quantises to {BITS} bits in groups of {GROUP_SIZES}, not to {bits} in groups of {group_size}",
            hint="4 bits in groups of 64 are usual",
        )
    if weight.dtype not in FLOATS or weight.ndim != 2 or weight.shape[1] % group_size:
        raise OptionError(
            f"a {weight.dtype} tensor of shape {list(weight.shape)} cannot be quantised by MLX; expected floats"
            f" [out, in] with in a multiple of {group_size}",
            hint="keep such tensors as they are",
        )
    rows, width = weight.shape
    packed = torch.empty(rows, width * bits // 8, dtype=torch.uint8)
    scales = torch.empty(rows, width // group_size, dtype=weight.dtype)
    biases = torch.empty_like(scales)
    for begin, end in chunks(0, rows, width):
        groups = weight[begin:end].float().view(end - begin, -1, group_size)
        numbers, scale, bias = _quantize_groups(groups, (1 << bits) - 1)
        _pack(numbers.view(end - begin, width), bits, packed[begin:end])
        scales[begin:end], biases[begin:end] = scale[..., 0], bias[..., 0]
    return packed.view(torch.uint32), scales, biases


def _quantize_groups(groups: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise float32 [..., group]: numbers as uint8, then scale and bias [..., 1] before they are rounded.

    The end of the range that lies further from zero becomes the bias, and the scale is stretched so that zero falls
    on a number (mlx, backend/cpu/quantized.cpp).
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / largest).clamp_(min=1e-7)
    negative = low.abs() > high.abs()
    scale = torch.where(negative, scale, -scale)
    edge = torch.where(negative, low, high)
    steps = torch.round(edge / scale)
    scale = torch.where(steps != 0, edge / steps, scale)
    bias = torch.where(steps != 0, edge, 0.0)
    return ((groups - bias) / scale).round_().clamp_(0, largest).to(torch.uint8), scale, bias


def _unpack(stream: Tensor, bits: int, out: Tensor) -> None:
    """Write the numbers of a bit stream uint8 [rows, n * bits / 8] into ``out`` [rows, n].

    Eight numbers fill ``bits`` bytes exactly; the i-th of them begins at bit i * bits and meets at most two bytes.
    """
    stream = stream.view(stream.shape[0], -1, bits)
    numbers = out.view(out.shape[0], -1, 8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        number = stream[..., byte] >> shift
        if shift + bits > 8:
            number |= stream[..., byte + 1] << (8 - shift)
        numbers[..., i] = number & ((1 << bits) - 1)


def _pack(numbers: Tensor, bits: int, out: Tensor) -> None:
    """Write numbers uint8 [rows, n] as a bit stream into ``out`` uint8 [rows, n * bits / 8]; undoes ``_unpack``."""
    stream = out.zero_().view(out.shape[0], -1, bits)
    numbers = numbers.view(numbers.shape[0], -1, 8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        stream[..., byte] |= numbers[..., i] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= numbers[..., i] >> (8 - shift)
