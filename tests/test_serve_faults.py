"""What must not happen to a server: bad bodies, wrong keys, clients that vanish, ends in the middle of a reply."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from octavo import LLM
from octavo.errors import OctavoError, OptionError
from octavo.serve.config import ServeConfig, check_host, read_keys, take_options
from serve_fixtures import QUESTION, Running, load, running

KEYS = ("first-key", "second-key")
LONG = {"model": "menny", "messages": QUESTION, "temperature": 1.5, "max_tokens": 400, "logit_bias": {"2": -100}}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load()


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Running]:
    with running(
        llm, body_limit=200_000, read_timeout=0.5, header_timeout=0.5, write_timeout=1.0, max_queue=2,
        hosts=check_host("127.0.0.1", ()),
    ) as one:  # fmt: skip
        yield one


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with running(load(), keys=KEYS, max_per_key=1, cors=("https://chat.example.org",)) as one:
        yield one


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def refused(response: httpx.Response, status: int, *words: str, param: str | None = None) -> dict[str, Any]:
    """Assert a refusal as it must look; return its error object."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    for word in words:
        assert word in error["message"], error
    if param is not None:
        assert error["param"] == param
    return error


# ---------------------------------------- bodies


JSON = {"Content-Type": "application/json"}
CHAT = {"model": "menny", "messages": QUESTION, "max_tokens": 1}
TEXT = {"model": "menny", "prompt": "Hi", "max_tokens": 1}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ""}, None),
        ({"stop": ["a"] * 17}, None),
        ({"stop": [7]}, None),
        ({"logit_bias": {"x": 1}}, None),
        ({"logit_bias": {"1": float("nan")}}, None),
        ({"logit_bias": {"999999999": 1}}, None),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"model": None}, "model"),
    ],
)
@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
def test_values_out_of_range(served: Running, path: str, change: dict[str, Any], param: str | None) -> None:
    body = {**(CHAT if path.startswith("/chat") else TEXT), **change}
    response = served.http.post(
        served.url + path, content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    refused(response, 400, param=param)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": "Hello"},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "  "}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]},
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
        {"logprobs": 3},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 21},
        {"max_tokens": 0},
        {"audio": {"voice": "x"}},
        {"modalities": ["audio"]},
        {"functions": [{"name": "x"}]},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "poem"}},
        {"tool_choice": "required"},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    ],
)
def test_conversations_that_cannot_be_replied_to(served: Running, change: dict[str, Any]) -> None:
    content = json.dumps({**CHAT, **change})
    refused(served.http.post(f"{served.url}/chat/completions", content=content, headers=JSON), 400)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [1, "a"]},
        {"prompt": [-1]},
        {"prompt": [10**6]},
        {"prompt": [True]},
        {"prompt": {"a": 1}},
        {"prompt": ["a"] * 129},
        {"prompt": ["a"] * 100, "n": 2},
        {"prompt": "\udfff"},
        {"suffix": "the end"},
        {"best_of": 4},
        {"logprobs": 21},
        {"prompt": "word " * 20_000},
        {"prompt": [5] * 60_000},
    ],
)
def test_prompts_that_cannot_be_continued(served: Running, change: dict[str, Any]) -> None:
    refused(served.http.post(f"{served.url}/completions", content=json.dumps({**TEXT, **change}), headers=JSON), 400)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"nonsense", b'"text"', b"[]", b"null", b"\xff\xfe{}", b'{"model": "\xe9"}', b"\x00",
        b"[" * 100_000, b'{"a":' * 30_000, b'{"seed": ' + b"9" * 5000 + b"}", b'{"model": NaN}',
        b'{"model": "menny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "\\ud800", "prompt": "x"}', b'{"model": "menny", "prompt": "x", "logit_bias": {"\\ud800": 1}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
def test_bodies_that_are_no_request(served: Running, path: str, content: bytes, told: pytest.LogCaptureFixture) -> None:
    response = served.http.post(served.url + path, content=content, headers=JSON)
    refused(response, 404 if b'"model": "\\ud800"' in content and path == "/completions" else 400)
    _until(lambda: any(record.name == "octavo.serve" for record in told.records))  # written after the answer
    assert [record.levelname for record in told.records if record.name.startswith("octavo")] == ["INFO"]
    assert not any(record.exc_info for record in told.records)


def test_a_deep_schema_is_refused_or_ignored(served: Running) -> None:
    deep: Any = {"type": "string"}
    for _ in range(400):
        deep = {"type": "object", "properties": {"a": deep}}
    form = {"type": "json_schema", "json_schema": {"name": "deep", "schema": deep}}
    response = served.post("/chat/completions", {**CHAT, "response_format": form})
    assert response.status_code in (200, 400), response.text


def test_unknown_harmless_fields_are_ignored(served: Running) -> None:
    extra = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "audio": None, "x": [1]}
    assert served.post("/chat/completions", {**CHAT, **extra}).status_code == 200


def test_unknown_models_paths_and_methods(served: Running) -> None:
    for path, body in (("/chat/completions", CHAT), ("/completions", TEXT)):
        error = refused(served.post(path, {**body, "model": "gpt-4"}), 404, "gpt-4", "menny", param="model")
        assert error["code"] == "model_not_found"
    refused(served.http.get(f"{served.url}/models/../../etc/passwd"), 404)
    refused(served.http.get(f"{served.root}/nowhere"), 404, "/nowhere")
    refused(served.http.get(f"{served.root}/%ff%0a%00"), 404)
    wrong = served.http.get(f"{served.url}/chat/completions")
    refused(wrong, 405)
    assert wrong.headers["allow"] == "POST"


def test_a_body_that_is_too_large(served: Running) -> None:
    url = f"{served.url}/completions"
    for content in (b"x" * 1_000_000, iter([b"x" * 50_000] * 20)):  # with its length, and in chunks without
        refused(served.http.post(url, content=content, headers=JSON), 413, "200,000")
    with closing(_connect(served)) as sock:  # the length alone is enough: nothing of it need be sent
        sock.sendall(_head("/v1/completions", f"Content-Length: {10**15}"))
        assert b" 413 " in sock.recv(4096)
    assert served.post("/completions", TEXT).status_code == 200


def test_a_body_that_does_not_come(served: Running) -> None:
    with closing(_connect(served)) as sock:
        sock.sendall(_head("/v1/completions", "Content-Length: 100") + b'{"model": ')
        sock.settimeout(5)
        assert b" 408 " in sock.recv(4096)


def test_a_head_that_does_not_end(served: Running) -> None:
    with closing(_connect(served)) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nX: ")
        began = time.monotonic()
        _until(lambda: not _trickle(sock), 5)
        assert time.monotonic() - began > 0.3
    with closing(_connect(served)) as sock:
        sock.settimeout(5)
        assert _rest(sock) == b""  # nor is one kept that says nothing


def test_other_names_of_a_server_without_a_key(served: Running) -> None:
    refused(served.http.get(f"{served.url}/models", headers={"Host": "evil.example:80"}), 403, "Host")
    port = served.root.rpartition(":")[2]
    assert served.http.get(f"{served.url}/models", headers={"Host": f"localhost:{port}"}).status_code == 200
    # A page of another site can send this without asking first; JSON it cannot.
    content = json.dumps(CHAT)
    refused(
        served.http.post(f"{served.url}/chat/completions", content=content, headers={"Content-Type": "text/plain"}), 400
    )


# ---------------------------------------- keys


def test_keys(locked: Running) -> None:
    for key in KEYS:
        assert locked.http.get(f"{locked.url}/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    wrong = ["Bearer", "Bearer first-ke", "Bearer first-key2", "Basic zzz", "first-key", "Bearer \xe9"]
    for given in [None, *wrong]:
        headers = {} if given is None else {"Authorization": given.encode("latin-1")}
        for path in ("/v1/models", "/metrics", "/nowhere", "/openapi.json"):
            response = locked.http.get(locked.root + path, headers=headers)
            refused(response, 401, "API key")
            assert "www-authenticate" in response.headers
    assert locked.http.get(f"{locked.root}/health").status_code == 200
    assert locked.http.get(f"{locked.url}/models", auth=("me", KEYS[1])).status_code == 200  # as browsers do


def test_a_body_is_not_read_without_a_key(locked: Running) -> None:
    with closing(_connect(locked)) as sock:
        sock.sendall(_head("/v1/completions", "Content-Length: 100"))
        assert b" 401 " in sock.recv(4096)


def test_requests_of_a_key_are_limited(locked: Running) -> None:
    first, second = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    with locked.http.stream(
        "POST", f"{locked.url}/chat/completions", json={**LONG, "stream": True}, headers=first
    ) as one:
        coming = one.iter_raw()
        next(coming)
        full = locked.post("/chat/completions", CHAT, headers=first)
        assert refused(full, 429)["type"] == "rate_limit_error"
        assert int(full.headers["retry-after"]) >= 1
        assert locked.post("/chat/completions", CHAT, headers=second).status_code == 200


def test_cors(locked: Running, served: Running) -> None:
    asks = {"Origin": "https://chat.example.org", "Access-Control-Request-Method": "POST"}
    url = "/v1/chat/completions"
    allowed = locked.http.options(locked.root + url, headers=asks)
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example.org"
    other = locked.http.options(locked.root + url, headers={**asks, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in served.http.options(served.root + url, headers=asks).headers


# ---------------------------------------- clients and queues


def test_clients_that_vanish_end_their_replies(served: Running) -> None:
    for body in ({**LONG, "stream": True}, LONG):
        socks = [_connect(served) for _ in range(4)]
        data = json.dumps(body).encode()
        for sock in socks:
            sock.sendall(_head("/v1/chat/completions", f"Content-Length: {len(data)}") + data)
        _until(lambda: served.worker.stats().sequences == 4)
        for sock in socks:
            sock.close()
        assert served.idle()


def test_a_reader_that_stops_ends_its_reply(served: Running) -> None:
    cancelled = served.worker.stats().finished["cancelled"]
    with closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", int(served.root.rpartition(":")[2])))
        data = json.dumps({**LONG, "stream": True, "n": 2, "logprobs": True, "top_logprobs": 20}).encode()
        sock.sendall(_head("/v1/chat/completions", f"Content-Length: {len(data)}") + data)
        _until(lambda: served.worker.stats().sequences == 2)
        assert served.post("/completions", TEXT).status_code == 200  # others are served meanwhile
        assert served.idle(30)
    assert served.worker.stats().finished["cancelled"] == cancelled + 1


def test_a_full_queue(served: Running) -> None:
    socks = [_connect(served) for _ in range(4)]
    data = json.dumps({**LONG, "stream": True, "n": 8}).encode()
    for sock in socks[:3]:  # one runs, and two may wait
        sock.sendall(_head("/v1/chat/completions", f"Content-Length: {len(data)}") + data)
    _until(lambda: served.worker.stats().waiting == 2)
    for path, body in (("/chat/completions", CHAT), ("/completions", {**TEXT, "prompt": ["a", "b"]})):
        response = served.post(path, body)
        refused(response, 429)
        assert int(response.headers["retry-after"]) >= 1
    for sock in socks:
        sock.close()
    assert served.idle(2)


def test_what_was_asked_is_not_in_the_log(served: Running, told: pytest.LogCaptureFixture) -> None:
    secret = "swordfish"
    ask = [{"role": "user", "content": secret}]
    served.post("/chat/completions", {**CHAT, "messages": ask})
    served.post("/chat/completions", {**CHAT, "messages": ask, "temperature": -1})
    served.post("/completions", {**TEXT, "prompt": secret * 10_000})
    assert secret not in told.text
    _until(lambda: sum(record.name == "octavo.serve" for record in told.records) == 3)
    lines = [record.getMessage() for record in told.records if record.name == "octavo.serve"]
    assert lines[0].startswith("POST /v1/chat/completions 200 ")
    assert "+1 tokens" in lines[0]
    with running(load(), log_prompts=True) as other:
        other.post("/chat/completions", {**CHAT, "messages": ask})
    assert secret in told.text


def test_a_model_that_fails_is_a_500_and_a_line(served: Running, told: pytest.LogCaptureFixture) -> None:
    model = served.worker.llm.model

    def fail(*_: object) -> None:
        raise OctavoError("the logits hold 1 NaN")

    hook = model.register_forward_pre_hook(fail)
    try:
        refused(served.post("/chat/completions", CHAT), 500)
        stream = served.post("/completions", {**TEXT, "stream": True})
    finally:
        hook.remove()
    last = json.loads(stream.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    assert not any(record.exc_info for record in told.records)
    assert served.post("/chat/completions", CHAT).status_code == 200


def test_an_end_in_peace(llm: LLM) -> None:
    with running(load(), drain=20) as one:
        found: dict[str, Any] = {}

        def ask() -> None:
            found["reply"] = one.post("/chat/completions", {**LONG, "max_tokens": 200})

        asking = threading.Thread(target=ask)
        with httpx.Client(base_url=one.root) as kept:
            asking.start()
            _until(lambda: one.worker.stats().running == 1)
            one.server.end()
            _until(lambda: kept.get("/health").status_code == 503)
            response = kept.post("/v1/chat/completions", json=CHAT)
            assert int(response.headers["retry-after"]) >= 1
            assert refused(response, 503)["code"] == "shutting_down"
        asking.join(20)
        assert found["reply"].status_code == 200
        assert found["reply"].json()["usage"]["completion_tokens"] == 200


def test_an_end_before_a_reply_is_finished(llm: LLM) -> None:
    with running(load(), drain=0) as one:
        with one.http.stream("POST", f"{one.url}/chat/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            one.server.end()
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"


# ---------------------------------------- settings


def test_settings_are_checked(tmp_path: Any) -> None:
    assert read_keys(["a", "b", "a"], {"OCTAVO_API_KEY": "c"}) == ("a", "b", "c")
    file = tmp_path / "keys"
    file.write_text("# mine\none\n\ntwo\n")
    assert read_keys([f"@{file}"], {}) == ("one", "two")
    file.write_text("")
    for bad in ([""], ["a b"], ["é"], ["@/nowhere"], [f"@{file}"]):
        with pytest.raises(OptionError):
            read_keys(bad, {})
    with pytest.raises(OptionError, match="key"):
        check_host("0.0.0.0", ())
    assert check_host("0.0.0.0", ("k",)) is None
    assert check_host("::1", ()) is not None
    options = {"drain": "0", "cors": "https://a.example, https://b.example", "body_limit": "1MiB", "bits": "4"}
    found = take_options(options, ["bits"])
    assert found == {"drain": 0.0, "cors": ("https://a.example", "https://b.example"), "body_limit": 1 << 20}
    assert options == {"bits": "4"}
    for name, value in [("drain", "-1"), ("max_queue", "0"), ("cors", "x"), ("log_prompts", "maybe"), ("drian", "1")]:
        with pytest.raises(OptionError, match=name):
            take_options({name: value})


def test_every_key_is_compared() -> None:
    config = ServeConfig("m", keys=("a", "b"))
    assert [config.key_of(one) for one in ("a", "b", "c", "", "é")] == ["key0", "key1", None, None, None]


def _connect(served: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(served.root.rpartition(":")[2])))


def _head(path: str, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def _rest(sock: socket.socket) -> bytes:
    try:
        return sock.recv(100)
    except ConnectionError:
        return b""


def _trickle(sock: socket.socket) -> bool:
    """Send one byte more; whether the other side still listens."""
    time.sleep(0.05)
    try:
        sock.sendall(b"y")
        sock.settimeout(0.01)
        return sock.recv(10) != b""
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def _until(true: Any, seconds: float = 10) -> None:
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "it did not come about"
        time.sleep(0.005)
