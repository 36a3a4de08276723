"""What every reader of tensors offers: names, what is known of each without reading it, and the tensor itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.errors import CheckpointError, OptionError

Rows = slice | range | tuple[int, int]
"""Rows ``begin`` to ``end`` (exclusive): ``slice(2, 5)``, ``range(2, 5)`` or ``(2, 5)``."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        name: as the source lists it.
        dtype: of what ``read`` returns; for quantised weights that of the dequantised ones.
        shape: of what ``read`` returns.
        nbytes: the bytes it takes on disk, scales included.
        file: the name of the file that holds it, within the checkpoint.
        encoding: how it is kept there: a safetensors dtype name such as ``BF16``, or ``Q4_K``, ``mlx 4-bit``, ...
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: str
    encoding: str


class TensorSource(ABC):
    """Named tensors, read one at a time. Iterating gives the names."""

    location: str
    """Where it lies, for messages: a path, or a Hub id and commit."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return every tensor's name, in the order of the files."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Return what is known without reading the tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """

    @abstractmethod
    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """Return a tensor, or some of its rows; mapped and not copied where source and format allow it.

        Args:
            name: one of ``names()``.
            rows: which; a tensor of more than two dimensions is seen as a matrix [product of the others, last].

        Returns:
            ``info(name).dtype``, of ``info(name).shape``, or [rows, last] (for a vector: [rows]).

        Raises:
            CheckpointError: there is no such tensor, or the file is damaged or has changed.
            OptionError: rows outside the tensor.
        """

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def unknown(self, name: str) -> CheckpointError:
        """The error for a name that is not there."""
        return CheckpointError(f"{self.location}: holds no tensor called {name!r}", hint="`octavo tensors` lists them")


class ListedSource(TensorSource):
    """A source that knows of all its tensors from the start.

    Attributes:
        infos: by name, in the file's order.
    """

    infos: dict[str, TensorInfo]

    def names(self) -> list[str]:
        """Every name, in the file's order."""
        return list(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def info(self, name: str) -> TensorInfo:
        """What the file says of it."""
        if name not in self.infos:
            raise self.unknown(name)
        return self.infos[name]


class MergedSource(TensorSource):
    """Several sources with different names, as one."""

    def __init__(self, sources: Sequence[TensorSource], location: str) -> None:
        self.location = location
        self._owners: dict[str, TensorSource] = {}
        for source in sources:
            for name in source.names():
                if name in self._owners:
                    files = f"{self._owners[name].info(name).file} and in {source.info(name).file}"
                    raise CheckpointError(
                        f"{location}: tensor {name!r} lies in {files}", hint="give the path of one file to choose it"
                    )
                self._owners[name] = source

    def names(self) -> list[str]:
        """Every name, source by source."""
        return list(self._owners)

    def __contains__(self, name: object) -> bool:
        return name in self._owners

    def info(self, name: str) -> TensorInfo:
        """Ask the source that has it."""
        return self.owner(name).info(name)

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """Ask the source that has it."""
        return self.owner(name).read(name, rows)

    def owner(self, name: str) -> TensorSource:
        """Return the source that has a tensor.

        Raises:
            CheckpointError: none has.
        """
        if name not in self._owners:
            raise self.unknown(name)
        return self._owners[name]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[product of the others, last] of more than two dimensions; one or two dimensions as they are."""
    return shape if len(shape) < 3 else (math.prod(shape[:-1]), shape[-1])


def row_range(rows: Rows | None, shape: tuple[int, ...], name: str) -> tuple[int, int]:
    """Return begin and end of the rows that are asked for.

    Raises:
        OptionError: they are not rows of a tensor of this shape.
    """
    count = matrix_shape(shape)[0] if shape else 1
    if rows is None:
        return 0, count
    begin, end, step = (
        (*rows, 1) if isinstance(rows, tuple) else (rows.start, rows.stop, 1 if rows.step is None else rows.step)
    )
    begin, end = 0 if begin is None else begin, count if end is None else end
    if step != 1 or not 0 <= begin <= end <= count:
        raise OptionError(
            f"rows {begin} to {end} of {name!r} are asked for; it has {count}",
            hint="give a first row and the one after the last, such as rows=(0, 8)",
        )
    return begin, end
