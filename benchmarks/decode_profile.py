"""Where the time of a decode step goes, at real Mixtral 8x7B dimensions: in the kernels, and in each part around them.

``python benchmarks/decode_profile.py`` on a quiet machine. Random weights, the first layers of the model, one token
after another by the real engine, with a timer around every part; a part's time is its own, without that of timed parts
within. Steps with and without timers take turns in stretches, and the difference is what the timers cost. Medians over
the steps. Prints a table and writes benchmarks/results/decode_profile.json.

"Kernels" are the products with weights alone: what compiled blocks do besides, and what Python does to call them,
counts as outside.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

import octavo.cache
import octavo.compiled
import octavo.engine
import octavo.model
from octavo.bench.synthetic import synthetic_model
from octavo.compiled import KernelBlock, KernelNorm
from octavo.engine import Engine
from octavo.kernels import backend, threads
from octavo.kernels.backend import native
from octavo.kernels.block import Block
from octavo.kernels.modules import KernelLinear
from octavo.kernels.ops import spent
from octavo.model import Mixtral
from octavo.sampling import SamplingParams
from octavo.shapes import shape

RESULTS = Path(__file__).parent / "results" / "decode_profile.json"
STRETCH = 8  # steps
PRODUCTS = "products with weights"


def parts() -> list[tuple[str, Any, str]]:
    """Every timed part: what it is called, and the function, as an attribute of something."""
    kernels = native()
    if kernels is None:
        raise SystemExit("there are no compiled kernels here")
    return [
        ("compiled blocks, the rest", kernels, "block"),
        ("head, norm and Python around their products", kernels, "linear"),
        ("head, norm and Python around their products", KernelLinear, "forward"),
        ("head, norm and Python around their products", KernelNorm, "forward"),
        ("calling the compiled blocks", Block, "forward"),
        ("calling the compiled blocks", KernelBlock, "forward"),
        ("embedding", nn.Embedding, "forward"),
        ("rotary embedding", octavo.model, "rotary_embedding"),
        ("cache", octavo.cache.RowView, "begin"),
        ("cache", octavo.compiled, "BlockStep"),
        ("rest of the model", Mixtral, "forward"),
        ("sampling", octavo.engine, "sample"),
        ("engine", Engine, "step"),
    ]


class Timers:
    """Each part's own seconds, summed up until they are taken."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]  # seconds of timed parts within each open one

    def around(self, part: str, owner: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""
        inner, seconds, now = self._inner, self.seconds, time.perf_counter

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            products, started = spent()[0], now()
            try:
                return function(*args, **kwargs)
            finally:
                passed = now() - started
                if owner is native():  # what is not compiled has its products in parts within
                    products = spent()[0] - products
                    seconds[PRODUCTS] += products
                    inner[-1] += products
                seconds[part] += passed - inner.pop()
                inner[-1] += passed

        return timed

    def take(self) -> dict[str, float]:
        """The seconds so far, which are forgotten."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Timers around all parts, for as long as the context lasts."""
        with contextlib.ExitStack() as stack:
            for part, owner, name in parts():
                original = getattr(owner, name)
                setattr(owner, name, self.around(part, owner, original))
                stack.callback(setattr, owner, name, original)
            yield


def profile(model: Mixtral, prompt: int, steps: int) -> dict[str, Any]:
    """Decode behind a prompt of random tokens; seconds of timed steps by part, and of others as a whole."""
    engine = Engine(model, max_batch_size=1, prefill_chunk=512)
    ids = torch.randint(0, model.args.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    # A temperature of 1 over random logits: tokens are as good as random, and go to all experts.
    engine.add(ids, SamplingParams(max_tokens=2 * steps + STRETCH + 8, temperature=1.0, seed=0))
    for _ in range(STRETCH):  # the prompt, and first touches
        engine.step()
    timers = Timers()
    timed: list[dict[str, float]] = []
    plain: list[float] = []
    for begin in range(0, steps, STRETCH):
        count = min(STRETCH, steps - begin)
        with timers.installed():
            for _ in range(count):
                engine.step()
                timed.append(timers.take())
        for _ in range(count):
            started = time.perf_counter()
            engine.step()
            plain.append(time.perf_counter() - started)
    return summary(timed, plain)


def summary(timed: list[dict[str, float]], plain: list[float]) -> dict[str, Any]:
    """Medians over the steps; shares are of each step, and then their median."""
    totals = [sum(step.values()) for step in timed]
    names = dict.fromkeys((PRODUCTS, *(part for part, _, _ in parts())))
    found = {}
    for part in (name for name in names if name in timed[0]):
        seconds = [step.get(part, 0.0) for step in timed]
        shares = [one / total for one, total in zip(seconds, totals, strict=True)]
        found[part] = {
            "microseconds": round(1e6 * statistics.median(seconds), 1),
            "share": round(statistics.median(shares), 5),
        }
    outside = [1 - step.get(PRODUCTS, 0.0) / total for step, total in zip(timed, totals, strict=True)]
    return {
        "milliseconds_a_step": round(1e3 * statistics.median(totals), 3),
        "milliseconds_without_timers": round(1e3 * statistics.median(plain), 3),
        "outside_kernels_fraction": round(statistics.median(outside), 5),
        "outside_kernels_fraction_range": [round(min(outside), 5), round(max(outside), 5)],
        "parts": found,
    }


def table(report: dict[str, Any]) -> str:
    """In markdown."""
    lines = ["| part | microseconds a step | share |", "|---|---|---|"]
    for part, row in report["parts"].items():
        lines.append(f"| {part} | {row['microseconds']:.0f} | {row['share']:.2%} |")
    lines.append(f"| outside the kernels | | {report['outside_kernels_fraction']:.2%} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mixtral-8x7b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bits", type=int, default=4, choices=(16, 8, 4, 3, 2))
    parser.add_argument("--prompt", type=int, default=64, help="tokens before the first step")
    parser.add_argument("--steps", type=int, default=128, help="timed ones; as many are not timed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model = synthetic_model(shape(options.shape, options.layers), options.bits)
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "backend": backend().name,
        "threads": threads(),
        "torch": torch.__version__,
        "shape": options.shape,
        "layers": options.layers,
        "bits": options.bits,
        "prompt": options.prompt,
        "steps": options.steps,
        **profile(model, options.prompt, options.steps),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    print(
        f"{report['milliseconds_a_step']:.2f} ms a step, {report['milliseconds_without_timers']:.2f} ms without timers",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
