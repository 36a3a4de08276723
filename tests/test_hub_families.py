"""The family table: experts as transformers saves them and computes with them, and configurations that do not fit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_peers import APART, DENSE_FIRST, EXPERTS, FUSED, HIDDEN, LAYERS, LOCAL, PEERS, copy_of, peer_model, saver
from octavo.errors import CheckpointError, ConfigError, OptionError
from octavo.hub import BaseMoE, Mixtral8x7B, find_moe
from octavo.hub.experts import LogicalTensor
from octavo.hub.families import FAMILIES, Matrix, family_of, read_counts
from octavo.storage.files import ByteFile
from octavo.storage.folder import LocalFolder
from octavo.storage.source import Rows, TensorInfo, TensorSource, matrix_shape, row_range


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return saver(tmp_path_factory.mktemp("families"))


class CountingFolder(LocalFolder):
    """Counts the bytes that are read of it, by file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, mapped=False)
        self.ranges: list[tuple[str, int, int]] = []

    def file(self, name: str) -> ByteFile:
        inner, ranges = super().file(name), self.ranges

        class Counted:
            name, location, size = inner.name, inner.location, inner.size

            def read(self, begin: int, end: int) -> Tensor:
                ranges.append((self.name, begin, end))
                return inner.read(begin, end)

        return Counted()


def counted(folder: Path) -> tuple[BaseMoE, CountingFolder]:
    moe, counting = find_moe(folder), CountingFolder(folder)
    moe.folder = counting
    del moe._source, moe.weight_map  # opened anew, in that folder
    return moe, counting


# ---------------------------------------- families


def peer_expert(family: str, experts: Any, x: Tensor, expert: int) -> Tensor:
    """What the peer's own module of experts makes of x [T, H], sent to one of them."""
    if family.startswith("llama4"):  # wants the rows of all experts, one after the other
        return experts(x.repeat(EXPERTS, 1)).view(EXPERTS, *x.shape)[expert]
    chosen = torch.full((len(x), 1), expert)
    return experts(x, chosen, torch.ones(len(x), 1)).view_as(x)


def logical_expert(family: str, w1: Tensor, w2: Tensor, w3: Tensor, x: Tensor) -> Tensor:
    gate, up = F.linear(x, w1), F.linear(x, w3)
    if family == "gpt_oss":
        return F.linear((up.clamp(-7, 7) + 1) * gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7)), w2)
    return F.linear(F.silu(gate) * up, w2)


@pytest.mark.parametrize("way", [APART, FUSED])
@pytest.mark.parametrize("family", PEERS)
def test_logical_experts_compute_what_the_peers_do(family: str, way: str, saved: Callable[..., Path]) -> None:
    peer = peer_model(family)
    moe = find_moe(saved(family, way))
    name, experts = [(n, m) for n, m in peer.named_modules() if n.endswith(".experts")][-1]
    block = peer.get_submodule(name.rpartition(".")[0])
    router = block.router if hasattr(block, "router") else block.gate
    router_weight = router.layer.weight if family == "dbrx" else router.weight

    metadata = moe.get_router_metadata(LAYERS - 1)
    assert metadata is not None
    assert torch.equal(metadata.fetch(), router_weight)
    assert metadata.shape == (EXPERTS, HIDDEN)
    x = torch.randn(3, HIDDEN)
    for expert, matrices in enumerate(moe.get_experts_metadata(LAYERS - 1, "all")):
        w1, w2, w3 = (matrices[which].fetch() for which in ("w1", "w2", "w3"))
        assert tuple(w1.shape) == matrices["w1"].shape == matrices["w3"].shape == tuple(w2.T.shape)
        ours = logical_expert(family, w1, w2, w3, x)
        torch.testing.assert_close(ours, peer_expert(family, experts, x, expert), rtol=1e-4, atol=1e-5)
        assert torch.equal(matrices["w2"].load(), w2)


@pytest.mark.parametrize("way", [APART, FUSED])
@pytest.mark.parametrize("family", PEERS)
def test_counts_and_kinds_come_from_the_configuration(family: str, way: str, saved: Callable[..., Path]) -> None:
    moe = find_moe(saved(family, way))
    assert (moe.n_layers, moe.n_experts, moe.top_k) == (LAYERS, EXPERTS, 1 if "llama" in family else 2)
    kinds = [moe.layer_kind(layer) for layer in range(LAYERS)]
    assert kinds == ["dense" if family in DENSE_FIRST else "sparse", "sparse"]
    if kinds[0] == "dense":
        assert moe.get_experts_metadata(0) == moe.get_experts_metadata(0, "all") == moe.get_others_metadata(0) == []
        assert moe.get_router_metadata(0) is None
        with pytest.raises(OptionError, match="layer 0 is dense"):
            moe.get_expert_metadata(0, 1)
    others = moe.get_others_metadata(1)
    assert len(others) == len(PEERS[family][2])
    for other, expected in zip(others, PEERS[family][2], strict=True):
        assert other.tensor_name.endswith(expected)
        assert other.fetch().shape == other.shape


def test_every_family_of_the_table_has_a_test() -> None:
    named = {family_of({"model_type": name}, "").name for name in PEERS}
    assert named == {family.name for family in FAMILIES}


def test_an_architecture_decides_where_a_model_type_is_shared() -> None:
    config = {"model_type": "minimax", "architectures": ["MiniMaxM2ForCausalLM"]}
    assert family_of(config, "").name == "MiniMax-M2"
    assert family_of({"model_type": "minimax"}, "").name == "MiniMax-Text-01"


@pytest.mark.parametrize("way", [APART, FUSED])
@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "dbrx", "gpt_oss", "llama4_text"])
def test_one_expert_costs_that_experts_bytes(family: str, way: str, saved: Callable[..., Path]) -> None:
    moe, folder = counted(saved(family, way))
    for which in ("w1", "w2", "w3"):
        metadata = moe.get_expert_metadata(1, 2, which)
        # Gate and up lie in turn or transposed in these two; either takes what holds both.
        share = 2 if which != "w2" and family in ("gpt_oss", "llama4_text") else 1
        assert metadata.nbytes == share * math.prod(metadata.shape) * 4
        folder.ranges.clear()
        metadata.fetch()
        assert sum(end - begin for _, begin, end in folder.ranges) == metadata.nbytes


def test_shards_may_part_an_expert_from_its_router(saved: Callable[..., Path]) -> None:
    moe, whole = (find_moe(saved("dbrx", APART, size)) for size in ("2KB", "5GB"))
    router = moe.get_router_metadata(0)
    expert, expected = (one.get_expert_metadata(0, 3, "w2") for one in (moe, whole))
    assert router is not None
    assert router.hf_filename != expert.hf_filename
    assert torch.equal(expert.load(), expected.fetch())


def write_mxfp4(folder: Path) -> dict[str, Tensor]:
    """gpt-oss as it is published: blocks and scales, here of all bytes and of all exponents that make sense."""
    torch.manual_seed(0)
    hidden = inner = 64
    tensors: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}.mlp."
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            blocks = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(100, 140, (EXPERTS, rows, columns // 32), dtype=torch.uint8)
            tensors |= {f"{start}experts.{name}_blocks": blocks, f"{start}experts.{name}_scales": scales}
            tensors[f"{start}experts.{name}_bias"] = torch.randn(EXPERTS, rows)
        tensors |= {f"{start}router.weight": torch.randn(EXPERTS, hidden), f"{start}router.bias": torch.randn(EXPERTS)}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = LOCAL | {"model_type": "gpt_oss", "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def test_mxfp4_is_what_the_peer_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = write_mxfp4(tmp_path)
    peer = {
        name: convert_moe_packed_tensors(
            tensors[f"model.layers.1.mlp.experts.{name}_blocks"], tensors[f"model.layers.1.mlp.experts.{name}_scales"]
        )
        for name in ("gate_up_proj", "down_proj")
    }
    moe, folder = counted(tmp_path)
    for expert, matrices in enumerate(moe.get_experts_metadata(1, "all")):
        gate_up = peer["gate_up_proj"][expert]
        expected = {"w1": gate_up[:, ::2].T, "w2": peer["down_proj"][expert].T, "w3": gate_up[:, 1::2].T}
        for which, metadata in matrices.items():
            assert (metadata.dtype, metadata.shape) == (torch.bfloat16, (64, 64))
            assert metadata.tensor_name.endswith("_proj_blocks")
            folder.ranges.clear()
            got = metadata.fetch()
            assert torch.equal(got, expected[which])
            assert torch.equal(metadata.load(), got)
            rows = 64 if which == "w2" else 128
            assert sum(e - b for _, b, e in folder.ranges) == metadata.nbytes == rows * (32 + 2)


def test_scaled_blocks_of_8_bits_are_what_the_peer_makes_of_them(saved: Callable[..., Path], tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    folder = copy_of(saved("deepseek_v3"), tmp_path / "fp8")
    tensors = load_file(folder / "model.safetensors")
    names = [name for name in tensors if re.search(r"\.experts\.\d+\.\w+\.weight", name)]
    for name in names:
        rows, columns = tensors[name].shape
        tensors[f"{name}_scale_inv"] = torch.rand(rows // 4, columns // 4) + 0.5
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    # Scales in another shard than what they scale.
    shards = {
        "model-1.safetensors": {n: t for n, t in tensors.items() if not n.endswith("_inv")},
        "model-2.safetensors": {n: t for n, t in tensors.items() if n.endswith("_inv")},
    }
    (folder / "model.safetensors").unlink()
    for file, part in shards.items():
        save_file(part, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    for expert, metadata in enumerate(find_moe(folder).get_experts_metadata(1, "w2")):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        peer = Fp8Dequantize(None)._dequantize_one(tensors[name], tensors[f"{name}_scale_inv"])
        assert torch.equal(metadata.fetch(), peer)
        assert torch.equal(metadata.load(), peer)
        assert metadata.dtype == peer.dtype == torch.float32
        assert metadata.nbytes == peer.numel() + peer.numel() // 16 * 4


def test_weights_that_could_only_be_misread_are_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(saved("mixtral"), tmp_path / "packed")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    for dtype in (torch.uint32, torch.float8_e4m3fn):
        save_file(tensors | {name: torch.zeros(24, 2, dtype=dtype)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="quantised in a way"):
            find_moe(folder).get_expert_metadata(0, 0).fetch()


def test_blocks_and_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tensors = write_mxfp4(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    for wrong in (
        tensors[name].transpose(0, 1).contiguous(),
        tensors[name].float(),
        tensors[name][:, :32].contiguous(),
    ):
        save_file(tensors | {name: wrong}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="down_proj_"):
            find_moe(tmp_path).get_expert_metadata(0, 1, "w2").fetch()


# ---------------------------------------- configuration against tensors


@pytest.mark.parametrize(
    ("family", "way", "config", "says"),
    [
        ("mixtral", APART, {"num_local_experts": 8}, "tells of 8 experts, .*experts.4.w1.weight is missing"),
        ("mixtral", APART, {"num_local_experts": 2}, "tells of 2 experts, .*experts.2.w1.weight is there"),
        ("mixtral", APART, {"num_hidden_layers": 3}, "tells of 3 layers, the tensors are of layers 0 to 1"),
        ("mixtral", APART, {"num_hidden_layers": 1}, "tells of 1 layers, the tensors are of layers 0 to 1"),
        ("mixtral", APART, {"model_type": "dbrx", "architectures": None}, "lacks n_layers"),
        ("mixtral", APART, {"model_type": "llama", "architectures": None}, "'llama' is none of the known families"),
        (
            "mixtral",
            APART,
            {"model_type": "granitemoe", "architectures": None},
            "no experts by the names of its family",
        ),
        ("mixtral", APART, {"num_local_experts": "8"}, "num_local_experts is '8'"),
        ("mixtral", APART, {"num_experts_per_tok": 5}, "make no sense"),
        ("mixtral", APART, {"num_hidden_layers": 10**9}, "make no sense"),
        ("qwen2_moe", FUSED, {"mlp_only_layers": []}, "layer 0 should be sparse, by its tensors it is dense"),
        ("deepseek_v3", FUSED, {"first_k_dense_replace": 0}, "layer 0 should be sparse"),
        ("olmoe", FUSED, {"first_k_dense_replace": 1}, "layer 0 should be dense"),
        ("olmoe", FUSED, {"mlp_only_layers": "all"}, "which layers have experts makes no sense"),
        ("olmoe", FUSED, {"mlp_only_layers": [0, 1]}, "no experts by the names of its family"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    family: str, way: str, config: Mapping[str, object], says: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=says) as refusal:
        find_moe(copy_of(saved(family, way), tmp_path / "changed", **config))
    assert refusal.value.hint


@pytest.mark.parametrize("family", ["mixtral", "dbrx"])
def test_a_wrong_number_of_stacked_experts_is_refused(family: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    ffn = {"moe_num_experts": 8, "moe_top_k": 2}
    config = {"ffn_config": ffn} if family == "dbrx" else {"num_local_experts": 8}
    moe = find_moe(copy_of(saved(family, FUSED), tmp_path / "changed", **config))
    with pytest.raises(CheckpointError, match="which 8 experts do not have"):
        moe.get_expert_metadata(0, 0, "w2").fetch()


def test_layers_that_predict_further_ahead_are_no_layers_of_the_model(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy_of(saved("glm4_moe"), tmp_path / "ahead", num_nextn_predict_layers=1)
    tensors = load_file(folder / "model.safetensors")
    ahead = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}
    save_file(tensors | ahead, folder / "model.safetensors")
    moe = find_moe(folder)
    assert moe.n_layers == 2
    with pytest.raises(OptionError, match="layer 2 is out of range"):
        moe.get_router_metadata(2)


def test_mistrals_own_names_are_a_mixtral(saved: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(saved("mixtral") / "model.safetensors")
    own = {
        name.removeprefix("model.").replace("block_sparse_moe", "feed_forward"): tensor
        for name, tensor in tensors.items()
        if "block_sparse_moe" in name
    }
    save_file(own, tmp_path / "consolidated.safetensors")
    params = {"dim": HIDDEN, "n_layers": LAYERS, "moe": {"num_experts": EXPERTS, "num_experts_per_tok": 2}}
    (tmp_path / "params.json").write_text(json.dumps(params))

    class Ours(Mixtral8x7B):
        n_experts, n_layers = EXPERTS, LAYERS

    for moe in (find_moe(tmp_path), Ours(tmp_path)):
        assert moe.n_experts == EXPERTS
        metadata = moe.get_expert_metadata(1, 3, "w3")
        assert (metadata.tensor_name, metadata.hf_filename) == (
            "layers.1.feed_forward.experts.3.w3.weight",
            "consolidated.safetensors",
        )
        assert torch.equal(metadata.fetch(), tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = (
    "architectures", "num_hidden_layers", "num_local_experts", "num_experts_per_tok", "first_k_dense_replace",
    "mlp_only_layers", "decoder_sparse_step", "moe_layer_freq", "moe_layers", "mlp_layer_types", "text_config",
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), JSON | st.integers(-3, 9)), st.sampled_from(list(PEERS)))
def test_no_configuration_raises_anything_else(config: dict[str, object], model_type: str) -> None:
    try:
        config["model_type"] = model_type
        counts = read_counts(family_of(config, "config.json"), config, "config.json")
    except ConfigError:
        return
    assert 0 < counts.top_k <= counts.n_experts
    assert set(counts.sparse) <= set(range(counts.n_layers))


class InMemory(TensorSource):
    location = "memory"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self.tensors[name]
        return TensorInfo(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes, "memory", "")

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        tensor = self.tensors[name]
        first, last = row_range(rows, tuple(tensor.shape), name)
        return tensor if rows is None else tensor.reshape(matrix_shape(tuple(tensor.shape)))[first:last]


SHAPES = st.lists(st.integers(0, 6), max_size=5)
MATRICES = [matrix for family in FAMILIES for layout in family.layouts for matrix in layout.matrices]


@given(st.sampled_from(MATRICES), SHAPES, SHAPES, SHAPES, st.integers(1, 4), st.booleans())
def test_no_shapes_raise_anything_else(
    matrix: Matrix, shape: list[int], scales: list[int], router: list[int], n_experts: int, scaled: bool
) -> None:
    tensors = {"router": torch.zeros(router)}
    name = matrix.stored(0, 0)
    if matrix.mxfp4:
        tensors |= {name: torch.zeros(shape, dtype=torch.uint8)}
        tensors |= {name.replace("_blocks", "_scales"): torch.zeros(scales, dtype=torch.uint8)}
    elif scaled:
        tensors |= {name: torch.zeros(shape).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.zeros(scales)}
    else:
        tensors |= {name: torch.zeros(shape)}
    tensor = LogicalTensor(InMemory(tensors), matrix, 0, 0, n_experts, "router")
    try:
        read = tensor.read()
    except CheckpointError:
        return
    assert tuple(read.shape) == tensor.shape
