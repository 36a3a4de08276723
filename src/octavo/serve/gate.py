"""What every request passes before it reaches a route: name, key, size, time. And one line of the log after.

Plain ASGI, so that a body which is too large or too slow is never held and never parsed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from octavo.serve.config import ServeConfig
from octavo.serve.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("octavo.serve")
OPEN = ("/health",)  # paths that need no key
QUIET = ("/ui/",)  # a page is made of a hundred files
GONE = 499  # what the log calls a client that went away before its answer
LONGEST_PATH = 200  # characters of it in the log


@dataclass
class Visit:
    """A request's notes, in `scope["octavo"]`: a route adds to them, the log tells them.

    Attributes:
        key: the name of its API key; "" where there are none.
        prompt_tokens, completion_tokens: read and written for it.
        status: of the response; 0 until it begins.
        note: what else the log's line should say.
        failed: a reply ended in an error after it had begun to be sent.
    """

    key: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    status: int = 0
    note: str = ""
    failed: bool = False


class Gate:
    """The outermost application but for CORS."""

    def __init__(self, app: App, config: ServeConfig) -> None:
        self._app, self._config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; what is refused here never reaches the application."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        visit, started = Visit(), time.perf_counter()
        scope["octavo"] = visit
        try:
            try:
                self._admit(scope, visit)
                if scope["type"] == "http":
                    receive = await self._with_body(scope, receive)
            except ApiError as error:
                await _refuse(error, scope, receive, self._noting(send, visit))
            except _GoneError:
                visit.status = GONE
            else:
                await self._app(scope, receive, self._noting(send, visit))
        except (TimeoutError, OSError):  # the client takes nothing off its reply, or is gone
            visit.status = visit.status or GONE
            visit.note = "; the client stopped reading"
        finally:
            _tell(scope, visit, time.perf_counter() - started)

    def _admit(self, scope: Scope, visit: Visit) -> None:
        """Whether this may come in by its name and its key.

        Raises:
            ApiError: it may not.
        """
        headers = _headers(scope)
        config = self._config
        if config.hosts is not None and _host_name(headers.get("host", "")) not in config.hosts:
            raise ApiError(
                403,
                "the Host header names another server; without an API key this one answers to its own address alone",
                code="unknown_host",
            )
        if not config.keys or scope["path"] in OPEN:
            return
        found = config.key_of(_given_key(headers.get("authorization", "")))
        if found is None:
            said = "a wrong API key" if "authorization" in headers else "no API key"
            kind = "Bearer" if scope["path"].startswith("/v1") else 'Basic realm="octavo"'
            raise ApiError(
                401,
                f"{said}; send one in the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": kind},
            )
        visit.key = found

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body, within the limits of size and time; return a `receive` that has it.

        Raises:
            ApiError: it is too large or too slow.
            _GoneError: the client is.
        """
        limit = self._config.body_limit
        length = _headers(scope).get("content-length", "0")
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):
            raise _too_large(limit)
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self._config.read_timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    size += len(message.get("body", b""))
                    if size > limit:
                        raise _too_large(limit)
                    parts.append(message.get("body", b""))
                    more = message.get("more_body", False)
        except TimeoutError:
            seconds = self._config.read_timeout
            raise ApiError(
                408,
                f"the request's body did not arrive within {seconds:g} seconds",
                code="request_timeout",
                headers={"Connection": "close"},
            ) from None
        body = b"".join(parts)
        parts.clear()
        given = False

        async def again() -> Message:
            nonlocal given, body
            if given:
                return await receive()
            given, whole, body = True, body, b""
            return {"type": "http.request", "body": whole, "more_body": False}

        return again

    def _noting(self, send: Send, visit: Visit) -> Send:
        """A `send` that notes the status, and gives a client so long to take what it is sent."""

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
            async with asyncio.timeout(self._config.write_timeout):
                await send(message)

        return noting


class _GoneError(Exception):
    """The client went away."""


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request's body is larger than the {limit:,} bytes that are taken", code="body_too_large")


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": error.message[:100]})
    else:
        await error.response()(scope, receive, send)


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _given_key(header: str) -> str:
    """The key of `Authorization: Bearer KEY`, or a browser's `Basic`, whose password it is."""
    kind, _, value = header.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _host_name(header: str) -> str:
    """The header without the port: "[::1]:8000" is "::1"."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.rpartition(":")[0].lower() if ":" in header else header.lower()


def _tell(scope: Scope, visit: Visit, seconds: float) -> None:
    path = "".join(one if one.isprintable() else "?" for one in scope["path"][:LONGEST_PATH])
    tokens = "-" if visit.prompt_tokens is None else f"{visit.prompt_tokens}+{visit.completion_tokens}"
    method = scope.get("method", "WEBSOCKET")
    level = logging.DEBUG if path.startswith(QUIET) and visit.status < 400 else logging.INFO
    log.log(level, "%s %s %s %s tokens %.3f s%s", method, path, visit.status, tokens, seconds, visit.note)
