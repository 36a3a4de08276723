"""`octavo bench`: every figure is there and possible, at every precision; what makes no sense is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from octavo import kernels
from octavo.bench.synthetic import synthetic_model, synthetic_store
from octavo.llm import shipped_model
from octavo.load import load_model
from octavo.shapes import SHAPES, shape
from run_octavo import refused, run

needs_compiled = pytest.mark.skipif(
    not kernels.backend().compiled, reason="limits are measured by compiled kernels, and there are none here"
)
SMALL = ("--layers", "2", "--prompt", "20", "--decode", "9")
FIGURES = ("prefill_tok_s", "decode_tok_s", "bytes_per_token", "read_limit_gbs", "decode_fraction_of_limit")
MORE = ("dot_limit_gops", "prefill_fraction_of_limit", "peak_rss_bytes")


@needs_compiled
@pytest.mark.parametrize("bits", ["16", "8", "4", "3", "2"])
@pytest.mark.parametrize("batch", ["1", "3"])
def test_a_shape_at_every_precision(bits: str, batch: str) -> None:
    done = run("bench", "--shape", "menny", *SMALL, "--bits", bits, "--batch", batch, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert all(found[key] > 0 for key in (*FIGURES, *MORE))
    assert found["backend"] == kernels.backend().name
    assert found["threads"] == kernels.threads()
    assert 0 < found["outside_kernels_fraction"] < 1


@needs_compiled
def test_a_token_reads_attention_head_and_two_experts() -> None:
    done = run("bench", "--shape", "menny", *SMALL, "--bits", "8", "--json")
    args = shape("menny", 2)
    weights = 2 * (args.attention_params + 2 * args.expert_params) + args.vocab_size * args.dim
    assert json.loads(done.out)["bytes_per_token"] == round(weights * 8.25 / 8)


@needs_compiled
def test_a_real_model_and_a_table_to_read() -> None:
    done = run("bench", "--model", shipped_model(), "--prompt", "20", "--decode", "4", "--bits", "4")
    assert done.code == 0, done.err
    assert "prefill" in done.out
    assert "outside the kernels" in done.out


def test_synthetic_models_are_the_same_for_a_seed_and_keep_their_activations() -> None:
    ids = torch.arange(300, 340)[None]
    one, again = (synthetic_model(shape("menny"), 4, seed=5)(ids) for _ in range(2))
    assert torch.equal(one, again)
    assert 0.1 < one.std() < 10


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_synthetic_stores_are_whole_and_keep_their_activations(bits: int, tmp_path: Path) -> None:
    args = shape("menny", 2)
    synthetic_store(args, bits, tmp_path / "store")
    model, tokenizer = load_model(tmp_path / "store")  # which compares every checksum
    assert tokenizer is None
    assert model.args == args
    assert 0.1 < model(torch.arange(300, 340)[None]).std() < 10


def test_shapes_are_those_of_the_models() -> None:
    assert shape("mixtral-8x7b").n_params == 46_702_792_704
    assert json.loads((shipped_model() / "config.json").read_text()) | SHAPES["menny"].to_hf() == json.loads(
        (shipped_model() / "config.json").read_text()
    )


def test_what_makes_no_sense_is_refused() -> None:
    refused(run("bench"), "either --shape or --model")
    refused(run("bench", "--shape", "menny", "--model", "menny"), "either --shape or --model")
    refused(run("bench", "--model", "menny", "--layers", "2"), "--layers belongs to --shape")
    refused(run("bench", "--shape", "gpt-9"), "shape is 'gpt-9'; expected one of mixtral-8x7b")
