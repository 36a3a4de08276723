"""Octavo's own server on 127.0.0.1, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from octavo.llm import LLM
from octavo.serve.app import create_app
from octavo.serve.config import ServeConfig
from octavo.serve.worker import Worker


@contextlib.contextmanager
def serve(llm: LLM, **settings: Any) -> Iterator[str]:
    """Serve a model; gives the API's base address.

    Args:
        settings: of `ServeConfig`.
    """
    config = ServeConfig(**({"model_id": "tiny"} | settings))
    with Worker(llm) as worker:
        server = uvicorn.Server(
            uvicorn.Config(create_app(worker, config), port=0, log_level="warning", lifespan="off", ws="none")
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            give_up = time.monotonic() + 30
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                assert time.monotonic() < give_up, "the server did not start in time"
                time.sleep(0.01)
            (socket,) = server.servers[0].sockets
            yield f"http://127.0.0.1:{socket.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()
