"""Replies on their way out: server-sent events, several replies in one stream, clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Response

from octavo.serve.gate import Receive, Scope, Send
from octavo.serve.worker import Ticket, Update

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event; in ASCII, for clients that split lines at U+2028 and its like."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


class ClientGoneError(Exception):
    """The client went away before its reply was there."""


async def until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, T]) -> T:
    """Wait for work, as long as the client waits for it.

    Raises:
        ClientGoneError: it went away; the work was cancelled.
    """
    gone, working = asyncio.ensure_future(until_gone(receive)), asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        await _end(gone, working)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """A body that is sent as it is made; `close` is called in the end, whatever happened.

    A client that goes away is noticed even while nothing is sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        self.status_code, self.background = 200, None
        self.init_headers(_HEADERS)
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, and stop when nobody reads them."""
        try:
            with contextlib.suppress(ClientGoneError):
                await unless_gone(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events:
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def updates(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Update]]:
    """What comes for any of several tickets, with the ticket's place in the list."""
    if len(tickets) == 1:
        async for update in tickets[0]:
            yield 0, update
        return
    queue: asyncio.Queue[tuple[int, Update] | None] = asyncio.Queue()

    async def forward(at: int, ticket: Ticket) -> None:
        try:
            async for update in ticket:
                queue.put_nowait((at, update))
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.ensure_future(forward(at, ticket)) for at, ticket in enumerate(tickets)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            else:
                yield item
        for task in tasks:
            task.result()
    finally:
        await _end(*tasks)
