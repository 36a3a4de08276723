"""Experts in host memory, each in one piece: for a card that copies them, and for the CPU, which computes with them."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.errors import ResourceError
from octavo.experts.disk import MATRICES
from octavo.experts.slots import Key
from octavo.kernels.card import Kind, kind_of
from octavo.kernels.ops import Matrix, Weight, moe_part
from octavo.machine import check_room
from octavo.plan import show_size
from octavo.quant.formats import Packed

Kinds = tuple[Kind, Kind, Kind]
"""Of w1, w3 and w2."""


class HostExpert(NamedTuple):
    """An expert in host memory.

    Attributes:
        data: uint8, its matrices one behind the other, as a store has them; from `host_memory`.
        kinds: of the matrices.
    """

    data: Tensor
    kinds: Kinds

    def matrices(self) -> tuple[Matrix, Matrix, Matrix]:
        """For the CPU's kernels, in the same memory."""
        w1, w3, w2 = map(_matrix, _parts(self.data, self.kinds), self.kinds)
        return w1, w3, w2


def host_expert(w1: Weight, w3: Weight, w2: Weight) -> HostExpert:
    """Copy an expert's matrices to host memory of their own.

    Raises:
        OptionError: a card does not compute with such matrices.
        ResourceError: there is not as much memory.
    """
    kinds = (kind_of(w1), kind_of(w3), kind_of(w2))
    data = host_memory(sum(kind.nbytes for kind in kinds))
    for part, weight in zip(_parts(data, kinds), (w1, w3, w2), strict=True):
        part.copy_(weight.data.contiguous().view(torch.uint8).flatten())
    return HostExpert(data, kinds)


class HostExperts(Mapping[Key, HostExpert]):
    """Experts that are copied to host memory when they are asked for: each once, and never all of them twice.

    Args:
        names: what the names of an expert's matrices begin with, such as ``layers.0.feed_forward.experts.3``.
        weight: gives a matrix by its name.
    """

    def __init__(self, names: Mapping[Key, str], weight: Callable[[str], Weight]) -> None:
        self._names, self._weight = names, weight

    def __getitem__(self, key: Key) -> HostExpert:
        w1, w3, w2 = (self._weight(f"{self._names[key]}.{matrix}.weight") for matrix in MATRICES)
        return host_expert(w1, w3, w2)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _parts(data: Tensor, kinds: Kinds) -> list[Tensor]:
    ends = list(itertools.accumulate(kind.nbytes for kind in kinds))
    return [data[end - kind.nbytes : end] for kind, end in zip(kinds, ends, strict=True)]


def _matrix(data: Tensor, kind: Kind) -> Matrix:
    shape = (kind.rows, kind.cols)
    return Matrix(data.view(torch.bfloat16).view(shape) if kind.format is None else Packed(data, kind.format, shape))


def parts_on_cpu(
    experts: Mapping[int, HostExpert], x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute some experts; see `CardCache.compute`. Each choice is computed as if it were a token of its own."""
    ids = topk_ids_TK.flatten()
    choices = torch.isin(ids, torch.tensor(list(experts), dtype=ids.dtype)).nonzero().flatten()
    x_ND = x_TD[choices // topk_ids_TK.shape[1]]
    parts_ND = torch.zeros(x_ND.shape, dtype=torch.float32)
    matrices = {number: expert.matrices() for number, expert in experts.items()}
    moe_part(parts_ND, x_ND, ids[choices, None], topk_weights_TK.flatten()[choices, None], matrices)
    return choices, parts_ND


# ---------------------------------------- memory


def host_memory(nbytes: int) -> Tensor:
    """Return whole pages of their own as uint8 [nbytes], to be page-locked.

    torch's own page-locked memory is rounded up to powers of two: an expert of 94 MB would take 134.

    Raises:
        ResourceError: there is not as much.
    """
    check_room(nbytes)
    mapping = mmap.mmap(-1, max(nbytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)[:nbytes]


def lock_pages(data: Tensor, device: torch.device) -> None:
    """Keep pages of `host_memory` where they are, so that the card copies them by itself; on a CPU nothing is done.

    Raises:
        ResourceError: the system does not allow as much.
    """
    if device.type != "cuda":
        return
    error = int(_cuda().cudaHostRegister(data.data_ptr(), data.nbytes, 0))
    if error:
        raise ResourceError(
            f"{show_size(data.nbytes)} of host memory cannot be page-locked for the experts (CUDA error {error})",
            hint="less --memory leaves more to others; a container may need a higher limit of locked memory",
        )


def unlock_pages(locked: Sequence[Tensor], device: torch.device) -> None:
    """Undo `lock_pages`, once all copies are over."""
    if device.type == "cuda":
        for data in locked:
            _cuda().cudaHostUnregister(data.data_ptr())


def _cuda() -> Any:
    """The runtime's own functions."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
