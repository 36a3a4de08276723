"""Stores that are damaged, of another version or not what they say; and what cannot become one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conversions import SHARD
from octavo.checkpoint import open_checkpoint
from octavo.convert import plan_conversion, plan_quantization
from octavo.errors import CheckpointError, ConfigError, OptionError, UserError
from stores import INDEX, header, make_source, quantise, write_header


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, in Hugging Face layout."""
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At 3 bits, in several files."""
    target = tmp_path_factory.mktemp("store") / "model"
    quantise(source, target, 3, shard_bytes=SHARD)
    return target


@pytest.fixture
def copied(store: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(store, tmp_path / "copied")


# ---------------------------------------- checksums


@pytest.mark.parametrize("mapped", [True, False])
def test_a_whole_store_is_verified(mapped: bool, store: Path) -> None:
    told: list[int] = []
    checkpoint = open_checkpoint(store, mapped=mapped)
    checkpoint.verify(told.append)
    assert sum(told) == sum(checkpoint.info(name).nbytes for name in checkpoint)
    assert len(told) == len(checkpoint)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(
    "name", ["layers.0.feed_forward.experts.6.w3.weight", "layers.1.attention.wk.weight", "norm.weight"]
)
def test_a_flipped_bit_is_found(name: str, mapped: bool, copied: Path) -> None:
    path = copied / open_checkpoint(copied).info(name).file
    entries, begin = header(path)
    first, last = entries[name]["data_offsets"]
    for place in (first, (first + last) // 2, last - 1):
        data = bytearray(path.read_bytes())
        data[begin + place] ^= 16
        path.write_bytes(data)
        checkpoint = open_checkpoint(copied, mapped=mapped)
        with pytest.raises(CheckpointError, match=f"{path}: the bytes of '{name}' are not those .* checksum"):
            checkpoint.verify()
        if mapped:  # what is mapped is verified once for all
            checkpoint.read(name)
        else:
            with pytest.raises(CheckpointError, match=f"the bytes of '{name}' are not those"):
                checkpoint.read(name)
        data[begin + place] ^= 16
        path.write_bytes(data)
    open_checkpoint(copied).verify()


def test_a_damaged_store_is_not_converted(copied: Path, tmp_path: Path) -> None:
    path = max(copied.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="are not those that were written"):
        plan_conversion(copied, tmp_path / "plain", to="mistral").run()
    assert not (tmp_path / "plain").exists()


def test_other_layouts_have_no_checksums(source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no checksums \(layout hf\)"):
        open_checkpoint(source).verify()


# ---------------------------------------- what cannot be read


def change_metadata(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    entries, _ = header(path)
    said = json.loads(entries["__metadata__"]["octavo"])
    change(said)
    entries["__metadata__"]["octavo"] = json.dumps(said)
    write_header(path, entries)


EXPERT = "layers.0.feed_forward.experts.0.w1.weight"


def put(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda said: said["tensors"][EXPERT].update(changes)


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda said: said["tensors"][EXPERT].pop(key)


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda said: said.update(version=2), "is of a store of version 2; this Octavo reads version 1"),
    "version text": (lambda said: said.update(version="1"), "its version is '1'; expected 1"),
    "version 0": (lambda said: said.update(version=0), "its version is 0; expected 1"),
    "version true": (lambda said: said.update(version=True), "its version is True; expected 1"),
    "no version": (lambda said: said.pop("version"), "its version is None; expected 1"),
    "no tensors": (lambda said: said.pop("tensors"), "its tensors are None; expected an object"),
    "no entry": (lambda said: said["tensors"].pop(EXPERT), f"holds '{EXPERT}', of which its metadata say nothing"),
    "one too many": (lambda said: said["tensors"].update(x={}), "lists 'x' in its metadata, and does not hold it"),
    "entry text": (lambda said: said["tensors"].update({EXPERT: "q4"}), "entry of '.*' is 'q4'; expected an object"),
    "no format": (drop("format"), f"the format of '{EXPERT}' is None; expected one of q8, q4, q3, q2"),
    "format": (put(format="q5"), f"the format of '{EXPERT}' is 'q5'; expected one of q8, q4, q3, q2"),
    "format list": (put(format=["q4"]), r"the format of '.*' is \['q4'\]"),
    "other format": (put(format="q8"), f"'{EXPERT}' has the shape .*; q8 of .* takes .* bytes"),
    "no shape": (drop("shape"), "the shape of '.*' is None"),
    "shape": (put(shape=[128, 65]), r"has the shape .*; q3 of \[128, 65\] takes"),
    "shape huge": (put(shape=[10**4000, 10**4000]), r"the shape of '.*' is \[1000+\.\.\.; expected \[rows, columns\]"),
    "shape negative": (put(shape=[-128, -64]), r"the shape of '.*' is \[-128, -64\]"),
    "shape 3": (put(shape=[2, 64, 64]), r"the shape of '.*' is \[2, 64, 64\]"),
    "no dtype": (drop("dtype"), "the dtype of '.*' is None; expected one of F32, BF16, F16"),
    "dtype": (put(dtype="I8"), "the dtype of '.*' is 'I8'; expected one of F32, BF16, F16"),
    "no checksum": (drop("xxh3"), "the checksum of '.*' is None; expected 16 hexadecimal digits"),
    "checksum": (put(xxh3="0x12"), "the checksum of '.*' is '0x12'; expected 16 hexadecimal digits"),
    "plain format": (lambda said: said["tensors"]["norm.weight"].update(format="q4"), "'norm.weight' has a format"),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lie_are_refused(lie: str, source: Path, tmp_path: Path) -> None:
    quantise(source, tmp_path / "store", 3, method="rtn")
    path = tmp_path / "store" / "model.safetensors"
    change, message = LIES[lie]
    change_metadata(path, change)
    with pytest.raises(CheckpointError, match=f"{path}: .*{message}") as raised:
        open_checkpoint(tmp_path / "store")
    assert raised.value.hint


@pytest.mark.parametrize(
    "metadata",
    [{"octavo": "{"}, {"octavo": "[1]"}, {"octavo": 7}, {"octavo": "\ud800"}, {"octavo": "[" * 9999}, {}, None, "x"],
    ids=str,
)
def test_metadata_that_are_none_are_refused(metadata: Any, copied: Path) -> None:
    path = copied / open_checkpoint(copied).info(EXPERT).file
    entries, _ = header(path)
    entries["__metadata__"] = metadata
    write_header(path, entries)
    with pytest.raises(CheckpointError, match=rf"{path}: .*('octavo' in its header|no 'octavo')"):
        open_checkpoint(copied)


def test_the_shapes_must_be_the_models(source: Path, tmp_path: Path) -> None:
    """As many bytes, but not the model's: 17 rows take as many panels as 32."""
    quantise(source, tmp_path / "store", 3, method="rtn")
    change_metadata(tmp_path / "store" / "model.safetensors", put(shape=[127, 64]))
    checkpoint = open_checkpoint(tmp_path / "store")
    with pytest.raises(CheckpointError, match=rf"{EXPERT} has shape \[127, 64\], expected \[128, 64\]"):
        checkpoint.check()
    with pytest.raises(CheckpointError, match=r"expected \[128, 64\]"):
        checkpoint.packed(EXPERT)


@pytest.mark.parametrize(("version", "message"), [(2, "is of a store of version 2"), ("x", "version is 'x'")])
def test_a_config_of_another_version_is_refused(version: object, message: str, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["version"] = version
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"{copied}/config\.json: .*{message}") as raised:
        open_checkpoint(copied)
    assert raised.value.hint


def test_a_store_is_told_by_its_files_too(copied: Path) -> None:
    """Without quantization_config, and without the index."""
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]
    (copied / "config.json").write_text(json.dumps(config))
    (copied / INDEX).unlink()
    checkpoint = open_checkpoint(copied)
    checkpoint.check()
    checkpoint.verify()
    assert checkpoint.layout_name == "octavo"


@pytest.mark.parametrize("left", [0, 4, 5000, -1])
def test_a_truncated_shard_is_refused(left: int, copied: Path) -> None:
    path = min(copied.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=f"{path}: not a whole safetensors file"):
        open_checkpoint(copied)


def test_a_missing_shard_is_refused(copied: Path) -> None:
    path = min(copied.glob("*.safetensors"))
    path.unlink()
    with pytest.raises(CheckpointError, match=f"names the shard '{path.name}', which is not in the folder"):
        open_checkpoint(copied)


# ---------------------------------------- what cannot be written


def test_what_cannot_be_quantised_is_refused(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for bits in (5, "5", 0, "four", 16):
        with pytest.raises(OptionError, match="8, 4, 3"):
            plan_quantization(source, target, bits=bits)
    with pytest.raises(OptionError, match="method is 'best'; expected one of optimal, rtn"):
        plan_quantization(source, target, bits=4, method="best")
    for overrides in ({"nothing.like.it": "q4"}, {"output.weight": "q5"}, {"norm.weight": "q4"}):
        with pytest.raises(OptionError) as raised:
            plan_quantization(source, target, bits=4, overrides=overrides)
        assert next(iter(overrides)) in raised.value.message
        assert raised.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds neither"):
        plan_quantization(tmp_path / "empty", target, bits=4)
    with pytest.raises(CheckpointError, match="exists already"):
        plan_quantization(source, tmp_path / "empty", bits=4)
    with pytest.raises(OptionError, match=r"only --to gguf writes a \.gguf file"):
        plan_quantization(source, tmp_path / "a.gguf", bits=4)
    with pytest.raises(OptionError, match="no Hub id"):
        plan_quantization(source, target, bits=4, revision="main")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_weights_that_are_no_numbers_are_named(source: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(source, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    theirs = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    tensors[theirs][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.feed_forward\.experts\.2\.w2\.weight"):
        plan_quantization(folder, tmp_path / "store", bits=4).run()
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(OptionError, match=r"float64; expected one of float32, bfloat16, float16") as raised:
        plan_quantization(folder, tmp_path / "other", bits=4)
    assert "--dtype bfloat16" in str(raised.value.hint)
