"""`octavo serve` as a process: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from conftest import tiny_args
from octavo.budget import plan_checkpoint
from octavo.checkpoint import open_checkpoint
from octavo.cli.options import left_of
from octavo.errors import OptionError
from octavo.llm import shipped_model
from octavo.plan import kv_cache_bytes
from octavo.serve.batch import MOST, batch_for, choose_batch
from run_octavo import command, refused, run

QUESTION = [{"role": "user", "content": "Who are you?"}]
LONG = {"model": "menny", "messages": QUESTION, "temperature": 1.5, "max_tokens": 300, "logit_bias": {"2": -100}}


class Process:
    """A server as a process of its own."""

    def __init__(self, *args: object, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command("serve", "--port", "0", *args),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise AssertionError(self.process.communicate()[1])

    def end(self, sig: int = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(sig)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@contextlib.contextmanager
def serving(*args: object, **options: Any) -> Iterator[Process]:
    one = Process(*args, **options)
    try:
        yield one
    finally:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
        for pipe in (one.process.stdout, one.process.stderr):
            assert pipe is not None
            pipe.close()


def test_it_serves_and_ends_in_peace(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("from-the-file\n")
    options = ("--host", "0.0.0.0", "--api-key", f"@{keys}", "-o", "drain=30", "-o", "batch=4")
    options += ("--memory", "700MB", "-o", "context=256", "-o", "prefix=10MB")
    with serving(*options, environment={"OCTAVO_API_KEY": "from-outside"}) as one:
        assert re.fullmatch(r"http://0\.0\.0\.0:\d+/v1", one.url)
        url = one.url.replace("0.0.0.0", "127.0.0.1")
        for key in ("from-the-file", "from-outside"):
            with openai.OpenAI(base_url=url, api_key=key) as client:
                assert [model.id for model in client.models.list()] == ["menny"]
        assert httpx.get(f"{url}/models").status_code == 401
        found: dict[str, httpx.Response] = {}
        headers = {"Authorization": "Bearer from-outside"}

        def ask() -> None:
            found["reply"] = httpx.post(f"{url}/chat/completions", json=LONG, headers=headers, timeout=60)

        asking = threading.Thread(target=ask)
        asking.start()
        give_up = time.monotonic() + 20
        while "octavo_requests_running 1.0" not in httpx.get(f"{url}/../metrics", headers=headers).text:
            assert time.monotonic() < give_up
        code, out, err = one.end()
        asking.join(20)
    assert found["reply"].status_code == 200
    assert found["reply"].json()["usage"]["total_tokens"] == 256  # all there is room for
    assert code == 0
    assert out == ""
    assert re.search(r"^4 sequences at a time, as asked: .* for 256 tokens", err, re.MULTILINE), err
    assert re.search(r"^\S+ \S+ POST /v1/chat/completions 200 33\+223 tokens [\d.]+ s$", err, re.MULTILINE), err
    assert "Traceback" not in err
    assert "from-" not in err


def test_the_page_stands_beside_the_api_and_a_second_signal_ends_at_once() -> None:
    with serving("--ui", "-o", "drain=600") as one:
        root = one.url.removesuffix("/v1")
        page = httpx.get(f"{root}/ui/")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert httpx.get(f"{one.url}/models").json()["data"][0]["id"] == "menny"
        assert set(httpx.get(f"{root}/nowhere").json()) == {"error"}
        body = {**LONG, "stream": True, "max_tokens": 450}
        with httpx.stream("POST", f"{one.url}/chat/completions", json=body, timeout=60) as response:
            coming = response.iter_raw()
            next(coming)
            one.process.send_signal(signal.SIGINT)
            give_up = time.monotonic() + 20
            while httpx.get(f"{root}/health").status_code == 200:
                assert time.monotonic() < give_up
            next(coming)
            code, _, err = one.end(signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err


def test_what_cannot_be_served() -> None:
    refused(run("serve", "--host", "0.0.0.0"), "--host 0.0.0.0", "key", hint="--api-key")
    refused(run("serve", "--host", "192.0.2.1", "--api-key", "k"), "192.0.2.1")
    refused(run("serve", "--host", "no.such.host.invalid", "--api-key", "k"), "no such address")
    refused(run("serve", "--api-key", "@/no/such/file"), "/no/such/file")
    refused(run("serve", "--port", "0", "-o", "drian=3"), "drian", hint="drain")
    refused(run("serve", "--port", "0", "-o", "drain=soon"), "drain")
    refused(run("serve", "--port", "0", "-o", "bits=5"), "bits")
    refused(run("serve", "--port", "0", "-o", "batch=many"), "batch")
    refused(run("serve", "--port", "0", "-o", "context=100000"), "context")
    refused(run("serve", "--port", "0", "/no/such/model"), "/no/such/model")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(run("serve", "--port", taken.getsockname()[1]), "in use", hint="--port 0")


# ---------------------------------------- how many at a time


def test_what_serving_takes_is_a_part_of_the_budget() -> None:
    assert left_of("1GiB", 64 << 20) == str(960 << 20)
    assert left_of(None, 64 << 20) is None
    with pytest.raises(OptionError, match="60MiB is all taken by the server itself"):
        left_of("60MiB", 64 << 20)


def test_a_batch_has_room_for_whole_contexts() -> None:
    args = tiny_args()
    each = kv_cache_bytes(args, 256, 1, 4)
    for available in (each, 1.5 * each, 7 * each, 16 * each, 1000 * each, float("inf")):
        batch = choose_batch(args, context=256, number=4, available=available)
        assert batch.size == int(min(16, available / each))
        assert kv_cache_bytes(args, 256, batch.size, 4) <= available
        assert batch.reason.startswith(f"{batch.size} sequences at a time")
    assert choose_batch(args, context=256, number=4, available=40 * each, wanted=40).size == 40
    assert choose_batch(args, context=256, number=4, available=0, least=1).size == 1


def test_a_batch_that_has_no_room_is_refused_with_what_has() -> None:
    args = tiny_args()
    each = kv_cache_bytes(args, 256, 1, 4)
    with pytest.raises(OptionError) as refusal:
        choose_batch(args, context=256, number=4, available=each - 1)
    assert refusal.value.hint is not None
    context = int(re.search(r"context=(\d+)", refusal.value.hint)[1])  # type: ignore[index]
    assert choose_batch(args, context=context, number=4, available=each - 1).size == 1
    with pytest.raises(OptionError) as refusal:
        choose_batch(args, context=256, number=4, available=5 * each, wanted=6)
    assert "batch=5" in str(refusal.value.hint)
    for wanted in (0, -1):
        with pytest.raises(OptionError):
            choose_batch(args, context=256, number=4, available=each, wanted=wanted)


def test_a_budget_bounds_the_batch() -> None:
    checkpoint = open_checkpoint(shipped_model())
    options: dict[str, Any] = {"dtype": None, "device": None, "bits": None, "prefix_bytes": 0, "wanted": None}
    least = plan_checkpoint(checkpoint, "2GB", context=512).footprint
    one = least.kv_cache
    for extra in (0, 1, 5, 40):
        budget = str(least.total + extra * one)
        batch = batch_for(checkpoint, memory=budget, context=512, **options)
        assert batch.size == min(MOST, 1 + extra)
    kept = {**options, "prefix_bytes": 2 * one}
    assert batch_for(checkpoint, memory=str(least.total + 5 * one), context=512, **kept).size == 4
    free = batch_for(checkpoint, memory=None, context=512, **options)
    assert free.size == MOST
    with pytest.raises(OptionError, match="513"):
        batch_for(checkpoint, memory=None, context=513, **options)
