"""Plans: exact bytes, budgets that hold, and what `octavo plan` says of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo import machine
from octavo.args import ModelArgs, MoEArgs
from octavo.bench.synthetic import synthetic_model
from octavo.cache import KVCache, RollingKVCache
from octavo.checkpoint.names import canonical_shapes
from octavo.devices import DEVICES, known_device
from octavo.errors import OptionError
from octavo.kernels import backend
from octavo.kernels.ops import spent
from octavo.plan import (
    BASE,
    PASSING,
    PRECISIONS,
    SLACK,
    SLOTS,
    UNASKED,
    Placement,
    footprint,
    footprint_of,
    kv_cache_bytes,
    make_plan,
    parse_size,
    place_experts,
    show_size,
    verdict,
    weights_at,
    workspace_bytes,
)
from octavo.quant.formats import FORMATS
from octavo.quant.presets import preset
from octavo.shapes import SHAPES

GB, GIB = 10**9, 2**30
MIXTRAL, LARGE, DENSE = SHAPES["mixtral-8x7b"], SHAPES["mixtral-8x22b"], SHAPES["mistral-7b"]
LOW_BITS = (8, 4, 3, 2)


@st.composite
def any_args(draw: st.DrawFn) -> ModelArgs:
    n_kv_heads = draw(st.integers(1, 3))
    moe = draw(st.none() | st.integers(1, 9))
    return ModelArgs(
        dim=draw(st.integers(1, 300)),
        n_layers=draw(st.integers(1, 5)),
        head_dim=2 * draw(st.integers(1, 40)),
        hidden_dim=draw(st.integers(1, 300)),
        n_heads=n_kv_heads * draw(st.integers(1, 4)),
        n_kv_heads=n_kv_heads,
        vocab_size=draw(st.integers(1, 500)),
        sliding_window=draw(st.none() | st.integers(1, 600)),
        max_seq_len=512,
        tie_embeddings=draw(st.booleans()),
        moe=None if moe is None else MoEArgs(moe, draw(st.integers(1, moe))),
    )


def by_tensor(args: ModelArgs, bits: int) -> int:
    """The bytes of a model, tensor by tensor."""
    shapes = canonical_shapes(args)
    formats = preset(bits, shapes) if bits in LOW_BITS else {}
    number = 4 if bits == 32 else 2
    return sum(
        FORMATS[formats[name]].nbytes(*shape) if name in formats else math.prod(shape) * number
        for name, shape in shapes.items()
    )


def smallest(error: OptionError) -> int:
    """The budget that a refusal's hint names."""
    found = re.search(r"--memory (\d+) ", error.hint or "")
    assert found, error.hint
    return int(found[1])


# ---------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        (" 24 gib ", 24 * 2**30),
        ("24G", 24 * 2**30),
        ("24Gi", 24 * 2**30),
        ("1.5TiB", 3 * 2**39),
        ("8000MB", 8 * 10**9),
        ("0.1GB", 10**8),
        ("512k", 2**19),
        ("2pb", 2 * 10**15),
        ("8589934592", 2**33),
        ("100B", 100),
    ],
)
def test_sizes_as_people_write_them(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@given(
    st.integers(1, 9_999), st.sampled_from(["", "k", "M", "G", "T"]), st.sampled_from(["iB", "B", ""]), st.booleans()
)
def test_sizes_go_there_and_back(number: int, letter: str, kind: str, lower: bool) -> None:
    kind = kind if letter or kind == "B" else ""
    text = f"{number}{letter}{kind}"
    scale = (1000 if kind == "B" else 1024) ** " kMGT".index(letter or " ")
    assert parse_size(text.lower() if lower else text) == number * scale
    assert parse_size(f"{number} {letter}{kind}") == number * scale
    if letter:  # a half of it is exact too
        assert parse_size(f"{number}.5{letter}{kind}") == number * scale + scale // 2


@given(st.integers(1, 2**50))
def test_shown_sizes_are_near(nbytes: int) -> None:
    text = show_size(nbytes)
    read = int(text.split()[0]) if text.endswith("bytes") else parse_size(text)
    assert read == pytest.approx(nbytes, rel=0.051)


@pytest.mark.parametrize(
    "text",
    ["", "GB", "24XB", "-1GB", "0", "0GB", "0.0001kB", "1.5", "24,5GB", "1e9", "nan", "inf", "24 G B", "²GB", "٣GB",
     "24\u212aB", "1..5GB", ".5GB", "9999999PB", "24GBs", "0x10"],
)  # fmt: skip
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_size(text)
    assert repr(text) in caught.value.message
    assert "24GiB" in (caught.value.hint or "")


# ---------------------------------------- what a model takes


def test_parameters_are_exact() -> None:
    assert (MIXTRAL.n_params, MIXTRAL.n_active_params) == (46_702_792_704, 12_879_925_248)
    assert weights_at(MIXTRAL, 16).total == 2 * 46_702_792_704
    assert weights_at(MIXTRAL, 16).expert == 2 * 176_160_768
    assert weights_at(MIXTRAL, 16).experts == 2 * 45_097_156_608
    assert weights_at(LARGE, 32).expert == 4 * 301_989_888
    assert weights_at(DENSE, 16).total == 2 * 7_241_732_096


@pytest.mark.parametrize("bits", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_tensors(shape: str, bits: int) -> None:
    weights = weights_at(SHAPES[shape], bits)
    assert weights.total == by_tensor(SHAPES[shape], bits) == footprint(SHAPES[shape], bits).weights


@given(any_args(), st.sampled_from(PRECISIONS))
@settings(deadline=None)
def test_bytes_of_any_shape(args: ModelArgs, bits: int) -> None:
    weights = weights_at(args, bits)
    assert weights.total == by_tensor(args, bits)
    assert weights.n_experts == (args.n_layers * args.moe.num_experts if args.moe else 0)
    assert weights.experts == weights.n_experts * weights.expert
    assert weights.embedding == (0 if args.tie_embeddings else args.vocab_size * args.dim * weights.number)


def test_keys_and_values() -> None:
    assert kv_cache_bytes(MIXTRAL, 1, 1, 2) == 131_072
    assert kv_cache_bytes(MIXTRAL, 32_768, 1, 2) == 4 * GIB
    assert kv_cache_bytes(LARGE, 1, 1, 2) == 229_376
    assert kv_cache_bytes(DENSE, 32_768, 1, 2) == kv_cache_bytes(DENSE, 4096, 1, 2)


@given(any_args(), st.integers(1, 512), st.integers(1, 3), st.sampled_from([torch.bfloat16, torch.float32]))
@settings(deadline=None, max_examples=30)
def test_keys_and_values_are_those_of_the_cache(args: ModelArgs, context: int, batch: int, dtype: torch.dtype) -> None:
    if args.sliding_window is not None and context >= args.sliding_window:
        cache: KVCache = RollingKVCache(args, batch, dtype=dtype)
    else:
        cache = KVCache(args, batch, capacity=context, dtype=dtype)
    cache.rows(0, batch)
    assert cache.nbytes == kv_cache_bytes(args, context, batch, dtype.itemsize)


def test_the_parts_of_a_footprint_add_up() -> None:
    whole = footprint(MIXTRAL, 4, context=8192, batch=2)
    assert whole.total == whole.experts + whole.rest + whole.kv_cache + whole.workspace + whole.base
    assert whole.base == BASE
    assert whole.kv_cache == 2 * 8192 * 131_072
    assert whole.workspace > footprint(MIXTRAL, 4, context=1024).workspace > 20_000_000
    assert footprint(MIXTRAL, 32).kv_cache == 2 * footprint(MIXTRAL, 16).kv_cache == 2 * footprint(MIXTRAL, 2).kv_cache


@pytest.mark.skipif(not backend().compiled, reason="only compiled kernels count the bytes they read")
@pytest.mark.parametrize("bits", [16, 4, 2])
def test_a_token_reads_what_the_kernels_read(bits: int) -> None:
    args = SHAPES["menny"]
    model = synthetic_model(args, bits)
    before = spent()[1]
    with torch.inference_mode():
        model(torch.tensor([[7]]), cache=KVCache(args, 1, dtype=torch.bfloat16))
    read = spent()[1] - before
    beside = 2 * sum(
        math.prod(s) for n, s in canonical_shapes(args).items() if "norm" in n or n.endswith("gate.weight")
    )
    assert make_plan(args, GIB, bits, 512).read_bytes == pytest.approx(read + beside, abs=1)


WORK = """
import json, sys
import torch
from octavo.args import ModelArgs, MoEArgs
from octavo.bench.synthetic import synthetic_model
from octavo.engine import Engine
from octavo.sampling import SamplingParams

def resident(which):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(which))

args, tokens = eval(sys.argv[1]), int(sys.argv[2])
for length in (8, tokens):  # first, what is made once
    if length == tokens:
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    else:
        model = synthetic_model(args, int(sys.argv[3]))
    engine = Engine(model, max_batch_size=1)
    engine.add([i % args.vocab_size for i in range(length)], SamplingParams(max_tokens=2, temperature=1.0, seed=1))
    while engine.has_work:
        engine.step()
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not backend().compiled, reason="counted from the compiled kernels")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system tells of no peak of a stretch")
@pytest.mark.parametrize(
    ("changes", "bits", "tokens"),
    [  # mostly experts' rows, a window's copies of keys and values, many heads
        ({"moe": MoEArgs(4, 4)}, 4, 1024),
        ({"dim": 2048, "hidden_dim": 7168, "sliding_window": 512, "moe": None}, 16, 1024),
        ({"n_heads": 128, "hidden_dim": 256}, 16, 1024),
    ],
)
def test_work_takes_what_was_counted(changes: dict[str, Any], bits: int, tokens: int) -> None:
    args = dataclasses.replace(MIXTRAL, **({"dim": 1024, "n_layers": 1, "vocab_size": 512} | changes))
    line = [sys.executable, "-c", WORK, repr(args), str(tokens), str(bits)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    work = workspace_bytes(args, weights_at(args, bits), tokens, 1) + kv_cache_bytes(args, tokens, 1, 2)
    assert 0.3 * (work - SLACK) < int(done.stdout) < work  # memory of the first run is used again, more or less of it


# ---------------------------------------- plans


@st.composite
def any_budget(draw: st.DrawFn, args: ModelArgs) -> int:
    """About the budgets where something changes: two experts' room, all experts', in any precision."""
    weights = weights_at(args, draw(st.sampled_from(PRECISIONS)))
    slots = draw(st.integers(0, weights.n_experts + 1))
    size = footprint_of(args, weights, 512, 1, experts=slots * weights.expert).total
    return size + draw(st.integers(-2, 2) | st.integers(0, 3 * (weights.expert + 1)))


@given(st.data(), any_args(), st.sampled_from([None, *PRECISIONS]))
@settings(deadline=None)
def test_a_plan_keeps_its_budget(data: st.DataObject, args: ModelArgs, bits: int | None) -> None:
    budget = data.draw(any_budget(args))
    try:
        plan = make_plan(args, budget, bits, 512)
    except OptionError as error:
        least = smallest(error)
        assert least > budget
        assert make_plan(args, least, bits, 512).footprint.total <= least
        with pytest.raises(OptionError) as again:
            make_plan(args, least - 1, bits, 512)
        assert smallest(again.value) == least
        return
    assert plan.footprint.total <= budget
    assert bits in (None, plan.bits)
    weights = weights_at(args, plan.bits or 0)
    assert (plan.weights, plan.resident + plan.streamed) == (weights, weights.n_experts)
    if plan.placement is None:
        assert (plan.share, plan.resident, plan.disk_bytes) == (1, weights.n_experts, 0)
        assert plan.footprint == footprint(args, plan.bits or 0, 512)
    if plan.placement is not None:
        everything = plan.footprint.experts >= weights.experts  # but for embeddings
        assert everything or plan.footprint.total == budget  # all of it is used
        assert plan.footprint.experts == plan.placement.nbytes
        assert PASSING <= plan.placement.slots <= SLOTS
        assert 0 <= plan.share <= 1
        assert (plan.share == 1) == (plan.disk_bytes == 0) == everything
        assert plan.bits == (bits or UNASKED[-1])
        tried = [bits] if bits else UNASKED
        assert all(footprint(args, each, 512).total > budget for each in tried)
    elif bits is None:
        above = UNASKED[: UNASKED.index(plan.bits or 0)]
        assert all(footprint(args, each, 512).total > budget for each in above)
    assert verdict(args, weights, budget, 512, 1) == ("streams" if plan.placement else "fits")


@given(st.data(), any_args(), st.sampled_from([None, *PRECISIONS]))
@settings(deadline=None)
def test_more_memory_never_means_fewer_experts(data: st.DataObject, args: ModelArgs, bits: int | None) -> None:
    budgets = sorted(data.draw(st.lists(any_budget(args), min_size=2, max_size=6)))
    shares = []
    for budget in budgets:
        try:
            plan = make_plan(args, budget, bits, 512)
        except OptionError:
            shares.append(-1.0)
        else:
            slots = plan.placement.slots if plan.placement else 0
            shares.append(plan.share + 1e-9 if slots in (0, SLOTS) else 0.0)
    assert shares == sorted(shares)


@st.composite
def any_placement(draw: st.DrawFn) -> tuple[Placement, int, int]:
    """A placement, the number of experts and the bytes of one."""
    layers, experts, expert = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 1000))
    keys = [(layer, number) for layer in range(layers) for number in range(experts)]
    pinned = draw(st.sets(st.sampled_from(keys)))
    least = (len(pinned) + PASSING) * expert
    nbytes = draw(st.integers(least, least + (len(keys) + 2) * expert))
    return place_experts(nbytes, expert, pinned, draw(st.booleans())), len(keys), expert


@given(any_placement())
def test_a_placement_fills_its_bytes(found: tuple[Placement, int, int]) -> None:
    placement, n_experts, expert = found
    pinned, share = len(placement.pinned), placement.head_share(n_experts, expert)
    others = n_experts - pinned
    assert PASSING <= placement.slots <= SLOTS
    assert 0 <= share <= 1
    assert placement.resident_share(n_experts, expert) * n_experts == pytest.approx(pinned + share * others)
    tails = min(placement.slots, others) * (1 - share)  # whose heads lie elsewhere
    used = (pinned + others * share + tails) * expert
    assert used <= placement.nbytes + 1e-6
    if 0 < share < 1:
        assert used == pytest.approx(placement.nbytes)


@given(any_placement(), st.integers(0, 3000))
def test_more_bytes_never_mean_shorter_heads(found: tuple[Placement, int, int], more: int) -> None:
    placement, n_experts, expert = found
    larger = place_experts(placement.nbytes + more, expert, placement.pinned)
    if larger.slots == placement.slots:
        assert larger.head_share(n_experts, expert) >= placement.head_share(n_experts, expert)


@given(st.integers(1, 10**9), st.integers(0, 5), st.integers(1, 10**6))
def test_too_few_bytes_to_place_experts_in(expert: int, pinned: int, lacking: int) -> None:
    keys = [(0, number) for number in range(pinned)]
    least = (PASSING + pinned) * expert
    assert place_experts(least, expert, keys).slots == PASSING
    with pytest.raises(OptionError, match="too few") as caught:
        place_experts(max(0, least - lacking), expert, keys)
    assert f"give {least} bytes" in (caught.value.hint or "")


def test_the_precision_is_the_highest_that_fits() -> None:
    def chosen(size: str, bits: int | None = None) -> tuple[int | None, int, int]:
        plan = make_plan(MIXTRAL, parse_size(size), bits)
        return plan.bits, plan.resident, plan.streamed

    assert chosen("141GB") == (16, 256, 0)
    assert chosen("80GB") == (8, 256, 0)
    assert chosen("32GB") == (4, 256, 0)
    assert chosen("32GB", 3) == (3, 256, 0)
    bits, resident, streamed = chosen("12GiB")
    assert bits == 4
    assert 80 < resident < 128
    assert resident + streamed == 256
    assert chosen("32GB", 16)[0] == 16
    assert chosen("32GB", 16)[2] > 150


def test_a_refusal_names_what_would_work() -> None:
    with pytest.raises(OptionError, match="too little for this model") as caught:
        make_plan(LARGE, 2 * GB)
    least = smallest(caught.value)
    tight = make_plan(LARGE, least)
    assert tight.placement == Placement(2 * weights_at(LARGE, 4).expert, PASSING)
    assert tight.resident == 0
    with pytest.raises(OptionError, match="too little"):
        make_plan(LARGE, least - 1)
    with pytest.raises(OptionError) as caught:  # a dense model is read whole for every token
        make_plan(DENSE, 4 * GB)
    assert smallest(caught.value) == footprint(DENSE, 4).total
    fewer = re.search(r"--bits (\d)$", caught.value.hint or "")
    assert fewer
    assert int(fewer[1]) == max(bits for bits in PRECISIONS if footprint(DENSE, bits).total <= 4 * GB)
    assert make_plan(DENSE, 4 * GB, int(fewer[1])).streamed == 0
    assert (make_plan(DENSE, 6 * GB).bits, make_plan(DENSE, 6 * GB).streamed) == (4, 0)


def test_the_smallest_budget_of_the_smallest_models() -> None:
    """One expert needs no second slot; and where padding is most of a matrix, 16 bits take less than 4."""
    shape = {"dim": 8, "head_dim": 8, "n_heads": 1, "n_kv_heads": 1, "vocab_size": 8, "max_seq_len": 512}
    for args in (
        ModelArgs(**shape, n_layers=1, hidden_dim=256, moe=MoEArgs(1, 1)),
        ModelArgs(**shape, n_layers=4, hidden_dim=8, moe=MoEArgs(8, 2)),
    ):
        for bits in (None, 4):
            with pytest.raises(OptionError) as caught:
                make_plan(args, 1, bits, 512)
            least = smallest(caught.value)
            assert make_plan(args, least, bits, 512).footprint.total <= least
            with pytest.raises(OptionError):
                make_plan(args, least - 1, bits, 512)


def test_what_cannot_be_planned() -> None:
    for arguments in ((5,), (4, 0), (4, 40_000), (4, 512, 0)):
        with pytest.raises(OptionError):
            make_plan(MIXTRAL, 48 * GB, *arguments)
    with pytest.raises(OptionError, match="its own precision"):
        make_plan(MIXTRAL, 48 * GB, 4, store=weights_at(MIXTRAL, 4))


def test_ceilings() -> None:
    whole, some = make_plan(MIXTRAL, 32 * GB, 4), make_plan(MIXTRAL, 12 * GIB, 4)
    each = weights_at(MIXTRAL, 4).expert
    assert whole.read_bytes == some.read_bytes == whole.footprint.rest - 32_000 * 4096 * 2 + 64 * each
    assert whole.decode_tok_s(50e9, 2e9) == (50e9 / whole.read_bytes, None)
    assert whole.prefill_tok_s(2e9) is None
    assert some.placement is not None
    heads = (some.footprint.experts - SLOTS * each) / ((256 - SLOTS) * each)
    assert some.share == pytest.approx(heads)
    assert some.disk_bytes == 64 * each * (1 - some.share)
    assert some.decode_tok_s(50e9, 2e9) == (50e9 / some.read_bytes, 2e9 / some.disk_bytes)
    assert some.prefill_tok_s(2e9) == pytest.approx(512 * 2e9 / (256 * each * (1 - some.share)))
    two = make_plan(MIXTRAL, 32 * GB, 4, batch=2)  # even routing: 2 * 2 of 8 experts, less those chosen twice
    assert two.read_bytes == pytest.approx(two.footprint.rest - 32_000 * 4096 * 2 + 32 * 3.5 * each)
    many = make_plan(MIXTRAL, 64 * GB, 4, batch=64)
    assert many.read_bytes == pytest.approx(many.footprint.weights - 32_000 * 4096 * 2, rel=1e-6)
    assert many.decode_tok_s(50e9, 2e9)[0] == pytest.approx(64 * 50e9 / many.read_bytes)


# ---------------------------------------- devices, and this machine


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("RTX 4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4060", "rtx-4060"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("a100 80gb", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("H200", "h200"),
        ("Apple M2 Ultra", "m2-ultra"),
        ("m2-ultra", "m2-ultra"),
        ("RTX 4060 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("M2 Max", None),
        ("A100-PCIE-40GB", None),
        ("h", None),
        ("", None),
    ],
)
def test_devices_by_name(name: str, key: str | None) -> None:
    assert known_device(name) is (DEVICES[key] if key else None)


def test_devices() -> None:
    assert all(known_device(key) is device for key, device in DEVICES.items() if key != "this machine")
    assert all(known_device(device.name) is device for key, device in DEVICES.items() if key != "this machine")
    assert DEVICES["m2-ultra"].usable == 144 * GB
    assert DEVICES["rtx-4090"].usable == 24 * GB


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       24684084 kB\nMemFree: 1 kB\nMemAvailable:   16000000 kB\n"}


def test_free_memory_is_what_the_system_and_all_cgroups_have_left(tmp_path: Path) -> None:
    assert machine.free_memory(tree(tmp_path / "plain", MEMINFO)) == 16_000_000 * 1024 - machine.SPARE
    group = "sys/fs/cgroup/user/me/"
    unified = {
        **MEMINFO,
        "proc/self/cgroup": "0::/user/me\n",
        f"{group}memory.max": "max\n",
        f"{group}memory.current": "5000\n",
        "sys/fs/cgroup/user/memory.max": "9000000\n",
        "sys/fs/cgroup/user/memory.current": "6000000\n",
        "sys/fs/cgroup/user/memory.stat": "anon 1\ninactive_file 300\nactive_file 20\nfile 99999\n",
    }
    assert machine.free_memory(tree(tmp_path / "unified", unified)) == 3_000_320
    inner = unified | {f"{group}memory.max": "7000\n", f"{group}memory.stat": "anon 5\n"}
    assert machine.free_memory(tree(tmp_path / "inner", inner)) == 2000
    full = inner | {f"{group}memory.current": "8000\n"}
    assert machine.free_memory(tree(tmp_path / "full", full)) == 0


def test_free_memory_within_cgroups_of_version_1(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/memory/"
    files = {
        **MEMINFO,
        "proc/self/cgroup": "5:freezer:/\n4:cpu,memory:/box\n1:name=systemd:/\n0::/\n",
        f"{top}memory.limit_in_bytes": "9223372036854771712\n",
        f"{top}memory.usage_in_bytes": "77\n",
        f"{top}memory.stat": "total_inactive_file 1\n",
        f"{top}box/memory.limit_in_bytes": "4000000\n",
        f"{top}box/memory.usage_in_bytes": "1500000\n",
        f"{top}box/memory.stat": "inactive_file 1\ntotal_inactive_file 100\ntotal_active_file 11\n",
    }
    assert machine.free_memory(tree(tmp_path / "one", files)) == 2_500_111
    # In a container the path is the host's, and only the top is there.
    elsewhere = files | {"proc/self/cgroup": "4:memory:/docker/7f\n", f"{top}memory.limit_in_bytes": "2000\n"}
    assert machine.free_memory(tree(tmp_path / "two", elsewhere)) == 2000 - 77 + 1


def test_a_short_read_is_no_speed(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(machine.PIECE))
    with (tmp_path / "short").open("rb") as file, pytest.raises(OSError, match="were read"):
        machine._read_directly(file.fileno(), 2 * machine.PIECE)


def test_free_memory_of_a_system_that_does_not_tell(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        machine.free_memory(tmp_path)
    assert "--memory" in (caught.value.hint or "")


def test_free_memory_here() -> None:
    assert 0 < machine.free_memory() <= machine.physical_memory()


def test_the_disk_is_read_and_nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SAMPLE", 64 << 20)
    try:
        rate = machine.disk_bandwidth(tmp_path)
    except OptionError as error:
        pytest.skip(f"this file system has no direct reads: {error.message}")
    assert 1e6 < rate < 1e12
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OptionError, match="cannot be measured"):
        machine.disk_bandwidth(tmp_path / "absent")
    with pytest.raises(OptionError, match="too little free disk"):
        machine.disk_bandwidth(Path("/proc"))


@given(st.data(), any_args(), st.floats(1e8, 1e12), st.floats(1e7, 1e11))
@settings(deadline=None)
def test_what_is_expected_is_no_more_than_the_ceilings(
    data: st.DataObject, args: ModelArgs, read: float, disk: float
) -> None:
    try:
        plan = make_plan(args, data.draw(any_budget(args)), None, 512)
    except OptionError:
        return
    by_memory, by_disk = plan.decode_tok_s(read, disk)
    expected = plan.expected_tok_s(read, disk)
    assert 0 < expected <= 1.000001 * by_memory
    if by_disk is None:
        assert expected == pytest.approx(by_memory)
    else:
        assert expected <= by_disk


def test_what_is_expected_is_what_was_measured() -> None:
    """The runs of docs/memory.md, with the limits that were measured in them."""
    results = json.loads((Path(__file__).parents[1] / "benchmarks/results/any_memory.json").read_text())
    measured = [run for size, runs in results["steps"].items() if size.endswith("GiB") for run in runs]
    assert len(measured) >= 6
    for run in measured:
        plan = make_plan(MIXTRAL, run["plan"]["budget"], 4, run["plan"]["context"])
        # That run's own share: what a plan counts for the process has changed since.
        touched = run["bytes_read_per_token"] / plan.disk_bytes
        assert touched == pytest.approx(1, abs=0.05)
        expected = plan.expected_tok_s(1e9 * run["read_limit_gbs"], 1e9 * run["disk_limit_gbs"])
        assert expected == pytest.approx(run["decode_tok_s"], rel=0.25)
