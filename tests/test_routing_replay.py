"""Caches replayed: policies as plain simulations do them, Belady's bound above all, and routing that is known."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import OptionError
from octavo.experts.replay import replay, requests
from octavo.experts.trace import RoutingTrace
from octavo.plan import footprint_of, make_plan, parse_size, place_experts, show_size, weights_at
from octavo.routing import replay as module
from octavo.routing.replay import (
    LABELS,
    POLICIES,
    TOKENS,
    Curve,
    baseline,
    budget_for,
    curves,
    experts_within,
)
from octavo.shapes import shape
from run_octavo import refused, run
from test_trace import random_ids

Groups = list[list[int]]


@st.composite
def traces(draw: st.DrawFn, most: int = 40) -> tuple[RoutingTrace, list[int]]:
    """Routing that is skewed and sticky to some degree, and the steps it is computed in."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(2, 7))
    top_k = draw(st.integers(1, min(3, experts)))
    steps = draw(st.lists(st.integers(1, draw(st.sampled_from([1, 4]))), min_size=1, max_size=most))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    skew, stay = draw(st.sampled_from([0, 0.5, 2])), draw(st.sampled_from([0, 0.7]))
    order = random.random((sum(steps), layers, experts)) + skew * random.random((layers, experts))
    for token in range(1, len(order)):
        if random.random() < stay:
            order[token] = order[token - 1]
    ids = order.argsort(axis=2)[:, :, :top_k].astype(np.int16)
    return RoutingTrace(ids, n_experts=experts), steps


def groups_of(trace: RoutingTrace, steps: list[int]) -> tuple[Groups, Groups]:
    """What each step asks for in each layer: what fills the cache, and what is counted."""
    warm: Groups = []
    counted: Groups = []
    begin = 0
    for step in steps:
        part = warm if begin + step <= trace.n_tokens // 2 else counted
        for layer in range(trace.n_layers):
            chosen = {int(expert) for expert in trace.topk_ids[begin : begin + step, layer].flatten()}
            part.append([layer * trace.experts + expert for expert in sorted(chosen)])
        begin += step
    return warm, counted


def lru(past: Groups, groups: Groups, n: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number, group in enumerate([*past, *groups]):
        if number >= len(past):
            hits += sum(key in held for key in group)
        for key in group:
            held[key] = None
            held.move_to_end(key)
        while len(held) > n:
            held.popitem(last=False)
    return hits


def lfu(past: Groups, groups: Groups, n: int) -> int:
    held: set[int] = set()
    uses: Counter[int] = Counter()
    last: dict[int, int] = {}
    hits = clock = 0
    for number, group in enumerate([*past, *groups]):
        if number >= len(past):
            hits += len(held & set(group))
        for key in group:
            clock += 1
            uses[key] += 1
            last[key] = clock
        held |= set(group)
        held = set(sorted(held, key=lambda key: (uses[key], last[key]))[-n:])
    return hits


def most_frequent(past: Groups, n: int) -> set[int]:
    uses = Counter(itertools.chain(*past))
    return set(sorted(uses, key=lambda key: (-uses[key], key))[:n])


def pinned(past: Groups, groups: Groups, n: int) -> int:
    there = most_frequent(past, n)
    return sum(key in there for group in groups for key in group)


def beside(past: Groups, groups: Groups, pins: int, n: int) -> int:
    """Some pinned, and LRU for the others."""
    there = most_frequent(past, pins)
    others = [[[key for key in group if key not in there] for group in part] for part in (past, groups)]
    left = lru(others[0], others[1], n - len(there)) if n > len(there) else 0
    return left + sum(key in there for group in groups for key in group)


def at(trace: RoutingTrace, policy: str, n: int, **options: Any) -> Curve:
    (found,) = curves(trace, policies=[policy], sizes=[n], **options)
    return found


def hits(curve: Curve) -> list[float]:
    return [rate * curve.requests for rate in curve.hit_rate]


# ---------------------------------------- as plain simulations do it


@settings(max_examples=80, deadline=None)
@given(case=traces(), together=st.sampled_from([3, 1024]))
def test_policies_do_what_plain_simulations_do(case: tuple[RoutingTrace, list[int]], together: int) -> None:
    trace, steps = case
    warm, counted = groups_of(trace, steps)
    sizes = range(trace.top_k, trace.n_layers * trace.experts + 1)
    for policy, simulation in (("lru", lru), ("lfu", lfu), ("pinned", pinned)):
        with mock.patch.object(module, "TOGETHER", together):  # a step of a long prompt asks for more than that
            (found,) = curves(trace, policies=[policy], sizes=sizes, steps=steps)
        assert found.n_held == tuple(sizes)
        assert found.requests == sum(map(len, counted))
        assert hits(found) == pytest.approx([simulation(warm, counted, n) for n in sizes])


@settings(max_examples=60, deadline=None)
@given(case=traces(), data=st.data())
def test_pins_beside_lru_are_split_as_the_first_half_says(
    case: tuple[RoutingTrace, list[int]], data: st.DataObject
) -> None:
    trace, steps = case
    warm, counted = groups_of(trace, steps)
    n = data.draw(st.integers(trace.top_k, trace.n_layers * trace.experts))
    quarter = len(warm) // trace.n_layers // 2 * trace.n_layers
    early, later = warm[:quarter], warm[quarter:]
    known = len(set(itertools.chain(*early)))
    splits = sorted({min(int(pins), known) for pins in np.linspace(0, n, 13)} | {n})
    tried = [pinned(early, later, n) if pins == n else beside(early, later, pins, n) for pins in splits]
    best = splits[tried.index(max(tried))]
    assert hits(at(trace, "pinned+lru", n, steps=steps)) == pytest.approx([beside(warm, counted, best, n)])


@settings(max_examples=60, deadline=None)
@given(case=traces(), data=st.data())
def test_octavos_own_is_the_replay_of_its_placement(case: tuple[RoutingTrace, list[int]], data: st.DataObject) -> None:
    trace, steps = case
    n_experts = trace.n_layers * trace.experts
    n = data.draw(st.integers(max(2, trace.top_k), max(n_experts, 2)))
    skip = len(groups_of(trace, steps)[0]) // trace.n_layers
    one = replay(trace.topk_ids, place_experts(1000 * n, 1000), n_experts, 1000, steps=steps, skip=skip)
    found = at(trace, "octavo", n, expert_nbytes=1000, steps=steps)
    assert found.hit_rate == (one.hit_rate,)
    assert found.read_per_token[0] * found.tokens == pytest.approx(one.nbytes, abs=1)


@settings(max_examples=100, deadline=None)
@given(case=traces())
def test_requests_are_each_expert_once(case: tuple[RoutingTrace, list[int]]) -> None:
    trace, steps = case
    asked = requests(trace.topk_ids, steps, trace.experts)
    warm, counted = groups_of(trace, steps)
    found: Groups = [[] for _ in range(len(steps) * trace.n_layers)]
    for key, group in zip(asked.keys.tolist(), asked.groups.tolist(), strict=True):
        found[group].append(key)
    assert found == warm + counted
    assert [asked.begin(step) for step in range(len(steps) + 1)] == np.cumsum(
        [0] + [sum(map(len, found[i : i + trace.n_layers])) for i in range(0, len(found), trace.n_layers)]
    ).tolist()


# ---------------------------------------- the bound


def best_possible(past: Groups, groups: Groups, n: int) -> int:
    """The most hits, over every set that could be kept after every request."""
    seen = set(itertools.chain(*past))
    states = {frozenset(kept): 0 for kept in itertools.combinations(sorted(seen), min(n, len(seen)))}
    for group in groups:
        after: dict[frozenset[int], int] = {}
        for held, found in states.items():
            score, union = found + len(held & set(group)), sorted(held | set(group))
            for kept in itertools.combinations(union, min(n, len(union))):
                after[frozenset(kept)] = max(score, after.get(frozenset(kept), 0))
        states = after
    return max(states.values())


@st.composite
def tiny_traces(draw: st.DrawFn) -> tuple[RoutingTrace, list[int]]:
    layers, experts = draw(st.sampled_from([(1, 5), (2, 3), (3, 2), (1, 6), (2, 2)]))
    top_k = draw(st.integers(1, 2))
    steps = draw(st.lists(st.integers(1, 2), min_size=2, max_size=9))
    ids = random_ids(sum(steps), layers, top_k, experts, seed=draw(st.integers(0, 9999)))
    return RoutingTrace(ids, n_experts=experts), steps


@settings(max_examples=120, deadline=None)
@given(case=tiny_traces())
def test_beladys_bound_is_what_is_possible(case: tuple[RoutingTrace, list[int]]) -> None:
    trace, steps = case
    warm, counted = groups_of(trace, steps)
    sizes = range(trace.top_k, trace.n_layers * trace.experts + 1)
    (found,) = curves(trace, policies=["belady"], sizes=sizes, steps=steps)
    assert hits(found) == pytest.approx([best_possible(warm, counted, n) for n in sizes])


@settings(max_examples=80, deadline=None)
@given(case=traces(), data=st.data())
def test_no_policy_beats_the_bound_and_more_memory_is_never_worse(
    case: tuple[RoutingTrace, list[int]], data: st.DataObject
) -> None:
    trace, steps = case
    n_experts = trace.n_layers * trace.experts
    sizes = data.draw(st.sets(st.integers(trace.top_k, n_experts), min_size=1))
    found = {curve.policy: curve for curve in curves(trace, sizes=sorted(sizes), steps=steps)}
    assert list(found) == list(POLICIES)
    for curve in found.values():
        assert all(one <= most for one, most in zip(curve.hit_rate, found["belady"].hit_rate, strict=True))
        if curve.policy != "pinned+lru":  # which chooses by the first half, and may choose wrongly
            assert list(curve.hit_rate) == sorted(curve.hit_rate)


def test_a_bound_is_of_one_pass_over_a_long_trace_too() -> None:
    """Buckets are cleared of what is past; a plain simulation that looks ahead says the same."""
    trace = RoutingTrace(random_ids(600, 3, 2, 6), n_experts=6)
    warm, counted = groups_of(trace, [1] * 600)
    flat = [key for group in warm + counted for key in group]
    first = sum(map(len, warm))
    following, upcoming = [0] * len(flat), dict.fromkeys(range(18), len(flat))
    for index in reversed(range(len(flat))):
        following[index], upcoming[flat[index]] = upcoming[flat[index]], index
    for n in (2, 5, 11):
        soonest = {key: following[index] for index, key in enumerate(flat[:first])}
        held = dict(sorted(soonest.items(), key=lambda one: one[1])[:n])
        found = 0
        for index in range(first, len(flat), 2):  # two of a layer together
            found += sum(key in held for key in flat[index : index + 2])
            held |= dict(zip(flat[index : index + 2], following[index : index + 2], strict=True))
            held = dict(sorted(held.items(), key=lambda one: one[1])[:n])
        assert hits(at(trace, "belady", n)) == pytest.approx([found])


# ---------------------------------------- routing that is known


@settings(max_examples=60, deadline=None)
@given(case=traces())
def test_with_room_for_all_only_first_requests_miss(case: tuple[RoutingTrace, list[int]]) -> None:
    trace, steps = case
    warm, counted = groups_of(trace, steps)
    new = set(itertools.chain(*counted)) - set(itertools.chain(*warm))
    for curve in curves(trace, sizes=[trace.n_layers * trace.experts + 7], steps=steps):
        assert curve.n_held == (trace.n_layers * trace.experts,)
        assert curve.compulsory == len(new)
        misses = curve.requests - hits(curve)[0]
        if curve.policy == "pinned":  # which are those of the first half
            assert misses == pytest.approx(sum(key in new for group in counted for key in group))
        else:
            assert misses == pytest.approx(len(new))


def even(tokens: int, layers: int, top_k: int, experts: int) -> RoutingTrace:
    return RoutingTrace(random_ids(tokens, layers, top_k, experts, seed=5), n_experts=experts)


@pytest.mark.parametrize(("layers", "top_k", "experts"), [(1, 2, 8), (1, 1, 16), (12, 2, 8)])
def test_even_routing_gives_the_baseline(layers: int, top_k: int, experts: int) -> None:
    tokens = 6_000 // layers
    n_experts = layers * experts
    trace = even(tokens, layers, top_k, experts)
    found = curves(trace, policies=["lru", "lfu", "pinned", "pinned+lru", "octavo"], tokens=None)
    for curve in found:
        for n, rate in zip(curve.n_held, curve.hit_rate, strict=True):
            expected = baseline(n, n_experts)
            error = 4 * (expected * (1 - expected) / curve.requests) ** 0.5 + 1e-9
            if curve.policy == "octavo":  # a slot's worth of its bytes is for what passes through
                assert expected - 4 / n_experts - error <= rate <= expected + error
            elif curve.policy == "lru" and layers > 1:
                assert rate <= expected + error
            else:
                assert rate == pytest.approx(expected, abs=error)


def test_lru_of_even_routing_has_what_was_chosen_last_in_the_layer() -> None:
    """Layers take turns, so that with less than a token's experts the right ones are always gone."""
    trace = even(1000, 12, 2, 8)
    (found,) = curves(trace, policies=["lru"], sizes=[22, 24, 30])
    assert found.hit_rate[0] == 0
    assert found.hit_rate[1:] == pytest.approx([2 / 8] * 2, abs=0.01)


@pytest.mark.parametrize("stay", [0.2, 0.6, 0.9])
def test_sticky_routing_is_found_by_lru(stay: float) -> None:
    """One expert a token, the same again with this chance and any of the others evenly: hits = stay + others held."""
    random, experts, tokens = np.random.default_rng(3), 8, 10_000
    moves = np.where(random.random(tokens) < stay, 0, random.integers(1, experts, tokens))
    trace = RoutingTrace((np.cumsum(moves) % experts).astype(np.int16)[:, None, None], n_experts=experts)
    (found,) = curves(trace, policies=["lru"], sizes=range(1, experts + 1), tokens=None)
    for n, rate in zip(found.n_held, found.hit_rate, strict=True):
        assert rate == pytest.approx(stay + (1 - stay) * (n - 1) / (experts - 1), abs=0.02)
    (frequent,) = curves(trace, policies=["lfu"], sizes=[2], tokens=None)
    assert frequent.hit_rate[0] < found.hit_rate[1] - 0.04


def test_what_is_always_chosen_is_pinned() -> None:
    ids = random_ids(800, 4, 2, 8)
    ids[np.arange(800) % 10 != 0] = [2, 5]
    trace = RoutingTrace(ids, n_experts=8)
    found = {curve.policy: curve.hit_rate[0] for curve in curves(trace, sizes=[8])}
    assert found["pinned"] > 0.9
    assert found["pinned+lru"] >= found["lru"]
    # Where the second half is another text, pins of the first are of no use, and the bound still knows.
    ids = random_ids(800, 4, 2, 8)
    ids[:400], ids[400:] = [2, 5], [1, 7]
    found = {curve.policy: curve.hit_rate[0] for curve in curves(RoutingTrace(ids, n_experts=8), sizes=[8])}
    assert found["pinned"] == 0
    assert found["belady"] == pytest.approx(1 - 8 / (400 * 8))


def test_another_trace_fills_the_caches() -> None:
    first, second = even(50, 3, 2, 6), RoutingTrace(random_ids(70, 3, 2, 6, seed=9), n_experts=6)
    past = groups_of(first, [1] * 50)
    counted = groups_of(second, [1] * 70)
    for policy, simulation in (("lru", lru), ("lfu", lfu), ("pinned", pinned)):
        found = at(second, policy, 7, prior=first)
        assert (found.tokens, found.requests) == (70, 70 * 6)
        assert hits(found) == pytest.approx([simulation(past[0] + past[1], counted[0] + counted[1], 7)])
    last = RoutingTrace(first.topk_ids[-20:], n_experts=6)
    for one, options in ((last, {}), (first, {"tokens": 20})):
        part = RoutingTrace(second.topk_ids[:20], n_experts=6)
        assert at(part, "lru", 7, prior=one, **options) == at(part, "lru", 7, prior=last)
    # Who knows not how many experts there are learns it from either trace.
    few = RoutingTrace(random_ids(70, 3, 2, 4, seed=9))
    assert curves(few, prior=first)[0].n_held[-1] == curves(first, prior=few)[0].n_held[-1] == 18


def test_the_first_tokens_stand_for_all_unless_asked_for() -> None:
    trace = even(TOKENS + 500, 1, 1, 4)
    part = RoutingTrace(trace.topk_ids[:TOKENS], n_experts=4)
    assert curves(trace) == curves(part, tokens=None)
    assert at(trace, "lru", 4, tokens=None).tokens == (TOKENS + 500) // 2
    # Steps stay whole.
    assert at(trace, "lru", 4, tokens=20, steps=[9] * (trace.n_tokens // 9)).tokens == 9


def test_sizes_and_bytes() -> None:
    trace = even(100, 4, 2, 8)
    (found,) = curves(trace, 1000, policies=["lru"])
    assert len(found.n_held) == 16
    assert (found.n_held[0], found.n_held[-1]) == (2, 32)
    assert found.nbytes == tuple(1000 * n for n in found.n_held)
    assert found.read_per_token == pytest.approx([(1 - rate) * 8 * 1000 for rate in found.hit_rate])
    told: list[tuple[int, int]] = []
    curves(trace, progress=lambda done, total: told.append((done, total)))
    assert told == [(number, 5) for number in range(1, 6)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sizes": [0]}, "a cache of 0 experts is too small: 2 are needed"),
        ({"sizes": [5, 1]}, "a cache of 1 experts"),
        ({"sizes": []}, "a cache of no experts"),
        ({"policies": ["fifo"]}, "policy is 'fifo'; expected one of lru"),
        ({"tokens": 0}, "tokens is 0"),
        ({"steps": [3]}, "steps have 3 tokens, the trace 9"),
        ({"steps": [9, 0]}, "a step has 0 tokens"),
        ({"prior": RoutingTrace(random_ids(3, 2, 1, 4))}, "the prior trace is of 2 layers and 1 experts a token"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        curves(even(9, 2, 2, 4), 10, **options)
    assert caught.value.hint


def test_a_token_is_a_trace_too() -> None:
    for curve in curves(even(1, 2, 2, 4)):
        assert curve.hit_rate[-1] == 0
        assert curve.compulsory == curve.requests == 4


def test_it_is_quick() -> None:
    trace, began = even(5_000, 32, 2, 8), time.process_time()
    curves(trace, policies=["lru", "lfu", "pinned", "belady"], tokens=None)
    assert time.process_time() - began < 10


# ---------------------------------------- the command


@pytest.fixture
def kept(tmp_path: Path) -> tuple[RoutingTrace, Path]:
    """A trace of the full-size model, in a file."""
    trace = even(60, 32, 2, 8)
    trace.save(tmp_path / "trace")
    return trace, tmp_path / "trace"


def told(*args: object) -> dict[str, Any]:
    done = run("routing", "replay", *args, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_the_command_prints_a_table_in_experts(kept: tuple[RoutingTrace, Path]) -> None:
    trace, path = kept
    expected = curves(trace, policies=tuple(LABELS))
    done = run("routing", "replay", path)
    assert done.code == 0
    assert "30 of 60 tokens are counted, and those before them fill the caches" in done.err
    assert f"of 1,920 requests {expected[0].compulsory} are for experts" in done.err
    lines = done.out.splitlines()
    assert lines[0].split() == ["hit", "rate", "experts", *LABELS, "even"]
    assert max(map(len, lines)) <= 110
    for number, (rates, read) in enumerate(zip(lines[1:17], lines[18:], strict=True)):
        n = expected[0].n_held[number]
        assert rates.split() == [
            str(n), *(f"{curve.hit_rate[number]:.1%}" for curve in expected), f"{baseline(n, 256):.1%}"
        ]  # fmt: skip
        assert read.split() == [str(n), *(f"{curve.read_per_token[number]:.2f}" for curve in expected)]
    found = told(path, "--memory", 64, "--memory", 8, "--policy", "belady", "--tokens", 0)
    (bound,) = curves(trace, policies=["belady"], sizes=[8, 64])
    assert [(row["experts"], row["memory"], row["hit_rate"]) for row in found["sizes"]] == [
        (n, None, {"belady": rate}) for n, rate in zip((8, 64), bound.hit_rate, strict=True)
    ]
    even(TOKENS + 100, 1, 1, 4).save(path)
    for options, counted in (((), TOKENS // 2), (("--tokens", 0), TOKENS // 2 + 50), (("--tokens", 30), 15)):
        assert told(path, *options, "--policy", "lru", "--memory", 2)["tokens"] == counted


def test_the_command_counts_a_models_bytes(kept: tuple[RoutingTrace, Path]) -> None:
    trace, path = kept
    args = shape("mixtral-8x7b")
    for bits, memory in (("4", "12GiB"), ("2", "7GB")):
        weights, budget = weights_at(args, int(bits)), parse_size(memory)
        placement = make_plan(args, budget, int(bits)).placement
        assert placement is not None
        n = placement.nbytes // weights.expert
        assert experts_within(args, weights, budget) == n
        assert budget_for(args, weights, n) <= budget < budget_for(args, weights, n + 1)
        found = told(path, "--model", "mixtral-8x7b", "--bits", bits, "--memory", memory)
        (row,) = found["sizes"]
        assert (found["precision"], row["experts"]) == (f"{bits} bits", n)
        assert (row["expert_bytes"], row["memory"]) == (n * weights.expert, budget_for(args, weights, n))
        for curve in curves(trace, weights.expert, policies=tuple(LABELS), sizes=[n]):
            assert row["hit_rate"][curve.policy] == curve.hit_rate[0]
            assert row["read_per_token"][curve.policy] == pytest.approx(curve.read_per_token[0], abs=1)
        assert row["even"] == n / 256
    whole = footprint_of(args, weights_at(args, 4), 4096, 1).total
    (row,) = told(path, "--model", "mixtral-8x7b", "--memory", "60GiB")["sizes"]
    assert (row["experts"], row["memory"], row["hit_rate"]["lru"]) == (256, whole, 1)
    lines = run("routing", "replay", path, "--model", "mixtral-8x7b", "--memory", "12GiB").out.splitlines()
    assert lines[0].split()[:4] == ["hit", "rate", "memory", "experts"]
    n = experts_within(args, weights_at(args, 4), 12 << 30)
    assert " ".join(lines[1].split()[:3]) == f"{show_size(budget_for(args, weights_at(args, 4), n))} {n}"
    assert lines[3].split()[:3] == lines[1].split()[:3]


def test_the_command_takes_another_trace_before(kept: tuple[RoutingTrace, Path], tmp_path: Path) -> None:
    trace, path = kept
    prior = RoutingTrace(random_ids(20, 32, 2, 8, seed=8), n_experts=8)
    prior.save(tmp_path / "prior")
    found = told(path, "--prior", tmp_path / "prior", "--memory", 100, "--policy", "lfu")
    assert found["tokens"] == 60
    assert found["sizes"][0]["hit_rate"] == {"lfu": at(trace, "lfu", 100, prior=prior).hit_rate[0]}


def test_the_command_refuses_what_makes_no_sense(kept: tuple[RoutingTrace, Path], tmp_path: Path) -> None:
    path, model = kept[1], ("--model", "mixtral-8x7b")
    refused(run("routing", "replay", tmp_path / "absent"), str(tmp_path / "absent"))
    refused(run("routing", "replay", path, "--memory", "12GiB"), "'12GiB'; without --model", hint="--memory 64")
    refused(run("routing", "replay", path, "--memory", 1), "a cache of 1 experts is too small", hint="2 or more")
    refused(run("routing", "replay", path, "--memory", 0), "a cache of 0 experts")
    refused(
        run("routing", "replay", path, "--policy", "fifo"), "'fifo'", "lru, lfu, pinned, pinned+lru, belady, octavo"
    )
    refused(run("routing", "replay", path, *model, "--memory", "1GiB"), "too little", hint="the smallest that works")
    refused(run("routing", "replay", path, *model, "--memory", "0"), "'0' is nothing")
    refused(run("routing", "replay", path, "--model", "mixtral-8x22b"), "of 32 layers", "the model has 56")
    refused(run("routing", "replay", path, "--model", "mistral-7b"), "dense")
    even(60, 31, 2, 8).save(tmp_path / "other")
    refused(run("routing", "replay", path, "--prior", tmp_path / "other"), "the prior trace is of 31 layers")
    assert run("routing", "replay", path, "--bits", 4).code == 2
