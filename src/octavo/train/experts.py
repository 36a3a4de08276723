"""Resident experts laid out for training: the same function, with a backward pass that scatters nothing.

The sum over a token's experts, written with `index_add`, and the gather before it cost a scatter each in the
backward pass, on zeros as large as the batch for every expert. Here both are permutations, whose gradient is the
inverse permutation, so forward and backward are gathers alone. It makes a training step about a quarter faster
(bfloat16, dim 256, 8 experts, one core).

Which expert has how many tokens is known to the device alone. To cut the batch into one product an expert, the host
must ask, and a card stands still meanwhile: once a layer. Where torch has grouped products, the card is told in one
order where the groups end, and nobody asks.

Shapes: T tokens, D dim, F hidden_dim (or D, where a matrix goes from F to D), E experts, K experts chosen a token,
N = T*K assignments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from octavo.args import ModelArgs, MoEArgs
from octavo.model import FeedForward, Mixtral, MoEFeedForward, ResidentExperts

_grouped_mm = getattr(F, "grouped_mm", None)  # torch 2.10


class _Permute(torch.autograd.Function):
    """x[order], with grad[inverse] as its gradient."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return x_ND.index_select(0, order_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_N), None, None


def permute(x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """Rows of x in another order; `inverse_N` undoes `order_N`."""
    out: Tensor = _Permute.apply(x_ND, order_N, inverse_N)  # type: ignore[no-untyped-call]
    return out


class _GroupedLinear(torch.autograd.Function):
    """The rows before ends_E[0] by the first weight, those up to ends_E[1] by the second, and so on; in x's dtype.

    The weights stay parameters of their own; they are copied into one tensor, which rounds them to x's dtype too, as
    autocast would.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, ends_E: Tensor, *weights_FD: Tensor) -> Tensor:
        weights_EFD = x_ND.new_empty(len(weights_FD), *weights_FD[0].shape)
        torch._foreach_copy_(list(weights_EFD.unbind()), list(weights_FD))
        ctx.save_for_backward(x_ND, ends_E, weights_EFD)
        ctx.dtype = weights_FD[0].dtype
        return _grouped_mm(x_ND, weights_EFD.transpose(-2, -1), offs=ends_E)  # type: ignore[misc, no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, ends_E, weights_EFD = ctx.saved_tensors
        grad_NF = grads[0].contiguous()
        x_grad_ND = _grouped_mm(grad_NF, weights_EFD, offs=ends_E)  # type: ignore[misc]
        grads_EFD = _grouped_mm(grad_NF.T, x_ND, offs=ends_E)  # type: ignore[misc]
        # not every card writes the product of a group without rows (pytorch issue 172439)
        empty_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        grads_EFD = grads_EFD.masked_fill(empty_E[:, None, None], 0).to(ctx.dtype)
        return x_grad_ND, None, *grads_EFD.unbind()


def grouped_linear(x_ND: Tensor, ends_E: Tensor, weights_FD: list[Tensor]) -> Tensor:
    """Each group of rows by its own weight.

    Args:
        x_ND: rows in the order of their groups, bfloat16.
        ends_E: int32, ascending; the row before which each group ends, N for the last.
        weights_FD: of each group.

    Returns:
        [N, F], in x's dtype. A weight without rows has a gradient of zero.
    """
    out: Tensor = _GroupedLinear.apply(x_ND, ends_E, *weights_FD)  # type: ignore[no-untyped-call]
    return out


def grouped_products(device: torch.device, dtype: torch.dtype, args: ModelArgs) -> tuple[bool, str]:
    """Whether grouped products are the faster layout here, and the reason."""
    if device.type != "cuda":
        return False, "on a CPU there is nobody to wait for"
    if _grouped_mm is None:
        return False, "they come with torch 2.10"
    if dtype is not torch.bfloat16:
        return False, "they take bfloat16"
    if args.dim % 8 or args.hidden_dim % 8:
        return False, "they take rows of a multiple of 16 bytes"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10):  # elsewhere torch asks the host for the groups' sizes, three times a layer
        return False, f"the card's compute capability is {major}.{minor}, not 9 or 10"
    return True, f"the card's compute capability is {major}.{minor}"


class TrainingExperts(ResidentExperts):
    """`ResidentExperts` with the same parameters and names, and the same result up to the order of one sum.

    Args:
        grouped: compute all experts' tokens in one grouped product a matrix, in bfloat16.
    """

    def __init__(self, args: ModelArgs, moe: MoEArgs, grouped: bool = False) -> None:
        super().__init__(args, moe)
        self.grouped = grouped

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """See `octavo.model.Experts`. Sums in float32, best expert first."""
        sorted_N, order_N = topk_ids_TK.flatten().sort(stable=True)
        inverse_N = torch.empty_like(order_N)
        inverse_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        numbers_E = torch.arange(len(self), device=order_N.device)
        ends_E = torch.searchsorted(sorted_N, numbers_E, right=True, out_int32=True)
        run = self._in_groups if self.grouped else self._one_by_one
        x_ND = (x_TD.bfloat16() if self.grouped else x_TD).repeat_interleave(topk_ids_TK.shape[1], dim=0)
        out_ND = run(permute(x_ND, order_N, inverse_N), ends_E)
        out_TKD = permute(out_ND, inverse_N, order_N).view(*topk_ids_TK.shape, -1)
        with torch.autocast(x_TD.device.type, enabled=False):
            y_TD = torch.bmm(topk_weights_TK.float().unsqueeze(1), out_TKD.float()).squeeze(1)
        return y_TD.type_as(x_TD)

    def _one_by_one(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
        parts = torch.split(x_ND, counts)
        return torch.cat([expert(part) for expert, part in zip(self, parts, strict=True)])

    def _in_groups(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        experts = [expert for expert in self if isinstance(expert, FeedForward)]
        gate_NF = grouped_linear(x_ND, ends_E, [expert.w1.weight for expert in experts])
        up_NF = grouped_linear(x_ND, ends_E, [expert.w3.weight for expert in experts])
        return grouped_linear(F.silu(gate_NF) * up_NF, ends_E, [expert.w2.weight for expert in experts])


def use_training_experts(model: Mixtral, grouped: bool = False) -> None:
    """Give every sparse block of a freshly built model `TrainingExperts`. Call before the weights are drawn."""
    moe = model.args.moe
    for block in model.layers:
        if moe is not None and isinstance(block.feed_forward, MoEFeedForward):
            block.feed_forward.experts = TrainingExperts(model.args, moe, grouped)
