"""Where a checkpoint's files lie: a folder of this machine, or (octavo.hub) a repository pinned at a commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from octavo.errors import CheckpointError
from octavo.storage.files import ByteFile, MappedFile, PlainFile, read_json


class Folder(Protocol):
    """Files by name.

    Attributes:
        location: for messages.
    """

    location: str

    def files(self) -> Mapping[str, int]:
        """Return every file's name and size in bytes; files of sub-folders are left out."""
        ...

    def file(self, name: str) -> ByteFile:
        """Open one.

        Raises:
            UserError: there is no such file.
        """
        ...

    def stamp(self, name: str) -> str:
        """Return a text that changes when a file does."""
        ...

    def json(self, name: str) -> dict[str, Any]:
        """Read a small JSON object.

        Raises:
            UserError: there is no such file, or it holds something else.
        """
        ...


class LocalFolder:
    """A folder of this machine.

    Args:
        path: of the folder.
        only: the files that count, by name; by default all of them.
        mapped: map files into memory; otherwise bytes are copied out, and let go with the tensor.
    """

    def __init__(self, path: Path, only: Callable[[str], bool] | None = None, *, mapped: bool = True) -> None:
        self.path = path
        self.location = str(path)
        self._only = only
        self._mapped = mapped

    def files(self) -> Mapping[str, int]:
        """Sorted by name."""
        try:
            found = {p.name: p.stat().st_size for p in sorted(self.path.iterdir()) if p.is_file()}
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}", hint="give a folder of model files") from None
        return {name: size for name, size in found.items() if self._only is None or self._only(name)}

    def file(self, name: str) -> ByteFile:
        """Mapped or plain, as the folder was opened."""
        path = self.path / name
        return MappedFile(path) if self._mapped else PlainFile(path)

    def stamp(self, name: str) -> str:
        """Size, and time of the last change."""
        status = (self.path / name).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    def json(self, name: str) -> dict[str, Any]:
        """Read a JSON object of the folder."""
        return read_json(self.path / name)
