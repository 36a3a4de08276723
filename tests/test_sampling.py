"""Sampling: the options' ranges, and every stage against an exact or an outside reference."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo.errors import OctavoError, OptionError
from octavo.sampling import (
    History,
    SamplingParams,
    add_logit_bias,
    adjust,
    distribution,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    make_generator,
    penalize_frequency,
    penalize_repetition,
    sample,
    token_logprobs,
)

# ---------------------------------------- the options


def test_defaults():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.7, 1.0, 0, 0.0)
    assert (params.max_tokens, params.seed, params.stop, params.logprobs, params.n) == (
        512,
        None,
        (),
        None,
        1,
    )
    assert not params.greedy
    assert not params.penalizes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "0.7"),
        ("temperature", True),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("seed", -1),
        ("seed", 2**63),
        ("max_tokens", 0),
        ("stop", ("a", "")),
        ("stop", ""),
        ("stop", 3),
        ("stop_ids", (-1,)),
        ("stop_ids", "7"),
        ("logit_bias", {3: math.inf}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", [1]),
        ("logprobs", 21),
        ("logprobs", -1),
        ("n", 0),
        ("n", 129),
    ],
)
def test_out_of_range_names_field_and_value(name, value):
    with pytest.raises(OptionError) as caught:
        SamplingParams(**{name: value})
    assert name in caught.value.message
    assert "expected" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("temperature", "0", 0.0),
        ("temperature", "1e-1", 0.1),
        ("top_p", ".9", 0.9),
        ("top_k", "40", 40),
        ("seed", "7", 7),
        ("seed", "none", None),
        ("max_tokens", "None", None),
        ("max_tokens", 9, 9),
        ("logprobs", "0", 0),
        ("stop", "7", ("7",)),
        ("stop", "none", ("none",)),
        ("stop", ["a", "b", "a"], ("a", "b")),
        ("stop_ids", "2, 5", (2, 5)),
        ("stop_ids", 2, (2,)),
        ("stop_ids", [2, 5], (2, 5)),
        ("logit_bias", "5:-100, 7:2.5", {5: -100.0, 7: 2.5}),
        ("logit_bias", {"5": -1}, {5: -1.0}),
    ],
)
def test_from_options_parses_text_and_native_values(option, text, value):
    parsed = getattr(SamplingParams.from_options({option: text}), option)
    assert parsed == value
    assert type(parsed) is type(value)


def test_from_options_keeps_the_base():
    base = SamplingParams(temperature=0.2, top_k=5)
    assert SamplingParams.from_options({"top_k": "9"}, base) == SamplingParams(temperature=0.2, top_k=9)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("temprature", "temperature"),
        ("temp", "temperature"),
        ("topp", "top_p"),
        ("max_new_tokens", "max_tokens"),
        ("zzz", "known options: temperature"),
    ],
)
def test_unknown_option_hints_at_the_nearest(name, hint):
    with pytest.raises(OptionError, match="unknown sampling option") as caught:
        SamplingParams.from_options({name: "1"})
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "warm"),
        ("top_k", "4.5"),
        ("n", ""),
        ("stop_ids", "a"),
        ("logit_bias", "5"),
        ("logit_bias", "x:1"),
        ("temperature", "none"),
        ("temperature", None),
    ],
)
def test_from_options_refuses_what_does_not_parse(name, text):
    with pytest.raises(OptionError, match=name):
        SamplingParams.from_options({name: text})


def test_params_are_frozen_hashable_and_comparable():
    params = SamplingParams(logit_bias={1: 2.0})
    assert params == SamplingParams(logit_bias={1: 2})
    assert hash(params) == hash(SamplingParams(logit_bias={1: 2}))
    with pytest.raises(AttributeError):
        params.temperature = 1.0  # type: ignore[misc]


# ---------------------------------------- a slow, obvious reference in Python


def exact(logits: list[float], *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> list[float]:
    """The probabilities, in the documented order, with lists and loops."""
    scaled = [x / temperature for x in logits]
    alive = set(range(len(logits)))
    if top_k:
        kth = sorted(scaled, reverse=True)[min(top_k, len(scaled)) - 1]
        alive = {i for i in alive if scaled[i] >= kth}

    def probabilities() -> list[float]:
        top = max(scaled[i] for i in alive)
        weights = [math.exp(scaled[i] - top) if i in alive else 0.0 for i in range(len(scaled))]
        return [w / math.fsum(weights) for w in weights]

    if top_p < 1:
        probs, total, nucleus = probabilities(), 0.0, set()
        for i in sorted(alive, key=lambda i: (-probs[i], i)):
            nucleus.add(i)
            total += probs[i]
            if total >= top_p:
                break
        alive = nucleus
    probs = probabilities()
    alive = {i for i in alive if probs[i] >= min_p * max(probs)}
    return probabilities()


def chi_square(counts: Counter[int], probs: list[float], n: int) -> tuple[float, float]:
    """Pearson's statistic and its 0.999 quantile (Wilson and Hilferty), rare cells pooled."""
    cells = [(counts[i], n * p) for i, p in enumerate(probs) if n * p >= 5]
    rare = [i for i, p in enumerate(probs) if 0 < n * p < 5]
    if rare:
        cells.append((sum(counts[i] for i in rare), n * sum(probs[i] for i in rare)))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    df = max(len(cells) - 1, 1)
    return statistic, df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3


COMBINATIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 0.7, "top_k": 12, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 10, "top_p": 0.95, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_frequencies_follow_the_exact_probabilities(options):
    torch.manual_seed(5)
    logits_V = torch.randn(40) * 2
    n, params = 12_000, SamplingParams(**{"temperature": 1.0, **options})
    probs = exact(logits_V.tolist(), **options)
    generator = make_generator(11)
    counts = Counter(sample(logits_V, params, generator) for _ in range(n))
    assert all(probs[i] > 0 for i in counts)
    statistic, bound = chi_square(counts, probs, n)
    assert statistic < bound
    torch.testing.assert_close(distribution(logits_V, params), torch.tensor(probs, dtype=torch.float64))


def test_the_chi_square_test_can_fail():
    torch.manual_seed(5)
    logits_V = torch.randn(40) * 2
    generator = make_generator(11)
    params = SamplingParams(temperature=1.1)
    counts = Counter(sample(logits_V, params, generator) for _ in range(12_000))
    statistic, bound = chi_square(counts, exact(logits_V.tolist(), temperature=1.0), 12_000)
    assert statistic > bound


logit_lists = st.lists(st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, -1.0]), min_size=1, max_size=90)


@example(logits=[-5.960464477539063e-08, 0.0], temperature=2.0, top_k=0, top_p=0.5, min_p=0.0, seed=0)
@settings(max_examples=150, deadline=None)
@given(
    logits=logit_lists,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 100),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
)
def test_argmax_survives_and_probabilities_renormalise(logits, temperature, top_k, top_p, min_p, seed):
    logits_V = torch.tensor(logits)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probs_V = distribution(logits_V, params)
    assert float(probs_V.sum()) == pytest.approx(1)
    assert probs_V[int(logits_V.argmax())] > 0
    assert float(probs_V.max()) == float(probs_V[int(logits_V.argmax())])
    assert probs_V[sample(logits_V, params, make_generator(seed))] > 0


@settings(max_examples=150, deadline=None)
@given(logits=logit_lists, p=st.floats(0.01, 0.999))
def test_nucleus_is_minimal(logits, p):
    logits_V = torch.tensor(logits)
    probs_V = logits_V.double().softmax(0)
    kept = filter_top_p(logits_V, p).isfinite()
    mass = probs_V[kept].sum()
    assert mass >= p - 1e-9
    assert mass - probs_V[kept].min() < p + 1e-9
    if (~kept).any():
        assert probs_V[~kept].max() <= probs_V[kept].min()


def test_nucleus_beyond_the_few_largest():
    logits_V = torch.zeros(4096)
    assert filter_top_p(logits_V, 0.5).isfinite().nonzero().squeeze(1).tolist() == list(range(2048))
    torch.manual_seed(0)
    logits_V = torch.randn(3000) * 0.1
    kept = filter_top_p(logits_V, 0.9).isfinite()
    order = logits_V.argsort(descending=True)
    n_kept = int((logits_V.softmax(0).double()[order].cumsum(0) < 0.9).sum()) + 1
    assert set(kept.nonzero().squeeze(1).tolist()) == set(order[:n_kept].tolist())


def test_filters_at_their_edges():
    logits_V = torch.tensor([1.0, 3.0, 3.0, 2.0])
    assert filter_top_k(logits_V, 0) is logits_V
    assert filter_top_k(logits_V, 4) is logits_V
    assert filter_top_k(logits_V, 1).isfinite().tolist() == [False, True, True, False]  # equals stay together
    assert filter_top_p(logits_V, 1.0) is logits_V
    assert filter_top_p(logits_V, 1e-6).isfinite().tolist() == [False, True, False, False]
    assert filter_min_p(logits_V, 0.0) is logits_V
    assert filter_min_p(logits_V, 1.0).isfinite().tolist() == [False, True, True, False]
    assert filter_min_p(logits_V, math.exp(-1.5)).isfinite().tolist() == [False, True, True, True]


# ---------------------------------------- greedy, ties, broken rows


def test_greedy_takes_the_lowest_of_equals():
    logits_V = torch.zeros(5000)
    logits_V[[17, 900, 4999]] = 2.0
    for temperature in (0, 1e-7, 1e-320):
        params = SamplingParams(temperature=temperature, seed=1)
        assert sample(logits_V, params, make_generator(1)) == 17
        assert distribution(logits_V, params).argmax() == 17


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e38])
def test_extreme_temperatures_stay_finite(temperature):
    logits_V = torch.tensor([-1e4, 0.0, 1e4, 5e3])
    params = SamplingParams(temperature=temperature)
    assert distribution(logits_V, params).isfinite().all()
    drawn = {sample(logits_V, params, make_generator(seed)) for seed in range(40)}
    assert drawn == ({2} if temperature < 1 else {0, 1, 2, 3})


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_errors(options, bad):
    logits_V = torch.tensor([0.0, bad, 1.0, 2.0])
    with pytest.raises(OctavoError, match="1 NaN or infinite"):
        sample(logits_V, SamplingParams(**options), make_generator(0))


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_finite_logit_is_an_error(temperature):
    with pytest.raises(OctavoError, match="no finite"):
        sample(torch.full((4,), -torch.inf), SamplingParams(temperature=temperature), make_generator(0))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.01}])
def test_minus_infinity_bans_a_token(options):
    logits_V = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    generator = make_generator(3)
    assert {sample(logits_V, SamplingParams(**options), generator) for _ in range(60)} == {1, 2}


def test_sampling_leaves_the_logits_alone_and_reads_half_precision():
    logits_V = torch.randn(64, dtype=torch.bfloat16)
    before = logits_V.clone()
    params = SamplingParams(logit_bias={3: 1.0}, presence_penalty=1.0, top_k=9, top_p=0.9)
    sample(logits_V, params, make_generator(0), History([1, 2], 64))
    assert torch.equal(logits_V, before)


# ---------------------------------------- penalties, bias, seeds


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=12, max_size=12),
    prompt=st.lists(st.integers(0, 11), min_size=1, max_size=8),
    reply=st.lists(st.integers(0, 11), max_size=8),
    penalty=st.floats(0.1, 5),
)
def test_repetition_penalty_is_that_of_transformers(logits, prompt, reply, penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    logits_V = torch.tensor(logits)
    history = History(prompt, 12)
    for token in reply:
        history.append(token)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + reply]), logits_V[None].clone())
    torch.testing.assert_close(penalize_repetition(logits_V, history.seen_V, penalty), theirs[0])
    params = SamplingParams(repetition_penalty=penalty)
    torch.testing.assert_close(adjust(logits_V, params, history), theirs[0])


def test_frequency_and_presence_count_the_reply_only():
    history = History([0, 0, 1], 5)
    for token in (1, 2, 2, 2):
        history.append(token)
    penalized = penalize_frequency(torch.zeros(5), history.counts_V, 0.5, 0.25)
    assert penalized.tolist() == [0.0, -0.75, -1.75, 0.0, 0.0]


def test_stages_come_in_the_documented_order():
    history = History([0], 3)
    history.append(1)
    params = SamplingParams(logit_bias={0: 2.0, 1: -3.0}, repetition_penalty=2.0, frequency_penalty=1.0)
    logits_V = torch.tensor([2.0, 1.0, 7.0])
    # bias: 4, -2, 7; repetition: 2, -4, 7; frequency: 2, -5, 7
    assert adjust(logits_V, params, history).tolist() == [2.0, -5.0, 7.0]
    assert adjust(logits_V, SamplingParams()) is logits_V
    with pytest.raises(ValueError, match="history"):
        adjust(logits_V, params)


def test_logit_bias_forces_and_bans():
    logits_V = torch.tensor([0.0, 0.0, 5.0])
    assert add_logit_bias(logits_V, {0: 1.5}).tolist() == [1.5, 0.0, 5.0]
    banned = SamplingParams(temperature=0, logit_bias={2: -100})
    assert sample(logits_V, banned, make_generator(0)) == 0
    forced = SamplingParams(logit_bias={1: 100})
    assert {sample(logits_V, forced, make_generator(seed)) for seed in range(20)} == {1}


def test_seeds():
    logits_V = torch.randn(500, generator=torch.Generator().manual_seed(0))

    def draw(generator: torch.Generator) -> list[int]:
        return [sample(logits_V, SamplingParams(), generator) for _ in range(20)]

    assert draw(make_generator(4)) == draw(make_generator(4)) == draw(make_generator(3, index=1))
    assert draw(make_generator(4)) != draw(make_generator(5))
    assert draw(make_generator(None)) != draw(make_generator(None))
    draw(make_generator(2**63 - 1, index=5))


def test_small_changes_of_the_logits_keep_the_draws():
    """Float rounding between batch sizes must not change what a seed gives, but at the rare edge."""
    torch.manual_seed(1)
    logits_V = torch.randn(1000) * 3
    noisy_V = logits_V + torch.randn(1000) * 1e-6
    params = SamplingParams(temperature=1.0)
    ours, theirs = make_generator(0), make_generator(0)
    same = [sample(logits_V, params, ours) == sample(noisy_V, params, theirs) for _ in range(500)]
    assert sum(same) >= 499


def test_logprobs_are_the_models_own():
    torch.manual_seed(2)
    logits_V = torch.randn(50)
    reference = logits_V.log_softmax(0)
    reported = token_logprobs(logits_V, 7, 5)
    assert reported.token_id == 7
    assert reported.logprob == pytest.approx(float(reference[7]))
    assert [i for i, _ in reported.top] == reference.argsort(descending=True)[:5].tolist()
    assert [p for _, p in reported.top] == pytest.approx(reference.sort(descending=True).values[:5].tolist())
    assert token_logprobs(logits_V, 7, 0).top == ()
    assert len(token_logprobs(torch.randn(3), 0, 20).top) == 3
