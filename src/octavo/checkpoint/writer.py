"""Writing a model folder so that a crash leaves either the old one or the new one, never half of each."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from octavo.args import ModelArgs
from octavo.checkpoint.names import HF, HF_DENSE, find
from octavo.checkpoint.source import INDEX, SINGLE
from octavo.errors import CheckpointError

SHARD_BYTES = 5_000_000_000


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
        for file in beside.rglob("*"):
            if file.is_file():
                _flush(file)
        _replace(beside, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target}: could not be written ({error})",
            hint="is the disk full? what was there before is untouched",
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replace(beside: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    beside.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    layout = HF if args.moe else HF_DENSE
    dtypes = {dtype} if dtype else {tensor.dtype for tensor in state.values()}
    written = 0
    with new_folder(Path(folder)) as new:
        shards = list(_shards(args, state, shard_bytes, dtype))
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            stored: dict[str, Tensor] = {}
            for name in names:
                place = find(layout, name)
                tensor = place.transform.write(state[name].detach(), args)
                stored[place.name] = tensor.to(device="cpu", dtype=dtype).contiguous()
            written += sum(tensor.nbytes for tensor in stored.values())
            save_file(stored, new / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(stored, file))
        if len(shards) > 1:
            _write_json(new / INDEX, {"metadata": {"total_size": written}, "weight_map": weight_map})
        hf = args.to_hf()
        if len(dtypes) == 1:
            hf["dtype"] = str(dtypes.pop()).removeprefix("torch.")
        _write_json(new / "config.json", hf | dict(config or {}))
        for path in copy:
            shutil.copyfile(path, new / path.name)


def _shards(
    args: ModelArgs, state: Mapping[str, Tensor], shard_bytes: int, dtype: torch.dtype | None
) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, tensor in state.items():
        if args.tie_embeddings and name == "output.weight":
            continue
        nbytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if names and filled + nbytes > shard_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += nbytes
    yield names


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
