"""The weights of experts are what each layout's own reader gives, and those of a distant model cost their bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hub_server import HubServer, run_python
from layouts import CASES, make_sample
from moe_folders import assert_same, config_of, random_layers, tensors_of
from moe_peers import APART, DENSE_FIRST, EXPERTS, FUSED, PEERS, saver
from octavo.convert import plan_quantization
from octavo.errors import OptionError
from octavo.hub import find_moe
from octavo.llm import shipped_model
from octavo.routing.experts import (
    ExpertLayer,
    analyse_experts,
)
from octavo.routing.weights import open_weights
from run_octavo import run
from tiny_folder import make_tiny_folder

MATRICES = ("w1", "w2", "w3")


# ---------------------------------------- layouts and families


LAYOUTS = [
    "hf", "hf-fused", "hf-fp16-shards", "mistral-stacked", "mistral-pth", "mlx-npz", "mlx-npz-4-bit-g64",
    "mlx-lm-4-bit", "gguf-f32", "gguf-q8_0", "gguf-split", "gpt-fast", "gpt-fast-old", "gpt-fast-int8", "awq", "gptq",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tokenizer") / "tiny") / "tokenizer.model"


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_weights_that_its_own_reader_gives(name: str, tokenizer: Path, tmp_path: Path) -> None:
    case = CASES[name]
    sample = make_sample(tokenizer, **dict(case.changes))
    state = case.write(sample, tmp_path)
    weights = open_weights(tmp_path)
    assert sample.args.moe is not None
    assert (weights.n_layers, weights.n_experts, weights.top_k) == (2, 8, 2)
    assert (weights.sparse_layers, weights.revision, weights.fetched) == ((0, 1), None, 0)
    for layer in range(2):
        torch.testing.assert_close(weights.router(layer), state[f"layers.{layer}.feed_forward.gate.weight"])
        for m in MATRICES:
            theirs = state[f"layers.{layer}.feed_forward.experts.5.{m}.weight"]
            torch.testing.assert_close(weights.expert(layer, 5, m).float(), theirs, atol=1e-3, rtol=1e-2)
    if name == "gguf-f32":
        (tmp_path / "hf").mkdir()
        CASES["hf"].write(sample, tmp_path / "hf")
        (theirs,) = analyse_experts(open_weights(tmp_path / "hf"), [1], neurons=64)
        (from_file,) = analyse_experts(open_weights(tmp_path / "a.gguf"), [1], neurons=64)
        assert_same(from_file, theirs)


def test_a_store_of_ours_gives_its_dequantised_weights(tmp_path: Path) -> None:
    plain = make_tiny_folder(tmp_path / "plain", dim=64, n_heads=8, hidden_dim=128)
    plan_quantization(plain, tmp_path / "store", bits="8").run()
    exact, store = open_weights(plain), open_weights(tmp_path / "store")
    assert store.n_experts == 8
    for m in MATRICES:
        ours, theirs = store.expert(1, 3, m).float(), exact.expert(1, 3, m).float()
        assert 0 < (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return saver(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", PEERS)
def test_every_family(family: str, saved: Callable[..., Path]) -> None:
    found: dict[str, ExpertLayer] = {}
    for way in (APART, FUSED):
        weights, moe = open_weights(saved(family, way)), find_moe(saved(family, way))
        assert (weights.n_layers, weights.n_experts, weights.top_k) == (moe.n_layers, EXPERTS, moe.top_k)
        assert weights.sparse_layers == ((1,) if family in DENSE_FIRST else (0, 1))
        for expert in range(EXPERTS):
            theirs = moe.get_experts_metadata(1, "all")[expert]
            assert all(torch.equal(weights.expert(1, expert, m), theirs[m].fetch()) for m in theirs)
        if family in DENSE_FIRST:
            with pytest.raises(OptionError, match="layer 0 is dense") as refusal:
                weights.router(0)
            assert refusal.value.hint == "the layers that have are 1"
        (found[way],) = analyse_experts(weights, [1])
    assert_same(found[APART], found[FUSED])


def test_the_shipped_model_has_a_name() -> None:
    by_name, by_path = open_weights("menny"), open_weights(shipped_model())
    assert (by_name.name, by_path.name) == ("menny", str(shipped_model()))
    assert torch.equal(by_name.router(4), by_path.router(4))
    assert by_name.experts_nbytes() == 5 * 8 * 3 * 256 * 256 * 2
    assert by_name.experts_nbytes([2]) == 8 * 3 * 256 * 256 * 2


# ---------------------------------------- on a Hub


FAR = """
import contextlib, io, json
from octavo.cli import main
def run(*args):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["routing", "experts", *args])
        except SystemExit as end:
            assert end.code == 0, err.getvalue()
    return [json.loads(out.getvalue()), err.getvalue().splitlines()]
"""
"""Runs the command in a process of its own, whose settings of the Hub are its own, and keeps what it says."""


def far(environment: Mapping[str, str], *runs: Sequence[str]) -> list[Any]:
    calls = ", ".join(f"run({', '.join(map(repr, args))})" for args in runs)
    return json.loads(run_python(f"{FAR}\nprint(json.dumps([{calls}]))", environment))


def test_routers_of_a_distant_mixtral_cost_their_bytes_and_headers(tmp_path: Path) -> None:
    """32 routers of Mixtral's own size in 19 shards; beside them experts of fewer neurons, 25 MB of them."""
    folder = tmp_path / "model"
    routers, layers = random_layers(15, 32, 8, 4, 4096)
    tensors = {name: t.bfloat16() for name, t in tensors_of(routers, layers).items()}
    folder.mkdir()
    names = list(tensors)
    shards = {name: f"model-{i * 19 // len(names):05}.safetensors" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in names if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "config.json").write_text(json.dumps(config_of(routers, layers)))
    size = {path.name: path.stat().st_size for path in folder.iterdir()}
    here = json.loads(run("routing", "experts", folder, "--routers", "--json").out)
    with HubServer({"org/far": folder}) as hub:
        environment = hub.environment(tmp_path / "home")
        ((told, (first, last)),) = far(environment, ("org/far", "--json"))
        beside = size["config.json"] + size["model.safetensors.index.json"]
        assert hub.sent("*.safetensors") <= (2 << 20) + 19 * 65_536
        assert hub.sent() <= (3 << 20) + beside + 19 * 65_536
        assert len([r for r in hub.requests if r.status == 206]) <= 32 + 19
        assert first == "org/far: routers only; the experts are 25 MB to fetch: --all, or some --layers"
        assert last == f"org/far@{hub.commit('org/far')[:8]}: {hub.sent():,} bytes were fetched"
        assert (told["routers"], told["experts"]) == (here["routers"], [])
        assert (told["model"], told["revision"]) == ("org/far", hub.commit("org/far"))

        hub.requests.clear()
        ((again, notes),) = far(environment, ("org/far", "--routers", "--json"))
        assert again == told
        assert notes == [f"org/far@{hub.commit('org/far')[:8]}: 0 bytes were fetched"]
        assert hub.sent() == 0


def test_a_distant_family(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("qwen3_moe")
    with HubServer({"org/qwen": folder}) as hub:
        environment = hub.environment(tmp_path / "home")
        (told, notes), by_layer = far(
            environment, ("org/qwen", "--all", "--json"), ("org/qwen", "--layers", "1", "--json")
        )
        assert notes[0] == "org/qwen: experts of 6.1 kB are to be fetched, unless they were before"
        assert by_layer == [told, [notes[0], f"org/qwen@{hub.commit('org/qwen')[:8]}: 0 bytes were fetched"]]
        assert notes[-1] == f"org/qwen@{hub.commit('org/qwen')[:8]}: {hub.sent():,} bytes were fetched"
    near = json.loads(run("routing", "experts", folder, "--json").out)
    assert told["experts"] == near["experts"]
    assert [one["layer"] for one in near["experts"]] == [1]
