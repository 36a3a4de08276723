"""A batch's choice on its device: for each row what `sample` chooses, and nothing that the host would wait for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.errors import OctavoError
from octavo.sampling import SamplingParams, make_generator, sample
from octavo.sampling_batch import batch_params, sample_batch, samples_on_device, uniforms

COMBINATIONS = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature in (1e-6, 0.7, 1e38)
    for top_k in (0, 1, 5, 64, 2000, 10**30)
    for top_p in (1.0, 0.9, 0.1, 1e-9)
    for min_p in (0.0, 0.3, 1.0)
] + [{"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1}]


def draw_alone(logits_BV: torch.Tensor, params: Sequence[SamplingParams], seed: int) -> list[int]:
    """The reference: row by row, by `sample`; -1 where it raises an error."""
    ids = []
    for row, (logits_V, one) in enumerate(zip(logits_BV, params, strict=True)):
        try:
            ids.append(sample(logits_V, one, make_generator(seed, row)))
        except OctavoError:
            ids.append(-1)
    return ids


def draw_together(
    logits_BV: torch.Tensor, params: Sequence[SamplingParams], seed: int, rows: Sequence[int] | None = None
) -> list[int]:
    """The same by `sample_batch`, of all rows or of some; -1 where it says that it cannot."""
    rows = range(len(params)) if rows is None else rows
    params = [params[row] for row in rows]
    u_B = uniforms(params, [make_generator(seed, row) for row in rows])
    ids_B, ok_B = sample_batch(logits_BV[list(rows)], batch_params(params, "cpu"), u_B)
    assert (ids_B.dtype, ok_B.dtype) == (torch.int64, torch.bool)
    assert ids_B.shape == ok_B.shape == (len(params),)
    assert all(0 <= token_id < logits_BV.shape[-1] for token_id in ids_B.tolist())
    return ids_B.where(ok_B, -1).tolist()


# ---------------------------------------- the same choice

LOG_HALF = float(torch.tensor(math.log(0.5)))  # the float32 nearest to it
some_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-7, 1e-6, 0.7, 1.0, 1e300]) | st.floats(1e-6, 1e3),
    top_k=st.just(0) | st.integers(0, 12) | st.sampled_from([63, 64, 65, 1025, 10**30]),
    top_p=st.just(1.0) | st.sampled_from([0.1, 0.25, 0.5, 0.9, 1e-300, 1 - 2**-53]) | st.floats(0.01, 1.0),
    min_p=st.just(0.0) | st.sampled_from([1e-320, 0.5, 1.0]) | st.floats(0.0, 1.0),
)
some_logits = (
    st.sampled_from([0.0, -0.0, 1.0, 1.0000001, -1.0, LOG_HALF, -math.inf])  # equals, near equals, banned ones
    | st.floats(-30, 30, width=32)
    | st.floats(width=32, allow_nan=False, allow_infinity=False)
)
broken = st.sampled_from([math.nan, math.inf, -math.inf])


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, list[SamplingParams]]:
    """One to six rows of one to ninety logits; now and then a row that cannot be sampled from."""
    n_vocab, params = draw(st.integers(1, 90)), draw(st.lists(some_params, min_size=1, max_size=6))
    rows = [draw(st.lists(some_logits, min_size=n_vocab, max_size=n_vocab)) for _ in params]
    if draw(st.booleans()):
        rows[draw(st.integers(0, len(rows) - 1))][draw(st.integers(0, n_vocab - 1))] = draw(broken)
    return torch.tensor(rows), params


def check_with(u_B: torch.Tensor, logits_BV: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """Compare with `sample` at given random numbers."""
    alone = []
    for u, logits_V, one in zip(u_B, logits_BV, params, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("octavo.sampling.uniform", lambda generator, u=u: u[None])
            alone += draw_alone(logits_V[None], [one], 0)
    ids_B, ok_B = sample_batch(logits_BV, batch_params(params, "cpu"), u_B)
    assert ids_B.where(ok_B, -1).tolist() == alone


EDGES = [0.0, 0.25, 0.5, 0.75, 1 - 2**-53]


@example(batch=(torch.full((1, 3), -math.inf), [SamplingParams(top_k=2, top_p=0.5)]), u=0.0)
@example(batch=(torch.tensor([[0.0, LOG_HALF]]), [SamplingParams(temperature=1.0, min_p=0.5)]), u=0.9)
@example(batch=(torch.zeros(1, 4), [SamplingParams(temperature=1.0)]), u=0.9)
@example(batch=(torch.tensor([[-40.0, 0.0]] * 2), [SamplingParams(temperature=1), SamplingParams(top_p=0.5)]), u=0.0)
@settings(max_examples=80, deadline=None)
@given(batch=batches(), u=st.floats(0.0, 1.0, exclude_max=True))
def test_each_row_is_what_sample_draws(batch, u):
    logits_BV, params = batch
    before = logits_BV.clone()
    us = torch.tensor([*EDGES, u], dtype=torch.float64).repeat(len(params))
    repeated = [one for one in params for _ in range(len(EDGES) + 1)]
    check_with(us, logits_BV.repeat_interleave(len(EDGES) + 1, 0), repeated)
    check_with(us[: len(params)], logits_BV, params)
    assert torch.equal(logits_BV.nan_to_num(), before.nan_to_num())


def test_equal_after_the_temperature_is_equal():
    """Two neighbouring numbers become one when divided; then the lower id comes first at a nucleus' edge."""
    logits = 1.5 + torch.arange(8.0) * 2**-23
    lower, higher = -logits[1:], -logits[:-1]
    equal = lower / 1.4 == higher / 1.4
    assert equal.any()
    rows = torch.stack([lower, higher, torch.zeros(7)], 1)[equal]
    params = [SamplingParams(temperature=1.4, top_p=0.7)] * len(rows)
    u_B = torch.zeros(len(rows), dtype=torch.float64)
    check_with(u_B, rows, params)
    assert sample_batch(rows, batch_params(params, "cpu"), u_B)[0].tolist() == [0] * len(rows)


def few_values(n_rows: int, n_vocab: int) -> torch.Tensor:
    """Rows with many equal logits, and some banned tokens."""
    logits_BV = (torch.randn(n_rows, n_vocab) * 2).round()
    logits_BV[:, 1:].masked_fill_(logits_BV[:, 1:] == -2, -math.inf)
    return logits_BV


KINDS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "distinct": lambda b, v: torch.randn(b, v) * 3,
    "flat": lambda b, v: torch.randn(b, v) * 0.1,
    "few values": few_values,
    "equal": lambda b, v: torch.zeros(b, v),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_vocab", [1, 2, 63, 64, 65, 1025, 3001])
def test_all_combinations_of_options_side_by_side(n_vocab, kind):
    torch.manual_seed(n_vocab)
    params = [SamplingParams(**options) for options in COMBINATIONS]
    logits_BV = KINDS[kind](len(params), n_vocab)
    for seed in (0, 1000):
        alone = draw_alone(logits_BV, params, seed)
        assert draw_together(logits_BV, params, seed) == alone
        unsorted = [row for row, one in enumerate(params) if one.top_p == 1.0]  # then top_k looks for itself
        assert draw_together(logits_BV, params, seed, unsorted) == [alone[row] for row in unsorted]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_vocabulary(kind):
    torch.manual_seed(3)
    params = [SamplingParams(**options) for options in COMBINATIONS[::9]]
    logits_BV = KINDS[kind](len(params), 32_000)
    assert draw_together(logits_BV, params, 7) == draw_alone(logits_BV, params, 7)


def test_half_precision_logits_are_read_as_they_are():
    torch.manual_seed(0)
    logits_BV = torch.randn(5, 500).bfloat16()
    params = [SamplingParams(**options) for options in COMBINATIONS[60:65]]
    assert draw_together(logits_BV, params, 2) == draw_alone(logits_BV, params, 2)


@settings(max_examples=30, deadline=None)
@given(batch=batches(), seed=st.integers(0, 2**62), data=st.data())
def test_a_row_does_not_depend_on_its_neighbours(batch, seed, data):
    logits_BV, params = batch
    together = draw_together(logits_BV, params, seed)
    rows = data.draw(st.permutations(range(len(params))))
    assert draw_together(logits_BV, params, seed, rows) == [together[row] for row in rows]
    for row in rows:
        assert draw_together(logits_BV, params, seed, [row]) == [together[row]]


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_broken_rows_are_told_and_hurt_nobody(options):
    logits_BV = torch.randn(5, 8, generator=torch.Generator().manual_seed(4))
    params = [SamplingParams(**options)] * 5
    whole = draw_together(logits_BV, params, 9)
    logits_BV[0, 3], logits_BV[2, 7], logits_BV[3] = math.nan, math.inf, -math.inf
    assert draw_together(logits_BV, params, 9) == [-1, whole[1], -1, -1, whole[4]]


# ---------------------------------------- the random numbers


def test_uniforms_are_those_that_sample_draws():
    params = [SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=1)]
    ours, theirs = ([make_generator(5, index) for index in range(3)] for _ in range(2))
    for _ in range(3):
        u_B = uniforms(params, ours)
        assert (u_B.dtype, u_B.device.type) == (torch.float64, "cpu")
        assert u_B[0] == torch.rand(1, generator=theirs[0], dtype=torch.float64)
        sample(torch.zeros(4), params[2], theirs[2])
    assert torch.equal(ours[1].get_state(), theirs[1].get_state())  # greedy: left as it was
    assert torch.equal(ours[2].get_state(), theirs[2].get_state())


# ---------------------------------------- what the batch is asked for


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.1},
        {"frequency_penalty": 0.1},
        {"presence_penalty": 0.1},
        {"logit_bias": {1: 1.0}},
        {"logprobs": 0},
    ],
    ids=str,
)
def test_what_needs_the_host_is_refused(options):
    params = SamplingParams(**options)
    assert not samples_on_device(params)
    with pytest.raises(ValueError, match="host"):
        batch_params([SamplingParams(), params], "cpu")


def test_everything_else_is_taken():
    assert samples_on_device(SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.1, seed=1, stop="a", n=3))


def test_greedy_rows_ask_for_nothing():
    how = batch_params([SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.1)] * 2, "cpu")
    assert (how.draws, how.largest, how.top_p, how.min_p) == (False, 0, False, False)


# ---------------------------------------- nothing that the host waits for

aten = torch.ops.aten
# `.item()`, `bool()` and `int()` of a tensor, and all whose result's shape depends on values.
WAITING = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.nonzero_numpy,
    aten.masked_select, aten.unique_consecutive, aten._unique, aten._unique2, aten.unique_dim, aten.bincount,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Waited(Exception):
    """An operation for which the host would wait."""


class NeverWait(TorchDispatchMode):
    """Refuses operations that need a tensor's values on the host; notes the others."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        by_mask = packet in INDEXING and any(one is not None and one.dtype == torch.bool for one in args[1])
        if packet in WAITING or by_mask:
            raise Waited(str(func))
        self.names.add(packet.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.clone().__setitem__(x > 0, torch.ones(3)),
        lambda x: x.unique(),
        lambda x: sample(x, SamplingParams(), make_generator(0)),
    ],
)
def test_the_guard_refuses_what_waits(wait):
    with pytest.raises(Waited), NeverWait():
        wait(torch.ones(3))


def operations(options: list[dict[str, Any]]) -> set[str]:
    """What `sample_batch` runs, under a guard that refuses whatever waits."""
    params = [SamplingParams(**one) for one in options]
    how, u_B = batch_params(params, "cpu"), uniforms(params, [make_generator(0)] * len(params))
    with NeverWait() as guard:
        sample_batch(torch.randn(len(params), 200), how, u_B)
    return guard.names


def test_the_host_never_waits():
    assert {"sort", "cumsum"} <= operations(COMBINATIONS)


def test_what_nobody_uses_is_skipped():
    greedy = {"temperature": 0, "top_p": 0.5, "top_k": 3}
    assert not {"sort", "topk", "cumsum", "exp"} & operations([greedy, greedy])
    assert not {"sort", "topk"} & operations([greedy, {}, {"min_p": 0.5}])
    assert "sort" not in operations([greedy, {"top_k": 5, "min_p": 0.5}])


@pytest.mark.parametrize("options", [COMBINATIONS, [{}, {"top_k": 9}], [{}], [{"temperature": 0}]], ids=len)
def test_everything_lies_on_the_logits_device(options):
    """Meta tensors have a shape and no values: to need a value, or to mix devices, is an error."""
    params = [SamplingParams(**one) for one in options]
    u_B = uniforms(params, [make_generator(0)] * len(params))
    ids_B, ok_B = sample_batch(torch.empty(len(params), 200, device="meta"), batch_params(params, "meta"), u_B)
    assert (ids_B.device.type, ids_B.dtype, ids_B.shape) == ("meta", torch.int64, (len(params),))
    assert (ok_B.device.type, ok_B.dtype, ok_B.shape) == ("meta", torch.bool, (len(params),))


def test_mixed_devices_are_an_error():
    """The test above can fail."""
    params, u_B = [SamplingParams()], torch.zeros(1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="device"):
        sample_batch(torch.empty(1, 200, device="meta"), batch_params(params, "cpu"), u_B)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("kind", KINDS)
def test_a_card_draws_the_same_and_can_replay_it(kind):
    torch.manual_seed(8)
    params = [SamplingParams(**options) for options in COMBINATIONS]
    generators = [make_generator(3, row) for row in range(len(params))]
    logits_BV, u_B = KINDS[kind](len(params), 32_000), uniforms(params, generators, pinned=True)
    there_BV = logits_BV.cuda()
    sample_batch(there_BV, batch_params(params, "cuda"), u_B)  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        how = batch_params(params, "cuda")
        ids_B, ok_B = sample_batch(there_BV, how, u_B)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ids_B.tolist() == draw_alone(logits_BV, params, 3)
    assert ok_B.all()
    graph, u_there_B = torch.cuda.CUDAGraph(), u_B.cuda()
    with torch.cuda.graph(graph):
        replayed_B, _ = sample_batch(there_BV, how, u_there_B)
    graph.replay()
    assert torch.equal(replayed_B, ids_B)
