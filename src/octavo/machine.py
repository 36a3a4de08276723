"""What this machine has: free memory, a GPU, and how fast its disk is. No torch."""

from __future__ import annotations

import math
import mmap
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from octavo.errors import OptionError, ResourceError

READERS = 4  # reads in flight; one alone leaves an NVMe disk waiting
PIECE = 8 << 20  # bytes of a read
SAMPLE = 512 << 20  # bytes that are read
SPARE = 128 << 20  # bytes of the machine's that are left to the system and to others: what is free is an estimate
UNLIMITED = 1 << 60  # what cgroups of version 1 call a limit though it is none lies above


class Room(NamedTuple):
    """Memory that may be taken, in bytes, and what limits it."""

    nbytes: int
    limit: str


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may take: what the system has available, within the limits of its cgroups.

    Args:
        root: of the file system; another for tests.

    Raises:
        OptionError: this system does not tell.
    """
    found = room(root)
    if found is None:
        raise OptionError("this system does not tell how much memory is free", hint="say it, such as --memory 16GiB")
    return found.nbytes


def room(root: Path = Path("/"), enough: float = math.inf) -> Room | None:
    """Return how much memory this process may take, and by which limit; None where the system does not tell.

    Args:
        root: of the file system; another for tests.
        enough: a cgroup that has so many bytes left is not asked how much of its page cache could be let go as well,
            which takes longer.
    """
    least = min((*_available(root), *_within_cgroups(root, enough)), default=None)
    return None if least is None else least._replace(nbytes=max(0, least.nbytes))


def check_room(needed: int, root: Path = Path("/")) -> None:
    """Make sure that memory is free before it is taken; passes where the system does not tell.

    Args:
        needed: bytes.
        root: of the file system; another for tests.

    Raises:
        ResourceError: so much is not free; it may have been taken by others since the model was loaded.
    """
    found = room(root, needed)
    if found is not None and found.nbytes < needed:
        raise ResourceError(
            f"{needed / 1e9:.2f} GB of memory are needed, and {found.nbytes / 1e9:.2f} GB can be had {found.limit}",
            hint="end other programs, or load the model with less memory (--memory)",
        )


def resident_memory() -> int:
    """Return the bytes of memory that this process has now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


def physical_memory() -> int:
    """Return the bytes of this machine's memory.

    Raises:
        OptionError: this system does not tell.
    """
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        raise OptionError(
            "this system does not tell how much memory it has", hint="say it, such as --memory 16GiB"
        ) from None


def _available(root: Path) -> Iterator[Room]:
    """By Linux's own estimate: free pages, and caches that can be let go."""
    with suppress(OSError):
        found = re.search(r"^MemAvailable: *(\d+) kB", _text(f"{root}/proc/meminfo"), re.MULTILINE)
        if found:
            yield Room(int(found[1]) * 1024 - SPARE, "on this machine")


def _within_cgroups(root: Path, enough: float) -> Iterator[Room]:
    """What every cgroup above this process has left; its page cache counts as free."""
    with suppress(OSError):
        for line in _text(f"{root}/proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = f"{root}/sys/fs/cgroup" + ("/memory" if controllers else "")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_") if controllers else _VERSION_2
            parts = [part for part in path.split("/") if part]
            for depth in range(len(parts), -1, -1):
                yield from _left("/".join((top, *parts[:depth])), *names, enough)


_VERSION_2 = ("memory.max", "memory.current", "")


def _left(group: str, limit_file: str, usage_file: str, prefix: str, enough: float) -> Iterator[Room]:
    with suppress(OSError, ValueError):  # the root has no such files, a limit may be "max"
        limit = int(_text(f"{group}/{limit_file}"))
        if limit >= UNLIMITED:
            return
        left = limit - int(_text(f"{group}/{usage_file}"))
        if left < enough:
            stat = dict(line.split() for line in _text(f"{group}/memory.stat").splitlines())
            left += sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        yield Room(left, f"within the limit of {limit / 1e9:.2f} GB that {group}/{limit_file} sets")


def _text(path: str) -> str:
    with open(path) as file:
        return file.read()


def nvidia_gpu() -> tuple[str, int]:
    """Return the name and the free bytes of the first NVIDIA GPU.

    Raises:
        OptionError: there is none, or its driver does not answer.
    """
    query = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        name, mebibytes = said.splitlines()[0].rsplit(",", 1)
        return name.strip(), int(mebibytes) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        raise OptionError(
            "no NVIDIA GPU is found here (nvidia-smi does not answer)",
            hint="name the one you mean, such as --device 'RTX 4090'",
        ) from None


def disk_bandwidth(folder: Path) -> float:
    """Write a temporary file without a name, read it past the page cache, and return bytes per second.

    Args:
        folder: on the disk that is meant.

    Raises:
        OptionError: nothing can be written there, or its file system has no direct reads.
    """
    try:
        room = os.statvfs(folder)
        size = min(SAMPLE, room.f_bavail * room.f_frsize // 4) // PIECE * PIECE
        if size < READERS * PIECE:
            raise OptionError(f"{folder}: too little free disk to measure how fast it is", hint="make room there")
        with tempfile.TemporaryFile(dir=folder) as file:
            noise = os.urandom(PIECE)
            for at in range(0, size, PIECE):  # no two pieces alike: some disks store such once
                file.write(noise[at // PIECE :] + noise[: at // PIECE])
            file.flush()
            os.fsync(file.fileno())
            return _read_directly(file.fileno(), size)
    except OSError as error:
        raise OptionError(
            f"{folder}: its disk cannot be measured ({error.strerror})",
            hint="go to a folder on the disk that holds the model, or leave --measure out",
        ) from None


def _read_directly(descriptor: int, size: int) -> float:
    """All of an open file, by several threads with O_DIRECT; it needs whole pages for buffers, which mmap gives."""
    direct = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT)
    try:

        def read(first: int) -> int:
            with mmap.mmap(-1, PIECE) as buffer:
                return sum(os.preadv(direct, [buffer], at) for at in range(first * PIECE, size, READERS * PIECE))

        with ThreadPoolExecutor(READERS) as pool:
            started = time.perf_counter()
            done = sum(pool.map(read, range(READERS)))
            seconds = time.perf_counter() - started
    finally:
        os.close(direct)
    if done != size:
        raise OSError(0, f"{done} bytes of {size} were read")
    return size / seconds
