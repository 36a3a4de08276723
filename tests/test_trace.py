"""Routing traces: kept and read again unchanged, recorded as the routers chose, and refused where they are none."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from conftest import tiny_args, tiny_model
from octavo.args import MoEArgs
from octavo.errors import CheckpointError, OptionError
from octavo.experts.trace import RoutingTrace, read_trace, record


def random_ids(tokens: int, layers: int, top_k: int, experts: int, seed: int = 0) -> Any:
    order = np.random.default_rng(seed).random((tokens, layers, experts)).argsort(axis=2)
    return order[:, :, :top_k].astype(np.int16)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 20),
    layers=st.integers(1, 4),
    top_k=st.integers(1, 4),
    extras=st.sets(st.sampled_from(["token_ids", "topk_weights"])),
)
def test_what_is_saved_is_read(
    tokens: int, layers: int, top_k: int, extras: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    ids = random_ids(tokens, layers, top_k, 8)
    more = {
        "token_ids": np.arange(tokens, dtype=np.int64),
        "topk_weights": np.random.default_rng(1).random(ids.shape, dtype=np.float32),
    }
    trace = RoutingTrace(ids, **{name: more[name] for name in extras})
    path = tmp_path_factory.mktemp("trace") / "a.safetensors"
    trace.save(path)
    found = read_trace(path)
    for name, array in vars(trace).items():
        there = getattr(found, name)
        assert (there is None) == (array is None)
        assert array is None or (there.dtype == array.dtype and np.array_equal(there, array))
    assert [one.name for one in path.parent.iterdir()] == ["a.safetensors"]


def test_an_older_trace_stays_where_a_new_one_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    RoutingTrace(IDS).save(path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a full disk, for files of this process
    try:
        with pytest.raises(CheckpointError, match=r"a\.safetensors: could not be written") as error:
            RoutingTrace(random_ids(5000, 1, 2, 8)).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.hint
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


IDS = random_ids(3, 2, 2, 8)
WRONG = {
    "another dtype": ({"topk_ids": IDS.astype(np.int64)}, "topk_ids is I64; expected I16"),
    "no layers": ({"topk_ids": IDS[:, 0]}, r"topk_ids is int16 \[3, 2\]; expected int16 \[tokens, layers, top_k\]"),
    "no tokens": ({"topk_ids": IDS[:0]}, r"topk_ids is int16 \[0, 2, 2\]"),
    "nothing of it": ({"ids": IDS}, "holds no topk_ids, which a routing trace has"),
    "negative": ({"topk_ids": np.array([[[0, 1]], [[-1, 2]]], np.int16)}, r"token 1 .* \[-1, 2\] in layer 0: .* negat"),
    "repeated": ({"topk_ids": np.array([[[0, 1], [5, 5]]], np.int16)}, r"token 0 .* \[5, 5\] in layer 1: .* repeated"),
    "other tokens": (
        {"topk_ids": IDS, "token_ids": np.zeros(4, np.int64)},
        r"token_ids is int64 \[4\]; expected int64 \[3\], as topk_ids",
    ),
    "ids of another dtype": ({"topk_ids": IDS, "token_ids": np.zeros(3, np.int32)}, "token_ids is I32; expected I64"),
    "other weights": (
        {"topk_ids": IDS, "topk_weights": np.zeros((3, 2, 1), np.float32)},
        r"topk_weights is float32 \[3, 2, 1\]; expected float32 \[3, 2, 2\]",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_trace_is_refused(what: str, tmp_path: Path) -> None:
    tensors, message = WRONG[what]
    path = tmp_path / "wrong.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message) as error:
        read_trace(path)
    assert str(path) in error.value.message
    assert error.value.hint


def test_a_file_that_is_absent_or_cut_or_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="No such file"):
        read_trace(path)
    RoutingTrace(IDS).save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_trace(path)
    path.write_text("I route you all.")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_trace(path)


def test_another_models_trace_is_refused() -> None:
    trace = RoutingTrace(IDS)
    trace.check(tiny_args())
    for changes in ({"n_layers": 3}, {"moe": MoEArgs(8, 3)}, {"moe": MoEArgs(int(IDS.max()), 2)}):
        args = tiny_args(**changes)
        with pytest.raises(OptionError, match=rf"of 2 layers and 2 experts .* {args.n_layers} layers and"):
            trace.check(args)
    with pytest.raises(OptionError, match="the model is dense"):
        trace.check(tiny_args(moe=None))


def test_recorded_is_what_routers_chose_in_the_order_of_tokens() -> None:
    model, seen = tiny_model(n_layers=3), [[], [], []]
    routers = model.routers()
    for router, ids in zip(routers, seen, strict=True):
        router.register_forward_hook(lambda _, __, routing, ids=ids: ids.extend(routing.topk_ids_TK.tolist()))
    with record(model) as recording:
        for ids in (range(5), range(20, 21), range(30, 37)):
            model(torch.tensor([list(ids)]))
    model(torch.tensor([[1, 2, 3]]))  # after it, nothing is recorded
    trace = recording.trace()
    trace.check(model.args)
    assert recording.steps == [5, 1, 7]
    assert trace.topk_ids.tolist() == [list(of_token) for of_token in zip(*(ids[:13] for ids in seen), strict=True)]


def test_a_forward_that_failed_halfway_is_left_out() -> None:
    model = tiny_model()
    with record(model) as recording:
        model(torch.tensor([[1, 2, 3]]))
        hook = model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.tensor([[4, 5]]))
        hook.remove()
    assert recording.trace().topk_ids.shape == (3, 2, 2)


def test_of_nothing_there_is_no_trace() -> None:
    with record(tiny_model()) as recording:
        pass
    with pytest.raises(OptionError, match="nothing was routed"):
        recording.trace()
