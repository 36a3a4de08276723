"""Converting a checkpoint of real Mixtral 8x7B tensor sizes: memory, and speed beside a plain copy of the same bytes.

``python benchmarks/convert.py --folder DIR`` on a quiet machine with 20 GB of disk to spare. Two layers of random
bfloat16 weights are written, then copied and converted in turn, each conversion in a process of its own; medians are
compared. Both sides end with their bytes on the disk (fsync), take turns in going first, and leave the disk some
seconds to settle: a virtual one writes at 4 GB/s, and after some gigabytes at a sixth of that. Writes
benchmarks/results/convert.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from octavo.args import ModelArgs, MoEArgs
from octavo.checkpoint.names import HF, canonical_shapes
from octavo.checkpoint.output import Plain, index_of, safetensors_files
from octavo.checkpoint.writer import write_file, write_json
from octavo.storage.safetensors import INDEX

RESULTS = Path(__file__).parent / "results" / "convert.json"
SETTLE = 4.0  # seconds
ARGS = ModelArgs(4096, 2, 128, 14336, 32, 8, 32000, moe=MoEArgs(8, 2))
CONVERT = """
import json, sys, time
from pathlib import Path
import octavo.storage.gguf_write, gguf, torch
from octavo.convert import plan_conversion
torch.set_num_threads(2)
def peak(): return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
idle = peak()
source, target, to, dtype = sys.argv[1:]
started = time.perf_counter()
plan_conversion(source, target, to=to, dtype=dtype or None).run()
print(json.dumps({"seconds": time.perf_counter() - started, "above_idle": peak() - idle}))
"""


def make_source(folder: Path) -> None:
    """Write the synthetic checkpoint in Hugging Face layout."""
    folder.mkdir()
    shapes = canonical_shapes(ARGS)
    generator = torch.Generator().manual_seed(0)
    files = safetensors_files(HF, ARGS, lambda stored: Plain(torch.bfloat16), shard_bytes=2_000_000_000)

    def read(name: str) -> torch.Tensor:
        return (torch.randn(shapes[name], generator=generator) * 0.02).to(torch.bfloat16)

    for file in files:
        write_file(folder / file.name, file, read)
    write_json(folder / INDEX, index_of(files))
    write_json(folder / "config.json", ARGS.to_hf() | {"dtype": "bfloat16"})


def copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy, flushed to the disk."""
    started = time.perf_counter()
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        handle = os.open(target / path.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - started


def convert(source: Path, target: Path, to: str, dtype: str) -> dict[str, float]:
    """Seconds, and bytes of memory above the idle process, of a conversion in a process of its own."""
    command = [sys.executable, "-c", CONVERT, str(source), str(target), to, dtype]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def remove(path: Path) -> None:
    """Remove a folder or a file, and let the disk settle."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.sync()
    time.sleep(SETTLE)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's temporary folder")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    jobs = [("hf", ""), ("mistral", ""), ("mlx", ""), ("gguf", ""), ("gguf", "q8_0"), ("gguf", "q4_0"), ("mlx", "q4")]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        source = work / "source"
        make_source(source)
        nbytes = sum(path.stat().st_size for path in source.iterdir())
        copies: list[float] = []
        results: dict[str, dict[str, float]] = {}
        for to, dtype in jobs:
            runs: list[dict[str, float]] = []
            before: list[float] = []
            for turn in range(options.runs if not dtype else 1):
                target = work / ("out.gguf" if to == "gguf" else "out")
                for copying in (turn % 2 == 0, turn % 2 == 1):
                    if copying:
                        before.append(copy(source, work / "copy"))
                        remove(work / "copy")
                    else:
                        runs.append(convert(source, target, to, dtype))
                        remove(target)
            copies += before
            ratios = [one / run["seconds"] for one, run in zip(before, runs, strict=True)]
            results[f"{to} {dtype}".strip()] = {
                "seconds": round(statistics.median(run["seconds"] for run in runs), 2),
                "speed_to_copy": round(statistics.median(ratios), 3),
                "gib_above_idle": round(max(run["above_idle"] for run in runs) / 2**30, 3),
            }
            print(to, dtype, results[f"{to} {dtype}".strip()], flush=True)
            report = {
                "date": date.today().isoformat(),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "bytes": nbytes,
                "copy_seconds": round(statistics.median(copies), 2),
                "conversions": results,
            }
            RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
