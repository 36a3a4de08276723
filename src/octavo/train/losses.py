"""The two auxiliary losses of a sparse mixture of experts, and the tap that collects what they need.

Shapes: T tokens (batch and time flattened), E experts, K chosen experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle


class HasRouters(Protocol):
    """A model that lists its routers in layer order."""

    def routers(self) -> Sequence[nn.Module]:
        """The routers, first layer first; empty for a dense model."""
        ...


class RouterTap:
    """Collects what every router of a model says while the context is open.

    Hooks are attached on entry and removed on exit, whatever happens in between. A forward pass leaves one entry
    a layer; a second one inside the same context appends to them, so call `clear` in between.

    Attributes:
        logits_TE: float32 router logits [T, E] a layer, still attached to the graph.
        topk_ids_TK: the chosen experts [T, K] a layer, int64.

    Example:
        with RouterTap(model) as tap:
            logits = model(ids)
        loss = load_balancing_loss(tap.logits_TE, top_k=2)
    """

    def __init__(self, model: HasRouters) -> None:
        self._routers = list(model.routers())
        self._handles: list[RemovableHandle] = []
        self.logits_TE: list[Tensor] = []
        self.topk_ids_TK: list[Tensor] = []

    def __enter__(self) -> Self:
        self.clear()
        self._handles = [router.register_forward_hook(self._collect) for router in self._routers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self) -> None:
        """Forget what was collected so far."""
        self.logits_TE = []
        self.topk_ids_TK = []

    def _collect(self, _router: nn.Module, _inputs: Any, routing: Any) -> None:
        self.logits_TE.append(routing.logits_TE)
        self.topk_ids_TK.append(routing.topk_ids_TK.detach())

    def expert_counts_LE(self, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
        """How many (token, choice) pairs went to each expert, layer by layer: int64 [L, E], pads left out."""
        if not self.topk_ids_TK:
            return torch.zeros(0, num_experts, dtype=torch.int64)
        ids_LTK = torch.stack(self.topk_ids_TK)
        counted_T = ids_LTK.new_ones(ids_LTK.shape[1]) if mask_T is None else mask_T.reshape(-1).bool().long()
        counts_LE = ids_LTK.new_zeros(len(ids_LTK), num_experts)
        # not bincount, nor ids[mask]: the sizes of what they return depend on numbers that only the device knows
        return counts_LE.scatter_add_(1, ids_LTK.flatten(1), counted_T[:, None].expand_as(ids_LTK).flatten(1))


def load_balancing_loss(
    logits_TE: Sequence[Tensor], top_k: int, mask_T: Tensor | None = None, *, per_layer: bool = False
) -> Tensor:
    """How unevenly the routers spread the tokens: E * sum_e f_e * P_e.

    Switch Transformers (arXiv 2101.03961), equations 4 to 6, in Mixtral's form: f_e is the number of choices
    (top-k of them a token) that fell on expert e divided by the tokens, P_e the mean router probability of e.
    Both are means over the tokens **of all layers together**, as transformers computes it. A uniform router
    gives `top_k`; a router that sends everything to the same top-k experts tends to E.

    Args:
        logits_TE: router logits [T, E], one tensor a layer.
        top_k: experts a token is sent to.
        mask_T: true (or 1) for a token that counts, false for a pad; any shape with T elements.
        per_layer: give the mean over layers of each layer's own loss. The pooled loss lets one layer's
            favourite expert make up for another layer's; this one does not.

    Returns:
        A float32 scalar with gradients through P; zero if there is no layer or no counted token.
    """
    if not logits_TE:
        return torch.zeros(())
    if per_layer and len(logits_TE) > 1:
        layers = [load_balancing_loss([logits], top_k, mask_T) for logits in logits_TE]
        return torch.stack(layers).mean()
    num_experts = logits_TE[0].shape[-1]
    probs_NE = F.softmax(torch.cat([logits.float() for logits in logits_TE]), dim=-1)
    ids_NK = probs_NE.topk(top_k, dim=-1).indices
    chosen_NE = torch.zeros_like(probs_NE).scatter_(1, ids_NK, 1.0)
    if mask_T is None:
        return num_experts * (chosen_NE.mean(0) * probs_NE.mean(0)).sum()
    weight_N1 = mask_T.reshape(-1).float().repeat(len(logits_TE)).unsqueeze(1)
    total = weight_N1.sum().clamp_min(1.0)
    f_E = (chosen_NE * weight_N1).sum(0) / total
    p_E = (probs_NE * weight_N1).sum(0) / total
    return num_experts * (f_E * p_E).sum()


def router_z_loss(logits_TE: Sequence[Tensor], mask_T: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of the router logits: keeps them small, where float rounding is fine.

    ST-MoE (arXiv 2202.08906), equation 5: (1/T) sum_t (log sum_e exp x_te)^2, here the mean over layers too.

    Args:
        logits_TE: router logits [T, E], one tensor a layer.
        mask_T: true (or 1) for a token that counts, false for a pad; any shape with T elements.

    Returns:
        A float32 scalar with gradients; zero if there is no layer or no counted token.
    """
    if not logits_TE:
        return torch.zeros(())
    squared_N = torch.cat([logits.float().logsumexp(dim=-1) for logits in logits_TE]).square()
    if mask_T is None:
        return squared_N.mean()
    weight_N = mask_T.reshape(-1).float().repeat(len(logits_TE))
    return (squared_N * weight_N).sum() / weight_N.sum().clamp_min(1.0)


def weighted_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, weights_BT: Tensor) -> Tensor:
    """Sum over tokens of weight * -log p(target), in nats; divide by the weights' sum for the mean.

    The sum, not the mean, is what accumulation needs: the step's total weight is known before its first part.

    Args:
        logits_BTV: float32 logits.
        targets_BT: int64 token ids; any value where the weight is zero, but a valid id.
        weights_BT: float32; zero leaves a token out.
    """
    nll_N = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none")
    return (nll_N * weights_BT.flatten()).sum()
