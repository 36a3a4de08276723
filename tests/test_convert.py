"""Converting: whatever happens on the way, in the end there is a whole checkpoint, or nothing but what can go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import conversions
from conversions import JOURNAL, SHARD, contents, convert_and_die, convert_within, in_process, written
from octavo.checkpoint import open_checkpoint
from octavo.convert import Conversion, plan_conversion
from octavo.errors import CheckpointError, ConfigError, OptionError
from tiny_folder import make_tiny_folder

WAYS: dict[str, dict[str, Any]] = {
    "hf": {"to": "hf", "dtype": "bfloat16"},
    "mistral": {"to": "mistral"},
    "mlx": {"to": "mlx"},
    "mlx q4": {"to": "mlx", "dtype": "q4"},
    "gguf q8_0": {"to": "gguf", "dtype": "q8_0"},
    "octavo q4": {"bits": 4, "method": "rtn"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few MB in Hugging Face layout, 130 tensors."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return make_tiny_folder(folder, dim=64, head_dim=16, hidden_dim=128, n_layers=4)


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(source, tmp_path / "copied")


def plan(source: Path, target: Path, way: str = "hf") -> Conversion:
    return conversions.plan(source, target, WAYS[way], shard_bytes=SHARD)


def convert(source: Path, target: Path, way: str = "hf") -> dict[str, bytes]:
    plan(source, target, way).run()
    return contents(target)


def interrupt(conversion: Conversion, pieces: int) -> None:
    """Run it, until Ctrl-C after so many calls of the progress bar."""
    calls = iter(range(pieces))

    def progress(nbytes: int) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversion.run(progress)


def count_reads(conversion: Conversion, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What is read of its source from now on."""
    names: Counter[str] = Counter()
    read = conversion.checkpoint.read

    def counted(name: str) -> Tensor:
        names[name] += 1
        return read(name)

    monkeypatch.setattr(conversion.checkpoint, "read", counted)
    return names


# ---------------------------------------- killed


@pytest.mark.parametrize("way", WAYS)
def test_killed_again_and_again_it_ends_in_the_same_bytes(way: str, source: Path, tmp_path: Path) -> None:
    whole = convert(source, tmp_path / "whole", way)
    target = tmp_path / "target"
    beside = plan(source, target, way).beside
    kills, before = 0, -1
    while not target.exists():
        code, _ = in_process(convert_and_die, source, target, WAYS[way], 29)
        if target.exists():
            assert code == 0
            break
        assert code == -signal.SIGKILL
        assert len(written(beside)) > before
        kills, before = kills + 1, len(written(beside))
    assert kills >= 3
    assert contents(target) == whole
    assert not beside.exists()


@pytest.mark.parametrize("way", ["hf", "mlx q4", "gguf q8_0", "octavo q4"])
def test_what_is_written_is_not_read_again(
    way: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan(source, tmp_path / "target", way)
    interrupt(first, 40)
    done = written(first.beside)
    assert len(done) > 30
    inodes = {path.name: path.stat().st_ino for path in (first.beside / "files").iterdir()}
    second = plan(source, tmp_path / "target", way)
    missing = [p.canonical for f in second.files for n, p in enumerate(f.pieces) if (f.name, n) not in done]
    reads = count_reads(second, monkeypatch)
    told: list[int] = []
    second.run(told.append)
    assert reads == Counter(missing)
    assert sum(told) == second.nbytes - padding(second)
    assert all((tmp_path / "target" / name).stat().st_ino == inode for name, inode in inodes.items())
    assert contents(tmp_path / "target") == convert(source, tmp_path / "whole", way)


def padding(conversion: Conversion) -> int:
    """Bytes of the files that are neither header nor a tensor's."""
    return sum(f.size - len(f.header) - sum(piece.nbytes for piece in f.pieces) for f in conversion.files)


def flip(beside: Path, conversion: Conversion) -> None:
    place = conversion.files[0].pieces[3].places[0][0]
    with (beside / "files" / conversion.files[0].name).open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def spoil_header(beside: Path, conversion: Conversion) -> None:
    with (beside / "files" / conversion.files[0].name).open("r+b") as file:
        file.write(b"nonsense")


def truncate(beside: Path, conversion: Conversion) -> None:
    os.truncate(beside / "files" / conversion.files[0].name, conversion.files[0].size // 2)


def lengthen(beside: Path, conversion: Conversion) -> None:
    os.truncate(beside / "files" / conversion.files[0].name, conversion.files[0].size + 999)


def remove_shard(beside: Path, conversion: Conversion) -> None:
    (beside / "files" / conversion.files[0].name).unlink()


def cut_journal(beside: Path, conversion: Conversion) -> None:
    os.truncate(beside / JOURNAL, (beside / JOURNAL).stat().st_size - 7)


def cut_journals_first_line(beside: Path, conversion: Conversion) -> None:
    os.truncate(beside / JOURNAL, 9)


def remove_journal(beside: Path, conversion: Conversion) -> None:
    (beside / JOURNAL).unlink()


def spoil_journal(beside: Path, conversion: Conversion) -> None:
    with (beside / JOURNAL).open("ab") as file:
        file.write(b'\n\xff\xfe[1]\n7\n{"piece": 1}\n\n{"file": null, "piece": "x", "xxh3": {}}\n{"file')


DAMAGE = {  # and how many pieces have to be written again
    flip: 1,
    spoil_header: 0,
    truncate: None,
    lengthen: 0,
    remove_shard: None,
    cut_journal: 1,
    cut_journals_first_line: None,
    remove_journal: None,
    spoil_journal: 0,
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_to_what_is_unfinished_is_found(
    damage: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan(source, tmp_path / "target")
    interrupt(first, 50)
    missing = sum(len(file.pieces) for file in first.files) - len(written(first.beside))
    damage(first.beside, first)
    second = plan(source, tmp_path / "target")
    reads = count_reads(second, monkeypatch)
    second.run()
    again = reads.total() - missing
    assert again == DAMAGE[damage] if DAMAGE[damage] is not None else again > 1
    assert contents(tmp_path / "target") == convert(source, tmp_path / "whole")


def test_a_kill_before_the_last_step_is_mended(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is written but for the move, or the move is done but for the tidying."""
    first = plan(source, tmp_path / "target")
    interrupt(first, sum(len(file.pieces) + 1 for file in first.files) + len(first.companions) - 1)
    second = plan(source, tmp_path / "target")
    reads = count_reads(second, monkeypatch)
    second.run()
    assert not reads
    whole = contents(tmp_path / "target")
    (first.beside / "files").mkdir(parents=True)
    (first.beside / JOURNAL).write_text("left over")
    with pytest.raises(CheckpointError, match="exists already"):
        plan(source, tmp_path / "target")
    (tmp_path / "target").rename(tmp_path / "whole")
    assert convert(source, tmp_path / "target") == whole


# ---------------------------------------- of something else


def test_an_unfinished_conversion_of_something_else_is_kept(copied: Path, tmp_path: Path) -> None:
    first = plan(copied, tmp_path / "target")
    interrupt(first, 50)
    before = contents(first.beside / "files")
    done = written(first.beside)
    config = json.loads((copied / "config.json").read_text())

    def refuse(way: str = "hf") -> None:
        with pytest.raises(CheckpointError, match="unfinished conversion from another source or with other") as raised:
            plan(copied, tmp_path / "target", way).run()
        assert f"rm -r {first.beside}" in str(raised.value.hint)
        assert contents(first.beside / "files") == before
        assert written(first.beside) == done

    for way in ("mistral", "mlx", "mlx q4", "gguf q8_0", "octavo q4"):
        refuse(way)
    (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    refuse()
    (copied / "config.json").write_text(json.dumps(config))
    weights = copied / "model.safetensors"
    changed = weights.stat().st_mtime_ns
    weights.touch()
    refuse()
    os.utime(weights, ns=(changed, changed))
    (copied / "README.md").write_text("what is no part of the model does not matter")
    assert convert(copied, tmp_path / "target") == convert(copied, tmp_path / "whole")


def test_the_way_to_the_source_does_not_matter(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(plan(source, tmp_path / "target"), 50)
    monkeypatch.chdir(source.parent)
    conversion = plan(Path(source.name), tmp_path / "target")
    reads = count_reads(conversion, monkeypatch)
    conversion.run()
    assert reads.total() < 100


def test_of_two_at_once_the_second_is_refused(source: Path, tmp_path: Path) -> None:
    refusals = 0

    def progress(nbytes: int) -> None:
        nonlocal refusals
        with pytest.raises(CheckpointError, match="is being written by another process"):
            plan(source, tmp_path / "target").run()
        refusals += 1

    plan(source, tmp_path / "target").run(progress)
    assert refusals > 100
    assert contents(tmp_path / "target") == convert(source, tmp_path / "whole")


def test_what_appears_in_the_targets_place_meanwhile_is_not_replaced(source: Path, tmp_path: Path) -> None:
    for way in ("hf", "gguf q8_0"):
        target = tmp_path / "target.gguf" if way.startswith("gguf") else tmp_path / "target"
        conversion = plan(source, target, way)
        with pytest.raises(CheckpointError, match="exists already"):
            conversion.run(lambda nbytes, target=target: target.write_text("mine"))
        assert target.read_text() == "mine"
        target.unlink()
        conversion.run()
        assert open_checkpoint(target).layout_name == way.split()[0]


# ---------------------------------------- targets


@pytest.mark.parametrize("kind", ["file", "empty folder", "dangling link", "the source", "link to the source"])
def test_what_exists_is_not_touched(kind: str, copied: Path, tmp_path: Path) -> None:
    target = copied if kind == "the source" else tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    elif kind == "empty folder":
        target.mkdir()
    elif "link" in kind:
        target.symlink_to(tmp_path / "nowhere" if "dangling" in kind else copied)
    before = contents(copied)
    with pytest.raises(CheckpointError, match="exists already") as raised:
        plan(copied, target)
    assert raised.value.hint
    assert contents(copied) == before
    assert kind != "file" or target.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} <= {"copied", "target"}


def test_targets_are_found_however_they_are_written(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    whole = convert(copied, tmp_path / "whole")
    for given, place in {
        "relative": "relative",
        "slash/": "slash",
        "./a/../dots": "dots",
        "new/parents/are made": "new/parents/are made",
        "~/mixtral": "home/mixtral",
        "~nobody knows/mixtral": "~nobody knows/mixtral",
        "Mischung – 8×7 'B' \"ŧ\"\n$HOME": "Mischung – 8×7 'B' \"ŧ\"\n$HOME",
        "copied/within": "copied/within",
        "link/through": "real/through",
        ".hidden": ".hidden",
        "-n": "-n",
    }.items():
        plan_conversion(copied, given, to="hf", dtype="bfloat16", shard_bytes=SHARD).run()
        assert contents(tmp_path / place) == whole, given
    assert not list(tmp_path.rglob("*.converting"))


def test_a_gguf_target_is_a_file_or_a_folder(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "a.gguf", "gguf q8_0")
    convert(source, tmp_path / "b", "gguf q8_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b" / "model.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b"]
    with pytest.raises(OptionError, match=r"only --to gguf writes a \.gguf file"):
        plan(source, tmp_path / "c.gguf", "mlx")


def test_a_place_that_cannot_be_written_is_one_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for target in (tmp_path / "file" / "target", Path("/proc/target"), tmp_path / ("x" * 250)):
        with pytest.raises(CheckpointError, match="could not be written") as raised:
            plan(source, target).run()
        assert raised.value.hint


@contextmanager
def powerless() -> Iterator[None]:
    """Root gives its rights away for a while; anybody else has none to give."""
    user = os.geteuid()
    os.seteuid(65_534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_of_somebody_else_is_one_error(source: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o555)
    conversion = plan(source, theirs / "target")
    with powerless(), pytest.raises(CheckpointError, match=r"could not be written .*Permission denied"):
        conversion.run()
    assert not list(theirs.iterdir())


def test_a_source_of_somebody_else_is_one_error(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    copied.chmod(0o000)
    for source in (copied, copied / "model.safetensors", copied / "sub" / "model", "~nobody knows/model"):
        with powerless(), pytest.raises(CheckpointError, match=r"no such folder|Permission denied"):
            plan_conversion(source, "target", to="hf")
    copied.chmod(0o700)


# ---------------------------------------- room


def test_room_is_checked_before_the_first_byte(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversion = plan(source, tmp_path / "target")
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, conversion.nbytes - 1))
    reads = count_reads(conversion, monkeypatch)
    with pytest.raises(CheckpointError, match=r"0\.0 GB are to be written, and 0\.0 GB are free"):
        conversion.run()
    assert not reads
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, conversion.nbytes))
    conversion.run()


def test_what_is_written_needs_no_room_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan(source, tmp_path / "target")
    interrupt(first, 50)
    done = written(first.beside)
    usage = type(shutil.disk_usage(tmp_path))
    free = 10_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, free))
    with pytest.raises(CheckpointError, match="are to be written"):
        plan(source, tmp_path / "target").run()
    assert written(first.beside) == done  # nothing is lost by the refusal
    free = first.nbytes * 3 // 4
    plan(source, tmp_path / "target").run()


def test_a_full_disk_is_one_error_and_no_loss(source: Path, tmp_path: Path) -> None:
    conversion = plan(source, tmp_path / "target")
    limit = max(file.size for file in conversion.files) - 1  # some of the files fit
    code, error = in_process(convert_within, source, tmp_path / "target", WAYS["hf"], limit)
    assert code == 0
    assert str(tmp_path / "target") in error
    assert "could not be written" in error
    assert "goes on where it stopped" in error
    done = written(conversion.beside)
    assert done
    assert [path.name for path in tmp_path.iterdir()] == [conversion.beside.name]
    assert convert(source, tmp_path / "target") == convert(source, tmp_path / "whole")


# ---------------------------------------- what is refused, and what comes out


def test_what_octavo_cannot_write_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="to is 'onnx'; expected one of hf, mistral, mlx, gguf"):
        plan_conversion(source, tmp_path / "target", to="onnx")
    with pytest.raises(OptionError, match="to is 'octavo'") as raised:
        plan_conversion(source, tmp_path / "target", to="octavo")
    assert "octavo quantize" in str(raised.value.hint)
    for to, dtype, expected in (
        ("hf", "q8_0", "float32, bfloat16, float16$"),
        ("mistral", "int8", "float32, bfloat16, float16$"),
        ("mlx", "q8_0", "float32, bfloat16, float16, q8, q4$"),
        ("gguf", "q4", "float32, bfloat16, float16, q8_0, q4_0$"),
        ("gguf", "", "float32"),
    ):
        with pytest.raises(OptionError, match=f"dtype is {dtype!r}; {to} is written as one of .*{expected}"):
            plan_conversion(source, tmp_path / "target", to=to, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_what_is_no_whole_model_is_refused_before_anything_is_written(copied: Path, tmp_path: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    expert = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != expert}, f"{expert} is missing"),
        (tensors | {"lora.weight": torch.zeros(3)}, "lora.weight is not part of this model"),
        (tensors | {expert: torch.zeros(3, 4)}, f"{expert} has shape"),
        (tensors | {expert: tensors[expert].to(torch.int8)}, f"{expert} has dtype torch.int8"),
    ):
        save_file(changed, copied / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            plan(copied, tmp_path / "target")
    save_file(tensors, copied / "model.safetensors")
    (copied / "config.json").write_text("{}")
    with pytest.raises(ConfigError):
        plan(copied, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["copied"]


def test_a_source_that_breaks_off_half_way_is_one_error(copied: Path, tmp_path: Path) -> None:
    conversion = plan(copied, tmp_path / "target")
    os.truncate(copied / "model.safetensors", (copied / "model.safetensors").stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has \d+ bytes, where \d+ were expected"):
        conversion.run()
    assert not (tmp_path / "target").exists()


def test_another_dtype_changes_nothing_but_the_numbers(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "target", "hf")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "target")
    assert before.args == after.args
    assert set(before.stored) == set(after.stored)
    assert all(torch.equal(before.read(name).bfloat16(), after.read(name)) for name in before)
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == "bfloat16"
    for name in ("tokenizer.model", "generation_config.json"):
        assert (tmp_path / "target" / name).exists()


@pytest.mark.parametrize(("to", "dtype"), [("gguf", None), ("mlx", "q4")])
def test_a_dtype_that_the_target_lacks_is_named(to: str, dtype: str | None, copied: Path, tmp_path: Path) -> None:
    weights = copied / "model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(OptionError, match="the weights are float64; expected one of float32, bfloat16, float16"):
        plan_conversion(copied, tmp_path / "target", to=to, dtype=dtype)
    plan_conversion(copied, tmp_path / "target", to=to, dtype="bfloat16").run()


@pytest.mark.parametrize("way", ["mlx q4", "gguf q8_0", "octavo q4"])
def test_a_quantised_source_is_dequantised(way: str, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "quantised", way)
    plan_conversion(tmp_path / "quantised", tmp_path / "plain", to="hf", dtype="float32").run()
    quantised, plain = open_checkpoint(tmp_path / "quantised"), open_checkpoint(tmp_path / "plain")
    assert set(quantised) == set(plain)
    assert all(torch.equal(quantised.read(name).float(), plain.read(name)) for name in quantised)
    assert (
        not {"quantization", "quantization_config"}
        & json.loads((tmp_path / "plain" / "config.json").read_text()).keys()
    )
