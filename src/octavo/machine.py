"""What this machine has: free memory, a GPU, and how fast its disk is. No torch."""

from __future__ import annotations

import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from octavo.errors import OptionError

READERS = 4  # reads in flight; one alone leaves an NVMe disk waiting
PIECE = 8 << 20  # bytes of a read
SAMPLE = 512 << 20  # bytes that are read


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may take: what the system has available, within the limits of its cgroups.

    Args:
        root: of the file system; another for tests.

    Raises:
        OptionError: this system does not tell.
    """
    found = [*_available(root), *_within_cgroups(root)]
    if not found:
        raise OptionError("this system does not tell how much memory is free", hint="say it, such as --memory 16GiB")
    return max(0, min(found))


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


def _available(root: Path) -> Iterator[int]:
    """By Linux's own estimate: free pages, and caches that can be let go."""
    with suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _within_cgroups(root: Path) -> Iterator[int]:
    """What every cgroup above this process has left; its page cache counts as free."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            group = top / path.lstrip("/")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_") if controllers else _VERSION_2
            for folder in (group, *group.parents):
                if folder.is_relative_to(top):
                    yield from _left(folder, *names)


_VERSION_2 = ("memory.max", "memory.current", "")


def _left(group: Path, limit_file: str, usage_file: str, prefix: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # the root has no such files, a limit may be "max"
        limit = int((group / limit_file).read_text())  # or, in version 1, a number beyond any machine's
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
        yield limit - int((group / usage_file).read_text()) + cached


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
