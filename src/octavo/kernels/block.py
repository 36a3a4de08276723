"""A whole block in one call: norms, attention over the cache, routing and experts.

Compiled only; the module path of `octavo.model` is the reference. Results do not depend on how many tokens are computed
at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.errors import OptionError
from octavo.kernels.ops import ExpertSet, Matrix, activations, check_top_k, compiled, same_dtype


class BlockStep:
    """What the blocks of a step have in common: the cache where it lies, and the tokens' rotation.

    Args:
        k_LBGSK: keys by layer, row, key-value head and slot; is written to. Numbers of a head are adjacent.
        v_LBGSK: values, lying alike.
        slots_BT: int64, where each new key and value go.
        mask_BTS: bool, the slots that each token sees, its own at least, no later token's; None for all up to its own.
        rotation: complex64, head_dim / 2 numbers for each of B * T tokens; see `octavo.model.rotary_embedding`.

    Raises:
        OptionError: shapes, dtypes or strides do not fit, a slot is not there, or there are no compiled kernels.
    """

    def __init__(
        self, k_LBGSK: Tensor, v_LBGSK: Tensor, slots_BT: Tensor, mask_BTS: Tensor | None, rotation: Tensor
    ) -> None:
        if k_LBGSK.dim() != 5:
            raise OptionError(f"keys are {list(k_LBGSK.shape)}; expected layers, rows, heads, slots, numbers of a head")
        self.layers, rows, n_kv_heads, slots, head_dim = k_LBGSK.shape
        self.dtype, self.heads, self.tokens = k_LBGSK.dtype, (n_kv_heads, head_dim), slots_BT.numel()
        same_dtype(k_LBGSK, v_LBGSK)
        if k_LBGSK.stride() != v_LBGSK.stride() or k_LBGSK.stride(4) != 1 or k_LBGSK.shape != v_LBGSK.shape:
            raise OptionError("keys and values do not lie alike, or the numbers of a head are not adjacent")
        if slots_BT.dtype != torch.int64 or slots_BT.dim() != 2 or slots_BT.shape[0] != rows:
            raise OptionError(f"slots are {slots_BT.dtype} {list(slots_BT.shape)}; expected int64 [{rows}, tokens]")
        if self.tokens and not 0 <= int(slots_BT.min()) <= int(slots_BT.max()) < slots:
            raise OptionError(f"slots are {slots_BT.tolist()}; expected 0 to {slots - 1}")
        if mask_BTS is not None and (mask_BTS.shape != (*slots_BT.shape, slots) or mask_BTS.dtype != torch.bool):
            raise OptionError(
                f"the mask is {mask_BTS.dtype} {list(mask_BTS.shape)}; expected bool {[*slots_BT.shape, slots]}"
            )
        if rotation.dtype != torch.complex64 or rotation.numel() * 2 != self.tokens * head_dim:
            raise OptionError(
                f"the rotation is {rotation.dtype} {list(rotation.shape)}; "
                f"expected complex64, {head_dim // 2} numbers for each of {self.tokens} tokens"
            )
        slots_BT, rotation = slots_BT.contiguous(), rotation.resolve_conj().contiguous()
        mask_BTS = None if mask_BTS is None else mask_BTS.contiguous()
        self._alive = (k_LBGSK, v_LBGSK, slots_BT, mask_BTS, rotation)
        cache = compiled().Cache(
            k_LBGSK.data_ptr(),
            v_LBGSK.data_ptr(),
            k_LBGSK.stride()[:4],
            slots_BT.shape[1],
            slots,
            slots_BT.data_ptr(),
            0 if mask_BTS is None else mask_BTS.data_ptr(),
        )
        self.native = (self.tokens, rotation.data_ptr(), cache)


_UNSEEN = (0, 0, 0)  # no place for what the router chose


class Heads(NamedTuple):
    """Of an attention layer."""

    n_heads: int
    n_kv_heads: int
    head_dim: int


class Block:
    """The weights of a block, ready for `attend` and `forward`.

    Args:
        norm: weight of the norm before attention [D], of the activations' dtype.
        eps: of that norm.
        matrices: wq, wk, wv and wo.
        heads: of the attention.

    Raises:
        OptionError: shapes or dtypes do not fit, or there are no compiled kernels.
    """

    def __init__(self, norm: Tensor, eps: float, matrices: Sequence[Matrix], heads: Heads) -> None:
        queries, keys = heads.n_heads * heads.head_dim, heads.n_kv_heads * heads.head_dim
        dim = norm.numel()
        shapes = [(matrix.rows, matrix.cols) for matrix in matrices]
        if shapes != [(queries, dim), (keys, dim), (keys, dim), (dim, queries)] or heads.n_heads % heads.n_kv_heads:
            raise OptionError(f"matrices are {shapes}, the norm has {dim} numbers; they do not fit {heads}")
        self.dim = dim
        self._norm, self._is_bf16 = activations(norm.detach(), dim)  # keeps its memory, whatever becomes of a parameter
        self._accepts = (self._norm.dtype, self._norm.dtype, tuple(heads[1:]))
        natives = (matrix.native for matrix in matrices)
        self._attention = compiled().Attention(self._is_bf16, self._norm.data_ptr(), eps, *natives, *heads)
        self._alive: list[object] = [matrices]
        self._mixture: object = None

    def set_mixture(self, norm: Tensor, eps: float, gate_ED: Tensor, top_k: int, experts: ExpertSet) -> None:
        """Say what follows the attention.

        Args:
            norm: weight of the norm before router and experts [D].
            eps: of that norm.
            gate_ED: the router's weight, float32 or bfloat16.
            top_k: experts a token.
            experts: of this layer.

        Raises:
            OptionError: shapes or dtypes do not fit.
        """
        same_dtype(self._norm, norm)
        check_top_k(gate_ED, top_k)
        if len(experts.experts) != gate_ED.shape[0]:
            raise OptionError(f"the router is {list(gate_ED.shape)}; there are {len(experts.experts)} experts")
        gate_ED, gate_is_bf16 = activations(gate_ED.detach(), self.dim)
        norm, _ = activations(norm.detach(), self.dim)
        self._alive += [norm, gate_ED, experts]
        gate = (gate_is_bf16, gate_ED.data_ptr(), *gate_ED.shape, top_k)
        self._mixture = compiled().Mixture(self._is_bf16, norm.data_ptr(), eps, *gate, experts.native)

        self._top_k, self._n_experts = top_k, len(experts.experts)

    def attend(self, x: Tensor, step: BlockStep, layer: int) -> Tensor:
        """Store the new keys and values, and return x + attention(norm(x)).

        Args:
            x: a row of D numbers for each token; float32 or bfloat16, as the norms and the cache are.
            step: of the same tokens.
            layer: of the cache.

        Raises:
            OptionError: shapes or dtypes do not fit.
        """
        return self._run(x, step, layer, None, _UNSEEN)

    def forward(self, x: Tensor, step: BlockStep, layer: int) -> Tensor:
        """Go on from `attend` with what `set_mixture` named: return h + moe(norm(h))."""
        return self._run(x, step, layer, self._mixture, _UNSEEN)

    def forward_seen(self, x: Tensor, step: BlockStep, layer: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """`forward`, and what the router chose on the way, as `octavo.kernels.ops.route` returns it."""
        T = step.tokens
        ids_TK = torch.empty(T, self._top_k, dtype=torch.int64)
        weights_TK, logits_TE = torch.empty(T, self._top_k), torch.empty(T, self._n_experts)
        seen = (ids_TK.data_ptr(), weights_TK.data_ptr(), logits_TE.data_ptr())
        return self._run(x, step, layer, self._mixture, seen), (ids_TK, weights_TK, logits_TE)

    def _run(self, x: Tensor, step: BlockStep, layer: int, mixture: object, seen: tuple[int, int, int]) -> Tensor:
        if (x.dtype, step.dtype, step.heads) != self._accepts or x.numel() != step.tokens * self.dim:
            dtype, _, heads = self._accepts
            raise OptionError(
                f"activations are {x.dtype} {list(x.shape)}, the cache is {step.dtype} with heads {step.heads}; "
                f"expected {dtype}, {step.tokens} rows of {self.dim} and heads {heads}"
            )
        if not 0 <= layer < step.layers:
            raise OptionError(f"layer is {layer}; the cache has {step.layers}")
        x = x.contiguous()
        y = torch.empty_like(x)
        module = compiled()
        module.block(self._attention, mixture, self._is_bf16, x.data_ptr(), *step.native, layer, y.data_ptr(), seen)
        return y
