"""Routers and experts by the tensor, as users of the published interface know them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hub_server import HubServer, run_python
from moe_peers import APART, EXPERTS, FUSED, HIDDEN, LAYERS, saver
from octavo.errors import CheckpointError, OptionError, UserError
from octavo.hub import BaseMoE, Mixtral8x7B, TensorMetadata, find_moe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return saver(tmp_path_factory.mktemp("families"))


class Tiny(BaseMoE):
    n_experts = EXPERTS
    n_layers = LAYERS
    expert_tensor_name_template = "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"
    router_tensor_name_template = "model.layers.{layer}.block_sparse_moe.gate.weight"


def test_a_subclass_of_five_attributes(saved: Callable[..., Path]) -> None:
    folder = saved("mixtral", APART, "10KB")
    tensors = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    class Mine(Tiny):
        model_id = str(folder)

    moe = Mine()
    assert moe.weight_map == weight_map
    assert BaseMoE.get_experts_metdata is BaseMoE.get_experts_metadata
    experts = moe.get_experts_metdata(layer=1)
    assert [one.tensor_name for one in experts] == [
        f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight" for expert in range(EXPERTS)
    ]
    router = moe.get_router_metadata(layer=1)
    assert router is not None
    name = "model.layers.1.block_sparse_moe.gate.weight"
    file = weight_map[name]
    assert repr(router) == (
        f"TensorMetadata(model_id={str(folder)!r}, tensor_name={name!r}, hf_filename={file!r}, local_path=None)"
    )
    assert router.revision is None
    assert (router.dtype, router.shape, router.nbytes) == (torch.float32, (EXPERTS, HIDDEN), EXPERTS * HIDDEN * 4)
    assert router.local_path is None
    path = router.download_file()
    assert path == router.local_path == str(folder / file)
    for one in (router, *experts):
        assert torch.equal(one.load(), tensors[one.tensor_name])
        assert torch.equal(one.fetch(), tensors[one.tensor_name])
        assert one.local_path == str(folder / one.hf_filename)


def test_the_published_mixtral_is_described_without_a_word_to_the_hub() -> None:
    moe = Mixtral8x7B()
    assert (moe.model_id, moe.n_experts, moe.n_layers) == ("mistralai/Mixtral-8x7B-v0.1", 8, 32)


def test_metadata_made_by_hand(saved: Callable[..., Path]) -> None:
    folder = saved("mixtral")
    name = "model.layers.0.block_sparse_moe.gate.weight"
    expected = load_file(folder / "model.safetensors")[name]
    made = TensorMetadata(str(folder), name, "model.safetensors")
    assert made == TensorMetadata(model_id=str(folder), tensor_name=name, hf_filename="model.safetensors")
    assert made.shape == (EXPERTS, HIDDEN)
    assert torch.equal(made.fetch(), expected)
    assert torch.equal(made.load(), expected)
    path = str(folder / "model.safetensors")
    assert torch.equal(TensorMetadata("org/nowhere", name, "model.safetensors", path).load(), expected)
    with pytest.raises(CheckpointError, match="no tensor called 'nonsense'"):
        TensorMetadata(str(folder), "nonsense", "model.safetensors").fetch()


def test_matrix_names_one_of_three_or_all(saved: Callable[..., Path]) -> None:
    moe = Tiny(saved("mixtral"))
    names = {which: moe.get_expert_metadata(0, 1, which).tensor_name for which in ("w1", "w2", "w3")}
    assert names == {w: f"model.layers.0.block_sparse_moe.experts.1.{w}.weight" for w in ("w1", "w2", "w3")}
    every = moe.get_experts_metadata(0, matrix="all")
    assert {which: one.tensor_name for which, one in every[1].items()} == names
    with pytest.raises(OptionError, match="'w4': expected w1, w2, w3 or all"):
        moe.get_experts_metadata(0, "w4")

    class Down(Tiny):
        expert_tensor_name_template = Tiny.expert_tensor_name_template.replace("w1", "w2")

    assert Down(saved("mixtral")).get_experts_metadata(0)[1].tensor_name == names["w2"]
    fused = Down(saved("mixtral", FUSED)).get_experts_metadata(0)[1]
    assert torch.equal(fused.fetch(), moe.get_expert_metadata(0, 1, "w2").fetch())


def test_a_template_of_no_family_names_itself_only(saved: Callable[..., Path]) -> None:
    class Ups(Tiny):
        expert_tensor_name_template = Tiny.expert_tensor_name_template.replace("w1", "w3")
        router_tensor_name_template = "model.layers.{layer}.input_layernorm.weight"

    moe = Ups(saved("mixtral"))
    assert moe.get_expert_metadata(1, 0).tensor_name == "model.layers.1.block_sparse_moe.experts.0.w3.weight"
    with pytest.raises(OptionError, match="template of no known family"):
        moe.get_experts_metadata(1, "w2")

    class Attention(Tiny):
        expert_tensor_name_template = "model.layers.{layer}.self_attn.q_proj.weight"

    with pytest.raises(OptionError, match=r"has no \{expert\}"):
        Attention(saved("mixtral")).get_experts_metadata(1)

    class Fused(Tiny):  # Phi's and gpt-oss's names are the same, and lie in other ways
        expert_tensor_name_template = "model.layers.{layer}.mlp.experts.gate_up_proj"
        router_tensor_name_template = "model.layers.{layer}.mlp.router.weight"

    with pytest.raises(CheckpointError, match="in different ways by different families"):
        Fused(saved("gpt_oss")).get_experts_metadata(1)

    class Nowhere(Tiny):
        router_tensor_name_template = "blocks.{layer}.router"

    with pytest.raises(CheckpointError, match=r"no tensor called 'blocks.\{layer\}.router'"):
        Nowhere(saved("mixtral")).get_router_metadata(0)


@pytest.mark.parametrize("layer", [-1, LAYERS, 31, True, "0"])
def test_a_layer_or_expert_out_of_range_is_said_as_such(layer: Any, saved: Callable[..., Path]) -> None:
    published = Mixtral8x7B(saved("mixtral"))  # 32 layers by its class, two by its tensors
    for moe in (Tiny(saved("mixtral")), published, find_moe(saved("mixtral", FUSED))):
        for ask in (moe.get_router_metadata, moe.get_experts_metadata, moe.layer_kind, moe.get_others_metadata):
            with pytest.raises(OptionError, match=f"layer {layer!r} is out of range") as refusal:
                ask(layer)
            assert refusal.value.hint == "there are 2: layers 0 to 1"
    with pytest.raises(OptionError, match="expert 4 is out of range") as refusal:
        Tiny(saved("mixtral")).get_expert_metadata(0, 4)
    assert refusal.value.hint == "there are 4: experts 0 to 3"


def test_a_class_with_other_counts_than_the_model_is_told(saved: Callable[..., Path]) -> None:
    class Fewer(Tiny):
        n_experts = 3

    class More(Tiny):
        n_experts = 5

    with pytest.raises(CheckpointError, match="more than 3 experts"):
        Fewer(saved("mixtral")).get_experts_metadata(0)
    with pytest.raises(CheckpointError, match=r"experts\.4\.w1\.weight"):
        More(saved("mixtral")).get_experts_metadata(0)


def test_folders_that_are_none(tmp_path: Path, saved: Callable[..., Path]) -> None:
    for folder, says in ((tmp_path / "nowhere", "No such file"), (tmp_path, "no safetensors weights")):
        with pytest.raises(CheckpointError, match=says):
            Tiny(folder).get_router_metadata(0)
    with pytest.raises(OptionError, match="which has no revision 'main'"):
        Tiny(saved("mixtral"), revision="main").get_router_metadata(0)
    with pytest.raises(UserError, match=r"config\.json"):
        find_moe(tmp_path)


# ---------------------------------------- on a Hub


def test_one_router_of_a_repository_costs_its_bytes(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Mixtral's own shape of index and shards, with shards far larger than what may be fetched of them."""
    folder = tmp_path / "big"
    folder.mkdir()
    weight_map: dict[str, str] = {}
    routers = {}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}.block_sparse_moe."
        routers[layer] = torch.randn(8, 256).bfloat16()
        part = {f"{start}gate.weight": routers[layer]}
        part |= {f"{start}experts.{e}.{w}.weight": torch.randn(256, 256) for e in range(8) for w in ("w1", "w2", "w3")}
        save_file(part, folder / f"model-{layer}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{layer}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    code = """
import hashlib, json
from octavo.hub import Mixtral8x7B, find_moe
def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(-1).view(__import__("torch").uint8).numpy().tobytes()).hexdigest()
moe = Mixtral8x7B(model_id="org/big", revision=REVISION)
router = moe.get_router_metadata(1)
before = [str(router.dtype), list(router.shape), router.nbytes, router.revision, router.local_path]
first = digest(router.fetch())
cost = moe.fetched
again = Mixtral8x7B(model_id="org/big", revision=REVISION)
second, free = digest(again.get_router_metadata(1).fetch()), again.fetched
found = find_moe("org/big", revision=REVISION)
expert = found.get_expert_metadata(0, 5, "w2")
loaded = digest(router.load()), router.local_path.endswith("model-1.safetensors")
print(json.dumps([before, first, cost, second, free, digest(expert.fetch()), found.fetched, loaded, repr(router)]))
"""
    with HubServer({"org/big": folder}) as hub:
        commit = hub.commit("org/big")
        printed = run_python(code.replace("REVISION", repr(commit)), hub.environment(tmp_path / "home"))
        sent = hub.sent()
    before, first, cost, second, free, expert, found_cost, loaded, shown = json.loads(printed)
    assert before == ["torch.bfloat16", [8, 256], 4096, commit, None]
    index = (folder / "model.safetensors.index.json").stat().st_size
    assert cost <= index + 65_536 + 4096
    assert free == 0
    assert first == second == digest(routers[1])
    assert expert == digest(
        load_file(folder / "model-0.safetensors")["model.layers.0.block_sparse_moe.experts.5.w2.weight"]
    )
    config_size = (folder / "config.json").stat().st_size
    assert found_cost <= config_size + 65_536 + 256 * 256 * 4
    assert loaded == [first, True]
    assert sent <= cost + found_cost + (folder / "model-1.safetensors").stat().st_size
    assert shown.startswith("TensorMetadata(model_id='org/big', tensor_name='model.layers.1.")


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
