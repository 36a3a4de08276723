"""The whole 46.7 B model within budgets, beside llama.cpp's mmap: what docs/memory.md and the README tell.

    python benchmarks/any_memory.py --store DIR --store3 DIR --gguf FILE [--steps 4GiB 8GiB ... llama start bits3]

Weights are random (`octavo bench` makes the stores, random_gguf.py the file), and routing is uniform: the worst case
for every cache. Each budget is a process of its own, in a memory cgroup whose limit is the budget where one can be
made, so that a byte too many would end it. Results are added to results/any_memory.json step by step; run it on a
quiet machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from cpu_peers import PROMPT, SHAPE, random_tokens
from random_gguf import write_gguf

from octavo.experts.reader import disk_bandwidth
from octavo.plan import make_plan, parse_size, weights_at
from octavo.shapes import shape

RESULTS = Path(__file__).parent / "results" / "any_memory.json"
CGROUPS = Path("/sys/fs/cgroup/memory")  # version 1
BUDGETS = ("4GiB", "8GiB", "12GiB", "16GiB", "20GiB", "22GiB")
DECODE, LLAMA_DECODE, CONTEXT, START_PROMPT = 64, 32, 640, 64
OCTAVO = Path(sys.executable).parent / "octavo"


# ---------------------------------------- Octavo


@contextmanager
def cgroup(limit: int) -> Iterator[Path | None]:
    """A cgroup whose processes get no more memory than this, page cache included; None where none can be made."""
    group = CGROUPS / "octavo-any-memory"
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(limit))
        (group / "memory.max_usage_in_bytes").write_text("0")
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def run_within(limit: int, command: list[str]) -> tuple[dict[str, Any], str]:
    """Run a command within a cgroup; return what that measured, and its standard output."""
    with cgroup(limit) as group:

        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")
        found: dict[str, Any] = {"cgroup_limit": None}
        if group is not None:
            found = {
                "cgroup_limit": limit,
                "cgroup_peak_with_page_cache": int((group / "memory.max_usage_in_bytes").read_text()),
            }
    return found, done.stdout


def measure_budget(size: str, bits: int, store: Path) -> dict[str, Any]:
    """`octavo bench` within a budget."""
    command = [str(OCTAVO), "bench", "--shape", SHAPE, "--bits", str(bits), "--memory", size, "--store", str(store)]
    command += ["--routing", "uniform", "--prompt", str(PROMPT), "--decode", str(DECODE), "--json"]
    group, printed = run_within(parse_size(size), command)
    return json.loads(printed) | group


def measure_start(store: Path) -> dict[str, Any]:
    """From the shell to the first token at 8 GiB, beside what reading the same bytes takes at the disk's speed.

    The prompt is long enough for every expert to be chosen: one pass through the model, layer by layer.
    """
    # Random weights have no tokenizer: the prompt is ids, through the same `LLM.load` as `octavo generate` uses.
    code = (
        "import json, time; from octavo.llm import LLM\n"
        f"llm = LLM.load({str(store)!r}, memory='8GiB', context={CONTEXT})\n"
        f"llm.generate(list(range(3, 3 + {START_PROMPT})), max_tokens=1, temperature=0)\n"
        "print(json.dumps([time.time(), llm.experts.total.nbytes + llm.plan.footprint.rest]))"
    )
    runs, files = [], list(store.glob("*.safetensors"))
    for _ in range(5):
        started = time.time()
        group, printed = run_within(parse_size("8GiB"), [sys.executable, "-c", code])
        ended, nbytes = json.loads(printed)
        disk = disk_bandwidth(files)  # in this process: its buffers would not fit into the budget
        runs.append({"seconds": ended - started, "nbytes": nbytes, "disk_gbs": disk.first / 1e9})
        runs[-1] |= {"disk_again_gbs": disk.again / 1e9, "at_disk": nbytes / disk.again}
        runs[-1] |= group
    beyond = statistics.median(run["seconds"] - run["at_disk"] for run in runs)
    return {"runs": runs, "seconds": statistics.median(run["seconds"] for run in runs), "beyond_disk": beyond}


# ---------------------------------------- llama.cpp


def measure_llama(file: Path) -> dict[str, Any]:
    """Q4_0 by mmap, without repacking, which would need the weights twice."""
    import llama_cpp as lc

    lines: list[str] = []

    @lc.llama_log_callback
    def log(level: int, text: bytes, _: Any) -> None:
        lines.append(text.decode(errors="replace"))

    lc.llama_log_set(log, None)
    lc.llama_backend_init()
    model_params = lc.llama_model_default_params()
    model_params.load_mode = lc.LLAMA_LOAD_MODE_MMAP
    model_params.use_extra_bufts = False
    model_params.n_gpu_layers = 0
    model = lc.llama_model_load_from_file(os.fsencode(file), model_params)
    params = lc.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, PROMPT, PROMPT
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    context = lc.llama_init_from_model(model, params) if model else None
    if context is None:
        raise SystemExit("".join(lines[-20:]))
    batch, position = lc.llama_batch_init(PROMPT, 0, 1), 0

    def read(tokens: list[int]) -> float:
        nonlocal position
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(tokens) - 1
        position += len(tokens)
        started = time.perf_counter()
        if lc.llama_decode(context, batch):
            raise SystemExit("".join(lines[-20:]))
        lc.llama_get_logits_ith(context, len(tokens) - 1)  # waits for them
        return time.perf_counter() - started

    prefill = read(random_tokens(PROMPT))
    seconds = [read([token]) for token in random_tokens(LLAMA_DECODE + 8)][8:]
    return {
        "prefill_tok_s": PROMPT / prefill,
        "decode_tok_s": 1 / statistics.mean(seconds),
        "decode_tok_s_median": 1 / statistics.median(seconds),
        "system": lc.llama_print_system_info().decode(),
    }


def in_another_process(target: Any, *arguments: Any) -> dict[str, Any]:
    """So that its memory is gone afterwards."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: dict[str, Any] = pool.apply(target, arguments)
    return found


# ---------------------------------------- all together


def add(step: str, found: dict[str, Any]) -> None:
    """Keep a result; of steps that are run again, every one."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"date": str(date.today()), "machine": f"{os.cpu_count()} cores, {platform.machine()}", "shape": SHAPE}
    results.setdefault("steps", {}).setdefault(step, []).append(found)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    kept = {name: value for name, value in found.items() if isinstance(value, float | int)}
    print(step, json.dumps(kept), flush=True)


def main() -> None:
    """Run the steps that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="of 4 bits; made if it is not there")
    parser.add_argument("--store3", type=Path, help="of 3 bits, for bits3")
    parser.add_argument("--gguf", type=Path, help="for llama; made if it is not there")
    parser.add_argument("--steps", nargs="+", default=list(BUDGETS), metavar="SIZE|llama|start|bits3")
    options = parser.parse_args()
    for step in options.steps:
        if step == "llama":
            if not options.gguf.exists():
                write_gguf(options.gguf, shape(SHAPE), "q4_0", SHAPE)
            add(step, in_another_process(measure_llama, options.gguf))
        elif step == "start":
            add(step, measure_start(options.store))
        elif step == "bits3":
            add(step, measure_budget("20GiB", 3, options.store3))
        else:
            found = measure_budget(step, 4, options.store)
            plan = make_plan(shape(SHAPE), parse_size(step), 4, found["plan"]["context"])
            add(step, found | {"predicted": plan.footprint.total, "weights": weights_at(shape(SHAPE), 4).total})


if __name__ == "__main__":
    main()
