"""Plans for a card: both budgets hold, refusals say what works, and what is planned is what is told."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from octavo import machine
from octavo.args import ModelArgs
from octavo.budget import goes_on_card, plan_checkpoint_on_card
from octavo.checkpoint import open_checkpoint
from octavo.cli.memory import plan_line, plan_to_json
from octavo.devices import DEVICES
from octavo.errors import OptionError, ResourceError, UserError
from octavo.kernels.memory import taking
from octavo.llm import LLM
from octavo.plan import CHUNK, kv_cache_bytes, weights_at
from octavo.plan_card import (
    CARD_BASE,
    CARD_PRECISIONS,
    CARD_SLACK,
    CUBLAS,
    HOST_BASE,
    NUMBER,
    CardPlan,
    card_footprint,
    card_verdict,
    card_workspace_bytes,
    make_card_plan,
    passing_slots,
)
from octavo.serve.batch import MOST, batch_on_card
from octavo.shapes import SHAPES
from run_octavo import refused, run
from stores import make_source, quantise
from test_plan import any_args, tree

GB, GIB = 10**9, 2**30
MIXTRAL, DENSE = SHAPES["mixtral-8x7b"], SHAPES["mistral-7b"]
PARTS = ("experts", "rest", "kv_cache", "workspace", "base")
no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")


def named(error: UserError, option: str) -> int | None:
    """The budget that a refusal's hint names."""
    found = re.search(rf"{option} (\d+)", error.hint or "")
    return int(found[1]) if found else None


@st.composite
def any_card(draw: st.DrawFn) -> tuple[ModelArgs, int, int | None, int]:
    """A model, a card's budget and a host's, about those where something changes, and a batch."""
    args, batch = draw(any_args()), draw(st.integers(1, 4))
    weights = weights_at(args, draw(st.sampled_from(CARD_PRECISIONS)))
    near = st.integers(-2, 2) | st.integers(0, weights.expert + 1)
    slots, held = (draw(st.integers(0, weights.n_experts + 1)) for _ in range(2))
    gpu = card_footprint(args, weights, 512, batch, slots * weights.expert).total + draw(near)
    return args, gpu, draw(st.none() | st.just(HOST_BASE + held * weights.expert + draw(near))), batch


# ---------------------------------------- what is taken


def test_the_parts_of_a_card_add_up() -> None:
    weights = weights_at(MIXTRAL, 4)
    size = card_footprint(MIXTRAL, weights, 8192, 2)
    assert size.total == sum(getattr(size, part) for part in PARTS)
    assert (size.experts, size.rest, size.base) == (weights.experts, weights.rest, CARD_BASE)  # the embedding too
    assert size.kv_cache == kv_cache_bytes(MIXTRAL, 8192, 2, NUMBER) == 2 * 8192 * 131_072
    assert card_footprint(MIXTRAL, weights, 8192, 2, 5).total == size.total - weights.experts + 5


@pytest.mark.parametrize("bits", CARD_PRECISIONS)
def test_the_workspace_is_that_of_its_tensors(bits: int) -> None:
    token = {
        "stream": 4 * 4096 * 2,
        "q, k, v and mixed": (4096 + 1024 + 1024 + 4096) * 2,
        "rotated": (4096 + 1024) * (4 + 4 + 2),
        "activations": 0 if bits == 16 else 2 * (4096 + 14336) // 64 * (64 + 16),
        "hidden": 2 * 14336 * 4,
        "parts": 2 * 4096 * 4,
    }
    seen, logits = CHUNK * (4096 + CHUNK) * (1 + 2), 32_000 * (2 + 4 + 4 + 8 + 4 + 4)
    for batch in (1, 3):
        expected = (CHUNK + batch) * sum(token.values()) + seen + batch * logits + CUBLAS + CARD_SLACK
        assert card_workspace_bytes(MIXTRAL, weights_at(MIXTRAL, bits), 4096, batch) == expected
    ring = 2 * (4096 + CHUNK) * 1024 * 2
    windowed = dataclasses.replace(MIXTRAL, sliding_window=4096)
    work = [card_workspace_bytes(args, weights_at(args, bits), 8192, 1) for args in (windowed, MIXTRAL)]
    assert work[0] - ring == work[1] - CHUNK * 4096 * 3


@given(any_args(), st.sampled_from(CARD_PRECISIONS), st.integers(1, 511), st.integers(1, 8))
@settings(deadline=None)
def test_more_tokens_or_sequences_never_take_less(args: ModelArgs, bits: int, context: int, batch: int) -> None:
    weights = weights_at(args, bits)
    here = card_footprint(args, weights, context, batch)
    for more in (card_footprint(args, weights, context + 1, batch), card_footprint(args, weights, context, batch + 1)):
        assert all(getattr(more, part) >= getattr(here, part) for part in PARTS)


# ---------------------------------------- plans


@given(any_card(), st.sampled_from([None, *CARD_PRECISIONS]))
@settings(deadline=None, max_examples=200)
def test_a_plan_keeps_both_budgets(found: tuple[ModelArgs, int, int | None, int], bits: int | None) -> None:
    args, gpu, host, batch = found
    try:
        plan = make_card_plan(args, gpu, host, bits, 512, batch)
    except OptionError as error:
        hints_work(error, args, gpu, host, bits, batch)
        return
    assert plan.card.total <= gpu
    assert host is None or plan.host.total <= host
    assert bits in (None, plan.bits)
    weights, placement = plan.weights, plan.placement
    assert weights == weights_at(args, plan.bits or 0)
    tried = [bits] if bits else list(CARD_PRECISIONS)
    wholes = {each: card_footprint(args, weights_at(args, each), 512, batch).total for each in tried}
    assert card_verdict(args, weights, gpu, host, 512, batch) == ("cached" if placement else "fits")
    if placement is None:
        assert plan.card == card_footprint(args, weights, 512, batch)
        assert (plan.host.experts, plan.share, plan.link_bytes, plan.resident) == (0, 1, 0, weights.n_experts)
        assert all(wholes[each] > gpu for each in tried[: tried.index(plan.bits or 0)])
        return
    assert args.moe is not None
    assert all(total > gpu for total in wholes.values())
    assert plan.bits == tried[-1]
    kept = len(placement.pinned) + placement.slots
    assert plan.card.experts == placement.nbytes == kept * weights.expert
    assert gpu - plan.card.total < weights.expert  # no expert more would have room
    assert kept == plan.resident < weights.n_experts
    assert placement.slots >= passing_slots(args, batch)
    assert plan.host.experts == (weights.n_experts - len(placement.pinned)) * weights.expert
    if placement.pinned:  # no more than it takes, evenly over the layers, lowest numbers first
        assert host is not None
        assert plan.host.total + weights.expert > host
        by_layer = Counter(layer for layer, _ in placement.pinned)
        counts = [by_layer[layer] for layer in range(args.n_layers)]
        assert max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)
        expected = {(layer, number) for layer, count in enumerate(counts) for number in range(count)}
        assert placement.pinned == expected


def hints_work(error: OptionError, args: ModelArgs, gpu: int, host: int | None, bits: int | None, batch: int) -> None:
    """Every budget that a refusal names is the smallest that works."""
    least_gpu, least_host = named(error, "--gpu-memory"), named(error, "--memory")
    assert least_gpu is not None or least_host is not None
    make = functools.partial(make_card_plan, args, bits=bits, context=512, batch=batch)
    if least_host is not None:
        assert host is not None
        assert host < least_host
        with pytest.raises(OptionError):
            make(gpu, least_host - 1)
    if host is not None and host < HOST_BASE:
        assert least_host == HOST_BASE
        return
    if least_host is not None:
        assert make(gpu, least_host).host.total <= least_host
    assert least_gpu is not None
    assert least_gpu > gpu
    assert make(least_gpu, host).card.total <= least_gpu
    with pytest.raises(OptionError):
        make(least_gpu - 1, host)
    fewer = re.search(r"--bits (\d+)$", error.hint or "")
    if fewer:
        assert make_card_plan(args, gpu, host, int(fewer[1]), 512, batch).bits == int(fewer[1])


@given(any_card(), st.sampled_from([None, *CARD_PRECISIONS]), st.data())
@settings(deadline=None)
def test_more_memory_is_never_worse(
    found: tuple[ModelArgs, int, int | None, int], bits: int | None, data: st.DataObject
) -> None:
    args, gpu, host, batch = found
    assume(host is not None)
    assert host is not None
    weights = weights_at(args, 4)
    steps = st.integers(0, 3 * (weights.expert + 1)) | st.just(0)
    gpus = [gpu, gpu + data.draw(steps)]
    hosts = [host, host + data.draw(steps), None]
    plans = {}
    for at, card in enumerate(gpus):
        for beside, ram in enumerate(hosts):
            try:
                plans[at, beside] = make_card_plan(args, card, ram, bits, 512, batch)
            except OptionError:
                plans[at, beside] = None
    for (at, beside), plan in plans.items():
        for larger in ((at + 1, beside), (at, beside + 1)):
            if plan is None or larger not in plans:
                continue
            other = plans[larger]
            assert other is not None
            assert (other.share, other.bits) >= (plan.share, plan.bits)
            if other.placement and plan.placement:
                assert len(other.placement.pinned) <= len(plan.placement.pinned)
                assert other.placement.slots >= plan.placement.slots


def test_the_precision_is_the_highest_that_fits_on_the_card() -> None:
    def chosen(size: int, bits: int | None = None) -> tuple[int | None, int]:
        plan = make_card_plan(MIXTRAL, size, None, bits)
        return plan.bits, plan.resident

    assert chosen(141 * GB) == (16, 256)
    assert chosen(80 * GB) == (8, 256)
    assert chosen(32 * GB) == (4, 256)
    bits, resident = chosen(24 * GIB)
    assert bits == 4
    assert 230 < resident < 256
    bits, resident = chosen(24 * GIB, 16)
    assert bits == 16
    assert 0 < resident < 100
    assert "as asked for" in make_card_plan(MIXTRAL, 24 * GIB, None, 16).reason


def test_what_the_host_cannot_hold_is_pinned() -> None:
    each = weights_at(MIXTRAL, 4).expert
    plan = make_card_plan(MIXTRAL, 24 * GIB, HOST_BASE + 100 * each)
    assert plan.placement is not None
    of_layer = Counter(layer for layer, _ in plan.placement.pinned)
    assert [of_layer[layer] for layer in range(32)] == [5] * 28 + [4] * 4
    assert (31, 3) in plan.placement.pinned
    assert plan.host.total == HOST_BASE + 100 * each
    assert plan.placement.slots == make_card_plan(MIXTRAL, 24 * GIB).resident - 156
    assert "room for 100 of the experts" in plan.reason
    assert "156 pinned" in plan_line(plan)
    assert plan_to_json(plan)["pinned"] == sorted(plan.placement.pinned)
    with pytest.raises(OptionError, match="which the host has no room for") as caught:
        make_card_plan(MIXTRAL, 8 * GB, HOST_BASE + 100 * each)
    assert named(caught.value, "--memory")
    assert named(caught.value, "--gpu-memory")


def test_a_batch_needs_slots_for_all_that_it_may_choose() -> None:
    assert [passing_slots(MIXTRAL, batch) for batch in (1, 3, 4, 64)] == [2, 6, 8, 8]
    assert passing_slots(DENSE, 4) == 0
    least = [named(too_small(MIXTRAL, batch), "--gpu-memory") or 0 for batch in (1, 2)]
    bare = [card_footprint(MIXTRAL, weights_at(MIXTRAL, 4), 4096, batch, 0).total for batch in (1, 2)]
    assert [one - two for one, two in zip(least, bare, strict=True)] == [
        slots * weights_at(MIXTRAL, 4).expert for slots in (2, 4)
    ]


def too_small(args: ModelArgs, batch: int = 1, **options: Any) -> OptionError:
    with pytest.raises(OptionError, match="too little") as caught:
        make_card_plan(args, GB, batch=batch, **options)
    return caught.value


def test_a_dense_model_fits_whole_or_not_at_all() -> None:
    error = too_small(DENSE)
    least = named(error, "--gpu-memory")
    assert least == card_footprint(DENSE, weights_at(DENSE, 4), 4096, 1).total
    assert "expert" not in error.message
    assert make_card_plan(DENSE, least).placement is None
    error = too_small(DENSE, bits=16)
    assert "--bits" not in (error.hint or "")  # nothing works within it
    with pytest.raises(OptionError) as caught:
        make_card_plan(DENSE, 6 * GB, bits=16)
    assert (caught.value.hint or "").endswith("is --bits 4")


@pytest.mark.parametrize("bits", [32, 3, 2, 5])
def test_a_card_computes_with_three_precisions(bits: int) -> None:
    with pytest.raises(OptionError, match=rf"bits is {bits}; a card computes with 16, 8 or 4 bits") as caught:
        make_card_plan(MIXTRAL, 80 * GB, bits=bits)
    assert "--bits 4" in (caught.value.hint or "")


def test_what_cannot_be_planned() -> None:
    for options in ({"context": 0}, {"context": 40_000}, {"batch": 0}):
        with pytest.raises(OptionError, match=next(iter(options))):
            make_card_plan(MIXTRAL, 80 * GB, **options)
    with pytest.raises(OptionError, match="its own precision"):
        make_card_plan(MIXTRAL, 80 * GB, bits=4, store=weights_at(MIXTRAL, 4))
    with pytest.raises(OptionError, match="of the host's memory is too little"):
        make_card_plan(MIXTRAL, 141 * GB, HOST_BASE - 1)
    assert make_card_plan(MIXTRAL, 141 * GB, HOST_BASE).host.total == HOST_BASE


def test_a_store_is_planned_as_it_lies() -> None:
    store = dataclasses.replace(weights_at(MIXTRAL, 8), bits=None, label="store")
    plan = make_card_plan(MIXTRAL, 24 * GIB, store=store)
    expected = make_card_plan(MIXTRAL, 24 * GIB, bits=8)
    assert (plan.weights, plan.placement, plan.card) == (store, expected.placement, expected.card)
    assert plan.reason.startswith("the store has its own precision")


def test_speeds() -> None:
    whole, some = make_card_plan(MIXTRAL, 32 * GB, bits=4), make_card_plan(MIXTRAL, 12 * GB, bits=4)
    each = weights_at(MIXTRAL, 4).expert
    read = whole.card.rest - 32_000 * 4096 * 2 + 64 * each
    assert whole.read_bytes == some.read_bytes == read
    assert whole.decode_tok_s(1e12, 32e9) == (1e12 / read, None)
    assert whole.together_tok_s(1e12, 32e9) == pytest.approx(1e12 / read)
    assert whole.prefill_tok_s(32e9) is None
    assert some.share == some.resident / 256
    assert some.link_bytes == pytest.approx(64 * each * (1 - some.share))
    by_memory, by_link = some.decode_tok_s(1e12, 32e9)
    assert by_link == pytest.approx(32e9 / some.link_bytes)
    assert some.together_tok_s(1e12, 32e9) == pytest.approx(1 / (1 / by_memory + 1 / by_link))
    assert some.prefill_tok_s(32e9) == pytest.approx(512 * 32e9 / ((256 - some.resident) * each))
    two = make_card_plan(MIXTRAL, 12 * GB, bits=4, batch=2)
    assert two.link_bytes == pytest.approx(32 * 3.5 * each * (1 - two.share))
    assert [DEVICES[key].link for key in ("rtx-4060", "rtx-4090", "h200", "m2-ultra")] == [16e9, 32e9, 64e9, None]


# ---------------------------------------- checkpoints


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in bfloat16 and float32, and its stores; its experts are most of it."""
    home = tmp_path_factory.mktemp("card")
    made = {"16": make_source(home, hidden_dim=1024), "32": home / "float32"}
    for bits in ("8", "4", "3"):
        quantise(made["16"], home / f"store {bits}", bits)
        made[bits] = home / f"store {bits}"
    return made


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("16", {}, True),
        ("8", {}, True),
        ("4", {}, True),
        ("3", {}, False),  # the CPU computes with these, unless a card is asked for
        ("3", {"device": "cuda"}, "has weights of 3 bits; a card computes with 16, 8 or 4 bits"),
        ("3", {"gpu_memory": "1GB"}, "has weights of 3 bits"),
        ("16", {"bits": 4}, True),
        ("16", {"bits": "8", "device": "cuda:0"}, True),
        ("16", {"bits": 2}, False),
        ("16", {"bits": 2, "device": "cuda"}, "bits is 2; a card"),
        ("16", {"bits": 5, "device": "cuda"}, "expected one of 8, 4, 3, 2"),
        ("32", {}, False),
        ("32", {"device": "cuda"}, False),  # plain torch, without a plan
        ("32", {"gpu_memory": "1GB"}, "dtype is float32"),
        ("32", {"bits": 4, "device": "cuda"}, "dtype is float32"),
        ("32", {"dtype": "bfloat16"}, True),
        ("16", {"dtype": "float16", "device": "cuda"}, False),
        ("16", {"memory": "1GB"}, False),
        ("16", {"memory": "1GB", "device": "cuda"}, True),
        ("16", {"memory": "1GB", "gpu_memory": "1GB"}, True),
        ("16", {"device": "cpu"}, False),
        ("16", {"device": "cpu", "gpu_memory": "1GB"}, "gpu_memory bounds what a card holds, and device is 'cpu'"),
        ("16", {"device": "cuda:2"}, "device is 'cuda:2', and no such"),
    ],
)
def test_what_goes_on_a_card(
    kind: str, options: dict[str, Any], expected: bool | str, folders: dict[str, Path]
) -> None:
    checkpoint = open_checkpoint(folders[kind])
    if isinstance(expected, bool):
        assert goes_on_card(checkpoint, **options, n_cards=2) == expected
        return
    with pytest.raises(OptionError, match=expected) as caught:
        goes_on_card(checkpoint, **options, n_cards=2)
    assert caught.value.hint or "expected one of" in expected


def test_without_a_card_nothing_goes_there(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["4"])
    assert not goes_on_card(checkpoint, n_cards=0)
    for options, what in (({"gpu_memory": "1GB"}, "gpu_memory"), ({"device": "cuda"}, "device is 'cuda'")):
        with pytest.raises(OptionError, match=rf"{what}.* no such CUDA device") as caught:
            goes_on_card(checkpoint, **options, n_cards=0)  # type: ignore[arg-type]
        assert "leave it out" in (caught.value.hint or "")


def test_a_checkpoint_is_counted_as_it_lies(folders: dict[str, Path]) -> None:
    for kind in ("16", "8", "4"):
        checkpoint = open_checkpoint(folders[kind])
        plan = plan_checkpoint_on_card(checkpoint, "2GB", free=2 * GB)
        assert plan.card.experts + plan.card.rest == sum(checkpoint.info(name).nbytes for name in checkpoint.names())
        assert (plan.gpu_budget, plan.context, plan.batch, plan.bits) == (2 * GB, 256, 1, 16 if kind == "16" else None)
    assert plan_checkpoint_on_card(open_checkpoint(folders["16"]), None, free=GB, bits=4).bits == 4
    assert plan_checkpoint_on_card(open_checkpoint(folders["16"]), None, free=GB).gpu_budget == GB
    with pytest.raises(OptionError, match="its own precision"):
        plan_checkpoint_on_card(open_checkpoint(folders["4"]), None, free=GB, bits=8)
    with pytest.raises(OptionError, match="context is 257"):
        plan_checkpoint_on_card(open_checkpoint(folders["4"]), None, free=GB, context=257)
    wide = plan_checkpoint_on_card(open_checkpoint(folders["32"]), None, free=GB, dtype="bfloat16")
    assert wide.card == plan_checkpoint_on_card(open_checkpoint(folders["16"]), None, free=GB).card


def test_a_card_is_shared_where_every_expert_stays_there(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["16"])

    def planned(free: int, **options: Any) -> CardPlan:
        return plan_checkpoint_on_card(checkpoint, None, free=free, **options)

    assert planned(2 * GB, most=8).batch == 8
    eight = planned(2 * GB, batch=8).card.total
    assert planned(eight, most=8).batch == 8
    assert planned(eight - 1, most=8).batch == 1
    assert planned(eight - 1, most=8).placement is None
    some = planned(planned(2 * GB).card.total - 1, most=8)
    assert some.placement is not None
    assert some.batch == 1


def test_more_than_is_free_is_refused_and_the_hint_works(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(folders["16"])
    whole = plan_checkpoint_on_card(checkpoint, GB, free=GB)
    total = whole.card.total
    assert plan_checkpoint_on_card(checkpoint, GB, free=total).card == whole.card
    free = total - 1_000_001
    with pytest.raises(ResourceError, match=r"of the card's memory takes .* are free on it") as caught:
        plan_checkpoint_on_card(checkpoint, GB, free=free)
    found = re.search(r"--gpu-memory (\d+MB)$", caught.value.hint or "")
    assert found
    plan = plan_checkpoint_on_card(checkpoint, found[1], free=free)
    assert plan.placement is not None
    assert plan.card.total <= free
    # and of the host: its experts are there to be copied, so it has too little for all of them
    least = HOST_BASE + plan.host.experts - 1
    there = min(HOST_BASE, machine.resident_memory())
    files = {"proc/meminfo": f"MemAvailable: {(least + machine.SPARE - there) // 1024} kB\n"}
    monkeypatch.setattr("octavo.budget.room", functools.partial(machine.room, tree(tmp_path, files)))
    fewer = plan_checkpoint_on_card(checkpoint, found[1], free=free)
    assert fewer.placement is not None
    assert fewer.placement.pinned
    with pytest.raises(ResourceError, match=r"of the host's memory, and .* can be had on this machine") as caught:
        plan_checkpoint_on_card(checkpoint, found[1], "64GB", free=free)
    assert re.search(r"--memory \d+MB$", caught.value.hint or "")


@no_card
def test_loading_for_a_card_that_is_not_there(folders: dict[str, Path]) -> None:
    for options in (
        {"gpu_memory": "1GB"},
        {"gpu_memory": "1GB", "device": "cuda"},
        {"device": "cuda", "memory": "1GB"},
    ):
        with pytest.raises(OptionError, match="no such CUDA device is found here"):
            LLM.load(folders["4"], **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="device is 'cpu'"):
        LLM.load(folders["4"], gpu_memory="1GB", device="cpu")
    line = ("generate", "-m", folders["4"], "--raw", "The", "--gpu-memory", "1GB")
    refused(run(*line), "gpu_memory", "no such CUDA device", hint="leave it out")
    refused(run("serve", folders["4"], "--port", "0", "--gpu-memory", "1GB"), "no such CUDA device", hint="leave it")
    away = run("chat", "--remote", "http://127.0.0.1:9/v1", "--gpu-memory", "1GB", stdin=b"")
    refused(away, "--gpu-memory is for a model on this machine", hint="leave one of the two out")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loading_on_a_card_goes_by_the_plan(folders: dict[str, Path]) -> None:
    whole = LLM.load(folders["4"], device="cuda")
    assert isinstance(whole.plan, CardPlan)
    assert (whole.plan.placement, whole.context, whole.engine.max_batch_size) == (None, 256, 8)
    said = whole.generate("The", temperature=0, max_tokens=8).choices
    some = LLM.load(folders["4"], gpu_memory=plan_checkpoint_on_card(
        open_checkpoint(folders["4"]), None, free=GB).card.total - 1)  # fmt: skip
    assert isinstance(some.plan, CardPlan)
    assert some.plan.placement is not None
    assert some.experts is not None
    assert [one.token_ids for one in some.generate("The", temperature=0, max_tokens=8).choices] == [
        one.token_ids for one in said
    ]
    with pytest.raises(OptionError, match="too little") as caught:
        LLM.load(folders["4"], gpu_memory="100MB")
    assert named(caught.value, "--gpu-memory")
    with pytest.raises(OptionError, match="prefetch is for experts that the CPU reads"):
        LLM.load(folders["4"], gpu_memory="1GB", prefetch=True)


@pytest.mark.parametrize("size", [GB, 32 * GB, 141 * GB])
def test_a_server_on_a_card_takes_as_many_as_have_room(size: int) -> None:
    plan = make_card_plan(MIXTRAL, size + 4 * GB)
    batch = batch_on_card(plan, None)
    assert 1 <= batch.size <= MOST
    grown = make_card_plan(MIXTRAL, plan.gpu_budget, None, plan.bits, batch=batch.size)
    assert (grown.placement is None) == (plan.placement is None)
    if plan.placement is None and batch.size < MOST:  # so many that more would put experts off the card
        more = card_footprint(MIXTRAL, plan.weights, 4096, MOST)
        assert more.total - more.kv_cache // MOST * (MOST - batch.size - 1) > plan.gpu_budget
    assert batch_on_card(make_card_plan(MIXTRAL, 141 * GB), 20).size == 20
    with pytest.raises(OptionError, match="999 sequences"):
        batch_on_card(plan, 999)


# ---------------------------------------- an allocation that fails


def test_a_part_that_does_not_fit_is_named() -> None:
    for part, mend in (("experts", "--bits 4"), ("KV cache", "-o context=N"), ("workspace", "--gpu-memory")):
        with (
            pytest.raises(ResourceError, match=rf"^the {part} of the plan take 24\.0 GB .* and 1\.5 GB are free") as e,
            taking(part, 24 * GB, "cuda", free=1_500_000_000),
        ):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24.00 GiB.")
        assert mend in (e.value.hint or "")
    with (
        pytest.raises(ResourceError, match=r"^the other weights of the plan do not fit"),
        taking("other weights", 0, "cuda", free=1),
    ):
        raise torch.OutOfMemoryError
    with taking("experts", 1, "cpu"):
        kept = torch.zeros(3)
    assert kept.tolist() == [0, 0, 0]
    with pytest.raises(RuntimeError, match="something else"), taking("experts", 1, "cuda", free=0):
        raise RuntimeError("something else")
