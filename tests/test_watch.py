"""Watching the routing: each sequence gets what `record` takes down of it alone, whoever else is computed."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_model
from octavo.engine import Engine
from octavo.errors import OptionError
from octavo.experts.trace import record
from octavo.llm import LLM
from octavo.sampling import SamplingParams
from octavo.watch import RoutingWatch

MODEL = tiny_model()


def engine(**options: object) -> Engine:
    return Engine(MODEL, **options)  # type: ignore[arg-type]


def params(n: int, seed: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=n, seed=seed, temperature=1.0)


def run(one: Engine) -> dict[int, list[int]]:
    """Step to the end; the tokens by sequence."""
    said: dict[int, list[int]] = {}
    while one.has_work:
        for event in one.step():
            assert event.token_id is not None
            said.setdefault(event.seq_id, []).append(event.token_id)
    return said


def recorded(prompt: list[int], wanted: SamplingParams, **options: object) -> np.ndarray:
    """What the routers chose for one sequence alone."""
    alone = engine(**options)
    alone.add(prompt, wanted)
    with record(MODEL) as recording:
        run(alone)
    return recording.trace().topk_ids


def test_weights_and_logits_where_they_are_asked_for() -> None:
    one, prompts = engine(prefill_chunk=3), ([1, 2, 3, 4, 5, 6, 7], [9, 8])
    watch, plain = RoutingWatch(one, weights=True, logits=True), RoutingWatch(one)
    with watch.catch(), plain.catch():
        ids = [one.add(prompt, params(4)) for prompt in prompts]
        for seq_id in ids:
            watch.watch(seq_id)
            plain.watch(seq_id)
    nothing = watch.routed(ids[0])
    assert [part.shape for part in nothing if part is not None] == [(0, 2, 2), (0, 2, 2), (0, 2, 8)]
    run(one)
    for seq_id, prompt in zip(ids, prompts, strict=True):
        alone = engine(prefill_chunk=3)
        alone.add(prompt, params(4))
        with record(MODEL) as recording:
            run(alone)
        found, whole = watch.routed(seq_id), recording.trace()
        np.testing.assert_array_equal(found.ids, whole.topk_ids)
        np.testing.assert_allclose(found.weights, whole.topk_weights, atol=1e-5)
        np.testing.assert_allclose(found.logits, whole.logits, atol=1e-4)
        assert plain.routed(seq_id)[1:] == (None, None)
        watch.forget(seq_id)
        plain.forget(seq_id)
    assert n_hooks() == 0


def n_hooks() -> int:
    return sum(len(router._forward_hooks) for router in MODEL.routers())


def test_one_sequence_as_recorded() -> None:
    one, prompt = engine(prefill_chunk=3), [1, 2, 3, 4, 5, 6, 7]
    watch = RoutingWatch(one)
    seq_id = one.add(prompt, params(6))
    watch.watch(seq_id)
    with record(MODEL) as recording:
        run(one)
    ids = watch.ids(seq_id)
    assert ids.dtype == np.int16
    assert ids.shape == (7 + 5, 2, 2)
    np.testing.assert_array_equal(ids, recording.trace().topk_ids)
    np.testing.assert_array_equal(watch.ids(seq_id, 4), ids[4:])
    watch.forget(seq_id)


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=12), min_size=1, max_size=5),
    lengths=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    rows=st.integers(1, 4),
    chunk=st.integers(1, 8),
)
def test_batched_as_alone(prompts: list[list[int]], lengths: list[int], rows: int, chunk: int) -> None:
    prompts = [[at, *prompt] for at, prompt in enumerate(prompts)]  # the same prompt twice would be computed once
    one = engine(max_batch_size=rows, prefill_chunk=chunk)
    watch = RoutingWatch(one)
    wanted = [params(n, seed) for seed, n in enumerate(lengths)]
    ids = [one.add(prompt, sampling) for prompt, sampling in zip(prompts, wanted, strict=False)]
    for seq_id in ids:
        watch.watch(seq_id)
    run(one)
    found = [watch.ids(seq_id) for seq_id in ids]
    for seq_id in ids:
        watch.forget(seq_id)
    for one_found, prompt, sampling in zip(found, prompts, wanted, strict=False):
        np.testing.assert_array_equal(one_found, recorded(prompt, sampling, prefill_chunk=chunk))


def test_a_prompt_known_before_is_not_computed() -> None:
    one, prompt = engine(prefix_bytes=1 << 20), list(range(20))
    watch = RoutingWatch(one)
    one.add(prompt, params(2))
    run(one)
    seq_id = one.add([*prompt, 30, 31], params(3))
    watch.watch(seq_id)
    cached = next(event.cached_tokens for event in iter_events(one) if event.seq_id == seq_id)
    assert cached > 0
    ids = watch.ids(seq_id)
    watch.forget(seq_id)
    whole = recorded([*prompt, 30, 31], params(3))
    assert len(ids) == len(whole) - cached
    np.testing.assert_array_equal(ids, whole[cached:])


def iter_events(one: Engine) -> list:
    events = []
    while one.has_work:
        events += one.step()
    return events


def test_only_what_is_watched_and_no_hooks_else() -> None:
    one = engine()
    watch = RoutingWatch(one)
    first, second = one.add([1, 2], params(8)), one.add([3, 4], params(8))
    assert n_hooks() == 0
    watch.watch(second)
    assert n_hooks() == 2
    one.step()
    assert len(watch.ids(first)) == 0
    so_far = len(watch.ids(second))
    assert so_far > 0
    one.step()
    assert len(watch.ids(second)) == so_far + 1
    watch.forget(second)
    watch.forget(second)
    assert n_hooks() == 0
    one.step()
    assert len(watch.ids(second)) == 0


def test_caught_before_it_has_a_name() -> None:
    one = engine()
    watch = RoutingWatch(one)
    with watch.catch():
        first, second = one.add([1, 2, 3], params(4)), one.add([4, 5], params(4))
        one.step()
        watch.watch(first)
    run(one)
    ids = watch.ids(first)
    assert len(watch.ids(second)) == 0
    watch.watch(second)
    assert len(watch.ids(second)) == 0  # what was not watched in the end is dropped
    watch.forget(first)
    watch.forget(second)
    assert n_hooks() == 0
    np.testing.assert_array_equal(ids, recorded([1, 2, 3], params(4)))


def test_a_catch_drops_only_what_none_still_catches() -> None:
    one = engine()
    watch = RoutingWatch(one)
    with watch.catch():
        early = one.add([1, 2, 3], params(9))
        one.step()
        with watch.catch():
            late = one.add([4, 5, 6], params(9))
            one.step()
        assert watch._caught.keys() == {early, late}  # the outer one may yet ask for either
    assert not watch._caught
    assert n_hooks() == 0


def test_other_forwards_are_not_a_sequence() -> None:
    import torch

    one = engine()
    watch = RoutingWatch(one)
    seq_id = one.add([1, 2, 3], params(3))
    watch.watch(seq_id)
    run(one)
    before = len(watch.ids(seq_id))
    with torch.inference_mode():
        MODEL(torch.tensor([[1, 2, 3, 4, 5, 6, 7]]))
    assert len(watch.ids(seq_id)) == before
    watch.forget(seq_id)


def test_threads_watch_while_the_engine_runs() -> None:
    """Hooks that come and go in the middle of forwards cost no token, and what is kept is a piece of the whole."""
    one, prompt, wanted = engine(), [1, 2, 3, 4], params(200)
    watch = RoutingWatch(one)
    whole = recorded(prompt, wanted)
    seq_id = one.add(prompt, wanted)
    over, pieces, errors = threading.Event(), [], []

    def look() -> None:
        try:
            while not over.is_set():
                watch.watch(seq_id)
                ids = watch.ids(seq_id)
                enough = time.monotonic() + 0.02
                while len(ids) < 3 and not over.is_set() and time.monotonic() < enough:
                    ids = watch.ids(seq_id)
                pieces.append(ids)
                watch.forget(seq_id)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=look)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        said = run(one)
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not errors
    alone = engine()
    alone.add(prompt, wanted)
    assert list(run(alone).values()) == list(said.values())
    rows = [row.tobytes() for row in whole]
    found = [piece for piece in pieces if len(piece)]
    assert found
    for piece in found:
        bytes_of = [row.tobytes() for row in piece]
        assert any(rows[at : at + len(bytes_of)] == bytes_of for at in range(len(rows)))
    assert n_hooks() == 0


def test_the_shipped_model_says_the_same_when_watched() -> None:
    """With compiled kernels the hooks take a block apart; its tokens stay what they are."""
    llm = LLM.load("menny")
    messages = [{"role": "user", "content": "What is a router?"}]
    with llm.stream(messages, seed=1, max_tokens=30) as stream:
        unwatched = [chunk.token_ids for chunk in stream]
    watch = RoutingWatch(llm)
    with watch.catch(), llm.stream(messages, seed=1, max_tokens=30) as stream:
        assert [chunk.token_ids for chunk in stream] == unwatched


def test_a_dense_model_has_no_routing() -> None:
    with pytest.raises(OptionError, match="dense"):
        RoutingWatch(Engine(tiny_model(moe=None)))
