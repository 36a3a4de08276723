"""How fast bursts of reads are while a core computes: why streamed decode stays below what the disk allows.

    python benchmarks/disk_beside_products.py STORE

A burst is what a token lacks of a layer at 20 GiB: two tails of 15 MB, at random places of a store's files. One thread
computes meanwhile, so that the other core is free for the reads: nothing, products in registers, or reads of memory.
Results go to results/disk_beside_products.json; run it on a quiet machine.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from octavo.experts.reader import PAGE, Layout, Reader
from octavo.kernels import dot_peak, read_bandwidth, set_threads
from octavo.kernels.ops import Matrix
from octavo.storage.files import MappedFile, Place

RESULTS = Path(__file__).parent / "results" / "disk_beside_products.json"
TAIL, AT_ONCE, BURSTS, ROUNDS = 15 << 20, 2, 40, 3


@contextmanager
def meanwhile(work: Callable[[], object] | None) -> Iterator[None]:
    """Repeat some work in a thread."""
    over = threading.Event()

    def repeat() -> None:
        while work is not None and not over.is_set():
            work()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def burst(reader: Reader, files: list[MappedFile], memory: torch.Tensor) -> float:
    """Seconds of one."""
    layouts = []
    for file in random.choices(files, k=AT_ONCE):
        begin = random.randrange(file.size - TAIL) // PAGE * PAGE
        layouts.append(Layout([Place(file, begin, begin + TAIL)]))
    started = time.perf_counter()
    for read in [reader.start(one, memory.data_ptr() + i * (TAIL + PAGE)) for i, one in enumerate(layouts)]:
        read.check()
    return time.perf_counter() - started


def main() -> None:
    """Measure in turns."""
    set_threads(1)
    files = [MappedFile(path) for path in sorted(Path(sys.argv[1]).glob("*.safetensors"))]
    files = [file for file in files if file.size > 1 << 30]
    memory = torch.ones(AT_ONCE * (TAIL + PAGE) + PAGE, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % PAGE :]
    weights = [Matrix(torch.ones(1 << 18, 1024, dtype=torch.bfloat16))]
    works: dict[str, Callable[[], object] | None] = {
        "nothing": None,
        "products in registers": lambda: dot_peak(0.01),
        "reads of memory": lambda: read_bandwidth(weights),
    }
    reader, speeds = Reader(), {name: list[float]() for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            with meanwhile(work):
                seconds = [burst(reader, files, memory) for _ in range(BURSTS)]
            speeds[name].append(AT_ONCE * TAIL / statistics.median(seconds) / 1e9)
    found = {name: {"gb_s": statistics.median(each), "rounds": each} for name, each in speeds.items()}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
