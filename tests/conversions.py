"""Conversions that are killed, measured, or run out of disk: each in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from octavo.convert import Conversion, plan_conversion, plan_quantization
from octavo.errors import UserError
from run_octavo import command

SHARD = 200_000  # bytes, so that a small model has many files
JOURNAL = "journal.jsonl"
M_MMAP_THRESHOLD = -3  # of mallopt


def plan(source: Path, target: Path, options: dict[str, Any], **more: Any) -> Conversion:
    """Plan a conversion, or the quantising to so many bits."""
    return (plan_quantization if "bits" in options else plan_conversion)(source, target, **options, **more)


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of a folder's files by name."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())} if path.is_dir() else {"": path.read_bytes()}


def written(beside: Path) -> set[tuple[str, int]]:
    """The pieces that an unfinished conversion's journal lists, by file and number."""
    journal = beside / JOURNAL
    lines = journal.read_text().split("\n")[2:] if journal.exists() else []
    return {(piece["file"], piece["piece"]) for piece in map(json.loads, lines)}


def in_process(function: Callable[..., Any], *arguments: object) -> tuple[int, Any]:
    """Call a function of this module in a process of its own; return its exit code (negative: a signal) and result."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["octavo.convert"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv() if receiver.poll(120) else None
    except EOFError:  # killed
        result = None
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode, result


def _call(sender: Any, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    sender.send(function(*arguments))


def convert_and_die(source: Path, target: Path, options: dict[str, Any], pieces: int) -> None:
    """Convert, and be killed once that many pieces are written or found written, and the next one is under way."""
    seen = 0

    def progress(nbytes: int) -> None:
        nonlocal seen
        seen += 1
        if seen > pieces:
            os.kill(os.getpid(), signal.SIGKILL)

    plan(source, target, options, shard_bytes=SHARD).run(progress)


def convert_within(source: Path, target: Path, options: dict[str, Any], file_bytes: int) -> str:
    """Convert where no file may grow beyond a limit, as on a full disk; return the error."""
    conversion = plan(source, target, options, shard_bytes=SHARD)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    try:
        conversion.run()
    except UserError as error:
        return f"{error.message} | {error.hint}"
    return ""


def convert_and_measure(source: Path, target: Path, options: dict[str, Any]) -> int:
    """Convert; return the bytes of memory that the process had at most, above what it had before."""
    # Blocks of less than 32 MiB may stay with glibc when they are freed, and are not what is measured; the tensors of
    # real models are larger.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    import gguf.quants  # noqa: F401  # what is imported on the way is not measured either

    plan(source, target, options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    plan(source, target, options).run()
    return memory("VmHWM") - before


def memory(key: str) -> int:
    """A size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def start(verb: str, *args: object, **more: Any) -> subprocess.Popen[str]:
    """`octavo VERB args` in a process of its own, on pipes."""
    more = {"env": os.environ | {"OMP_NUM_THREADS": "1"}} | more
    pipe = subprocess.PIPE
    return subprocess.Popen(command(verb, *args), stdout=pipe, stderr=pipe, text=True, **more)


def wait_for_pieces(beside: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until the journal has so many lines, or the process has ended."""
    journal = beside / JOURNAL
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > count):
        time.sleep(0.0005)
    assert process.poll() is None, process.communicate()
