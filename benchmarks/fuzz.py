"""Hostile files: every reader opens thousands of damaged checkpoints, and succeeds or raises a UserError.

``python benchmarks/fuzz.py`` on Linux takes some minutes on one core. Small checkpoints of each kind are damaged (see
mutations.py), opened with `open_checkpoint`, and everything in them is asked for: every tensor, by both kinds of names,
the configuration, the tokenizer, a comparison with the model, a plan to convert it. Anything but success or a UserError
is a failure, and so are a case of more than ten seconds and memory beyond the file's own size and 32 MiB. Cases run in
processes of their own, with no more than 2 GiB of addresses beyond what these start with.
Writes benchmarks/results/fuzz.json; with failures the exit code is 1. The same case again:
``python benchmarks/fuzz.py --kind gguf --case 1234``.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from mutations import (
    Mutation,
    byte_level,
    gguf_header,
    json_object,
    npy_header,
    safetensors_header,
    store_metadata,
    torch_pickle,
    zip_fields,
)
from torch import Tensor

from octavo.args import ModelArgs, MoEArgs
from octavo.checkpoint import Checkpoint, open_checkpoint
from octavo.checkpoint.names import GGUF, HF, canonical_shapes
from octavo.checkpoint.output import Encoding, GGUFEncoded, OutFile, Plain, gguf_file, index_of, safetensors_files
from octavo.checkpoint.writer import write_file, write_json
from octavo.convert import plan_conversion, plan_quantization
from octavo.errors import UserError
from octavo.storage.gguf_args import gguf_metadata
from octavo.storage.safetensors import INDEX

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
ARGS = ModelArgs(64, 1, 16, 64, 4, 2, 64, max_seq_len=128, moe=MoEArgs(2, 1))
SECONDS_A_CASE = 10
EXTRA_BYTES = 32 << 20  # of memory, beyond the file's own size
ADDRESS_BYTES = 2 << 30
CASES_A_PROCESS = 500


# ---------------------------------------- checkpoints that are whole


def weights() -> dict[str, Tensor]:
    """Random weights by canonical name."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in canonical_shapes(ARGS).items()}


def write(folder: Path, files: list[OutFile]) -> None:
    """Write planned files."""
    state = weights()
    for file in files:
        write_file(folder / file.name, file, lambda name: state[name])


def params() -> dict[str, Any]:
    """Of params.json."""
    return ARGS.to_params()


def write_hf(folder: Path) -> None:
    """Two shards and an index."""
    files = safetensors_files(HF, ARGS, lambda stored: Plain(torch.bfloat16), shard_bytes=70_000)
    write(folder, files)
    write_json(folder / INDEX, index_of(files))
    write_json(folder / "config.json", ARGS.to_hf() | {"eos_token_id": 2})
    write_json(folder / "generation_config.json", {"eos_token_id": [2]})


def write_gguf(folder: Path) -> None:
    """Blocks of several kinds, and a tokenizer."""
    kinds = ("F16", "Q8_0", "Q4_0", "Q5_1", "BF16")

    def choose(stored: Any) -> Encoding:
        return GGUFEncoded("F32" if len(stored.shape) == 1 else kinds[sum(stored.name.encode()) % len(kinds)])

    tokens = ["<unk>", "<s>", "</s>", "▁", *map(chr, range(ord("A"), ord("A") + 60))]
    metadata = gguf_metadata(ARGS, "fuzz", "F16") | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(n) for n in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 61],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    write(folder, [gguf_file("model.gguf", GGUF, ARGS, choose, metadata)])


def write_npz(folder: Path, *, packed: bool) -> None:
    """As MLX's first examples; deflated or not."""
    save = np.savez_compressed if packed else np.savez
    save(folder / "weights.npz", **{name: tensor.half().numpy() for name, tensor in weights().items()})
    write_json(folder / "config.json", params())


def write_torch(folder: Path, *, zipped: bool) -> None:
    """As the authors'; by torch of today or before 1.6."""
    state = {name: tensor.bfloat16() for name, tensor in weights().items()}
    torch.save(state, folder / "consolidated.00.pth", _use_new_zipfile_serialization=zipped)
    write_json(folder / "params.json", params())


def write_quantised(folder: Path, **options: Any) -> None:
    """By Octavo itself, of the first one: converted, or quantised to so many bits."""
    source = folder / "source"
    source.mkdir()
    write_hf(source)
    plan = plan_quantization if "bits" in options else plan_conversion
    plan(source, folder / "out", **options).run()
    for path in (folder / "out").iterdir():
        path.rename(folder / path.name)
    (folder / "out").rmdir()
    for path in source.iterdir():
        path.unlink()
    source.rmdir()


write_mlx_q4 = partial(write_quantised, to="mlx", dtype="q4")
write_store = partial(write_quantised, bits=3, overrides={"output.weight": "q2"})


@dataclass(frozen=True)
class Base:
    """A checkpoint that is whole, the file of it that is damaged, and how."""

    write: Callable[[Path], None]
    file: str
    mutations: tuple[Mutation, ...]


KINDS: dict[str, tuple[Base, ...]] = {
    "safetensors": (
        Base(write_hf, "model-00001-of-00002.safetensors", (safetensors_header, safetensors_header, byte_level)),
        Base(
            write_mlx_q4,
            "model.safetensors",
            (safetensors_header, safetensors_header, byte_level),
        ),
    ),
    "store": (
        Base(write_store, "model.safetensors", (store_metadata, store_metadata, safetensors_header, byte_level)),
        Base(write_store, "config.json", (json_object,)),
    ),
    "gguf": (Base(write_gguf, "model.gguf", (gguf_header, gguf_header, byte_level)),),
    "npz": (
        Base(partial(write_npz, packed=False), "weights.npz", (npy_header, zip_fields, byte_level)),
        Base(partial(write_npz, packed=True), "weights.npz", (npy_header, zip_fields, byte_level)),
    ),
    "params.json": (
        Base(partial(write_torch, zipped=True), "params.json", (json_object, json_object, byte_level)),
        Base(partial(write_npz, packed=False), "config.json", (json_object, json_object, byte_level)),
    ),
    "config.json": (
        Base(write_hf, "config.json", (json_object, json_object, byte_level)),
        Base(write_mlx_q4, "config.json", (json_object,)),
        Base(write_hf, INDEX, (json_object, byte_level)),
        Base(write_hf, "generation_config.json", (json_object,)),
    ),
    "torch": (
        Base(
            partial(write_torch, zipped=True),
            "consolidated.00.pth",
            (torch_pickle, torch_pickle, zip_fields, byte_level),
        ),
        Base(partial(write_torch, zipped=False), "consolidated.00.pth", (byte_level,)),
    ),
}


class Folders:
    """A folder for each of a kind's checkpoints, of which one file at a time is damaged."""

    def __init__(self, kind: str, parent: Path) -> None:
        self.bases = []
        for number, base in enumerate(KINDS[kind]):
            folder = parent / f"{kind}-{number}"
            folder.mkdir()
            base.write(folder)
            self.bases.append((base, folder, (folder / base.file).read_bytes()))

    def damage(self, rng: Random) -> tuple[Path, int]:
        """Damage one; return the folder, and the bytes of all its files."""
        base, folder, whole = rng.choice(self.bases)
        (folder / base.file).write_bytes(rng.choice(base.mutations)(whole, rng))
        return folder, sum(path.stat().st_size for path in folder.iterdir())

    def mend(self) -> None:
        """Put the whole files back."""
        for base, folder, whole in self.bases:
            (folder / base.file).write_bytes(whole)


# ---------------------------------------- one case


def open_all(folder: Path, *, mapped: bool) -> str:
    """Ask a checkpoint for everything; return "whole", or the class of the first UserError.

    Raises:
        Exception: anything that is no UserError, which is a bug in Octavo.
    """
    outcome = ""

    def attempt(step: Callable[[], object]) -> None:
        nonlocal outcome
        try:
            step()
        except UserError as error:
            outcome = outcome or type(error).__name__

    opened: list[Checkpoint] = []
    attempt(lambda: opened.append(open_checkpoint(folder, mapped=mapped)))
    for checkpoint in opened:
        for step in _steps(checkpoint, folder):
            attempt(step)
    return outcome or "whole"


def _steps(checkpoint: Checkpoint, folder: Path) -> Iterator[Callable[[], object]]:
    for name in checkpoint.stored.names():
        yield lambda name=name: _read(checkpoint.stored, name)
    yield lambda: checkpoint.args
    yield lambda: checkpoint.check()
    canonical: list[str] = []
    yield lambda: canonical.extend(checkpoint.names())
    for name in canonical:
        yield lambda name=name: _read(checkpoint, name)
        yield lambda name=name: checkpoint.packed(name)
    yield lambda: checkpoint.verify() if checkpoint.is_store else None
    yield lambda: checkpoint.eos_ids
    yield lambda: checkpoint.tokenizer()
    for to in ("hf", "gguf"):
        yield lambda to=to: plan_conversion(checkpoint, folder / "never written", to=to)
    target = folder / "never written"
    yield lambda: None if checkpoint.is_store else plan_quantization(checkpoint, target, bits=4)


def _read(source: Any, name: str) -> None:
    info = source.info(name)
    tensor = source.read(name)
    assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape), info
    tensor.view(torch.uint8).max() if tensor.numel() and tensor.ndim else None  # whatever is mapped is touched
    rows = source.read(name, (0, 1)) if info.shape and info.shape[0] else tensor
    assert rows.dtype == info.dtype


# ---------------------------------------- many cases


def work(kind: str, first: int, last: int, seed: int) -> dict[str, Any]:
    """Run cases in this process; return what was found. Each case's number goes to stdout when it begins."""
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    slowest, most = (0.0, -1), (0, -1)
    with tempfile.TemporaryDirectory() as name:
        folders = Folders(kind, Path(name))
        open_all(Path(name) / f"{kind}-0", mapped=True)  # imports what is imported late
        addresses = status("VmSize") + ADDRESS_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
        for case in range(first, last):
            print(case, flush=True)
            folder, nbytes = folders.damage(Random(f"{seed} {kind} {case}"))
            faulthandler.dump_traceback_later(SECONDS_A_CASE, exit=True)
            forget_peak()
            before, started = status("VmRSS"), time.perf_counter()
            try:
                outcomes[open_all(folder, mapped=case % 2 == 0)] += 1
            except Exception:
                failures.append({"case": case, "why": traceback.format_exc(limit=-3)})
            slowest = max(slowest, (time.perf_counter() - started, case))
            most = max(most, (status("VmHWM") - before, case))
            if status("VmHWM") - before > nbytes + EXTRA_BYTES:
                failures.append({"case": case, "why": f"{most[0]} bytes of memory for {nbytes} of files"})
            faulthandler.cancel_dump_traceback_later()
            folders.mend()
    return {"outcomes": outcomes, "failures": failures, "slowest": slowest, "most_memory": most}


def status(key: str) -> int:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> None:
    """Let VmHWM begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def run_kind(kind: str, cases: int, seed: int) -> dict[str, Any]:
    """Run a kind's cases in processes of their own; whichever process dies, its case is a failure."""
    outcomes: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    slowest, most = [0.0, -1], [0, -1]
    first = 0
    while first < cases:
        last = min(first + CASES_A_PROCESS, cases)
        command = [sys.executable, __file__, "--kind", kind, "--case", str(first), "--until", str(last)]
        done = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True)
        end = (done.stdout.splitlines() or [""])[-1]
        if done.returncode:
            died = int(end or first)
            failures.append({"case": died, "why": f"exit code {done.returncode}: {done.stderr[-2000:]}"})
            outcomes["died"] += 1
            first = died + 1  # what came before in that process is lost to the counts
            continue
        found = json.loads(end)
        outcomes.update(found["outcomes"])
        failures += found["failures"]
        slowest, most = max(slowest, found["slowest"]), max(most, found["most_memory"])
        first = last
    print(kind, dict(outcomes), f"{len(failures)} failures", flush=True)
    return {
        "cases": cases,
        "outcomes": dict(outcomes.most_common()),
        "failures": failures,
        "slowest": {"seconds": round(slowest[0], 3), "case": slowest[1]},
        "most_memory": {"bytes": most[0], "case": most[1]},
    }


def main() -> None:
    """Run all kinds and write the results; or some cases of one kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=3000, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, help="this kind only, in this process")
    parser.add_argument("--case", type=int, default=0, help="the first of them")
    parser.add_argument("--until", type=int, help="the one after the last; by default the next")
    options = parser.parse_args()
    if options.kind:
        found = work(options.kind, options.case, options.until or options.case + 1, options.seed)
        print(json.dumps(found))
        return
    started = time.perf_counter()
    kinds: Mapping[str, Any] = {kind: run_kind(kind, options.cases, options.seed) for kind in KINDS}
    report = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": options.seed,
        "cases": sum(kind["cases"] for kind in kinds.values()),
        "failures": sum(len(kind["failures"]) for kind in kinds.values()),
        "limits": {"seconds_a_case": SECONDS_A_CASE, "memory_beyond_the_files_bytes": EXTRA_BYTES},
        "seconds": round(time.perf_counter() - started),
        "kinds": kinds,
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if report["failures"] else 0)


if __name__ == "__main__":
    main()
