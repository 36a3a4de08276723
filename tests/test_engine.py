"""The engine: every way of scheduling a sequence gives the tokens it would have had alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from conftest import tiny_model
from octavo.engine import Engine, Event
from octavo.errors import OctavoError, OptionError, PromptError
from octavo.model import Mixtral
from octavo.sampling import History, SamplingParams, make_generator, sample

GREEDY = SamplingParams(temperature=0, max_tokens=12)


_AHEAD = [False]  # of the engines that are made now


def make_engine(model: Mixtral, **options: int) -> Engine:
    return Engine(model, ahead=_AHEAD[-1], **options)


@pytest.fixture(scope="module", params=[False, True], ids=["by-host", "ahead"])
def ahead(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both ways of decoding."""
    _AHEAD.append(request.param)
    yield request.param
    _AHEAD.pop()


@pytest.fixture(scope="module", params=[None, 5], ids=["full", "window-5"])
def model(request: pytest.FixtureRequest, ahead: bool) -> Mixtral:
    return tiny_model(seed=3, sliding_window=request.param)


@dataclass
class Told:
    """What the events said of one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    reason: str | None = None
    error: Exception | None = None


def take(events: Sequence[Event], told: dict[int, Told]) -> None:
    for event in events:
        one = told.setdefault(event.seq_id, Told())
        assert one.reason is None, "an event after the finish"
        if event.token_id is not None:
            one.tokens.append(event.token_id)
        if event.logprobs is not None:
            one.logprobs.append(dict(event.logprobs.top))
        one.reason, one.error = event.finish_reason, event.error


def drain(engine: Engine, told: dict[int, Told] | None = None) -> dict[int, Told]:
    told = {} if told is None else told
    for _ in range(2000):
        if not engine.has_work:
            return told
        take(engine.step(), told)
    raise AssertionError("the engine does not come to an end")


def alone(model: Mixtral, prompt: Sequence[int], params: SamplingParams, **options: int) -> Told:
    engine = make_engine(model, max_batch_size=1)
    seq_id = engine.add(prompt, params, **options)
    return drain(engine)[seq_id]


def slow(model: Mixtral, prompt: Sequence[int], params: SamplingParams, n: int) -> list[int]:
    """No cache, no batch: the whole text through the model again for every token."""
    ids, generator = list(prompt), make_generator(params.seed)
    history = History(prompt, model.args.vocab_size)
    for _ in range(n):
        token = sample(model(torch.tensor([ids]))[0, -1], params, generator, history)
        ids.append(token)
        history.append(token)
    return ids[len(prompt) :]


def prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)

    def one() -> list[int]:
        length = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(101, (length,), generator=generator).tolist()

    return [one() for _ in range(count)]


def assert_same(ours: Told, theirs: Told) -> None:
    assert ours.tokens == theirs.tokens
    assert ours.reason == theirs.reason
    for mine, yours in zip(ours.logprobs, theirs.logprobs, strict=True):
        shared = mine.keys() & yours.keys()
        assert len(shared) >= len(mine) - 1  # near ties at the edge of the top k
        assert all(abs(mine[i] - yours[i]) < 1e-4 for i in shared)


VARIED = [
    replace(GREEDY, logprobs=20),
    SamplingParams(temperature=0.9, seed=5, max_tokens=20, logprobs=5),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.9, seed=6, max_tokens=7),
    SamplingParams(temperature=0.8, repetition_penalty=1.2, presence_penalty=0.5, seed=7, max_tokens=15),
    SamplingParams(temperature=0, frequency_penalty=1.0, max_tokens=25, logprobs=20),
]


# ---------------------------------------- equalities


@pytest.mark.parametrize("params", VARIED, ids=range(len(VARIED)))
def test_alone_equals_the_model_without_a_cache(model, params):
    for prompt in prompts(3, seed=1):
        told = alone(model, prompt, params)
        assert told.tokens == slow(model, prompt, params, params.max_tokens)
        assert told.reason == "length"


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_batched_equals_alone(model, batch):
    jobs = [(prompt, VARIED[i % len(VARIED)]) for i, prompt in enumerate(prompts(9, seed=2))]
    engine = make_engine(model, max_batch_size=batch)
    ids = [engine.add(prompt, params) for prompt, params in jobs]
    told = drain(engine)
    for seq_id, (prompt, params) in zip(ids, jobs, strict=True):
        assert_same(told[seq_id], alone(model, prompt, params))


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunked_prefill_equals_one_chunk(model, chunk):
    for prompt in prompts(4, seed=4, longest=40):
        engine = make_engine(model, prefill_chunk=chunk)
        seq_id = engine.add(prompt, VARIED[0])
        assert_same(drain(engine)[seq_id], alone(model, prompt, VARIED[0]))


def test_replies_to_one_prompt_share_its_prefill(model):
    prompt, params = prompts(1, seed=9)[0], SamplingParams(temperature=1.0, seed=40, max_tokens=6)
    engine = make_engine(model, max_batch_size=4)
    with reads(model) as lengths:
        ids = [engine.add(prompt, params, index=index) for index in range(6)]
        told = drain(engine)
    # Six replies, four rows: the first four share a prefill, the last two (in fewer rows than four) another.
    assert sum(length for length in lengths if length > 1) == 2 * len(prompt)
    for index, seq_id in enumerate(ids):
        assert_same(told[seq_id], alone(model, prompt, replace(params, seed=40 + index)))
    assert len({tuple(told[seq_id].tokens) for seq_id in ids}) == 6


def test_replies_that_end_with_their_first_token(model):
    engine = make_engine(model, max_batch_size=3)
    ids = [engine.add([5, 6, 7], replace(GREEDY, max_tokens=1)) for _ in range(5)]
    told = drain(engine)
    assert all(told[i].tokens == alone(model, [5, 6, 7], GREEDY).tokens[:1] for i in ids)


def test_unseeded_sequences_differ(model):
    engine = make_engine(model)
    ids = [engine.add([1, 2], SamplingParams(temperature=2.0, max_tokens=12)) for _ in range(2)]
    told = drain(engine)
    assert told[ids[0]].tokens != told[ids[1]].tokens


# ---------------------------------------- scheduling


@contextmanager
def reads(model: Mixtral) -> Iterator[list[int]]:
    """Tokens per row of every forward made meanwhile."""
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    try:
        yield lengths
    finally:
        handle.remove()


def test_first_come_first_served(model):
    engine = make_engine(model, max_batch_size=2)
    ids = [engine.add(prompt, GREEDY) for prompt in prompts(6, seed=3)]
    order: list[int] = []
    while engine.has_work:
        order += [event.seq_id for event in engine.step() if event.seq_id not in order]
    assert order == ids


def test_a_long_prompt_does_not_hold_up_the_others(model):
    engine = make_engine(model, prefill_chunk=4)
    first = engine.add([1, 2, 3], replace(GREEDY, max_tokens=30))
    assert [event.seq_id for event in engine.step()] == [first]
    long = engine.add(list(range(40)), GREEDY)
    for step in range(10):
        seen = [event.seq_id for event in engine.step()]
        assert seen.count(first) == 1
        assert (long in seen) == (step == 9)


def test_events_time_the_prompt(model):
    engine = make_engine(model, prefill_chunk=2)
    engine.add([1, 2, 3], GREEDY)
    events = [event for _ in range(4) for event in engine.step()]
    assert events[0].prefill_seconds > 0
    assert [event.prefill_seconds for event in events[1:]] == [0.0] * (len(events) - 1)


def test_finish_reasons(model):
    free = alone(model, [4, 2], replace(GREEDY, max_tokens=9))
    assert (len(free.tokens), free.reason) == (9, "length")
    third = free.tokens[2]
    upto = free.tokens[: free.tokens.index(third) + 1]
    for told in (
        alone(model, [4, 2], replace(GREEDY, stop_ids=(third,))),
        alone(model, [4, 2], GREEDY, stop_ids=[third]),
    ):
        assert (told.tokens, told.reason) == (upto, "stop")


def test_a_stop_id_as_the_last_token_allowed_is_a_stop(model):
    first = alone(model, [4, 2], GREEDY).tokens[0]
    told = alone(model, [4, 2], replace(GREEDY, max_tokens=1, stop_ids=(first,)))
    assert (told.tokens, told.reason) == ([first], "stop")


@pytest.mark.parametrize("window", [None, 2, 3])
def test_a_context_of_three_tokens(window):
    model = tiny_model(max_seq_len=3, sliding_window=window)
    for prompt, n in (([7], 2), ([7, 8], 1)):
        told = alone(model, prompt, GREEDY)
        assert (len(told.tokens), told.reason) == (n, "length")
        assert told.tokens == slow(model, prompt, GREEDY, n)
    with pytest.raises(PromptError, match="3 tokens; the model's context holds 3"):
        make_engine(model).add([7, 8, 9], GREEDY)


def test_without_max_tokens_the_context_fills_up():
    model = tiny_model(max_seq_len=40)
    assert len(alone(model, [1] * 11, SamplingParams(max_tokens=None, seed=0)).tokens) == 29


@pytest.mark.parametrize(
    ("ids", "params", "error", "words"),
    [
        ([], GREEDY, PromptError, "empty"),
        ([5, 101], GREEDY, PromptError, "101; expected 0 to 100"),
        ([-1], GREEDY, PromptError, "-1; expected 0 to 100"),
        ([1] * 300, GREEDY, PromptError, "300 tokens; the model's context holds 256"),
        ([1], SamplingParams(logit_bias={101: 1}), OptionError, "101; expected 0 to 100"),
    ],
)
def test_bad_input_is_refused_before_it_costs_anything(model, ids, params, error, words):
    engine = make_engine(model)
    with pytest.raises(error, match=words):
        engine.add(ids, params)
    assert not engine.has_work
    assert engine.step() == []


@pytest.mark.parametrize("name", ["max_batch_size", "prefill_chunk"])
def test_sizes_must_be_positive(model, name):
    with pytest.raises(OptionError, match=name):
        make_engine(model, **{name: 0})


# ---------------------------------------- cancelling, in any order


def test_cancel_waiting_prefilling_and_running(model):
    jobs = prompts(6, seed=6, longest=20)
    jobs[2] = list(range(30))
    engine = make_engine(model, max_batch_size=3, prefill_chunk=8)
    ids = [engine.add(prompt, GREEDY) for prompt in jobs]
    told: dict[int, Told] = {}
    while ids[1] not in told:
        take(engine.step(), told)
    take(engine.step(), told)  # the third is in the middle of its prompt
    assert ids[2] not in told
    for gone in (ids[0], ids[2], ids[4]):
        engine.cancel(gone)
        engine.cancel(gone)
    engine.cancel(999)
    drain(engine, told)
    assert ids[2] not in told
    assert ids[4] not in told
    assert told[ids[0]].reason is None
    for i in (1, 3, 5):
        assert_same(told[ids[i]], alone(model, jobs[i], GREEDY))


def test_cancel_from_within_a_step(model, ahead):
    jobs = prompts(3, seed=8)
    engine = make_engine(model)
    ids = [engine.add(prompt, GREEDY) for prompt in jobs]
    told: dict[int, Told] = {}
    for _ in range(5):
        take(engine.step(), told)
    handle = model.register_forward_pre_hook(lambda *_: engine.cancel(ids[0]))
    try:
        events = engine.step()
    finally:
        handle.remove()
    # A hook is told nothing by a step ahead, so one of these is looked at first.
    assert [event.seq_id for event in events] == ids[1:] * (1 + ahead)
    take(events, told)
    drain(engine, told)
    for i in (1, 2):
        assert_same(told[ids[i]], alone(model, jobs[i], GREEDY))


MACHINE_PARAMS = (
    replace(GREEDY, max_tokens=3),
    replace(GREEDY, max_tokens=9),
    SamplingParams(temperature=1.0, seed=2, max_tokens=6),
    SamplingParams(temperature=1.0, seed=3, max_tokens=1),
)


@cache
def expected(window: int | None, which: int, kind: int) -> Told:
    model = machine_model(window)
    return alone(model, prompts(6, seed=12, longest=14)[which], MACHINE_PARAMS[kind])


@cache
def machine_model(window: int | None) -> Mixtral:
    return tiny_model(seed=4, n_layers=1, sliding_window=window)


class Schedule(RuleBasedStateMachine):
    """Adds, cancels and steps in any order; whoever finishes has the tokens it would have had alone."""

    window: int | None = None
    ahead = False

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(machine_model(self.window), max_batch_size=3, prefill_chunk=4, ahead=self.ahead)
        self.jobs: dict[int, tuple[int, int]] = {}
        self.told: dict[int, Told] = {}
        self.cancelled: dict[int, int] = {}

    @rule(which=st.integers(0, 5), kind=st.integers(0, len(MACHINE_PARAMS) - 1))
    def add(self, which: int, kind: int) -> None:
        prompt = prompts(6, seed=12, longest=14)[which]
        self.jobs[self.engine.add(prompt, MACHINE_PARAMS[kind])] = (which, kind)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.jobs)))
        self.engine.cancel(seq_id)
        if seq_id not in self.told or self.told[seq_id].reason is None:
            self.cancelled.setdefault(seq_id, len(self.told.get(seq_id, Told()).tokens))

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            take(self.engine.step(), self.told)

    @invariant()
    def tokens_are_those_of_alone(self) -> None:
        for seq_id, told in self.told.items():
            theirs = expected(self.window, *self.jobs[seq_id])
            assert told.tokens == theirs.tokens[: len(told.tokens)]
            if told.reason:
                assert (told.tokens, told.reason) == (theirs.tokens, theirs.reason)

    def teardown(self) -> None:
        drain(self.engine, self.told)
        self.tokens_are_those_of_alone()
        for seq_id in self.jobs:
            if seq_id in self.cancelled:
                assert len(self.told.get(seq_id, Told()).tokens) == self.cancelled[seq_id]
            else:
                assert self.told[seq_id].reason == "length"


class RollingSchedule(Schedule):
    window = 4


class AheadSchedule(Schedule):
    ahead = True


class RollingAheadSchedule(RollingSchedule):
    ahead = True


_settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSchedule = Schedule.TestCase
TestRollingSchedule = RollingSchedule.TestCase
TestAheadSchedule = AheadSchedule.TestCase
TestRollingAheadSchedule = RollingAheadSchedule.TestCase
for _machine in (TestSchedule, TestRollingSchedule, TestAheadSchedule, TestRollingAheadSchedule):
    _machine.settings = _settings
del _machine


# ---------------------------------------- failures


@contextmanager
def poisoned(model: Mixtral, token: int) -> Iterator[None]:
    """Within, this token's embedding is NaN."""
    row = model.tok_embeddings.weight[token].clone()
    model.tok_embeddings.weight[token] = math.nan
    try:
        yield
    finally:
        model.tok_embeddings.weight[token] = row


def test_nan_ends_one_sequence_and_taints_no_other(model):
    jobs = [p for p in prompts(12, seed=10) if 77 not in p][:6]
    params = replace(GREEDY, logit_bias={77: -100.0})
    with poisoned(model, 77):
        engine = make_engine(model, max_batch_size=2)
        bad = [engine.add([3] * 40 + [77, 5], params)]
        ids = [engine.add(prompt, params) for prompt in jobs[:3]]
        bad.append(engine.add([77], params))
        ids += [engine.add(prompt, params) for prompt in jobs[3:]]
        told = drain(engine)
        for seq_id in bad:
            assert (told[seq_id].tokens, told[seq_id].reason) == ([], "error")
            assert isinstance(told[seq_id].error, OctavoError)
        for seq_id, prompt in zip(ids, jobs, strict=True):
            assert_same(told[seq_id], alone(model, prompt, params))


@contextmanager
def failing(model: Mixtral, error: BaseException, layer: int = 1) -> Iterator[None]:
    """Within, the model fails half-way through its layers."""

    def fail(*_: object) -> None:
        raise error

    handle = model.layers[layer].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def running(model: Mixtral, jobs: list[list[int]]) -> tuple[Engine, list[int], dict[int, Told]]:
    """Two rows being decoded, the others waiting."""
    engine = make_engine(model, max_batch_size=2)
    ids = [engine.add(prompt, GREEDY) for prompt in jobs]
    told: dict[int, Told] = {}
    for _ in range(4):
        take(engine.step(), told)
    return engine, ids, told


def test_a_failing_model_ends_what_was_in_the_cache_only(model):
    jobs = prompts(4, seed=11)
    engine, ids, told = running(model, jobs)
    broken = RuntimeError("disk on fire")
    with failing(model, broken):
        events = engine.step()
    last = [(event.seq_id, event.finish_reason, event.error) for event in events if event.finish_reason]
    assert last == [(seq_id, "error", broken) for seq_id in ids[:2]]
    drain(engine, told)
    for i in (2, 3):
        assert_same(told[ids[i]], alone(model, jobs[i], GREEDY))


def test_an_interrupted_step_tells_the_next_time(model):
    jobs = prompts(4, seed=11)
    engine, ids, told = running(model, jobs)
    with failing(model, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.cancel(ids[0])
    drain(engine, told)
    assert told[ids[0]].reason is None
    assert told[ids[1]].reason == "error"
    assert "interrupted" in str(told[ids[1]].error)
    for i in (2, 3):
        assert_same(told[ids[i]], alone(model, jobs[i], GREEDY))


def test_a_failing_model_leaves_no_nan_behind(model):
    short, long = [5, 6, 7], [9] * 60
    with poisoned(model, 77):
        engine = make_engine(model, max_batch_size=2)
        engine.add([3] * 20 + [77], GREEDY)
        with failing(model, RuntimeError("disk on fire")):
            engine.step()
    told: dict[int, Told] = {}
    ids = [engine.add(prompt, GREEDY) for prompt in (short, long)]
    drain(engine, told)
    for seq_id, prompt in zip(ids, (short, long), strict=True):
        assert_same(told[seq_id], alone(model, prompt, GREEDY))
