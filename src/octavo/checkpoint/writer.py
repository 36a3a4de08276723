"""Writing a model folder so that a crash leaves either the old one or the new one, never half of each."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from octavo.args import ModelArgs
from octavo.checkpoint.names import HF, HF_DENSE
from octavo.checkpoint.output import SHARD_BYTES, OutFile, Piece, Plain, index_of, safetensors_files
from octavo.errors import CheckpointError
from octavo.storage.safetensors import INDEX

Read = Callable[[str], Tensor]
"""Gives a canonical tensor by its name."""
Checksums = list[str]
"""Of each block of a piece: XXH3, 64 bits."""
Done = Callable[[int, Checksums], None]
_Made = tuple[list[memoryview], Checksums]
"""Blocks of bytes, and the checksum of each."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside ``target`` to write into; on leaving, flush it to disk and rename it to ``target``.

    If the body raises, the new folder is removed and an older ``target`` stays as it was.

    Raises:
        CheckpointError: the disk is full or the place cannot be written.
    """
    beside = target.with_name(f".{target.name}.new-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        yield beside
        flush_all(beside)
        replace(beside, target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def cannot_write(target: Path, error: OSError) -> CheckpointError:
    """What to say of a full disk, or a place that cannot be written."""
    return CheckpointError(
        f"{target}: could not be written ({error})", hint="is the disk full? what was there before is untouched"
    )


def replace(beside: Path, target: Path) -> None:
    """Put a folder or file in the place of another."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    beside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def flush_all(folder: Path) -> None:
    """Bring every file of a folder to the disk itself."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def write_file(
    path: Path, file: OutFile, read: Read, *, there: Mapping[int, Checksums] | None = None, done: Done | None = None
) -> None:
    """Write a planned file, piece by piece; the next one is read while one is written.

    Args:
        path: where to; what is there already is kept, and written over.
        file: the plan.
        read: gives canonical tensors.
        there: the pieces that are there already, by number, with their checksums.
        done: called with a piece's number and its checksums, once it is written.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """
    sums = dict(there or {})
    todo = [number for number in range(len(file.pieces)) if number not in sums]
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _write_at(handle, file.header, 0)
        os.truncate(handle, file.size)
        with ThreadPoolExecutor(1) as pool:
            following: Future[_Made] | None = None
            for number, after in itertools.zip_longest(todo, todo[1:]):
                blocks, sums[number] = (following or pool.submit(_make, file.pieces[number], read)).result()
                following = None if after is None else pool.submit(_make, file.pieces[after], read)
                for (begin, _), block in zip(file.pieces[number].places, blocks, strict=True):
                    _write_at(handle, block, begin)
                if done:
                    done(number, sums[number])
        if file.seal:
            _write_at(handle, file.seal([sums[number][0] for number in range(len(file.pieces))]), 0)
    finally:
        os.close(handle)


def checksums_of(path: Path, piece: Piece) -> Checksums:
    """Return the checksums of the bytes where a piece should lie; of those that are there, if the file is shorter."""
    with path.open("rb") as file:
        sums: Checksums = []
        for begin, end in piece.places:
            file.seek(begin)
            sums.append(xxh3_64_hexdigest(file.read(end - begin)))
    return sums


def _make(piece: Piece, read: Read) -> _Made:
    blocks = [memoryview(block.numpy()) for block in piece.encode(read(piece.canonical))]  # type: ignore[arg-type]
    for (begin, end), block in zip(piece.places, blocks, strict=True):
        if len(block) != end - begin:
            raise RuntimeError(f"{piece.canonical}: {len(block)} bytes were made, {end - begin} planned")
    return blocks, [xxh3_64_hexdigest(block) for block in blocks]


def _write_at(handle: int, data: bytes | memoryview, begin: int) -> None:
    view, written = memoryview(data), 0
    while written < len(view):
        written += os.pwrite(handle, view[written:], begin + written)
    if hasattr(os, "posix_fadvise"):  # on its way to the disk now, so that no long flush is left for the end
        os.posix_fadvise(handle, begin, written, os.POSIX_FADV_DONTNEED)


def save_folder(
    args: ModelArgs,
    state: Mapping[str, Tensor],
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | None = None,
    copy: tuple[Path, ...] = (),
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder in Hugging Face layout, as transformers loads it.

    Args:
        args: the model's shape.
        state: canonical names to tensors (``model.state_dict()``).
        folder: where to; replaced as a whole.
        dtype: of the written weights; by default each tensor's own.
        config: more keys for config.json, such as token ids.
        copy: files to put beside the weights, such as tokenizer.model.
        shard_bytes: weights beyond this go into further files, with an index.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    files = safetensors_files(
        HF if args.moe else HF_DENSE,
        args,
        lambda stored: Plain(dtype or state[stored.parts[0].canonical].dtype),
        shard_bytes=shard_bytes,
    )
    dtypes = {dtype} if dtype else {tensor.dtype for tensor in state.values()}
    with new_folder(Path(folder)) as new:
        for file in files:
            write_file(new / file.name, file, lambda name: state[name].detach().cpu())
        if len(files) > 1:
            write_json(new / INDEX, index_of(files))
        hf = args.to_hf()
        if len(dtypes) == 1:
            hf["dtype"] = str(dtypes.pop()).removeprefix("torch.")
        write_json(new / "config.json", hf | dict(config or {}))
        for path in copy:
            shutil.copyfile(path, new / path.name)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
