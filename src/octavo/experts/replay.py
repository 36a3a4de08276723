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
REPLAYED = 4_000  # tokens of a trace, which tell how often a placement would be right
BETTER = 0.98  # of the bytes that the plan's own placement reads: less is worth another one
SLOTS = (8, 16, 32, 64, 96, 128)
PINNED = (0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)  # of the experts that there is room for


@dataclass(frozen=True, eq=False)
class Requests:
    """What is asked of a cache: each expert once that a step chose in a layer, by rising number.

    Attributes:
        keys: [requests], the experts; the one of number e in layer l is l * width + e.
        groups: [requests], the step and layer that asked, as step * n_layers + layer: what is asked for together.
        n_steps, n_layers: how many there are.
        width: numbers of experts in a layer.
        top_k: experts of a token in a layer.
    """

    keys: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    n_steps: int
    n_layers: int
    width: int
    top_k: int

    def begin(self, step: int) -> int:
        """Return the index of a step's first request."""
        return int(np.searchsorted(self.groups, step * self.n_layers))


def requests(topk_ids: npt.NDArray[Any], steps: Sequence[int] | None = None, width: int | None = None) -> Requests:
    """Return what the tokens of a trace ask of a cache.

    Args:
        topk_ids: [tokens, layers, top_k], as of a `RoutingTrace`.
        steps: how many tokens are computed together, one step after another; by default each alone, as in decoding.
        width: how many experts a layer has; by default as many as the highest number tells of.

    Raises:
        OptionError: the steps do not make up the trace.
    """
    tokens, layers, top_k = topk_ids.shape
    steps = [1] * tokens if steps is None else steps
    check_steps(steps, tokens)
    width = int(topk_ids.max()) + 1 if width is None else width
    groups = np.repeat(np.arange(len(steps)), steps)[:, None] * layers + np.arange(layers)
    asked = np.unique(groups[:, :, None] * width + topk_ids)
    groups = asked // width
    return Requests(asked - groups // layers * (layers * width), groups, len(steps), layers, width, top_k)


def check_steps(steps: Sequence[int], tokens: int) -> None:
    """See that steps make up a trace of so many tokens.

    Raises:
        OptionError: they do not, or one has none.
    """
    if sum(steps) != tokens:
        raise OptionError(f"the steps have {sum(steps)} tokens, the trace {tokens}", hint="all are needed")
    if min(steps) < 1:
        raise OptionError(f"a step has {min(steps)} tokens; expected at least 1", hint="leave such steps out")


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
    """Simulate `octavo.experts.DiskCache` under `StreamedExperts`.

    Args:
        topk_ids: [tokens, layers, top_k], as of a `RoutingTrace`.
        placement: the policy: pinned experts, heads of the others, and slots for tails, of which the one that was
            used longest ago makes room.
        n_experts: in all layers.
        expert_nbytes: of one.
        steps: how many tokens are computed together, one step after another; by default each alone, as in decoding.
        skip: so many steps at first fill the slots and are not counted.
    """
    return replay_requests(requests(topk_ids, steps), placement, n_experts, expert_nbytes, skip)


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
    asked = requests(ids)

    def nbytes(placement: Placement) -> int:
        return replay_requests(asked, placement, weights.n_experts, weights.expert, half).nbytes

    best, least = plan.placement, nbytes(plan.placement) * BETTER
    for candidate in _candidates(_by_frequency(ids[:half]), plan.placement, weights.n_experts, weights.expert):
        if (read := nbytes(candidate)) < least:
            best, least = candidate, read
    return best


@dataclass(frozen=True)
class TracedPlan(MemoryPlan):
    """A plan whose experts are placed by a trace, and whose speeds follow from what that would have read.

    Attributes:
        placement: as a plan's; it always has one.
        counted: steps that were replayed and counted.
        found: what they would have found.
    """

    placement: Placement
    counted: int
    found: ReplayResult

    @property
    def _touched(self) -> float:
        """Experts that a step asks for."""
        return (self.found.hits + self.found.misses) / self.counted

    @property
    def disk_bytes(self) -> float:
        """Bytes that a step reads from disk."""
        return self.found.nbytes / self.counted


def plan_from_trace(trace: RoutingTrace | str | Path, plan: MemoryPlan) -> TracedPlan:
    """Place a plan's experts as `placement_from_trace` does, and replay the trace.

    Replayed are its first 4000 tokens. The second half of them is counted, by which no expert was pinned. For a batch
    they are cut into as many pieces of one length, which go side by side, and the second half of each piece is counted;
    in the first piece these may be tokens by which experts were pinned.

    Raises:
        OptionError: see `placement_from_trace`; or the trace has fewer than two tokens a sequence.
        CheckpointError: the file cannot be read.
    """
    trace = trace if isinstance(trace, RoutingTrace) else read_trace(trace)
    placement, weights, batch = placement_from_trace(trace, plan), plan.weights, plan.batch
    steps = min(trace.n_tokens, REPLAYED) // batch
    if steps < 2:
        raise OptionError(
            f"the trace has {trace.n_tokens} tokens; {2 * batch} or more tell how {batch} sequences are routed",
            hint="record a longer text",
        )
    side_by_side = trace.topk_ids[: steps * batch].reshape(batch, steps, *trace.topk_ids.shape[1:]).swapaxes(0, 1)
    ids = side_by_side.reshape(-1, *trace.topk_ids.shape[1:])
    found = replay(ids, placement, weights.n_experts, weights.expert, steps=[batch] * steps, skip=steps // 2)
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return TracedPlan(**{**fields, "placement": placement}, counted=steps - steps // 2, found=found)


_Key = tuple[int, int]


def replay_requests(
    asked: Requests, placement: Placement, n_experts: int, expert_nbytes: int, skip: int = 0
) -> ReplayResult:
    """Do what `replay` does, with requests that were made before."""
    share, width = placement.head_share(n_experts, expert_nbytes), asked.width
    pinned = {layer * width + expert for layer, expert in placement.pinned if expert < width}
    ends = np.searchsorted(asked.groups, np.arange(asked.n_steps * asked.n_layers), side="right").tolist()
    first, begin, every = asked.begin(skip), 0, asked.keys.tolist()
    slots: OrderedDict[int, None] = OrderedDict()  # longest ago first
    hits = misses = 0
    for end in ends:
        keys = [key for key in every[begin:end] if key not in pinned]
        found = end - begin - len(keys)
        if share >= 1:
            found += len(keys)
            keys = []
        if asked.top_k <= 2:  # those that are held come first, as in `StreamedExperts`
            keys.sort(key=lambda key: key not in slots)
        for key in keys:
            if key in slots:
                slots.move_to_end(key)
                found += 1
            else:
                if len(slots) >= placement.slots:
                    slots.popitem(last=False)
                slots[key] = None
        if begin >= first:
            hits += found
            misses += end - begin - found
        begin = end
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
