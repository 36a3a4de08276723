"""The naming table: every layout holds every tensor once, and its transforms undo themselves."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_args, tiny_model
from octavo.args import ModelArgs, MoEArgs
from octavo.checkpoint import open_checkpoint
from octavo.checkpoint.names import (
    DENSE_LAYOUTS,
    GPT_FAST,
    GPT_FAST_OLD,
    HALF_SPLIT,
    LAYOUTS,
    MISTRAL,
    MISTRAL_STACKED,
    SAME,
    TRANSPOSED,
    Layout,
    canonical_shapes,
    recognise,
    stored_tensors,
)
from octavo.errors import CheckpointError, ConfigError

ALL = (*LAYOUTS, *DENSE_LAYOUTS)


@st.composite
def shapes_of_models(draw: st.DrawFn, *, sparse: bool) -> ModelArgs:
    experts = draw(st.integers(1, 5))
    n_kv_heads = draw(st.integers(1, 3))
    return tiny_args(
        dim=draw(st.integers(1, 9)),
        n_layers=draw(st.integers(1, 3)),
        head_dim=2 * draw(st.integers(1, 3)),
        hidden_dim=draw(st.integers(1, 9)),
        n_heads=n_kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=n_kv_heads,
        vocab_size=draw(st.integers(1, 9)),
        tie_embeddings=draw(st.booleans()),
        moe=MoEArgs(experts, draw(st.integers(1, experts))) if sparse else None,
    )


def model_shapes(layout: Layout) -> st.SearchStrategy[ModelArgs]:
    return shapes_of_models(sparse=layout in LAYOUTS)


def test_canonical_names_and_shapes_are_the_module_tree_s() -> None:
    for changes in ({}, {"moe": None}, {"tie_embeddings": True}, {"moe": MoEArgs(1, 1), "n_layers": 1}):
        model = tiny_model(**changes)
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert canonical_shapes(model.args) == expected


@pytest.mark.parametrize("layout", ALL, ids=lambda layout: layout.name)
@given(data=st.data())
def test_every_tensor_has_one_place(layout: Layout, data: st.DataObject) -> None:
    args = data.draw(model_shapes(layout))
    stored = list(stored_tensors(layout, args))
    assert max(Counter(one.name for one in stored).values()) == 1
    shapes = canonical_shapes(args)
    assert sorted(part.canonical for one in stored for part in one.parts) == sorted(shapes)
    for one in stored:
        assert math.prod(one.shape) == sum(math.prod(part.shape) for part in one.parts)
        ends = [0, *(part.last for part in one.parts)]
        assert [part.first for part in one.parts] == ends[:-1], "rows of one part follow the other's"
        assert ends[-1] == (math.prod(one.shape[:-1]) if len(one.shape) > 1 else one.shape[0])
        for part in one.parts:
            assert part.shape == shapes[part.canonical]
            held = one.transform.stored_shape(part.shape)
            assert part.last - part.first == held[0]
            assert held[1:] == (one.shape[-1:] if len(part.shape) > 1 else ())


@pytest.mark.parametrize("transform", [SAME, HALF_SPLIT, TRANSPOSED], ids=lambda t: type(t).__name__)
@given(args=shapes_of_models(sparse=True))
def test_transforms_undo_themselves(transform: object, args: ModelArgs) -> None:
    tensor = torch.randperm(args.n_heads * args.head_dim * args.dim).view(-1, args.dim).float()
    written = transform.write(tensor, args)  # type: ignore[attr-defined]
    assert tuple(written.shape) == transform.stored_shape(tuple(tensor.shape))  # type: ignore[attr-defined]
    assert torch.equal(transform.read(written, args), tensor)  # type: ignore[attr-defined]
    if transform.by_row:  # type: ignore[attr-defined]
        assert torch.equal(written, tensor)


def test_rotary_pairs_go_half_a_head_apart() -> None:
    args = tiny_args(dim=1, head_dim=6, n_heads=2)
    heads = torch.tensor([0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15])[:, None]
    assert HALF_SPLIT.write(heads, args).flatten().tolist() == [0, 2, 4, 1, 3, 5, 10, 12, 14, 11, 13, 15]


@pytest.mark.parametrize("layout", ALL, ids=lambda layout: layout.name)
@given(data=st.data())
def test_a_layout_is_told_by_its_names(layout: Layout, data: st.DataObject) -> None:
    """But where w2 is square, nothing tells gpt-fast's older files from its newer ones."""
    args = data.draw(model_shapes(layout))
    stored = {one.name: one.shape for one in stored_tensors(layout, args)}
    found = recognise(stored.keys(), args, stored.__getitem__)
    old = layout is GPT_FAST_OLD and args.hidden_dim == args.dim
    assert found is (GPT_FAST if old else layout)


def test_names_of_nothing_known_are_no_layout() -> None:
    assert recognise({"transformer.h.0.attn.c_attn.weight"}, tiny_args()) is None
    assert recognise(set(), tiny_args()) is None


def test_mixtral_8x7b_is_known_by_its_counts() -> None:
    """FORMATS: 995 tensors of Hugging Face and old GGUF, 323 of GGUF with merged experts."""
    args = ModelArgs(4096, 32, 128, 14336, 32, 8, 32000, moe=MoEArgs(8, 2))
    counts = {layout.name: len(list(stored_tensors(layout, args))) for layout in LAYOUTS}
    assert (counts["hf"], counts["gguf-split"], counts["gguf"]) == (995, 995, 323)
    by_name = {one.name: one.shape for one in stored_tensors(MISTRAL_STACKED, args)}
    assert by_name["layers.31.block_sparse_moe.w2"] == (8 * 14336, 4096)
    by_name = {one.name: one.shape for one in stored_tensors(GPT_FAST, args)}
    assert by_name["layers.0.attention.wqkv.weight"] == (6144, 4096)
    assert by_name["layers.0.block_sparse_moe.cond_ffn.w2"] == (8, 4096, 14336)


# ---------------------------------------- files of a real model's sizes, which hold nothing but holes


def write_hollow(folder: Path, args: ModelArgs) -> Path:
    """A safetensors file of the authors' names, all zeros, of which the disk keeps the header alone."""
    entries: dict[str, object] = {}
    end = 0
    for one in stored_tensors(MISTRAL, args):
        nbytes = 2 * math.prod(one.shape)
        entries[one.name] = {"dtype": "BF16", "shape": one.shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(entries).encode()
    path = folder / "consolidated.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + end)
        except OSError as error:
            pytest.skip(f"this file system keeps no files of {end / 1e9:.0f} GB with holes ({error})")
    return path


@pytest.mark.parametrize(
    "args",
    [
        ModelArgs(4096, 32, 128, 14336, 32, 8, 32000, moe=MoEArgs(8, 2)),
        ModelArgs(6144, 56, 128, 16384, 48, 8, 32768, max_seq_len=65536, moe=MoEArgs(8, 2)),
        ModelArgs(6144, 56, 128, 16384, 48, 8, 32000, max_seq_len=65536, moe=MoEArgs(8, 2)),
    ],
    ids=["8x7B", "8x22B-instruct", "8x22B"],
)
def test_the_published_models_need_no_configuration(args: ModelArgs, tmp_path: Path) -> None:
    write_hollow(tmp_path, args)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    assert checkpoint.args == args
    assert sum(checkpoint.info(name).nbytes for name in checkpoint) == 2 * args.n_params
    last = f"layers.{args.n_layers - 1}.feed_forward.experts.7.w2.weight"
    assert checkpoint.read(last, (args.dim - 1, args.dim)).shape == (1, args.hidden_dim)


def test_other_sizes_need_one(tmp_path: Path) -> None:
    write_hollow(tmp_path, tiny_args())
    with pytest.raises(ConfigError, match="no published Mixtral's sizes") as error:
        open_checkpoint(tmp_path).check()
    assert "params.json" in str(error.value.hint)


def test_of_another_family_the_names_on_disk_are_all_there_is(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"h.0.attn.weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.layout_name, list(checkpoint)) == ("unknown", ["h.0.attn.weight"])
    assert checkpoint.read("h.0.attn.weight", (1, 2)).tolist() == [[1, 1, 1]]
    with pytest.raises(ConfigError, match="model_type is 'gpt2'"):
        checkpoint.check()
    with pytest.raises(CheckpointError, match="no tensor called 'norm"):
        checkpoint.read("norm.weight")
