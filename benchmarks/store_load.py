"""From the shell to the first token of a store, and the memory that takes: real Mixtral 8x7B sizes, the first layers.

``python benchmarks/store_load.py`` on a quiet machine with a few GB of disk to spare. Writes a store of random weights
(once; --store keeps it), reads it so that the page cache is warm, and then starts processes that load it as
`octavo.load_model` does, checksums included, read a prompt of 16 tokens and choose the next. Prints JSON, the medians
of the runs, and writes it to benchmarks/results/store_load.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from octavo.bench.synthetic import synthetic_store
from octavo.shapes import shape

RESULTS = Path(__file__).parent / "results" / "store_load.json"
FIRST_TOKEN = """
import json, sys, time
started = time.perf_counter()
import torch
import octavo
from octavo.bench.measure import peak_rss_bytes
from octavo.engine import Engine
from octavo.sampling import SamplingParams
imported = time.perf_counter()
model, _ = octavo.load_model(sys.argv[1])
loaded = time.perf_counter()
engine = Engine(model)
engine.add(list(range(16)), SamplingParams(max_tokens=1, temperature=0))
(event,) = engine.step()
assert event.token_id is not None, event
print(json.dumps({
    "first_token_seconds": time.time() - float(sys.argv[2]),
    "import_seconds": imported - started,
    "load_seconds": loaded - imported,
    "prefill_seconds": time.perf_counter() - loaded,
    "peak_rss_bytes": peak_rss_bytes(),
}))
"""


def measure(store: Path, runs: int) -> dict[str, float]:
    """Medians over processes; the first token's time is from before its process started."""
    found: dict[str, list[float]] = {}
    for _ in range(runs):
        command = [sys.executable, "-c", FIRST_TOKEN, str(store), str(time.time())]
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        for name, value in json.loads(done.stdout).items():
            found.setdefault(name, []).append(value)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bits", type=int, default=4, choices=(8, 4, 3, 2))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--store", type=Path, help="where the store lies, or is to be written and kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = options.store or Path(scratch) / "store"
        if not store.exists():
            synthetic_store(shape("mixtral-8x7b", options.layers), options.bits, store)
        nbytes = sum(len(path.read_bytes()) for path in store.iterdir())
        found = measure(store, options.runs)
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "shape": "mixtral-8x7b",
        "layers": options.layers,
        "bits": options.bits,
        "runs": options.runs,
        "store_bytes": nbytes,
        **found,
        "peak_rss_beyond_store_bytes": round(found["peak_rss_bytes"] - nbytes),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
