"""Bytes of files into memory that is there already, around the page cache and several parts at a time.

Direct reads (``O_DIRECT``) leave no second copy in the page cache, so that a budget holds, and are the fastest that a
disk has. They begin and end at whole pages, in the file and in memory. Where a file system has none, pages are read as
usual and given back at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from octavo.errors import CheckpointError
from octavo.storage.files import MappedFile, Place

PAGE = 4096
PART = 8 << 20  # bytes of one read
IN_FLIGHT = 6  # reads at a time: what it takes to keep an NVMe disk busy


def pages(place: Place) -> tuple[int, int]:
    """The whole pages that hold a place: begin and end in its file."""
    return place.begin // PAGE * PAGE, -(-place.end // PAGE) * PAGE


def joined(places: Sequence[Place]) -> list[Place]:
    """The same bytes in as few places as can be: what lies one behind the other is one."""
    found: list[Place] = []
    for place in places:
        if found and found[-1].file is place.file and found[-1].end == place.begin:
            found[-1] = Place(place.file, found[-1].begin, place.end)
        else:
            found.append(place)
    return found


@dataclass
class _Open:
    """A file, opened."""

    handle: int
    direct: bool
    size: int


class Reader:
    """Threads that read, and the files that they have opened."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="octavo-read")
        self._open: dict[str, _Open] = {}

    def close(self) -> None:
        """Wait for running reads, and close the files."""
        self._pool.shutdown(cancel_futures=True)
        for opened in self._open.values():
            os.close(opened.handle)
        self._open.clear()

    def start(self, place: Place, into: memoryview) -> list[Future[None]]:
        """Begin to read the whole pages that hold a place.

        Args:
            place: what is needed.
            into: memory for these pages, which begins at one.

        Returns:
            What to wait for. It raises CheckpointError where the file no longer has the bytes, or cannot be read.
        """
        first, last = pages(place)
        opened = self._opened(place.file)
        return [
            self._pool.submit(_read, place.file, opened, begin, into[begin - first : min(begin + PART, last) - first])
            for begin in range(first, last, PART)
        ]

    def _opened(self, file: MappedFile) -> _Open:
        if file.location not in self._open:
            self._open[file.location] = _opened(file)
        return self._open[file.location]


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
    return _Open(handle, bool(direct), status.st_size)


def _read(file: MappedFile, opened: _Open, begin: int, into: memoryview) -> None:
    """Fill ``into`` from ``begin`` on, as far as the file goes. A read that ends early goes on where it ended."""
    got, needed = 0, min(len(into), opened.size - begin)
    while got < needed:
        try:
            n = os.preadv(opened.handle, [into[got:]], begin + got)
        except OSError as error:
            raise CheckpointError(
                f"{file.location}: bytes {begin + got} to {begin + len(into)} cannot be read ({error})",
                hint="is the disk still there, and sound? the next request tries again",
            ) from None
        got += n
        if n <= 0 or (opened.direct and got < needed and got % PAGE):  # off a page, a direct read ends with the file
            raise _changed(file, begin + got)
    if not opened.direct:
        with suppress(OSError, AttributeError):
            os.posix_fadvise(opened.handle, begin, len(into), os.POSIX_FADV_DONTNEED)


def _changed(file: MappedFile, size: int) -> CheckpointError:
    return CheckpointError(
        f"{file.location}: has {size} bytes, where {file.size} were expected",
        hint="the file was cut short or replaced while it was in use; fetch it again, and load the model anew",
    )
