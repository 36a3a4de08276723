"""The model's blocks on the card: a handful of kernels each, with nothing in between that waits for the host.

`octavo.model` stays what is read, and is the reference; `octavo.compiled` is the same thing for the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.cache import Memory, Step
from octavo.hooks import observers
from octavo.kernels.card import (
    Activations,
    CardExperts,
    CardLinear,
    CardMatrix,
    Chosen,
    ExpertTable,
    add_normalize_route,
    combine,
    join_rows,
    linear,
    linear_of,
    moe_into,
    normalize,
    rotate_and_store,
)
from octavo.model import MoEFeedForward, Routing, TransformerBlock


class CardBlock(TransformerBlock):
    """A block whose matrices lie on the card.

    It is computed module by module without a cache, and as far as somebody has hooks on a module that would be passed
    over. Who merely observes the router is told what it chose.
    """

    joined: Joined | None = None

    def forward(self, x_BTD: Tensor, rotation: Tensor, step: Step, layer: int) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        memory = step.memory
        if memory is None or any(self.attention_hooks()):
            return super().forward(x_BTD, rotation, step, layer)
        x_TD = x_BTD.flatten(0, 1)
        attended_TD = self.attend(x_TD, rotation, memory, layer)
        tell = observers(self.mixture.gate._forward_hooks) if self.is_sparse else None
        if tell is None or any(self.mixture_hooks()):
            x_BTD = x_BTD + attended_TD.view_as(x_BTD)
            out: Tensor = x_BTD + self.feed_forward(self.ffn_norm(x_BTD))
            return out
        x_TD, a, chosen = self.route(x_TD, attended_TD)
        for one in tell:
            one.note(Routing(*chosen))
        return self.mix(x_TD, a, chosen).view_as(x_BTD)

    def attend(self, x_TD: Tensor, rotation: Tensor, memory: Memory, layer: int) -> Tensor:
        """What attention adds to the stream; its keys and values are in the cache then."""
        attention, norm = self.attention, self.attention_norm
        heads, kinds = attention.args.n_heads, [one.matrix.kind for one in self._projections()]
        a = normalize(x_TD, norm.weight, norm.eps, *kinds)
        k_BGSK, v_BGSK = memory.k_LBHSK[layer], memory.v_LBHSK[layer]
        q_THK = rotate_and_store(self._queries_keys_values(a), rotation, heads, k_BGSK, v_BGSK, memory.slots_BT)
        return linear(attend(q_THK, k_BGSK, v_BGSK, memory), _matrix(attention.wo))

    def route(self, x_TD: Tensor, attended_TD: Tensor) -> tuple[Tensor, Activations, Chosen]:
        """Add what attention has found; the stream, what experts are given of it, and which ones."""
        gate, norm, kinds = self.mixture.gate, self.ffn_norm, self._table().kinds[:2]
        return add_normalize_route(x_TD, attended_TD, norm.weight, norm.eps, gate.weight, gate.top_k, *kinds)

    def mix(self, x_TD: Tensor, a: Activations, chosen: Chosen) -> Tensor:
        """Add what the chosen experts find."""
        if not isinstance(self.mixture.experts, CardExperts):
            return x_TD + self.mixture.experts(a.x, chosen.topk_ids_TK, chosen.topk_weights_TK)
        parts_TKD = x_TD.new_empty(*chosen.topk_ids_TK.shape, x_TD.shape[1], dtype=torch.float32)
        return self.add_up(x_TD, a, chosen, parts_TKD)

    def add_up(self, x_TD: Tensor, a: Activations, chosen: Chosen, parts_TKD: Tensor) -> Tensor:
        """The same, with room for the parts, in which those that others compute may lie already."""
        moe_into(parts_TKD, a, chosen.topk_ids_TK, chosen.topk_weights_TK, self._table())
        return combine(parts_TKD, x_TD, onto=True)

    @property
    def norm_device(self) -> torch.device:
        """Where it computes."""
        return self.attention_norm.weight.device

    @property
    def is_sparse(self) -> bool:
        """Whether it has experts on the card; anything else on the seam is computed module by module."""
        feed_forward = self.feed_forward
        return isinstance(feed_forward, MoEFeedForward) and hasattr(feed_forward.experts, "table")

    @property
    def mixture(self) -> MoEFeedForward:
        """Router and experts."""
        return cast(MoEFeedForward, self.feed_forward)

    def attention_hooks(self) -> list[Mapping[int, Any]]:
        """Of the modules that `attend` passes over."""
        return hooks_of(self.attention_norm, self.attention, *self._projections(), self.attention.wo)

    def mixture_hooks(self) -> list[Mapping[int, Any]]:
        """Of those that `route` and `mix` pass over; what a router returns is another matter."""
        gate, experts = self.mixture.gate, self.mixture.experts
        passed = [gate._forward_pre_hooks, *hooks_of(self.ffn_norm, self.feed_forward)]
        return passed + hooks_of(experts) if isinstance(experts, nn.Module) else passed

    def _projections(self) -> list[CardLinear]:
        attention = self.attention
        return [cast(CardLinear, one) for one in (attention.wq, attention.wk, attention.wv)]

    def _table(self) -> ExpertTable:
        return cast(CardExperts, self.mixture.experts).table

    def _queries_keys_values(self, a: Activations) -> Tensor:
        if self.joined is None:
            self.joined = Joined(self._projections())
        return self.joined(a)


class Joined:
    """Several matrices with the same input; as one, where they can lie behind one another."""

    def __init__(self, linears: list[CardLinear]) -> None:
        self._whole = join_rows([one.matrix for one in linears])
        self._linears = linears
        if self._whole is not None:  # the bytes are kept once
            data = torch.split(self._whole.data, [one.matrix.data.shape[0] for one in linears])
            for one, part in zip(linears, data, strict=True):
                one.matrix = one.matrix._replace(data=part)

    def __call__(self, a: Activations) -> Tensor:
        if self._whole is not None:
            return linear_of(a, self._whole)
        return torch.cat([linear_of(a, one.matrix) for one in self._linears], dim=-1)


def _matrix(linear: nn.Module) -> CardMatrix:
    return cast(CardLinear, linear).matrix


def attend(q_THK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, memory: Memory) -> Tensor:
    """Grouped-query attention over a layer's cache, by torch's fused kernels: [B * T, n_heads * head_dim].

    Args:
        q_THK: turned queries of B * T tokens.
        k_BGSK: keys, those of these tokens among them.
        v_BGSK: values.
        memory: of the step; says what each token sees.
    """
    B, T = memory.slots_BT.shape
    G, S, head_dim = k_BGSK.shape[1:]
    if T == 1:  # the heads that share keys become rows of one head, so that keys are not repeated
        mask = _mask(memory, S)
        q_BGRK = q_THK.view(B, G, -1, head_dim)
        return F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, attn_mask=mask).reshape(B, -1)
    q_BHTK = q_THK.view(B, T, -1, head_dim).transpose(1, 2)
    if memory.mask_BTS is None and S == T:  # from the beginning on
        y = F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, is_causal=True, enable_gqa=q_BHTK.shape[1] != G)
    else:  # with a mask, fused kernels want as many heads of keys as of queries
        R = q_BHTK.shape[1] // G
        k_BHSK, v_BHSK = (x[:, :, None].expand(-1, -1, R, -1, -1).flatten(1, 2) for x in (k_BGSK, v_BGSK))
        y = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=_mask(memory, S))
    return y.transpose(1, 2).reshape(B * T, -1)


def _mask(memory: Memory, n_slots: int) -> Tensor:
    """What each token sees, bool [B, 1, T, S]; made once a step."""
    if memory.prepared is None:
        mask = memory.mask_BTS
        if mask is None:
            mask = torch.arange(n_slots, device=memory.slots_BT.device) <= memory.slots_BT[:, :, None]
        memory.prepared = mask[:, None]
    found: Tensor = memory.prepared
    return found


def hooks_of(*modules: nn.Module) -> list[Mapping[int, Any]]:
    """The dicts of modules' hooks, which are empty where there are none."""
    return [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def on_card(model: nn.Module) -> bool:
    """Whether a model's blocks lie on a GPU, and are computed with by the card's kernels."""
    return any(isinstance(module, CardBlock) and module.norm_device.type == "cuda" for module in model.modules())
