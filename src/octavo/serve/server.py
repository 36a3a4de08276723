"""Listening: a socket, uvicorn around the application, time limits of connections, and an end without losses."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from octavo.errors import OptionError
from octavo.serve.config import ServeConfig
from octavo.serve.worker import Worker

log = logging.getLogger("octavo.serve")
FLUSH = 5  # seconds that clients have, in the end, to take what is left of their replies


def bind(host: str, port: int) -> socket.socket:
    """Take an address, without listening yet; port 0 is any that is free.

    Raises:
        OptionError: there is no such address here, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise OptionError(
            f"--host {host}: no such address", "such as 127.0.0.1, or 0.0.0.0 for all there are"
        ) from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise OptionError(
                f"--port {port}: is in use already", "give another, or --port 0 for any free one"
            ) from None
        raise OptionError(
            f"--host {host} --port {port}: {error.strerror}", "an address of this machine, a port above 1023"
        ) from None
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket) -> str:
    """Where clients find the API: "http://127.0.0.1:8000/v1"."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def serve(
    app: FastAPI, worker: Worker, config: ServeConfig, sock: socket.socket, *, ready: Callable[[str], None]
) -> None:
    """Serve until SIGTERM or SIGINT; then take nothing new, and let replies finish for `config.drain` seconds.

    A second signal ends the process at once.

    Args:
        app: of `create_app`.
        worker: is started and stopped here.
        config: its limits.
        sock: as `bind` made it; closed in the end.
        ready: is told the address once it is listened at.
    """
    worker.start()
    try:
        Server(app, worker, config, sock, ready).run([sock])
    finally:
        worker.stop()
        sock.close()


class _Protocol(H11Protocol):
    """uvicorn's, and a limit to how long a request's head may take."""

    header_timeout = 10.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Time what has begun and is not there: a head, or the rest of a body that was refused."""
        refused = self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY
        if self.conn.their_state is not h11.IDLE and not refused:
            self._unwatch()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_timeout, self._give_up)

    def _unwatch(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        self.transport.abort()


class Server(uvicorn.Server):
    """uvicorn's, but told to end it first lets the worker finish, and goes on to answer meanwhile.

    Args:
        app, worker, config, sock, ready: see `serve`; the worker is started and stopped by the caller.
    """

    def __init__(
        self, app: FastAPI, worker: Worker, config: ServeConfig, sock: socket.socket, ready: Callable[[str], None]
    ) -> None:
        protocol = type("_TimedProtocol", (_Protocol,), {"header_timeout": config.header_timeout})
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=config.keep_alive,  # type: ignore[arg-type]  # seconds for call_later, fractions too
                timeout_graceful_shutdown=FLUSH,
            )
        )
        self._app, self._worker, self._drain_seconds = app, worker, config.drain
        self._sock, self._ready = sock, ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._told = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready(url_of(self._sock))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server in peace, the second at once."""
        if self._told:
            os._exit(128 + sig)
        self._told = True
        self.end()

    def end(self) -> None:
        """Take nothing new, and leave when the replies under way are finished. From any thread."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_to_end)

    def _begin_to_end(self) -> None:
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        self._app.state.octavo.draining = True
        log.info("ending: replies have %g s to finish; a second signal ends at once", self._drain_seconds)
        cut = await asyncio.to_thread(self._worker.drain, self._drain_seconds)
        if cut:
            log.info("%d replies were not finished in time", cut)
        self.should_exit = True
