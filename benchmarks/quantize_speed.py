"""Quantising one expert of real Mixtral 8x7B sizes: speed and memory at every number of bits.

``python benchmarks/quantize_speed.py [--out FILE]`` on a quiet machine. The expert's three matrices, random bfloat16,
are quantised as a store is written, one after the other, the packed bytes kept until the expert is whole; in a process
of its own for each format. Prints JSON: MB of bfloat16 a second, the median and the best of the runs, and what the
process needed at most beyond the weights; and writes it to FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

SHAPES = {"w1": (14336, 4096), "w3": (14336, 4096), "w2": (4096, 14336)}
EXPERT = """
import json, sys, time
import torch
from octavo.quant.formats import FORMATS
from octavo.quant.quantize import dequantize, quantize

format, method, threads, runs, shapes = json.loads(sys.argv[1])
torch.set_num_threads(threads)
generator = torch.Generator().manual_seed(0)
weights = [(torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16) for shape in shapes]
tiny = quantize(weights[0][:256], FORMATS[format], method)  # torch's own beginnings, on every thread
difference = (dequantize(tiny) - weights[0][:256].float()).norm() / weights[0][:256].float().norm()
def peak(): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before, seconds = peak(), []
for _ in range(runs):
    packed = None
    started = time.perf_counter()
    packed = [quantize(w, FORMATS[format], method) for w in weights]
    seconds.append(time.perf_counter() - started)
print(json.dumps({
    "seconds": seconds,
    "nbytes": sum(w.nbytes for w in weights),
    "packed_nbytes": sum(p.data.nbytes for p in packed),
    "peak_extra": peak() - before,
    "relative_error": float(difference),
}))
"""


def measure(format: str, method: str, threads: int, runs: int) -> dict[str, float]:
    """Quantise the expert in a process of its own."""
    task = json.dumps([format, method, threads, runs, list(SHAPES.values())])
    done = subprocess.run([sys.executable, "-c", EXPERT, task], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    seconds = sorted(found["seconds"])
    return {
        "mb_per_s": round(found["nbytes"] / seconds[len(seconds) // 2] / 1e6, 1),
        "best_mb_per_s": round(found["nbytes"] / seconds[0] / 1e6, 1),
        "packed_mib": round(found["packed_nbytes"] / 2**20, 1),
        "mib_beyond_weights": round(found["peak_extra"] / 2**20, 1),
        "relative_error": round(found["relative_error"], 5),
    }


def main() -> None:
    """Measure, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=["q8", "q4", "q3", "q2"])
    parser.add_argument("--method", default="optimal")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file for the results")
    options = parser.parse_args()
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": options.threads,
        "method": options.method,
        "mib_of_weights": round(sum(2 * rows * cols for rows, cols in SHAPES.values()) / 2**20, 1),
        "formats": {f: measure(f, options.method, options.threads, options.runs) for f in options.formats},
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
