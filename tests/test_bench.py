"""`octavo bench`: every figure is there and possible, at every precision; what makes no sense is refused."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from conftest import tiny_args, tiny_model
from octavo import kernels
from octavo.args import MoEArgs
from octavo.bench import measure
from octavo.bench.measure import Bench, matrices
from octavo.bench.routing import Sticky, Traced, parse_routing, routed
from octavo.bench.synthetic import plan_synthetic, synthetic_model, synthetic_store
from octavo.cache import make_cache
from octavo.checkpoint import open_checkpoint
from octavo.errors import CheckpointError, OptionError
from octavo.experts.replay import placement_from_trace
from octavo.experts.trace import RoutingTrace, record
from octavo.llm import shipped_model
from octavo.load import build_model, load_model
from octavo.model import Mixtral
from octavo.plan import Placement, footprint_of, make_plan, weights_at
from octavo.shapes import SHAPES, shape
from run_octavo import command, refused, run
from test_trace import random_ids

needs_compiled = pytest.mark.skipif(
    not kernels.backend().compiled, reason="limits are measured by compiled kernels, and there are none here"
)
SMALL = ("--layers", "2", "--prompt", "20", "--decode", "9")
FIGURES = ("prefill_tok_s", "decode_tok_s", "bytes_per_token", "read_limit_gbs", "decode_fraction_of_limit")

MORE = ("dot_limit_gops", "prefill_fraction_of_limit", "peak_rss_bytes")


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits need not be exact here."""
    monkeypatch.setattr(measure, "DOT_SECONDS", 0.02)


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


def test_shapes_are_those_of_the_models() -> None:
    assert shape("mixtral-8x7b").n_params == 46_702_792_704
    assert json.loads((shipped_model() / "config.json").read_text()) | SHAPES["menny"].to_hf() == json.loads(
        (shipped_model() / "config.json").read_text()
    )


def test_what_makes_no_sense_is_refused() -> None:
    refused(run("bench"), "either --shape or --model")
    refused(run("bench", "--shape", "menny", "--model", "menny"), "either --shape or --model")
    refused(run("bench", "--model", "menny", "--layers", "2"), "--layers belongs to --shape")
    refused(run("bench", "--model", "menny", "--store", "there"), "--store belongs to --shape")
    refused(run("bench", "--shape", "gpt-9"), "shape is 'gpt-9'; expected one of mixtral-8x7b")
    refused(run("bench", "--shape", "menny", "--store", "there", "--bits", "16"), "--store is for low-bit weights")
    refused(
        run("bench", "--shape", "menny", "--prompt", "512"), "a context of 520; this model's is 512", hint="--prompt"
    )
    refused(run("bench", "--shape", "menny", *SMALL, "--memory", "much"), "'much' is no size")
    refused(run("bench", "--shape", "mixtral-8x7b", "--memory", "8GiB"), "has none on the disk", hint="--store DIR")


# ---------------------------------------- random weights


def test_synthetic_models_are_the_same_for_a_seed_and_keep_their_activations() -> None:
    ids = torch.arange(300, 340)[None]
    one, again, other = (synthetic_model(shape("menny"), 4, seed=seed)(ids) for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert 0.1 < one.std() < 10


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_store_has_the_weights_of_the_synthetic_model(bits: int, tmp_path: Path) -> None:
    args, ids = shape("menny", 2), torch.arange(300, 340)[None]
    synthetic_store(args, bits, tmp_path / "store")
    model, tokenizer = load_model(tmp_path / "store")  # which compares every checksum
    assert tokenizer is None
    assert model.args == args
    assert torch.equal(model(ids), synthetic_model(args, bits)(ids))
    assert 0.1 < model(ids).std() < 10


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("pieces", [1, 7, 20])
def test_an_interrupted_store_goes_on_and_ends_in_the_same_bytes(pieces: int, tmp_path: Path) -> None:
    args, made = tiny_args(), 0
    synthetic_store(args, 4, tmp_path / "whole")

    def interrupt(nbytes: int) -> None:
        nonlocal made
        made += 1
        if made > pieces:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic_store(args, 4, tmp_path / "store", interrupt)
    assert not (tmp_path / "store").exists()
    steps: list[int] = []
    synthetic_store(args, 4, tmp_path / "store", steps.append)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert sum(steps) == sum(map(len, contents(tmp_path / "whole").values()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "whole"]
    whole: list[int] = []
    synthetic_store(args, 4, tmp_path / "another", whole.append)
    assert len(steps) == len(whole) - pieces  # those that were there come as one number with the header


def test_a_store_that_is_there_is_left_alone(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()  # an empty folder is as good as none
    synthetic_store(tiny_args(), 4, store)
    before = [(path, path.stat().st_mtime_ns) for path in store.iterdir()]
    assert plan_synthetic(tiny_args(), 4, store) is None
    synthetic_store(tiny_args(), 4, store)
    assert [(path, path.stat().st_mtime_ns) for path in store.iterdir()] == before


@pytest.mark.parametrize("what", ["bits", "layers", "width", "cut", "model", "text", "file"])
def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_is(what: str, tmp_path: Path) -> None:
    store, args, bits = tmp_path / "store", tiny_args(), 4
    synthetic_store(args, bits, store)
    words = "holds something else"
    if what == "bits":
        bits = 3
    elif what == "layers":
        args = tiny_args(n_layers=3)
    elif what == "width":
        args = tiny_args(hidden_dim=64)
    elif what == "cut":
        os.truncate(store / "model.safetensors", (store / "model.safetensors").stat().st_size - 1)
        words = "is no store of random weights"
    elif what == "model":
        shutil.rmtree(store)
        shutil.copytree(shipped_model(), store)
    elif what == "text":
        shutil.rmtree(store)
        store.mkdir()
        (store / "thesis.txt").write_text("all of it")
        words = "is no store of random weights"
    else:
        shutil.rmtree(store)
        store.write_text("a file")
        words = "is no store of random weights"
    before = store.read_bytes() if store.is_file() else contents(store)
    with pytest.raises(CheckpointError, match=words) as error:
        synthetic_store(args, bits, store)
    assert str(store) in error.value.message
    assert "--store" in str(error.value.hint)
    assert before == (store.read_bytes() if store.is_file() else contents(store))


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    free = namedtuple("free", "total used free")(0, 0, 3_000_000_000)
    with mock.patch.object(shutil, "disk_usage", return_value=free):
        done = run("bench", "--shape", "mixtral-8x7b", "--layers", "4", "--store", tmp_path / "store")
    assert done.code == 1
    assert "error: " + str(tmp_path / "store") in done.err
    assert "3.4 GB are to be written, and 3.0 GB are free there" in done.err
    assert "hint: make room" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_becomes_full_leaves_what_goes_on(tmp_path: Path) -> None:
    real, written = os.pwrite, 0

    def full(handle: int, data: Any, begin: int) -> int:
        nonlocal written
        written += 1
        if written > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data, begin)

    with mock.patch.object(os, "pwrite", full), pytest.raises(CheckpointError, match="No space left") as error:
        synthetic_store(tiny_args(), 4, tmp_path / "store")
    assert "goes on where it stopped" in str(error.value.hint)
    steps: list[int] = []
    synthetic_store(tiny_args(), 4, tmp_path / "store", steps.append)
    synthetic_store(tiny_args(), 4, tmp_path / "whole")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert steps[0] > len((tmp_path / "whole" / "config.json").read_bytes())  # pieces that were there


# ---------------------------------------- routing


def chosen(choice: Any, tokens: int, layer: int = 0) -> list[set[int]]:
    ids, weights = choice(layer, tokens)
    assert torch.allclose(weights.sum(1), torch.ones(tokens))
    found = [set(of_token) for of_token in ids.tolist()]
    assert all(len(of_token) == ids.shape[1] for of_token in found)  # none twice
    return found


def test_even_routing_is_even_and_independent() -> None:
    args = tiny_args()
    found = chosen(parse_routing("uniform", args), 20_000)
    counts = np.bincount([expert for of_token in found for expert in of_token], minlength=8)
    assert np.allclose(counts / 20_000, 2 / 8, atol=0.02)
    kept = np.mean([len(a & b) / 2 for a, b in itertools.pairwise(found)])
    assert kept == pytest.approx(2 / 8, abs=0.02)
    assert found == chosen(parse_routing("uniform", args), 20_000)  # by its seed
    assert found != chosen(parse_routing("uniform", args, seed=1), 20_000)


@pytest.mark.parametrize("stay", [0, 0.25, 0.7, 1])
def test_experts_stay_as_often_as_is_said(stay: float) -> None:
    choice = Sticky(MoEArgs(8, 2), stay)
    one_by_one = [found for _ in range(3000) for found in chosen(choice, 1)]
    at_once = chosen(Sticky(MoEArgs(8, 2), stay), 10_000)
    for found in (one_by_one, at_once):
        kept = np.mean([len(a & b) / 2 for a, b in itertools.pairwise(found)])
        # Of those that do not stay, some are drawn again: 1 of 4 where both were dropped, 1 of 7 where one was.
        again = stay * (1 - stay) / 7 + (1 - stay) ** 2 / 4
        assert kept == pytest.approx(stay + again, abs=0.02)


def test_a_trace_is_followed_in_every_layer_and_begins_again() -> None:
    ids, weights = random_ids(5, 2, 2, 8), np.random.default_rng(0).random((5, 2, 2), dtype=np.float32)
    choice = Traced(RoutingTrace(ids, topk_weights=weights))
    for layer in (0, 1):
        parts = [choice(layer, tokens) for tokens in (3, 1, 4)]
        which = np.arange(8) % 5
        assert torch.cat([part[0] for part in parts]).tolist() == ids[which, layer].tolist()
        assert torch.cat([part[1] for part in parts]).tolist() == weights[which, layer].tolist()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("even", "--routing is 'even'; expected uniform, sticky:P"),
        ("uniform:1", "--routing is 'uniform:1'"),
        ("trace:", "--routing is 'trace:'"),
        ("sticky:", "expected a probability from 0 to 1"),
        ("sticky:1.1", "sticky:1.1: expected a probability"),
        ("sticky:nan", "sticky:nan: expected a probability"),
        ("trace:/nowhere/to.find", "/nowhere/to.find: No such file"),
    ],
)
def test_routing_that_makes_no_sense_is_refused(text: str, words: str) -> None:
    refused(run("bench", "--shape", "menny", *SMALL, "--routing", text), words)


def test_routing_of_another_model_is_refused(tmp_path: Path) -> None:
    RoutingTrace(random_ids(4, 3, 2, 8)).save(tmp_path / "trace")
    with pytest.raises(OptionError, match="of 3 layers and 2 experts"):
        parse_routing(f"trace:{tmp_path / 'trace'}", tiny_args())
    with pytest.raises(OptionError, match="this one is dense"):
        parse_routing("uniform", tiny_args(moe=None))


def run_steps(model: Mixtral, cache: bool) -> torch.Tensor:
    """Logits of a prompt and two steps."""
    ids_BT = torch.arange(2 * 8).view(2, 8) * 7 % model.args.vocab_size
    memory = make_cache(model.args, 2, dtype=model.dtype)
    if not cache:
        return model(ids_BT)
    return torch.cat([model(part, cache=memory) for part in (ids_BT[:, :6], ids_BT[:, 6:7], ids_BT[:, 7:])], dim=1)


@needs_compiled
@pytest.mark.usefixtures("own_kernels")
def test_compiled_blocks_take_what_a_hook_on_a_router_chooses() -> None:
    model = synthetic_model(tiny_args(), 4)
    same = RoutingTrace(np.tile(random_ids(1, 2, 2, 8), (16, 1, 1)))  # whatever the order of rows and steps is
    own = run_steps(model, cache=True)
    with routed(model, Traced(same)), record(model) as recording:
        compiled, apart = run_steps(model, cache=True), run_steps(model, cache=False)
    assert np.array_equal(recording.trace().topk_ids, np.tile(same.topk_ids, (2, 1, 1)))
    kernels.use("reference")
    with routed(model, Traced(same)):
        reference = run_steps(model, cache=True)
    effect = (compiled - own).norm()
    assert effect > 0.3 * own.norm()
    for other in (apart, reference):
        assert (compiled - other).norm() < 0.03 * effect


def test_routers_choose_again_afterwards() -> None:
    model, ids = tiny_model(), torch.tensor([[1, 2, 3]])
    own = model(ids)
    with routed(model, Sticky(MoEArgs(8, 2), 0)):
        assert not torch.equal(model(ids), own)
    assert torch.equal(model(ids), own)


# ---------------------------------------- streamed


def budget(layers: int, experts: int, batch: int = 1) -> int:
    """Bytes that hold so many of the experts of the small shape at 4 bits."""
    args = shape("menny", layers)
    weights = weights_at(args, 4)
    return footprint_of(args, weights, 80, batch, experts=experts * weights.expert).total


STREAMED = (
    "hits", "misses", "hit_rate", "replay_hits", "replay_hit_rate", "bytes_read_per_token", "wait_seconds_per_token",
    "disk_limit_gbs", "allowed_by_disk_tok_s", "decode_fraction_of_allowed", "prefill_cold_seconds",
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the small shape."""
    folder = tmp_path_factory.mktemp("bench") / "store"
    synthetic_store(shape("menny", 2), 4, folder)
    return folder


def measured(store: Path, experts: int, routing: str | None, batch: int = 1, decode: int = 25) -> dict[str, Any]:
    """What `octavo bench` measures; without its look at what this process has taken already."""
    args = shape("menny", 2)
    choice = None if routing is None else parse_routing(routing, args)
    plan = make_plan(args, budget(2, experts, batch=batch), 4, 80, batch)
    if isinstance(choice, Traced):
        plan = dataclasses.replace(plan, placement=placement_from_trace(choice.trace, plan))
    model = build_model(open_checkpoint(store), placement=plan.placement)
    return Bench(model, 30, decode, batch, plan, choice).run()


@needs_compiled
@pytest.mark.parametrize(
    ("routing", "batch"), [("uniform", 1), ("sticky:0.8", 1), (None, 1), ("uniform", 3), ("sticky:0.8", 3)]
)
def test_streamed_decoding_hits_as_often_as_its_replay(routing: str | None, batch: int, store: Path) -> None:
    found = measured(store, 8, routing, batch)
    assert all(found[key] is not None and found[key] >= 0 for key in (*FIGURES, *MORE, *STREAMED))
    assert found["hits"] > 0
    assert found["misses"] > 0
    assert found["replay_hits"] == found["hits"]
    assert found["hits"] + found["misses"] <= 25 * 2 * 2 * batch
    assert found["plan"]["slots"] == 4
    assert 0 < found["plan"]["share"] < found["replay_hit_rate"] < 1
    assert found["bytes_read_per_token"] > 0


@needs_compiled
def test_by_a_trace_experts_are_pinned(store: Path, tmp_path: Path) -> None:
    ids = random_ids(60, 2, 2, 8)
    ids[np.arange(60) % 10 != 0] = [2, 5]
    RoutingTrace(ids).save(tmp_path / "trace")
    found = measured(store, 9, f"trace:{tmp_path / 'trace'}")
    assert found["plan"]["pinned"] >= 2
    assert found["replay_hits"] == found["hits"]
    assert found["hit_rate"] > 0.8


@needs_compiled
def test_a_shape_within_a_budget_as_a_person_asks_for_it(store: Path, tmp_path: Path) -> None:
    options = ("--shape", "menny", "--layers", 2, "--memory", budget(2, 8), "--routing", "uniform")
    size = ("--prompt", 30, "--decode", 9, "--store", tmp_path / "new")
    # A process of its own: this one may have taken more than the budget already.
    done = subprocess.run(command("bench", *options, *size, "--json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "new") == contents(store)
    found = json.loads(done.stdout)
    assert set(STREAMED) < set(found)
    assert found["plan"]["budget"] == budget(2, 8)
    assert found["routing"] == "uniform"
    size = ("--prompt", 30, "--decode", 9)
    done = subprocess.run(command("bench", "--model", store, *options[4:], *size), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("prefill", "decode", "disk", "GB/s at most", "hit rate", "by the cache's rules", "predicted"):
        assert words in done.stdout


@needs_compiled
def test_a_budget_that_holds_everything_streams_nothing(store: Path) -> None:
    for more in ((), ("--store", store)):
        done = run("bench", "--shape", "menny", *SMALL, "--memory", "3GiB", *more, "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert all(found[key] > 0 for key in (*FIGURES, *MORE))
        assert found["plan"]["share"] == 1
        assert not set(STREAMED) & set(found)


@needs_compiled
def test_matrices_are_those_in_memory(store: Path) -> None:
    resident = build_model(open_checkpoint(store))
    streamed = build_model(open_checkpoint(store), placement=Placement(1 << 20, 4))
    linear = 4 * 2 + 1
    assert len(matrices(resident)) == linear + 2 * 8 * 3
    assert len(matrices(streamed)) == linear
