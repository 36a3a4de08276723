"""npz: a zip archive of .npy members, one tensor each. What numpy and MLX's ``savez`` and ``savez_compressed`` write.

Members that are stored as they are can be read in part; deflated ones are unpacked as far as needed, in small steps.
Checksums are compared where a deflated member is unpacked to its end: damage there need not show otherwise.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.storage.files import FETCH_AGAIN, ByteFile
from octavo.storage.safetensors import DTYPE_NAMES, as_tensor
from octavo.storage.source import ListedSource, Rows, TensorInfo, matrix_shape, row_range

# numpy's type codes without the byte order. It has none for bfloat16: MLX and ml_dtypes write two bytes of "void".
DTYPES = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "V2": torch.bfloat16,
    "i8": torch.int64,
    "i4": torch.int32,
    "i2": torch.int16,
    "i1": torch.int8,
    "u8": torch.uint64,
    "u4": torch.uint32,
    "u2": torch.uint16,
    "u1": torch.uint8,
    "b1": torch.bool,
}
MAX_HEADER_BYTES = 10_000  # of one member; numpy's own limit
MAX_MEMBERS = 100_000  # a quantised Mixtral has some 3,000
MAX_DIMENSIONS = 64  # numpy's own limit
# A tensor may unpack to this many times the size of the whole file (weights: 1.3; deflate can reach 1,032), or a MiB.
MAX_UNPACKING = 64
_MEBIBYTE = 1 << 20
_ENCRYPTED = 0x1
_LOCAL_HEADER = struct.Struct("<4s22xHH")
# A header is a Python dictionary. Evaluating it, even as a literal, can exhaust the interpreter's stack.
_DESCR = re.compile(r"'descr'\s*:\s*'([^']*)'")
_ORDER = re.compile(r"'fortran_order'\s*:\s*(True|False)\b")
_SHAPE = re.compile(r"'shape'\s*:\s*\(([0-9,\s]*)\)")


class NpzFile(ListedSource):
    """The tensors of one .npz file, by their members' names without ``.npy``.

    Raises:
        CheckpointError: it is no zip archive or a damaged one, a member is no array, holds Python objects, has a
            dtype that torch lacks, or would unpack to more than 64 times the file's size.
    """

    def __init__(self, file: ByteFile) -> None:
        self.location = file.location
        self._file = file
        self._members: dict[str, _Member] = {}
        for entry in _directory(file):
            name = entry.filename.removesuffix(".npy")
            if name in self._members:
                raise _broken(file, f"it holds {entry.filename!r} twice")
            self._members[name] = _open_member(file, entry, name)
        self.infos = {name: member.info for name, member in self._members.items()}

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """A view where the file is mapped and the member lies as it is; column-major arrays are read whole."""
        info = self.info(name)
        member = self._members[name]
        first, last = row_range(rows, info.shape, name)
        shape = info.shape if rows is None else (last - first, *matrix_shape(info.shape)[1:])
        if member.column_major:
            data = member.read(self._file, 0, math.prod(info.shape) * info.dtype.itemsize)
            backwards = as_tensor(data, info.dtype, info.shape[::-1])
            whole = backwards.permute(*range(backwards.ndim)[::-1]).contiguous()
            return whole.view(matrix_shape(info.shape))[first:last].view(shape)
        row_bytes = math.prod(matrix_shape(info.shape)[1:]) * info.dtype.itemsize
        return as_tensor(member.read(self._file, first * row_bytes, last * row_bytes), info.dtype, shape)


@dataclass(frozen=True)
class _Member:
    """A member's place: bytes ``begin`` to ``end`` of the file; ``skip`` bytes of them, unpacked, are its header.

    ``size`` is what all of them unpack to, ``checksum`` the CRC-32 of that.
    """

    info: TensorInfo
    begin: int
    end: int
    skip: int
    size: int
    checksum: int
    deflated: bool
    column_major: bool

    def read(self, file: ByteFile, begin: int, end: int) -> Tensor:
        """Bytes ``begin`` to ``end`` of the tensor, as uint8."""
        begin, end = self.skip + begin, self.skip + end
        if not self.deflated:
            return file.read(self.begin + begin, self.begin + end)
        data, checksum = _inflate(file, self.begin, self.end, begin, end)
        if end == self.size and checksum != self.checksum:
            raise _broken(file, f"the checksum of {self.info.name!r} is wrong")
        return data


class _Stream:
    """As much of a file object as ``zipfile`` needs to read a directory; never reads more than the file has."""

    def __init__(self, file: ByteFile) -> None:
        self._file = file
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = (0, self._at, self._file.size)[whence] + offset
        if at < 0:
            raise OSError("before the start of the file")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        begin = min(self._at, self._file.size)
        end = self._file.size if count < 0 else min(begin + count, self._file.size)
        self._at = end
        return self._file.read(begin, end).numpy().tobytes()


def _directory(file: ByteFile) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(_Stream(file)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError, struct.error) as error:
        raise _broken(file, f"its zip directory cannot be read ({error})") from None
    if len(entries) > MAX_MEMBERS:
        raise _broken(file, f"it claims {len(entries)} members; at most {MAX_MEMBERS} are expected")
    return entries


def _open_member(file: ByteFile, entry: zipfile.ZipInfo, name: str) -> _Member:
    where = repr(entry.filename)
    if not entry.filename.endswith(".npy"):
        raise CheckpointError(
            f"{file.location}: holds {where}; expected .npy members only", hint="save arrays only, with numpy.savez"
        )
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & _ENCRYPTED:
        raise CheckpointError(
            f"{file.location}: {where} is encrypted or compressed by another method than deflate",
            hint="save it again with numpy.savez",
        )
    deflated = entry.compress_type == zipfile.ZIP_DEFLATED
    begin, end = _extent(file, entry)
    if deflated:
        head, _ = _inflate(file, begin, end, 0, min(entry.file_size, MAX_HEADER_BYTES + 12))
    else:
        head = file.read(begin, min(end, begin + MAX_HEADER_BYTES + 12))
    dtype, shape, fortran, skip = _parse_header(file, where, head.numpy().tobytes())
    nbytes = math.prod(shape) * dtype.itemsize
    if skip + nbytes != entry.file_size or (not deflated and end - begin != entry.file_size):
        raise _broken(file, f"{where} should take {skip + nbytes} bytes by its shape, it has {entry.file_size}")
    if deflated and entry.file_size > max(MAX_UNPACKING * file.size, _MEBIBYTE):
        raise CheckpointError(
            f"{file.location}: {where} would unpack to {entry.file_size} bytes, over {MAX_UNPACKING} times the file",
            hint="if the file is meant so, save it uncompressed with numpy.savez",
        )
    column_major = fortran and sum(n != 1 for n in shape) > 1  # of fewer dimensions, both orders are the same
    info = TensorInfo(name, dtype, shape, end - begin if deflated else nbytes, file.name, DTYPE_NAMES[dtype])
    return _Member(info, begin, end, skip, entry.file_size, entry.CRC, deflated, column_major)


def _extent(file: ByteFile, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Begin and end of a member's bytes, which follow a second, local header of its own length."""
    at = entry.header_offset
    if not 0 <= at <= file.size - _LOCAL_HEADER.size:
        raise _broken(file, f"{entry.filename!r} begins at byte {at}, the file has {file.size}")
    signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(at, at + _LOCAL_HEADER.size).numpy().tobytes())
    begin = at + _LOCAL_HEADER.size + name_bytes + extra_bytes
    end = begin + entry.compress_size
    if signature != b"PK\x03\x04" or end > file.size:
        raise _broken(file, f"{entry.filename!r} is not where the zip directory puts it")
    return begin, end


def _parse_header(file: ByteFile, where: str, head: bytes) -> tuple[torch.dtype, tuple[int, ...], bool, int]:
    """Return a .npy header's dtype, shape, whether columns lie together, and its length in bytes."""
    wide = head[6:7] in (b"\x02", b"\x03")  # versions 2 and 3 have a longer length field
    skip = 12 if wide else 10
    if head[:6] != b"\x93NUMPY" or len(head) < skip or head[6] not in (1, 2, 3):
        raise _broken(file, f"{where} is not a .npy array")
    length = int.from_bytes(head[8:skip], "little")
    if length > min(MAX_HEADER_BYTES, len(head) - skip):
        raise _broken(file, f"{where} claims a header of {length} bytes")
    text = head[skip : skip + length].decode("latin1")
    descr, order, dimensions = _DESCR.search(text), _ORDER.search(text), _SHAPE.search(text)
    if descr is None or order is None or dimensions is None:
        raise _broken(file, f"the header of {where} lacks a plain descr, fortran_order or shape")
    shape = tuple(int(n[:20]) for n in re.findall("[0-9]+", dimensions[1]))  # 20 digits are more than any file has
    if len(shape) > MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) >= 1 << 60:
        raise _broken(file, f"the header of {where} has a shape that no file can hold")
    return _dtype(file, where, descr[1]), shape, order[1] == "True", skip + length


def _dtype(file: ByteFile, where: str, descr: str) -> torch.dtype:
    if descr[:1] in ("<", "|") and descr[1:] in DTYPES:
        return DTYPES[descr[1:]]
    if descr.lstrip("|<>=").startswith("O"):
        raise CheckpointError(
            f"{file.location}: {where} holds Python objects, which can carry code; they were not loaded",
            hint="save arrays of numbers only",
        )
    raise CheckpointError(
        f"{file.location}: {where} has dtype {descr!r}; expected a little-endian one of {', '.join(DTYPES)}",
        hint="save it again as float16, float32 or integers",
    )


def _inflate(file: ByteFile, begin: int, end: int, first: int, last: int) -> tuple[Tensor, int]:
    """Unpack bytes ``begin`` to ``end`` of the file up to byte ``last`` of the result.

    Returns:
        its bytes ``first`` to ``last``, and the CRC-32 of all bytes to ``last``.
    """
    out = torch.empty(last - first, dtype=torch.uint8)
    view = out.numpy()
    decoder = zlib.decompressobj(-zlib.MAX_WBITS)
    at, checksum, pending = 0, 0, b""
    while at < last:
        if not pending:
            step = min(begin + _MEBIBYTE, end)
            pending, begin = file.read(begin, step).numpy().tobytes(), step
        try:
            chunk = decoder.decompress(pending, _MEBIBYTE)
        except zlib.error as error:
            raise _broken(file, f"it cannot be unpacked ({error})") from None
        pending = decoder.unconsumed_tail
        if not chunk and (decoder.eof or begin == end):
            raise _broken(file, f"a member ends after {at} unpacked bytes, {last} are expected")
        chunk = chunk[: last - at]
        checksum = zlib.crc32(chunk, checksum)
        wanted = max(first - at, 0)
        if wanted < len(chunk):
            view[at + wanted - first : at + len(chunk) - first] = np.frombuffer(chunk, np.uint8)[wanted:]
        at += len(chunk)
    return out, checksum


def _broken(file: ByteFile, why: str) -> CheckpointError:
    return CheckpointError(f"{file.location}: not a whole npz file: {why}", hint=FETCH_AGAIN)
