"""`octavo quantize` as a person runs it: interrupted, on terminals and pipes, from the Hub; its memory."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from conversions import contents, convert_and_measure, in_process, start, wait_for_pieces, written
from hub_server import HubServer
from octavo.args import ModelArgs, MoEArgs
from octavo.checkpoint import open_checkpoint
from octavo.checkpoint.names import HF, canonical_shapes
from octavo.checkpoint.output import Plain, safetensors_files
from octavo.checkpoint.writer import write_file
from octavo.convert import plan_quantization
from run_octavo import Done, command, refused, run, terminal
from tiny_folder import make_tiny_folder

# Matrices of 10 MB in bfloat16, 30 MB an expert; 200 MB of them.
LIMIT = 60 << 20
LARGE = ModelArgs(1024, 1, 64, 5120, 16, 4, 512, moe=MoEArgs(6, 2))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few MB, with a tokenizer."""
    return make_tiny_folder(
        tmp_path_factory.mktemp("source") / "model", dim=64, head_dim=16, hidden_dim=128, n_layers=4
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(1 << 20, generator=generator).mul_(0.02).bfloat16()  # quicker to repeat than to make
    shapes = canonical_shapes(LARGE)
    (file,) = safetensors_files(HF, LARGE, lambda stored: Plain(torch.bfloat16))
    write_file(
        folder / file.name,
        file,
        lambda name: few.expand(8, -1).flatten()[: torch.Size(shapes[name]).numel()].view(shapes[name]),
    )
    (folder / "config.json").write_text(json.dumps(LARGE.to_hf()))
    return folder


def of_preset(target: Path) -> dict[str, int]:
    """How many tensors have which encoding."""
    checkpoint = open_checkpoint(target)
    found = [checkpoint.info(name).encoding for name in checkpoint]
    return {encoding: found.count(encoding) for encoding in found}


# ---------------------------------------- what it does


@pytest.mark.parametrize(("bits", "experts", "others"), [("8", "q8", "q8"), ("3", "q3", "q4"), ("2", "q2", "q4")])
def test_it_writes_a_store(bits: str, experts: str, others: str, source: Path, tmp_path: Path) -> None:
    done = run("quantize", source, tmp_path / "store", "--bits", bits, "--method", "rtn")
    assert (done.code, done.out, done.err) == (0, f"{tmp_path}/store\n", "")
    counts = {"F32": 4 * 3 + 2, f"octavo {others}": 4 * 4 + 1}
    counts[f"octavo {experts}"] = counts.get(f"octavo {experts}", 0) + 4 * 24
    assert of_preset(tmp_path / "store") == counts
    open_checkpoint(tmp_path / "store").verify()
    listed = run("tensors", tmp_path / "store", "--layer", "1", "--expert", "3", "--verify")
    assert [line.split()[1:3] for line in listed.out.splitlines()] == [["octavo", experts]] * 3
    assert "every tensor has its checksum" in listed.err


def test_overrides(source: Path, tmp_path: Path) -> None:
    options = ["--override", "output.weight = q8", "--override", "layers.3.*.w?.weight=16", "--method", "rtn"]
    done = run("quantize", source, tmp_path / "store", "--bits", "4", *options)
    assert done.code == 0, done
    assert of_preset(tmp_path / "store") == {"F32": 14 + 28, "octavo q8": 1, "octavo q4": 3 * 28}


def test_menny_is_a_source(tmp_path: Path) -> None:
    done = run("quantize", "menny", tmp_path / "menny", "--bits", "2", "--method", "rtn", "--json")
    assert done.code == 0
    assert json.loads(done.out)["layout"] == "hf"
    assert (tmp_path / "menny" / "tokenizer.model").exists()


def test_a_dry_run_writes_nothing_and_tells_all(source: Path, tmp_path: Path) -> None:
    arguments = ["quantize", source, tmp_path / "a" / "store", "--bits", "3", "--method", "rtn"]
    dry, told = run(*arguments, "--dry-run"), run(*arguments, "--dry-run", "--json")
    assert not list(tmp_path.iterdir())
    done = run(*arguments, "--json")
    assert (done.code, done.err) == (0, "")
    assert (told.code, told.out, told.err) == (0, done.out, "")
    summary = json.loads(done.out)
    sizes = {name: len(data) for name, data in contents(tmp_path / "a" / "store").items()}
    assert {file["name"]: file["bytes"] for file in summary["files"]} == sizes
    assert summary["bytes"] == sum(sizes.values())
    assert dry.out.splitlines()[0].split("\t")[::2] == ["model.safetensors", "14 F32, 96 q3, 17 q4"]


# ---------------------------------------- interrupted


def test_ctrl_c_on_a_pipe_and_on_again(source: Path, tmp_path: Path) -> None:
    target, beside = tmp_path / "target", tmp_path / ".target.converting"
    process = start("quantize", source, target, "--bits", "2")
    wait_for_pieces(beside, 5, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert (
        err.strip() == f"interrupted; the same command goes on from here (what is written lies in {tmp_path}/.target"
        ".converting)"
    )
    assert len(written(beside)) >= 5
    assert not target.exists()
    refused(run("quantize", source, target, "--bits", "3"), "from another source or with other options", hint="rm -r")
    assert run("quantize", source, target, "--bits", "2") == Done(0, f"{target}\n", "")
    plan_quantization(source, tmp_path / "whole", bits=2).run()
    assert contents(target) == contents(tmp_path / "whole")


def test_the_progress_bar(source: Path, tmp_path: Path) -> None:
    with terminal("quantize", source, tmp_path / "target", "--bits", "4") as screen:
        screen.resize(100)
        assert screen.wait() == 0
    *bars, blank, last = screen.seen.removesuffix("\r\n").split("\r")
    assert any("target:   0%|" in bar for bar in bars)
    assert (blank.strip(), last) == ("", f"{tmp_path}/target")


# ---------------------------------------- what it refuses


def test_bad_input_is_one_line_and_a_hint(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    four = ("--bits", "4")
    refused(run("quantize", source, source, *four), str(source), "exists already")
    refused(run("quantize", tmp_path / "x", target, *four), "no such folder")
    refused(run("quantize", source, tmp_path / "a.gguf", *four), "only --to gguf")
    refused(run("quantize", source, target, *four, "--override", "output.weight"), "expected PATTERN=FORMAT")
    refused(run("quantize", source, target, *four, "--override", "=q4"), "expected PATTERN=FORMAT")
    refused(run("quantize", source, target, *four, "--override", "output.weight=q5"), "q5", "q8, q4, q3, q2")
    refused(run("quantize", source, target, *four, "--override", "outputs.weight=q4"), "outputs.weight")
    refused(run("quantize", source, target, *four, "--override", "norm.weight=q4"), "norm.weight")
    refused(run("quantize", source, target, *four, "--method", "best"), "'best'", "optimal, rtn")
    refused(run("convert", source, target, "--to", "octavo"), "'octavo'", hint="octavo quantize")
    (tmp_path / "empty").mkdir()
    refused(run("quantize", tmp_path / "empty", target, *four), "holds neither")
    for wrong in (("--bits", "5"), ("--bits", "16"), ()):
        done = run("quantize", source, target, *wrong)
        assert (done.code, done.out) == (2, "")
        assert "--bits" in done.err
    plan_quantization(source, tmp_path / "store", bits=4, method="rtn").run()
    refused(run("quantize", tmp_path / "store", target, "--bits", "2"), "is a store already", hint="octavo convert")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "store"}


def test_verifying_what_is_damaged_or_no_store(source: Path, tmp_path: Path) -> None:
    refused(run("tensors", source, "--verify"), "has no checksums", hint="octavo quantize")
    plan_quantization(source, tmp_path / "store", bits=4, method="rtn").run()
    weights = tmp_path / "store" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    last = open_checkpoint(tmp_path / "store").stored.names()[-1]
    refused(run("tensors", tmp_path / "store", "--verify"), str(weights), f"the bytes of '{last}' are not those")
    assert run("tensors", "fetch", tmp_path / "store", "norm.weight", "--verify").code == 2


# ---------------------------------------- far away, and large


def test_from_and_on_the_hub(source: Path, tmp_path: Path) -> None:
    """Quantised from there, and read from there: of a tensor's rows only their panels are fetched."""
    plan_quantization(source, tmp_path / "whole", bits=4, method="rtn", shard_bytes=500_000).run()
    script = (
        "from octavo.checkpoint import open_checkpoint\n"
        "store = open_checkpoint('org/store')\n"
        "print(store.layout_name, store.read('layers.2.feed_forward.experts.5.w1.weight', (20, 30)).flatten()[:4])\n"
    )
    with HubServer({"org/tiny": source, "org/store": tmp_path / "whole"}) as hub:
        env = hub.environment(tmp_path / "home", OMP_NUM_THREADS="1")
        out, err = start(
            "quantize", "org/tiny", tmp_path / "far", "--bits", "4", "--method", "rtn", env=env
        ).communicate()
        assert (out, err) == (f"{tmp_path}/far\n", "")
        before = hub.sent("*.safetensors")
        far = subprocess.run(
            [*command()[:1], "-c", script], env=env, capture_output=True, text=True, timeout=120, check=True
        )
        assert hub.sent("*.safetensors") - before < 200_000  # two headers
    near = open_checkpoint(tmp_path / "whole")
    expected = near.read("layers.2.feed_forward.experts.5.w1.weight", (20, 30)).flatten()[:4]
    assert far.stdout == f"octavo {expected}\n"
    plan_quantization(source, tmp_path / "near", bits=4, method="rtn").run()
    assert contents(tmp_path / "far") == contents(tmp_path / "near")


@pytest.mark.parametrize("options", [{"bits": 4, "method": "rtn"}, {"bits": 2}], ids=str)
def test_memory_is_that_of_one_expert(options: dict[str, Any], large: Path, tmp_path: Path) -> None:
    assert measured(large, tmp_path / "store", options) < LIMIT


def test_the_way_back_takes_no_more(large: Path, tmp_path: Path) -> None:
    plan_quantization(large, tmp_path / "store", bits=4, method="rtn").run()
    assert measured(tmp_path / "store", tmp_path / "plain", {"to": "hf"}) < LIMIT


def measured(source: Path, target: Path, options: dict[str, Any]) -> int:
    """Bytes above an idle process."""
    code, peak = in_process(convert_and_measure, source, target, options)
    assert code == 0
    assert target.exists()
    return int(peak)
