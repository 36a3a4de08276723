"""The kernels' arithmetic in torch: slow and plain. It runs where there is no compiled module, and tests rely on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.quant.formats import Packed
from octavo.quant.quantize import dequantize

GROUP = 64
"""Columns of a token's activations that share a scale."""
TINY = 1e-36
"""Smaller activations count as zeros: the inverse of their scale would not be finite."""
Weight = Packed | Tensor
"""A low-bit matrix, or a bfloat16 one [rows, cols]."""


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations to int8: scale = max|x| / 127 of 64 columns, q = round-half-even(x * (127 / max|x|)).

    A group with a NaN or an infinity has the scale NaN, and spoils its token.

    Args:
        x: float32 [..., cols].

    Returns:
        q, int8 [..., groups, 64], padded with zeros; and scale, float32 [..., groups].
    """
    padded = F.pad(x, (0, -x.shape[-1] % GROUP))
    groups = padded.view(*x.shape[:-1], padded.shape[-1] // GROUP, GROUP)
    most = groups.abs().amax(-1)
    inverse = torch.where(most >= TINY, 127.0 / most, 0.0)
    most = torch.where(most.isinf(), torch.nan, most)
    return (groups * inverse[..., None]).round().clamp(-127, 127).to(torch.int8), most / 127.0


def rounded(x: Tensor) -> Tensor:
    """Activations as the kernels see them: float32, after rounding to int8 and back."""
    q, scale = quantize_activations(x.float())
    return (q.float() * scale[..., None]).flatten(-2)[..., : x.shape[-1]]


def linear(x: Tensor, w: Weight) -> Tensor:
    """See `octavo.kernels.linear`."""
    if isinstance(w, Packed):
        return (rounded(x) @ dequantize(w).T).to(x.dtype)
    return (x.to(torch.bfloat16).float() @ w.float().T).to(x.dtype)


def moe(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, experts: Sequence[tuple[Weight, ...]]) -> Tensor:
    """See `octavo.kernels.moe`."""
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for number, expert in enumerate(experts):
        moe_part(y_TD, x_TD, ids_TK, weights_TK, number, expert)
    return y_TD.to(x_TD.dtype)


def moe_part(
    y_TD: Tensor, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, number: int, expert: tuple[Weight, ...]
) -> None:
    """See `octavo.kernels.ops.moe_part`."""
    w1, w3, w2 = expert
    tokens, places = (ids_TK == number).nonzero(as_tuple=True)
    if len(tokens):
        x = x_TD[tokens].float()
        out = linear(F.silu(linear(x, w1)) * linear(x, w3), w2)
        y_TD.index_add_(0, tokens, out * weights_TK[tokens, places, None])
