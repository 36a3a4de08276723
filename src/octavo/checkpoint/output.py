"""What is to be written, planned to the byte before the first one is: files, and the pieces they are made of.

A piece is what becomes of one canonical tensor. Its bytes have their places in a file whose header is known already,
so pieces can be made one at a time, in the memory of one tensor, and a file can be finished later.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from octavo.args import ModelArgs
from octavo.checkpoint.names import Layout, Shape, Stored, stored_tensors
from octavo.storage.packed import mlx_quantize
from octavo.storage.safetensors import DTYPE_NAMES
from octavo.storage.source import matrix_shape

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Field:
    """One tensor of a file.

    Attributes:
        name, shape: as stored.
        encoding: a safetensors dtype name, or a GGUF block type.
        nbytes: all of it.
        format: how the bytes are quantised, in a store.
    """

    name: str
    shape: Shape
    encoding: str
    nbytes: int
    format: str | None = None


class Encoding(Protocol):
    """How the numbers of a stored tensor become bytes: one or more fields, each row of the tensor a row of each."""

    def fields(self, stored: Stored) -> list[Field]:
        """What it is written as."""
        ...

    def encode(self, matrix: Tensor) -> list[Tensor]:
        """Bytes (uint8, one dimension) of some rows, for each field."""
        ...


@dataclass(frozen=True)
class Plain:
    """Numbers of one dtype."""

    dtype: torch.dtype

    def fields(self, stored: Stored) -> list[Field]:
        """One field of the tensor's own name and shape."""
        nbytes = math.prod(stored.shape) * self.dtype.itemsize
        return [Field(stored.name, stored.shape, DTYPE_NAMES[self.dtype], nbytes)]

    def encode(self, matrix: Tensor) -> list[Tensor]:
        """Converted where they are of another dtype."""
        return [as_bytes(matrix.to(self.dtype))]


@dataclass(frozen=True)
class MLXQuantized:
    """MLX's affine groups: weight, scales and biases.

    Attributes:
        bits: of a weight.
        group_size: weights that share a scale and a bias.
        dtype: of these.
    """

    bits: int
    group_size: int
    dtype: torch.dtype

    def fields(self, stored: Stored) -> list[Field]:
        """``X.weight`` (packed), ``X.scales`` and ``X.biases``."""
        module, *shape, columns = stored.name.removesuffix(".weight"), *stored.shape
        packed, groups = (*shape, columns * self.bits // 32), (*shape, columns // self.group_size)
        nbytes = math.prod(groups) * self.dtype.itemsize
        return [
            Field(stored.name, packed, "U32", math.prod(packed) * 4),
            Field(f"{module}.scales", groups, DTYPE_NAMES[self.dtype], nbytes),
            Field(f"{module}.biases", groups, DTYPE_NAMES[self.dtype], nbytes),
        ]

    def encode(self, matrix: Tensor) -> list[Tensor]:
        """Quantised as MLX itself does."""
        return [as_bytes(t) for t in mlx_quantize(matrix.to(self.dtype), self.bits, self.group_size)]


@dataclass(frozen=True)
class GGUFEncoded:
    """A GGUF type."""

    encoding: str

    def fields(self, stored: Stored) -> list[Field]:
        """One field of the tensor's own name and shape."""
        from octavo.storage.gguf_write import encoded_nbytes

        return [Field(stored.name, stored.shape, self.encoding, encoded_nbytes(stored.shape, self.encoding))]

    def encode(self, matrix: Tensor) -> list[Tensor]:
        """As llama.cpp's own tools do."""
        from octavo.storage.gguf_write import encode_rows

        return [as_bytes(encode_rows(matrix, self.encoding))]


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes, uint8 [nbytes]."""
    return tensor.contiguous().view(-1).view(torch.uint8)


@dataclass(frozen=True)
class Piece:
    """What one canonical tensor becomes.

    Attributes:
        canonical: its name.
        places: (begin, end) in the file of each block of bytes.
        encode: makes these blocks of it.
    """

    canonical: str
    places: tuple[tuple[int, int], ...]
    encode: Callable[[Tensor], list[Tensor]]

    @property
    def nbytes(self) -> int:
        """All its bytes."""
        return sum(end - begin for begin, end in self.places)


@dataclass(frozen=True)
class OutFile:
    """A file to be written.

    Attributes:
        name: within its folder.
        header: its first bytes.
        size: in bytes, header included.
        fields: the tensors in it.
        pieces: what they are made of, in the order in which they are best made.
        seal: makes the header with the checksums of all pieces' blocks, of which there is one each, where it has those:
            it is written again once they are known.
    """

    name: str
    header: bytes
    size: int
    fields: tuple[Field, ...]
    pieces: tuple[Piece, ...]
    seal: Callable[[Sequence[str]], bytes] | None = None


Choice = Callable[[Stored], Encoding]


def safetensors_files(
    layout: Layout, args: ModelArgs, choose: Choice, *, stem: str = "model", shard_bytes: int = SHARD_BYTES
) -> list[OutFile]:
    """Plan one safetensors file, or several shards.

    Args:
        layout: names and order.
        args: the model's shape.
        choose: the encoding of each stored tensor.
        stem: the beginning of the files' names.
        shard_bytes: tensors beyond this go into a further file.
    """
    tensors = [(stored, choose(stored)) for stored in stored_tensors(layout, args)]
    shards = in_shards(
        tensors, lambda tensor: sum(field.nbytes for field in tensor[1].fields(tensor[0])), stem, shard_bytes
    )
    return [_safetensors_file(name, shard, args) for name, shard in shards.items()]


T = TypeVar("T")


def in_shards(items: Iterable[T], nbytes: Callable[[T], int], stem: str, shard_bytes: int) -> dict[str, list[T]]:
    """Share items out among files, in their order; return those of each file by its name."""
    shards: list[list[T]] = [[]]
    filled = 0
    for item in items:
        if shards[-1] and filled + nbytes(item) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += nbytes(item)
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _safetensors_file(name: str, shard: list[tuple[Stored, Encoding]], args: ModelArgs) -> OutFile:
    fields = [field for stored, encoding in shard for field in encoding.fields(stored)]
    # Widest numbers first, so that all of them are aligned.
    fields.sort(key=lambda field: -field.nbytes // max(math.prod(field.shape), 1))
    header = safetensors_header(fields, {})
    begins = begins_behind(header, fields)
    size = len(header) + sum(field.nbytes for field in fields)
    return OutFile(name, header, size, tuple(fields), _pieces(shard, begins, args))


def safetensors_header(fields: Sequence[Field], metadata: Mapping[str, str], alignment: int = 64) -> bytes:
    """Make the header of a file in which the fields lie one behind the other.

    Args:
        fields: in their order.
        metadata: more of ``__metadata__``.
        alignment: of the first byte behind the header; matrix products like data to begin at a multiple of 64.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for field in fields:
        begin, end = end, end + field.nbytes
        entries[field.name] = {"dtype": field.encoding, "shape": list(field.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return struct.pack("<Q", len(text)) + text


def begins_behind(header: bytes, fields: Sequence[Field]) -> dict[str, int]:
    """Return where in the file each field begins, by name."""
    begins = itertools.accumulate((field.nbytes for field in fields), initial=len(header))
    return {field.name: begin for field, begin in zip(fields, begins, strict=False)}


def index_of(files: Sequence[OutFile]) -> Mapping[str, Any]:
    """Return the index of several shards."""
    fields = [(field, file.name) for file in files for field in file.fields]
    return {
        "metadata": {"total_size": sum(field.nbytes for field, _ in fields)},
        "weight_map": {field.name: name for field, name in fields},
    }


def gguf_file(name: str, layout: Layout, args: ModelArgs, choose: Choice, metadata: Mapping[str, Any]) -> OutFile:
    """Plan one GGUF file.

    Args:
        name: of the file.
        layout: names and order.
        args: the model's shape.
        choose: the encoding of each stored tensor.
        metadata: everything but the tensors.
    """
    from octavo.storage.gguf_write import GGUFTensor, gguf_header

    tensors = [(stored, choose(stored)) for stored in stored_tensors(layout, args)]
    fields = [field for stored, encoding in tensors for field in encoding.fields(stored)]
    header, starts = gguf_header(metadata, [GGUFTensor(f.name, f.shape, f.encoding) for f in fields])
    offsets = {field.name: start for field, start in zip(fields, starts, strict=True)}
    size = max(offsets[field.name] + field.nbytes for field in fields)
    return OutFile(name, header, size + -size % 32, tuple(fields), _pieces(tensors, offsets, args))


def _pieces(
    tensors: Sequence[tuple[Stored, Encoding]], offsets: Mapping[str, int], args: ModelArgs
) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    for stored, encoding in tensors:
        rows = matrix_shape(stored.shape)[0]
        spans = [(offsets[field.name], field.nbytes // rows) for field in encoding.fields(stored)]
        for part in stored.parts:
            places = tuple((begin + part.first * row, begin + part.last * row) for begin, row in spans)
            pieces.append(Piece(part.canonical, places, _encoder(stored, encoding, args)))
    return tuple(pieces)


def _encoder(stored: Stored, encoding: Encoding, args: ModelArgs) -> Callable[[Tensor], list[Tensor]]:
    return lambda tensor: encoding.encode(stored.transform.write(tensor, args))
