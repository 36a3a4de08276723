"""Writing GGUF: the header at once, then each tensor's bytes at the place the header gave it."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.errors import OptionError
from octavo.storage.gguf import ALIGNMENT, ARRAY, CHUNK_ELEMENTS, ENCODINGS, MAGIC, STRING
from octavo.storage.source import matrix_shape

VERSION = 3
WRITABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # what the gguf package quantises, too
UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7  # of metadata


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor to be written: its shape as torch has it, and one of ``WRITABLE``."""

    name: str
    shape: tuple[int, ...]
    encoding: str


def gguf_header(metadata: Mapping[str, Any], tensors: Sequence[GGUFTensor]) -> tuple[bytes, list[int]]:
    """Return all that stands before the data, and each tensor's offset from the file's beginning.

    Args:
        metadata: a str is written as a string, a bool as a bool, an int as uint32 (negative: int32), a float as
            float32, a list of one of these as an array (ints: int32). Empty lists, which have no type, are left out.
        tensors: in the order of their data. Each starts at a multiple of 32; the bytes between are zeros.

    Raises:
        OptionError: a value that is none of these, or out of range; and as ``encoded_nbytes``.
    """
    metadata = {key: value for key, value in metadata.items() if value != []}
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        try:
            header += _string(key) + _value(value)
        except (TypeError, ValueError, OverflowError, struct.error) as error:
            raise OptionError(f"the metadata {key!r} cannot be put into a GGUF file ({error})") from None
    offsets, end = [], 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        encoding = ENCODINGS[tensor.encoding]
        header += _string(tensor.name) + struct.pack("<I", len(dims))
        header += struct.pack(f"<{len(dims)}QIQ", *dims, encoding.number, end)
        offsets.append(end)
        end = _aligned(end + encoded_nbytes(tensor.shape, tensor.encoding))
    header += bytes(_aligned(len(header)) - len(header))
    return bytes(header), [len(header) + offset for offset in offsets]


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """The value's type, then the value."""
    if isinstance(value, list):
        kind = INT32 if type(value[0]) is int else _kind(value[0])
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + _items(kind, value)
    kind = _kind(value)
    return struct.pack("<I", kind) + _items(kind, [value])


def _kind(value: Any) -> int:
    if isinstance(value, str):
        return STRING
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return INT32 if value < 0 else UINT32
    if isinstance(value, float):
        return FLOAT32
    raise TypeError(f"no type for {type(value).__name__}")


def _items(kind: int, values: Sequence[Any]) -> bytes:
    if kind == STRING:
        return b"".join(map(_string, values))
    code = {UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?"}[kind]
    return struct.pack(f"<{len(values)}{code}", *values)


def encoding_for(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """Return how a tensor is kept in a file of the wanted encoding, as llama.cpp's own tools have it.

    Norms (vectors) and routers stay in F32, which they are computed in; a tensor whose rows are no multiple of the
    wanted encoding's block is kept in F16.
    """
    if len(shape) < 2 or name.endswith("ffn_gate_inp.weight"):
        return "F32"
    return "F16" if shape[-1] % ENCODINGS[wanted].elements else wanted


def encoded_nbytes(shape: tuple[int, ...], encoding: str) -> int:
    """Return the bytes that a tensor takes.

    Raises:
        OptionError: the encoding is not one of ``WRITABLE``, or its blocks do not fill rows of this shape.
    """
    if encoding not in WRITABLE:
        raise OptionError(f"encoding is {encoding!r}; expected one of {', '.join(WRITABLE)}")
    elements, nbytes = ENCODINGS[encoding].elements, ENCODINGS[encoding].nbytes
    if shape and shape[-1] % elements:
        raise OptionError(
            f"a row of {shape[-1]} elements cannot be kept in {encoding}, whose blocks have {elements}",
            hint="keep this tensor in F16 or BF16",
        )
    return math.prod(shape) // elements * nbytes


def encode_rows(tensor: Tensor, encoding: str) -> Tensor:
    """Return a tensor's bytes as GGUF keeps them, quantised by the gguf package.

    Args:
        tensor: [..., n] of any floating-point dtype.
        encoding: one of ``WRITABLE``.

    Returns:
        uint8 [encoded_nbytes(tensor.shape, encoding)]. Plain encodings of a tensor that has their dtype already are
        views of it.

    Raises:
        OptionError: as ``encoded_nbytes``.
    """
    nbytes = encoded_nbytes(tuple(tensor.shape), encoding)
    dtype = ENCODINGS[encoding].dtype
    if dtype is not None:
        return tensor.to(dtype).contiguous().view(-1).view(torch.uint8)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    rows = tensor.reshape(matrix_shape((1, *tensor.shape)))
    out = torch.empty(len(rows), nbytes // len(rows), dtype=torch.uint8)
    step = max(CHUNK_ELEMENTS // rows.shape[1], 1)
    for begin in range(0, len(rows), step):
        chunk = rows[begin : begin + step].to(torch.float32).numpy()
        out[begin : begin + step] = torch.from_numpy(quantize(chunk, GGMLQuantizationType[encoding]))
    return out.view(-1)
