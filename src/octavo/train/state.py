"""Checkpoints of a training run: all that the next step depends on, in one file that is whole or absent.

A checkpoint is written beside its final name, flushed to the disk and then renamed. Whatever happens meanwhile
(a full disk, Ctrl-C, a power cut), the checkpoint before it stays as it was.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import torch

from octavo.errors import CheckpointError

_NAME = re.compile(r"step-(\d{7,})\.pt")


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first; empty if there is no such folder."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.stem.split("-")[1]))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after `step` steps, then remove all but the newest `keep` checkpoints.

    Args:
        state: tensors, numbers, strings, and lists and dicts of these (`torch.load(weights_only=True)`).

    Raises:
        CheckpointError: it could not be written; older checkpoints are untouched, nothing half-written stays.
    """
    path = folder / f"step-{step:07d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:
        # torch wraps what its stream's write() raised: the reason is then the cause or the context
        reason = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
        older = checkpoints(folder)
        left = f"{older[-1]} is whole, resume from it" if older else "there is no earlier one"
        raise CheckpointError(
            f"{path}: the checkpoint could not be written: {reason}", hint=f"make room on the disk; {left}"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def write_whole(path: Path, write: Any) -> None:
    """Call `write(file)` on a file beside `path`, flush it to the disk and rename it to `path`.

    Raises:
        OSError: or whatever `write` raises; `path` is then as it was.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder; the file itself is safe
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint and its path, on the CPU, or None. Leftovers of a crash are removed.

    Raises:
        CheckpointError: the newest file is damaged. Skipping it would lose steps without a word.
    """
    for leftover in folder.glob("*.tmp") if folder.is_dir() else ():
        leftover.unlink(missing_ok=True)
    found = checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle or zip raises almost anything
        older = f"resume from {found[-2].name}" if len(found) > 1 else "start anew"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable checkpoint: {reason}", hint=f"delete this file to {older}"
        ) from error
    if not isinstance(state, dict) or "step" not in state:
        raise CheckpointError(f"{path}: not a training checkpoint", hint="delete this file, or choose another out")
    return path, state
