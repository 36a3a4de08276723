"""Run the page's application until told to end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn


def run(app: Any, sock: Any, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. Replies under way are not waited for.

    Args:
        app: an ASGI application.
        sock: bound to the address to listen at.
        announce: told the page's address once it is served.
    """
    host, port = sock.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    # An open page keeps a connection for as long as it is looked at; that it is cut off in the end is no error.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not record.getMessage().startswith("Cancel "))
    config = uvicorn.Config(
        app, ws="none", log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1
    )
    with suppress(KeyboardInterrupt):  # uvicorn passes it on when it has ended
        _Server(config, lambda: announce(address)).run(sockets=[sock])


class _Server(uvicorn.Server):
    """Tells when it has started."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: Any = None) -> None:
        """Start, and tell."""
        await super().startup(sockets)
        if self.started:
            self._on_start()
