"""A figure of a routing trace as it is told, with interval, denominator and baseline; and how tokens are counted.

L layers, E experts, K chosen of them for a token, T tokens, B blocks of tokens (see `octavo.routing.intervals`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.experts import RoutingTrace
from octavo.routing.intervals import MOST, cut_blocks

Array = npt.NDArray[Any]

GUESSED = "the trace does not tell how many experts there are: as many as its highest id says"


@dataclass(frozen=True, eq=False)
class Measured:
    """A metric of a trace.

    Attributes:
        name: such as "load".
        value: float64, one dimension for each of `axes`; nan where there is nothing to divide by.
        low, high: the intervals, of the same shape. With probability `level`, all of them cover.
        baseline: what chance would give: of that shape, or it broadcasts; None where there is no such thing.
        axes: names of the dimensions, such as ("layer", "expert").
        denominator: what the values are shares or means of.
        baseline_name: what the baseline is.
        level: of all intervals together.
        note: what a reader must be warned of; "" if nothing.
    """

    name: str
    value: Array
    low: Array
    high: Array
    baseline: Array | None
    axes: tuple[str, ...]
    denominator: str
    baseline_name: str
    level: float
    note: str = ""

    @property
    def beside(self) -> Array:
        """Where the interval lies beside the baseline: -1 below, 1 above, 0 around it (or there is none)."""
        if self.baseline is None:
            return np.zeros(self.value.shape, dtype=np.int64)
        above, below = self.low > self.baseline, self.high < self.baseline
        known = ~np.isnan(self.value)
        side: Array = (above & known).astype(np.int64) - (below & known)
        return side


def notes(trace: RoutingTrace, *more: str) -> str:
    """Remarks as one text, with the one that is of the trace itself."""
    guessed = trace.n_experts is None and trace.logits is None
    return "; ".join(note for note in (GUESSED if guessed else "", *more) if note)


def blocks_of(trace: RoutingTrace, *, by_domain: bool = False, entries: int = 1) -> tuple[Array, Array]:
    """The block of each token, and the domain of each block.

    Args:
        trace: of which.
        by_domain: each domain has blocks enough of its own; otherwise all is of domain 0.
        entries: that are counted in each block at once; the more, the fewer blocks there is memory for.
    """
    most = int(np.clip((1 << 23) // entries, 64, MOST))
    return cut_blocks(trace.document_ids, trace.domain_ids if by_domain else None, most=most)


def count(index: Array, *shape: int) -> Array:
    """How often each index of a flattened array of some shape comes."""
    found: Array = np.bincount(index, minlength=math.prod(shape)).reshape(shape)
    return found


def sums(values: Array, block: Array, n_blocks: int) -> Array:
    """Of each block, the sum of its tokens' values."""
    found: Array = np.bincount(block, weights=values, minlength=n_blocks)
    return found


def layers_of(trace: RoutingTrace) -> Iterator[Array]:
    """The choices of one layer after another, [K, T]: contiguous, which is what makes counting quick."""
    for layer in range(trace.n_layers):
        yield np.ascontiguousarray(trace.topk_ids[:, layer].T).astype(np.int64)


def choices(trace: RoutingTrace, block: Array, n_blocks: int) -> Array:
    """How many tokens of each block choose each expert, [B, L, E]."""
    experts = trace.experts
    found = np.empty((n_blocks, trace.n_layers, experts), dtype=np.int64)
    for layer, ids_KT in enumerate(layers_of(trace)):
        found[:, layer] = sum(count(block * experts + ids_T, n_blocks, experts) for ids_T in ids_KT)
    return found
