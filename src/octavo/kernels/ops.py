"""The operations: shapes and dtypes are checked here, then the compiled kernels or torch compute."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from octavo.errors import OptionError
from octavo.kernels import reference
from octavo.kernels.backend import native
from octavo.kernels.reference import Weight
from octavo.quant.formats import PANEL_ROWS, Format, Packed

__all__ = [
    "ExpertSet",
    "Matrix",
    "PartedMatrix",
    "Weight",
    "dot_peak",
    "linear",
    "moe",
    "moe_part",
    "normalize",
    "read_bandwidth",
    "route",
    "spent",
    "waited",
]


class Matrix:
    """A weight matrix, ready for the kernels; keeps its memory alive.

    Args:
        weight: low-bit, or bfloat16 and contiguous.

    Raises:
        OptionError: another dtype.
    """

    def __init__(self, weight: Weight) -> None:
        self._weight = weight
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

    @property
    def weight(self) -> Weight:
        """As it was given."""
        return self._weight


class PartedMatrix(Matrix):
    """A weight matrix whose first rows lie elsewhere than the others; kernels wait for what is still being read.

    Args:
        format: None for bfloat16.
        shape: rows and cols.
        parts: address and bytes of each of the two parts, and what is being read there (a `_native.Read`) or None.
            The first part is a number of whole panels of 16 rows, or all. Whoever calls keeps the memory.
    """

    def __init__(self, format: Format | None, shape: tuple[int, int], parts: Sequence[tuple[int, int, Any]]) -> None:
        self.format, (self.rows, self.cols), self.parts = format, shape, parts
        bits = 16 if format is None else format.bits
        panel = PANEL_ROWS * self.cols * 2 if format is None else format.panel_nbytes(self.cols)
        (head, head_nbytes, head_read), (tail, tail_nbytes, tail_read) = parts
        self.nbytes = head_nbytes + tail_nbytes
        split = head_nbytes // panel if tail_nbytes else -(-self.rows // PANEL_ROWS)
        module = native()
        self.native = module.Matrix(bits, head, *shape, split, tail, head_read, tail_read) if module else None

    @property
    def weight(self) -> Weight:
        """A copy in one place."""
        views = []
        for address, nbytes, read in self.parts:
            if read is not None:
                read.wait()
            if nbytes:
                views.append(torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8))
        data = torch.cat(views)
        shape = (self.rows, self.cols)
        return data.view(torch.bfloat16).view(shape) if self.format is None else Packed(data, self.format, shape)


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


def normalize(x_TD: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * norm in x's dtype; see `octavo.model.RMSNorm`. Compiled kernels only.

    Raises:
        OptionError: shapes or dtypes do not fit, or there are no compiled kernels.
    """
    module = compiled()
    x_TD, is_bf16 = activations(x_TD, norm.shape[0])
    same_dtype(x_TD, norm)
    norm = norm.contiguous()
    y_TD = torch.empty_like(x_TD)
    tokens = x_TD.numel() // x_TD.shape[-1]
    module.normalize(is_bf16, x_TD.data_ptr(), tokens, x_TD.shape[-1], norm.data_ptr(), eps, y_TD.data_ptr())
    return y_TD


def route(x_TD: Tensor, gate_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts as `octavo.model.Router` does. Compiled kernels only.

    Args:
        x_TD: float32 or bfloat16.
        gate_ED: float32 or bfloat16, the router's weight.
        top_k: experts a token.

    Returns:
        ids [T, K], int64; weights [T, K] and logits [T, E], float32.

    Raises:
        OptionError: shapes or dtypes do not fit, or there are no compiled kernels.
    """
    module = compiled()
    check_top_k(gate_ED, top_k)
    x_TD, is_bf16 = activations(x_TD, gate_ED.shape[1])
    gate_ED, gate_is_bf16 = activations(gate_ED, gate_ED.shape[1])
    (T, D), E = x_TD.shape, gate_ED.shape[0]
    ids_TK = torch.empty(T, top_k, dtype=torch.int64)
    weights_TK, logits_TE = torch.empty(T, top_k), torch.empty(T, E)
    pointers = (ids_TK.data_ptr(), weights_TK.data_ptr(), logits_TE.data_ptr())
    module.route(is_bf16, x_TD.data_ptr(), T, gate_is_bf16, gate_ED.data_ptr(), E, D, top_k, *pointers)
    return ids_TK, weights_TK, logits_TE


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
    x, is_bf16 = activations(x, w.cols)
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
    x_TD, is_bf16 = activations(x_TD, experts.experts[0][0].cols)
    ids, weights = _routing(x_TD, topk_ids_TK, topk_weights_TK)
    T, K = ids.shape
    module = native()
    if module is None or experts.native is None:
        return reference.moe(x_TD, ids, weights, [tuple(m.weight for m in expert) for expert in experts.experts])
    y_TD = torch.empty_like(x_TD)
    arguments = (ids.data_ptr(), weights.data_ptr(), K, experts.native, y_TD.data_ptr())
    module.moe(is_bf16, x_TD.data_ptr(), T, x_TD.shape[1], *arguments)
    return y_TD


def spent() -> tuple[float, int]:
    """Return the seconds that this process has spent in products with weights, and the bytes of these weights.

    Raises:
        OptionError: there are no compiled kernels.
    """
    seconds, nbytes = compiled().spent()
    return seconds, nbytes


def moe_part(
    y_TD: Tensor,
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    experts: Mapping[int, tuple[Matrix, Matrix, Matrix]],
) -> None:
    """Add some experts' part of `moe` to y: all of them, by rising number, give the same bits as at once.

    Args:
        y_TD: float32, contiguous; changed in place.
        x_TD: float32 or bfloat16.
        topk_ids_TK: int64.
        topk_weights_TK: float32.
        experts: w1, w3 and w2 of each, by number.

    Raises:
        OptionError: shapes or dtypes do not fit.
    """
    x_TD, is_bf16 = activations(x_TD, next(iter(experts.values()))[0].cols)
    if y_TD.shape != x_TD.shape or y_TD.dtype != torch.float32 or not y_TD.is_contiguous():
        raise OptionError(f"y is {y_TD.dtype} {list(y_TD.shape)}; expected float32 {list(x_TD.shape)}, contiguous")
    ids, weights = _routing(x_TD, topk_ids_TK, topk_weights_TK)
    module = native()
    if module is None:
        for number in sorted(experts):
            reference.moe_part(y_TD, x_TD, ids, weights, number, tuple(matrix.weight for matrix in experts[number]))
        return
    made = [(number, module.Expert(*(matrix.native for matrix in expert))) for number, expert in experts.items()]
    pointers = (x_TD.data_ptr(), *x_TD.shape, ids.data_ptr(), weights.data_ptr(), ids.shape[1])
    module.moe_part(is_bf16, *pointers, made, y_TD.data_ptr())


def waited() -> float:
    """Return the seconds in which compiled kernels of this process waited for reads of weights."""
    module = native()
    return float(module.waited()) if module else 0.0


def read_bandwidth(matrices: Sequence[Matrix]) -> float:
    """Read the matrices once with the kernels' threads, and return bytes per second.

    Raises:
        OptionError: there are no compiled kernels.
    """
    return float(compiled().read_bandwidth([matrix.native for matrix in matrices]))


def dot_peak(seconds: float = 0.2) -> float:
    """Return the int8 operations (two per product) a second of dot products that stay in registers.

    Raises:
        OptionError: there are no compiled kernels.
    """
    return float(compiled().dot_peak(seconds))


def compiled() -> ModuleType:
    """The compiled module; OptionError where there is none."""
    module = native()
    if module is None:
        raise OptionError(
            "this needs the compiled kernels, and there are none here",
            hint="install a C++ compiler, then Octavo again",
        )
    return module


def _routing(x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and weights as the kernels take them; OptionError where they are not of x's tokens."""
    if topk_weights_TK.shape != topk_ids_TK.shape or x_TD.shape[0] != topk_ids_TK.shape[0]:
        raise OptionError(
            f"x has {x_TD.shape[0]} tokens, ids {list(topk_ids_TK.shape)}, weights {list(topk_weights_TK.shape)}"
        )
    return topk_ids_TK.long().contiguous(), topk_weights_TK.float().contiguous()


def check_top_k(gate_ED: Tensor, top_k: int) -> None:
    """Raise OptionError unless a router with this weight can choose so many."""
    if gate_ED.dim() != 2 or not 1 <= top_k <= gate_ED.shape[0]:
        raise OptionError(f"{top_k} experts a token are to be chosen by a router {list(gate_ED.shape)}")


def same_dtype(x: Tensor, *others: Tensor) -> None:
    """Raise OptionError unless all are of x's dtype, on its device."""
    for other in others:
        if other.dtype != x.dtype or other.device != x.device:
            raise OptionError(f"tensors are {x.dtype} on {x.device} and {other.dtype} on {other.device}; expected one")


def activations(x: Tensor, cols: int) -> tuple[Tensor, bool]:
    """x, contiguous, and whether it is bfloat16; OptionError where kernels cannot take it."""
    if x.shape[-1] != cols or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        raise OptionError(
            f"activations are {x.dtype} {list(x.shape)} on {x.device}; "
            f"expected float32 or bfloat16 [..., {cols}] on the CPU"
        )
    return x.contiguous(), x.dtype == torch.bfloat16
