"""Reading what the next layer's router would choose if it were asked now, and noticing when that does not pay.

What enters a layer's router differs from what enters the next one's by one mixture and one attention, so that many
guesses are right. A wrong one costs a read, for which right ones wait; only a measurement tells which weighs more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TOKENS = 8  # of a stretch with prefetch or without; the two take turns
STRETCHES = 4  # of each, before it is decided
GAIN = 0.98  # of the time without: less is noise


class Ahead(NamedTuple):
    """The next layer's router, as seen from a layer.

    Attributes:
        ratio_D: the next layer's norm by this one's, for activations that this one's norm has scaled.
        gate_ED: its weight.
        top_k: experts a token.
    """

    ratio_D: Tensor
    gate_ED: Tensor
    top_k: int


class Prefetch:
    """Guesses for all layers, and the decision whether to go on.

    Args:
        routers: of each layer's next; the last has none.

    Attributes:
        on: whether guesses are made now.
        note: how it was decided; None while it is being tried.
    """

    def __init__(self, routers: Sequence[Ahead]) -> None:
        self._routers = routers
        self.on = True
        self.note: str | None = None
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._began: float | None = None
        self._tokens = 0

    def guess(self, layer: int, x_TD: Tensor) -> list[int]:
        """The experts of the next layer to read now, for one token or a few."""
        if layer == 0 and self.note is None:
            self._measure(len(x_TD))
        if not self.on or layer >= len(self._routers) or len(x_TD) > TOKENS:
            return []
        ratio_D, gate_ED, top_k = self._routers[layer]
        logits_TE = (x_TD.float() * ratio_D) @ gate_ED.float().T
        guessed: list[int] = torch.unique(logits_TE.topk(top_k).indices).tolist()
        return guessed

    def _measure(self, n_tokens: int) -> None:
        """Take the time of stretches of decoding; a prompt in between begins a new one."""
        now = time.perf_counter()
        if n_tokens > TOKENS:
            self._began = None
            return
        if self._began is None:
            self._began, self._tokens = now, 0
        self._tokens += 1
        if self._tokens <= TOKENS:
            return
        self._seconds[self.on].append((now - self._began) / TOKENS)
        self._began, self._tokens = now, 1
        self.on = not self.on
        if min(map(len, self._seconds.values())) == STRETCHES:
            self._decide()

    def _decide(self) -> None:
        with_it, without = (statistics.median(self._seconds[on]) for on in (True, False))
        self.on = with_it < GAIN * without
        verb = "stays on" if self.on else "turned itself off"
        self.note = f"prefetch {verb}: {with_it * 1e3:.0f} ms a token with it, {without * 1e3:.0f} without"
