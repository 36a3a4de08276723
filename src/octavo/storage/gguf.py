"""GGUF: typed metadata, a table of tensors, then their bytes, each at a multiple of the alignment.

Facts: the format's specification (ggml's gguf.md) and the gguf package's tables. Versions 2 and 3 differ in nothing
but the byte order that 3 allows; version 1 (32-bit counts) and big-endian files are refused.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.storage.files import FETCH_AGAIN, ByteFile
from octavo.storage.folder import Folder
from octavo.storage.safetensors import Entry, as_tensor
from octavo.storage.source import ListedSource, MergedSource, Rows, TensorInfo, matrix_shape, row_range

MAGIC = b"GGUF"
ALIGNMENT = 32  # unless general.alignment says otherwise
MAX_ALIGNMENT = 2**20
MAX_HEADER_BYTES = 2**26  # vocabularies of 256 k tokens take 15 MiB
MAX_DIMS = 4
MAX_NESTING = 3  # of arrays within arrays; none are known
READ_BYTES = 2**20  # what is read of a header at a time
CHUNK_ELEMENTS = 2**20  # what is quantised or dequantised at a time: 4 MiB of float32


class Encoding(NamedTuple):
    """How elements are kept: ``elements`` of them in ``nbytes``, under ggml's number for the type.

    ``dtype`` is torch's for plain types, and None for blocks, which are dequantised to float32.
    """

    number: int
    elements: int
    nbytes: int
    dtype: torch.dtype | None = None


ENCODINGS = {
    "F32": Encoding(0, 1, 4, torch.float32),
    "F16": Encoding(1, 1, 2, torch.float16),
    "BF16": Encoding(30, 1, 2, torch.bfloat16),
    "F64": Encoding(28, 1, 8, torch.float64),
    "I8": Encoding(24, 1, 1, torch.int8),
    "I16": Encoding(25, 1, 2, torch.int16),
    "I32": Encoding(26, 1, 4, torch.int32),
    "I64": Encoding(27, 1, 8, torch.int64),
    "Q4_0": Encoding(2, 32, 18),
    "Q4_1": Encoding(3, 32, 20),
    "Q5_0": Encoding(6, 32, 22),
    "Q5_1": Encoding(7, 32, 24),
    "Q8_0": Encoding(8, 32, 34),
    "Q2_K": Encoding(10, 256, 84),
    "Q3_K": Encoding(11, 256, 110),
    "Q4_K": Encoding(12, 256, 144),
    "Q5_K": Encoding(13, 256, 176),
    "Q6_K": Encoding(14, 256, 210),
    "IQ2_XXS": Encoding(16, 256, 66),
    "IQ2_XS": Encoding(17, 256, 74),
    "IQ3_XXS": Encoding(18, 256, 98),
    "IQ1_S": Encoding(19, 256, 50),
    "IQ4_NL": Encoding(20, 32, 18),
    "IQ3_S": Encoding(21, 256, 110),
    "IQ2_S": Encoding(22, 256, 82),
    "IQ4_XS": Encoding(23, 256, 136),
    "IQ1_M": Encoding(29, 256, 56),
    "TQ1_0": Encoding(34, 256, 54),
    "TQ2_0": Encoding(35, 256, 66),
    "MXFP4": Encoding(39, 32, 17),
}
ENCODING_NAMES = {encoding.number: name for name, encoding in ENCODINGS.items()}

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's codes
STRING, ARRAY = 8, 9


class _Header:
    """The header read from front to back, never past the file's end or the limit."""

    def __init__(self, file: ByteFile) -> None:
        self.file = file
        self.at = 0
        self._limit = min(file.size, MAX_HEADER_BYTES)
        self._window, self._window_begin = b"", 0

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        self._room_for(count, 1, what)
        begin = self.at - self._window_begin
        if begin + count > len(self._window):
            end = min(self._limit, self.at + max(count, READ_BYTES))
            self._window, self._window_begin = bytes(self.file.read(self.at, end).numpy()), self.at
            begin = 0
        self.at += count
        return self._window[begin : begin + count]

    def _room_for(self, count: int, item_bytes: int, what: str) -> None:
        left = self._limit - self.at
        if count * item_bytes > left:
            limit = "the file has" if self._limit == self.file.size else "headers may have"
            raise _broken(
                self.file, f"{what} would take {count * item_bytes} bytes from byte {self.at} on, {limit} {left} more"
            )

    def number(self, code: str, what: str) -> Any:
        """One number, by struct's code."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, item_bytes: int, what: str) -> int:
        """How many items follow, of which each takes that many bytes at least."""
        count: int = self.number("Q", f"the number of {what}")
        self._room_for(count, item_bytes, f"{count} {what}")
        return count

    def string(self, what: str) -> str:
        data = self.take(self.number("Q", f"the length of {what}"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise _broken(self.file, f"{what} is not UTF-8 text: {data[:32]!r}") from None

    def value(self, kind: int, what: str, nesting: int = 0) -> Any:
        """A metadata value as Python's bool, int, float, str or list."""
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY or nesting == MAX_NESTING:
            raise _broken(self.file, f"{what} is of type {kind}" + (f" at depth {nesting}" if nesting else ""))
        kind = self.number("I", f"the type of {what}")
        if kind not in SCALARS:
            count = self.count(8 if kind == STRING else 12, f"items of {what}")
            return [self.value(kind, what, nesting + 1) for _ in range(count)]
        code = "<" + SCALARS[kind]
        item_bytes = struct.calcsize(code)
        data = self.take(self.count(item_bytes, f"items of {what}") * item_bytes, what)
        return np.frombuffer(data, dtype=np.dtype(code)).tolist()


class GGUFFile(ListedSource):
    """The tensors and metadata of one GGUF file.

    Attributes:
        metadata: by key; numbers, bools and strings as Python's own, arrays as lists.
        entries: each tensor's info and place; shapes as torch has them, [out, in], the reverse of the file's.

    Raises:
        CheckpointError: the file is truncated or lies, is of another version or byte order, or holds a tensor of a
            type that is not known here (whatever its name: its bytes could not be checked).
    """

    def __init__(self, file: ByteFile) -> None:
        self.location = file.location
        self._file = file
        header = _Header(file)
        _check_version(header)
        n_tensors = header.count(24, "tensors")
        self.metadata = _read_metadata(header)
        tensors = [_read_tensor(header) for _ in range(n_tensors)]
        alignment = self._alignment()
        data_begin = -(-header.at // alignment) * alignment
        self.entries: dict[str, Entry] = {}
        for info, offset in tensors:
            if info.name in self.entries:
                raise _broken(file, f"two tensors are called {info.name!r}")
            begin = data_begin + offset
            if offset % alignment or begin + info.nbytes > file.size:
                raise _broken(
                    file,
                    f"tensor {info.name!r} takes {info.nbytes} bytes from byte {begin} on; "
                    f"expected a multiple of {alignment} and no more than the {file.size} bytes there are",
                )
            self.entries[info.name] = Entry(info, begin, begin + info.nbytes)
        self.infos = {name: entry.info for name, entry in self.entries.items()}

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise _broken(self._file, f"general.alignment is {alignment!r}; expected a power of two")
        return alignment

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """Plain types as they lie there; blocks dequantised to float32, some rows at a time."""
        info = self.info(name)
        first, last = row_range(rows, info.shape, name)
        matrix = matrix_shape(info.shape)
        shape = info.shape if rows is None else (last - first, *matrix[1:])
        encoding = ENCODINGS[info.encoding]
        begin = self.entries[name].begin
        if encoding.dtype is not None:
            row_bytes = math.prod(matrix[1:]) * encoding.nbytes
            data = self._file.read(begin + first * row_bytes, begin + last * row_bytes)
            return as_tensor(data, encoding.dtype, shape)
        if len(matrix) == 1:  # blocks do not end where the rows of a vector do
            return self._dequantize(info, 0, 1, matrix[0])[0, first:last]
        return self._dequantize(info, first, last, matrix[1]).view(shape)

    def _dequantize(self, info: TensorInfo, first: int, last: int, width: int) -> Tensor:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        encoding = ENCODINGS[info.encoding]
        row_bytes = width // encoding.elements * encoding.nbytes
        step = max(CHUNK_ELEMENTS // width, 1)
        origin = self.entries[info.name].begin
        out = torch.empty(last - first, width)
        for row in range(first, last, step):
            end = min(row + step, last)
            blocks = self._file.read(origin + row * row_bytes, origin + end * row_bytes).numpy()
            with np.errstate(all="ignore"):  # what the scales of a damaged file give is no concern of numpy's
                values = dequantize(blocks.reshape(end - row, row_bytes), GGMLQuantizationType(encoding.number))
            out[row - first : end - first] = torch.from_numpy(values)
        return out


def _check_version(header: _Header) -> None:
    if header.file.size < 24 or header.take(4, "the magic") != MAGIC:
        raise CheckpointError(
            f"{header.file.location}: not a GGUF file: it does not begin with {MAGIC.decode()}", hint=FETCH_AGAIN
        )
    version = header.number("I", "the version")
    if version not in (2, 3):
        big_endian = version and not version & 0xFFFF
        found = "big-endian" if big_endian else f"of version {version}"
        raise CheckpointError(
            f"{header.file.location}: is {found}; expected a little-endian GGUF file of version 2 or 3",
            hint="convert it anew, with a release of llama.cpp since September 2023 on a little-endian machine",
        )


def _read_metadata(header: _Header) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(header.count(13, "keys")):
        key = header.string("a key's name")
        if key in metadata:
            raise _broken(header.file, f"the key {key!r} is there twice")
        metadata[key] = header.value(header.number("I", f"the type of {key!r}"), repr(key))
    return metadata


def _read_tensor(header: _Header) -> tuple[TensorInfo, int]:
    """One line of the table: the tensor, and its offset in the data."""
    name = header.string("a tensor's name")
    n_dims = header.number("I", f"the number of dimensions of {name!r}")
    if n_dims > MAX_DIMS:
        raise _broken(header.file, f"tensor {name!r} has {n_dims} dimensions; expected at most {MAX_DIMS}")
    shape = tuple(header.number("Q", f"the shape of {name!r}") for _ in range(n_dims))[::-1]
    number, offset = header.number("I", f"the type of {name!r}"), header.number("Q", f"the offset of {name!r}")
    if number not in ENCODING_NAMES:
        raise CheckpointError(
            f"{header.file.location}: tensor {name!r} is of type {number}; expected one of {', '.join(ENCODINGS)}",
            hint="the file is damaged, or newer than this version of Octavo",
        )
    encoding = ENCODING_NAMES[number]
    elements, block_bytes, dtype = ENCODINGS[encoding][1:]
    width = shape[-1] if shape else 1
    if 0 in shape or width % elements:
        raise _broken(
            header.file,
            f"tensor {name!r} of type {encoding} has shape {list(shape)}; expected rows of a multiple of {elements}",
        )
    nbytes = math.prod(shape) // elements * block_bytes
    return TensorInfo(name, dtype or torch.float32, shape, nbytes, header.file.name, encoding), offset


def _broken(file: ByteFile, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file.location}: not a whole GGUF file: {why:.400}", hint="the file is truncated or damaged; fetch it again"
    )


class GGUFSource(MergedSource):
    """A GGUF checkpoint: one file, or all parts of a split one.

    Attributes:
        metadata: of the first part, which holds the model's and the tokenizer's.
    """

    def __init__(self, files: Sequence[GGUFFile], location: str) -> None:
        super().__init__(files, location)
        self.metadata = files[0].metadata


_SPLIT_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


def open_gguf(folder: Folder, name: str) -> GGUFSource:
    """Open a GGUF file, and with any part of a split one (``name-00001-of-00003.gguf``) all its parts.

    Args:
        folder: where it lies.
        name: the file's name there.

    Raises:
        CheckpointError: a file is damaged, or a part is absent or belongs to another checkpoint.
    """
    first = GGUFFile(folder.file(name))
    count = first.metadata.get("split.count", 1)
    if count == 1:
        return GGUFSource([first], first.location)
    match = _SPLIT_NAME.fullmatch(name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{first.location}: is one of {count!r} parts, and its name does not say which",
            hint=f"give it back the name that ends in -0000N-of-{count:0>5}.gguf",
        )
    stem, total = match[1], match[3]
    present = folder.files()
    names = [f"{stem}-{part:05}-of-{total}.gguf" for part in range(1, count + 1)]
    absent = [part for part in names if part not in present]
    if absent:
        raise CheckpointError(
            f"{folder.location}: the part {absent[0]!r} of {name!r} is not there ({len(absent)} of {count} are absent)",
            hint="the download is incomplete; fetch the missing parts",
        )
    parts = [first if part == name else GGUFFile(folder.file(part)) for part in names]
    for number, part in enumerate(parts):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, count):
            raise CheckpointError(
                f"{part.location}: says it is part {part.metadata.get('split.no')!r} (counted from 0) "
                f"of {part.metadata.get('split.count')!r}; expected {number} of {count}",
                hint="the parts of different checkpoints are mixed up; fetch them again",
            )
    expected = parts[0].metadata.get("split.tensors.count")
    found = sum(len(part) for part in parts)
    if expected != found:
        raise CheckpointError(
            f"{folder.location}: the parts of {name!r} hold {found} tensors; expected {expected!r}", hint=FETCH_AGAIN
        )
    return GGUFSource(parts, folder.location)
