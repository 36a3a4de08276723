"""npz archives: what numpy and MLX write, read in part or whole, and what damaged or hostile ones do."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.errors import CheckpointError, OptionError
from octavo.storage.files import MappedFile, PlainFile
from octavo.storage.npz import MAX_UNPACKING, NpzFile

ARRAYS = {
    "f2": np.arange(24, dtype=np.float16).reshape(4, 6) / 7,
    "f4": np.linspace(-1, 1, 30, dtype=np.float32).reshape(2, 3, 5),
    "f8": np.array([1.5, -2.5]),
    "i1": np.arange(-3, 3, dtype=np.int8),
    "i8": np.arange(6).reshape(6, 1),
    "u4": np.array([[0, 2**32 - 1]], dtype=np.uint32),
    "flags": np.array([True, False]),
    "scalar": np.array(3.0, dtype=np.float32),
    "empty": np.zeros((0, 3), dtype=np.float16),
    "columns": np.asfortranarray(np.arange(24, dtype=np.int32).reshape(2, 3, 4)),
}


class MemoryBytes:
    """A ByteFile over bytes in memory, which refuses to be read outside."""

    name = location = "memory.npz"

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read(self, begin: int, end: int) -> torch.Tensor:
        if not 0 <= begin <= end <= self.size:
            raise CheckpointError(f"bytes {begin} to {end} of {self.size}")
        return torch.tensor(list(self.data[begin:end]), dtype=torch.uint8)


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as zipped:
        for name, data in members.items():
            zipped.writestr(name, data)
    return out.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin1")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", [MappedFile, PlainFile])
def test_reads_what_numpy_writes(tmp_path: Path, save, kind) -> None:
    save(tmp_path / "w.npz", **ARRAYS)
    source = NpzFile(kind(tmp_path / "w.npz"))
    assert source.names() == list(ARRAYS)
    for name, array in ARRAYS.items():
        expected = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
        info = source.info(name)
        assert (info.dtype, info.shape, info.file) == (expected.dtype, array.shape, "w.npz")
        assert torch.equal(source.read(name), expected)
        assert source.read(name).is_contiguous()
        matrix = expected.reshape(-1, array.shape[-1]) if array.ndim > 2 else expected
        if array.ndim:
            assert torch.equal(source.read(name, (0, len(matrix))), matrix)
            assert torch.equal(source.read(name, slice(len(matrix) // 2, None)), matrix[len(matrix) // 2 :])
    assert source.info("f4").encoding == "F32"
    assert save is not np.savez or source.info("f4").nbytes == ARRAYS["f4"].nbytes


def test_reads_what_mlx_writes(tmp_path: Path) -> None:
    arrays = {
        "half.weight": mx.arange(12, dtype=mx.float16).reshape(3, 4) / 7,
        "brain.weight": mx.arange(12).reshape(3, 4).astype(mx.bfloat16) / 7,
        "packed": mx.arange(5, dtype=mx.uint32),
        "turned": mx.arange(12, dtype=mx.float32).reshape(3, 4).T,
    }
    for save in (mx.savez, mx.savez_compressed):
        save(str(tmp_path / "w.npz"), **arrays)
        source = NpzFile(MappedFile(tmp_path / "w.npz"))
        assert set(source.names()) == set(arrays)
        assert source.info("brain.weight").encoding == "BF16"
        for name, array in arrays.items():
            assert source.read(name).float().tolist() == array.astype(mx.float32).tolist()
        assert source.read("turned", (1, 3)).tolist() == arrays["turned"][1:3].tolist()


def test_stored_members_are_read_by_range_and_mapped(tmp_path: Path) -> None:
    big = np.arange(1 << 18, dtype=np.uint8).reshape(256, 1024)  # bytes lie wherever the header ends
    data = archive({"a.npy": npy(big), "b.npy": npy(big)})

    class Counted(MemoryBytes):
        total = 0

        def read(self, begin: int, end: int) -> torch.Tensor:
            self.total += end - begin
            return super().read(begin, end)

    file = Counted(data)
    source = NpzFile(file)
    assert file.total < 30_000
    file.total = 0
    assert source.read("b", (100, 102)).tolist() == big[100:102].tolist()
    assert file.total == 2 * 1024
    (tmp_path / "w.npz").write_bytes(data)
    mapped = NpzFile(MappedFile(tmp_path / "w.npz"))
    assert mapped.read("a").data_ptr() == mapped.read("a").data_ptr()


def test_unknown_names_and_rows() -> None:
    source = NpzFile(MemoryBytes(archive({"a.npy": npy(ARRAYS["f2"])})))
    assert "a" in source
    assert "b" not in source
    with pytest.raises(CheckpointError, match="holds no tensor called 'b'"):
        source.read("b")
    with pytest.raises(OptionError, match="it has 4"):
        source.read("a", (0, 5))


def test_large_archives_use_zip64(tmp_path: Path) -> None:
    """A member that was written as a stream carries 64-bit sizes even where it is small."""
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as zipped, zipped.open("a.npy", "w", force_zip64=True) as member:
        member.write(npy(ARRAYS["f2"]))
    assert torch.equal(NpzFile(PlainFile(tmp_path / "w.npz")).read("a"), torch.from_numpy(ARRAYS["f2"]))


BAD_MEMBERS = {
    "python objects": (npy(np.array([{}], dtype=object)), "Python objects"),
    "big-endian": (npy(np.arange(3, dtype=">f4")), "little-endian"),
    "complex": (npy(np.zeros(3, dtype=np.complex64)), "has dtype '<c8'"),
    "fields": (npy(np.zeros(3, dtype=[("a", "<f4")])), "lacks a plain descr"),
    "no array": (b"hello", "not a .npy array"),
    "nothing": (b"", "not a .npy array"),
    "short data": (npy(np.arange(9))[:-1], "by its shape"),
    "code": (header("__import__('os').system('false')") + bytes(8), "lacks a plain descr"),
    "deep": (header("(" * 9000 + ")" * 900), "lacks a plain descr"),
    "negative": (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}") + bytes(4), "lacks a plain descr"),
    "huge": (header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}"), "no file can hold"),
    "huge and empty": (
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4611686018427387904)}"),
        "that no file can hold",
    ),
    "true shape": (
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}") + bytes(4),
        "lacks a plain descr",
    ),
    "header too long": (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + bytes(99), "claims a header of 2147483648"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_bad_members_are_refused(case: str, method: int) -> None:
    data, message = BAD_MEMBERS[case]
    with pytest.raises(CheckpointError, match=message) as raised:
        NpzFile(MemoryBytes(archive({"bad.npy": data}, method)))
    assert "memory.npz" in raised.value.message
    assert raised.value.hint


def test_bad_archives_are_refused() -> None:
    good = archive({"a.npy": npy(ARRAYS["f2"])})
    with pytest.raises(CheckpointError, match="zip directory cannot be read"):
        NpzFile(MemoryBytes(b""))
    with pytest.raises(CheckpointError, match="zip directory cannot be read"):
        NpzFile(MemoryBytes(good[:-30]))
    with pytest.raises(CheckpointError, match=r"expected \.npy members only"):
        NpzFile(MemoryBytes(archive({"code.py": b"pass"})))
    with pytest.raises(CheckpointError, match="another method than deflate"):
        NpzFile(MemoryBytes(archive({"a.npy": npy(ARRAYS["f2"])}, zipfile.ZIP_BZIP2)))
    with pytest.raises(CheckpointError, match="is not where the zip directory puts it"):
        NpzFile(MemoryBytes(b"XX" + good[2:]))
    twice = archive({"a.npy": npy(ARRAYS["f2"]), "b.npy": npy(ARRAYS["u4"])}).replace(b"b.npy", b"a.npy")
    with pytest.raises(CheckpointError, match=r"holds 'a\.npy' twice"):
        NpzFile(MemoryBytes(twice))


def test_zip_bombs_are_refused_unopened() -> None:
    """4 MiB of zeros in some 4 KB: over the limit. Less than a MiB may be as sparse as it likes."""
    bomb = archive({"a.npy": npy(np.zeros(1 << 22, np.uint8))}, zipfile.ZIP_DEFLATED)
    assert len(bomb) * MAX_UNPACKING < 1 << 22
    with pytest.raises(CheckpointError, match="would unpack to 4194432 bytes"):
        NpzFile(MemoryBytes(bomb))
    small = archive({"a.npy": npy(np.zeros(1 << 19, np.uint8))}, zipfile.ZIP_DEFLATED)
    assert not NpzFile(MemoryBytes(small)).read("a").any()


def test_damaged_deflate_streams_are_refused() -> None:
    values = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    data = bytearray(archive({"a.npy": npy(values)}, zipfile.ZIP_DEFLATED))
    source = NpzFile(MemoryBytes(bytes(data)))
    assert torch.equal(source.read("a"), torch.from_numpy(values))
    data[11_000:14_000] = bytes(3000)
    with pytest.raises(CheckpointError, match=r"cannot be unpacked|ends after|checksum"):
        NpzFile(MemoryBytes(bytes(data))).read("a")


VALID = [
    archive({f"{name}.npy": npy(ARRAYS[name]) for name in names}, method)
    for names in (["f2", "u4"], ["columns", "f4", "empty"])
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
]


def read_all(data: bytes) -> None:
    """Success or CheckpointError; never more memory than a multiple of the file."""
    try:
        source = NpzFile(MemoryBytes(data))
    except CheckpointError:
        return
    for name in source:
        info = source.info(name)
        assert info.dtype.itemsize * torch.Size(info.shape).numel() <= max(MAX_UNPACKING * len(data), 1 << 20)
        try:
            assert source.read(name).shape == info.shape
        except CheckpointError:
            continue


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    st.integers(0, 60),
)
def test_mutated_archives(data: bytes, changes: list[tuple[int, bytes]], cut: int) -> None:
    mutated = bytearray(data)
    for at, new in changes:
        at %= len(mutated)
        mutated[at : at + len(new)] = new
    read_all(bytes(mutated[: len(mutated) - cut if cut % 3 == 0 else None]))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
def test_arbitrary_members(data: bytes, method: int) -> None:
    read_all(archive({"a.npy": data}, method))
    read_all(archive({"a.npy": b"\x93NUMPY\x01\x00" + data}, method))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["<f4", "<f2", "|V2", "|O", "<M8[s]", "", "<f99", "|b1"]),
    st.lists(st.one_of(st.integers(-2, 4), st.integers(0, 2**70)), max_size=4),
    st.booleans(),
    st.integers(0, 64),
)
def test_arbitrary_headers(descr: str, shape: list[int], fortran: bool, count: int) -> None:
    text = repr({"descr": descr, "fortran_order": fortran, "shape": tuple(shape)})
    read_all(archive({"a.npy": header(text) + bytes(count)}))
