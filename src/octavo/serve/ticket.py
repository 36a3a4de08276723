"""A request on its way from a worker's thread to whoever asked: what is published of it, and how that is read.

What is published is never copied: a reader remembers how far it has come, so that one who reads slowly costs nobody
anything, and what was missed comes joined together.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import queue
import threading
import time
from types import TracebackType
from typing import Literal, NamedTuple, Self

from octavo.completion import Choice, Chunk, Completion, FinishReason, Prepared, Reply, Request, Timings, Usage
from octavo.sampling import TokenLogprobs


class Update(NamedTuple):
    """News of one reply of a ticket.

    Attributes:
        index: which of the n.
        chunk: what is new since the last one about this reply. Its last one has a finish reason; the last one of the
            whole ticket has usage and timings.
    """

    index: int  # type: ignore[assignment]  # not tuple.index, which nobody needs here
    chunk: Chunk


class State(NamedTuple):
    """How far a reply has come. Two of them differ by a chunk."""

    text: str
    n_tokens: int
    finish_reason: FinishReason | None


NOTHING = State("", 0, None)


class Job:
    """A ticket's inside: what the worker knows of it and publishes to it.

    Attributes:
        request: None while it waits for a row.
        state: of each reply, as published. Guarded by `changed`, as is all that follows.
        seen: of each reply, as read.
        outcome: None until it is over.
        traceback: the error's own; raising an error adds to its traceback, and it may be raised more than once.
    """

    def __init__(self, prepared: Prepared, key: str) -> None:
        self.prepared = prepared
        self.key = key
        self.n = prepared.params.n
        self.arrived_at = time.perf_counter()
        self.began_at = math.inf
        self.request: Request | None = None
        self.replies: tuple[Reply, ...] = ()
        self.n_counted = [0] * self.n  # tokens of each reply that are in the counters
        self.last_at = [math.inf] * self.n  # when each reply had its last token
        self.changed = threading.Condition(threading.Lock())
        self.waiters: list[asyncio.Future[None]] = []
        self.state = [NOTHING] * self.n
        self.seen = [NOTHING] * self.n
        self.turn = 0  # the reply to look at first, so that those read slowly come all
        self.outcome: FinishReason | None = None
        self.error: Exception | None = None
        self.traceback: TracebackType | None = None

    @property
    def n_unfinished(self) -> int:
        return sum(reply.finish_reason is None for reply in self.replies)

    def read(self) -> Update | None:
        """Return the next news, None if there are none; call with `changed` held."""
        for index in itertools.chain(range(self.turn, self.n), range(self.turn)):
            old, new = self.seen[index], self.state[index]
            if new is not old:
                self.seen[index], self.turn = new, (index + 1) % self.n
                return Update(index, self._chunk(index, old, new))
        return None

    def _chunk(self, index: int, old: State, new: State) -> Chunk:
        logprobs: tuple[TokenLogprobs, ...] | None = None if self.prepared.params.logprobs is None else ()
        ids: tuple[int, ...] = ()
        if self.replies:
            reply = self.replies[index]
            ids = tuple(reply.token_ids[old.n_tokens : new.n_tokens])
            if reply.logprobs is not None:
                logprobs = tuple(reply.logprobs[old.n_tokens : new.n_tokens])
        text = new.text[len(old.text) :]
        last = self.outcome is not None and self.error is None and self.state == self.seen
        if not last:
            return Chunk(text, ids, logprobs, new.finish_reason)
        return Chunk(text, ids, logprobs, new.finish_reason, self.usage(), self.timings())

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error.with_traceback(self.traceback)

    def usage(self) -> Usage:
        return Usage(len(self.prepared.ids), 0) if self.request is None else self.request.usage()

    def timings(self) -> Timings:
        return Timings(0.0, 0.0, 0.0, 0.0) if self.request is None else self.request.timings()

    def completion(self) -> Completion:
        """All of it; nothing but its prompt if the engine never had it."""
        if self.request is not None:
            return self.request.completion()
        logprobs = None if self.prepared.params.logprobs is None else ()
        choices = tuple(Choice(index, "", (), "cancelled", logprobs) for index in range(self.n))
        return Completion(choices, self.usage(), self.timings())


class Command(NamedTuple):
    kind: Literal["submit", "cancel", "stop"]
    job: Job | None = None


Commands = queue.SimpleQueue[Command]  # whose put may be called from a destructor, anywhere


class Ticket:
    """A request under way. Iterate for updates, with `for` from a thread or `async for` from an event loop.

    An error that ended the request is raised where its updates end, after those that came before it. Leaving a `with`
    block cancels what is not over; so does losing the last reference to the ticket. To be read by one consumer.
    """

    def __init__(self, job: Job, commands: Commands) -> None:
        self._job = job
        self._commands = commands

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Update:
        job = self._job
        with job.changed:
            while (update := job.read()) is None:
                if job.outcome is not None:
                    job.raise_error()
                    raise StopIteration
                job.changed.wait()
        return update

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Update:
        job = self._job
        while True:
            with job.changed:
                update = job.read()
                if update is not None:
                    return update
                if job.outcome is not None:
                    job.raise_error()
                    raise StopAsyncIteration
                # Those given up are thrown out here, not where they were: a coroutine that is collected may find the
                # lock held by its own thread.
                waiter = asyncio.get_running_loop().create_future()
                job.waiters = [*(one for one in job.waiters if not one.done()), waiter]
            await waiter

    def cancel(self) -> None:
        """End the request before the engine's next step; its updates end with "cancelled". Returns at once."""
        if self._job.outcome is None:
            self._commands.put(Command("cancel", self._job))

    @property
    def over(self) -> bool:
        """Whether it has come to its end, read or not."""
        return self._job.outcome is not None

    @property
    def request(self) -> Request | None:
        """What the engine works on; None while the ticket waits."""
        return self._job.request

    @property
    def result(self) -> Completion:
        """The replies, once they are over, read or not; of a cancelled request what came before.

        Raises:
            RuntimeError: it is not over yet.
            Exception: what ended it.
        """
        if self._job.outcome is None:
            raise RuntimeError("the request is not finished: read its ticket to the end")
        self._job.raise_error()
        return self._job.completion()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_commands"):  # no locks: a destructor runs wherever it pleases
            self.cancel()
