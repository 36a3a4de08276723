"""Token embeddings that stay on the disk: of a quarter of a gigabyte a token needs one row of 8 kB."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor, nn

from octavo.experts.reader import Layout, Reader
from octavo.storage.files import Place


class StreamedEmbedding(nn.Module):
    """In the place of `torch.nn.Embedding`.

    Args:
        place: of the rows, one behind the other.
        shape: rows, and numbers of a row.
        dtype: of a number.

    Attributes:
        weight: no row at all, of the dtype that the rows have.
    """

    def __init__(self, place: Place, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self._place, self._shape = place, shape
        self.weight = nn.Parameter(torch.empty(0, shape[1], dtype=dtype), requires_grad=False)
        self._reader = Reader()

    def forward(self, ids: Tensor) -> Tensor:
        """Rows by their numbers, [...] to [..., D].

        Raises:
            CheckpointError: they cannot be read.
        """
        numbers, which = torch.unique(ids, return_inverse=True)
        nbytes = self._shape[1] * self.weight.itemsize
        begins = [self._place.begin + number * nbytes for number in numbers.tolist()]
        layout = Layout([Place(self._place.file, begin, begin + nbytes) for begin in begins])
        memory = torch.frombuffer(mmap.mmap(-1, layout.nbytes), dtype=torch.uint8)
        self._reader.start(layout, memory.data_ptr()).check()
        rows = torch.stack([memory[begin : begin + nbytes] for begin in layout.begins])
        return rows.view(self.weight.dtype)[which]

    def extra_repr(self) -> str:
        """Shape, for print(model)."""
        return f"{self._shape[0]} x {self._shape[1]}, on the disk"
