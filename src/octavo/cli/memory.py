"""What verbs say of a budget: the plan that was made for it, and how the experts fared within it."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from octavo.cli.terminal import note
from octavo.plan import Footprint, MemoryPlan, Weights, show_size
from octavo.plan_card import CardPlan

if TYPE_CHECKING:
    from octavo.experts import CacheCounters, LayerCounters

WIDTH = 100  # of a plan's lines


def experts_in_words(plan: MemoryPlan | CardPlan) -> str:
    """Which experts are in memory: "82% of every expert in memory (209 experts' worth), the rest streamed"."""
    n_experts = plan.weights.n_experts
    if isinstance(plan, CardPlan):
        if plan.placement is None:
            return f"all {n_experts} experts on the card" if n_experts else "all on the card"
        pinned = f" ({len(plan.placement.pinned)} pinned)" if plan.placement.pinned else ""
        held = n_experts - len(plan.placement.pinned)
        return (
            f"{plan.resident} of {n_experts} experts on the card at a time{pinned}, "
            f"{held} in {show_size(plan.host.experts)} of the host's memory"
        )
    if plan.placement is None:
        return f"all {n_experts} experts in memory" if n_experts else "all in memory"
    if plan.share == 1:
        return f"all {n_experts} experts in memory, token embeddings read from disk"
    part, whole = int(100 * plan.placement.head_share(n_experts, plan.weights.expert)), len(plan.placement.pinned)
    others = f"{whole} experts and {part}% of every other" if whole else f"{part}% of every expert"
    return f"{others} in memory ({plan.resident} experts' worth), the rest streamed from disk"


def plan_line(plan: MemoryPlan | CardPlan) -> str:
    """The plan in a line."""
    sequences = "" if plan.batch == 1 else f"{plan.batch} times "
    if isinstance(plan, CardPlan):
        head, cache = f"card {show_size(plan.card.total)} of {show_size(plan.gpu_budget)}", plan.card.kv_cache
    else:
        head = f"memory {show_size(plan.footprint.total)} of {show_size(plan.budget)}"
        cache = plan.footprint.kv_cache
    return (
        f"{head}: {plan.weights.label}, {experts_in_words(plan)}; "
        f"KV cache for {sequences}{plan.context:,} tokens {show_size(cache)}"
    )


def plan_to_json(plan: MemoryPlan | CardPlan) -> dict[str, Any]:
    """The plan for programs; sizes in bytes."""
    placement, n_experts = plan.placement, plan.weights.n_experts
    found = {
        "precision": plan.weights.label,
        "bits": plan.bits,
        "resident_experts": plan.resident,
        "streamed_experts": n_experts - plan.resident,
        "expert_share": plan.share,
        "slots": placement.slots if placement else n_experts,
        "pinned": sorted(placement.pinned) if placement else [],
        "expert_bytes": plan.weights.expert,
    }
    if isinstance(plan, CardPlan):
        sizes: dict[str, Any] = {
            "card": {**dataclasses.asdict(plan.card), "total": plan.card.total},
            "host": {**dataclasses.asdict(plan.host), "total": plan.host.total},
        }
    else:
        sizes = {**dataclasses.asdict(plan.footprint), "total": plan.footprint.total}
    return {**found, **sizes, "reason": plan.reason}


def budget_to_json(plan: MemoryPlan | CardPlan) -> dict[str, Any]:
    """What a plan was made for."""
    if isinstance(plan, CardPlan):
        budgets: dict[str, Any] = {"gpu_budget": plan.gpu_budget, "host_budget": plan.host_budget}
    else:
        budgets = {"budget": plan.budget}
    return {**budgets, "context": plan.context, "batch": plan.batch}


def precision_row(weights: Weights, size: Footprint, says: str) -> dict[str, Any]:
    """What a model takes in one precision, in bytes, and a verdict on it."""
    names = {"precision": weights.label, "bits": weights.bits}
    return {**names, "weights": size.weights, **dataclasses.asdict(size), "total": size.total, "verdict": says}


def precision_table(rows: Iterable[dict[str, Any]], base: str) -> Iterator[str]:
    """Rows of `precision_row` for people; ``base`` is what the process itself is called."""
    columns = ("weights", "kv_cache", "workspace", "base", "total")
    heads = ("weights", "KV cache", "workspace", base, "total")
    yield f"{'':9}{'precision':18}" + "".join(f"{head:>11}" for head in heads)
    for row in rows:
        sizes = "".join(f"{show_size(row[column]):>11}" for column in columns)
        yield f"{'':9}{row['precision']:18}{sizes}   {row['verdict']}"


def rate(tok_s: float | None) -> str:
    """Tokens a second in three figures or so."""
    return (
        "?" if tok_s is None else f"{tok_s:.0f}" if tok_s >= 100 else f"{tok_s:.1f}" if tok_s >= 1 else f"{tok_s:.2f}"
    )


def entry(head: str, *texts: str) -> Iterator[str]:
    """Texts beside a word, no wider than a terminal; commands are left whole, to be copied."""
    for number, text in enumerate(texts):
        first = f"{head if number == 0 else '':9}"
        if any(f"octavo {verb} " in text for verb in ("chat", "quantize", "convert")):
            yield first + text
        else:
            yield from textwrap.wrap(
                text,
                WIDTH,
                initial_indent=first,
                subsequent_indent=" " * 9,
                break_long_words=False,
                break_on_hyphens=False,
            )


def tell_experts(counters: CacheCounters | None) -> None:
    """A table of a reply's counters to stderr, layer by layer."""
    if counters is None:
        note("experts: all in memory, none read from the disk")
        return
    note(f"{'experts':9}{'hits':>9}{'misses':>9}{'hit rate':>10}{'read':>11}{'waited':>10}{'evicted':>9}")
    for layer, one in counters.layers.items():
        note(_row(f"layer {layer}", one))
    note(_row("all", counters.total))


def _row(head: str, one: LayerCounters) -> str:
    return (
        f"{head:9}{one.hits:9,}{one.misses:9,}{one.hit_rate:10.1%}{show_size(one.nbytes):>11}"
        f"{one.wait_seconds:8.2f} s{one.evictions:9,}"
    )
