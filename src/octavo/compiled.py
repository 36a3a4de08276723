"""The model's modules with the kernels in their places: a step is one compiled call a layer.

Between kernels that stream hundreds of megabytes everything else runs from cold caches, where Python and torch take
five times as long as when repeated. `octavo.model` stays what is read and trained, and is the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from octavo.cache import Step
from octavo.hooks import observers
from octavo.kernels.backend import native
from octavo.kernels.block import Block, BlockStep, Heads
from octavo.kernels.modules import KernelExperts, KernelLinear
from octavo.kernels.ops import normalize, route
from octavo.model import MoEFeedForward, RMSNorm, Router, Routing, TransformerBlock

M = TypeVar("M", bound=nn.Module)


class KernelNorm(RMSNorm):
    """A norm in one compiled call."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; dtype and shape as given."""
        return super().forward(x) if native() is None else normalize(x, self.weight, self.eps)


class KernelRouter(Router):
    """A router whose logits do not depend on how many tokens are routed at once."""

    def forward(self, x_TD: Tensor) -> Routing:
        """Route T tokens."""
        return super().forward(x_TD) if native() is None else Routing(*route(x_TD, self.weight, self.top_k))


class KernelBlock(TransformerBlock):
    """A block whose matrices are kernels: one compiled call, where the keys and values go to a cache.

    It is computed module by module without a cache, and as far as somebody has hooks on a module that would be passed
    over, or has put another one there. Who merely observes the router is told what it chose.
    """

    _whole: _Whole | None = None

    def forward(self, x_BTD: Tensor, rotation: Tensor, step: Step, layer: int) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        memory = step.memory
        whole = None if memory is None or native() is None else self._as_whole()
        if memory is None or whole is None or whole.block is None or any(whole.attention_hooks):
            return super().forward(x_BTD, rotation, step, layer)
        if memory.prepared is None:
            lying = (memory.k_LBHSK, memory.v_LBHSK, memory.slots_BT, memory.mask_BTS)
            memory.prepared = BlockStep(*lying, rotation)
        if whole.has_mixture and not any(whole.mixture_hooks):
            if not whole.gate_hooks:
                return whole.block.forward(x_BTD, memory.prepared, layer)
            if (tell := observers(whole.gate_hooks)) is not None:
                x_BTD, seen = whole.block.forward_seen(x_BTD, memory.prepared, layer)
                for one in tell:
                    one.note(Routing(*seen))
                return x_BTD
        x_BTD = whole.block.attend(x_BTD, memory.prepared, layer)
        out: Tensor = x_BTD + self.feed_forward(self.ffn_norm(x_BTD))
        return out

    def _as_whole(self) -> _Whole:
        if self._whole is None or not self._whole.is_as_it_was():
            self._whole = _Whole(self)
        return self._whole


class _Whole:
    """A block's modules as one: their weights for the compiled code, and the hooks that forbid to pass them over."""

    def __init__(self, block: KernelBlock) -> None:
        attention, norm, args = block.attention, block.attention_norm, block.attention.args
        linears = [attention.wq, attention.wk, attention.wv, attention.wo]
        self.attention_hooks = _hooks(norm, attention, *linears)
        self.mixture_hooks = _hooks(block.ffn_norm, block.feed_forward)
        self._holders: list[nn.Module] = [block, attention, norm]
        self.block: Block | None = None
        self.has_mixture = False
        self.gate_hooks: Mapping[int, Any] = {}
        self._gate: Router | None = None
        matrices = [linear.matrix for linear in linears if isinstance(linear, KernelLinear) and linear.matrix.native]
        if len(matrices) == len(linears):
            self.block = Block(norm.weight, norm.eps, matrices, Heads(args.n_heads, args.n_kv_heads, args.head_dim))
            self._add_mixture(self.block, block.ffn_norm, block.feed_forward)
        # Somebody may change a module or a parameter later: what they are now, and where parameters lie.
        dicts = [d for module in self._holders for d in (module._modules, module._parameters)]
        self._parts = [(holder, name, part) for holder in dicts for name, part in holder.items()]
        self._top_k = self._gate and self._gate.top_k
        self._addresses = [(part, part.data_ptr()) for _, _, part in self._parts if isinstance(part, Tensor)]

    def is_as_it_was(self) -> bool:
        """Whether the block still has the modules and parameters that it had."""
        same = all(holder.get(name) is part for holder, name, part in self._parts)
        same = same and self._top_k == (self._gate and self._gate.top_k)
        return same and all(parameter.data_ptr() == address for parameter, address in self._addresses)

    def _add_mixture(self, whole: Block, norm: RMSNorm, feed_forward: nn.Module) -> None:
        if isinstance(feed_forward, MoEFeedForward) and isinstance(feed_forward.experts, KernelExperts):
            gate, experts = feed_forward.gate, feed_forward.experts
            self.mixture_hooks += [gate._forward_pre_hooks, *_hooks(experts)]
            self.gate_hooks = gate._forward_hooks
            self._holders += [norm, feed_forward, gate]
            self._gate = gate
            if experts.experts.native:
                whole.set_mixture(norm.weight, norm.eps, gate.weight, gate.top_k, experts.experts)
                self.has_mixture = True


def _hooks(*modules: nn.Module) -> list[Mapping[int, Any]]:
    return [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]


IN_PLACE_OF: Mapping[type[nn.Module], type[nn.Module]] = {
    RMSNorm: KernelNorm,
    Router: KernelRouter,
    TransformerBlock: KernelBlock,
}
"""What computes with kernels, by what it stands for."""


def in_place_of(module: nn.Module, kind: type[M]) -> M:
    """The same module, with its parameters, modules and hooks, of a kind that computes otherwise."""
    other = kind.__new__(kind)
    other.__dict__.update(module.__dict__)
    return other
