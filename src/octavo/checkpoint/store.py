"""Stores, planned: where each quantised matrix lies, so that kernels read it from the mapped file as it is.

In every file the experts come first, the w1, w3 and w2 of each directly one behind the other. Data begins at a multiple
of 4096 bytes, and at real sizes a quantised matrix takes one too: an expert is an extent of whole pages. The other
tensors follow, those of whole pages first. There are no gaps, which safetensors does not allow.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.args import ModelArgs
from octavo.checkpoint.names import Shape, canonical_shapes
from octavo.checkpoint.output import Field, OutFile, Piece, as_bytes, begins_behind, in_shards, safetensors_header
from octavo.quant.formats import Format
from octavo.quant.quantize import quantize
from octavo.storage.packed_octavo import ALIGNMENT, KEY, VERSION
from octavo.storage.safetensors import DTYPE_NAMES

PAGE = 4096
NO_CHECKSUM = "0" * 16
_EXPERT = re.compile(r"(layers\.\d+\.feed_forward\.(?:experts\.\d+\.)?)(w[132])\.weight")
_MATRICES = ("w1", "w3", "w2")  # in the order they are used in


def store_files(
    args: ModelArgs,
    formats: Mapping[str, Format],
    dtype_of: Callable[[str], torch.dtype],
    method: str,
    shard_bytes: int,
) -> list[OutFile]:
    """Plan the files of a store.

    Args:
        args: the model's shape.
        formats: of each quantised tensor, by canonical name.
        dtype_of: gives the dtype that a tensor is kept in or dequantised to, by its name.
        method: of quantising.
        shard_bytes: tensors beyond this go into a further file; an expert is never split.
    """
    units: dict[str, dict[str, _Tensor]] = {}
    for name, shape in canonical_shapes(args).items():
        match = _EXPERT.fullmatch(name)
        tensor = _Tensor(name, shape, dtype_of(name), formats.get(name))
        units.setdefault(match[1] if match else name, {})[match[2] if match else name] = tensor
    together = [_Unit(tuple(u[w] for w in _MATRICES if w in u) or tuple(u.values())) for u in units.values()]
    shards = in_shards(together, lambda unit: unit.nbytes, "model", shard_bytes)
    return [_file(name, sorted(shard, key=lambda unit: unit.place), method) for name, shard in shards.items()]


@dataclass(frozen=True)
class _Tensor:
    """A canonical tensor, the dtype it is kept in or dequantised to, and how it is quantised if it is."""

    name: str
    shape: Shape
    dtype: torch.dtype
    format: Format | None

    @property
    def field(self) -> Field:
        """A quantised matrix is a row of bytes."""
        if self.format is None:
            nbytes = math.prod(self.shape) * self.dtype.itemsize
            return Field(self.name, self.shape, DTYPE_NAMES[self.dtype], nbytes)
        rows, cols = self.shape
        nbytes = self.format.nbytes(rows, cols)
        return Field(self.name, (nbytes,), "U8", nbytes, self.format.name)

    def entry(self, checksum: str) -> dict[str, Any]:
        """What the header's metadata say of it."""
        if self.format is None:
            return {"xxh3": checksum}
        dtype = DTYPE_NAMES[self.dtype]
        return {"format": self.format.name, "shape": list(self.shape), "dtype": dtype, "xxh3": checksum}

    def encode(self, method: str, tensor: Tensor) -> list[Tensor]:
        """Its bytes."""
        if self.format is None:
            return [as_bytes(tensor.to(self.dtype))]
        return [quantize(tensor, self.format, method, self.name).data]


@dataclass(frozen=True)
class _Unit:
    """Tensors that stay together: the matrices of an expert (in a dense model, of a layer), or one alone."""

    tensors: tuple[_Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.field.nbytes for tensor in self.tensors)

    @property
    def place(self) -> tuple[object, ...]:
        """Sorts the units of a file: what keeps others aligned first, of that the experts; vectors last."""
        step = math.gcd(PAGE, *(tensor.field.nbytes for tensor in self.tensors))
        return -min(step, ALIGNMENT), len(self.tensors) == 1, -step, len(self.tensors[0].shape) < 2


def _file(name: str, units: Sequence[_Unit], method: str) -> OutFile:
    tensors = [tensor for unit in units for tensor in unit.tensors]
    fields = tuple(tensor.field for tensor in tensors)
    header = _header(tensors, [NO_CHECKSUM] * len(tensors))
    begins = begins_behind(header, fields)
    pieces = tuple(
        Piece(t.name, ((begins[t.name], begins[t.name] + t.field.nbytes),), partial(t.encode, method)) for t in tensors
    )
    size = len(header) + sum(field.nbytes for field in fields)
    return OutFile(name, header, size, fields, pieces, partial(_header, tensors))


def _header(tensors: Sequence[_Tensor], checksums: Sequence[str]) -> bytes:
    """As long whatever the checksums are."""
    entries = {tensor.name: tensor.entry(checksum) for tensor, checksum in zip(tensors, checksums, strict=True)}
    text = json.dumps({"version": VERSION, "tensors": entries}, separators=(",", ":"))
    return safetensors_header([tensor.field for tensor in tensors], {KEY: text}, PAGE)
