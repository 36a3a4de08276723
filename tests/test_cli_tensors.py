"""`octavo tensors`: listing and fetching, here and from a Hub."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hub_server import HubServer
from octavo.llm import shipped_model
from run_octavo import Done, command, refused, run
from tiny_folder import make_tiny_folder

ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.5."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of one shard a layer, with a header that is larger than its routers."""
    folder = make_tiny_folder(tmp_path_factory.mktemp("tensors") / "tiny", dim=64, n_heads=8, hidden_dim=512)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = re.search(r"layers\.(\d+)", name)
        shards.setdefault(f"model-{found[1] if found else 'ends'}.safetensors", {})[name] = tensor
    weights.unlink()
    for file, part in shards.items():
        save_file(part, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def names(done: Done) -> list[str]:
    assert done.code == 0, done.err
    return [line.split()[0] for line in done.out.splitlines()]


def run_far(environment: Mapping[str, str], *args: object) -> Done:
    done = subprocess.run(command(*args), env=environment, capture_output=True, text=True, timeout=120, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def test_a_line_has_name_encoding_shape_bytes_and_file(folder: Path) -> None:
    done = run("tensors", folder)
    tensors = all_tensors(folder)
    assert set(names(done)) == set(tensors)
    (line,) = [line for line in done.out.splitlines() if line.startswith(ROUTER)]
    assert line.split(maxsplit=1)[1].split() == ["F32", "[8,", "64]", "2,048", "model-1.safetensors"]
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert done.err == f"{folder}: {len(tensors)} tensors, {total:,} bytes\n"


def test_json_says_the_same(folder: Path) -> None:
    listed = json.loads(run("tensors", folder, "--json").out)
    assert [one["name"] for one in listed] == names(run("tensors", folder))
    (router,) = [one for one in listed if one["name"] == ROUTER]
    assert router == {
        "name": ROUTER,
        "dtype": "float32",
        "encoding": "F32",
        "shape": [8, 64],
        "bytes": 2048,
        "file": "model-1.safetensors",
    }


def test_layers_experts_and_routers_are_chosen_by_what_they_are(folder: Path) -> None:
    everything = names(run("tensors", folder))
    assert names(run("tensors", folder, "--layer", 1)) == [n for n in everything if ".layers.1." in n]
    assert names(run("tensors", folder, "--layer", 0, "--expert", 5)) == [
        f"{EXPERT}{w}.weight" for w in ("w1", "w2", "w3")
    ]
    assert len(names(run("tensors", folder, "--expert", 5))) == 6
    assert names(run("tensors", folder, "--router", "--layer", 1)) == [ROUTER]
    assert len(names(run("tensors", folder, "--router"))) == 2
    both = names(run("tensors", folder, "--router", "-e", 0, "-l", 1))
    assert ROUTER in both
    assert len(both) == 4


def test_stacked_experts_are_listed_as_what_holds_them(folder: Path, tmp_path: Path) -> None:
    stacked: dict[str, torch.Tensor] = {}
    tensors = all_tensors(folder)
    for layer in range(2):
        old, new = f"model.layers.{layer}.block_sparse_moe.", f"model.layers.{layer}.mlp."
        w1, w2, w3 = (
            torch.stack([tensors.pop(f"{old}experts.{e}.{w}.weight") for e in range(8)]) for w in ("w1", "w2", "w3")
        )
        stacked |= {f"{new}experts.gate_up_proj": torch.cat((w1, w3), 1), f"{new}experts.down_proj": w2}
        stacked[f"{new}gate.weight"] = tensors.pop(f"{old}gate.weight")
    save_file(tensors | stacked, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert names(run("tensors", tmp_path, "-e", 7, "-l", 0)) == [
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
    ]
    out = tmp_path / "one.safetensors"
    done = run("tensors", "fetch", tmp_path, "layers.0.feed_forward.experts.7.w3.weight", "-o", out)
    assert done.out == f"{out}\n"
    assert f"{512 * 64 * 4:,} bytes of model.safetensors" in done.err
    expected = all_tensors(folder)["model.layers.0.block_sparse_moe.experts.7.w3.weight"]
    assert torch.equal(load_file(out)["layers.0.feed_forward.experts.7.w3.weight"], expected)


def test_other_families_are_listed_too(tmp_path: Path) -> None:
    start = "model.layers.1.mlp."
    tensors = {
        f"{start}router.weight": torch.zeros(2, 64),
        f"{start}router.bias": torch.zeros(2),
        **{
            f"{start}experts.{name}_{part}": torch.zeros(2, rows, 2, *more, dtype=torch.uint8)
            for name, rows in (("gate_up_proj", 128), ("down_proj", 64))
            for part, more in (("blocks", (16,)), ("scales", ()))
        },
        f"{start}experts.down_proj_bias": torch.zeros(2, 64),
        "model.layers.0.mlp.router.weight": torch.zeros(2, 64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(names(run("tensors", tmp_path))) == len(tensors)
    assert names(run("tensors", tmp_path, "--router", "-l", 1)) == [f"{start}router.bias", f"{start}router.weight"]
    assert names(run("tensors", tmp_path, "-e", 1, "-l", 1)) == [
        f"{start}experts.{name}_proj_{part}" for name in ("down", "gate_up") for part in ("blocks", "scales")
    ]
    refused(run("tensors", tmp_path, "-e", 2), "has no expert 2", hint="there are 2: experts 0 to 1")
    config["model_type"] = "unheard_of"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(names(run("tensors", tmp_path, "-l", 0))) == 1
    refused(run("tensors", tmp_path, "--router"), "'unheard_of' is none of the known families")


def test_the_shipped_model_has_a_name() -> None:
    listed = names(run("tensors", "menny", "--router"))
    assert listed == names(run("tensors", shipped_model(), "--router"))
    assert listed


def test_what_is_not_there_is_said(folder: Path, tmp_path: Path) -> None:
    refused(run("tensors", folder, "--layer", 2), "has no layer 2", hint="there are 2: layers 0 to 1")
    refused(run("tensors", folder, "--layer", -1), "has no layer -1")
    refused(run("tensors", folder, "--expert", 8), "has no expert 8", hint="there are 8: experts 0 to 7")
    refused(run("tensors", tmp_path / "nowhere"), "no such folder")
    refused(run("tensors", "fetch", folder, "nonsense"), "'nonsense'", hint="octavo tensors")
    dense = make_tiny_folder(tmp_path / "dense" / "tiny", moe=None)
    refused(run("tensors", dense, "--router"), "no tensor is of what was asked for")
    refused(run("tensors", dense, "--expert", 0), "has no expert 0", hint="it has none")


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("one", "two"),
        ("one", "-o", "out"),
        ("fetch",),
        ("fetch", "one"),
        ("fetch", "one", "two", "three"),
        ("fetch", "one", "two", "--router"),
        ("fetch", "one", "two", "--layer", "0"),
        ("one", "--layer", "x"),
    ],
)
def test_command_lines_that_cannot_be_read(args: tuple[str, ...]) -> None:
    done = run("tensors", *args)
    assert (done.code, done.out) == (2, "")


def test_fetch_writes_a_file_named_after_the_tensor(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # again, in its place
        done = run("tensors", "fetch", folder, ROUTER)
        assert (done.code, done.out) == (0, f"{ROUTER}.safetensors\n")
    assert done.err.splitlines() == [
        f"2,048 bytes of model-1.safetensors are to be fetched: {ROUTER}, F32 8x64",
        "written",
    ]
    assert [path.name for path in tmp_path.iterdir()] == [f"{ROUTER}.safetensors"]
    with safe_open(f"{ROUTER}.safetensors", "pt") as file:
        assert list(file.keys()) == [ROUTER]
        assert torch.equal(file.get_tensor(ROUTER), all_tensors(folder)[ROUTER])


def test_a_folder_called_fetch_can_be_given(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fetch").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert ROUTER in names(run("tensors", "./fetch"))
    assert run("tensors", "fetch", "fetch", ROUTER, "-o", "out").out == "out\n"


def test_fetch_leaves_the_model_and_half_files_alone(folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(run("tensors", "fetch", folder, ROUTER, "-o", folder / "model-1.safetensors"), "a file of the model itself")
    done = run("tensors", "fetch", folder, ROUTER, "-o", tmp_path / "nowhere" / "out")
    assert done.code == 1
    assert "could not be written" in done.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_a_distant_model_is_listed_without_its_weights(folder: Path, tmp_path: Path) -> None:
    size = {path.name: path.stat().st_size for path in folder.iterdir()}
    beside = size["config.json"] + size["model.safetensors.index.json"]
    with HubServer({"org/tiny": folder}) as hub:
        near = run("tensors", folder, "--layer", 1, "--router", "--json")
        environment = hub.environment(tmp_path / "home")
        far = run_far(environment, "tensors", "org/tiny", "--layer", 1, "--router", "--json")
        assert (far.code, far.out) == (0, near.out)
        told = re.search(r"; ([\d,]+) bytes were fetched", far.err)
        assert told is not None
        assert int(told[1].replace(",", "")) == hub.sent() <= beside + 65_536
        assert {r.file for r in hub.requests if r.status == 206} == {"model-1.safetensors"}

        out = tmp_path / "out.safetensors"
        hub.requests.clear()
        done = run_far(
            environment, "tensors", "fetch", "org/tiny", ROUTER, "-o", out, "--revision", hub.commit("org/tiny")
        )
        assert (done.code, done.out) == (0, f"{out}\n")
        assert "2,048 bytes of model-1.safetensors are to be fetched" in done.err
        assert "written; 2,048 bytes were fetched" in done.err
        assert hub.sent() == 2048
        assert torch.equal(load_file(out)[ROUTER], all_tensors(folder)[ROUTER])

        hub.requests.clear()
        listed = run_far(environment, "tensors", "org/tiny")
        assert set(names(listed)) == set(all_tensors(folder))
        assert hub.sent() <= 2 * 65_536  # the headers of the two other shards
