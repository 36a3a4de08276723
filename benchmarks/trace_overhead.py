"""What tracing costs a reply: the time of decoding with and without `RoutingWatch`, in turns.

``python benchmarks/trace_overhead.py`` on a quiet machine. Measured are the shipped model, and random weights of
Mixtral 8x7B's dimensions (4 layers, 4 bits, compiled kernels); ids and weights are kept. Runs of some tokens with and
without tracing take turns, so that what else the machine does falls on both, and the medians of all their steps are
compared; what it takes to begin, to put the ids in order and to end is added, shared out over a run's tokens. Writes
benchmarks/results/trace_overhead.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

import octavo
from octavo.bench.synthetic import synthetic_model
from octavo.engine import Engine
from octavo.sampling import SamplingParams
from octavo.shapes import shape
from octavo.watch import RoutingWatch

RESULTS = Path(__file__).parent / "results" / "trace_overhead.json"
LAYERS, BITS, PROMPT = 4, 4, 32


def measure(engine: Engine, pairs: int, run: int) -> dict[str, Any]:
    """Milliseconds a token, plain and traced, and the share that tracing adds."""
    ids = torch.randint(3, engine.model.args.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(1))
    watch = RoutingWatch(engine, weights=True)
    steps: dict[bool, list[float]] = {False: [], True: []}
    around: list[float] = []
    for number in range(2 * pairs + 2):
        traced = number % 4 in (1, 2)  # plain, traced, traced, plain: neither comes first always
        seq_id = engine.add(ids.tolist(), SamplingParams(temperature=0, max_tokens=run + 2))
        engine.step()
        engine.step()
        began = time.perf_counter()
        if traced:
            watch.watch(seq_id)
        spent = time.perf_counter() - began
        for _ in range(run):
            began = time.perf_counter()
            engine.step()
            steps[traced].append(time.perf_counter() - began)
        began = time.perf_counter()
        found = watch.routed(seq_id)
        watch.forget(seq_id)
        spent += time.perf_counter() - began
        assert len(found.ids) == run * traced
        engine.cancel(seq_id)
        if traced:
            around.append(spent / run)
    plain, traced_step = statistics.median(steps[False]), statistics.median(steps[True])
    return {
        "plain_ms": round(1000 * plain, 3),
        "traced_ms": round(1000 * (traced_step + statistics.median(around)), 3),
        "overhead": round((traced_step + statistics.median(around)) / plain - 1, 4),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100, help="of neighbouring runs")
    pairs = parser.parse_args().pairs
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "pairs": pairs,
    }
    real = synthetic_model(dataclasses.replace(shape("mixtral-8x7b"), n_layers=LAYERS), BITS)
    report[f"mixtral-8x7b, {LAYERS} layers, {BITS} bits"] = measure(Engine(real), pairs // 2, run=16)
    del real
    torch.set_num_threads(1)  # as `octavo chat` does for a model so small
    report["menny"] = measure(octavo.LLM.load("menny").engine, pairs, run=64)
    print(json.dumps(report, indent=1))
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
