"""A server on 127.0.0.1 that answers as a test tells it, well or badly, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Asked(BaseHTTPRequestHandler):
    """One request; the script reads its `path`, `headers` and `json`, and answers by `send` or in pieces."""

    protocol_version = "HTTP/1.1"
    server: Server
    json: Any

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.json = json.loads(body) if body else None
        self.server.asked.append(self)
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client hung up
            self.server.script(self)

    def send(self, body: object = "", status: int = 200, **headers: str) -> None:
        """A whole response; what is not text is sent as JSON."""
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.begin(status, **{"content_type": "application/json", "content_length": str(len(data))} | headers)
        self.wfile.write(data)

    def begin(self, status: int = 200, **headers: str) -> None:
        """The head of a response."""
        self.send_response(status)
        self.send_header("connection", "close")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def begin_events(self) -> None:
        """The head of a stream, whose end is known by its last chunk."""
        self.begin(content_type="text/event-stream", transfer_encoding="chunked")

    def event(self, data: object) -> None:
        """One event; what is not text is sent as JSON."""
        text = data if isinstance(data, str) else json.dumps(data)
        self.piece(f"data: {text}\n\n".encode())

    def piece(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def delta(text: str | None = None, finish: str | None = None) -> dict[str, Any]:
    """A chunk of a chat completion."""
    return {"choices": [{"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}]}


def reply(*texts: str, finish: str = "stop", usage: dict[str, Any] | None = None) -> Callable[[Asked], None]:
    """A script that streams these pieces, and lists the model "scripted"."""

    def script(asked: Asked) -> None:
        if asked.command == "GET":
            asked.send({"object": "list", "data": [{"id": "scripted"}, {"id": "other"}]})
            return
        asked.begin_events()
        asked.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for text in texts:
            asked.event(delta(text))
        asked.event(delta(None, finish))
        if usage is not None:
            asked.event({"choices": [], "usage": usage})
        asked.event("[DONE]")
        asked.end()

    return script


class Server(ThreadingHTTPServer):
    """Answers by `script`, which may be changed at any time; `asked` are the requests so far."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.script: Callable[[Asked], None] = reply("Hello")
        self.asked: list[Asked] = []
        self.over = threading.Event()  # set when the test is: a script that hangs waits for it

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def posts(self) -> list[Any]:
        """The bodies that were posted."""
        return [one.json for one in self.asked if one.command == "POST"]


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A running `Server`."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


# ---------------------------------------- scripts that answer badly


def sends(body: object, status: int = 200, **headers: str) -> Callable[[Asked], None]:
    return lambda asked: asked.send(body, status, **headers)


def hangs(asked: Asked) -> None:
    asked.server.over.wait(20)


def half(*after: object, end: bool = False, hang: bool = False) -> Callable[[Asked], None]:
    """Half a reply, then these events; then the end, silence, or a closed connection."""

    def script(asked: Asked) -> None:
        asked.begin_events()
        asked.event(delta("Half a "))
        for event in after:
            asked.event(event)
        if end:
            asked.end()
        if hang:
            hangs(asked)

    return script
