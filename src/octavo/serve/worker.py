"""One thread owns an `LLM` and steps its engine for requests that other threads and event loops bring.

`Worker.submit` returns a `Ticket`, which is read with `for` or `async for`. Between two steps the thread takes the
commands that have come (submit, cancel), gives the engine as many requests as it has rows for, and publishes what the
step brought (`octavo.serve.ticket`).

The worker holds no reference to a ticket. One that nobody holds any more is collected, and its sequences end with it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from octavo.completion import FinishReason, Prepared
from octavo.errors import OctavoError, OptionError
from octavo.experts.cache import LayerCounters
from octavo.llm import LLM
from octavo.serve.ticket import NOTHING, Command, Commands, Job, State, Ticket, Update

__all__ = ["Draining", "Histogram", "QueueFull", "Stats", "Ticket", "Update", "Worker"]

RECENT = 32  # tickets that ended, from which the next end is estimated
FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
INTER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

_log = logging.getLogger("octavo.serve")


class QueueFull(OctavoError):
    """So many requests wait, or are open for one key, that no more are taken.

    Attributes:
        retry_after: seconds until there is probably room, estimated from tickets that ended lately.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(OctavoError):
    """The worker finishes what it has and takes nothing new."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observed seconds, counted by size.

    Attributes:
        bounds: upper bounds of all buckets but the last one, which has none.
        counts: observations in each bucket.
        total: the sum of all observations.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True, slots=True)
class Stats:
    """What a worker does and has done since it was made.

    Attributes:
        running: tickets that the engine works on.
        waiting: tickets that wait for a row of the engine.
        sequences: replies that the engine has and that are not over; those of one prompt count each.
        accepted: tickets given out. All of them run, wait or are finished.
        refused: requests turned away, by cause: "queue", "key" or "draining".
        finished: tickets that are over, by the worst end of their replies: "error", "cancelled", "length", "stop".
        prompt_tokens: of the prompts that were read to their end.
        cached_tokens: those of them whose keys and values were there already.
        generated_tokens: of all replies.
        steps: of the engine.
        first_token: seconds from `submit` to a ticket's first token.
        inter_token: seconds between a reply's tokens.
        prefix_nbytes: that the engine keeps of prompts for later ones.
        experts: what was read of streamed experts; None where every expert stays in memory.
    """

    running: int
    waiting: int
    sequences: int
    accepted: int
    refused: Mapping[str, int]
    finished: Mapping[FinishReason, int]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    first_token: Histogram
    inter_token: Histogram
    prefix_nbytes: int
    experts: LayerCounters | None


class _Tally:
    """A histogram that is being counted."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total += seconds

    def snapshot(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._total)


class Worker:
    """A thread that owns an `LLM`. Keys take turns for its rows: each gives one request at a time, its oldest.

    Args:
        llm: nobody else may use its engine while the worker runs; `LLM.prepare` anybody may call.
        max_queue: tickets that may wait beyond those that the engine has rows for.
        max_per_key: tickets that may be open for one key, running or waiting; None for any number.

    Raises:
        OptionError: a bound is out of range.
    """

    def __init__(self, llm: LLM, *, max_queue: int = 128, max_per_key: int | None = None) -> None:
        if max_queue < 0:
            raise OptionError(f"max_queue is {max_queue}; expected an integer of at least 0")
        if max_per_key is not None and max_per_key < 1:
            raise OptionError(f"max_per_key is {max_per_key}; expected an integer of at least 1, or none")
        self.llm = llm
        self.max_queue = max_queue
        self.max_per_key = max_per_key
        self._rows = llm.engine.max_batch_size
        self._commands: Commands = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        # The thread's own:
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by key; the first one's turn is next
        self._running: dict[Job, None] = {}  # in order
        self._woken: list[tuple[asyncio.Future[None], Job]] = []
        self._stopped = False
        # Everybody's, guarded by the lock:
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)  # told when nothing is open any more
        self._draining = False
        self._open: dict[Job, None] = {}
        self._n_open: Counter[str] = Counter()  # by key
        self._n_running = self._n_sequences = 0
        self._service_seconds: deque[float] = deque(maxlen=RECENT)
        self._open_seconds: deque[float] = deque(maxlen=RECENT)
        self._accepted = self._steps = 0
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._refused: Counter[str] = Counter(queue=0, key=0, draining=0)
        self._finished: Counter[FinishReason] = Counter({"stop": 0, "length": 0, "cancelled": 0, "error": 0})
        self._first_token, self._inter_token = _Tally(FIRST_TOKEN_SECONDS), _Tally(INTER_TOKEN_SECONDS)

    # ---------------------------------------- from any thread

    def start(self) -> Self:
        """Start the thread.

        Raises:
            RuntimeError: it was started or stopped before.
        """
        with self._lock:
            if self._thread is not None or self._draining:
                raise RuntimeError("a worker is started once")
            self._thread = threading.Thread(target=self._run, name="octavo-worker", daemon=True)
            self._thread.start()
        return self

    def submit(self, prepared: Prepared, *, key: str = "") -> Ticket:
        """Queue a request. Never waits.

        Args:
            prepared: by `LLM.prepare`.
            key: whose it is; keys take turns.

        Raises:
            QueueFull: too many wait, or are open for this key.
            Draining: the worker is being shut down.
        """
        job = Job(prepared, key)
        with self._lock:
            if self._draining:
                self._refused["draining"] += 1
                raise Draining("the server is shutting down and takes no new requests")
            self._check_bounds(key)
            self._accepted += 1
            self._open[job] = None
            self._n_open[key] += 1
            self._commands.put(Command("submit", job))
        return Ticket(job, self._commands)

    def drain(self, seconds: float) -> int:
        """Take nothing new, let what was accepted finish, and cancel what has not after a time.

        Args:
            seconds: to wait at most, besides the engine step that is under way then.

        Returns:
            How many tickets were cancelled.
        """
        with self._lock:
            self._draining = True
            if self._thread is not None:
                self._idle.wait_for(lambda: not self._open, max(0.0, seconds))
            left = list(self._open)
            for job in left:
                self._commands.put(Command("cancel", job))
        if self._thread is None:
            self._end_all()
        with self._lock:
            self._idle.wait_for(lambda: not self._open)
        return sum(job.outcome == "cancelled" for job in left)

    def stop(self) -> None:
        """Cancel all that is open and end the thread, after the step under way. Nothing happens if it has ended."""
        with self._lock:
            self._draining = True
            self._commands.put(Command("stop"))
        if self._thread is None:
            self._end_all()
        else:
            self._thread.join()

    def stats(self) -> Stats:
        """Return what is counted, all at one moment."""
        experts = self.llm.experts
        with self._lock:
            return Stats(
                running=self._n_running,
                waiting=len(self._open) - self._n_running,
                sequences=self._n_sequences,
                accepted=self._accepted,
                refused=dict(self._refused),
                finished=dict(self._finished),
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                generated_tokens=self._generated_tokens,
                steps=self._steps,
                first_token=self._first_token.snapshot(),
                inter_token=self._inter_token.snapshot(),
                prefix_nbytes=self.llm.engine.prefix_nbytes,
                experts=None if experts is None else experts.total,
            )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---------------------------------------- bounds, with the lock held

    def _check_bounds(self, key: str) -> None:
        if self.max_per_key is not None and self._n_open[key] >= self.max_per_key:
            self._refused["key"] += 1
            oldest = next(job for job in self._open if job.key == key)
            rest = _mean(self._open_seconds) - (time.perf_counter() - oldest.arrived_at)
            raise QueueFull(
                f"{self.max_per_key} requests of this client are open already, and no more are allowed",
                max(rest, self._seconds_to_an_end()),
            )
        if self._queue_is_full():
            self._refused["queue"] += 1
            raise QueueFull("too many requests are waiting", self._seconds_to_an_end())

    def _queue_is_full(self) -> bool:
        """Whether the engine has a row neither for one more nor for `max_queue` of those that wait."""
        n_queued, free = len(self._open) - self._n_running, self._rows - self._n_sequences
        if n_queued < self.max_queue:
            return False
        for job in self._open:
            if free <= 0:
                break
            if job.request is None:  # it waits for the next step, not for a row
                free -= job.n
                n_queued -= 1
        return free <= 0 and n_queued >= self.max_queue

    def _seconds_to_an_end(self) -> float:
        """Estimate when the next ticket ends, and makes room."""
        if self._service_seconds:
            return _mean(self._service_seconds) / max(1, self._n_running)
        # Nothing to go by: what runs is as likely to take as long again as not.
        now = time.perf_counter()
        return max([1.0, *(now - job.began_at for job in self._open if job.request is not None)])

    # ---------------------------------------- the thread

    def _run(self) -> None:
        try:
            while not self._stopped:
                try:
                    self._turn()
                except Exception as error:
                    _log.exception("an engine step went wrong; every open request is told")
                    self._end_all(error)
        finally:
            self._end_all()

    def _turn(self) -> None:
        """Take commands, give out free rows, step, tell."""
        self._take_commands()
        self._admit()
        if self._running and not self._stopped:
            self.llm.step()
            self._publish()
        self._wake()

    def _take_commands(self) -> None:
        """Take all that have come; where there is nothing else to do, sleep until one comes."""
        sleep = not self._running and not self._waiting
        while True:
            try:
                kind, job = self._commands.get(block=sleep)
            except queue.Empty:
                return
            sleep = False
            if job is None:
                self._stopped = True
            elif job.outcome is not None:
                continue
            elif kind == "submit":
                self._waiting.setdefault(job.key, deque()).append(job)
            else:
                self._end(job, "cancelled")

    def _admit(self) -> None:
        """Give the engine waiting requests, key by key, while it has a row free."""
        while self._waiting and self._n_sequences < self._rows:
            key, jobs = self._waiting.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self._waiting[key] = jobs
            try:
                request = self.llm.submit(job.prepared)
            except Exception as error:  # its own fault: nothing of it is in the engine
                self._end(job, "error", error)
                continue
            request.started_at = job.arrived_at  # the time in our queue is part of the wait
            self._running[job] = None
            with self._lock:
                job.replies, job.request = tuple(request.replies.values()), request
                job.began_at = time.perf_counter()
                self._n_running += 1
                self._n_sequences += job.n

    def _publish(self) -> None:
        """Count what a step brought, and show it to the tickets."""
        now = time.perf_counter()
        with self._lock:
            self._steps += 1
            for job in self._running:
                self._count(job, now)
            self._n_sequences = sum(job.n_unfinished for job in self._running)
        for job in list(self._running):
            error = next((reply.error for reply in job.replies if reply.error is not None), None)
            if error is not None:
                self._end(job, "error", error)
            elif job.n_unfinished == 0:
                reasons = {reply.finish_reason for reply in job.replies}
                self._end(job, "length" if "length" in reasons else "stop")
            else:
                self._show(job)

    def _count(self, job: Job, now: float) -> None:
        """Take a step's tokens into the counters; call with the lock held."""
        for index, reply in enumerate(job.replies):
            new = len(reply.token_ids) - job.n_counted[index]
            if new == 0:
                continue
            if not any(job.n_counted):
                usage = job.usage()
                self._prompt_tokens += usage.prompt_tokens
                self._cached_tokens += usage.cached_tokens
                self._first_token.observe(now - job.arrived_at)
            if job.n_counted[index]:
                self._inter_token.observe(now - job.last_at[index])
            self._generated_tokens += new
            job.n_counted[index] += new
            job.last_at[index] = now

    def _show(self, job: Job, ending: FinishReason | None = None, error: Exception | None = None) -> None:
        """Publish how far a job's replies have come, and its own end if it has one."""
        with job.changed:
            news = ending is not None
            for index, (old, reply) in enumerate(itertools.zip_longest(job.state, job.replies)):
                new = NOTHING if reply is None else State(reply.text, len(reply.token_ids), reply.finish_reason)
                if new.finish_reason is None and ending == "cancelled":
                    new = new._replace(finish_reason="cancelled")
                elif new.finish_reason == "error":  # raised, not told
                    new = new._replace(finish_reason=None)
                # Tokens that are no text yet come with those that make it one.
                told = new.text != old.text or new.finish_reason != old.finish_reason
                if told or (self.llm.tokenizer is None and new.n_tokens != old.n_tokens):
                    job.state[index], news = new, True
            if ending is not None:
                job.outcome, job.error = ending, error
                job.traceback = None if error is None else error.__traceback__
            if news:
                self._woken += [(waiter, job) for waiter in job.waiters]
                job.waiters = []
                job.changed.notify_all()

    def _end(self, job: Job, outcome: FinishReason, error: Exception | None = None) -> None:
        """Take a job out of everything, and tell its ticket."""
        self._running.pop(job, None)
        jobs = self._waiting.get(job.key)
        if jobs is not None and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._waiting[job.key]
        try:
            if job.request is not None and job.n_unfinished:
                self.llm.cancel(job.request)
        finally:
            now = time.perf_counter()
            with self._lock:
                del self._open[job]
                self._n_open -= Counter([job.key])
                if job.request is not None:
                    self._n_running -= 1
                    self._n_sequences = sum(one.n_unfinished for one in self._running)
                    self._service_seconds.append(now - job.began_at)
                    self._open_seconds.append(now - job.arrived_at)
                self._finished[outcome] += 1
                self._show(job, outcome, error)
                if not self._open:
                    self._idle.notify_all()

    def _end_all(self, error: Exception | None = None) -> None:
        """Cancel whatever is open, or end it with an error."""
        with self._lock:
            jobs = list(self._open)
        for job in jobs:
            try:
                self._end(job, "cancelled" if error is None else "error", error)
            except Exception:
                _log.exception("a request that failed could not be cancelled")
        self._wake()

    def _wake(self) -> None:
        """Wake the event loops that wait for news: each once, however many of its tasks wait."""
        woken, self._woken = self._woken, []
        loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        for waiter, _ in woken:
            loops.setdefault(waiter.get_loop(), []).append(waiter)
        for loop, waiters in loops.items():
            try:
                loop.call_soon_threadsafe(_release, waiters)
            except RuntimeError:  # the loop is closed: nobody will read
                for waiter, job in woken:
                    if waiter.get_loop() is loop:
                        self._commands.put(Command("cancel", job))


def _release(waiters: Iterable[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


def _mean(numbers: deque[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0
