"""Files of torch.save: read mapped and plain, old and new, and refused where they hold anything but tensors."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from octavo.errors import CheckpointError, OptionError
from octavo.storage.files import MappedFile, PlainFile
from octavo.storage.torchfile import TorchFile

KINDS = [MappedFile, PlainFile]
W = torch.arange(24.0).reshape(2, 3, 4)
TENSORS = {
    "float": W,
    "brain": W.bfloat16(),
    "half": W[0].half(),
    "eight": W[1].to(torch.float8_e4m3fn),
    "bytes": W[0].char(),
    "words": W[0].to(torch.uint32),
    "turned": W[0].T,
    "row": W[1, 2],
    "scalar": torch.tensor(3.0),
    "parameter": torch.nn.Parameter(W[0].clone()),
}


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_every_kind_of_tensor(tmp_path: Path, kind, zipped: bool) -> None:
    path = tmp_path / "consolidated.00.pt"
    new = ("eight", "words")  # dtypes that torch cannot load from its old format
    tensors = {name: tensor for name, tensor in TENSORS.items() if zipped or name not in new}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    source = TorchFile(kind(path))
    assert source.names() == list(tensors)
    for name, tensor in tensors.items():
        info, read = source.info(name), source.read(name)
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert (info.file, read.dtype, read.requires_grad) == ("consolidated.00.pt", tensor.dtype, False)
        assert read.is_contiguous()
        assert torch.equal(read.double(), tensor.detach().double())
    assert source.info("brain").encoding == "BF16"
    assert torch.equal(source.read("float", (1, 5)), W.view(6, 4)[1:5])
    assert torch.equal(source.read("turned", slice(1, 3)), W[0].T[1:3])
    assert source.read("scalar", (0, 1)).tolist() == [3.0]
    with pytest.raises(OptionError, match="it has 6"):
        source.read("float", (0, 7))
    with pytest.raises(CheckpointError, match="holds no tensor called 'x'"):
        source.read("x")


def test_mapped_files_are_not_copied_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"w": W}, path)
    before = path.read_bytes()
    source = TorchFile(MappedFile(path))
    assert source.read("w").data_ptr() == source.read("w").data_ptr()
    source.read("w").zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_trainers_files_are_unwrapped(tmp_path: Path, key: str) -> None:
    torch.save({key: torch.nn.Linear(2, 3).state_dict(), "step": 7, "lr": 0.1, "name": "x"}, tmp_path / "a.pt")
    assert TorchFile(PlainFile(tmp_path / "a.pt")).names() == ["weight", "bias"]


def test_what_is_no_tensor_is_left_out(tmp_path: Path) -> None:
    torch.save({"w": W, "step": 3, "shape": W.shape, "device": W.device, "dtype": torch.bfloat16}, tmp_path / "a.pt")
    assert TorchFile(PlainFile(tmp_path / "a.pt")).names() == ["w"]


NOT_TENSORS: dict[str, tuple[Any, str]] = {
    "a list": ([W], "found list"),
    "one tensor": (W, "found Tensor"),
    "empty": ({}, "found dict without any"),
    "numbered": ({0: W}, "found dict without any"),
    "spread": ({"w": W.expand(1000, 2, 3, 4)}, "'w' has shape .*, but fewer bytes"),
    "sparse": ({"w": W[0].to_sparse()}, "_rebuild_sparse_tensor"),
    "meta": ({"w": torch.empty(3, device="meta")}, "_rebuild_meta_tensor"),
    "complex": ({"w": torch.zeros(2, dtype=torch.complex64)}, "'w' is a tensor of torch.complex64"),
}


@pytest.mark.parametrize("case", NOT_TENSORS)
def test_other_contents_are_refused(tmp_path: Path, case: str) -> None:
    content, message = NOT_TENSORS[case]
    torch.save(content, tmp_path / "a.pt")
    for kind in KINDS:
        with pytest.raises(CheckpointError, match=message) as raised:
            TorchFile(kind(tmp_path / "a.pt"))
        assert raised.value.hint


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "a.pt"
    for trick in (Calls(os.mkdir, str(marker)), Calls(eval, f"open({str(marker)!r}, 'w')"), Calls(print, "ran")):
        torch.save({"w": W, "x": trick}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="this code was not run") as raised:
            TorchFile(MappedFile(path))
        assert "safetensors" in str(raised.value.hint)
    path.write_bytes(pickle.dumps({"x": Calls(os.mkdir, str(marker))}, protocol=0 if zipped else 5))
    with pytest.raises(CheckpointError, match="this code was not run"):
        TorchFile(PlainFile(path))
    assert not marker.exists()


@pytest.mark.parametrize(
    "greedy",
    [
        Calls(Counter, Calls(bytearray, 1 << 40)),
        Calls(torch.Size, Calls(bytearray, 1 << 40)),
        Calls(set, Calls(bytearray, 1 << 40)),
        Calls(torch.Tensor, 1 << 40),
    ],
    ids=["counter", "size", "set", "tensor"],
)
def test_calls_that_ask_for_memory_or_time_are_refused(tmp_path: Path, greedy: Calls) -> None:
    """torch's own unpickler would make them: they are harmless but for their size."""
    torch.save({"w": W, "x": greedy}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="this code was not run"):
        TorchFile(MappedFile(tmp_path / "a.pt"))


def saved(content: Any, zipped: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def rezipped(data: bytes, change: Any, method: int = zipfile.ZIP_STORED) -> bytes:
    """The same archive with its pickle put through ``change``."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return out.getvalue()


def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    good = saved({"w": W})
    assert b"K\x18" in good  # 24 elements
    shapes = rezipped(good, lambda data: data.replace(b"K\x02K\x03K\x04\x87", b"K\x02K\xffK\xff\x87"))
    claims = rezipped(shapes, lambda data: data.replace(b"K\x18", b"J\xff\xff\xff\x7f"))
    bomb = rezipped(good, lambda data: data + bytes(1 << 24), zipfile.ZIP_DEFLATED)
    long = rezipped(good, lambda data: data + bytes(1 << 23))
    path = tmp_path / "a.pt"
    for data in (claims, shapes, bomb, long, rezipped(good, lambda data: data[:-20]), good[:-100], good[:100]):
        assert data != good
        path.write_bytes(data)
        for kind in KINDS:
            with pytest.raises(CheckpointError, match=r"not a whole torch file|fewer bytes than that"):
                TorchFile(kind(path))


def test_old_files_that_claim_too_much_are_refused(tmp_path: Path) -> None:
    good = saved({"w": W}, zipped=False)
    claims = good.replace(b"K\x18", b"\x8a\x06\x00\x00\x00\x00\x00\x10")  # 2^44 elements
    assert claims != good
    for data in (claims, good[:-10], good[:40], b"", b"\x80\x02", b"hello", bytes(5000), b"(" * 5000):
        (tmp_path / "a.pt").write_bytes(data)
        with pytest.raises(CheckpointError, match="not a whole torch file"):
            TorchFile(MappedFile(tmp_path / "a.pt"))


VALID = [saved(OrderedDict(a=W[0].bfloat16(), b=W[1, 0])), saved({"a": W[0], "b": W[1, 0]}, zipped=False)]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=6)), min_size=1, max_size=4),
)
def test_mutated_files(tmp_path: Path, data: bytes, changes: list[tuple[int, bytes]]) -> None:
    """Success or CheckpointError, whatever is in the file."""
    mutated = bytearray(data)
    for at, new in changes:
        at %= len(mutated)
        mutated[at : at + len(new)] = new
    path = tmp_path / "a.pt"
    path.write_bytes(bytes(mutated))
    try:
        source = TorchFile(PlainFile(path))
        for name in source:
            assert source.read(name).nbytes <= len(mutated)
    except CheckpointError:
        return


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_replaced_meanwhile_is_read_on(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": W}, path)
    source = TorchFile(kind(path))
    torch.save({"w": -W}, tmp_path / "b.pt")
    os.replace(tmp_path / "b.pt", path)
    assert torch.equal(source.read("w"), W)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_larger_than_memory(kind: Any, tmp_path: Path) -> None:
    """A TiB, nearly all of it a hole: only what is asked for is read."""
    path, size = tmp_path / "a.pth", 1 << 40
    with FakeTensorMode():
        tensors = {"rest": torch.zeros(size, dtype=torch.uint8)}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tensors, path)
    source = TorchFile(kind(path))
    assert source.info("rest").nbytes == size
    assert torch.equal(source.read("rest", (size - 5, size)), torch.zeros(5, dtype=torch.uint8))
