"""Routing traces: kept and read again unchanged, recorded as the routers chose, and refused where they are none."""

from __future__ import annotations

import itertools
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


EXTRAS = ["token_ids", "topk_weights", "logits", "documents", "decoded", "pieces", "labels", "n_experts", "model"]


def full_trace(tokens: int, layers: int = 2, top_k: int = 2, extras: Any = EXTRAS) -> RoutingTrace:
    """A random trace of 8 experts, with some or all of what a trace may have."""
    random = np.random.default_rng(tokens)
    ids = random_ids(tokens, layers, top_k, 8)
    documents = np.arange(tokens, dtype=np.int32) // 3 if "documents" in extras else None
    more = {
        "token_ids": np.arange(tokens, dtype=np.int64),
        "topk_weights": random.random(ids.shape, dtype=np.float32),
        "logits": random.random((tokens, layers, 8), dtype=np.float32),
        "documents": documents,
        "decoded": random.random(tokens) < 0.5,
        "pieces": tuple("é日\n\0 "[: token % 6] for token in range(tokens)),
        "labels": tuple(f"label {document % 2}" for document in range(1 if documents is None else documents[-1] + 1)),
        "n_experts": 8,
        "model": "öctavo",
    }
    return RoutingTrace(ids, **{name: more[name] for name in extras})


def assert_same(one: RoutingTrace, other: RoutingTrace) -> None:
    for name in [*EXTRAS, "topk_ids", "revision"]:
        mine, theirs = getattr(one, name), getattr(other, name)
        if isinstance(mine, np.ndarray):
            assert theirs.dtype == mine.dtype
            assert np.array_equal(theirs, mine)
        else:
            assert theirs == mine


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 20),
    layers=st.integers(1, 4),
    top_k=st.integers(1, 4),
    extras=st.sets(st.sampled_from(EXTRAS)),
)
def test_what_is_saved_is_read(
    tokens: int, layers: int, top_k: int, extras: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    trace = full_trace(tokens, layers, top_k, extras)
    path = tmp_path_factory.mktemp("trace") / "a.safetensors"
    trace.save(path)
    assert_same(read_trace(path), trace)
    assert [one.name for one in path.parent.iterdir()] == ["a.safetensors"]
    (path.parent / "usual").touch()
    assert path.stat().st_mode == (path.parent / "usual").stat().st_mode


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 20), extras=st.sets(st.sampled_from(EXTRAS)), data=st.data())
def test_some_tokens_of_a_trace_keep_what_is_theirs(tokens: int, extras: set[str], data: st.DataObject) -> None:
    trace = full_trace(tokens, extras=extras)
    assert_same(trace.select(slice(None)), trace)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    if not mask.any():
        with pytest.raises(OptionError, match="expected int16"):
            trace.select(mask)
        return
    some = trace.select(mask)
    which = np.flatnonzero(mask)
    assert np.array_equal(some.topk_ids, trace.topk_ids[which])
    domains = [trace.domains[trace.domain_ids[token]] for token in which]
    assert [some.domains[number] for number in some.domain_ids] == domains
    together = [trace.document_ids[a] == trace.document_ids[b] for a, b in itertools.pairwise(which)]
    assert [bool(step == 0) for step in np.diff(some.document_ids)] == together
    if trace.pieces is not None:
        assert some.pieces == tuple(trace.pieces[token] for token in which)


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
    "NaN": ({"topk_ids": IDS, "topk_weights": np.full(IDS.shape, np.nan, np.float32)}, "topk_weights holds NaN"),
    "other logits": ({"topk_ids": IDS, "logits": np.zeros((3, 1, 8), np.float32)}, r"logits is float32 \[3, 1, 8\]"),
    "documents out of order": (
        {"topk_ids": IDS, "documents": np.array([0, 2, 2], np.int32)},
        "documents are not number",
    ),
    "documents that begin late": ({"topk_ids": IDS, "documents": np.ones(3, np.int32)}, "documents are not numbered"),
    "text without ends": ({"topk_ids": IDS, "text": np.zeros(3, np.uint8)}, "text is not whole"),
    "ends beyond the text": (
        {"topk_ids": IDS, "text": np.zeros(3, np.uint8), "text_ends": np.array([1, 2, 4], np.int64)},
        "text_ends do not rise",
    ),
    "ends that fall": (
        {"topk_ids": IDS, "text": np.zeros(3, np.uint8), "text_ends": np.array([2, 1, 3], np.int64)},
        "text_ends do not rise",
    ),
    "other pieces": (
        {"topk_ids": IDS, "text": np.zeros(3, np.uint8), "text_ends": np.array([1, 3], np.int64)},
        "texts of 2 tokens; expected 3",
    ),
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


NOTES = {
    "no JSON": ("{", "cannot be read"),
    "a list": ("[]", "cannot be read"),
    "labels that are a text": ('{"labels": "abc"}', "labels are no list"),
    "labels that are no texts": ('{"labels": [1]}', "are texts"),
    "too few labels": ('{"labels": []}', "0 labels for 1 documents"),
    "no experts": ('{"n_experts": 0}', "n_experts is 0"),
    "half an expert": ('{"n_experts": 7.5}', "n_experts is 7.5"),
    "fewer experts than ids": ('{"n_experts": 2}', "there are 2 experts, the first is 0"),
    "a model that is a number": ('{"model": 8}', "are texts"),
    "much": ("[" * 5000, "cannot be read"),
}


@pytest.mark.parametrize("what", NOTES)
def test_notes_that_are_none_are_refused(what: str, tmp_path: Path) -> None:
    notes, message = NOTES[what]
    path = tmp_path / "wrong.safetensors"
    save_file({"topk_ids": IDS}, path, {"routing": notes})
    with pytest.raises(CheckpointError, match=message) as error:
        read_trace(path)
    assert str(path) in error.value.message


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
    logits = torch.from_numpy(trace.logits)
    assert torch.equal(logits.topk(2).indices, torch.from_numpy(trace.topk_ids).long())
    assert torch.allclose(logits.topk(2).values.softmax(-1), torch.from_numpy(trace.topk_weights))
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
