"""`octavo plan --trace`: experts placed by a recorded trace; a run within the budget hits as often as it says."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import needs_compiled
from octavo.bench.routing import Traced, routed
from octavo.errors import OptionError
from octavo.experts.replay import REPLAYED, TracedPlan, placement_from_trace, plan_from_trace, replay
from octavo.experts.trace import RoutingTrace
from octavo.llm import LLM
from octavo.plan import MemoryPlan, footprint_of, make_plan, weights_at
from octavo.shapes import shape
from run_octavo import refused, run
from stores import make_source, quantise
from test_trace import random_ids

FULL = shape("mixtral-8x7b")
PART = shape("mixtral-8x7b", 8)
READ, DISK = 50e9, 5e9


def local_trace(tokens: int, layers: int = 8, kept: float = 0.8) -> RoutingTrace:
    """Most tokens choose the same two of eight experts; in each layer others."""
    ids = random_ids(tokens, layers, 2, 8)
    usual = np.random.default_rng(1).random((layers, 8)).argsort(axis=1)[:, :2]
    ids[np.random.default_rng(2).random(tokens) < kept] = usual
    return RoutingTrace(ids, n_experts=8)


def plan_of(experts: int, batch: int = 1) -> MemoryPlan:
    """Eight layers of full size at 4 bits, with room for so many of 64 experts."""
    weights = weights_at(PART, 4)
    budget = footprint_of(PART, weights, 600, batch, experts=experts * weights.expert).total
    return make_plan(PART, budget, 4, 600, batch)


# ---------------------------------------- plans


def test_a_plan_has_the_placement_of_the_trace_and_reads_what_its_replay_reads() -> None:
    trace, plan = local_trace(600), plan_of(25)
    found = plan_from_trace(trace, plan)
    weights = plan.weights
    assert found.placement == placement_from_trace(trace, plan) != plan.placement
    assert found.placement.pinned
    same = replay(trace.topk_ids, found.placement, weights.n_experts, weights.expert, skip=300)
    assert (found.counted, found.found) == (300, same)
    assert found.disk_bytes == same.nbytes / 300 < plan.disk_bytes / 2
    assert found.disk_bytes == pytest.approx((1 - same.hit_rate) * 16 * weights.expert)
    assert found.read_bytes == plan.read_bytes  # 16 experts a token, as without a trace
    assert found.decode_tok_s(READ, DISK) == (READ / plan.read_bytes, DISK / found.disk_bytes)
    assert found.expected_tok_s(READ, DISK) > plan.expected_tok_s(READ, DISK)
    assert found.footprint == plan.footprint


def test_even_routing_says_what_a_plan_says_without_a_trace() -> None:
    trace, plan = RoutingTrace(random_ids(500, 32, 2, 8)), make_plan(FULL, 12 << 30, 4)
    found = plan_from_trace(trace, plan)
    assert found.placement == plan.placement
    assert found.found.hit_rate == pytest.approx(plan.share, abs=0.01)
    assert found.expected_tok_s(READ, DISK) == pytest.approx(plan.expected_tok_s(READ, DISK), rel=0.03)


@pytest.mark.parametrize("batch", [2, 3])
def test_a_batch_goes_through_the_trace_side_by_side(batch: int) -> None:
    trace, plan = local_trace(400), plan_of(25, batch)
    found, steps = plan_from_trace(trace, plan), 400 // batch
    parts = [trace.topk_ids[one * steps : (one + 1) * steps] for one in range(batch)]
    ids = np.stack(parts, axis=1).reshape(-1, 8, 2)
    weights = plan.weights
    same = replay(
        ids, found.placement, weights.n_experts, weights.expert, steps=[batch] * steps, skip=steps // 2
    )  # fmt: skip
    assert (found.counted, found.found) == (steps - steps // 2, same)
    asked = (same.hits + same.misses) / found.counted
    assert 16 < asked < 16 * batch  # some chose the same
    assert found.read_bytes == pytest.approx(plan.weights.rest - plan.weights.embedding + asked * plan.weights.expert)
    assert found.decode_tok_s(READ, DISK)[0] == batch * READ / found.read_bytes


def test_of_a_long_trace_the_beginning_is_replayed() -> None:
    trace = local_trace(REPLAYED + 40, 4)
    args = dataclasses.replace(FULL, n_layers=4)
    weights = weights_at(args, 4)
    plan = make_plan(args, footprint_of(args, weights, 600, 1, experts=12 * weights.expert).total, 4, 600)
    found = plan_from_trace(trace, plan)
    assert found.counted == REPLAYED // 2
    assert found == plan_from_trace(RoutingTrace(trace.topk_ids[:REPLAYED]), plan)


def test_too_short_a_trace_is_refused() -> None:
    with pytest.raises(OptionError, match="the trace has 5 tokens; 6 or more") as caught:
        plan_from_trace(local_trace(5), plan_of(25, 3))
    assert caught.value.hint
    assert isinstance(plan_from_trace(local_trace(6), plan_of(25, 3)), TracedPlan)


# ---------------------------------------- the command


def told(*args: object) -> dict[str, Any]:
    done = run("plan", *args, "--json")
    assert (done.code, done.err) == (0, "")
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_the_command_prints_the_plan_by_the_trace(tmp_path: Path) -> None:
    trace, path = local_trace(200, 32), tmp_path / "a trace"
    trace.save(path)
    line = ("mixtral-8x7b", "--memory", "12GiB")
    plan = make_plan(FULL, 12 << 30)
    expected = plan_from_trace(trace, plan)
    plain, found = told(*line), told(*line, "--trace", path)
    assert plain["trace"] is None
    assert found["trace"] == {
        "file": str(path),
        "counted_steps": 100,
        "hits": expected.found.hits,
        "misses": expected.found.misses,
        "hit_rate": expected.found.hit_rate,
        "even_hit_rate": plan.share,
    }
    assert found["plan"]["pinned"] == [list(key) for key in sorted(expected.placement.pinned)]
    assert found["plan"]["slots"] == expected.placement.slots
    assert found["plan"]["total"] == plain["plan"]["total"]
    ceilings, device = found["ceilings"], found["device"]
    assert ceilings["disk_bytes_per_step"] == round(expected.disk_bytes)
    assert ceilings["decode_tok_s_expected"] == expected.expected_tok_s(device["read"], device["disk"])
    assert ceilings["decode_tok_s_expected"] > plain["ceilings"]["decode_tok_s_expected"]
    assert found["command"] == plain["command"] + f" -o 'trace={path}'"
    text = " ".join(run("plan", *line, "--trace", path).out.split())
    assert f"{expected.found.hit_rate:.1%} of the bytes asked for would have been there ({plan.share:.1%} if" in text
    assert f"by {len(expected.placement.pinned)} pinned experts and {expected.placement.slots} slots" in text
    assert "counted over 100 tokens" in text


def test_where_all_experts_fit_there_is_nothing_to_place(tmp_path: Path) -> None:
    local_trace(20, 32).save(tmp_path / "trace")
    line = ("mixtral-8x7b", "--memory", "60GiB")
    done = run("plan", *line, "--trace", tmp_path / "trace")
    assert (done.code, done.out) == (0, run("plan", *line).out)
    assert "nothing for trace to do" in done.err


@pytest.mark.parametrize("memory", ["12GiB", "60GiB"])
def test_traces_that_will_not_do_are_refused(memory: str, tmp_path: Path) -> None:
    local_trace(20, 5).save(tmp_path / "trace")
    line = ("--memory", memory, "--trace", tmp_path / "trace")
    refused(run("plan", "mixtral-8x7b", *line), "of 5 layers", "the model has 32 layers", hint="record")
    refused(run("plan", "mistral-7b", *line), "dense", hint="leave the trace out")
    refused(run("plan", "mixtral-8x7b", *line[:-1], tmp_path / "absent"), str(tmp_path / "absent"))
    (tmp_path / "text").write_text("no trace")
    refused(run("plan", "mixtral-8x7b", *line[:-1], tmp_path / "text"), str(tmp_path / "text"))


# ---------------------------------------- a run


@needs_compiled
@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("kept", [0.85, 0.0])
def test_a_run_within_the_budget_hits_as_often_as_the_plan_says(kept: float, tmp_path: Path) -> None:
    """Two replies, token by token the halves of a trace: the first fills the cache, the second is what was counted."""
    quantise(make_source(tmp_path, hidden_dim=1024), tmp_path / "store")
    trace, path, store = local_trace(200, 2, kept), tmp_path / "trace", tmp_path / "store"
    trace.save(path)
    whole = LLM.load(store, memory="1GB").plan
    assert whole is not None
    budget = footprint_of(whole.args, whole.weights, 256, 1, experts=9 * whole.weights.expert).total
    found = told(store, "--memory", budget, "--context", 256, "--trace", path)
    words = found["command"].split()
    options = dict(word.split("=", 1) for word in words if "=" in word)
    llm = LLM.load(store, memory=budget, context=256, trace=options["trace"])
    assert llm.plan is not None
    assert llm.plan.placement is not None
    assert sorted(map(list, llm.plan.placement.pinned)) == found["plan"]["pinned"]
    assert bool(llm.plan.placement.pinned) == (kept > 0)
    assert re.search(rf"--memory {budget} ", found["command"])
    with routed(llm.model, Traced(trace)):
        replies = [llm.generate([5], temperature=0, max_tokens=100, logit_bias={2: -100}) for _ in range(2)]
    assert [reply.usage.completion_tokens for reply in replies] == [100, 100]
    counted = replies[1].experts
    assert counted is not None
    assert (counted.total.hits, counted.total.misses) == (found["trace"]["hits"], found["trace"]["misses"])
    # Heads end at a whole row of the kernels, and memory at whole pages.
    assert counted.hit_rate == pytest.approx(found["trace"]["hit_rate"], abs=0.03)
