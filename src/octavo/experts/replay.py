"""What a placement of experts would have read for a trace: the cache's policy, without experts and disk.

Pinned experts, and the heads of the others, count as there from the start: the first read of each is left out.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import OptionError
from octavo.experts.trace import RoutingTrace, read_trace
from octavo.plan import MemoryPlan, Placement

SAMPLE = 1_000  # tokens of a trace, which placements are chosen by
BETTER = 0.98  # of the bytes that the plan's own placement reads: less is worth another one
SLOTS = (8, 16, 32, 64, 96, 128)
PINNED = (0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)  # of the experts that there is room for


@dataclass(frozen=True)
class ReplayResult:
    """What a cache would have done.

    Attributes:
        hits, misses: experts all of which would have been there when they were asked for, and of which the tail would
            not.
        hit_rate: share of the bytes asked for that would have been there.
        nbytes: that would have been read.
    """

    hits: int
    misses: int
    hit_rate: float
    nbytes: int


def replay(
    topk_ids: npt.NDArray[Any],
    placement: Placement,
    n_experts: int,
    expert_nbytes: int,
    *,
    steps: Sequence[int] | None = None,
    skip: int = 0,
) -> ReplayResult:
    """Simulate `octavo.experts.ExpertCache` under `StreamedExperts`.

    Args:
        topk_ids: [tokens, layers, top_k], as of a `RoutingTrace`.
        placement: the policy: pinned experts, heads of the others, and slots for tails, of which the one that was
            used longest ago makes room.
        n_experts: in all layers.
        expert_nbytes: of one.
        steps: how many tokens are computed together, one step after another; by default each alone, as in decoding.
        skip: so many steps at first fill the slots and are not counted.
    """
    return _replay(list(_asked(topk_ids, steps)), placement, n_experts, expert_nbytes, skip * topk_ids.shape[1])


def placement_from_trace(trace: RoutingTrace | str | Path, plan: MemoryPlan) -> Placement:
    """Choose the pinned experts, and how many tails there is room for, by what a trace would have read.

    Compared are the plan's number of slots with larger ones, and some numbers of pinned experts. Only the first 1000
    tokens count: those that the first half chose most often are pinned, and the second half tells whether that pays,
    as a text to come would. The plan's own placement stays unless another one reads at least 2 % less.

    Args:
        trace: or its file.
        plan: of a model whose experts are streamed.

    Raises:
        OptionError: the plan has all experts in memory, or the trace is of another model.
        CheckpointError: the file cannot be read.
    """
    if plan.placement is None:
        raise OptionError("all experts are in memory; there is nothing to place", hint="leave the trace out")
    trace = trace if isinstance(trace, RoutingTrace) else read_trace(trace)
    trace.check(plan.args)
    ids, weights = trace.topk_ids[:SAMPLE], plan.weights
    half = len(ids) // 2
    asked = list(_asked(ids, None))

    def nbytes(placement: Placement) -> int:
        return _replay(asked, placement, weights.n_experts, weights.expert, half * ids.shape[1]).nbytes

    best, least = plan.placement, nbytes(plan.placement) * BETTER
    for candidate in _candidates(_by_frequency(ids[:half]), plan.placement, weights.n_experts, weights.expert):
        if (read := nbytes(candidate)) < least:
            best, least = candidate, read
    return best


_Key = tuple[int, int]
_Asked = tuple[int, bool, list[int]]
"""Layer, whether those that are held come first, and the experts by rising number."""


def _asked(topk_ids: npt.NDArray[Any], steps: Sequence[int] | None) -> Iterator[_Asked]:
    """What each step asks for in each layer."""
    tokens, layers, top_k = topk_ids.shape
    steps = [1] * tokens if steps is None else steps
    if sum(steps) != tokens:
        raise OptionError(f"the steps have {sum(steps)} tokens, the trace {tokens}")
    begin = 0
    for step in steps:
        for layer in range(layers):
            yield layer, top_k <= 2, np.unique(topk_ids[begin : begin + step, layer]).tolist()
        begin += step


def _replay(
    asked: Sequence[_Asked], placement: Placement, n_experts: int, expert_nbytes: int, skip: int
) -> ReplayResult:
    share, pinned = placement.head_share(n_experts, expert_nbytes), placement.pinned
    slots: OrderedDict[_Key, None] = OrderedDict()  # longest ago first
    hits = misses = 0
    for number, (layer, held_first, experts) in enumerate(asked):
        keys = [(layer, expert) for expert in experts if (layer, expert) not in pinned]
        found = len(experts) - len(keys)
        if share >= 1:
            found += len(keys)
            keys = []
        if held_first:
            keys.sort(key=lambda key: key not in slots)
        for key in keys:
            if key in slots:
                slots.move_to_end(key)
                found += 1
            else:
                if len(slots) >= placement.slots:
                    slots.popitem(last=False)
                slots[key] = None
        if number >= skip:
            hits += found
            misses += len(experts) - found
    there = (hits + misses * share) / max(1, hits + misses)
    return ReplayResult(hits, misses, there, round(misses * (1 - share) * expert_nbytes))


def _by_frequency(topk_ids: npt.NDArray[Any]) -> list[_Key]:
    """The experts that were chosen, most frequent first."""
    found: list[tuple[int, _Key]] = []
    for layer in range(topk_ids.shape[1]):
        counts = np.bincount(topk_ids[:, layer].ravel())
        found += [(-int(count), (layer, expert)) for expert, count in enumerate(counts) if count]
    return [key for _, key in sorted(found)]


def _candidates(frequent: list[_Key], default: Placement, n_experts: int, expert: int) -> Iterator[Placement]:
    """Placements that the same bytes have room for."""
    room = min(default.nbytes // expert, n_experts)
    for slots in sorted({default.slots, *SLOTS}):
        if not default.slots <= slots <= room:
            continue
        for n_pinned in sorted({int(share * (room - slots)) for share in PINNED} | {room - slots}):
            yield dataclasses.replace(default, slots=slots, pinned=frozenset(frequent[:n_pinned]))
