"""Experts on a card as far as they fit: the same bits however many fit and whoever computes the others.

Triton's interpreter takes seconds for a few tokens. So two tests run the card's kernels; the others compute with the
bytes that a table's addresses tell of, as these do, by the CPU's kernels.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import quick_triton  # noqa: F401
from conftest import needs_compiled
from octavo.errors import OptionError
from octavo.experts import ExpertCache
from octavo.experts import card as module
from octavo.experts.card import (
    CachedExperts,
    CardCache,
    CostModel,
    HostExpert,
    HostExperts,
    choose,
    host_expert,
    measure,
)
from octavo.experts.link import Link, Staging
from octavo.kernels import card as kernels
from octavo.kernels import ops
from octavo.plan_card import CardPlacement
from octavo.quant.formats import FORMATS
from octavo.quant.quantize import quantize

pytestmark = needs_compiled
DIM, HIDDEN, LAYERS, EXPERTS, TOP_K = 64, 128, 3, 4, 2
KEYS = [(layer, number) for layer in range(LAYERS) for number in range(EXPERTS)]
CPU = torch.device("cpu")
COSTS = {"copy": CostModel(1e12, 1.0, 1.0), "cpu": CostModel(1.0, 1e-6, 0.0)}  # of which one is always chosen


@dataclass
class Made:
    """Random experts: as a checkpoint has them, and in host memory."""

    weights: dict[tuple[int, int], tuple[ops.Weight, ops.Weight, ops.Weight]]
    host: dict[tuple[int, int], HostExpert]

    @property
    def kinds(self) -> tuple[kernels.Kind, kernels.Kind, kernels.Kind]:
        return self.host[0, 0].kinds

    def cache(self, slots: int, pinned: Any = (), **options: Any) -> CardCache:
        return CardCache(self.host, self.kinds, CardPlacement(0, slots, frozenset(pinned)), CPU, **options)

    def resident(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        experts = [self.weights[layer, number] for number in range(EXPERTS)]
        return ops.moe(x_TD, ids_TK, weights_TK, ops.ExpertSet(experts))


@cache
def made(kind: str) -> Made:
    generator = torch.Generator().manual_seed(1)

    def matrix(rows: int, cols: int) -> ops.Weight:
        values = torch.randn(rows, cols, generator=generator) / cols**0.5
        return values.to(torch.bfloat16) if kind == "bfloat16" else quantize(values, FORMATS[kind])

    shapes = ((HIDDEN, DIM), (HIDDEN, DIM), (DIM, HIDDEN))
    weights: Any = {key: tuple(matrix(*shape) for shape in shapes) for key in KEYS}
    return Made(weights, {key: host_expert(*three) for key, three in weights.items()})


def tokens(seed: int, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, ids and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(T)])
    weights = torch.rand(T, TOP_K, generator=generator).softmax(-1)
    return torch.randn(T, DIM, generator=generator).to(torch.bfloat16), ids, weights


def layers_of(pool: CardCache) -> list[CachedExperts]:
    return [CachedExperts(layer, EXPERTS, pool) for layer in range(LAYERS)]


# ---------------------------------------- the card's kernels, and what stands for them


def moe_into(parts_TKD: Tensor, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, table: kernels.ExpertTable) -> None:
    """What `octavo.kernels.card.moe_into` does, from the same bytes at the same addresses."""
    for number, addresses in enumerate(table.addresses_E3.tolist()):
        chosen = (ids_TK == number).nonzero()
        if not addresses[0] or not len(chosen):
            continue
        if isinstance(Late.last, Late):
            Late.last.use(addresses[0])
        matrices: Any = tuple(
            ops.PartedMatrix(kind.format, (kind.rows, kind.cols), [(address, kind.nbytes, None), (0, 0, None)])
            for kind, address in zip(table.kinds, addresses, strict=True)
        )
        for t, k in chosen.tolist():
            row = torch.zeros(1, x_TD.shape[1])
            ops.moe_part(row, x_TD[t : t + 1], ids_TK[t, None, [k]], weights_TK[t, None, [k]], {number: matrices})
            parts_TKD[t, k] = row[0]


def combine(parts_TKD: Tensor, like_TD: Tensor) -> Tensor:
    sums = torch.zeros(like_TD.shape)
    for k in range(parts_TKD.shape[1]):
        sums += parts_TKD[:, k]
    return sums.to(like_TD.dtype)


class Late(Link):
    """Copies are made as late as a card may make them: when somebody waits. Nothing is overwritten before its last use.

    Without a wait that is needed, experts are computed with bytes of others.
    """

    last: Any = None

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        Late.last = self
        self.queue: deque[tuple[object, Tensor, Tensor]] = deque()
        self._clock = 0
        self._used: dict[int, int] = {}  # address of a slot: when it was computed with

    def use(self, address: int) -> None:
        self._clock += 1
        self._used[address] = self._clock
        assert all(target.data_ptr() != address for _, target, _ in self.queue)  # its copy is over

    def copy(self, target: Tensor, source: Tensor, after: Any) -> Any:
        assert self._used.get(target.data_ptr(), 0) <= (after or 0)
        self.queue.append((mark := object(), target, source))
        return mark

    def mark(self) -> Any:
        return self._clock

    def is_past(self, mark: Any) -> bool:
        return all(mark is not one for one, _, _ in self.queue)

    def wait(self, mark: Any) -> None:
        while not self.is_past(mark):
            _, target, source = self.queue.popleft()
            target.copy_(source)

    def finish(self) -> None:
        while self.queue:
            self.wait(self.queue[-1][0])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's kernels stand for the card's."""
    monkeypatch.setattr(module, "moe_into", moe_into)
    monkeypatch.setattr(module, "combine", combine)
    monkeypatch.setattr(module, "activations", lambda x_TD, *kinds: x_TD)
    yield
    Late.last = None


def begun(experts: CachedExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What a captured step does."""
    parts_TKD = torch.full((*ids_TK.shape, DIM), float("nan"))
    experts.begin(ids_TK, lambda: x_TD, weights_TK, parts_TKD)
    moe_into(parts_TKD, x_TD, ids_TK, weights_TK, experts.table)
    return combine(parts_TKD, x_TD)


@pytest.mark.parametrize(("kind", "misses"), [("q4", "choose"), ("bfloat16", "copy")])
def test_the_cards_kernels_find_experts_where_the_pool_has_put_them(kind: str, misses: Any) -> None:
    data = made(kind)
    cost = CostModel(1.0, 0.4 * data.host[0, 0].data.nbytes, 0.0)  # one of two is computed by the CPU
    pool = data.cache(2, {(0, 1)}, misses=misses, cost=cost)
    x_TD, ids_TK, weights_TK = tokens(3, 12)
    found = CachedExperts(0, EXPERTS, pool)(x_TD, ids_TK, weights_TK)
    counters = pool.counters.layers[0]
    assert (counters.hits, counters.misses, counters.computed) == (1, 3, 2 if kind == "q4" else 0)
    if kind == "q4":
        assert torch.equal(found, data.resident(0, x_TD, ids_TK, weights_TK))
    else:
        experts = [tuple(kernels.to_card(w, CPU) for w in data.weights[0, number]) for number in range(EXPERTS)]
        assert torch.equal(found, kernels.CardExperts(experts)(x_TD, ids_TK, weights_TK))  # type: ignore[arg-type]


# ---------------------------------------- placement never changes a bit

KIND = st.sampled_from(["q4", "q8", "bfloat16"])
STEPS = st.lists(
    st.tuples(st.integers(0, LAYERS - 1), st.sampled_from([1, 1, 1, 2, 3, 9]), st.integers(0, 99), st.booleans()),
    min_size=1,
    max_size=12,
)
PINNED = st.frozensets(st.sampled_from(KEYS), max_size=4)


@pytest.mark.usefixtures("quick")
@settings(max_examples=80, deadline=None)
@given(
    kind=KIND,
    slots=st.integers(1, len(KEYS) + 1),
    pinned=PINNED,
    misses=st.sampled_from(["copy", "cpu", "choose"]),
    balance=st.floats(0.1, 4),
    late=st.booleans(),
    steps=STEPS,
)
def test_bits_are_those_of_all_experts_at_once(
    kind: str, slots: int, pinned: Any, misses: Any, balance: float, late: bool, steps: list[Any]
) -> None:
    data = made(kind)
    if kind == "bfloat16" and misses == "cpu":
        misses = "copy"
    cost = CostModel(1.0, balance * data.host[0, 0].data.nbytes, 0.3 * data.host[0, 0].data.nbytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Link", Late if late else Link)
        pool = data.cache(slots, pinned, misses=misses, cost=cost)
    layers, asked = layers_of(pool), 0
    for layer, T, seed, at_once in steps:
        x_TD, ids_TK, weights_TK = tokens(seed, T)
        chosen = set(ids_TK.flatten().tolist())
        asked += len(chosen)
        compute = begun if at_once and len(chosen) <= slots else CachedExperts.__call__
        found = compute(layers[layer], x_TD, ids_TK, weights_TK)
        assert torch.equal(found, data.resident(layer, x_TD, ids_TK, weights_TK))
    total, size = pool.counters.total, pool.expert_nbytes
    assert (total.hits + total.misses, total.asked_nbytes) == (asked, asked * size)
    assert total.found_nbytes == total.hits * size
    if misses == "cpu":
        assert (total.computed, total.nbytes, total.evictions) == (total.misses, 0, 0)
    if misses == "copy" or kind == "bfloat16":
        assert total.computed == 0
    assert total.nbytes >= (total.misses - total.computed) * size
    pool.close()
    assert not late or not Late.last.queue


@pytest.mark.usefixtures("quick")
@settings(max_examples=60, deadline=None)
@given(slots=st.integers(1, 9), pinned=PINNED, steps=STEPS)
def test_counters_and_order_are_those_of_a_simulation(slots: int, pinned: Any, steps: list[Any]) -> None:
    data = made("q4")
    pool = data.cache(slots, pinned, misses="copy")
    layers, size = layers_of(pool), pool.expert_nbytes
    order: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = copies = evictions = 0
    for layer, T, seed, _ in steps:
        x_TD, ids_TK, weights_TK = tokens(seed, min(T, EXPERTS))  # more would be read ahead for
        layers[layer](x_TD, ids_TK, weights_TK)
        keys = [(layer, number) for number in sorted(set(ids_TK.flatten().tolist()))]
        there = [key for key in keys if key in order]
        for key in there:
            order.move_to_end(key)
        hits += len(there) + len(pinned & set(keys))
        in_use = [there]  # groups that are computed with, first ones first
        for key in keys:
            if key in there or key in pinned:
                continue
            copies += 1
            while len(order) == pool.n_slots:
                busy = {one for group in in_use for one in group}
                oldest = next((one for one in order if one not in busy), None)
                if oldest is None:
                    in_use.pop(0)
                    continue
                del order[oldest]
                evictions += 1
            order[key] = None
            in_use.append([key])
        assert {key for key in KEYS if pool.holds(key)} == set(order) | pinned
    total = pool.counters.total
    assert (total.hits, total.misses, total.evictions) == (hits, copies, evictions)
    assert (total.nbytes, total.found_nbytes) == (copies * size, hits * size)
    assert pool.nbytes == (pool.n_slots + len(pinned)) * -(-size // 256) * 256


@given(
    misses=st.lists(st.integers(1, 5), max_size=7),
    nbytes=st.integers(1, 12),
    cost=st.builds(CostModel, st.sampled_from([1, 2]), st.integers(0, 9), st.integers(0, 3)),  # so that some are equal
)
def test_the_split_is_the_best_of_all(misses: list[int], nbytes: int, cost: CostModel) -> None:
    numbered = list(enumerate(misses))

    def ends(on_cpu: Any) -> float:
        copied = (len(misses) - len(on_cpu)) * cost.copying(nbytes)
        return max(copied, sum(cost.computing(t) for _, t in sorted(on_cpu, key=lambda miss: (miss[1], miss[0]))))

    assert choose([(0, 1)], 10, CostModel(1.0, 10.0, 0.0)) == set()  # what was copied stays
    splits = [split for n in range(len(misses) + 1) for split in combinations(numbered, n)]
    chosen = choose(numbered, nbytes, cost)
    found = ends([miss for miss in numbered if miss[0] in chosen])
    best = min(map(ends, splits))
    assert found <= best * (1 + 1e-12)
    assert len(chosen) == min(len(split) for split in splits if ends(split) <= found)


# ---------------------------------------- the table, and what is read ahead


@pytest.mark.usefixtures("quick")
def test_the_table_stays_where_it_is_and_is_written_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = made("q4").cache(3, {(0, 3)}, misses="copy")
    experts, sent = CachedExperts(0, EXPERTS, pool), []
    send = Staging.send
    monkeypatch.setattr(Staging, "send", lambda self, *args: (sent.append(1), send(self, *args)))
    address = experts.table.addresses_E3.data_ptr()
    x_TD, _, weights_TK = tokens(0, 1)
    for numbers, writes in (((0, 3), 1), ((3, 0), 1), ((0, 1), 2), ((1, 3), 2), ((2, 1), 3)):
        begun(experts, x_TD, torch.tensor([numbers]), weights_TK)
        assert len(sent) == writes
        assert experts.table.addresses_E3.data_ptr() == address
    there = experts.table.addresses_E3
    assert there.bool().all(1).tolist() == [True, True, True, True]
    assert not (there[:, 0] % 256).any()
    assert len(set(there[:, 0].tolist())) == EXPERTS
    begun(CachedExperts(1, EXPERTS, pool), x_TD, torch.tensor([[0, 1]]), weights_TK)
    begun(experts, x_TD, torch.tensor([[1, 3]]), weights_TK)
    assert experts.table.addresses_E3.bool().all(1).tolist() == [False, True, False, True]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("late", [False, True])
def test_a_prompt_is_read_ahead_for(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Link", Late if late else Link)
    data = made("q4")
    pool = data.cache(6, misses="copy")
    layers = layers_of(pool)
    x_TD, ids_TK, weights_TK = tokens(0, 9)
    assert set(ids_TK.flatten().tolist()) == set(range(EXPERTS))
    layers[0](x_TD, ids_TK, weights_TK)
    assert all(pool.holds((1, number)) for number in range(EXPERTS))
    assert [pool.has_arrived((1, number)) for number in range(EXPERTS)] == [not late] * EXPERTS
    assert pool.counters.layers[1].nbytes == EXPERTS * pool.expert_nbytes
    assert torch.equal(layers[1](x_TD, ids_TK, weights_TK), data.resident(1, x_TD, ids_TK, weights_TK))
    counters = pool.counters.layers[1]
    assert (counters.hits, counters.misses) == (0, EXPERTS)  # they were not there when they were needed
    assert counters.nbytes == EXPERTS * pool.expert_nbytes
    layers[2](*tokens(0, 1))  # a step of decoding is not
    assert not any(pool.holds((0, number)) for number in range(EXPERTS))
    assert pool.counters.layers[2].nbytes == EXPERTS * pool.expert_nbytes


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("slots", [6, 7, 12])
def test_reading_ahead_keeps_what_is_there(slots: int) -> None:
    pool = made("q4").cache(slots, misses="copy")
    layers, last = layers_of(pool), EXPERTS - 1
    for key in ((1, last), (2, last)):
        pool.give_back([pool.take(key)])  # type: ignore[list-item]
    layers[0](*tokens(0, 9))
    assert pool.holds((1, last))
    layers[1](*tokens(0, 9))
    assert pool.counters.layers[1].hits == 1
    assert pool.counters.layers[1].nbytes == EXPERTS * pool.expert_nbytes


@pytest.mark.usefixtures("quick")
def test_experts_are_copied_while_others_are_computed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Link", Late)
    on_their_way = []
    monkeypatch.setattr(module, "moe_into", lambda *args: (on_their_way.append(len(Late.last.queue)), moe_into(*args)))
    pool = made("q4").cache(3, misses="copy")
    last = CachedExperts(LAYERS - 1, EXPERTS, pool)
    last(*tokens(0, 9))
    assert on_their_way == [2, 2, 1, 0]
    on_their_way.clear()
    last(*tokens(0, 9))
    assert on_their_way == [0, 0]  # three are there, and use every slot


@pytest.mark.usefixtures("quick")
def test_what_was_copied_ahead_in_vain_makes_room() -> None:
    pool = made("q4").cache(2, misses="copy")
    assert pool.prefetch((1, 0))
    assert pool.prefetch((1, 1))
    assert not pool.prefetch((0, 0))  # what was copied ahead does not make room for more of it
    pool.end_layer(1)
    assert pool.prefetch((0, 0))
    assert not pool.holds((1, 0))
    assert pool.holds((1, 1))


# ---------------------------------------- what it costs


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("chosen", ["copy", "cpu"])
def test_what_is_cheaper_is_done(chosen: str) -> None:
    x_TD, ids_TK, weights_TK = tokens(0, 1)
    for kind in ("q8", "bfloat16"):
        pool = made(kind).cache(4, cost=COSTS[chosen])
        CachedExperts(0, EXPERTS, pool)(x_TD, ids_TK, weights_TK)
        total = pool.counters.total
        assert total.computed == (TOP_K if chosen == "cpu" and kind == "q8" else 0)
        assert total.nbytes == (TOP_K - total.computed) * pool.expert_nbytes
        assert (total.wait_seconds > 0) == (total.computed > 0)


def test_costs_are_measured_at_start() -> None:
    data = made("q4")
    pool = data.cache(2)
    assert pool.cost is not None
    assert pool.cost.link > 0
    assert pool.cost.computing(16) > 0
    assert not any(pool.holds(key) for key in KEYS)
    assert pool.counters.total.misses == 0
    pool.take((0, 0))
    measure(pool)
    assert pool.holds((0, 0))
    pool.take((0, 1))
    with pytest.raises(OptionError, match="every slot is in use"):
        measure(pool)
    with pytest.raises(OptionError, match="every expert is on the card"):
        measure(data.cache(0, KEYS))
    assert made("bfloat16").cache(2).cost is None
    assert measure(made("bfloat16").cache(2)).computing(1) == float("inf")


# ---------------------------------------- what goes wrong


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("what", ["copy", "cpu"])
@pytest.mark.parametrize("late", [False, True])
def test_an_error_leaves_the_pool_as_usable_as_it_was(
    what: Any, at_once: bool, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Link", Late if late else Link)
    data = made("q4")
    # Of two that are missing one is computed by the CPU.
    pool = data.cache(2, {(0, 0)}, cost=CostModel(1.0, 0.9 * data.host[0, 0].data.nbytes, 0.0))
    experts, x_TD = CachedExperts(0, EXPERTS, pool), tokens(0, 2)[0]
    ids_TK, weights_TK = torch.tensor([[0, 1], [1, 2]]), tokens(0, 2)[2]
    compute = begun if at_once else CachedExperts.__call__
    with monkeypatch.context() as patch:
        target = (module, "parts_on_cpu") if what == "cpu" else (pool.link, "copy")
        patch.setattr(*target, lambda *args: 1 / 0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                compute(experts, x_TD, ids_TK, weights_TK)
            for number in range(1, EXPERTS):  # whatever arrived goes again, so that the next try fails too
                if what == "cpu" and pool.holds((0, number)):
                    pool._slots.empty(pool._slots.get((0, number)))
        pool.settle()
        assert what == "cpu" or not any(pool.holds((0, number)) for number in range(1, EXPERTS))
    assert torch.equal(compute(experts, x_TD, ids_TK, weights_TK), data.resident(0, x_TD, ids_TK, weights_TK))
    assert pool.counters.total.computed >= 1
    pool.settle()
    assert pool.take((1, 0)) is not None  # every slot is free
    assert pool.take((1, 1)) is not None
    assert pool.take((1, 2)) is None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_a_kernel_leaves_every_slot_free(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data, calls = made("q4"), iter(range(99))
    pool = data.cache(3, misses="copy")
    experts, prompt = CachedExperts(0, EXPERTS, pool), tokens(0, 9)
    begun(experts, prompt[0][:1], torch.tensor([[2, 0]]), prompt[2][:1])

    def fails(*args: Any) -> None:
        moe_into(*args)
        if next(calls) == failing:
            raise ZeroDivisionError

    monkeypatch.setattr(module, "moe_into", fails)
    with pytest.raises(ZeroDivisionError):  # those that are there are one call, and two are missing
        experts(*prompt)
    assert torch.equal(experts(*prompt), data.resident(0, *prompt))
    assert all(pool.take((1, number)) for number in range(3))


@pytest.mark.usefixtures("quick")
def test_too_many_experts_for_one_step_are_refused_and_then_done_in_groups() -> None:
    data = made("q8")
    pool = data.cache(2, misses="copy")
    experts = CachedExperts(0, EXPERTS, pool)
    x_TD, ids_TK, weights_TK = tokens(0, 9)
    with pytest.raises(OptionError, match="more experts at once than the 2 slots"):
        begun(experts, x_TD, ids_TK, weights_TK)
    assert torch.equal(experts(x_TD, ids_TK, weights_TK), data.resident(0, x_TD, ids_TK, weights_TK))


def test_bad_placements_and_experts_are_refused() -> None:
    data, other = made("q4"), made("q8")
    with pytest.raises(OptionError, match="no slot") as error:
        data.cache(0, {(0, 0)})
    assert "1 slot" in str(error.value.hint)
    data.cache(0, KEYS).close()
    with pytest.raises(OptionError, match="the same bits"):
        made("bfloat16").cache(2, misses="cpu")
    with pytest.raises(OptionError, match=r"expert 1 of layer 0 is 128 x 64, q8.*expected 128 x 64, q4"):
        CardCache({**data.host, (0, 1): other.host[0, 1]}, data.kinds, CardPlacement(0, 2), CPU)
    w1, w3, w2 = (quantize(torch.randn(64, 64), FORMATS["q3"]) for _ in range(3))
    with pytest.raises(OptionError, match="q3"):
        host_expert(w1, w3, w2)


@pytest.mark.usefixtures("quick")
def test_another_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = made("q4").cache(2)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(OptionError, match="forked"):
        CachedExperts(0, EXPERTS, pool)(*tokens(0, 1))


# ---------------------------------------- loading


def test_each_weight_is_read_once_and_pinned_ones_are_not_kept() -> None:
    data, asked = made("q4"), []
    names = {key: f"layers.{key[0]}.feed_forward.experts.{key[1]}" for key in KEYS}
    parts = list(enumerate(("w1", "w3", "w2")))
    by_name = {f"{names[key]}.{part}.weight": data.weights[key][i] for key in KEYS for i, part in parts}

    def weight(name: str) -> ops.Weight:
        asked.append(name)
        return by_name[name]

    pinned = {(0, 2), (2, 1)}
    pool = CardCache(HostExperts(names, weight), data.kinds, CardPlacement(0, 3, frozenset(pinned)), CPU, misses="copy")
    assert sorted(asked) == sorted(by_name)
    assert pool.host_nbytes == (len(KEYS) - len(pinned)) * pool.expert_nbytes
    for key in KEYS:
        expected = torch.cat([w.data.view(torch.uint8).flatten() for w in data.weights[key]])
        slot = pool.take(key)
        assert slot is not None
        assert torch.equal(slot.data, expected)
        assert (pool.counters.layers[key[0]].nbytes > 0) or key in pinned or not pool.counters.layers[key[0]].misses
        pool.give_back([slot])
    assert pool.counters.total.hits == len(pinned)


def test_host_memory_is_whole_pages_of_its_own() -> None:
    spans = sorted((host.data.data_ptr(), host.data.nbytes) for host in made("q4").host.values())
    assert all(address % 4096 == 0 for address, _ in spans)
    assert all(begin + size <= after for (begin, size), (after, _) in pairwise(spans))


@pytest.mark.usefixtures("quick")
def test_the_pool_is_an_expert_cache_and_goes_with_its_model() -> None:
    pool = made("q4").cache(2)
    assert isinstance(pool, ExpertCache)
    experts = CachedExperts(0, EXPERTS, pool)
    assert "4 x 128 x 64, q4" in repr(experts)
    experts(*tokens(0, 1))
    gone = weakref.ref(pool)
    del pool, experts
    assert gone() is None  # at once: it may be most of a card's memory
