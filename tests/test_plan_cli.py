"""`octavo plan`: the screen, the JSON, and that models are read by their headers alone."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hub_server import HubServer, run_python
from octavo import machine
from octavo.checkpoint import open_checkpoint
from octavo.cli import headers
from octavo.cli import plan as cli
from octavo.devices import DEVICES
from octavo.kernels import backend
from octavo.plan import PRECISIONS, footprint, make_plan, parse_size, weights_at
from octavo.quant.formats import FORMATS
from octavo.shapes import SHAPES
from run_octavo import command, refused, run
from stores import SIZES, header, make_source, quantise
from tiny_folder import make_tiny_folder

GIB = 2**30
MIXTRAL = SHAPES["mixtral-8x7b"]
LOW_BITS = (8, 4, 3, 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def source(home: Path) -> Path:
    return make_source(home)


@pytest.fixture(scope="module")
def store(home: Path, source: Path) -> Path:
    """Some experts in 8 bits, the others in 4."""
    quantise(source, home / "store", overrides={"layers.0.feed_forward.*.w?.weight": "q8", "output.weight": "16"})
    return home / "store"


def said(*args: object) -> dict[str, Any]:
    done = run("plan", *args, "--json")
    assert (done.code, done.err) == (0, "")
    found: dict[str, Any] = json.loads(done.out)
    return found


def data_bytes(folder: Path) -> int:
    """Of safetensors files, their headers left out."""
    return sum(path.stat().st_size - header(path)[1] for path in folder.glob("*.safetensors"))


def test_a_shape_on_one_screen() -> None:
    done = run("plan", "mixtral-8x7b", "--memory", "22GiB")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert len(lines) <= 24
    assert max(len(line) for line in lines if "octavo " not in line) <= 100  # commands are left whole
    assert "46,702,792,704 parameters, 12,879,925,248 active (2 of 8 experts, 32 layers)" in done.out
    rows = {row[1]: row for row in (re.split(r"\s{2,}", line) for line in lines) if len(row) == 8}
    assert [rows[p][-1] for p in ("float32", "16 bits", "8 bits", "4 bits", "3 bits", "2 bits")] == [
        "streams", "streams", "streams", "streams", "fits", "fits"
    ]  # fmt: skip
    assert rows["16 bits"][2:4] == ["93.4 GB", "537 MB"]
    plan = make_plan(MIXTRAL, 22 * GIB)
    said = f"{int(100 * plan.share)}% of every expert in memory ({plan.resident} experts' worth), the rest streamed"
    assert said in " ".join(done.out.split())
    assert 0.5 < plan.share < 1
    assert lines[-2:] == [
        "run      octavo quantize mistralai/Mixtral-8x7B-Instruct-v0.1 Mixtral-8x7B-Instruct-v0.1-4bit --bits 4",
        "         octavo chat --model Mixtral-8x7B-Instruct-v0.1-4bit --memory 22GiB",
    ]
    done = run("plan", "mixtral-8x7b", "--memory", "24GiB")
    assert "all 256 experts in memory, token embeddings read from disk" in " ".join(done.out.split())


def test_json_has_every_figure() -> None:
    found = said("mixtral-8x7b", "--memory", "24GiB", "--context", "8192", "--batch", "2")
    assert (found["parameters"], found["active_parameters"]) == (46_702_792_704, 12_879_925_248)
    assert (found["budget"], found["context"], found["batch"]) == (24 * GIB, 8192, 2)
    assert [row["bits"] for row in found["precisions"]] == list(PRECISIONS)
    for row in found["precisions"]:
        size = footprint(MIXTRAL, row["bits"], 8192, 2)
        assert row["weights"] == weights_at(MIXTRAL, row["bits"]).total
        assert (row["kv_cache"], row["workspace"], row["total"]) == (size.kv_cache, size.workspace, size.total)
    plan = make_plan(MIXTRAL, 24 * GIB, context=8192, batch=2)
    assert found["plan"]["total"] == plan.footprint.total <= 24 * GIB
    assert found["plan"]["resident_experts"] == plan.resident
    assert found["plan"]["streamed_experts"] == plan.streamed > 0
    assert found["plan"]["expert_share"] == plan.share
    assert plan.placement is not None
    assert found["plan"]["slots"] == plan.placement.slots
    ceilings, device = found["ceilings"], found["device"]
    assert ceilings["decode_tok_s_memory"] == 2 * device["read"] / plan.read_bytes
    assert ceilings["decode_tok_s_disk"] == 2 * device["disk"] / plan.disk_bytes
    assert ceilings["decode_tok_s"] == min(ceilings["decode_tok_s_memory"], ceilings["decode_tok_s_disk"])
    assert (found["obstacle"], found["instead"]) == (None, None)
    assert found["prepare"].startswith("octavo quantize ")
    assert found["command"].endswith("-4bit --memory 24GiB -o context=8192")


def test_what_streams_in_its_own_precision_needs_no_store() -> None:
    found = said("mixtral-8x22b", "--memory", "64GB", "--bits", "16")
    assert found["plan"]["expert_share"] < 1
    assert found["prepare"] is None
    assert found["command"].endswith("Mixtral-8x22B-Instruct-v0.1 --device cpu --memory 64GB")
    wide = said("mixtral-8x7b", "--memory", "64GB", "--bits", "32")
    assert wide["command"] is None
    assert "16 bits or fewer" in wide["obstacle"]
    assert wide["instead"].endswith("--bits 8 --memory 64GB")


@pytest.mark.skipif(not backend().compiled, reason="16 bits are streamed to compiled kernels")
@pytest.mark.parametrize(
    ("model", "bits"),
    [("store", None), *((model, bits) for model in ("source", "float32") for bits in ("32", "16", "4", None))],
)
def test_the_command_runs_where_experts_are_streamed(
    model: str, bits: str | None, home: Path, source: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to({"source": source, "store": store, "float32": home / "float32"}[model])
    line = ["link", *(["--bits", bits] if bits else []), "--context", "99"]
    # The budget of the lowest precision that is chosen, and less by what embeddings take: so experts are streamed.
    args = open_checkpoint(tmp_path / "link").args
    least = min(
        size["total"]
        for size in said(*line, "--memory", "1GB")["precisions"]
        if (size["bits"] in (16, 8, 4) if bits is None and model != "store" else size["bits"] == (bits and int(bits)))
    )
    found = said(*line, "--memory", least - 1 - 4 * args.vocab_size * args.dim)
    assert found["plan"]["total"] <= least - 1
    if bits == "32":
        assert found["command"] is None
        return
    assert found["plan"]["expert_share"] < 1
    if found["prepare"]:
        assert run(*found["prepare"].split()[1:]).code == 0
    assert (found["prepare"] is None) == (model == "store" or (model, bits) == ("source", "16"))
    done = run(*found["command"].split()[1:], "-o", "max_tokens=2", stdin=b"Hello")
    assert done.code == 0, done.err
    assert "the rest streamed from disk; KV cache for 99 tokens" in done.err
    assert done.out.endswith("\n")


@pytest.mark.parametrize("shape", ["mixtral-8x7b", "mixtral-8x22b", "mistral-7b"])
@pytest.mark.parametrize("device", [key for key in DEVICES if key != "this machine"])
def test_every_known_device(shape: str, device: str) -> None:
    lines = (done := run("plan", shape, "--device", device)).out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert len(lines) <= 24
    assert max(len(line) for line in lines if "octavo " not in line) <= 100
    found = said(shape, "--device", device)
    known = DEVICES[device]
    assert found["device"]["name"] == known.name
    assert found["budget"] == known.usable
    assert lines[-1].endswith(found["command"])
    assert ("--device cuda --gpu-memory " in found["command"]) == (known.kind == "cuda")
    assert known.source in " ".join(done.out.split())


def test_the_model_that_ships() -> None:
    found = said("menny", "--memory", "1GB")
    assert found["parameters"] == SHAPES["menny"].n_params
    assert (found["context"], found["plan"]["bits"]) == (512, 16)
    assert found["command"] == "octavo chat --model menny --dtype bfloat16 --device cpu --memory 1GB"
    found = said("menny", "--memory", "1GB", "--bits", "32")
    assert found["command"] == "octavo chat --model menny --device cpu --memory 1GB"
    found = said("menny", "--memory", "1GB", "--bits", "4")
    assert found["command"] == "octavo chat --model menny --bits 4 --dtype bfloat16 --memory 1GB"


def test_by_default_what_is_free() -> None:
    free = machine.free_memory()
    assert said("menny")["budget"] == pytest.approx(free, rel=0.5)
    assert "what is free" in run("plan", "menny").out
    assert "--memory" not in said("menny")["command"]
    if free < 100e9:  # what streams is told how much it may take
        found = said("mixtral-8x22b", "--bits", "16")
        budget = parse_size(found["command"].partition("--memory ")[2])
        assert found["budget"] - 10**8 < budget <= found["budget"]


def test_the_command_runs(source: Path, store: Path) -> None:
    """What is printed is taken by the command line, and by the model."""
    for model, bits in ((source, None), (source, "32"), (source, "4"), (store, None)):
        line = said(model, "--memory", "1GB", *(["--bits", bits] if bits else []))["command"]
        words = line.split()
        assert words[:2] == ["octavo", "chat"]
        done = run(*words[1:], "-o", "max_tokens=2", stdin=b"Hello")
        assert done.code == 0, done.err
        assert done.out.endswith("\n")


@pytest.mark.parametrize("bits", [str(bits) for bits in LOW_BITS])
@pytest.mark.parametrize("size", SIZES)
def test_a_store_is_counted_as_it_lies(tmp_path: Path, bits: str, size: str) -> None:
    source = make_source(tmp_path, **SIZES[size])
    checkpoint = quantise(source, tmp_path / "store", bits)
    found = said(tmp_path / "store", "--memory", "1GB")
    own, *others = found["precisions"]
    assert own["weights"] == data_bytes(tmp_path / "store")
    assert own["weights"] == next(row["weights"] for row in others if row["bits"] == int(bits))
    assert own["weights"] == weights_at(checkpoint.args, int(bits)).total
    assert found["plan"]["precision"].startswith("store, ")
    assert found["command"] == f"octavo chat --model {tmp_path / 'store'} --memory 1GB"


def test_a_store_of_several_formats(store: Path) -> None:
    found = said(store, "--memory", "1GB")
    assert found["plan"]["experts"] + found["plan"]["rest"] == data_bytes(store)
    expert = {bits: 2 * FORMATS[bits].nbytes(128, 64) + FORMATS[bits].nbytes(64, 128) for bits in ("q8", "q4")}
    assert found["plan"]["experts"] == 8 * expert["q8"] + 8 * expert["q4"]
    assert found["plan"]["expert_bytes"] == expert["q8"]  # a slot holds any of them
    tight = said(store, "--memory", found["plan"]["total"] - 1)
    assert tight["plan"]["streamed_experts"] > 0
    assert tight["plan"]["total"] < found["plan"]["total"]
    assert tight["instead"] is None
    refused(run("plan", store, "--bits", "4"), "its own precision", hint="leave the option out")


def test_headers_read_quickly_say_what_the_reader_of_all_layouts_says(source: Path, store: Path) -> None:
    for folder in (source, store):
        quick = headers._read_folder("x", folder)
        assert quick is not None
        assert quick == headers._open("x", str(folder))


def test_a_local_folder_and_other_layouts(source: Path, home: Path) -> None:
    found = said(source, "--memory", "1GB")
    row = next(row for row in found["precisions"] if row["bits"] == 16)
    assert row["weights"] == data_bytes(source)
    plain = home / "float32"
    assert said(plain, "--memory", "1GB")["command"].endswith(" --dtype bfloat16 --device cpu --memory 1GB")
    assert said(plain, "--memory", "1GB", "--bits", "4")["command"].endswith(" --bits 4 --dtype bfloat16 --memory 1GB")
    for target, to in (("mistral", "mistral"), ("model.gguf", "gguf")):
        assert run("convert", source, home / target, "--to", to).code == 0
        assert said(home / target, "--memory", "1GB")["precisions"] == found["precisions"]


def test_what_tells_the_shape_and_the_precision_is_what_the_loader_goes_by(
    source: Path, store: Path, home: Path
) -> None:
    """Mistral's own weights go with params.json, and a store is one by its headers."""
    assert run("convert", source, home / "both", "--to", "mistral").code == 0
    (home / "both" / "consolidated.safetensors").rename(home / "both" / "model.safetensors")
    (home / "both" / "config.json").write_bytes((source / "config.json").read_bytes())
    params = json.loads((home / "both" / "params.json").read_text())
    (home / "both" / "params.json").write_text(json.dumps(params | {"sliding_window": 16}))
    found = said(home / "both", "--memory", "1GB")
    assert (
        found["plan"]["kv_cache"] * said(source, "--memory", "1GB")["context"]
        == 16 * (said(source, "--memory", "1GB")["plan"]["kv_cache"])
    )
    (home / "bare").mkdir()
    for path in store.iterdir():
        (home / "bare" / path.name).write_bytes(path.read_bytes())
    config = json.loads((store / "config.json").read_text())
    del config["quantization_config"]
    (home / "bare" / "config.json").write_text(json.dumps(config))
    assert said(home / "bare", "--memory", "1GB")["precisions"] == said(store, "--memory", "1GB")["precisions"]


def test_a_dense_model(tmp_path: Path) -> None:
    folder = make_tiny_folder(tmp_path / "tiny", moe=None, sliding_window=16)
    found = said(folder, "--memory", "1GB")
    assert (found["plan"]["resident_experts"], found["plan"]["streamed_experts"], found["plan"]["experts"]) == (0, 0, 0)
    args = found["plan"]
    assert args["kv_cache"] == 2 * 2 * 2 * 8 * 16 * 2  # keys and values, layers, heads, numbers, slots, bytes
    assert "all in memory" in run("plan", folder, "--memory", "1GB").out
    refused(run("plan", "mistral-7b", "--memory", "2GB", "--bits", "8"), "too little", hint="--memory ")


def test_a_hub_id_is_read_by_its_headers(source: Path, store: Path, home: Path) -> None:
    with HubServer({"org/tiny": source, "org/store": store}) as hub:
        code = (
            "from octavo.cli import main\n"
            "for name in ('org/tiny', 'org/store'):\n"
            "    try: main(['plan', name, '--memory', '1GB', '--json'])\n"
            "    except SystemExit as end: assert not end.code\n"
        )
        printed = run_python(code, hub.environment(home / "hf"))
        assert 0 < hub.sent("*.safetensors") <= 2 * 65_536
    decoder = json.JSONDecoder()
    first, end = decoder.raw_decode(printed)
    second, _ = decoder.raw_decode(printed[end:].lstrip())
    near, near_store = said(source, "--memory", "1GB"), said(store, "--memory", "1GB")
    assert (first["precisions"], second["precisions"]) == (near["precisions"], near_store["precisions"])
    assert first["command"] == "octavo chat --model org/tiny --device cpu --memory 1GB"
    assert second["command"] == "octavo chat --model org/store --memory 1GB"


def test_what_is_refused(tmp_path: Path, source: Path) -> None:
    refused(run("plan", "mixtral-9x7b"), "mixtral-9x7b", "known shape", hint="mixtral-8x7b")
    refused(run("plan", "mixtral-8x7b", "--memory", "lots"), "'lots' is no size", hint="24GiB")
    refused(run("plan", "mixtral-8x7b", "--device", "RTX 9090"), "RTX 9090", hint="--memory")
    refused(run("plan", "mixtral-8x7b", "--context", "40000"), "40000", "32768", hint="--context 32768")
    refused(run("plan", "mixtral-8x7b", "--device", "h200", "--measure"), "H200", hint="leave one of them out")
    refused(run("plan", tmp_path), "holds neither", hint="reads")
    assert run("plan").code == 2
    done = run("plan", "mixtral-8x22b", "--memory", "3GB")
    refused(done, "too little", hint="the smallest that works")
    least = re.search(r"--memory (\d+)", done.err)
    assert least
    assert run("plan", "mixtral-8x22b", "--memory", least[1]).code == 0
    refused(run("plan", "mixtral-8x22b", "--memory", int(least[1]) - 1), "too little", hint=least[1])


@pytest.mark.parametrize("damage", ["config", "short", "header", "index", "none"])
def test_a_damaged_folder_is_refused_as_elsewhere(tmp_path: Path, source: Path, damage: str) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "config":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    elif damage == "short":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "header":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    elif damage == "index":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')
    else:
        weights.unlink()
    listed = run("plan", folder, "--memory", "1GB")
    refused(listed, str(folder))
    if damage != "config":  # which `octavo tensors` does not compare
        assert listed.err == run("tensors", folder).err


def test_the_gpu_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(run("plan", "mixtral-8x7b", "--device", "cuda"), "no NVIDIA GPU", hint="--device")
    script = tmp_path / "nvidia-smi"
    for name, mebibytes, read in (("NVIDIA H200", 143_000, 4800e9), ("Some, other GPU", 9000, None)):
        script.write_text(f"#!/bin/sh\necho '{name}, {mebibytes}'\n")
        script.chmod(0o755)
        found = said("mixtral-8x7b", "--device", "cuda", "--memory", "64GB")
        assert (found["device"]["name"], found["budget"]) == (name, mebibytes << 20)
        assert found["device"]["read"] == read
        assert (found["ceilings"]["decode_tok_s_memory"] is None) == (read is None)
        assert "--device cuda" in found["command"]
        assert "--gpu-memory" not in found["command"]  # what is free is taken anyway
    assert found["plan"]["streamed_experts"] > 0
    script.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    refused(run("plan", "mixtral-8x7b", "--device", "cuda"), "no NVIDIA GPU", hint="--device")


def test_unified_memory_here() -> None:
    found = said("menny", "--device", "metal-unified")
    assert found["budget"] == machine.physical_memory() * 3 // 4
    assert found["ceilings"]["decode_tok_s"] is None
    assert "unknown" in run("plan", "menny", "--device", "metal-unified").out


@pytest.mark.skipif(not backend().compiled, reason="memory is measured with compiled kernels")
def test_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "SAMPLE", 64 << 20)
    monkeypatch.setattr(cli, "SAMPLE", 128 << 20)
    monkeypatch.chdir(tmp_path)
    done = run("plan", "mixtral-8x7b", "--memory", "16GiB", "--measure", "--json")
    if done.code:
        refused(done, "cannot be measured")
        pytest.skip("this file system has no direct reads")
    found = json.loads(done.out)
    guess = DEVICES["this machine"]
    for key in ("read", "disk"):
        assert found["device"][key] != getattr(guess, key)
        assert 1e7 < found["device"][key] < 1e13
    assert "measured" in found["device"]["source"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["mixtral-8x7b", "menny", "source", "store"])
def test_answers_at_once_and_without_torch(model: str, source: Path, store: Path) -> None:
    model = {"source": str(source), "store": str(store)}.get(model, model)
    code = (
        "import sys\n"
        "from octavo.cli import main\n"
        f"try: main(['plan', {model!r}, '--memory', '24GiB'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules)), file=sys.stderr)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr == "[]\n"
    # By the processor's clock: on the wall's, other people's work counts too.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert (
        subprocess.run(command("plan", model, "--memory", "24GiB"), capture_output=True, text=True).stdout
        == done.stdout
    )
