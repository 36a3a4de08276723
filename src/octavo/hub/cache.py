"""What was fetched by range, on the disk: bytes by the hash of their file, and the listings of commits.

It lies in a folder of its own beside the cache of the Hub's client, which knows whole files only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor

from octavo.errors import HubError

MAX_BYTES = 20 << 30  # of ranges; beyond it those used longest ago are removed
DIGEST_BYTES = 32  # SHA-256, behind the bytes
COMMIT = re.compile(r"[0-9a-f]{40}")
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def cache_folder() -> Path:
    """Where all of it lies."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "octavo-ranges"


class RangeCache:
    """Bytes ``begin`` to ``end`` of files that are known by their hash.

    An entry is written beside and renamed, and checked when it is read; several processes may share the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._held: int | None = None

    def get(self, file_hash: str, begin: int, end: int) -> Tensor | None:
        """Return uint8 [end - begin]; None if there is no such entry, or a damaged one, which is removed."""
        path = self._path(file_hash, begin, end)
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size == end - begin + DIGEST_BYTES:
                    data = torch.empty(end - begin, dtype=torch.uint8)
                    file.readinto(memoryview(data.numpy()))  # type: ignore[arg-type]  # numpy arrays are buffers
                    if file.read() == _digest(data):
                        with suppress(OSError):  # a cache that is there to be read only
                            os.utime(path)
                        return data
            path.unlink(missing_ok=True)
        except OSError:
            return None
        return None

    def put(self, file_hash: str, begin: int, data: Tensor) -> None:
        """Keep uint8 [n], the bytes from ``begin`` on, and make room for them.

        Raises:
            HubError: the disk is full, or not ours to write.
        """
        size = len(data) + DIGEST_BYTES
        if size > MAX_BYTES:
            return
        with self._lock, _storing(self.folder):
            if self._held is None or self._held + size > MAX_BYTES:
                self._held = self._shrink(MAX_BYTES - size)
            self._held += size
        path = self._path(file_hash, begin, begin + len(data))
        _write(path, memoryview(data.numpy()), _digest(data))  # type: ignore[arg-type]

    def _path(self, file_hash: str, begin: int, end: int) -> Path:
        return self.folder / file_hash / f"{begin}-{end}"

    def _shrink(self, limit: int) -> int:
        """Remove entries, those used longest ago first, until ``limit`` bytes are left; return how many are."""
        found = []
        for path in self.folder.glob("*/*"):
            try:
                status = path.stat()
            except OSError:  # another process was faster
                continue
            found.append((status.st_mtime, status.st_size, path))
        held = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if held <= limit:
                break
            path.unlink(missing_ok=True)
            held -= size
        return held


class FileEntry(NamedTuple):
    """A file of a commit: its size in bytes, and its hash (of Git LFS, else of git)."""

    size: int
    hash: str


@dataclass(frozen=True)
class Listing:
    """The files of a commit, by name; those of sub-folders are left out."""

    commit: str
    files: Mapping[str, FileEntry]

    def save(self, repo_id: str, revision: str) -> None:
        """Keep it, as what a revision was seen to be, and for good under its commit.

        Raises:
            HubError: the disk is full, or not ours to write.
        """
        data = json.dumps({"commit": self.commit, "files": self.files}).encode()
        for name in {revision, self.commit}:
            if Listing.load(repo_id, name) != self:
                _write(_listing_path(repo_id, name), data)

    @classmethod
    def load(cls, repo_id: str, revision: str) -> Listing | None:
        """Return what was kept for a revision, if anything."""
        try:
            kept = json.loads(_listing_path(repo_id, revision).read_bytes())
            return cls.checked(kept["commit"], kept["files"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    @classmethod
    def checked(cls, commit: Any, files: Mapping[str, Any]) -> Listing:
        """Make one of what the Hub or a file of ours says: a commit, and pairs of size and hash by name.

        Raises:
            ValueError, TypeError: it makes no sense.
        """
        if not COMMIT.fullmatch(commit):
            raise ValueError(f"{commit!r} is no commit")
        here = {name: FileEntry(*pair) for name, pair in sorted(files.items()) if not re.search(r"[/\\]", name)}
        for name, entry in here.items():
            if not isinstance(entry.size, int) or entry.size < 0 or not HASH.fullmatch(entry.hash):
                raise ValueError(f"{name!r} has size {entry.size!r} and hash {entry.hash!r}")
        return cls(commit, here)


def _listing_path(repo_id: str, revision: str) -> Path:
    return cache_folder() / "listings" / repo_id / f"{quote(revision, safe='')}.json"


def _digest(data: Tensor) -> bytes:
    return hashlib.sha256(memoryview(data.numpy())).digest()  # type: ignore[arg-type]


def _write(path: Path, *parts: bytes | memoryview) -> None:
    """Write beside and rename, so that nobody ever sees half a file."""
    with _storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HubError(
            f"{path}: cannot be stored: {error.strerror}", hint="HF_HOME says where downloads are kept"
        ) from None
