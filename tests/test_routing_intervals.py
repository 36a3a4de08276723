"""Intervals of routing statistics: blocks, resamples, and that they cover what they should."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import OptionError
from octavo.experts import RoutingTrace
from octavo.routing import stats
from octavo.routing.intervals import (
    FEWEST,
    LENGTH,
    MOST,
    BlockBootstrap,
    cut_blocks,
    influences,
    share_intervals,
    student,
)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30),
    n_groups=st.integers(1, 4),
    most=st.integers(4, 200),
    whole=st.booleans(),
)
def test_blocks_are_runs_that_cross_no_group(lengths: list[int], n_groups: int, most: int, whole: bool) -> None:
    documents = np.repeat(np.arange(len(lengths)), lengths)
    of_document = np.unique(np.arange(len(lengths)) % n_groups, return_inverse=True)[1]
    groups = of_document[documents]
    block, of_block = cut_blocks(documents, groups, most=most, whole=whole)
    assert sorted(set(block.tolist())) == list(range(len(of_block)))  # none is empty
    assert np.array_equal(of_block[block], groups)
    for group in range(groups.max() + 1):
        assert (np.diff(block[groups == group]) >= 0).all()
        assert (of_block == group).sum() <= max(FEWEST, most)
    if whole:
        for number in range(len(lengths)):
            assert len(set(block[documents == number].tolist())) == 1


def test_a_long_document_has_blocks_of_32_and_a_very_long_one_no_more_blocks() -> None:
    block, _ = cut_blocks(np.zeros(3200, int))
    assert np.bincount(block).tolist() == [LENGTH] * 100
    assert len(cut_blocks(np.zeros(1_000_000, int))[1]) == MOST
    documents = np.repeat([0, 1], [100_000, 600])  # a small domain beside a large one keeps enough of its own
    assert np.bincount(cut_blocks(documents, documents)[1])[1] >= FEWEST


def test_a_short_one_has_shorter_blocks_and_a_very_short_one_fewer() -> None:
    assert np.bincount(cut_blocks(np.zeros(160, int))[0]).tolist() == [10] * FEWEST
    assert np.bincount(cut_blocks(np.zeros(12, int))[0]).tolist() == [4] * 3
    assert len(cut_blocks(np.zeros(1, int))[1]) == 1


def test_short_documents_share_blocks_where_there_are_many() -> None:
    documents = np.repeat(np.arange(5000), 3)
    block, of_block = cut_blocks(documents)
    assert len(of_block) == MOST
    assert all(len(set(block[documents == number].tolist())) == 1 for number in range(0, 5000, 97))


def naive_quantile(num: Any, den: Any, level: float, seed: int) -> float:
    """The same bootstrap with loops, and first-order ratios replaced by their definition."""
    n, m = num.shape
    ratio = num.sum(0) / den.sum(0)
    moved = [[(num[b, i] - ratio[i] * den[b, i]) / den[:, i].sum() for i in range(m)] for b in range(n)]
    error = [math.sqrt(sum(moved[b][i] ** 2 for b in range(n))) for i in range(m)]
    drawn = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=round(10 / (1 - level)))
    worst = sorted(
        max(abs(sum(w[b] * moved[b][i] for b in range(n))) / error[i] for i in range(m) if error[i]) for w in drawn
    )
    return worst[math.ceil(level * (len(worst) - 1))]


def test_the_critical_value_is_the_quantile_of_the_worst_deviation() -> None:
    random = np.random.default_rng(5)
    den = random.integers(5, 30, size=(20, 4)).astype(float)
    num = random.binomial(den.astype(int), 0.3).astype(float)
    bootstrap = BlockBootstrap(20, level=0.9, seed=7)
    bootstrap.add(num[:, :1], den[:, :1])  # in parts or together, it is one metric
    bootstrap.add(num[:, 1:], den[:, 1:])
    assert bootstrap.critical == pytest.approx(naive_quantile(num, den, 0.9, 7), rel=1e-5)


def test_linearised_resamples_have_the_spread_of_ratios_drawn_anew() -> None:
    random = np.random.default_rng(3)
    den = random.integers(20, 40, size=(200, 3)).astype(float)
    num = random.binomial(den.astype(int), [0.1, 0.5, 0.8]).astype(float)
    drawn = random.multinomial(200, [1 / 200] * 200, size=4000)
    ratios = (drawn @ num) / (drawn @ den)
    assert np.sqrt(influences(num, den)[1].variance) == pytest.approx(ratios.std(axis=0), rel=0.06)


def test_entries_of_some_blocks_only_are_as_if_the_others_had_nothing() -> None:
    random = np.random.default_rng(6)
    num, den = random.binomial(32, 0.2, (9, 5)), np.full((9, 1), 32)
    rows = np.array([3, 4, 8, 10, 11, 15, 20, 21, 29])
    some, all_of_them = BlockBootstrap(30, seed=4), BlockBootstrap(30, seed=4)
    wide = np.zeros((2, 30, 5))
    wide[0, rows], wide[1, rows] = num, den
    a, b = some.add(num, den, rows), all_of_them.add(*wide)
    assert some.critical == pytest.approx(all_of_them.critical, rel=1e-5)
    assert a.variance == pytest.approx(b.variance)
    assert a.n_blocks == pytest.approx(np.full(5, 9)) == b.n_blocks


def test_of_equal_blocks_the_variance_is_that_of_their_mean() -> None:
    num = np.random.default_rng(1).binomial(32, 0.3, (12, 3))
    found = influences(num, np.full((12, 1), 32))[1].variance
    assert found == pytest.approx((num / 32).var(axis=0, ddof=1) / 12)


def test_vectors_stray_by_their_norm() -> None:
    random = np.random.default_rng(2)
    influence = random.normal(size=(30, 2, 5))
    influence -= influence.mean(axis=0)
    bootstrap = BlockBootstrap(30, level=0.9, seed=1)
    unit = bootstrap.stray_together(influence, lambda vectors: np.linalg.norm(vectors, axis=-1))
    drawn = np.random.default_rng(1).multinomial(30, [1 / 30] * 30, size=100)
    norms = np.linalg.norm(np.einsum("rb,bve->rve", drawn, influence), axis=-1)
    assert unit == pytest.approx(np.sqrt((norms**2).mean(axis=0)), rel=1e-5)
    assert bootstrap.critical == pytest.approx(np.quantile((norms / unit).max(axis=1), 0.9, method="higher"), rel=1e-5)


def test_the_student_quantile_is_the_tables() -> None:
    for normal, freedom, table in ((2.5758, 10, 3.169), (2.5758, 15, 2.947), (1.9600, 4, 2.776), (3.2905, 30, 3.646)):
        assert float(student(normal, freedom)) == pytest.approx(table, rel=0.01)
    assert float(student(2.5758, 1e9)) == pytest.approx(2.5758, rel=1e-4)


def test_the_same_seed_gives_the_same_and_another_one_does_not() -> None:
    random = np.random.default_rng(0)
    num, den = random.integers(0, 30, (40, 6)), np.full((40, 1), 32)
    first, again, other = (share_intervals(num, den, seed=seed) for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(first[1], other[1])


def test_a_higher_level_is_wider() -> None:
    random = np.random.default_rng(0)
    num, den = random.binomial(32, 0.3, (60, 6)), np.full((60, 1), 32)
    _, low, high = share_intervals(num, den, level=0.9)
    _, lower, higher = share_intervals(num, den, level=0.999)
    assert (lower < low).all()
    assert (higher > high).all()


def test_what_never_happened_has_an_interval_and_what_always_did_too() -> None:
    num = np.stack([np.zeros(50), np.full(50, 32)], axis=1)
    value, low, high = share_intervals(num, np.full((50, 1), 32))
    assert value.tolist() == [0, 1]
    certain = 1 - 0.005 ** (1 / 1600)  # a share this large shows up in 1600 tokens at least once, as far as 0.995 goes
    assert low[0] == 0
    assert certain < high[0] < 2 * certain + 0.002
    assert low[1] == pytest.approx(1 - high[0])
    assert high[1] == 1


def test_of_one_block_or_of_nothing_nothing_is_known() -> None:
    value, low, high = share_intervals(np.array([[3.0]]), np.array([[10.0]]))
    assert (value.item(), low.item(), high.item()) == (0.3, 0, 1)
    value, low, high = share_intervals(np.zeros((20, 1)), np.zeros((20, 1)))
    assert np.isnan(value.item())
    assert (low.item(), high.item()) == (0, 1)


@pytest.mark.parametrize("level", [0, 0.3, 0.9999, 1, float("nan")])
def test_another_level_is_refused(level: float) -> None:
    with pytest.raises(OptionError, match=r"level is .*; expected 0\.5 to 0\.999") as error:
        BlockBootstrap(10, level=level)
    assert error.value.hint


# ---------------------------------------- coverage


def random_trace(seed: int, tokens: int, layers: int, experts: int, top_k: int, domains: int = 3) -> RoutingTrace:
    """Even routing, all independent: 12 documents, 20 token ids."""
    random = np.random.default_rng(seed)
    order = random.random((tokens, layers, experts)).argsort(axis=2)
    documents = (np.arange(tokens) * 12 // tokens).astype(np.int32)
    return RoutingTrace(
        order[:, :, :top_k].astype(np.int16),
        token_ids=random.integers(0, 20, tokens),
        logits=random.normal(size=order.shape).astype(np.float32),
        documents=documents,
        labels=tuple("abcdefgh"[number % domains] for number in range(12)),
        n_experts=experts,
    )


def all_metrics(trace: RoutingTrace, later: RoutingTrace) -> list[stats.Measured]:
    return [
        stats.load(trace),
        stats.load(trace, per="tokens"),
        stats.load_variation(trace),
        *stats.repetition(trace),
        *stats.repetition(trace, by_domain=True),
        stats.coactivation(trace),
        stats.transition(trace),
        stats.domain_specialisation(trace),
        stats.domain_contrast(trace),
        stats.domain_distance(trace),
        stats.vocabulary_specialisation(trace).summary,
        stats.saturation(trace, later),
    ]


@pytest.mark.parametrize(
    ("tokens", "layers", "experts", "top_k"), [(240, 4, 8, 2), (1500, 2, 8, 2), (600, 2, 24, 4)], ids=str
)
def test_on_random_routing_every_interval_covers_its_baseline(
    tokens: int, layers: int, experts: int, top_k: int
) -> None:
    missed: dict[str, int] = {}
    for seed in range(12):
        trace = random_trace(seed, tokens, layers, experts, top_k)
        other = random_trace(1000 + seed, tokens, layers, experts, top_k)
        later = RoutingTrace(other.topk_ids, token_ids=trace.token_ids, documents=trace.documents, n_experts=experts)
        for measured in all_metrics(trace, later):
            assert measured.baseline is not None
            inside = (measured.low <= measured.baseline) & (measured.baseline <= measured.high)
            if not (inside | np.isnan(measured.value)).all():
                missed[measured.name] = missed.get(measured.name, 0) + 1
    assert sum(missed.values()) <= 3, missed  # of 168, at the level 0.99


def chain(seed: int, tokens: int, load: Any, stay: float) -> RoutingTrace:
    """Each token has the expert of the last one with probability `stay`, or one that is drawn by the load."""
    random = np.random.default_rng(seed)
    drawn, stays = random.choice(len(load), size=tokens, p=load), random.random(tokens) < stay
    since = np.maximum.accumulate(np.where(stays, 0, np.arange(tokens)))
    return RoutingTrace(drawn[since].astype(np.int16)[:, None, None], n_experts=len(load))


def test_a_sticky_chain_is_covered_which_independent_tokens_would_not() -> None:
    load = np.array([0.4, 0.2, 0.1, 0.1, 0.08, 0.05, 0.05, 0.02])
    covered, naive, n = np.zeros(3, int), 0, 40
    for seed in range(n):
        trace = chain(seed, 3000, load, 0.8)
        for number, (measured, truth) in enumerate(
            (
                (stats.load(trace), load),
                (stats.load_variation(trace), load.std() / load.mean()),
                (stats.repetition(trace)[0], 0.8 + 0.2 * (load**2).sum()),
            )
        ):
            covered[number] += ((measured.low <= truth) & (truth <= measured.high)).all()
        value = stats.load(trace).value[0]
        naive += (np.abs(value - load) <= 3.2 * np.sqrt(load * (1 - load) / 3000)).all()  # 8 entries, 0.99
    assert covered.min() >= n - 3, covered
    assert naive <= n / 2


def test_intervals_are_not_endless() -> None:
    trace = random_trace(0, 20_000, 2, 8, 2)
    load, repetition = stats.load(trace), stats.repetition(trace)[0]
    assert (load.high - load.low).max() < 0.02  # 3.3 standard errors of 0.0017, both ways
    assert (repetition.high - repetition.low).max() < 0.03
