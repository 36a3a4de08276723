"""The operations: shapes and dtypes are checked here, then the compiled kernels or torch compute."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from octavo.errors import OptionError
from octavo.kernels import reference
from octavo.kernels.backend import native
from octavo.kernels.reference import Weight
from octavo.quant.formats import Packed

__all__ = ["ExpertSet", "Matrix", "Weight", "dot_peak", "linear", "moe", "read_bandwidth"]


class Matrix:
    """A weight matrix, ready for the kernels; keeps its memory alive.

    Args:
        weight: low-bit, or bfloat16 and contiguous.

    Raises:
        OptionError: another dtype.
    """

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self.rows, self.cols = weight.shape
        bits = weight.format.bits if isinstance(weight, Packed) else 16
        data = weight.data
        if bits == 16 and data.dtype != torch.bfloat16:
            raise OptionError(f"a weight matrix is {data.dtype}; expected bfloat16, or one of the low-bit formats")
        if not data.is_contiguous() or data.device.type != "cpu":
            raise OptionError("a weight matrix is not contiguous, or not in the CPU's memory")
        self.nbytes = data.nbytes
        module = native()
        self.native = module.Matrix(bits, data.data_ptr(), self.rows, self.cols) if module else None


class ExpertSet:
    """The experts of one layer.

    Args:
        experts: w1, w3 and w2 of each.
    """

    def __init__(self, experts: Sequence[tuple[Weight, Weight, Weight]]) -> None:
        self.experts = [(Matrix(w1), Matrix(w3), Matrix(w2)) for w1, w3, w2 in experts]
        module = native()
        made = [module.Expert(*(m.native for m in expert)) for expert in self.experts] if module else []
        self.native = module.Experts(made) if module else None


def linear(x: Tensor, w: Matrix | Weight) -> Tensor:
    """Return x @ w.T.

    Args:
        x: float32 or bfloat16 [..., cols].
        w: a matrix [rows, cols].

    Returns:
        [..., rows] in x's dtype.

    Raises:
        OptionError: shapes or dtypes do not fit.
    """
    w = w if isinstance(w, Matrix) else Matrix(w)
    x, is_bf16 = _activations(x, w.cols)
    module = native()
    if module is None or w.native is None:
        return reference.linear(x, w.weight)
    y = x.new_empty(*x.shape[:-1], w.rows)
    module.linear(is_bf16, x.data_ptr(), x.numel() // w.cols, w.native, is_bf16, y.data_ptr())
    return y


def moe(x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, experts: ExpertSet) -> Tensor:
    """Return y[t] = sum over k of topk_weights[t, k] * w2(silu(w1 x[t]) * w3 x[t]) of expert topk_ids[t, k].

    Args:
        x_TD: float32 or bfloat16.
        topk_ids_TK: int64.
        topk_weights_TK: float32.
        experts: of this layer.

    Returns:
        y_TD in x's dtype; the sum over experts is in float32, in the order of the experts.

    Raises:
        OptionError: shapes or dtypes do not fit.
    """
    x_TD, is_bf16 = _activations(x_TD, experts.experts[0][0].cols)
    T, K = topk_ids_TK.shape
    if topk_weights_TK.shape != (T, K) or x_TD.shape[0] != T:
        raise OptionError(
            f"x has {x_TD.shape[0]} tokens, ids {list(topk_ids_TK.shape)}, weights {list(topk_weights_TK.shape)}"
        )
    ids, weights = topk_ids_TK.long().contiguous(), topk_weights_TK.float().contiguous()
    module = native()
    if module is None or experts.native is None:
        return reference.moe(x_TD, ids, weights, [tuple(m.weight for m in expert) for expert in experts.experts])
    y_TD = torch.empty_like(x_TD)
    arguments = (ids.data_ptr(), weights.data_ptr(), K, experts.native, y_TD.data_ptr())
    module.moe(is_bf16, x_TD.data_ptr(), T, x_TD.shape[1], *arguments)
    return y_TD


def read_bandwidth(matrices: Sequence[Matrix]) -> float:
    """Read the matrices once with the kernels' threads, and return bytes per second.

    Raises:
        OptionError: there are no compiled kernels.
    """
    return float(_compiled().read_bandwidth([matrix.native for matrix in matrices]))


def dot_peak(seconds: float = 0.2) -> float:
    """Return the int8 operations (two per product) a second of dot products that stay in registers.

    Raises:
        OptionError: there are no compiled kernels.
    """
    return float(_compiled().dot_peak(seconds))


def _compiled() -> ModuleType:
    module = native()
    if module is None:
        raise OptionError(
            "the machine's limits are measured by compiled kernels, and there are none here",
            hint="install a C++ compiler, then Octavo again",
        )
    return module


def _activations(x: Tensor, cols: int) -> tuple[Tensor, bool]:
    if x.shape[-1] != cols or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        raise OptionError(
            f"activations are {x.dtype} {list(x.shape)} on {x.device}; "
            f"expected float32 or bfloat16 [..., {cols}] on the CPU"
        )
    return x.contiguous(), x.dtype == torch.bfloat16
