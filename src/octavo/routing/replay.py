"""Which experts a cache would have held: a routing trace replayed under any budget and policy, beside what is possible.

A cache holds n whole experts of all layers together. A token asks for its experts of one layer together: those that are
held then are hits, and all others are read. Afterwards the policy keeps any n of what was held and what was asked for;
an expert that it does not keep is used and dropped, and room for that is not counted. "octavo" alone holds parts of
experts, its heads and tails, and its hit rate is the share of bytes.

The first half of the trace fills the caches and is not counted. What a policy must know beforehand, such as which
experts to pin, it learns there: so none but Belady's sees the future.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.args import ModelArgs
from octavo.errors import OptionError
from octavo.experts import RoutingTrace
from octavo.experts.replay import Requests, check_steps, replay_requests, requests
from octavo.plan import DEFAULT_CONTEXT, PASSING, Weights, footprint_of, make_plan, place_experts

Array = npt.NDArray[Any]
Hits = Callable[[int], int]
"""How many of the counted requests find their expert in a cache of so many."""

LABELS = {
    "lru": "LRU",
    "lfu": "LFU",
    "pinned": "pinned",
    "pinned+lru": "pinned + LRU",
    "belady": "Belady's bound",
    "octavo": "Octavo",
}
POLICIES = ("lru", "lfu", "pinned", "pinned+lru", "belady")
"""Of whole experts:

- lru: the n that were used last stay; of one token and layer the higher number counts as later.
- lfu: the n that were asked for most often since the start, held or not; of equals those used last.
- pinned: the n that the first half asked for most often stay, and every other is always read.
- pinned+lru: some of these stay, and LRU has the rest of the room. How many is what would have been best in the first
  half, of which the first half pins and the second one tells.
- belady: what is asked for farthest in the future goes first. No policy of whole experts can do better.

And "octavo": what Octavo does without a trace, `octavo.plan.place_experts`.
"""
TOKENS = 4_000  # of a trace, unless more are asked for
SIZES = 16
SPLITS = 12  # of the largest cache into pinned and LRU
TOGETHER = 1024  # requests whose depths are found in one go: a matrix of so many squared


@dataclass(frozen=True)
class Curve:
    """How often a policy finds what is asked for, by the size of the cache.

    Attributes:
        policy: of `POLICIES`, or "octavo".
        n_held: experts that the cache holds, in all layers together.
        hit_rate: share of the requests that find theirs there.
        nbytes: of memory for so many experts.
        label: the policy, as people call it.
        read_per_token: bytes that a token reads, on average.
        tokens: that are counted.
        requests: what they ask for: each expert once for a step and layer.
        compulsory: those of them that are the first ever for their expert, which no policy of whole experts finds.
    """

    policy: str
    n_held: tuple[int, ...]
    hit_rate: tuple[float, ...]
    nbytes: tuple[int, ...]
    label: str
    read_per_token: tuple[float, ...]
    tokens: int
    requests: int
    compulsory: int


def baseline(n_held: int, n_experts: int) -> float:
    """Return k/N: the hit rate of any fixed set of so many experts, where routing is even and tokens independent.

    LRU stays at or below it then: layers take turns, and what it lets go first is of the layer whose turn is next.

    Args:
        n_held: experts in the cache.
        n_experts: in all layers.
    """
    return min(1.0, n_held / n_experts)


def experts_within(args: ModelArgs, weights: Weights, budget: int) -> int:
    """Return how many experts a budget for all of a process has room for, one sequence of 4096 tokens at most.

    Args:
        args: the model's shape.
        weights: in its precision.
        budget: bytes.

    Raises:
        OptionError: the budget is too small; the hint is the smallest that works.
    """
    store = weights if weights.bits is None else None
    plan = make_plan(args, budget, weights.bits, min(DEFAULT_CONTEXT, args.max_seq_len), store=store)
    whole = weights.n_experts
    return whole if plan.placement is None else min(whole, plan.placement.nbytes // weights.expert)


def budget_for(args: ModelArgs, weights: Weights, n_held: int) -> int:
    """Return the bytes that a process takes with so many experts in memory; see `experts_within`."""
    context = min(DEFAULT_CONTEXT, args.max_seq_len)
    experts = n_held * weights.expert if n_held < weights.n_experts else None
    return footprint_of(args, weights, context, 1, experts).total


def curves(
    trace: RoutingTrace,
    expert_nbytes: int = 1,
    *,
    policies: Sequence[str] = POLICIES,
    sizes: Sequence[int] | None = None,
    prior: RoutingTrace | None = None,
    steps: Sequence[int] | None = None,
    tokens: int | None = TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Curve]:
    """Replay a trace under policies and sizes.

    Args:
        trace: whose second half is counted, or all of it with a ``prior``.
        expert_nbytes: of one expert; with 1, bytes are numbers of experts.
        policies: of `POLICIES`, and "octavo".
        sizes: experts that caches hold, in all layers together; more than all count as all. By default 16 numbers, from
            the experts of one token and layer to all.
        prior: another trace of the model, which fills the caches in the place of the first half.
        steps: how many tokens of the trace are computed together, one step after another; by default each alone, as in
            decoding. A prior is always decoded.
        tokens: so many of the trace, from its beginning, and of the prior, up to its end; None for all.
        progress: is told how many curves of how many are done.

    Returns:
        A curve for each policy, in the order asked for, with sizes rising.

    Raises:
        OptionError: an unknown policy; a size less than the experts of one token and layer; steps that do not make up
            the trace; a prior of another shape; no tokens.
    """
    for policy in policies:
        if policy not in LABELS:
            raise OptionError(f"policy is {policy!r}; expected one of {', '.join(LABELS)}", hint="such as lru")
    if tokens is not None and tokens < 1:
        raise OptionError(f"tokens is {tokens}; expected an integer of at least 1", hint="None is for all")
    case = _case(trace, prior, steps, tokens)
    least = max(trace.top_k, PASSING if "octavo" in policies else 1)
    held = _sizes(sizes, case.n_experts, least, expert_nbytes)
    found = []
    for number, policy in enumerate(policies):
        rates = _rates(policy, case, held, expert_nbytes)
        found.append(
            Curve(
                policy=policy,
                n_held=tuple(held),
                hit_rate=tuple(rates),
                nbytes=tuple(n * expert_nbytes for n in held),
                label=LABELS[policy],
                read_per_token=tuple((1 - rate) * case.counted * expert_nbytes / case.tokens for rate in rates),
                tokens=case.tokens,
                requests=case.counted,
                compulsory=case.compulsory,
            )
        )
        if progress is not None:
            progress(number + 1, len(policies))
    return found


@dataclass(frozen=True, eq=False)
class _Case:
    """What is replayed.

    Attributes:
        asked: what fills the cache, and what is counted.
        warm: so many steps fill it.
        tokens: that are counted.
    """

    asked: Requests
    warm: int
    tokens: int

    @functools.cached_property
    def first(self) -> int:
        """The first request that is counted."""
        return self.asked.begin(self.warm)

    @property
    def counted(self) -> int:
        """How many are."""
        return len(self.asked.keys) - self.first

    @property
    def compulsory(self) -> int:
        """How many of these are of experts that nobody has asked for before."""
        return len(np.setdiff1d(self.asked.keys[self.first :], self.asked.keys[: self.first]))

    @property
    def n_experts(self) -> int:
        """In all layers."""
        return self.asked.n_layers * self.asked.width


def _case(trace: RoutingTrace, prior: RoutingTrace | None, steps: Sequence[int] | None, tokens: int | None) -> _Case:
    ids, width = trace.topk_ids, trace.experts
    steps = [1] * len(ids) if steps is None else steps
    check_steps(steps, len(ids))
    ends = np.cumsum(steps)
    if tokens is not None and tokens < len(ids):
        whole = max(1, int(np.searchsorted(ends, tokens, side="right")))
        ends, steps, ids = ends[:whole], steps[:whole], ids[: ends[whole - 1]]
    if prior is None:
        warm = int(np.searchsorted(ends, len(ids) // 2, side="right"))
        return _Case(requests(ids, steps, width), warm, len(ids) - sum(steps[:warm]))
    if prior.topk_ids.shape[1:] != ids.shape[1:]:
        raise OptionError(
            f"the prior trace is of {prior.n_layers} layers and {prior.top_k} experts a token, and the trace of "
            f"{trace.n_layers} and {trace.top_k}",
            hint="record both with one model",
        )
    past = prior.topk_ids if tokens is None else prior.topk_ids[-tokens:]
    both = requests(np.concatenate((past, ids)), [1] * len(past) + list(steps), max(width, prior.experts))
    return _Case(both, len(past), len(ids))


def _sizes(sizes: Sequence[int] | None, n_experts: int, least: int, expert_nbytes: int) -> list[int]:
    least = min(least, n_experts)
    if sizes is None:
        return sorted({round(size) for size in np.linspace(least, n_experts, SIZES)})
    held = sorted({min(size, n_experts) for size in sizes})
    if not held or held[0] < least:
        raise OptionError(
            f"a cache of {held[0] if held else 'no'} experts is too small: {least} are needed at a time",
            hint=f"give room for {least} or more" + (f": {least * expert_nbytes} bytes" if expert_nbytes > 1 else ""),
        )
    return held


# ---------------------------------------- policies


def _rates(policy: str, case: _Case, held: list[int], expert_nbytes: int) -> list[float]:
    """The hit rate at each size."""
    if policy == "octavo":
        placed = [place_experts(n * expert_nbytes, expert_nbytes) for n in held]
        return [replay_requests(case.asked, one, case.n_experts, expert_nbytes, case.warm).hit_rate for one in placed]
    if policy == "belady":
        found = _belady(case.asked, held, case.first)
    elif policy == "pinned+lru":
        found = _pinned_and_lru(case, held)
    elif policy == "pinned":
        ranks = _ranks(case.asked.keys[: case.first], case.n_experts)
        found = [_within(ranks[case.asked.keys[case.first :]])(n) for n in held]
    else:
        depths = _depths(case.asked, by_count=policy == "lfu")
        found = [_within(depths[case.first :])(n) for n in held]
    return [hits / case.counted for hits in found]


def _within(depths: Array) -> Hits:
    """Requests that a cache of n finds, where it holds what lies less deep than n."""
    sums = np.concatenate(([0], np.cumsum(np.bincount(depths, minlength=1))))
    return lambda n: int(sums[min(n, len(sums) - 1)])


def _depths(asked: Requests, *, by_count: bool) -> Array:
    """How many experts go before each, when it is asked for: by last use, or by number of uses and then last use.

    These are Mattson's stack distances. A request lifts its own expert alone: so a cache of n, which lets go what
    stands lowest, holds the n that stand highest, for every n at once. What was never asked for lies below all.
    """
    n_experts = asked.n_layers * asked.width
    standing = np.full(n_experts, -1)
    uses = np.zeros(n_experts, dtype=np.int64)
    depths = np.empty(len(asked.keys), dtype=np.int64)
    for begin, end in _spans(asked):
        keys, groups = asked.keys[begin:end], asked.groups[begin:end]
        before, after = standing[keys], np.arange(begin, end)
        if by_count:
            uses[keys] += 1
            after = after + (uses[keys] << 32)
        above = n_experts - np.searchsorted(np.sort(standing), before, side="right")
        # And those that earlier groups of this span have lifted from below it to above.
        lifted = (groups < groups[:, None]) & (before < before[:, None]) & (after > before[:, None])
        depths[begin:end] = np.where(before < 0, n_experts, above + lifted.sum(axis=1))
        standing[keys] = after
    return depths


def _spans(asked: Requests) -> Iterator[tuple[int, int]]:
    """Requests in a row, none of whose experts is asked for twice: those of a step; of a group, if they are many."""
    for begin, end in itertools.pairwise(_edges(asked.groups // asked.n_layers)):
        if end - begin <= TOGETHER:
            yield begin, end
        else:
            inner = _edges(asked.groups[begin:end])
            yield from ((begin + a, begin + b) for a, b in itertools.pairwise(inner))


def _edges(numbers: Array) -> list[int]:
    """Where runs of equal numbers begin, and the end of all."""
    return [*np.flatnonzero(np.diff(numbers, prepend=-1)).tolist(), len(numbers)]


def _ranks(keys: Array, n_experts: int) -> Array:
    """Each expert's place among those that were asked for, the most frequent first; the last one for all others."""
    counts = np.bincount(keys, minlength=n_experts)
    ranks = np.empty(n_experts, dtype=np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(n_experts)
    ranks[counts == 0] = n_experts
    return ranks


def _pinned_and_lru(case: _Case, held: list[int]) -> list[int]:
    warm = dataclasses.replace(case.asked, keys=case.asked.keys[: case.first], groups=case.asked.groups[: case.first])
    half = warm.begin(case.warm // 2)
    early, ranks = (_ranks(warm.keys[:until], case.n_experts) for until in (half, case.first))
    asked_for = int((early < case.n_experts).sum())
    splits = sorted({min(int(pins), asked_for) for pins in np.linspace(0, held[-1], SPLITS + 1)})
    tried = {pins: _beside(warm, early, pins, half) for pins in splits}
    only_pinned = _within(early[warm.keys[half:]])
    beside: dict[int, Hits] = {}
    found = []
    for n in held:
        hits = {pins: tried[pins](n) for pins in splits if pins <= n} | {n: only_pinned(n)}
        pins = max(hits, key=lambda pins: (hits[pins], -pins))
        if pins not in beside:
            beside[pins] = _beside(case.asked, ranks, pins, case.first)
        found.append(beside[pins](n))
    return found


def _beside(asked: Requests, ranks: Array, pins: int, first: int) -> Hits:
    """Hits of caches in which the experts of the first ranks stay, and LRU has the rest of the room."""
    pinned = ranks[asked.keys] < pins
    rest = dataclasses.replace(asked, keys=asked.keys[~pinned], groups=asked.groups[~pinned])
    there, begin = int(pinned[first:].sum()), int((~pinned[:first]).sum())
    lru = _within(_depths(rest, by_count=False)[begin:])
    return lambda n: there + lru(n - pins)


def _belady(asked: Requests, held: list[int], first: int) -> list[int]:
    """The most that caches of these sizes can find.

    What is asked for farthest in the future goes first, perhaps what was just used. A larger cache then holds all that
    a smaller one does. So they are a stack: a bucket has what one cache holds beyond the next smaller one. A group
    takes its experts out and puts them back on top; each pushes one out of a full bucket into the next, down to the
    first that has room.

    An entry of a bucket is minus the index of the expert's next request: so the farthest is the least, and what has
    been asked for meanwhile is more than all that is still there, and never comes up. Experts that nobody will ask for
    again are all alike.
    """
    never = len(asked.keys)
    following = np.full(never, never)
    order = np.argsort(asked.keys, kind="stable")
    again = np.flatnonzero(np.diff(asked.keys[order]) == 0)
    following[order[again]] = order[again + 1]
    # At first, what comes soonest of all that was asked for before: any choice of those could have been kept.
    awaited = np.sort(following[:first])
    awaited = awaited[(awaited >= first) & (awaited < never)].tolist()
    nowhere = len(held)
    where = [nowhere] * (never + 1)
    buckets: list[list[int]] = []
    sizes = np.diff(held, prepend=0).tolist()
    for number, (begin, size) in enumerate(zip([0, *held], sizes, strict=False)):
        filled = awaited[begin : begin + size]
        for index in filled:
            where[index] = number
        buckets.append([-index for index in filled] + [-never] * (size - len(filled)))
        heapq.heapify(buckets[-1])
    found, room = [0] * nowhere, [0] * nowhere
    later = following.tolist()
    for begin, end in itertools.pairwise([first + edge for edge in _edges(asked.groups[first:])]):
        for number in where[begin:end]:
            if number < nowhere:
                found[number] += 1
                room[number] += 1
        for index in later[begin:end]:
            entry = -index
            for number, bucket in enumerate(buckets):
                if room[number]:
                    room[number] -= 1
                    where[-entry] = number
                    heapq.heappush(bucket, entry)
                    if len(bucket) > 2 * sizes[number] + 64:  # most of it is past
                        bucket[:] = [one for one in bucket if -one >= end]
                        heapq.heapify(bucket)
                    break
                where[-entry] = number
                entry = heapq.heappushpop(bucket, entry)
            else:
                where[-entry] = nowhere
    return list(itertools.accumulate(found))
