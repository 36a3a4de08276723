"""safetensors: 8 bytes of length, a JSON header of that length, then the tensors' bytes."""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.storage.files import FETCH_AGAIN, ByteFile
from octavo.storage.folder import Folder
from octavo.storage.source import ListedSource, Rows, TensorInfo, TensorSource, matrix_shape, row_range

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
FIRST_READ = 65_536  # holds most headers, and is what one asks of a distant file
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor's place: bytes ``begin`` to ``end`` of the file, counted from its start."""

    info: TensorInfo
    begin: int
    end: int


def read_header(file: ByteFile) -> tuple[dict[str, Entry], Mapping[str, Any]]:
    """Read and check a header: sizes against limits, offsets against shapes and the file.

    Returns:
        The tensors' places by name, and ``__metadata__``; {} where that is absent or no object.

    Raises:
        CheckpointError: the file is truncated, or its header lies.
    """
    head = bytes(file.read(0, min(FIRST_READ, file.size)).numpy())
    if len(head) < 8:
        raise _broken(file, f"it has {file.size} bytes, too few for a header")
    length = struct.unpack("<Q", head[:8])[0]
    if length > min(MAX_HEADER_BYTES, file.size - 8):
        raise _broken(file, f"its header claims {length} bytes, the file has {file.size}")
    if 8 + length > len(head):
        head += bytes(file.read(len(head), 8 + length).numpy())
    try:
        header = json.loads(head[8 : 8 + length].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _broken(file, "its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    entries = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
    in_order = sorted((entry for entry in entries.values() if entry.info.nbytes), key=lambda entry: entry.begin)
    for before, after in itertools.pairwise(in_order):
        if after.begin < before.end:
            raise _broken(file, f"{before.info.name!r} and {after.info.name!r} overlap")
    return entries, metadata if isinstance(metadata, dict) else {}


def _entry(file: ByteFile, name: str, entry: Any, data_begin: int) -> Entry:
    try:
        encoding = entry["dtype"]
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        numbers = (*shape, begin, end)
        dtype = DTYPES.get(encoding)
    except (TypeError, KeyError, ValueError):
        raise _broken(file, f"the header's entry for {name!r} lacks dtype, shape or data_offsets") from None
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise _broken(file, f"the header's shape or offsets of {name!r} are not whole numbers")
    if dtype is None:
        raise CheckpointError(
            f"{file.location}: tensor {name!r} has dtype {encoding!r}; expected one of {', '.join(DTYPES)}",
            hint="the file is damaged, or newer than this version of Octavo",
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise _broken(file, f"{name!r} should take {nbytes} bytes by its shape, its offsets give {end - begin}")
    if data_begin + end > file.size:
        raise _broken(file, f"{name!r} ends at byte {end} of the data, of which there are {file.size - data_begin}")
    return Entry(TensorInfo(name, dtype, shape, nbytes, file.name, encoding), data_begin + begin, data_begin + end)


def _broken(file: ByteFile, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file.location}: not a whole safetensors file: {why}",
        hint="the file is truncated or damaged; fetch it again",
    )


class SafetensorsFile(ListedSource):
    """The tensors of one safetensors file.

    Attributes:
        file: its bytes.
        entries: where each tensor lies in it.
        metadata: what the header says beside them.
    """

    def __init__(self, file: ByteFile) -> None:
        self.location = file.location
        self.file = file
        self.entries, self.metadata = read_header(file)
        self.infos = {name: entry.info for name, entry in self.entries.items()}

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """Exactly the bytes that are asked for."""
        info = self.info(name)
        first, last = row_range(rows, info.shape, name)
        shape = info.shape
        begin, end = self.entries[name].begin, self.entries[name].end
        if rows is not None:
            shape = (last - first, *matrix_shape(info.shape)[1:])
            row_bytes = math.prod(shape[1:]) * info.dtype.itemsize
            begin, end = begin + first * row_bytes, begin + last * row_bytes
        return as_tensor(self.file.read(begin, end), info.dtype, shape)


def as_tensor(data: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Bytes as a tensor, copied only where they do not lie as the dtype needs it."""
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(shape)


class ShardedSafetensors(TensorSource):
    """Shards with an index. A shard's header is read when a tensor of it is asked for.

    Args:
        folder: where the shards lie.
        index: the name of the index file there.
        open_shard: makes a source of a shard's file.

    Raises:
        UserError: the index cannot be read, or names a file outside the folder or one that is absent.
    """

    def __init__(
        self, folder: Folder, index: str, open_shard: Callable[[ByteFile], TensorSource] = SafetensorsFile
    ) -> None:
        self.location = folder.location
        self._folder = folder
        self._index = f"{folder.location}/{index}"
        self._open_shard = open_shard
        self._shards: dict[str, TensorSource] = {}
        weight_map = folder.json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(
                f"{self._index}: expected a weight_map of tensor names to file names", hint=FETCH_AGAIN
            )
        self.weight_map: dict[str, str] = weight_map
        present = folder.files()
        for shard in self.shards():
            if "/" in shard or "\\" in shard:
                raise CheckpointError(
                    f"{self._index}: names the shard {shard!r}; expected a file of the same folder", hint=FETCH_AGAIN
                )
            if shard not in present:
                raise CheckpointError(
                    f"{self._index}: names the shard {shard!r}, which is not in the folder",
                    hint="the download is incomplete; fetch the missing shard",
                )

    def shards(self) -> list[str]:
        """The names of the files, sorted."""
        return sorted(set(self.weight_map.values()))

    def check(self) -> None:
        """Read every shard's header, so that whatever is wrong shows now.

        Raises:
            CheckpointError: a shard is damaged, or holds other tensors than the index says.
        """
        for name in self.weight_map:
            self.info(name)
        for shard in self.shards():
            extra = [name for name in self._shard(shard).names() if name not in self.weight_map]
            if extra:
                raise CheckpointError(
                    f"{self._index}: tensor {extra[0]!r} of {shard!r} is not in the index", hint=FETCH_AGAIN
                )

    def names(self) -> list[str]:
        """Every name, in the index's order."""
        return list(self.weight_map)

    def __contains__(self, name: object) -> bool:
        return name in self.weight_map

    def info(self, name: str) -> TensorInfo:
        """Reads the header of the tensor's shard, once."""
        return self.owner(name).info(name)

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """Reads from the tensor's shard."""
        return self.owner(name).read(name, rows)

    def owner(self, name: str) -> TensorSource:
        """Return the shard that holds a tensor.

        Raises:
            CheckpointError: none does, or it is damaged.
        """
        if name not in self.weight_map:
            raise self.unknown(name)
        shard = self._shard(self.weight_map[name])
        if name not in shard:
            raise CheckpointError(
                f"{self._index}: tensor {name!r} is not in {self.weight_map[name]!r}, where the index puts it",
                hint=FETCH_AGAIN,
            )
        return shard

    def _shard(self, name: str) -> TensorSource:
        if name not in self._shards:
            self._shards[name] = self._open_shard(self._folder.file(name))
        return self._shards[name]


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of tensors beside its place, and move it there.

    Raises:
        CheckpointError: the disk is full, or the place cannot be written; what was there is untouched.
    """
    beside = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # of any file of this user; safetensors would make it the owner's alone
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, dict(metadata or {}))
        beside.chmod(mode)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: could not be written ({error})", hint="is the disk full, or not yours to write?"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
