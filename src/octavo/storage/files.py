"""Bytes of a file at any place in it: the whole of it mapped into memory, or only what is being used."""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from octavo.errors import CheckpointError, ConfigError

FETCH_AGAIN = "the file is damaged; fetch it again"
MAX_NESTING = 64  # of JSON; a config.json has three levels
MAP_NORESERVE = 0x4000  # Linux's; Python names it from 3.13 on
MADV_POPULATE_READ = 22  # Linux's, from 5.14 on


class ByteFile(Protocol):
    """Random access to bytes, wherever they lie.

    Attributes:
        name: the file's name within its checkpoint, such as ``model-00001-of-00019.safetensors``.
        location: where it lies, for messages: a path, or ``owner/name@commit/file``.
        size: in bytes.
    """

    name: str
    location: str

    @property
    def size(self) -> int:
        """In bytes."""
        ...

    def read(self, begin: int, end: int) -> Tensor:
        """Return bytes ``begin`` to ``end`` (exclusive) as uint8 [end - begin].

        Raises:
            UserError: the file does not have them (any more), or cannot be reached.
        """
        ...


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.location = str(path)
        self._open: FileIO | None = None
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}", hint="is the download complete?") from None

    def _map(self, begin: int, length: int) -> mmap.mmap:
        # Linux sets memory aside for a mapping that may be written to, and refuses one larger than the machine's
        # unless told not to.
        how: dict[str, int] = {"access": mmap.ACCESS_COPY}
        if sys.platform == "linux":
            how = {"flags": mmap.MAP_PRIVATE | MAP_NORESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
        try:
            if self._open is None:  # and kept so: a file that is put in its place is another one
                self._open = FileIO(self.path)
            size = os.fstat(self._open.fileno()).st_size
            if size != self.size:
                raise CheckpointError(
                    f"{self.location}: has {size} bytes, where {self.size} were expected",
                    hint="the file changed while it was being read; fetch it again",
                )
            return mmap.mmap(self._open.fileno(), length, offset=begin, **how)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.location}: cannot be mapped ({error})", hint="is the disk still there?"
            ) from None

    def _check(self, begin: int, end: int) -> None:
        if not 0 <= begin <= end <= self.size:
            raise CheckpointError(
                f"{self.location}: bytes {begin} to {end} are asked for, the file has {self.size}", hint=FETCH_AGAIN
            )


class MappedFile(_LocalFile):
    """A file mapped into memory: reading is free, the system fetches bytes when they are used. Copy-on-write."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._whole: Tensor | None = None

    def read(self, begin: int, end: int) -> Tensor:
        """A view of the mapping."""
        self._check(begin, end)
        if begin == end:
            return torch.empty(0, dtype=torch.uint8)
        if self._whole is None:
            self._mapping = self._map(0, self.size)
            self._whole = torch.frombuffer(self._mapping, dtype=torch.uint8)
            _MAPPED[self._whole.data_ptr()] = self
        return self._whole[begin:end]

    def let_go(self) -> None:
        """Give back the memory that the mapping has taken; what is used again is fetched again."""
        if self._whole is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)


_MAPPED: WeakValueDictionary[int, MappedFile] = WeakValueDictionary()  # by the address of the mapping


@dataclass(frozen=True)
class Place:
    """Bytes ``begin`` to ``end`` (exclusive) of a local file."""

    file: MappedFile
    begin: int
    end: int


def place_of(tensor: Tensor) -> Place | None:
    """Where a tensor's bytes lie on the disk, if it is a contiguous view of a mapped file; else None."""
    base = tensor.untyped_storage().data_ptr()
    file = _MAPPED.get(base)
    if file is None or not tensor.is_contiguous():
        return None
    begin = tensor.data_ptr() - base
    return Place(file, begin, begin + tensor.nbytes)


class PlainFile(_LocalFile):
    """A file of which only what is being used is mapped: what has been read and let go takes no memory."""

    def read(self, begin: int, end: int) -> Tensor:
        """A mapping of its own, with all its bytes there."""
        self._check(begin, end)
        if begin == end:
            return torch.empty(0, dtype=torch.uint8)
        first = begin - begin % mmap.ALLOCATIONGRANULARITY
        mapping = self._map(first, end - first)
        with suppress(OSError, AttributeError):  # an older kernel, or another system: bytes come when they are used
            mapping.madvise(MADV_POPULATE_READ)
        return torch.frombuffer(mapping, dtype=torch.uint8)[begin - first :]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: the file is absent, or holds something else.
    """
    try:
        if path.exists() and not path.is_file():  # to read from a pipe would take for ever
            raise ConfigError(f"{path}: not a file", hint=FETCH_AGAIN)
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file", hint="a model folder holds config.json beside its .safetensors files"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: not a readable JSON file ({error})", hint=FETCH_AGAIN) from None
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: UTF-8 text.
        where: the file's name, for messages.

    Raises:
        ConfigError: it is something else.
    """
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not a readable JSON file ({error})", hint=FETCH_AGAIN) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a JSON object, found {type(value).__name__}", hint=FETCH_AGAIN)
    level: list[Any] = [value]
    for _ in range(MAX_NESTING):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:  # Python may parse what it can neither show nor write again
        raise ConfigError(f"{where}: is nested deeper than {MAX_NESTING} levels", hint=FETCH_AGAIN)
    return value


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
