"""Reading a checkpoint tensor by tensor, without trusting it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.errors import CheckpointError, ConfigError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FETCH_AGAIN = "the file is damaged; fetch it again"


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path


class TensorSource(Protocol):
    """Stored tensors by their stored names."""

    def names(self) -> list[str]:
        """Return every tensor's name."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Return what is known without reading the tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """Return the tensor, memory-mapped where the format allows."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: the file is absent, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file", hint="a model folder holds config.json beside its .safetensors files"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable JSON file ({error})", hint=_FETCH_AGAIN) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}", hint=_FETCH_AGAIN)
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check a safetensors header: sizes against limits, offsets against shapes and the file.

    Raises:
        CheckpointError: the file is absent, truncated, or its header lies.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _broken(path, f"it has {size} bytes, too few for a header")
            length = struct.unpack("<Q", prefix)[0]
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise _broken(path, f"its header claims {length} bytes, the file has {size}")
            header = json.loads(file.read(length).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}", hint="is the download complete?") from None
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, entry, size - 8 - length) for name, entry in header.items()}


def _entry(path: Path, name: str, entry: Any, data_bytes: int) -> TensorInfo:
    try:
        dtype = DTYPES.get(entry["dtype"])
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        numbers = (*shape, begin, end)
    except (TypeError, KeyError, ValueError):
        raise _broken(path, f"the header's entry for {name!r} lacks dtype, shape or data_offsets") from None
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise _broken(path, f"the header's shape or offsets of {name!r} are not whole numbers")
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {entry['dtype']!r}; expected one of {', '.join(DTYPES)}",
            hint="quantised weights are not read; look for the original ones",
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise _broken(path, f"{name!r} should take {nbytes} bytes by its shape, its offsets give {end - begin}")
    if end > data_bytes:
        raise _broken(path, f"{name!r} ends at byte {end} of the data, of which the file holds {data_bytes}")
    return TensorInfo(name, dtype, shape, nbytes, path)


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a whole safetensors file: {why}",
        hint="the file is truncated or damaged; fetch it again",
    )


class SafetensorsSource:
    """A folder of one ``model.safetensors``, or of shards with an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._infos: dict[str, TensorInfo] = {}
        self._open: dict[Path, Any] = {}
        index = folder / INDEX
        if index.exists():
            self._read_index(index)
        else:
            self._infos = read_header(folder / SINGLE)

    def _read_index(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index}: expected a weight_map of tensor names to file names", hint=_FETCH_AGAIN)
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard:
                raise CheckpointError(
                    f"{index}: names the shard {shard!r}; expected a file of the same folder", hint=_FETCH_AGAIN
                )
            if not (self.folder / shard).exists():
                raise CheckpointError(
                    f"{index}: names the shard {shard!r}, which is not in the folder",
                    hint="the download is incomplete; fetch the missing shard",
                )
            self._infos.update(read_header(self.folder / shard))
        for name, shard in weight_map.items():
            if name not in self._infos or self._infos[name].file.name != shard:
                raise CheckpointError(
                    f"{index}: tensor {name!r} is not in {shard!r}, where the index puts it", hint=_FETCH_AGAIN
                )

    def names(self) -> list[str]:
        """Return every stored name."""
        return list(self._infos)

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self._infos.values())

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape, size and file of a stored tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: holds no tensor called {name!r}") from None

    def read(self, name: str) -> Tensor:
        """Return a stored tensor, memory-mapped: bytes are read when they are used.

        Raises:
            CheckpointError: there is no such tensor, or the file has changed since it was opened.
        """
        path = self.info(name).file
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            tensor: Tensor = self._open[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot read tensor {name!r} ({error})", hint=_FETCH_AGAIN) from None
        return tensor


def open_checkpoint(folder: str | Path) -> TensorSource:
    """Open the weights of a model folder.

    Raises:
        CheckpointError: there is no such folder, or no weights in a layout Octavo reads.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder",
            hint="give a folder with config.json and .safetensors files, or a Hub id",
        )
    if not (folder / INDEX).exists() and not (folder / SINGLE).exists():
        raise CheckpointError(
            f"{folder}: holds neither {SINGLE} nor {INDEX}",
            hint="Octavo reads the Hugging Face safetensors layout",
        )
    return SafetensorsSource(folder)
