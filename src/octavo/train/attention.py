"""Attention laid out for training on a card: every query head has keys and values of its own.

Packed documents need a mask. Of torch's fused attention kernels for CUDA, flash attention takes no mask, and the
memory-efficient one no heads that share keys, so that grouped queries under a mask fall back to plain products with
all scores in memory. Repeating keys and values costs little beside that.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from octavo.cache import Memory, Step
from octavo.model import Attention, Mixtral


class _Repeated:
    """A step whose keys and values are repeated, once for each query head that shares them."""

    def __init__(self, step: Step, times: int) -> None:
        self._step, self._times = step, times
        self.positions_BT, self.causal = step.positions_BT, step.causal

    @property
    def mask(self) -> Tensor | None:
        return self._step.mask

    @property
    def memory(self) -> Memory | None:
        return None

    def update(self, layer: int, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        k_BHSK, v_BHSK = self._step.update(layer, k_BTHK, v_BTHK)
        return k_BHSK.repeat_interleave(self._times, dim=1), v_BHSK.repeat_interleave(self._times, dim=1)


class TrainingAttention(Attention):
    """`Attention` with the same parameters, names and result. For more than one token a row."""

    def forward(self, x_BTD: Tensor, rotation: Tensor, step: Step, layer: int) -> Tensor:
        """See `octavo.model.Attention`."""
        times = self.args.n_heads // self.args.n_kv_heads
        return super().forward(x_BTD, rotation, _Repeated(step, times), layer)


def use_training_attention(model: Mixtral) -> None:
    """Give every block of a freshly built model `TrainingAttention`. Call before the weights are drawn."""
    for block in model.layers:
        block.attention = cast(Attention, TrainingAttention(model.args))
