"""What the readers of quantised tensors share: one logical matrix, kept in several tensors of a source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.storage.source import TensorInfo, TensorSource

CHUNK_ELEMENTS = 1 << 20  # undone at a time, which bounds the memory for what is only passing
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class PackedTensor(ABC):
    """A logical tensor.

    Attributes:
        info: of what ``rows`` returns; ``nbytes`` are those of all the tensors it is kept in.
    """

    info: TensorInfo

    @abstractmethod
    def rows(self, first: int, last: int) -> Tensor:
        """Return rows ``first`` to ``last`` of the matrix [product of the other dimensions, last dimension]."""


def describe(
    source: TensorSource, name: str, parts: list[TensorInfo], shape: tuple[int, ...], dtype: torch.dtype, encoding: str
) -> TensorInfo:
    """What is known of a tensor that is kept in ``parts``, the packed one first.

    Raises:
        CheckpointError: the scales' dtype is none that weights have.
    """
    if dtype not in FLOATS:
        raise CheckpointError(
            f"{source.location}: the scales of {name!r} are {dtype}; expected float16, bfloat16 or float32",
            hint="the file is damaged, or packed in a way Octavo does not know",
        )
    return TensorInfo(name, dtype, shape, sum(part.nbytes for part in parts), parts[0].file, encoding)


def misfit(source: TensorSource, name: str, parts: list[TensorInfo], why: str) -> CheckpointError:
    """The error for parts that do not belong together."""
    shapes = ", ".join(f"{part.name.rpartition('.')[2]} {part.encoding} {list(part.shape)}" for part in parts)
    return CheckpointError(
        f"{source.location}: the quantised tensor {name!r} does not fit together ({shapes}): {why}",
        hint="the file is damaged, or packed in a way Octavo does not know",
    )


def chunks(first: int, last: int, elements_each: int) -> Iterator[tuple[int, int]]:
    """Split rows ``first`` to ``last`` so that each piece has about CHUNK_ELEMENTS elements."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements_each))
    for begin in range(first, last, step):
        yield begin, min(begin + step, last)
