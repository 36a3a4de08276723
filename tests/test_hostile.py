"""Hostile checkpoints: damaged files of every kind give a UserError or are read; pickles with code in them run none.

The damage is that of benchmarks/fuzz.py, whose recorded run has many more cases. Here hypothesis draws it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.checkpoint import open_checkpoint
from octavo.errors import CheckpointError, ConfigError, UserError
from octavo.storage.files import MAX_NESTING

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import fuzz


@pytest.fixture(scope="module", params=fuzz.KINDS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> fuzz.Folders:
    return fuzz.Folders(request.param, tmp_path_factory.mktemp("hostile"))


def test_what_is_whole_is_read_whole(folders: fuzz.Folders) -> None:
    """Otherwise the fuzzing would never get beyond the first check."""
    for _, folder, _ in folders.bases:
        assert fuzz.open_all(folder, mapped=False) == "whole"


@settings(max_examples=300, deadline=10_000)
@given(rng=st.randoms(use_true_random=False), mapped=st.booleans())
def test_damaged_files_are_read_or_refused(folders: fuzz.Folders, rng: random.Random, mapped: bool) -> None:
    folder, nbytes = folders.damage(rng)
    fuzz.forget_peak()
    before = fuzz.status("VmRSS")
    try:
        outcome = fuzz.open_all(folder, mapped=mapped)  # raises what is no UserError
    finally:
        folders.mend()
    assert outcome in ("whole", "CheckpointError", "ConfigError", "TokenizerError")
    assert fuzz.status("VmHWM") - before <= nbytes + fuzz.EXTRA_BYTES


def test_the_recorded_run_is_long_enough_and_clean() -> None:
    results = json.loads(fuzz.RESULTS.read_text())
    assert results["failures"] == 0
    assert results["cases"] >= 10_000
    assert set(results["kinds"]) == set(fuzz.KINDS)
    for kind in results["kinds"].values():
        assert sum(kind["outcomes"].values()) == kind["cases"] >= 2_500
        assert kind["outcomes"]["whole"] < kind["cases"] / 2  # most of the damage is seen
        assert kind["slowest"]["seconds"] < results["limits"]["seconds_a_case"]


# ---------------------------------------- what a random mutation seldom hits


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    fuzz.write_hf(folder)
    return folder


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8, 10**8 + 1])
def test_a_header_of_any_length_takes_no_memory(length: int, hf: Path) -> None:
    shard = hf / "model-00001-of-00002.safetensors"
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=f"its header claims {length} bytes"):
        open_checkpoint(hf)


@pytest.mark.parametrize("depth", [MAX_NESTING, 500, 990, 5_000, 100_000])
def test_deep_nesting_is_refused(depth: int, hf: Path) -> None:
    deep = "[" * depth + "]" * depth
    config = (hf / "config.json").read_text()
    (hf / "config.json").write_text(config.replace("{", f'{{"x": {deep},', 1))
    with pytest.raises(ConfigError, match=r"config\.json: (is nested deeper|not a readable JSON)"):
        open_checkpoint(hf)
    (hf / "config.json").write_text(config)
    shard = hf / "model-00001-of-00002.safetensors"
    header = f'{{"x": {{"dtype": {deep}, "shape": {deep}, "data_offsets": {deep}}}}}'.encode()
    shard.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=r"not a whole safetensors file"):
        open_checkpoint(hf)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "..\\secret", "a/../../secret", ".", ""])
def test_an_index_cannot_lead_outside_its_folder(shard: str, hf: Path) -> None:
    shutil.copyfile(hf / "model-00001-of-00002.safetensors", hf.parent / "secret.safetensors")
    index = json.loads((hf / fuzz.INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], shard)
    (hf / fuzz.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names the shard"):
        open_checkpoint(hf)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "generation_config.json"])
@pytest.mark.parametrize("how", ["folder", "empty", "dangling link", "loop", "pipe"])
def test_what_is_no_file_is_refused_at_once(name: str, how: str, hf: Path) -> None:
    path = hf / name
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "empty":
        path.touch()
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if how == "loop" else hf / "nowhere")
    outcome = fuzz.open_all(hf, mapped=True)
    absent = name.startswith("generation") and how != "empty"
    assert outcome == ("whole" if absent else "CheckpointError" if name.startswith("model") else "ConfigError")


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_local_experts", "hidden_size", "vocab_size", "intermediate_size", "head_dim"]
)
@pytest.mark.parametrize("value", [2**31 - 1, 2**31, 2**63, 10**400, 0, -1, 1.5, "1", None, [1], {}, True])
def test_sizes_of_any_kind_are_compared_with_the_tensors(key: str, value: Any, hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {key: value}))
    if key == "head_dim" and value is None:  # may be left out
        assert fuzz.open_all(hf, mapped=True) == "whole"
        return
    with pytest.raises((ConfigError, CheckpointError)):
        open_checkpoint(hf).check()


def test_stacked_experts_are_not_listed_by_the_million(tmp_path: Path) -> None:
    fuzz.write_quantised(tmp_path, to="mlx", dtype="q4")
    config = json.loads((tmp_path / "config.json").read_text())
    for layers, experts in ((1, 65_536), (12, 65_536), (1, 2**31 - 1), (12, 2_000)):
        changed = {"num_hidden_layers": layers, "num_local_experts": experts}
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(CheckpointError, match=f"described as {layers} layers of {experts} experts"):
            open_checkpoint(tmp_path).names()


# ---------------------------------------- pickles


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def global_opcode(module: str, name: str, *arguments: str) -> bytes:
    """A pickle in protocol 0 that calls module.name with strings."""
    return f"c{module}\n{name}\n(".encode() + b"".join(f"V{a}\n".encode() for a in arguments) + b"tR."


def stack_global(module: str, name: str, argument: str) -> bytes:
    """The same in protocol 4, whose opcode takes names from the stack."""
    words = [b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name, argument)]
    return b"\x80\x04" + words[0] + words[1] + b"\x93" + words[2] + b"\x85R."


def old_instance(module: str, name: str, argument: str) -> bytes:
    """The same by INST, of Python 1."""
    return f"(V{argument}\ni{module}\n{name}\n.".encode()


def object_opcode(module: str, name: str, argument: str) -> bytes:
    """The same by OBJ."""
    return f"(c{module}\n{name}\nV{argument}\no.".encode()


def by_extension(module: str, name: str, argument: str) -> bytes:
    """The same through a number of copyreg's registry, which another file might have filled."""
    return b"\x80\x02\x82\x01V" + argument.encode() + b"\n\x85R."


def pickles(marker: Path) -> dict[str, bytes]:
    """Pickles that would leave a file behind, were they to run."""
    shell = f"touch {marker}"
    python = f"open({str(marker)!r}, 'w')"
    inner = io.BytesIO()
    torch.save(Calls(os.system, shell), inner)
    return {
        "os.system": pickle.dumps(Calls(os.system, shell), 2),
        "eval": pickle.dumps({"w": Calls(eval, python)}, 2),
        "exec": pickle.dumps([Calls(exec, python)], 4),
        "getattr": b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(Vos\ntRVsystem\ntR(V%s\ntR." % shell.encode(),
        "posix.system": global_opcode("posix", "system", shell),
        "stack global": stack_global("posix", "system", shell),
        "dotted name": stack_global("torch", "serialization.os.system", shell),
        "instance": old_instance("os", "system", shell),
        "object": object_opcode("os", "system", shell),
        "extension": by_extension("os", "system", shell),
        "nested bytes": pickle.dumps(Calls(torch.storage._load_from_bytes, inner.getvalue()), 2),
        "import": pickle.dumps(Calls(importlib.import_module, "antigravity"), 2),
        "state": b"c__builtin__\nobject\n)\x81}V__setstate__\ncos\nsystem\nsb" + f"V{shell}\nb.".encode(),
        "key": pickle.dumps({Calls(os.system, shell): 1}, 2),
        "after the end": pickle.dumps({"w": 1}, 2)[:-1] + b"0" + global_opcode("os", "system", shell),
    }


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {}


def container(function: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    CONTAINERS[function.__name__] = function
    return function


@container
def bare(data: bytes) -> bytes:
    return data


@container
def legacy(data: bytes) -> bytes:
    """Before torch 1.6: magic number, version, machine, the dictionary."""
    return b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})) + data


@container
def legacy_magic(data: bytes) -> bytes:
    """In the place of the magic number."""
    return data + legacy(pickle.dumps({}, 2))


@container
def legacy_tar(data: bytes) -> bytes:
    """Before torch 0.2."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zipped(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


@container
def modern(data: bytes) -> bytes:
    return zipped(**{"archive/data.pkl": data, "archive/version": b"3\n", "archive/byteorder": b"little"})


@container
def modern_deflated(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
    return out.getvalue()


@container
def twice(data: bytes) -> bytes:
    """A harmless pickle for who looks, another for who loads."""
    good = pickle.dumps({"w": 1}, 2)
    return zipped(**{"archive/data.pkl": good, "archive/version": b"3\n", "other/data.pkl": data, "data.pkl": data})


@container
def script(data: bytes) -> bytes:
    """TorchScript, whose constants are a pickle too."""
    members = {"m/data.pkl": data, "m/constants.pkl": data, "m/version": b"3\n", "m/code/__torch__.py": b"import os"}
    return zipped(**members)


@pytest.mark.parametrize("wrap", CONTAINERS)
@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.00.pt"])
def test_code_in_a_pickle_is_not_run(wrap: str, name: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(fuzz.params()))
    for trick, data in pickles(marker).items():
        (folder / name).write_bytes(CONTAINERS[wrap](data))
        for mapped in (True, False):
            with pytest.raises(CheckpointError) as raised:
                open_checkpoint(folder, mapped=mapped).check()
            assert raised.value.hint, trick
            assert name in raised.value.message, trick
            assert not marker.exists(), trick
    assert "antigravity" not in sys.modules


def test_the_tricks_would_work(tmp_path: Path) -> None:
    """With Python's own unpickler, which is what the refusals guard against."""
    marker = tmp_path / "ran"
    worked = set()
    for trick, data in pickles(marker).items():
        if trick == "import":  # opens a browser
            continue
        with contextlib.suppress(Exception):
            pickle.loads(data)
        if marker.exists():
            worked.add(trick)
            marker.unlink()
    assert worked >= {
        "os.system",
        "eval",
        "exec",
        "getattr",
        "posix.system",
        "stack global",
        "instance",
        "object",
        "key",
    }


def test_python_objects_in_npz_are_refused(tmp_path: Path) -> None:
    import numpy as np

    marker = tmp_path / "ran"
    fuzz.write_npz(tmp_path, packed=False)
    arrays: dict[str, Any] = dict(np.load(tmp_path / "weights.npz"))
    np.savez(tmp_path / "weights.npz", **arrays, x=np.array([Calls(os.system, f"touch {marker}")], dtype=object))
    with pytest.raises(CheckpointError, match="Python objects, which can carry code"):
        open_checkpoint(tmp_path).check()
    assert not marker.exists()


def test_other_endings_do_not_unpickle(tmp_path: Path) -> None:
    """A pickle called .safetensors, .npz or .gguf is not one of these, and no pickle either."""
    marker = tmp_path / "ran"
    data = pickle.dumps(Calls(os.system, f"touch {marker}"))
    for name in ("model.safetensors", "weights.npz", "model.gguf", "weights.00.safetensors", "pytorch_model.bin"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(data)
        (folder / "config.json").write_text(json.dumps(fuzz.ARGS.to_hf()))
        with pytest.raises(UserError):
            open_checkpoint(folder).check()
    assert not marker.exists()
