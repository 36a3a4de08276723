"""A server of the shipped model in this process: uvicorn on a thread of its own, a port of the system's choice."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from octavo import LLM
from octavo.serve.app import create_app
from octavo.serve.config import ServeConfig
from octavo.serve.server import Server, bind
from octavo.serve.worker import Worker

QUESTION = [{"role": "user", "content": "Who are you?"}]


@dataclass
class Running:
    """A server, and how to reach it."""

    url: str
    worker: Worker
    server: Server
    http: httpx.Client

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(self.url + path, json=body, **options)

    def idle(self, seconds: float = 1.0) -> bool:
        """Whether nothing runs or waits within a time."""
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            stats = self.worker.stats()
            if stats.running == stats.waiting == stats.sequences == 0:
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def running(llm: LLM, **settings: Any) -> Iterator[Running]:
    """A server around a model; `settings` are `ServeConfig`'s."""
    config = ServeConfig(**{"model_id": "menny", **settings})
    sock = bind("127.0.0.1", 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)  # so that a reader that stops is soon noticed
    listening, told = threading.Event(), []

    def ready(url: str) -> None:
        told.append(url)
        listening.set()

    with Worker(llm, max_queue=config.max_queue, max_per_key=config.max_per_key) as worker:
        server = Server(create_app(worker, config), worker, config, sock, ready)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            assert listening.wait(20)
            with httpx.Client(timeout=60, verify=False) as http:  # what is slow about a client is its certificates
                yield Running(told[0], worker, server, http)
        finally:
            server.should_exit = True
            thread.join(20)
            sock.close()
    assert not thread.is_alive()


def load() -> LLM:
    torch.set_num_threads(1)
    return LLM.load("menny", max_batch_size=8, whole_cache=True)
