"""`octavo serve` under load: many streaming clients at once, their replies, fairness, throughput and second turns.

    python benchmarks/serve_load.py [--seconds 60] [--store DIR] [--llama FILE] [--steps crowd throughput faults real]

The server is a process of its own, and so are the clients (this one), on the same machine. `crowd`, `throughput` and
`faults` use the shipped model. `real` uses four layers of Mixtral 8x7B's dimensions with random 4-bit weights, written
to --store once, and beside it, where --llama is given, llama-cpp-python's server on the same weights in
Q4_0 (octavo convert DIR FILE --to gguf --dtype q4_0). Replies have one length: the end-of-text token is biased away.
Results: results/serve_load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cpu_peers import machine, versions

from octavo.bench.synthetic import synthetic_store
from octavo.shapes import shape

RESULTS = Path(__file__).parent / "results" / "serve_load.json"
OCTAVO = Path(sys.executable).parent / "octavo"
CROWD, MANY, ROUNDS = 64, 16, 3
LENGTH = 48  # tokens of a reply
VANISH, VANISH_ROUNDS = 200, 4
REAL_LENGTH, REAL_MANY, REAL_LAYERS = 64, 8, 4
QUESTIONS = [
    *(f"What is the capital of {country}?" for country in ("France", "Italy", "Spain", "Germany", "Japan", "Peru")),
    *(f"What is {a} plus {b}?" for a, b in ((12, 30), (25, 61), (7, 88), (41, 41), (19, 73), (64, 23))),
    *("Who are you?", "What is a mixture of experts?", "Tell me a joke.", "How do you say seven in French?"),
]


@dataclass
class Reply:
    """What a client saw of one stream."""

    status: int
    text: str = ""
    tokens: int = 0
    complete: bool = False
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    ended: float = 0.0
    retry_after: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.started


async def ask(url: str, path: str, body: dict[str, Any]) -> Reply:
    """One streaming request over a connection of its own; a thin client, as it shares the machine with the server."""
    parts, data = urlsplit(url), json.dumps(body | {"stream": True}).encode()
    reply = Reply(0)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    try:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        )
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        reply.status = int((await reader.readline()).split()[1])
        async for line in _lines(reader):
            if line.lower().startswith(b"retry-after:"):
                reply.retry_after = float(line.partition(b":")[2])
            elif line == b"data: [DONE]":
                reply.complete = True
            elif line.startswith(b"data: "):
                _take(reply, json.loads(line[6:]))
    finally:
        reply.ended = time.perf_counter()
        writer.close()
    return reply


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := await reader.readline():
        yield line.strip()


def _take(reply: Reply, event: dict[str, Any]) -> None:
    for choice in event["choices"]:
        text = choice["delta"].get("content") if "delta" in choice else choice["text"]
        reply.tokens += bool(text)  # where usage is not told: one a token, but for parts of characters
        if text and not reply.first:
            reply.first = time.perf_counter()
        reply.text += text or ""
    if event.get("usage"):
        reply.tokens = event["usage"]["completion_tokens"]


# ---------------------------------------- servers


@contextmanager
def octavo(model: str, *options: str) -> Iterator[str]:
    """A server's address."""
    with started(model, *options) as (url, _):
        yield url


@contextmanager
def started(model: str, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server's address, and its process."""
    command = [str(OCTAVO), "serve", model, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            yield url.removesuffix("/v1"), process
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def llama(file: str, parallel: int) -> Iterator[str]:
    """llama-cpp-python's server, which takes one request after another."""
    port = 18123
    command = [sys.executable, "-m", "llama_cpp.server", "--model", file, "--port", str(port), "--n_ctx", "1024"]
    command += ["--interrupt_requests", "False"]  # else a new request ends the one before it
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                time.sleep(0.5)
                try:
                    asyncio.run(ask(f"http://127.0.0.1:{port}", "/v1/models", {}))
                    break
                except (OSError, IndexError, ValueError):
                    continue
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


# ---------------------------------------- the shipped model


def question(text: str, eos_id: int) -> dict[str, Any]:
    """A request for a reply of LENGTH tokens."""
    return {
        "model": "menny",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": LENGTH,
        "logit_bias": {str(eos_id): -100},
        "stream_options": {"include_usage": True},
    }


async def crowd(url: str, bodies: dict[str, dict[str, Any]], clients: int, seconds: float) -> list[tuple[str, Reply]]:
    """So many clients, each asking again as soon as it has its reply."""
    until, replies = time.perf_counter() + seconds, []

    async def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.perf_counter() < until:
            text = rng.choice(list(bodies))
            reply = await ask(url, "/v1/chat/completions", bodies[text])
            replies.append((text, reply))
            if reply.status == 429:
                await asyncio.sleep(reply.retry_after)

    await asyncio.gather(*(client(seed) for seed in range(clients)))
    return replies


def measure_crowd(seconds: float) -> dict[str, Any]:
    """CROWD clients: errors, incomplete streams, replies that differ from the same request alone, fairness."""
    bodies = {text: question(text, _eos_id()) for text in QUESTIONS}
    with octavo("menny") as url:
        alone = {text: asyncio.run(ask(url, "/v1/chat/completions", body)).text for text, body in bodies.items()}
        replies = asyncio.run(crowd(url, bodies, CROWD, seconds))
    good = [reply for _, reply in replies if reply.status == 200]
    times = sorted(reply.seconds for reply in good)
    return {
        "clients": CROWD,
        "seconds": seconds,
        "replies": len(good),
        "refused_429": sum(reply.status == 429 for _, reply in replies),
        "errors": sum(reply.status not in (200, 429) for _, reply in replies),
        "incomplete": sum(not reply.complete or reply.tokens != LENGTH for reply in good),
        "different": sum(reply.status == 200 and reply.text != alone[text] for text, reply in replies),
        "tok_s": sum(reply.tokens for reply in good) / (max(r.ended for r in good) - min(r.started for r in good)),
        "median_seconds": statistics.median(times),
        "slowest_seconds": times[-1],
        "slowest_over_median": times[-1] / statistics.median(times),
        "median_first_token_seconds": statistics.median(reply.first - reply.started for reply in good),
    }


def measure_throughput(seconds: float) -> dict[str, Any]:
    """One client and MANY, in turn."""
    bodies = {text: question(text, _eos_id()) for text in QUESTIONS}
    rates: dict[int, list[float]] = {1: [], MANY: []}
    with octavo("menny") as url:
        for _ in range(ROUNDS):
            for clients, found in rates.items():
                found.append(_rate([reply for _, reply in asyncio.run(crowd(url, bodies, clients, seconds))]))
    return _compared(rates, MANY)


def _rate(replies: list[Reply]) -> float:
    bad = [reply.status for reply in replies if reply.status != 200]
    if bad:
        raise SystemExit(f"{len(bad)} of {len(replies)} requests failed: {bad[0]}")
    return sum(reply.tokens for reply in replies) / (
        max(reply.ended for reply in replies) - min(reply.started for reply in replies)
    )


def _compared(rates: dict[int, list[float]], many: int) -> dict[str, Any]:
    medians = {clients: statistics.median(found) for clients, found in rates.items()}
    return {"tok_s": rates, "median_tok_s": medians, "ratio": medians[many] / medians[1]}


def _eos_id() -> int:
    from octavo.llm import shipped_model
    from octavo.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(shipped_model())
    assert tokenizer is not None
    assert tokenizer.eos_id is not None
    return tokenizer.eos_id


# ---------------------------------------- faults


async def vanish(url: str, body: dict[str, Any]) -> None:
    """Ask, read the first event, and go away."""
    parts, data = urlsplit(url), json.dumps(body | {"stream": True}).encode()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    async for line in _lines(reader):
        if line.startswith(b"data: ") or b" 429 " in line:
            break
    writer.transport.abort()


async def vanish_all(url: str, body: dict[str, Any]) -> None:
    await asyncio.gather(*(vanish(url, body) for _ in range(VANISH)))


def running(url: str) -> int:
    """Sequences that a server runs, and requests that wait."""
    lines = _get(f"{url}/metrics").decode().splitlines()
    names = ("octavo_sequences_running ", "octavo_requests_waiting ")
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(names))


def rss(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def measure_faults() -> dict[str, Any]:
    """Clients that vanish, round after round; then SIGTERM while replies are under way."""
    body = question(QUESTIONS[0], _eos_id()) | {"max_tokens": 400}
    after, memory = [], []
    with started("menny", "-o", "max_queue=1000") as (url, process):
        for _ in range(VANISH_ROUNDS):
            asyncio.run(vanish_all(url, body))
            gone = time.perf_counter()
            while running(url):
                time.sleep(0.02)
            after.append(time.perf_counter() - gone)
            memory.append(rss(process.pid))

        async def end_under_load() -> list[Reply]:
            asked = [asyncio.ensure_future(ask(url, "/v1/chat/completions", body | {"max_tokens": LENGTH}))]
            asked += [
                asyncio.ensure_future(ask(url, "/v1/chat/completions", question(text, _eos_id()))) for text in QUESTIONS
            ]
            await asyncio.sleep(0.5)
            process.terminate()
            return list(await asyncio.gather(*asked))

        replies = asyncio.run(end_under_load())
        code = process.wait(60)
    return {
        "vanished": VANISH,
        "seconds_until_nothing_runs": after,
        "rss_bytes_after_each_round": memory,
        "under_way_at_sigterm": len(replies),
        "complete_after_sigterm": sum(reply.complete and reply.tokens == LENGTH for reply in replies),
        "exit_code": code,
    }


# ---------------------------------------- real dimensions


def make_real(folder: Path) -> None:
    """Four layers with random weights, and Mixtral's own vocabulary, which mistral-common carries."""
    import mistral_common

    synthetic_store(shape("mixtral-8x7b", REAL_LAYERS), 4, folder)
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")


def words(count: int, seed: int) -> str:
    """English-like words of about a token and a half each."""
    rng = random.Random(seed)
    return " ".join(
        rng.choice(("river", "stone", "light", "paper", "winter", "seven", "garden", "slow")) for _ in range(count)
    )


async def batch(url: str, clients: int, seed: int, model: str) -> list[Reply]:
    """So many requests at once, with prompts of their own."""

    def body(i: int) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": words(4, seed * 1000 + i),
            "temperature": 1.0,
            "seed": i,
            "max_tokens": REAL_LENGTH,
            "logit_bias": {"2": -100},
            "stream_options": {"include_usage": True},
        }

    return list(await asyncio.gather(*(ask(url, "/v1/completions", body(i)) for i in range(clients))))


def decode_rate(replies: list[Reply]) -> float:
    """Tokens a second, from the first request to the last token; prompts included."""
    if any(reply.status != 200 for reply in replies):
        raise SystemExit(f"a request failed: {[reply.status for reply in replies]}")
    if any(not 0.9 * REAL_LENGTH <= reply.tokens <= REAL_LENGTH for reply in replies):
        raise SystemExit(f"replies are not as long as they should be: {[reply.tokens for reply in replies]}")
    return (
        len(replies) * REAL_LENGTH / (max(reply.ended for reply in replies) - min(reply.started for reply in replies))
    )


def measure_batches(url: str, model: str) -> dict[str, Any]:
    """One client and REAL_MANY, in turn, after one that is not counted."""
    rates: dict[int, list[float]] = {1: [], REAL_MANY: []}
    asyncio.run(batch(url, 1, 99, model))
    for number in range(ROUNDS):
        for clients, found in rates.items():
            found.append(decode_rate(asyncio.run(batch(url, clients, number, model))))
    return _compared(rates, REAL_MANY)


def measure_second_turn(url: str, model: str) -> dict[str, Any]:
    """Time to the first token of a conversation's first turn, of about 1,000 tokens, and of its second."""

    def body(turns: list[dict[str, str]]) -> dict[str, Any]:
        return {
            "model": model,
            "messages": turns,
            "temperature": 0,
            "max_tokens": REAL_LENGTH,
            "logit_bias": {"2": -100},
        }

    found = []
    for seed in range(ROUNDS):
        turns = [{"role": "user", "content": words(900, seed)}]
        first = asyncio.run(ask(url, "/v1/chat/completions", body(turns)))
        turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": words(20, seed + 50)}]
        second = asyncio.run(ask(url, "/v1/chat/completions", body(turns)))
        found.append((first.first - first.started, second.first - second.started))
    return {"seconds": found, "ratio": statistics.median(second / first for first, second in found)}


def measure_real(store: Path, llama_file: str | None) -> dict[str, Any]:
    """Octavo, and llama.cpp's server if there is one."""
    make_real(store)
    found: dict[str, Any] = {}
    with octavo(str(store), "-o", "context=2048", "-o", f"batch={REAL_MANY}") as url:
        model = json.loads(_get(f"{url}/v1/models"))["data"][0]["id"]
        found["octavo"] = measure_batches(url, model)
        found["second_turn"] = measure_second_turn(url, model)
    if llama_file is not None:
        with llama(llama_file, REAL_MANY) as url:
            found["llama.cpp"] = measure_batches(url, "any")
        ours, theirs = (found[name]["median_tok_s"][REAL_MANY] for name in ("octavo", "llama.cpp"))
        found["octavo_over_llama"] = ours / theirs
    return found


def _get(url: str) -> bytes:
    from urllib.request import urlopen

    with urlopen(url) as answer:
        return bytes(answer.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--store", type=Path, help="where the random model of four layers is, or is to be written")
    parser.add_argument("--llama", metavar="FILE", help="the same in GGUF, for llama-cpp-python's server")
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=("crowd", "throughput", "faults", "real"),
        default=["crowd", "throughput", "faults"],
    )
    given = parser.parse_args()
    if "real" in given.steps and given.store is None:
        parser.error("real needs --store")
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "crowd": lambda: measure_crowd(given.seconds),
        "throughput": lambda: measure_throughput(given.seconds / 6),
        "faults": measure_faults,
        "real": lambda: measure_real(given.store, given.llama),
    }
    report: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for step in given.steps:
        found = {"date": date.today().isoformat(), "machine": machine(), "versions": versions()} | steps[step]()
        report[step] = found
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
        print(step, json.dumps(found))


if __name__ == "__main__":
    main()
