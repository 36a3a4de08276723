"""The worker: requests from many threads and event loops, each with the reply it would have had alone."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.completion import Completion
from octavo.errors import OptionError
from octavo.llm import LLM
from octavo.serve.ticket import Ticket, Update
from octavo.serve.worker import Draining, QueueFull, Worker
from workers import (
    LONG,
    PROMPTS,
    ROWS,
    alone,
    ask,
    assert_idle,
    assert_same,
    assert_same_after,
    assert_whole,
    read,
    reference,
    shipped,
    until,
    watching,
    working,
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return shipped()


# ---------------------------------------- the same replies


def test_threads_and_event_loops_get_the_replies_they_would_have_alone(llm: LLM) -> None:
    expected = [alone(prompt, 16) for prompt in range(len(PROMPTS))]

    def in_a_thread(worker: Worker, prompt: int) -> tuple[list[Update], Completion]:
        ticket = worker.submit(ask(llm, prompt, max_tokens=16, logprobs=2), key=f"thread {prompt % 2}")
        return list(ticket), ticket.result

    async def in_a_loop(worker: Worker) -> list[tuple[list[Update], Completion]]:
        async def one(prompt: int) -> tuple[list[Update], Completion]:
            ticket = worker.submit(ask(llm, prompt, max_tokens=16), key="loop")
            return await read(ticket), ticket.result

        return await asyncio.gather(*map(one, range(len(PROMPTS))))

    with working(llm) as worker, ThreadPoolExecutor(len(PROMPTS) + 1) as pool:
        threads = [pool.submit(in_a_thread, worker, prompt) for prompt in range(len(PROMPTS))]
        loop = pool.submit(asyncio.run, in_a_loop(worker))
        for replies in ([thread.result() for thread in threads], loop.result()):
            for (updates, result), own in zip(replies, expected, strict=True):
                assert_same(result, own)
                assert_whole(updates, result)
                assert len(updates) > 1, "a reply that came in one piece is no stream"


def test_several_replies_to_one_prompt(llm: LLM) -> None:
    options = {"temperature": 0.9, "seed": 3, "n": 11, "logprobs": 1}  # more than there are rows
    with working(llm) as worker:
        ticket = worker.submit(ask(llm, max_tokens=8, **options))
        updates = list(ticket)
        assert {update.index for update in updates} == set(range(11))
        assert_whole(updates, ticket.result)
        assert len({choice.text for choice in ticket.result.choices}) > 1
        assert worker.stats().finished == {"stop": 0, "length": 1, "cancelled": 0, "error": 0}


def test_a_ticket_is_asked_for_its_result_too_early_and_read_to_its_end_twice(llm: LLM) -> None:
    worker = Worker(llm)
    ticket = worker.submit(ask(llm, max_tokens=2))
    with pytest.raises(RuntimeError, match="not finished"):
        _ = ticket.result
    assert ticket.request is None
    assert not ticket.over
    with worker:
        (*_, last) = ticket
        assert ticket.over
        assert last.chunk.finish_reason == "length"
        assert list(ticket) == []
        assert ticket.request is not None
        assert ticket.request.completion() == ticket.result


def test_time_in_the_queue_is_part_of_the_time_to_the_first_token(llm: LLM) -> None:
    worker = Worker(llm)
    ticket = worker.submit(ask(llm, max_tokens=2))
    time.sleep(0.05)
    with worker:
        list(ticket)
        assert ticket.result.timings.time_to_first_token > 0.05
        assert worker.stats().first_token.total > 0.05


def test_without_a_tokenizer_the_token_ids_come_as_they_are(llm: LLM) -> None:
    mute = LLM(llm.model, None)
    expected = LLM(reference().model, None).generate([1, 5, 7], temperature=0, **LONG | {"max_tokens": 6})
    with working(mute) as worker, watching(mute, lambda ids: time.sleep(0.02)):
        ticket = worker.submit(mute.prepare([1, 5, 7], temperature=0, **LONG | {"max_tokens": 6}))
        updates = list(ticket)
        assert updates[0].chunk.finish_reason is None
        assert_whole(updates, ticket.result)
        assert ticket.result.choices == expected.choices


# ---------------------------------------- readers


def test_what_a_slow_reader_misses_comes_in_one_piece(llm: LLM) -> None:
    with working(llm) as worker:
        slow = worker.submit(ask(llm, 3, n=2, max_tokens=40))
        quick = worker.submit(ask(llm, 4))
        (first, *_) = (next(slow), list(quick))
        until(lambda: slow.over)
        updates = [first, *slow]
        assert len(updates) <= 1 + 2
        assert_whole(updates, slow.result)
        assert_same(slow.result, alone(3, 40, n=2))
        assert_same(quick.result, alone(4, 16))


def test_one_of_several_replies_does_not_keep_a_slow_reader_from_the_others(llm: LLM) -> None:
    with working(llm) as worker:
        ticket = worker.submit(ask(llm, n=3, max_tokens=60, temperature=1.0, seed=1))
        job, indices = ticket._job, []
        for _ in range(6):
            until(lambda: all(seen is not state for seen, state in zip(job.seen, job.state, strict=True)))
            indices.append(next(ticket).index)
        assert indices == [0, 1, 2] * 2
        ticket.cancel()


def test_a_loop_is_woken_at_most_once_a_step(llm: LLM) -> None:
    async def everybody(worker: Worker) -> int:
        loop, n_woken = asyncio.get_running_loop(), 0
        call = loop.call_soon_threadsafe

        def counted(*args: object) -> object:
            nonlocal n_woken
            n_woken += 1
            return call(*args)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        n_updates = sum(map(len, await asyncio.gather(*(read(worker.submit(ask(llm, i, n=2))) for i in range(8)))))
        assert n_updates > 2 * n_woken > 0
        return n_woken

    with working(llm) as worker:
        n_woken = asyncio.run(everybody(worker))
        assert n_woken <= worker.stats().steps


def test_waiting_with_a_time_limit_again_and_again_loses_nothing_and_keeps_nothing(llm: LLM) -> None:
    async def impatient(worker: Worker) -> list[Update]:
        ticket, updates = worker.submit(ask(llm, 2)), []
        for _ in range(50):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(ticket), 0.0005)
        assert len(ticket._job.waiters) <= 1
        worker.start()
        while True:
            try:
                updates.append(await asyncio.wait_for(anext(ticket), 0.004))
            except TimeoutError:
                continue
            except StopAsyncIteration:
                assert_whole(updates, ticket.result)
                return updates

    worker = Worker(llm)
    assert asyncio.run(impatient(worker))
    worker.stop()


# ---------------------------------------- cancelled and forgotten


def test_cancelled_tickets_end_where_they_are(llm: LLM) -> None:
    with working(llm) as worker:
        tickets = [worker.submit(ask(llm, i, **LONG)) for i in range(ROWS + 2)]
        next(tickets[0])
        for ticket in tickets[::-1]:  # those that wait first
            ticket.cancel()
        for ticket in tickets:
            updates = list(ticket)
            assert updates[-1].chunk.finish_reason == ticket.result.finish_reason == "cancelled"
            assert updates[-1].chunk.usage == ticket.result.usage
            ticket.cancel()  # of what is over nothing comes
        assert tickets[0].result.text
        assert (tickets[-1].request, tickets[-1].result.text) == (None, "")
        assert_idle(worker)
        assert_same_after(worker)
        assert worker.stats().finished["cancelled"] == ROWS + 2
        assert tickets[-1].result.to_dict()["usage"]["prompt_tokens"] == len(tickets[-1]._job.prepared.ids)


def test_leaving_the_block_cancels(llm: LLM) -> None:
    with working(llm) as worker:
        with worker.submit(ask(llm, **LONG)) as ticket:
            next(ticket)
        until(lambda: ticket.over)
        assert ticket.result.finish_reason == "cancelled"
        assert 0 < len(ticket.result.token_ids) < 400


def test_200_that_vanish_leave_nothing(llm: LLM) -> None:
    rows: list[tuple[int, int]] = []  # steps before each forward, and its sequences
    go = threading.Event()
    go.set()

    def look(ids_BT: torch.Tensor) -> None:
        assert go.wait(20)
        rows.append((worker._steps, len(ids_BT)))

    with working(llm, max_queue=200) as worker, watching(llm, look):
        stays = worker.submit(ask(llm, 1, max_tokens=16))
        tickets = [worker.submit(ask(llm, i, **LONG)) for i in range(200)]
        next(stays)
        next(tickets[ROWS - 2])
        jobs = [weakref.ref(ticket._job) for ticket in tickets]
        replies = [weakref.ref(reply) for ticket in tickets[: ROWS - 1] for reply in ticket._job.replies]
        assert len(replies) == ROWS - 1
        go.clear()
        n_steps = worker.stats().steps
        del tickets
        go.set()
        list(stays)
        assert_same(stays.result, alone(1, 16))
        assert (n_steps, ROWS) in rows
        # The step under way may have ended before it was held.
        assert {size for step, size in rows if step > n_steps + 1} == {1}
        gc.collect()
        assert [one() for one in (*jobs, *replies)] == [None] * (200 + ROWS - 1)


def test_tasks_that_are_cancelled_or_whose_loop_is_closed_end_their_tickets(llm: LLM) -> None:
    async def forgetful(worker: Worker) -> None:
        task = asyncio.ensure_future(read(worker.submit(ask(llm, **LONG))))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    go = threading.Event()
    go.set()
    with working(llm) as worker, watching(llm, lambda ids: go.wait(20)):
        asyncio.run(forgetful(worker))
        until(lambda: not worker._open)
        go.clear()
        loop = asyncio.new_event_loop()
        task = loop.create_task(read(worker.submit(ask(llm, **LONG))))
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()
        go.set()
        until(lambda: not worker._open)
        assert worker.stats().finished["cancelled"] == 2
        assert not task.done()
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # that is what was wanted


# ---------------------------------------- bounds and turns


@pytest.mark.parametrize("n", [1, 3])
def test_a_full_queue_refuses(n: int, llm: LLM) -> None:
    worker = Worker(llm, max_queue=3)
    room = 3 + -(-ROWS // n)
    tickets = [worker.submit(ask(llm, i, max_tokens=3, n=n)) for i in range(room)]
    with pytest.raises(QueueFull) as caught:
        worker.submit(ask(llm))
    assert caught.value.retry_after == 1.0  # nothing to go by yet
    assert worker.stats().refused == {"queue": 1, "key": 0, "draining": 0}
    with worker:
        for ticket in tickets:
            list(ticket)
        list(worker.submit(ask(llm)))
    assert_idle(worker)


def test_no_queue_at_all_still_fills_the_rows(llm: LLM) -> None:
    with working(llm, max_queue=0) as worker:
        tickets = [worker.submit(ask(llm, i, **LONG)) for i in range(ROWS)]
        next(tickets[0])
        with pytest.raises(QueueFull):
            worker.submit(ask(llm))
        tickets.pop().cancel()
        until(lambda: worker.stats().running == ROWS - 1)
        tickets.append(worker.submit(ask(llm)))
        for ticket in tickets:
            ticket.cancel()


def test_when_to_come_again_is_what_tickets_took_lately(llm: LLM) -> None:
    with working(llm, max_queue=0, max_per_key=ROWS) as worker:
        for _ in range(2):
            list(worker.submit(ask(llm, max_tokens=30)))
        started = time.perf_counter()
        tickets = [worker.submit(ask(llm, i, max_tokens=30)) for i in range(ROWS)]
        until(lambda: worker.stats().running == ROWS)
        with pytest.raises(QueueFull) as by_key:
            worker.submit(ask(llm))
        with pytest.raises(QueueFull) as by_queue:
            worker.submit(ask(llm), key="other")
        for ticket in tickets:
            list(ticket)
        seconds = time.perf_counter() - started
        # A key waits for its own oldest ticket, the queue for the first of eight.
        assert 0 < by_queue.value.retry_after <= by_key.value.retry_after < 3 * seconds + 1


def test_a_key_has_so_many_tickets_and_no_more(llm: LLM) -> None:
    with working(llm, max_per_key=2) as worker:
        tickets = [worker.submit(ask(llm, i, **LONG), key="a") for i in range(2)]
        with pytest.raises(QueueFull, match="2 requests") as caught:
            worker.submit(ask(llm), key="a")
        assert caught.value.retry_after > 0
        other = worker.submit(ask(llm), key="b")
        tickets[0].cancel()
        list(tickets[0])
        again = worker.submit(ask(llm), key="a")
        for ticket in (other, again):
            list(ticket)
        tickets[1].cancel()
        assert worker.stats().refused == {"queue": 0, "key": 1, "draining": 0}


def test_keys_take_turns(llm: LLM) -> None:
    worker = Worker(llm)
    many = [worker.submit(ask(llm, i, max_tokens=2), key="many") for i in range(50)]
    few = [worker.submit(ask(llm, i, max_tokens=2), key="few") for i in range(3)]
    one = worker.submit(ask(llm, 0, max_tokens=2), key="one")
    with worker:
        for ticket in (*many, *few, one):
            list(ticket)
    names = {id(ticket): name for name, tickets in (("m", many), ("f", few), ("o", [one])) for ticket in tickets}
    order = sorted((*many, *few, one), key=lambda ticket: min(ticket.request.replies))  # type: ignore[union-attr]
    assert "".join(names[id(ticket)] for ticket in order) == "mfomfmf" + "m" * 47
    assert [ticket for ticket in order if names[id(ticket)] == "m"] == many


def test_bounds_that_make_no_sense_are_refused(llm: LLM) -> None:
    with pytest.raises(OptionError, match="max_queue is -1"):
        Worker(llm, max_queue=-1)
    with pytest.raises(OptionError, match="max_per_key is 0"):
        Worker(llm, max_per_key=0)


# ---------------------------------------- failures


def test_a_failing_step_ends_those_in_it_and_nobody_else(llm: LLM) -> None:
    fail = threading.Event()

    def look(ids: torch.Tensor) -> None:
        if fail.is_set():
            fail.clear()
            raise FloatingPointError("the model broke")

    with working(llm) as worker, watching(llm, look):
        tickets = [worker.submit(ask(llm, i, max_tokens=30)) for i in range(ROWS + 3)]
        next(tickets[ROWS - 1])
        fail.set()
        for ticket in tickets[:ROWS]:
            for _ in range(2):  # it stays so
                with pytest.raises(FloatingPointError, match="the model broke") as caught:
                    list(ticket)
            assert len(caught.traceback) < 20, "each raise adds to the traceback"
            with pytest.raises(FloatingPointError):
                _ = ticket.result
        for i in range(ROWS, ROWS + 3):
            list(tickets[i])
            assert_same(tickets[i].result, alone(i, 30))
        assert worker.stats().finished["error"] == ROWS


class Broken:
    """A constraint that fails at the third token."""

    def __init__(self) -> None:
        self.n = 0

    def allowed(self) -> torch.Tensor | None:
        if self.n == 2:
            raise KeyError("no such rule")
        return None

    def accept(self, token_id: int) -> None:
        self.n += 1


def test_a_failing_sequence_ends_its_own_ticket_after_what_came_before(llm: LLM) -> None:
    with working(llm) as worker:
        broken = worker.submit(ask(llm, 1, constraint=Broken, n=2))
        whole = worker.submit(ask(llm, 2))
        until(lambda: broken.over)
        updates = []
        with pytest.raises(KeyError, match="no such rule"):
            updates += iter(broken)
        assert {update.index for update in updates} == {0, 1}
        assert all(update.chunk.finish_reason is None and update.chunk.text for update in updates)
        list(whole)
        assert_same(whole.result, alone(2, 16))
        assert worker.stats().finished["error"] == 1


def test_a_request_that_the_engine_refuses_ends_alone(llm: LLM) -> None:
    def refuse() -> Broken:
        raise OptionError("this grammar cannot be used")

    with working(llm) as worker:
        refused = worker.submit(ask(llm, constraint=refuse))
        with pytest.raises(OptionError, match="cannot be used"):
            list(refused)
        assert_same_after(worker)


def test_what_nobody_foresaw_is_told_to_everybody_and_the_worker_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with working(llm) as worker:
        tickets = [worker.submit(ask(llm, i, **LONG)) for i in range(ROWS + 3)]
        next(tickets[0])

        def broken() -> None:
            monkeypatch.undo()
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(llm, "step", broken)
        for ticket in tickets:
            with pytest.raises(ZeroDivisionError, match="a bug"):
                list(ticket)
        assert_same_after(worker)
        assert worker.stats().finished["error"] == ROWS + 3
    assert [record.levelname for record in caplog.records] == ["ERROR"]


# ---------------------------------------- the end


def test_draining_lets_what_was_accepted_finish(llm: LLM) -> None:
    with working(llm) as worker:
        tickets = [worker.submit(ask(llm, i)) for i in range(ROWS + 4)]
        assert worker.drain(30) == 0
        for i, ticket in enumerate(tickets):
            assert ticket.over
            assert_same(ticket.result, alone(i, 16))
        with pytest.raises(Draining):
            worker.submit(ask(llm))
        assert worker.stats().refused["draining"] == 1


def test_draining_cancels_what_does_not_finish_in_time(llm: LLM) -> None:
    with working(llm) as worker, watching(llm, lambda ids: time.sleep(0.002)):
        short = worker.submit(ask(llm, 4, max_tokens=4))
        long = [worker.submit(ask(llm, i, **LONG)) for i in range(ROWS + 4)]
        next(long[0])
        started = time.perf_counter()
        assert worker.drain(0.6) == len(long)
        assert time.perf_counter() - started < 2
        assert_same(short.result, alone(4, 4))
        assert {ticket.result.finish_reason for ticket in long} == {"cancelled"}
        assert worker.drain(0) == 0


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("end", ["stop", "drain"])
def test_an_ended_worker_leaves_no_reader_waiting(end: str, started: bool, llm: LLM) -> None:
    worker = Worker(llm)
    tickets = [worker.submit(ask(llm, i, **LONG)) for i in range(ROWS + 3)]

    async def all_of_them() -> list[list[Update]]:
        return await asyncio.gather(*map(read, tickets[1:]))

    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(list, tickets[0]), pool.submit(asyncio.run, all_of_them())]
        if started:
            worker.start()
            until(lambda: tickets[0].request)
        if end == "drain":
            assert worker.drain(0) == len(tickets)
        else:
            worker.stop()
        assert readers[0].result()[-1].chunk.finish_reason == "cancelled"
        assert {updates[-1].chunk.finish_reason for updates in readers[1].result()} == {"cancelled"}
    worker.stop()
    worker.stop()
    assert_idle(worker)
    with pytest.raises(Draining):
        worker.submit(ask(llm))
    with pytest.raises(RuntimeError, match="started once"):
        worker.start()


def test_an_idle_worker_takes_no_time(llm: LLM) -> None:
    with working(llm) as worker:
        list(worker.submit(ask(llm)))
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1
        assert_same_after(worker)


# ---------------------------------------- any order

ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, len(PROMPTS) - 1), st.integers(1, 6), st.integers(1, 3)),
    st.tuples(st.just("submit"), st.integers(0, len(PROMPTS) - 1), st.integers(1, 6), st.just(1)),
    st.tuples(st.sampled_from(["cancel", "drop"]), st.integers(0, 9)),
    st.tuples(st.just("read"), st.integers(0, 9), st.integers(1, 4)),
    st.tuples(st.just("wait"), st.integers(0, 10)),
)


@settings(max_examples=20, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=25), late=st.booleans())
def test_any_order_of_submitting_cancelling_reading_and_forgetting(actions: list[tuple], late: bool) -> None:
    llm = shipped()
    worker = Worker(llm, max_queue=4, max_per_key=5)
    if not late:
        worker.start()
    tickets: list[tuple[Ticket, list[Update], tuple[int, int, int]]] = []
    n_accepted = n_refused = 0
    cancelled: set[int] = set()
    for action, *numbers in actions:
        if action == "submit":
            prompt, max_tokens, n = numbers
            try:
                ticket = worker.submit(ask(llm, prompt, max_tokens=max_tokens, n=n), key=str(prompt % 3))
            except QueueFull:
                n_refused += 1
            else:
                n_accepted += 1
                tickets.append((ticket, [], (prompt, max_tokens, n)))
            ticket = None
        elif action == "wait":
            time.sleep(numbers[0] / 1000)
        elif tickets:
            place = numbers[0] % len(tickets)
            if action == "drop":
                del tickets[place]
            elif action == "cancel":
                tickets[place][0].cancel()
                cancelled.add(id(tickets[place][0]))
            elif not late:
                ticket, updates, _ = tickets[place]
                updates += islice(ticket, numbers[1])
                ticket = None
    if late:
        worker.start()
    for ticket, updates, (prompt, max_tokens, n) in tickets:
        updates += ticket
        assert_whole(updates, ticket.result)
        if any(choice.finish_reason == "cancelled" for choice in ticket.result.choices):
            assert id(ticket) in cancelled
        else:
            assert_same(ticket.result, alone(prompt, max_tokens, n))
    tickets.clear()
    ticket = None
    assert worker.drain(10) == 0
    worker.stop()
    assert_idle(worker)
    assert (worker.stats().accepted, sum(worker.stats().refused.values())) == (n_accepted, n_refused)
