"""Bytes of files into memory that is there already, around the page cache and several parts at a time.

Direct reads (``O_DIRECT``) leave no second copy in the page cache, so that a budget holds, and are the fastest that a
disk has. They begin and end at whole pages, in the file and in memory. Where a file system has none, pages are read as
usual and given back at once. The threads that read are compiled code (csrc/reader.cpp), for which kernels can wait.
"""

from __future__ import annotations

import mmap
import os
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.kernels.ops import compiled
from octavo.storage.files import MappedFile, Place

PAGE = 4096
THREADS = 8  # reads in flight: what it takes to keep an NVMe disk busy
SHORT, CANCELLED = -1, -2  # csrc/reader.h
SAMPLE, PIECE, AT_ONCE = 1 << 30, 16 << 20, 16  # to measure a disk: bytes, of a read, and reads at a time
AGAIN = 5


def pages(place: Place) -> tuple[int, int]:
    """The whole pages that hold a place: begin and end in its file."""
    return place.begin // PAGE * PAGE, -(-place.end // PAGE) * PAGE


class Layout:
    """Where the bytes of some places come to lie in memory that begins at a page.

    Places that lie one behind the other, in their file and in the list, are one read.

    Attributes:
        reads: what to read, and at which offset in memory its first page belongs.
        begins: offset of each place's first byte.
        nbytes: of memory, whole pages.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.reads: list[tuple[Place, int]] = []
        self.begins: list[int] = []
        self.nbytes = 0
        for place in places:
            whole, at = self.reads.pop() if self._goes_on(place) else (place, self.nbytes)
            whole = Place(place.file, whole.begin, place.end)
            first, last = pages(whole)
            self.reads.append((whole, at))
            self.begins.append(at + place.begin - first)
            self.nbytes = at + last - first

    def _goes_on(self, place: Place) -> bool:
        if not self.reads:
            return False
        before, _ = self.reads[-1]
        return before.file is place.file and before.end == place.begin


class Read:
    """What is being read, and from which files."""

    def __init__(self, native: Any, files: dict[int, MappedFile]) -> None:
        self.native = native
        self._files = files

    @property
    def done(self) -> bool:
        """Whether nothing is written any more."""
        return bool(self.native.done())

    def check(self) -> None:
        """Wait for the end.

        Raises:
            CheckpointError: a file no longer has the bytes, or cannot be read.
        """
        self.native.wait()
        error, handle, at = self.native.failed()
        if not error:
            return
        if error == CANCELLED:
            raise CheckpointError("the read was given up")
        file = self._files[handle]
        if error == SHORT:
            raise _changed(file, at)
        raise CheckpointError(
            f"{file.location}: byte {at} and what follows cannot be read ({os.strerror(error)})",
            hint="is the disk still there, and sound? the next request tries again",
        )


class DiskBandwidth(NamedTuple):
    """Bytes a second.

    Attributes:
        first: of pieces that nobody asked for lately.
        again: of the same pieces afterwards, the median of AGAIN times. So decoding reads: a disk's own cache, or that
            of a virtual machine's host, may hold them.
    """

    first: float
    again: float


def disk_bandwidth(files: Sequence[Path]) -> DiskBandwidth:
    """Read pieces of files at random, as experts are read, and then the same pieces again.

    Args:
        files: on the disk that is meant, of SAMPLE bytes or more together.

    Raises:
        CheckpointError: they cannot be read.
    """
    mapped = [MappedFile(path) for path in files]
    memory = torch.frombuffer(mmap.mmap(-1, AT_ONCE * PIECE), dtype=torch.uint8).fill_(1)  # there before it is timed
    pieces = []
    for _ in range(SAMPLE // PIECE):
        begins = [(file, random.randrange(max(1, file.size - PIECE)) // PAGE * PAGE) for file in mapped]
        file, at = random.choice(begins)
        pieces.append(Layout([Place(file, at, min(at + PIECE, file.size))]))
    reader = Reader()
    first, *again = (_read_speed(reader, pieces, memory) for _ in range(1 + AGAIN))
    reader.close()
    return DiskBandwidth(first, statistics.median(again))


def _read_speed(reader: Reader, pieces: Sequence[Layout], memory: Tensor) -> float:
    """Bytes a second, AT_ONCE pieces at a time."""
    started = time.perf_counter()
    for i in range(0, len(pieces), AT_ONCE):
        some = enumerate(pieces[i : i + AT_ONCE])
        for read in [reader.start(one, memory.data_ptr() + place * PIECE) for place, one in some]:
            read.check()
    return sum(one.nbytes for one in pieces) / (time.perf_counter() - started)


class _Open(NamedTuple):
    """A file, opened; as it was then."""

    handle: int
    direct: bool
    size: int
    changed_ns: int


class Reader:
    """Threads that read, and the files that they have opened."""

    def __init__(self) -> None:
        self._module = compiled()
        self._native = self._module.Reader(THREADS)
        self._open: dict[str, _Open] = {}

    def close(self) -> None:
        """Give up what has not begun, wait for the rest, and close the files."""
        self._native = None
        for opened in self._open.values():
            os.close(opened.handle)
        self._open.clear()

    def start(self, layout: Layout, address: int, *, later: bool = False) -> Read:
        """Begin to read what a layout holds.

        Args:
            layout: of the bytes.
            address: of memory for it, which begins at a page.
            later: behind all that is read without this.

        Raises:
            CheckpointError: a file is gone, or not as it was.
        """
        segments, files = [], {}
        for place, at in layout.reads:
            first, last = pages(place)
            opened = self._opened(place.file)
            needed = min(last, opened.size) - first
            segments.append((opened.handle, first, address + at, last - first, needed, opened.direct))
            files[opened.handle] = place.file
        return Read(self._native.start(segments, later), files)

    def hurry(self, read: Read) -> None:
        """Somebody waits for it now."""
        self._native.hurry(read.native)

    def cancel(self, read: Read) -> None:
        """Give up what has not begun; afterwards nothing is written any more."""
        self._native.cancel(read.native)

    def tensor(self, place: Place) -> Tensor:
        """Return bytes in memory of their own, uint8.

        Raises:
            CheckpointError: they cannot be read.
        """
        layout = Layout([place])
        memory = torch.frombuffer(mmap.mmap(-1, max(layout.nbytes, PAGE)), dtype=torch.uint8)
        self.start(layout, memory.data_ptr()).check()
        return memory[layout.begins[0] : layout.begins[0] + place.end - place.begin]

    def _opened(self, file: MappedFile) -> _Open:
        known = self._open.get(file.location)
        if known is None:
            known = self._open[file.location] = _opened(file)
        else:
            status = os.fstat(known.handle)
            if (status.st_size, status.st_mtime_ns) != (known.size, known.changed_ns):
                raise _changed(file, status.st_size)
        return known


def _opened(file: MappedFile) -> _Open:
    direct = getattr(os, "O_DIRECT", 0)
    try:
        try:
            handle = os.open(file.path, os.O_RDONLY | direct)
        except OSError:
            direct, handle = 0, os.open(file.path, os.O_RDONLY)
        status = os.fstat(handle)
    except OSError as error:
        raise CheckpointError(f"{file.location}: cannot be read ({error})", hint="is the disk still there?") from None
    if status.st_size != file.size:
        os.close(handle)
        raise _changed(file, status.st_size)
    with suppress(ImportError, AttributeError, OSError):  # what macOS has in the place of O_DIRECT
        import fcntl

        fcntl.fcntl(handle, fcntl.F_NOCACHE, 1)  # type: ignore[attr-defined]
    return _Open(handle, bool(direct), status.st_size, status.st_mtime_ns)


def _changed(file: MappedFile, size: int) -> CheckpointError:
    what = f"has {size} bytes, where {file.size} were expected" if size != file.size else "was written to"
    return CheckpointError(
        f"{file.location}: {what}",
        hint="the file was cut short or replaced while it was in use; fetch it again, and load the model anew",
    )
