"""`octavo convert` as a person runs it: killed, interrupted, on terminals and pipes, from the Hub; its memory."""

from __future__ import annotations

import json
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conversions import JOURNAL, contents, convert_and_measure, in_process, start, wait_for_pieces, written
from hub_server import HubServer
from octavo.args import ModelArgs, MoEArgs
from octavo.checkpoint import open_checkpoint
from octavo.checkpoint.names import HF_FUSED, stored_tensors
from octavo.convert import plan_conversion
from octavo.load import load_model
from run_octavo import refused, run, terminal
from tiny_folder import make_tiny_folder

MIB = 1 << 20
# Tensors of 10 MB, as many as are needed to tell one from all of them.
LIMIT = 60 * MIB  # six of them
LARGE = ModelArgs(1024, 1, 64, 5120, 16, 4, 5120, moe=MoEArgs(8, 2))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few MB, with a tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return make_tiny_folder(folder, dim=64, head_dim=16, hidden_dim=128, n_layers=4)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """276 MB of bfloat16, fused as transformers 5 saves it: the largest tensor on disk is of 168 MB."""
    folder = tmp_path_factory.mktemp("large") / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(1 << 20, generator=generator).mul_(0.02).bfloat16()  # quicker to repeat than to make
    tensors = {
        s.name: few.expand(80, -1).flatten()[: numel(s.shape)].view(s.shape).clone()
        for s in stored_tensors(HF_FUSED, LARGE)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LARGE.to_hf()))
    return folder


def numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


# ---------------------------------------- killed and interrupted


def test_killed_at_any_moment_it_goes_on(source: Path, tmp_path: Path) -> None:
    whole, target = tmp_path / "whole.gguf", tmp_path / "target.gguf"
    conversion = plan_conversion(source, target, to="gguf", dtype="q8_0")
    plan_conversion(source, whole, to="gguf", dtype="q8_0").run()
    rng = random.Random(0)
    done = 0
    for _ in range(3):
        process = start("convert", source, target, "--to", "gguf", "--dtype", "q8_0")
        wait_for_pieces(conversion.beside, done + rng.randrange(1, 30), process)
        process.kill()
        process.communicate()
        assert not target.exists()
        assert len(written(conversion.beside)) > done
        done = len(written(conversion.beside))
    assert run("convert", source, target, "--to", "gguf", "--dtype", "q8_0").out == f"{target}\n"
    assert target.read_bytes() == whole.read_bytes()
    assert not conversion.beside.exists()


def test_ctrl_c_on_a_pipe(large: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    process = start("convert", large, target, "--to", "mlx", "--dtype", "q4")
    wait_for_pieces(tmp_path / ".target.converting", 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert (
        err.strip()
        == f"interrupted; the same command goes on from here (what is written lies in {tmp_path}/.target.converting)"
    )
    assert not target.exists()
    assert len(written(tmp_path / ".target.converting")) >= 3


def test_ctrl_c_on_a_terminal_and_the_progress_bar(large: Path, tmp_path: Path) -> None:
    with terminal("convert", large, tmp_path / "target", "--to", "gguf", "--dtype", "q8_0") as screen:
        screen.resize(100)
        bar = ""
        while not re.search(r"<\d\d:\d\d", bar):
            bar = screen.wait_for("B/s]")
        assert re.search(r"target: +\d+%\|.*\| [\d.]+M/14\dM \[\d\d:\d\d<\d\d:\d\d, +[\d.]+MB/s\]", bar), bar
        screen.type("\x03")
        until = screen.wait_for("interrupted; the same command goes on from here")
        assert not until.split("\r")[-2].strip()  # the bar's line is cleared
        assert screen.wait() == 130
    assert not (tmp_path / "target").exists()
    assert written(tmp_path / ".target.converting")


def test_the_bar_is_gone_in_the_end(source: Path, tmp_path: Path) -> None:
    with terminal("convert", source, tmp_path / "target", "--to", "mistral") as screen:
        screen.resize(100)
        assert screen.wait() == 0
    *bars, blank, last = screen.seen.removesuffix("\r\n").split("\r")
    assert any("target:   0%|" in bar for bar in bars)
    assert (blank.strip(), last) == ("", f"{tmp_path}/target")


def test_pipes_get_the_target_and_nothing_else(source: Path, tmp_path: Path) -> None:
    out, err = start("convert", source, "target", "--to", "mistral", cwd=tmp_path).communicate(timeout=120)
    assert (out, err) == ("target\n", "")
    load_model(tmp_path / "target")


# ---------------------------------------- what it says


@pytest.mark.parametrize("options", [("hf",), ("hf", "float16"), ("mistral",), ("mlx", "q8"), ("gguf", "q4_0")])
def test_a_dry_run_writes_nothing_and_tells_all(options: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    to, *dtype = options
    arguments = ["convert", source, tmp_path / "a" / "target", "--to", to, *(["--dtype", *dtype] if dtype else [])]
    dry, told = run(*arguments, "--dry-run"), run(*arguments, "--dry-run", "--json")
    assert not list(tmp_path.iterdir())
    done = run(*arguments, "--json")
    assert (done.code, done.err) == (0, "")
    assert (told.code, told.out, told.err) == (0, done.out, "")
    summary = json.loads(done.out)
    sizes = {name: len(data) for name, data in contents(tmp_path / "a" / "target").items()}
    assert {file["name"]: file["bytes"] for file in summary["files"]} == sizes
    assert summary["bytes"] == sum(sizes.values())
    assert (summary["source"], summary["layout"], summary["target"]) == (str(source), "hf", f"{tmp_path}/a/target")
    listed = dict(line.split("\t")[:2] for line in dry.out.splitlines())
    assert {name: int(size) for name, size in listed.items()} == sizes
    assert f"{sum(sizes.values()):,} bytes" in dry.err


def test_a_dry_run_counts_tensors_by_their_encoding(source: Path, tmp_path: Path) -> None:
    dry = run("convert", source, tmp_path / "target", "--to", "gguf", "--dtype", "q4_0", "--dry-run")
    name, _, kinds = dry.out.splitlines()[0].split("\t")
    stored = 3 + 4 * 10
    assert (name, kinds) == ("model.gguf", f"13 F32, {stored - 13} Q4_0")  # norms and routers stay


def test_menny_is_a_source(tmp_path: Path) -> None:
    done = run("convert", "menny", tmp_path / "menny.gguf", "--to", "gguf", "--dry-run", "--json")
    assert done.code == 0
    assert json.loads(done.out)["layout"] == "hf"


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_bad_input_is_one_line_and_a_hint(dry: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    refused(run("convert", source, source, "--to", "hf", *dry), str(source), "exists already")
    refused(run("convert", tmp_path / "x", target, "--to", "hf", *dry), "no such folder")
    refused(
        run("convert", source, target, "--to", "hf", "--dtype", "Q4_0", *dry), "'q4_0'", "float32, bfloat16, float16"
    )
    refused(run("convert", source, tmp_path / "a.gguf", "--to", "hf", *dry), "only --to gguf")
    (tmp_path / "empty").mkdir()
    refused(run("convert", tmp_path / "empty", target, "--to", "hf", *dry), "holds neither")
    assert run("convert", source, target, "--to", "onnx", *dry).code == 2
    assert run("convert", source, target, *dry).code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_unfinished_conversion_of_something_else_is_one_line_and_a_hint(source: Path, tmp_path: Path) -> None:
    beside = tmp_path / ".my target.converting"
    (beside / "files").mkdir(parents=True)
    (beside / JOURNAL).write_text('\n{"conversion": "of something else"}')
    done = run("convert", source, tmp_path / "my target", "--to", "hf")
    refused(done, str(beside), "unfinished conversion", hint=f"rm -r '{beside}'")
    assert (beside / JOURNAL).exists()


# ---------------------------------------- from the Hub


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_repository_is_streamed_and_not_kept(source: Path, tmp_path: Path) -> None:
    """Killed on the way: what is written is not fetched again."""
    plan_conversion(source, tmp_path / "shards", to="hf", shard_bytes=1_000_000).run()
    weights = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.safetensors"))
    shards = len(list((tmp_path / "shards").glob("*.safetensors")))
    headers = 2 * shards * 65_536  # of either run
    target, home = tmp_path / "target", tmp_path / "home"
    with HubServer({"org/tiny": tmp_path / "shards"}) as hub:
        env = hub.environment(home)
        process = start("convert", "org/tiny", target, "--to", "mistral", env=env)
        wait_for_pieces(tmp_path / ".target.converting", 60, process)
        process.kill()
        process.communicate()
        assert hub.sent("*.safetensors") < weights
        out, err = start("convert", "org/tiny", target, "--to", "mistral", env=env).communicate(timeout=120)
        assert (out, err) == (f"{target}\n", "")
        assert weights <= hub.sent("*.safetensors") <= weights + headers + 100_000  # one tensor was under way
    assert size_of(home) < 200_000
    plan_conversion(tmp_path / "shards", tmp_path / "whole", to="mistral").run()
    assert contents(target) == contents(tmp_path / "whole")


# ---------------------------------------- memory


@pytest.fixture(scope="module")
def plain(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tensor per expert."""
    target = tmp_path_factory.mktemp("plain") / "model"
    plan_conversion(large, target, to="hf").run()
    return target


WAYS = {
    "mistral": {"to": "mistral"},
    "mlx": {"to": "mlx"},
    "mlx q4": {"to": "mlx", "dtype": "q4"},
    "gguf": {"to": "gguf"},
    "gguf q8_0": {"to": "gguf", "dtype": "q8_0"},
}


@pytest.mark.parametrize("way", WAYS)
def test_memory_is_that_of_a_few_tensors(way: str, plain: Path, tmp_path: Path) -> None:
    assert measured(plain, tmp_path, WAYS[way]) < LIMIT


@pytest.mark.parametrize("kind", ["fused", "gguf", "pth", "npz"])
def test_memory_is_that_of_a_few_tensors_from_every_kind_of_file(
    kind: str, large: Path, plain: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    if kind == "fused":
        folder = large
    elif kind == "gguf":
        plan_conversion(plain, folder, to="gguf").run()
    else:
        checkpoint = open_checkpoint(plain)
        folder.mkdir()
        (folder / "params.json").write_text(json.dumps(LARGE.to_params()))
        state = {name: checkpoint.read(name) for name in checkpoint}
        if kind == "pth":
            torch.save(state, folder / "consolidated.00.pth")
        else:
            import numpy as np

            np.savez(folder / "weights.npz", **{name: t.half().numpy() for name, t in state.items()})
    assert measured(folder, tmp_path, {"to": "hf"}) < LIMIT


def measured(source: Path, tmp_path: Path, options: dict[str, Any]) -> int:
    """Bytes above an idle process; the target is removed, as these are large."""
    code, peak = in_process(convert_and_measure, source, tmp_path / "target", options)
    assert code == 0
    assert (tmp_path / "target").exists()
    for path in (tmp_path / "target").iterdir():
        path.unlink()
    return int(peak)
