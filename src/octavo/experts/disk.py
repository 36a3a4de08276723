"""A checkpoint's weights for a model whose experts stay on the disk: what is read at once, what when needed."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from octavo.checkpoint import Checkpoint
from octavo.errors import OptionError
from octavo.experts.cache import Key, Stored
from octavo.experts.embedding import StreamedEmbedding
from octavo.experts.reader import Reader
from octavo.experts.streamed import Kind, kind_of
from octavo.kernels.ops import Weight
from octavo.quant.formats import PANEL_ROWS, Packed
from octavo.storage.files import MappedFile, Place, place_of

MATRICES = ("w1", "w3", "w2")  # in the order they are used in
EMBEDDING = "tok_embeddings.weight"
PART = 16 << 20  # bytes that are read and compared at a time


class OnDisk:
    """The weights of a checkpoint, read around the page cache; close it, or leave its ``with`` block, after loading.

    Args:
        checkpoint: any that keeps its experts as they are computed with.
        dtype: of the weights that are not low-bit.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype
        self._reader = Reader()
        self._names: dict[Key, list[str]] = {}
        self._files: set[MappedFile] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()
        for file in self._files:
            file.let_go()

    def plain(self, name: str) -> Tensor:
        """A parameter in memory of its own.

        Raises:
            CheckpointError: it cannot be read, or is not what was written.
        """
        tensor = self._checkpoint.read(name).to(self._dtype).contiguous()
        return self._own(name, tensor).view(tensor.dtype).view(tensor.shape)

    def weight(self, name: str) -> Weight:
        """A matrix for `octavo.kernels` in memory of its own.

        Raises:
            CheckpointError: it cannot be read, or is not what was written.
        """
        packed = self._checkpoint.packed(name)
        return self.plain(name) if packed is None else packed._replace(data=self._own(name, packed.data))

    def embedding(self) -> StreamedEmbedding | None:
        """Token embeddings, read by the row; None where they do not lie there as they are used.

        Raises:
            CheckpointError: they cannot be read, or are not what was written.
        """
        tensor = self._checkpoint.read(EMBEDDING)
        place = place_of(tensor)
        if place is None or tensor.dtype != self._dtype:
            return None
        self._files.add(place.file)
        parts = (Place(place.file, at, min(at + PART, place.end)) for at in range(place.begin, place.end, PART))
        self._checkpoint.compare(EMBEDDING, (_as_bytes(self._reader.tensor(part)) for part in parts))
        rows, cols = tensor.shape
        return StreamedEmbedding(place, (rows, cols), tensor.dtype)

    def expert(self, key: Key, name: str) -> tuple[list[Kind], list[Stored]]:
        """Where the matrices of an expert lie, by the name that they begin with.

        Raises:
            OptionError: not on the disk as they are computed with.
        """
        names = [f"{name}.{matrix}.weight" for matrix in MATRICES]
        self._names[key] = names
        weights = [self._checkpoint.packed(one) or self._checkpoint.read(one).to(self._dtype) for one in names]
        return [kind_of(weight) for weight in weights], [self._stored(key, weight) for weight in weights]

    def verify(self, key: Key, matrices: Sequence[tuple[memoryview, memoryview]]) -> None:
        """Compare the bytes of an expert with their checksums, where there are such.

        Raises:
            CheckpointError: they are not what was written.
        """
        for name, parts in zip(self._names[key], matrices, strict=True):
            self._checkpoint.compare(name, parts)

    def _stored(self, key: Key, weight: Weight) -> Stored:
        place = place_of(weight.data)
        if place is None:
            raise not_streamable(f"expert {key[1]} of layer {key[0]}")
        self._files.add(place.file)
        cols = weight.shape[1]
        panel = weight.format.panel_nbytes(cols) if isinstance(weight, Packed) else PANEL_ROWS * cols * weight.itemsize
        return Stored(place, min(panel, place.end - place.begin))

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        """The bytes of what may be a view of a mapped file, uint8."""
        place = place_of(tensor)
        if place is None:  # made from what lies there
            return tensor.flatten().view(torch.uint8).clone()
        self._files.add(place.file)
        data = self._reader.tensor(place)
        self._checkpoint.compare(name, [_as_bytes(data)])
        return data


def _as_bytes(data: Tensor) -> memoryview:
    return memoryview(data.numpy())  # type: ignore[arg-type]


def not_streamable(what: str) -> OptionError:
    """What to say of weights that are made while loading."""
    return OptionError(
        f"{what} is not kept on the disk as it is computed with, and cannot be read when it is needed",
        hint="make a store of the checkpoint: octavo quantize SRC DST --bits 4",
    )
