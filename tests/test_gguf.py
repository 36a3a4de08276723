"""GGUF files: read against the gguf package's own writer and dequantiser, written against its reader."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import tiny_args
from octavo.args import ModelArgs
from octavo.errors import CheckpointError, ConfigError, OptionError, UserError
from octavo.storage import gguf as storage_gguf
from octavo.storage.files import MappedFile, PlainFile
from octavo.storage.folder import LocalFolder
from octavo.storage.gguf import ENCODINGS, READ_BYTES, GGUFFile, open_gguf
from octavo.storage.gguf_args import FILE_TYPES, gguf_metadata, gguf_model_args
from octavo.storage.gguf_write import WRITABLE, GGUFTensor, encode_rows, encoded_nbytes, encoding_for, gguf_header

BLOCKS = [name for name, encoding in ENCODINGS.items() if encoding.dtype is None]
PLAIN = [name for name, encoding in ENCODINGS.items() if encoding.dtype is not None]


def packed(encoding: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Random bytes of a tensor, [..., row bytes]: of real numbers where the package quantises, of anything else."""
    rng = np.random.default_rng(seed)
    kind = GGMLQuantizationType[encoding]
    try:
        return quantize(rng.standard_normal(shape, dtype=np.float32), kind).view(np.uint8)
    except NotImplementedError:
        elements, nbytes = GGML_QUANT_SIZES[kind]
        return rng.integers(0, 256, (*shape[:-1], shape[-1] // elements * nbytes), dtype=np.uint8)


def peer_file(path: Path, tensors: dict[str, tuple[str, np.ndarray]], **metadata: Any) -> Path:
    """A file written by the package itself: name -> encoding and bytes [..., row bytes]."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
    for name, (encoding, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[encoding])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def own_file(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[str, Tensor]]) -> Path:
    """A file written by Octavo."""
    plan = [GGUFTensor(name, tuple(tensor.shape), encoding) for name, (encoding, tensor) in tensors.items()]
    header, offsets = gguf_header(metadata, plan)
    with path.open("wb") as file:
        file.write(header)
        for offset, (encoding, tensor) in zip(offsets, tensors.values(), strict=True):
            file.seek(offset)
            file.write(encode_rows(tensor, encoding).numpy().tobytes())
    return path


# --- reading -------------------------------------------------------------------------------------------


def test_the_table_is_the_package_s() -> None:
    for name, encoding in ENCODINGS.items():
        kind = GGMLQuantizationType[name]
        assert (encoding.number, (encoding.elements, encoding.nbytes)) == (kind, GGML_QUANT_SIZES[kind])


@pytest.mark.parametrize("encoding", BLOCKS)
def test_blocks_are_dequantised_as_the_package_does(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, experts = packed(encoding, 40, 512), packed(encoding, 3, 5, 256, seed=1)
    vector = packed(encoding, 512, seed=2)
    tensors = {"matrix": (encoding, matrix), "experts": (encoding, experts), "vector": (encoding, vector)}
    source = GGUFFile(MappedFile(peer_file(tmp_path / "a.gguf", tensors)))
    kind = GGMLQuantizationType[encoding]
    with np.errstate(all="ignore"):
        expected = {name: dequantize(data, kind) for name, (_, data) in tensors.items()}
    monkeypatch.setattr(storage_gguf, "CHUNK_ELEMENTS", 7 * 512)  # several chunks, the last one shorter
    for name, (_, data) in tensors.items():
        info = source.info(name)
        assert (info.dtype, info.shape) == (torch.float32, expected[name].shape)
        assert (info.encoding, info.nbytes, info.file) == (encoding, data.nbytes, "a.gguf")
        np.testing.assert_array_equal(source.read(name).numpy(), expected[name])
    np.testing.assert_array_equal(source.read("matrix", (3, 23)).numpy(), expected["matrix"][3:23])
    np.testing.assert_array_equal(source.read("experts", range(5, 10)).numpy(), expected["experts"][1])
    np.testing.assert_array_equal(source.read("vector", slice(30, 40)).numpy(), expected["vector"][30:40])
    assert source.read("matrix", (2, 2)).shape == (0, 512)


@pytest.mark.parametrize("encoding", PLAIN)
def test_plain_tensors_are_what_was_written(tmp_path: Path, encoding: str) -> None:
    dtype = ENCODINGS[encoding].dtype
    tensor = torch.randint(0, 100, (3, 4, 5)).to(dtype)
    data = tensor.view(torch.uint8).numpy()
    if encoding != "BF16":  # numpy has none; the package takes its bytes
        data = tensor.numpy()
    path = peer_file(tmp_path / "a.gguf", {"x": (encoding, data)})
    source = GGUFFile(PlainFile(path))
    assert source.info("x").dtype == dtype
    assert source.read("x").equal(tensor)
    assert source.read("x", (4, 9)).equal(tensor.view(12, 5)[4:9])


def test_metadata_of_every_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    values: dict[str, Any] = {}
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        values[kind] = 2 ** (int(kind.lstrip("uint")) - 1) - 1
    values |= {"float32": 0.5, "float64": 0.1, "bool": True, "string": "Ω\n"}
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(kind, value)
    lists = {"strings": ["a", "", "é"], "floats": [0.5, -1.5], "ints": [-1, 2], "bools": [True, False]}
    for key, value in (lists | {"nested": [[1, 2], [3]]}).items():
        writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GGUFFile(PlainFile(tmp_path / "a.gguf")).metadata
    assert metadata == {"general.architecture": "llama", **values, **lists, "nested": [[1, 2], [3]]}
    assert {key: type(value) for key, value in metadata.items() if key in values} == {
        key: type(value) for key, value in values.items()
    }


class CountingFile(PlainFile):
    """Remembers what was read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[int] = []

    def read(self, begin: int, end: int) -> Tensor:
        self.reads.append(end - begin)
        return super().read(begin, end)


def test_a_large_vocabulary_is_read_in_few_pieces(tmp_path: Path) -> None:
    tokens = [f"token number {i} of the vocabulary" for i in range(60_000)]
    scores = [float(-i) for i in range(60_000)]
    data = packed("Q8_0", 64, 64)
    file = CountingFile(peer_file(tmp_path / "a.gguf", {"x": ("Q8_0", data)}, tokens=tokens, scores=scores))
    source = GGUFFile(file)
    assert source.metadata["tokens"] == tokens
    assert source.metadata["scores"] == scores
    assert len(file.reads) <= file.size // READ_BYTES + 2
    file.reads.clear()
    source.read("x", (3, 5))
    assert file.reads == [2 * 68]


def test_a_custom_alignment(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(256)
    tensors = {name: np.arange(n, dtype=np.float32) for name, n in (("a", 3), ("b", 100))}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFFile(PlainFile(tmp_path / "a.gguf"))
    assert source.entries["b"].begin % 256 == 0
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(source.read(name).numpy(), tensor)


def test_names_and_rows_that_are_not_there(tmp_path: Path) -> None:
    source = GGUFFile(PlainFile(peer_file(tmp_path / "a.gguf", {"x": ("Q8_0", packed("Q8_0", 4, 32))})))
    assert "x" in source
    assert "y" not in source
    for ask in (source.info, source.read):
        with pytest.raises(CheckpointError, match="no tensor called 'y'"):
            ask("y")
    with pytest.raises(OptionError, match="rows 2 to 5 of 'x'"):
        source.read("x", (2, 5))


# --- damaged files -------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def build(*, version: int = 3, tensors: bytes = b"", n_tensors: int = 1, keys: bytes = b"", n_keys: int = 0) -> bytes:
    """A file by hand, with 4096 bytes of data."""
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + keys + (tensors or line())
    return head + bytes(-len(head) % 32 + 4096)


def line(name: str = "x", shape: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    """A line of the table of tensors; the shape as the file has it."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def opened(tmp_path: Path, data: bytes) -> GGUFFile:
    (tmp_path / "hand.gguf").write_bytes(data)
    return GGUFFile(PlainFile(tmp_path / "hand.gguf"))


@pytest.mark.parametrize("version", [2, 3])
def test_files_made_by_hand(tmp_path: Path, version: int) -> None:
    source = opened(tmp_path, build(version=version, keys=text("k") + struct.pack("<IH", 2, 7), n_keys=1))
    assert source.metadata == {"k": 7}
    assert source.read("x").equal(torch.zeros(2, 32))


HUGE = 2**60
SCALAR_KEY = text("k") + struct.pack("<IB", 0, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not begin with GGUF"),
        (b"GGML" + build()[4:], "does not begin with GGUF"),
        (build(version=1), "is of version 1; expected"),
        (build(version=4), "is of version 4; expected"),
        (build(version=0), "is of version 0; expected"),
        (build(version=3 << 24), "is big-endian; expected"),
        (build(n_tensors=HUGE), f"{HUGE} tensors would take"),
        (build(n_keys=HUGE), f"{HUGE} keys would take"),
        (build(keys=struct.pack("<Q", HUGE), n_keys=1), "a key's name would take"),
        (build(keys=text("k") + struct.pack("<IQ", 8, HUGE), n_keys=1), "'k' would take"),
        (build(keys=text("k") + struct.pack("<IIQ", 9, 8, HUGE), n_keys=1), f"{HUGE} items of 'k' would take"),
        (build(keys=text("k") + struct.pack("<IIQ", 9, 10, HUGE), n_keys=1), f"{HUGE} items of 'k' would take"),
        (build(keys=text("k") + struct.pack("<IIQ", 9, 9, HUGE), n_keys=1), f"{HUGE} items of 'k' would take"),
        (build(keys=text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9, n_keys=1), "type 9 at depth 3"),
        (build(keys=text("k") + struct.pack("<I", 13), n_keys=1), "'k' is of type 13"),
        (build(keys=SCALAR_KEY * 2, n_keys=2), "the key 'k' is there twice"),
        (build(keys=text("k") + struct.pack("<IQ", 8, 2) + b"\xff\xfe", n_keys=1), "'k' is not UTF-8"),
        (build(keys=text("general.alignment") + struct.pack("<II", 4, 24), n_keys=1), "alignment is 24"),
        (build(keys=text("general.alignment") + struct.pack("<II", 4, 0), n_keys=1), "alignment is 0"),
        (build(keys=text("general.alignment") + struct.pack("<II", 4, 2**30), n_keys=1), "alignment is 1073741824"),
        (build(keys=text("general.alignment") + struct.pack("<If", 6, 32), n_keys=1), "alignment is 32.0"),
        (build(tensors=line() * 2, n_tensors=2), "two tensors are called 'x'"),
        (build(tensors=line(shape=(1,) * 5)), "'x' has 5 dimensions"),
        (build(tensors=line(shape=(0, HUGE, HUGE))), "'x' of type F32 has shape"),
        (build(tensors=line(shape=(2**63, 2**63))), "'x' takes"),
        (build(tensors=line(shape=(33, 2), kind=8)), "expected rows of a multiple of 32"),
        (build(tensors=line(shape=(), kind=8)), "expected rows of a multiple of 32"),
        (build(tensors=line(offset=8)), "expected a multiple of 32"),
        (build(tensors=line(offset=4096)), "no more than the"),
        (build(tensors=line(offset=2**64 - 32)), "no more than the"),
        (build(tensors=line(kind=4)), "tensor 'x' is of type 4; expected one of F32"),
        (build()[:-4000], "no more than the"),
        (build()[:50], "would take"),
    ],
)
def test_damaged_files(tmp_path: Path, data: bytes, message: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"hand\.gguf") as caught:
            opened(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert message in caught.value.message
    assert caught.value.hint


def test_a_header_ends_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_gguf, "MAX_HEADER_BYTES", 64)
    with pytest.raises(CheckpointError, match="headers may have"):
        opened(tmp_path, build(keys=text("k" * 100) + struct.pack("<IB", 0, 1), n_keys=1))


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tensors = {"a": ("Q4_0", packed("Q4_0", 2, 32)), "b.weight": ("Q4_K", packed("Q4_K", 2, 2, 256))}
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    keys: dict[str, Any] = {"llama.block_count": 2, "eps": 1e-5, "on": True, "tokens": ["a", "bc"], "scores": [0.5]}
    return peer_file(path, tensors, **keys).read_bytes()


@settings(deadline=None, max_examples=600)
@given(data=st.data())
def test_mutated_files_are_read_or_refused(
    small_file: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    mutant = bytearray(small_file)
    header_ends = len(small_file) - 2 * 18 - 4 * 144
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_ends))
        mutant[at : at + data.draw(st.integers(0, 8))] = data.draw(
            st.one_of(
                st.binary(max_size=8), st.sampled_from([HUGE, 2**64 - 1, 2**31]).map(lambda n: n.to_bytes(8, "little"))
            )
        )
    del mutant[data.draw(st.one_of(st.just(len(mutant)), st.integers(0, len(mutant)))) :]
    path = tmp_path_factory.getbasetemp() / "mutant.gguf"
    path.write_bytes(mutant)
    source = None
    tracemalloc.start()
    with contextlib.suppress(UserError):
        source = GGUFFile(PlainFile(path))
        gguf_model_args(source.metadata, source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    for name in source or ():
        assert source.read(name).shape == source.info(name).shape


# --- split files ---------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_uint32("llama.block_count", 5)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 3), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.iterdir())


def test_a_split_file_opens_by_any_part(tmp_path: Path, parts: list[Path]) -> None:
    assert len(parts) == 3
    for part in parts:
        source = open_gguf(LocalFolder(tmp_path), part.name)
        assert source.names() == [f"t{i}" for i in range(5)]
        assert source.metadata["llama.block_count"] == 5
        assert source.info("t4").file == parts[2].name
        assert all(source.read(f"t{i}").equal(torch.full((2, 3), float(i))) for i in range(5))


def test_a_part_alone_is_refused(tmp_path: Path, parts: list[Path]) -> None:
    whole = peer_file(tmp_path / "whole.gguf", {"x": ("Q8_0", packed("Q8_0", 1, 32))})
    folder = LocalFolder(tmp_path)
    assert open_gguf(folder, whole.name).names() == ["x"]
    moved = parts[1].rename(tmp_path / "second.gguf")
    with pytest.raises(CheckpointError, match=r"the part 'm-00002-of-00003\.gguf'"):
        open_gguf(folder, parts[0].name)
    with pytest.raises(CheckpointError, match="its name does not say which"):
        open_gguf(folder, moved.name)
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(CheckpointError, match=r"says it is part 0 .* expected 1 of 3"):
        open_gguf(folder, parts[0].name)
    parts[1].write_bytes(whole.read_bytes())
    with pytest.raises(CheckpointError, match="says it is part None"):
        open_gguf(folder, parts[0].name)


def test_parts_that_hold_fewer_tensors_than_promised(tmp_path: Path) -> None:
    for number in (0, 1):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": 3}
        own_file(tmp_path / f"m-0000{number + 1}-of-00002.gguf", split, {f"t{number}": ("F32", torch.ones(2))})
    with pytest.raises(CheckpointError, match="hold 2 tensors; expected 3"):
        open_gguf(LocalFolder(tmp_path), "m-00001-of-00002.gguf")


# --- writing -------------------------------------------------------------------------------------------


def test_the_package_reads_what_is_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {"a": (32,), "b": (6, 64), "c": (3, 5, 32), "d": (2, 3, 5, 32)}
    tensors = {f"{name}.{enc}": (enc, torch.randn(shape)) for name, shape in shapes.items() for enc in WRITABLE}
    metadata = gguf_metadata(tiny_args(), "tiny é", "BF16") | {
        "strings": ["a", "", "é"],
        "floats": [0.5, -1.0],
        "ints": [1, -2],
        "bools": [True, False],
        "yes": True,
        "below": -7,
    }
    path = own_file(tmp_path / "a.gguf", metadata, tensors)
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        key: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value for key, value in metadata.items()
    }
    types = {key: field.types for key, field in reader.fields.items()}
    assert types["llama.block_count"] == [GGUFValueType.UINT32]
    assert types["llama.rope.freq_base"] == [GGUFValueType.FLOAT32]
    assert types["yes"] == [GGUFValueType.BOOL]
    assert types["below"] == [GGUFValueType.INT32]
    assert types["ints"] == [GGUFValueType.ARRAY, GGUFValueType.INT32]
    assert [tensor.name for tensor in reader.tensors] == list(tensors)
    own = GGUFFile(MappedFile(path))
    for found in reader.tensors:
        encoding, tensor = tensors[found.name]
        expected = quantize(tensor.numpy(), GGMLQuantizationType[encoding])
        assert found.tensor_type.name == encoding
        assert found.shape.tolist() == list(tensor.shape)[::-1]
        np.testing.assert_array_equal(found.data.view(np.uint8), expected.view(np.uint8))
        np.testing.assert_array_equal(
            own.read(found.name).to(torch.float32).numpy(),
            dequantize(expected.view(np.uint8), GGMLQuantizationType[encoding]).reshape(tensor.shape),
        )


@pytest.mark.parametrize("value", [2**32, -(2**31) - 1, [2**31], 1e39, [1.0, "a"], [[1]], None, {}, "\udc80"])
def test_metadata_that_has_no_type(value: Any) -> None:
    with pytest.raises(OptionError, match="the metadata 'key' cannot be put into a GGUF file"):
        gguf_header({"key": value}, [])


def test_an_empty_list_is_left_out(tmp_path: Path) -> None:
    assert GGUFFile(PlainFile(own_file(tmp_path / "a.gguf", {"a": [], "b": 1}, {}))).metadata == {"b": 1}


def test_a_file_written_by_the_package_s_own_writer_is_the_same(tmp_path: Path) -> None:
    tensors = {"a": ("Q8_0", torch.randn(6, 64)), "b": ("F32", torch.randn(3)), "c": ("Q4_0", torch.randn(2, 2, 32))}
    bytes_of = {name: (enc, quantize(t.numpy(), GGMLQuantizationType[enc])) for name, (enc, t) in tensors.items()}
    keys = {"n": -3, "strings": ["a", "é"], "floats": [0.5], "yes": True, "x": 0.25}
    theirs = peer_file(tmp_path / "theirs.gguf", bytes_of, **keys).read_bytes()
    ours = own_file(tmp_path / "ours.gguf", {"general.architecture": "llama", **keys}, tensors).read_bytes()
    assert theirs[: len(ours)] == ours  # they pad the last tensor, too
    assert not any(theirs[len(ours) :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("encoding", WRITABLE)
def test_rows_are_encoded_in_chunks(encoding: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(3, 50, 64).to(dtype)
    whole = encode_rows(tensor, encoding)
    assert (whole.dtype, whole.shape) == (torch.uint8, (encoded_nbytes((3, 50, 64), encoding),))
    expected = quantize(tensor.to(torch.float32).numpy(), GGMLQuantizationType[encoding])
    np.testing.assert_array_equal(whole.numpy(), expected.view(np.uint8).ravel())
    monkeypatch.setattr("octavo.storage.gguf_write.CHUNK_ELEMENTS", 7 * 64)
    assert encode_rows(tensor, encoding).equal(whole)
    assert encode_rows(tensor.transpose(0, 1), encoding).equal(
        encode_rows(tensor.transpose(0, 1).contiguous(), encoding)
    )


def test_what_cannot_be_encoded_is_said() -> None:
    with pytest.raises(OptionError, match="a row of 48 elements cannot be kept in Q8_0") as caught:
        encoded_nbytes((4, 48), "Q8_0")
    assert "F16" in str(caught.value.hint)
    with pytest.raises(OptionError, match="'Q4_K'; expected one of F32"):
        encode_rows(torch.zeros(1, 256), "Q4_K")


@pytest.mark.parametrize(
    ("name", "shape", "wanted", "expected"),
    [
        ("output_norm.weight", (64,), "Q4_0", "F32"),
        ("blk.0.ffn_gate_inp.weight", (8, 64), "BF16", "F32"),
        ("blk.0.ffn_gate_exps.weight", (8, 96, 64), "Q8_0", "Q8_0"),
        ("blk.0.ffn_down_exps.weight", (8, 64, 48), "Q8_0", "F16"),
        ("blk.0.attn_q.weight", (64, 48), "BF16", "BF16"),
    ],
)
def test_which_encoding_a_tensor_gets(name: str, shape: tuple[int, ...], wanted: str, expected: str) -> None:
    assert encoding_for(name, shape, wanted) == expected


# --- the shape of a model ------------------------------------------------------------------------------


def model_file(
    path: Path, args: ModelArgs, change: Callable[[dict[str, Any]], object] = lambda metadata: None
) -> GGUFFile:
    metadata = gguf_metadata(args, "tiny", "F16")
    change(metadata)
    tensors = {"token_embd.weight": ("F16", torch.zeros(args.vocab_size, args.dim))}
    if not args.tie_embeddings:
        tensors["output.weight"] = tensors["token_embd.weight"]
    return GGUFFile(PlainFile(own_file(path, metadata, tensors)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe": None},
        {"head_dim": 12, "n_kv_heads": 4},
        {"tie_embeddings": True, "sliding_window": 16},
        {"norm_eps": 1e-6, "rope_theta": 10_000.0},
    ],
)
def test_a_model_s_shape_survives(tmp_path: Path, changes: dict[str, object]) -> None:
    args = tiny_args(**changes)
    source = model_file(tmp_path / "a.gguf", args)
    assert gguf_model_args(source.metadata, source) == args


def test_file_types_are_the_package_s() -> None:
    prefix = {"F32": "ALL_"}
    assert {gguf.LlamaFileType[f"{prefix.get(n, 'MOSTLY_')}{n}"].value for n in WRITABLE} == set(FILE_TYPES.values())
    assert all(gguf.LlamaFileType[f"{prefix.get(n, 'MOSTLY_')}{n}"] == number for n, number in FILE_TYPES.items())
    assert gguf_metadata(tiny_args(), "x", "F16")["general.quantization_version"] == gguf.GGML_QUANT_VERSION


def without(*keys: str) -> Callable[[dict[str, Any]], object]:
    return lambda metadata: [metadata.pop(f"llama.{key}") for key in keys]


def test_what_a_file_may_leave_out(tmp_path: Path) -> None:
    optional = without("rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length")
    sparse = model_file(tmp_path / "a.gguf", tiny_args(), optional)
    assert gguf_model_args(sparse.metadata, sparse) == tiny_args(rope_theta=1e6)
    dense = model_file(tmp_path / "b.gguf", tiny_args(moe=None, n_kv_heads=4), optional)
    dense.metadata.pop("llama.attention.head_count_kv")
    assert gguf_model_args(dense.metadata, dense) == tiny_args(moe=None, n_kv_heads=4, rope_theta=1e4)
    rotary = model_file(tmp_path / "c.gguf", tiny_args(head_dim=12), without("attention.key_length"))
    assert gguf_model_args(rotary.metadata, rotary).head_dim == 12


def test_one_value_for_each_layer(tmp_path: Path) -> None:
    source = model_file(tmp_path / "a.gguf", tiny_args(), lambda m: m.update({"llama.attention.head_count_kv": [2, 2]}))
    assert gguf_model_args(source.metadata, source) == tiny_args()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "qwen3moe", "general.architecture is 'qwen3moe'"),
        ("llama.block_count", None, "llama.block_count is None"),
        ("llama.block_count", 0, "n_layers is 0"),
        ("llama.embedding_length", 2**31, "llama.embedding_length is 2147483648"),
        ("llama.embedding_length", "32", "llama.embedding_length is '32'"),
        ("llama.attention.head_count_kv", [2, 4], r"head_count_kv is \[2, 4\]"),
        ("llama.attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon is None"),
        ("llama.rope.dimension_count", 4, "dimensions a head"),
        ("llama.attention.value_length", 4, "dimensions a head"),
        ("llama.rope.scaling.type", "yarn", "rope.scaling is 'yarn'"),
        ("llama.rope.scaling.factor", 8.0, "rope.scaling is None by 8.0"),
        ("llama.expert_used_count", 9, "there are only 8 experts"),
    ],
)
def test_shapes_that_make_no_sense(tmp_path: Path, key: str, value: Any, message: str) -> None:
    source = model_file(tmp_path / "a.gguf", tiny_args())
    source.metadata[key] = value
    with pytest.raises(ConfigError, match=message) as caught:
        gguf_model_args(source.metadata, source)
    assert caught.value.message.startswith(str(tmp_path / "a.gguf"))
    assert caught.value.hint


def test_a_file_without_an_embedding(tmp_path: Path) -> None:
    source = GGUFFile(PlainFile(own_file(tmp_path / "a.gguf", gguf_metadata(tiny_args(), "x", "F16"), {})))
    with pytest.raises(CheckpointError, match=r"no tensor called 'token_embd.weight'"):
        gguf_model_args(source.metadata, source)
