"""The offline replay: the same as a plain simulation, and better with more memory; placements chosen by it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import OptionError
from octavo.experts.replay import placement_from_trace, replay
from octavo.experts.trace import RoutingTrace
from octavo.plan import MemoryPlan, Placement, footprint_of, make_plan, weights_at
from octavo.shapes import shape
from test_trace import random_ids

EXPERT = 1000  # bytes
FULL = shape("mixtral-8x7b")


def obvious(ids: Any, placement: Placement, n_experts: int, steps: list[int], skip: int) -> tuple[int, int]:
    """Hits and misses by a clock: each tail in memory has the time when it was used last."""
    used: dict[tuple[int, int], int] = {}
    whole = placement.head_share(n_experts, EXPERT) == 1
    clock = hits = misses = begin = 0
    for number, step in enumerate(steps):
        for layer in range(ids.shape[1]):
            chosen = sorted({int(expert) for expert in ids[begin : begin + step, layer].flatten()})
            if ids.shape[2] <= 2:
                there = [e for e in chosen if (layer, e) in used]
                chosen = there + [e for e in chosen if e not in there]
            for expert in chosen:
                clock += 1
                key = (layer, expert)
                found = key in placement.pinned or whole or key in used
                if not found and len(used) == placement.slots:
                    del used[min(used, key=lambda one: used[one])]
                if key not in placement.pinned and not whole:
                    used[key] = clock
                if number >= skip:
                    hits, misses = hits + found, misses + (not found)
        begin += step
    return hits, misses


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, Placement, int, list[int]]:
    layers, experts, top_k = draw(st.integers(1, 4)), draw(st.integers(4, 8)), draw(st.integers(1, 3))
    steps = draw(st.lists(st.integers(1, 4), min_size=1, max_size=25))
    n_experts = layers * experts
    keys = st.tuples(st.integers(0, layers - 1), st.integers(0, experts - 1))
    pinned = draw(st.frozensets(keys, max_size=n_experts))
    slots = draw(st.integers(2, n_experts + 2))
    nbytes = draw(st.integers((slots + len(pinned)) * EXPERT, (2 * n_experts + 2) * EXPERT))
    ids = random_ids(sum(steps), layers, top_k, experts, seed=draw(st.integers(0, 99)))
    return ids, Placement(nbytes, slots, pinned), n_experts, steps


@settings(max_examples=150, deadline=None)
@given(case=cases(), skip=st.integers(0, 5))
def test_it_does_what_a_plain_simulation_does(case: Any, skip: int) -> None:
    ids, placement, n_experts, steps = case
    found = replay(ids, placement, n_experts, EXPERT, steps=steps, skip=skip)
    assert (found.hits, found.misses) == obvious(ids, placement, n_experts, steps, skip)
    share = placement.head_share(n_experts, EXPERT)
    asked = max(1, found.hits + found.misses)
    assert found.hit_rate == pytest.approx((found.hits + found.misses * share) / asked)
    assert found.nbytes == pytest.approx(found.misses * (1 - share) * EXPERT, abs=1)


@settings(max_examples=60, deadline=None)
@given(case=cases(), more=st.integers(0, 10_000))
def test_more_memory_is_never_worse(case: Any, more: int) -> None:
    ids, placement, n_experts, _ = case
    larger = dataclasses.replace(placement, nbytes=placement.nbytes + more)
    fewer, most = (replay(ids, one, n_experts, EXPERT) for one in (placement, larger))
    assert most.hit_rate >= fewer.hit_rate
    assert most.nbytes <= fewer.nbytes


def test_pinned_are_always_there() -> None:
    ids = random_ids(50, 4, 2, 8)
    everything = frozenset((layer, expert) for layer in range(4) for expert in range(8))
    found = replay(ids, Placement(34 * EXPERT, 2, everything), 32, EXPERT)
    assert (found.hit_rate, found.misses, found.nbytes) == (1, 0, 0)


def test_pinned_experts_that_no_token_chooses_are_no_others() -> None:
    ids = random_ids(50, 4, 2, 3)  # of eight experts three
    unused = frozenset((layer, expert) for layer in range(4) for expert in range(3, 8))
    found = replay(ids, Placement(22 * EXPERT, 2, unused), 32, EXPERT)
    assert (found.hits, found.misses) == obvious(ids, Placement(22 * EXPERT, 2, unused), 32, [1] * 50, 0)
    assert found.misses > 200


@pytest.mark.parametrize("share", [0.1, 0.45, 0.8])
def test_of_even_routing_the_heads_are_found(share: float) -> None:
    placement = Placement(round((4 + share * 252) * EXPERT), 4)
    found = replay(random_ids(300, 32, 2, 8), placement, 256, EXPERT)
    assert found.hit_rate == pytest.approx(share, abs=0.01)


def test_steps_are_of_all_tokens() -> None:
    with pytest.raises(OptionError, match="steps have 3 tokens, the trace 4"):
        replay(random_ids(4, 2, 2, 8), Placement(4 * EXPERT, 4), 16, EXPERT, steps=[1, 2])


# ---------------------------------------- placements


def plan(experts: int) -> MemoryPlan:
    """The full-size model at 4 bits, with room for so many experts."""
    weights = weights_at(FULL, 4)
    return make_plan(FULL, footprint_of(FULL, weights, 600, 1, experts=experts * weights.expert).total, 4, 600)


def nbytes(ids: Any, placement: Placement) -> int:
    weights = weights_at(FULL, 4)
    return replay(ids, placement, weights.n_experts, weights.expert).nbytes


def test_even_routing_keeps_the_plans_own_placement() -> None:
    given_plan = plan(100)
    assert placement_from_trace(RoutingTrace(random_ids(1000, 32, 2, 8)), given_plan) == given_plan.placement


def test_experts_that_nearly_all_tokens_choose_are_pinned(tmp_path: Path) -> None:
    ids = random_ids(300, 32, 2, 8)
    ids[np.arange(300) % 10 != 0] = [2, 5]  # of each layer
    given_plan = plan(100)
    RoutingTrace(ids).save(tmp_path / "trace")
    found = placement_from_trace(tmp_path / "trace", given_plan)
    assert given_plan.placement is not None
    assert {(layer, expert) for layer in range(32) for expert in (2, 5)} <= found.pinned
    assert found.nbytes == given_plan.placement.nbytes
    assert len(found.pinned) + found.slots <= 100
    assert nbytes(ids, found) < 0.5 * nbytes(ids, given_plan.placement)


def test_only_experts_that_were_frequent_before_are_pinned() -> None:
    ids = random_ids(300, 32, 2, 4)
    ids[150:] = [6, 7]
    found = placement_from_trace(RoutingTrace(ids), plan(100))
    assert not {expert for _, expert in found.pinned} & {6, 7}


def test_experts_that_stay_for_a_while_get_slots() -> None:
    ids = np.repeat(random_ids(20, 32, 2, 8), 40, axis=0)  # the next 40 tokens choose what this one did
    found = placement_from_trace(RoutingTrace(ids), plan(100))
    assert found.slots >= 64
    assert nbytes(ids, found) < 0.5 * nbytes(ids, plan(100).placement or found)


def test_it_is_quick() -> None:
    trace, began = RoutingTrace(random_ids(2000, 32, 2, 8)), time.process_time()
    placement_from_trace(trace, plan(120))
    assert time.process_time() - began < 10


def test_what_makes_no_sense_is_refused() -> None:
    whole = make_plan(FULL, 1 << 36, 4, 600)
    with pytest.raises(OptionError, match="all experts are in memory"):
        placement_from_trace(RoutingTrace(random_ids(2, 32, 2, 8)), whole)
    with pytest.raises(OptionError, match="of 31 layers"):
        placement_from_trace(RoutingTrace(random_ids(2, 31, 2, 8)), plan(100))
