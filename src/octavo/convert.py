"""Any layout in, any layout out, or a quantised store: a checkpoint is read and written one tensor at a time.

The new files grow in a folder beside their place and move there when they are whole. A journal beside them says which
pieces are written; an interrupted conversion, started again, checks those and goes on behind them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from octavo.checkpoint import Checkpoint, open_checkpoint
from octavo.checkpoint.output import SHARD_BYTES, OutFile
from octavo.checkpoint.targets import plan_companions, plan_files, plan_store
from octavo.checkpoint.writer import Checksums, checksums_of, flush_all, write_file
from octavo.errors import CheckpointError, OptionError
from octavo.quant.encode import METHODS
from octavo.quant.formats import FORMATS
from octavo.quant.presets import preset
from octavo.storage.packed_octavo import KEY

Progress = Callable[[int], None]
"""Called with a number of bytes that are written (or found written), from time to time."""


@dataclass(frozen=True)
class Conversion:
    """A planned conversion.

    Attributes:
        checkpoint: what is read.
        target: the folder that is written; or the file, if its name ends in ``.gguf``.
        files: the weights.
        companions: small files beside them, by name.
    """

    checkpoint: Checkpoint
    target: Path
    files: tuple[OutFile, ...]
    companions: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        """All that will be written."""
        return sum(file.size for file in self.files) + sum(map(len, self.companions.values()))

    @property
    def beside(self) -> Path:
        """Where it grows: the journal, and the files in a folder of their own."""
        return self.target.with_name(f".{self.target.name}.converting")

    @property
    def _folder(self) -> Path:
        return self.beside / "files"

    def run(self, progress: Progress | None = None) -> None:
        """Write everything, or what is missing of it.

        Raises:
            CheckpointError: the target exists, or an unfinished conversion of something else lies beside it, or one
                is running; the disk has too little room, or cannot be written; the source is damaged.
        """
        progress = progress or (lambda nbytes: None)
        _check_absent(self.target)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self.beside / "journal.jsonl").open("a+b", buffering=0) as file:
                journal = _Journal(file, self)
                self._check_room(journal)
                for planned in self.files:
                    self._write(planned, journal, progress)
                for name, data in self.companions.items():
                    (self._folder / name).write_bytes(data)
                    progress(len(data))
                self._finish()
        except OSError as error:
            raise CheckpointError(
                f"{self.target}: could not be written ({error})",
                hint="is the disk full, or not yours to write? that mended, the same command goes on where it stopped",
            ) from error

    def _check_room(self, journal: _Journal) -> None:
        """The disk must hold all that is still missing."""
        there = sum(path.stat().st_blocks * 512 for path in self._folder.iterdir())
        free, needed = shutil.disk_usage(self._folder).free, max(self.nbytes - there, 0)
        if free < needed:
            if not journal.written:
                shutil.rmtree(self.beside)
            raise CheckpointError(
                f"{self.target}: {needed / 1e9:.1f} GB are to be written, and {free / 1e9:.1f} GB are free there",
                hint="make room, or choose another disk",
            )

    def _write(self, file: OutFile, journal: _Journal, progress: Progress) -> None:
        path = self._folder / file.name
        written = journal.found(path, file)
        progress(len(file.header) + sum(file.pieces[number].nbytes for number in written))

        def done(number: int, checksums: Checksums) -> None:
            journal.note(file, number, checksums)
            progress(file.pieces[number].nbytes)

        write_file(path, file, self.checkpoint.read, there=written, done=done)

    def _finish(self) -> None:
        """Flush, and move to the target's place."""
        flush_all(self._folder)
        _check_absent(self.target)
        whole = self._folder / self.files[0].name if self.target.suffix == ".gguf" else self._folder
        whole.rename(self.target)
        shutil.rmtree(self.beside)


class _Journal:
    """What is written: a line of JSON for each piece, after one for the conversion itself.

    It stays locked while its file is open, so that of two conversions to one place the second is refused. A line
    begins with its newline: one that a kill has cut short does not spoil the next.
    """

    def __init__(self, file: FileIO, conversion: Conversion) -> None:
        self._file = file
        _lock(file, conversion)
        identity = {"conversion": _fingerprint(conversion)}
        file.seek(0)
        lines = [line for text in file.read().splitlines() if (line := _line(text))]
        if lines and lines[0] != identity:
            raise CheckpointError(
                f"{conversion.beside}: holds an unfinished conversion from another source or with other options",
                hint=f"finish that one, or remove it to start anew: rm -r {shlex.quote(str(conversion.beside))}",
            )
        if not lines:
            self._add(identity)
        self.written = {(line.get("file"), line.get("piece")): line.get("xxh3") for line in lines[1:]}

    def found(self, path: Path, file: OutFile) -> dict[int, Checksums]:
        """Return the numbers of a file's pieces that are there, and as they were written, with their checksums."""
        if not path.exists():
            return {}
        noted = {number: self.written.get((file.name, number)) for number in range(len(file.pieces))}
        return {n: sums for n, sums in noted.items() if sums and sums == checksums_of(path, file.pieces[n])}

    def note(self, file: OutFile, number: int, checksums: Checksums) -> None:
        """Remember that a piece is written."""
        self._add({"file": file.name, "piece": number, "xxh3": checksums})

    def _add(self, line: Mapping[str, Any]) -> None:
        self._file.write(f"\n{json.dumps(line)}".encode())


def _line(text: bytes) -> dict[str, Any] | None:
    """A line of the journal, or None for what is left of one."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _lock(file: FileIO, conversion: Conversion) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(
            f"{conversion.target}: is being written by another process", hint="wait until that one has finished"
        ) from None
    except OSError:  # some network file systems have no locks; a user there has to look out
        pass


def _check_absent(target: Path) -> None:
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: exists already", hint="choose another name, or remove it first")


def _fingerprint(conversion: Conversion) -> str:
    """Tells apart conversions of other or changed files, and with other results."""
    stored, folder = conversion.checkpoint.stored, conversion.checkpoint.folder
    sources = sorted({stored.info(name).file for name in stored})
    digest = hashlib.sha256(repr([(name, folder.stamp(name)) for name in sources]).encode())
    for file in conversion.files:
        digest.update(f"{file.name} {file.size}".encode() + file.header)
    for name, data in conversion.companions.items():
        digest.update(name.encode() + data)
    return digest.hexdigest()


def plan_conversion(
    source: str | Path | Checkpoint,
    target: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    revision: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Plan to write a checkpoint in another layout; nothing is written yet.

    Args:
        source: whatever `octavo.checkpoint.open_checkpoint` opens.
        target: a folder that does not exist; for "gguf" also the name of a ``.gguf`` file.
        to: "hf", "mistral", "mlx" or "gguf".
        dtype: "float32", "bfloat16" or "float16"; for "gguf" also "q8_0" and "q4_0"; for "mlx" also "q8" and "q4"
            (groups of 64). By default every tensor keeps its own.
        revision: branch, tag or commit, if the source is a repository.
        shard_bytes: tensors beyond this go into a further file, for "hf" and "mlx".

    Raises:
        CheckpointError: the source is no whole Mixtral-class checkpoint, or the target exists.
        OptionError: an unknown target, or a dtype that it does not know.
        UserError: what `octavo.checkpoint.open_checkpoint` raises.
    """
    target = _place(target, to)
    checkpoint = _open(source, revision)
    files = plan_files(checkpoint, to, dtype, shard_bytes)
    if target.suffix == ".gguf":
        files = [replace(files[0], name=target.name)]
    return Conversion(checkpoint, target, tuple(files), plan_companions(checkpoint, to, files, dtype))


def plan_quantization(
    source: str | Path | Checkpoint,
    target: str | Path,
    *,
    bits: int | str,
    overrides: Mapping[str, str] | None = None,
    method: str = "optimal",
    revision: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Plan to write a checkpoint as a store, quantised as the kernels read it; nothing is written yet.

    Args:
        source: whatever `octavo.checkpoint.open_checkpoint` opens, but for a store.
        target: a folder that does not exist.
        bits: 8, 4, 3 or 2: a preset of `octavo.quant.presets`.
        overrides: formats for tensors whose canonical names match a pattern; see there.
        method: "optimal", or "rtn" (round to nearest).
        revision: branch, tag or commit, if the source is a repository.
        shard_bytes: tensors beyond this go into a further file.

    Raises:
        CheckpointError: the source is no whole Mixtral-class checkpoint, or is a store; or the target exists.
        OptionError: unknown bits, formats or method, a pattern that nothing matches, or weights of another dtype than
            float32, bfloat16 and float16.
        UserError: what `octavo.checkpoint.open_checkpoint` raises.
    """
    target = _place(target, KEY)
    if method not in METHODS:
        raise OptionError(
            f"method is {method!r}; expected one of {', '.join(METHODS)}", hint="optimal is closer, rtn quicker"
        )
    checkpoint = _open(source, revision)
    if checkpoint.is_store:
        raise CheckpointError(
            f"{checkpoint.location}: is a store already, and more would be lost",
            hint="quantise the original weights; what is left of them, octavo convert gives back",
        )
    formats = {name: FORMATS[format] for name, format in preset(bits, checkpoint.names(), overrides).items()}
    files = plan_store(checkpoint, formats, method, shard_bytes)
    settings = {"bits": int(bits), "method": method, "overrides": dict(overrides or {})}
    companions = plan_companions(checkpoint, KEY, files, settings=settings)
    return Conversion(checkpoint, target, tuple(files), companions)


def _place(target: str | Path, to: str) -> Path:
    """Where to write, if nothing is there yet."""
    path = Path(os.path.expanduser(target))
    if path.suffix == ".gguf" and to != "gguf":
        raise OptionError(f"{path}: only --to gguf writes a .gguf file", hint="give the name of a folder")
    _check_absent(path)
    return path


def _open(source: str | Path | Checkpoint, revision: str | None) -> Checkpoint:
    """A whole Mixtral-class checkpoint."""
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, revision, mapped=False)
    checkpoint.check()
    return checkpoint
