"""What verbs say of a budget: the plan that was made for it, and how the experts fared within it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from octavo.cli.terminal import note
from octavo.plan import MemoryPlan, show_size

if TYPE_CHECKING:
    from octavo.experts import CacheCounters, LayerCounters


def experts_in_words(plan: MemoryPlan) -> str:
    """Which experts are in memory: "82% of every expert in memory (209 experts' worth), the rest streamed"."""
    n_experts, placement = plan.weights.n_experts, plan.placement
    if placement is None:
        return f"all {n_experts} experts in memory" if n_experts else "all in memory"
    if plan.share == 1:
        return f"all {n_experts} experts in memory, token embeddings read from disk"
    part, pinned = int(100 * placement.head_share(n_experts, plan.weights.expert)), len(placement.pinned)
    others = f"{pinned} experts and {part}% of every other" if pinned else f"{part}% of every expert"
    return f"{others} in memory ({plan.resident} experts' worth), the rest streamed from disk"


def plan_line(plan: MemoryPlan) -> str:
    """The plan in a line."""
    size, sequences = plan.footprint, "" if plan.batch == 1 else f"{plan.batch} times "
    return (
        f"memory {show_size(size.total)} of {show_size(plan.budget)}: {plan.weights.label}, {experts_in_words(plan)}; "
        f"KV cache for {sequences}{plan.context:,} tokens {show_size(size.kv_cache)}"
    )


def plan_to_json(plan: MemoryPlan) -> dict[str, Any]:
    """The plan for programs; sizes in bytes."""
    return {
        "precision": plan.weights.label,
        "bits": plan.bits,
        "resident_experts": plan.resident,
        "streamed_experts": plan.streamed,
        "expert_share": plan.share,
        "slots": plan.placement.slots if plan.placement else plan.weights.n_experts,
        "pinned": sorted(plan.placement.pinned) if plan.placement else [],
        "expert_bytes": plan.weights.expert,
        **dataclasses.asdict(plan.footprint),
        "total": plan.footprint.total,
        "reason": plan.reason,
    }


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
