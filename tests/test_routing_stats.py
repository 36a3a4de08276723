"""Statistics of routing traces: by hand, by naive formulas, on planted structure, and as `octavo routing stats`.

That intervals cover is in `test_routing_intervals`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.cli.routing.stats import METRICS
from octavo.errors import OptionError
from octavo.experts import RoutingTrace, read_trace
from octavo.routing import published, stats
from run_octavo import refused, run

Array = np.ndarray[Any, Any]


def even_trace(
    tokens: int = 600,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
    documents: int = 6,
    domains: int = 3,
    vocabulary: int = 15,
) -> RoutingTrace:
    """Even routing, everything independent, with all that a trace can have."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(tokens, layers, experts)).astype(np.float32)
    cuts = np.sort(random.choice(np.arange(1, tokens), documents - 1, replace=False)) if documents > 1 else []
    token_ids = random.integers(0, vocabulary, tokens)
    return RoutingTrace(
        np.argsort(-logits, axis=2)[:, :, :top_k].astype(np.int16),
        token_ids=token_ids,
        logits=logits,
        documents=np.searchsorted(cuts, np.arange(tokens), side="right").astype(np.int32),
        pieces=tuple(f"piece {token}" for token in token_ids),
        labels=tuple(f"domain {number % domains}" for number in range(documents)),
        n_experts=experts,
        model="a model",
    )


def changed(trace: RoutingTrace, topk_ids: Array) -> RoutingTrace:
    return dataclasses.replace(trace, topk_ids=topk_ids.astype(np.int16), logits=None)


# ---------------------------------------- by hand

#        layer 0 and layer 1 of five tokens of two documents, with 2 of 4 experts
BY_HAND = RoutingTrace(
    np.array(
        [[[0, 1], [2, 3]], [[0, 2], [3, 2]], [[1, 3], [2, 0]], [[1, 0], [2, 1]], [[2, 0], [2, 3]]],
        np.int16,
    ),
    token_ids=np.array([7, 7, 9, 7, 9]),
    documents=np.array([0, 0, 0, 1, 1], np.int32),
    labels=("x", "y"),
    n_experts=4,
)


def test_by_hand() -> None:
    assert stats.load(BY_HAND).value.tolist() == [[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.5, 0.3]]
    assert stats.load(BY_HAND, "tokens").value.tolist() == [[0.8, 0.6, 0.4, 0.2], [0.2, 0.2, 1.0, 0.6]]
    # Of three pairs that are of one document: 0 0, 0 1, 1 2; and 2 3, 3 2, 2 2.
    first, either = stats.repetition(BY_HAND)
    assert first.value.tolist() == pytest.approx([1 / 3, 1 / 3])
    assert either.value.tolist() == pytest.approx([2 / 3, 1])
    assert (first.baseline, either.baseline) == (pytest.approx([0.25] * 2), pytest.approx([1 - 1 / 6] * 2))
    beside = stats.coactivation(BY_HAND).value[0]
    assert beside[0].tolist() == pytest.approx([np.nan, 0.5, 0.5, 0], nan_ok=True)
    assert beside[1].tolist() == pytest.approx([2 / 3, np.nan, 0, 1 / 3], nan_ok=True)
    following = [[0, 0, 0.5, 0.5], [0, 0, 1, 0], [0, 0, 1, 0], [np.nan] * 4]
    np.testing.assert_array_equal(stats.transition(BY_HAND).value[0], following)
    of_domain = stats.domain_specialisation(BY_HAND)
    assert of_domain.value[:, 0].tolist() == [
        pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3]),
        pytest.approx([1, 0.5, 0.5, 0]),
    ]
    contrast = stats.domain_contrast(BY_HAND).value
    assert contrast[0, 0].tolist() == pytest.approx([-1 / 3, 1 / 6, -1 / 6, 1 / 3])
    assert stats.domain_distance(BY_HAND).value[:, 0].tolist() == pytest.approx([0.25, 0.25])
    words = stats.vocabulary_specialisation(BY_HAND, least=2)
    assert (words.token_ids.tolist(), words.counts.tolist()) == ([7, 9], [3, 2])
    assert words.shares(0).tolist() == [pytest.approx([1, 2 / 3, 1 / 3, 0]), pytest.approx([0.5, 0.5, 0.5, 0.5])]
    assert words.summary.value.tolist() == pytest.approx([0.75, 1])


def test_the_baselines_are_the_published_ones_for_two_of_eight() -> None:
    trace = even_trace()
    assert stats.load(trace).baseline == pytest.approx(np.full((3, 8), 0.125))
    assert stats.load(trace, per="tokens").baseline == pytest.approx(np.full((3, 8), 0.25))
    first, either = stats.repetition(trace)
    assert first.baseline == pytest.approx([0.125] * 3)
    assert either.baseline == pytest.approx([0.4642857] * 3)
    assert stats.coactivation(trace).baseline == pytest.approx(np.full((3, 8, 8), 1 / 7))
    assert stats.transition(trace).baseline == pytest.approx(np.full((2, 8, 8), 1 / 8))
    assert stats.domain_specialisation(trace).baseline == pytest.approx(np.full((3, 3, 8), 1 / 4))
    assert stats.saturation(trace, trace).baseline == pytest.approx([0.25] * 3)
    assert stats.router_entropy(trace).baseline is None


# ---------------------------------------- by naive formulas


def naive(trace: RoutingTrace) -> dict[str, Any]:
    """Every metric, by loops over tokens and with no thought for time."""
    ids, experts = trace.topk_ids.tolist(), trace.experts
    tokens, layers = range(trace.n_tokens), range(trace.n_layers)
    documents, domain, words = (a.tolist() for a in (trace.document_ids, trace.domain_ids, trace.token_ids))
    domains = range(len(trace.domains))

    def share(having: list[bool]) -> float:
        return sum(having) / len(having) if having else math.nan

    def chosen(layer: int, expert: int, which: list[int]) -> float:
        return share([expert in ids[t][layer] for t in which])

    pairs = [(t - 1, t) for t in tokens if t and documents[t] == documents[t - 1]]
    of = [[t for t in tokens if domain[t] == d] for d in domains]
    others = [[t for t in tokens if domain[t] != d] for d in domains]
    often = sorted(word for word, n in Counter(words).items() if n >= 3)
    specialised = [[[chosen(layer, e, of[d]) for e in range(experts)] for layer in layers] for d in domains]
    elsewhere = [[[chosen(layer, e, others[d]) for e in range(experts)] for layer in layers] for d in domains]
    loads = [[chosen(layer, e, list(tokens)) / trace.top_k for e in range(experts)] for layer in layers]
    return {
        "load": loads,
        "first": [share([ids[a][layer][0] == ids[b][layer][0] for a, b in pairs]) for layer in layers],
        "any": [share([bool({*ids[a][layer]} & {*ids[b][layer]}) for a, b in pairs]) for layer in layers],
        "any by domain": [
            [share([bool({*ids[a][ly]} & {*ids[b][ly]}) for a, b in pairs if domain[a] == d]) for ly in layers]
            for d in domains
        ],
        "coactivation": [
            [
                [math.nan if i == j else chosen(ly, j, [t for t in tokens if i in ids[t][ly]]) for j in range(experts)]
                for i in range(experts)
            ]
            for ly in layers
        ],
        "transition": [
            [
                [share([ids[t][ly + 1][0] == j for t in tokens if ids[t][ly][0] == i]) for j in range(experts)]
                for i in range(experts)
            ]
            for ly in layers[:-1]
        ],
        "specialisation": specialised,
        "contrast": (np.array(specialised) - np.array(elsewhere)).tolist(),
        "distance": (np.abs(np.array(specialised) - np.array(elsewhere)).sum(2) / 2 / trace.top_k).tolist(),
        "words": often,
        "vocabulary": [
            sum(max(chosen(ly, e, [t for t in tokens if words[t] == w]) for e in range(experts)) for w in often)
            / max(1, len(often))
            for ly in layers
        ],
        "entropy": [
            sum(
                -sum(p * math.log2(p) for x in row if (p := math.exp(x) / sum(map(math.exp, row))))
                for row in trace.logits[:, ly].astype(float).tolist()
            )
            / trace.n_tokens
            for ly in layers
        ],
    }


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(12, 60),
    layers=st.integers(2, 3),
    experts=st.integers(4, 7),
    top_k=st.integers(2, 4),
    documents=st.integers(2, 6),
    seed=st.integers(0, 1000),
)
def test_every_metric_is_what_a_naive_formula_says(
    tokens: int, layers: int, experts: int, top_k: int, documents: int, seed: int
) -> None:
    trace = even_trace(tokens, layers, experts, top_k, seed, documents, 2, vocabulary=5)
    expected = naive(trace)
    first, either = stats.repetition(trace)
    found = {
        "load": stats.load(trace),
        "first": first,
        "any": either,
        "any by domain": stats.repetition(trace, by_domain=True)[1],
        "coactivation": stats.coactivation(trace),
        "transition": stats.transition(trace),
        "specialisation": stats.domain_specialisation(trace),
        "contrast": stats.domain_contrast(trace),
        "distance": stats.domain_distance(trace),
        "entropy": stats.router_entropy(trace),
    }
    if expected["words"]:
        words = stats.vocabulary_specialisation(trace, least=3)
        assert words.token_ids.tolist() == expected["words"]
        found["vocabulary"] = words.summary
    for name, measured in found.items():
        np.testing.assert_allclose(measured.value, np.array(expected[name]), atol=1e-9, err_msg=name)
        assert measured.low.shape == measured.high.shape == measured.value.shape
        assert len(measured.axes) == measured.value.ndim
        known = ~np.isnan(measured.value)
        slack = 1e-9
        assert (measured.low[known] <= measured.value[known] + slack).all(), name
        assert (measured.value[known] <= measured.high[known] + slack).all(), name


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(1, 40), top_k=st.integers(1, 4), seed=st.integers(0, 100))
def test_saturation_is_the_mean_share_of_choices_that_stay(tokens: int, top_k: int, seed: int) -> None:
    now = even_trace(tokens, 2, 6, top_k, seed, documents=1)
    later = changed(now, even_trace(tokens, 2, 6, top_k, seed + 1, documents=1).topk_ids)
    naive = [
        sum(len({*a[layer]} & {*b[layer]}) for a, b in zip(now.topk_ids.tolist(), later.topk_ids.tolist(), strict=True))
        / (tokens * top_k)
        for layer in range(2)
    ]
    assert stats.saturation(now, later).value.tolist() == pytest.approx(naive)
    assert stats.saturation(now, now).value.tolist() == [1, 1]


def test_load_variation_is_the_plain_one_where_there_is_much_text_and_less_where_there_is_little() -> None:
    random, load = np.random.default_rng(0), np.array([0.4, 0.3, 0.2, 0.1])
    for tokens, close in ((50_000, 0.01), (100, 0.5)):
        ids = random.choice(4, size=(tokens, 1, 1), p=load).astype(np.int16)
        found = stats.load_variation(RoutingTrace(ids, n_experts=4))
        shares = np.bincount(ids.ravel()) / tokens
        plain = shares.std() / shares.mean()
        assert found.value[0] == pytest.approx(plain, rel=close)
        assert found.value[0] < plain
        assert found.low[0] <= plain <= found.high[0]
    even = even_trace(3000, 40, seed=5, documents=1)
    loads = stats.load(even).value
    plain = loads.std(axis=1) / loads.mean(axis=1)
    assert plain.mean() > 0.025  # by chance alone
    assert stats.load_variation(even).value.mean() < plain.mean() / 2


def test_one_token_more_or_less_of_a_document_counts_no_pair_across_documents() -> None:
    ids = np.array([[[0, 1]], [[2, 3]], [[2, 3]], [[0, 1]]], np.int16)
    joined = RoutingTrace(ids, n_experts=8)
    apart = dataclasses.replace(joined, documents=np.array([0, 0, 1, 1], np.int32))
    assert stats.repetition(joined)[0].value.tolist() == pytest.approx([1 / 3])
    assert stats.repetition(apart)[0].value.tolist() == [0]


# ---------------------------------------- planted structure


def test_a_router_that_always_repeats_and_one_that_never_does_are_found() -> None:
    trace = even_trace(layers=3)
    ids = trace.topk_ids.copy()
    ids[:, 1] = [3, 5]
    ids[:, 2] = (np.arange(len(ids))[:, None] * 2 + [0, 1]) % 8
    first, either = stats.repetition(changed(trace, ids))
    for measured in (first, either):
        assert measured.beside.tolist() == [0, 1, -1]
        assert measured.value[1:].tolist() == [1, 0]
        assert measured.low[1] > 0.9
        assert measured.high[2] < 0.1


def test_experts_that_always_come_together_are_found() -> None:
    trace = even_trace(layers=2)
    ids = trace.topk_ids.copy()
    ids[:, 0] = np.stack([np.arange(600) % 4 * 2, np.arange(600) % 4 * 2 + 1], axis=1)
    beside = stats.coactivation(changed(trace, ids)).beside
    assert {(int(i), int(j)) for i, j in np.argwhere(beside[0] == 1)} == {(i, i ^ 1) for i in range(8)}
    assert not beside[1].any()


def test_an_expert_that_takes_one_domain_is_found() -> None:
    trace = even_trace(1200, layers=2, documents=24)
    ids = trace.topk_ids.copy()
    of_domain = trace.domain_ids == 1
    ids[of_domain, 1] = np.where(ids[of_domain, 1] == 6, ids[of_domain, 1][:, ::-1], ids[of_domain, 1])
    ids[of_domain, 1, 0] = 6
    ids[of_domain, 1, 1] = np.where(ids[of_domain, 1, 1] == 6, 0, ids[of_domain, 1, 1])
    planted = changed(trace, ids)
    of = stats.domain_specialisation(planted)
    assert of.value[1, 1, 6] == 1
    assert of.beside[1, 1, 6] == 1
    contrast = stats.domain_contrast(planted).beside
    assert contrast[1, 1, 6] == 1
    assert contrast[[0, 2], 1, 6].tolist() == [-1, -1]
    assert not contrast[:, 0].any()
    distance = stats.domain_distance(planted)
    assert distance.specialised
    assert distance.null_high is not None
    assert (distance.value > distance.null_high).tolist() == [[False, False], [False, True], [False, False]]
    assert distance.beside[1].tolist() == [0, 1]
    assert not stats.domain_distance(trace).specialised


def test_labels_of_whole_documents_are_shuffled_where_there_are_enough() -> None:
    """Texts that differ, whatever their labels: blocks would call that a domain."""
    random = np.random.default_rng(4)
    documents = np.repeat(np.arange(24), 60).astype(np.int32)
    favourite = random.integers(0, 8, 24)
    ids = np.where(random.random(1440) < 0.7, favourite[documents], random.integers(0, 8, 1440))
    trace = RoutingTrace(
        ids.astype(np.int16)[:, None, None],
        documents=documents,
        labels=tuple(random.permutation(["a", "b"] * 12).tolist()),
        n_experts=8,
    )
    found = stats.domain_distance(trace)
    assert "documents" in found.baseline_name
    assert not found.specialised
    two = trace.select(np.isin(documents, [0, *np.flatnonzero(np.array(trace.labels) != trace.labels[0])[:1]]))
    few = stats.domain_distance(two)
    assert "blocks" in few.baseline_name
    assert "too few documents" in few.note


def test_a_layer_that_copies_the_one_before_is_found() -> None:
    trace = even_trace(layers=3)
    ids = trace.topk_ids.copy()
    ids[:, 2] = ids[:, 1]
    found = stats.transition(changed(trace, ids))
    assert np.array_equal(found.value[1], np.eye(8))
    assert (np.diag(found.beside[1]) == 1).all()
    assert not found.beside[0].any()


def test_a_token_id_that_always_goes_to_one_expert_is_found() -> None:
    trace = even_trace(2000, layers=2, top_k=1)
    ids = trace.topk_ids.copy()
    ids[trace.token_ids < 10, 1] = (trace.token_ids[trace.token_ids < 10] % 8)[:, None]
    words = stats.vocabulary_specialisation(changed(trace, ids))
    assert words.summary.beside.tolist() == [0, 1]
    top = words.top_tokens(1, 3)
    assert (top[0].token_id, top[0].share, top[0].piece) == (3, 1.0, "piece 3")
    assert top[0].count == (trace.token_ids == 3).sum()
    assert [one.share for one in top] == sorted((one.share for one in top), reverse=True)
    assert [one.token_id for one in words.top_tokens(1, 0, 2)] == sorted(
        (0, 8), key=lambda i: -(trace.token_ids == i).sum()
    )
    assert words.top_by_expert(1, 2)[3] == top[:2]


def test_ids_and_experts_that_both_come_in_runs_are_no_vocabulary() -> None:
    random = np.random.default_rng(8)
    ids = np.repeat(random.integers(0, 8, 150), 20)
    words = np.repeat(random.integers(0, 40, 300), 10)
    found = stats.vocabulary_specialisation(
        RoutingTrace(ids.astype(np.int16)[:, None, None], token_ids=words, n_experts=8)
    )
    assert found.summary.value[0] > 0.25  # 1/8 is even
    assert found.summary.beside.tolist() == [0]


def test_entropy_of_sure_and_of_undecided_routers() -> None:
    trace = even_trace(300, layers=3)
    logits = np.zeros((300, 3, 8), np.float32)
    logits[:, 1, :2] = 60
    logits[:, 2, :] = [-np.inf] * 7 + [5]
    found = stats.router_entropy(dataclasses.replace(trace, logits=logits))
    assert found.value.tolist() == pytest.approx([3, 1, 0], abs=1e-6)
    assert (found.low >= 0).all()
    assert (found.high <= 3).all()
    assert "3 bits" in found.baseline_name


# ---------------------------------------- what a trace may not have


def test_what_a_trace_lacks_is_said() -> None:
    whole = even_trace()
    bare = RoutingTrace(whole.topk_ids)
    one_layer, one_choice = RoutingTrace(whole.topk_ids[:, :1]), RoutingTrace(whole.topk_ids[:, :, :1])
    one_domain = dataclasses.replace(whole, labels=("x",) * 6)
    single = RoutingTrace(whole.topk_ids[:3], documents=np.arange(3, dtype=np.int32))
    for ask, message in (
        (lambda: stats.repetition(bare, by_domain=True), "no labels"),
        (lambda: stats.domain_specialisation(bare), "no labels"),
        (lambda: stats.domain_contrast(one_domain), "one domain only, 'x'"),
        (lambda: stats.domain_distance(one_domain), "one domain only, 'x'"),
        (lambda: stats.router_entropy(bare), "no logits"),
        (lambda: stats.vocabulary_specialisation(bare), "no token ids"),
        (lambda: stats.vocabulary_specialisation(whole, least=500), "no token id comes 500 times in 600"),
        (lambda: stats.transition(one_layer), "of one layer"),
        (lambda: stats.coactivation(one_choice), "one expert"),
        (lambda: stats.repetition(single), "no document of the trace has two tokens"),
        (lambda: stats.load(whole, per="token"), "per is 'token'"),  # type: ignore[arg-type]
        (lambda: stats.load(whole, level=1.5), "level is 1.5"),
        (lambda: stats.vocabulary_specialisation(whole).top_tokens(3, 0), "no layer 3"),
        (lambda: stats.vocabulary_specialisation(whole).top_tokens(0, -1), "no expert -1"),
    ):
        with pytest.raises(OptionError, match=message) as error:
            ask()
        assert error.value.hint, message


def test_a_later_trace_of_something_else_is_refused() -> None:
    trace = even_trace()
    words, documents = trace.token_ids.copy(), trace.document_ids.copy()
    words[7] += 1
    documents[np.flatnonzero(np.diff(documents))[0] + 1] -= 1
    for later, message in (
        (even_trace(601), "601 tokens"),
        (even_trace(layers=2), "2 layers"),
        (even_trace(top_k=3), "3 of 8 experts"),
        (even_trace(experts=9), "2 of 9 experts"),
        (dataclasses.replace(trace, token_ids=words), "other tokens, from token 7 on"),
        (dataclasses.replace(trace, documents=documents), "documents begin elsewhere"),
    ):
        with pytest.raises(OptionError, match=message) as error:
            stats.saturation(trace, later)
        assert error.value.hint
    unknown = RoutingTrace(np.minimum(trace.topk_ids, 6)[:, :, :1], documents=trace.documents)
    known = RoutingTrace(trace.topk_ids[:, :, :1], documents=trace.documents, n_experts=8)
    assert stats.saturation(unknown, known).baseline == pytest.approx([1 / 8] * 3)
    assert "not checked" in stats.saturation(unknown, known).note


def test_a_guessed_number_of_experts_and_a_single_token_are_borne() -> None:
    single = RoutingTrace(np.array([[[2, 0]]], np.int16))
    found = stats.load(single)
    assert found.value.tolist() == [[0.5, 0, 0.5]]
    assert "highest id" in found.note
    assert (found.low.tolist(), found.high.tolist()) == ([[0] * 3], [[1] * 3])
    assert stats.load_variation(single).low.tolist() == [0]


def test_everybody_chosen_always_is_no_division_by_zero() -> None:
    trace = RoutingTrace(np.tile(np.arange(3, dtype=np.int16), (50, 2, 1)))
    assert stats.load(trace, per="tokens").value.tolist() == [[1] * 3] * 2
    assert stats.load_variation(trace).value.tolist() == [0, 0]
    assert stats.repetition(trace)[1].baseline == pytest.approx([1, 1])
    assert np.nanmin(stats.coactivation(trace).value) == 1


def test_published_ranges_are_those_of_the_paper() -> None:
    one = published.repetition_range("first", 15)
    assert one is not None
    assert (one.low, one.high, one.table, one.n_domains) == (0.236, 0.284, "table 5", 8)
    assert published.repetition_range("any", 7) is None
    assert len(published.REPETITION) == 6
    assert round(published.ANY_BASELINE, 3) == 0.464
    assert [(mean.k, mean.value) for mean in published.ALIGNMENT] == [(1, 0.065), (64, 0.285), (512, 0.462)]


# ---------------------------------------- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stats")
    trace = even_trace(900, documents=12)
    ids = trace.topk_ids.copy()
    ids[:, 1] = [3, 5]
    planted = dataclasses.replace(trace, topk_ids=ids)
    bare = RoutingTrace(trace.topk_ids)
    found = {name: folder / f"{name}.safetensors" for name in ("planted", "later", "bare")}
    for path, one in zip(found.values(), (planted, trace, bare), strict=True):
        one.save(path)
    return found


def test_tables_have_every_metric_with_interval_denominator_and_baseline(files: dict[str, Path]) -> None:
    done = run("routing", "stats", files["planted"], "--later", files["later"])
    assert (done.code, done.err) == (0, "")
    assert "900 tokens, 12 documents of a model\n3 layers, 2 of 8 experts a token\n" in done.out
    tables = done.out.split("\n\n")[1:]
    assert len(tables) == len(METRICS) + 1  # repetition is two
    for table in tables:
        lines = table.splitlines()
        assert lines[1].startswith("  of:       ")
        assert lines[2].startswith("  baseline: ")
        assert any("[" in line and "]" in line for line in lines[3:])
    (first,) = [table for table in tables if table.startswith("repetition of the first choice")]
    assert re.search(r"^  1 +100\.0 %  \[9\d\.\d %, 100\.0 %\]  12\.5 %$", first, re.MULTILINE)
    assert "layer 15 23.6-28.4 %" in first
    assert "arXiv:2401.04088" in first


def test_json_has_all_numbers_and_they_are_those_of_the_functions(files: dict[str, Path]) -> None:
    done = run("routing", "stats", files["planted"], "--later", files["later"], "--json", "--seed", 3, "--level", 0.9)
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["domains"] == ["domain 0", "domain 1", "domain 2"]
    by_name = {one["name"]: one for one in found["metrics"]}
    assert len(by_name) == len(METRICS) + 1
    measured = stats.coactivation(read_trace(files["planted"]), seed=3, level=0.9)
    one = by_name["co-activation"]
    for name in ("value", "low", "high", "baseline"):
        np.testing.assert_array_equal(np.array(one[name], dtype=float), getattr(measured, name))
    assert one["value"][0][0][0] is None
    assert (one["axes"], one["level"]) == (["layer", "expert", "other"], 0.9)
    assert by_name["router entropy"]["baseline"] is None
    assert by_name["domain distance"]["specialised"] is False
    top = by_name["vocabulary specialisation"]["top_tokens"]
    assert [len(of_layer) for of_layer in top] == [8] * 3
    assert [len(of_expert) for of_expert in top[1]] == [3 * (expert in (3, 5)) for expert in range(8)]
    assert top[1][3][0]["piece"] == f"piece {top[1][3][0]['token_id']}"
    assert len(found["published"]) == 6


def test_metrics_layers_and_domains_are_chosen(files: dict[str, Path]) -> None:
    done = run(
        "routing", "stats", files["planted"], "--metric", "repetition", "--metric", "transition", "--by-domain",
        "--layers", "2,1", "--json",
    )  # fmt: skip
    metrics = json.loads(done.out)["metrics"]
    assert [one["axes"] for one in metrics] == [["domain", "layer"]] * 2 + [["layer", "expert", "next"]]
    assert [one["layers"] for one in metrics] == [[2, 1], [2, 1], [1]]
    assert [of_domain[1] for of_domain in metrics[0]["value"]] == [1, 1, 1]
    shown = run("routing", "stats", files["planted"], "--metric", "repetition", "--by-domain", "--layers", "1").out
    assert [line.split()[:3] for line in shown.splitlines() if line.startswith("  domain ")] == [
        ["domain", "layer", "value"], *(["domain", str(d), "1"] for d in range(3)),
        ["domain", "layer", "value"], *(["domain", str(d), "1"] for d in range(3)),
    ]  # fmt: skip


def test_what_a_trace_lacks_is_left_out_with_a_remark_or_refused_when_asked_for(files: dict[str, Path]) -> None:
    done = run("routing", "stats", files["bare"])
    assert done.code == 0
    assert [line.split(" is left out")[0] for line in done.err.splitlines()] == [
        "domain-specialisation", "domain-contrast", "domain-distance", "vocabulary", "entropy",
    ]  # fmt: skip
    assert "as many as its highest id says" in done.out
    refused(run("routing", "stats", files["bare"], "--metric", "entropy"), "no logits", hint="--logits")
    refused(run("routing", "stats", files["bare"], "--by-domain", "--metric", "repetition"), "no labels")


def test_bad_options_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    trace = files["planted"]
    refused(run("routing", "stats", trace, "--metric", "lode"), "--metric lode", hint="load")
    refused(run("routing", "stats", trace, "--metric", "saturation"), "saturation", hint="--later")
    refused(run("routing", "stats", trace, "--layers", "0,9"), "--layers 0,9", "no layer 9", hint="0 to 2")
    refused(run("routing", "stats", trace, "--layers", "all"), "--layers is 'all'", hint="0-3")
    refused(run("routing", "stats", trace, "--level", "2"), "level is 2.0")
    refused(run("routing", "stats", trace, "--later", files["bare"], "--metric", "saturation"), "documents")
    refused(run("routing", "stats", tmp_path / "none.safetensors"), "none.safetensors")


def test_the_names_on_the_command_line_are_those_of_the_functions() -> None:
    assert tuple(stats.METRICS) == METRICS
