"""What a model takes of a card and of the host beside it, and how it runs within both: arithmetic alone, as `plan`'s.

"The card" is the GPU. Weights that every token needs, keys and values, and what the operations need while they compute
are always on it. Experts are there as far as there is room; the others lie in the host's memory, and are copied, or
computed with, when a token is routed to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from octavo.args import ModelArgs
from octavo.errors import OptionError
from octavo.plan import (
    BASE,
    CHUNK,
    DEFAULT_CONTEXT,
    UNASKED,
    Footprint,
    Weights,
    any_of,
    check_request,
    kv_cache_bytes,
    read_of_step,
    show_size,
    touched_experts,
    weights_at,
)

CARD_PRECISIONS = UNASKED
"""Bits of a weight that a card computes with, best first."""
NUMBER = 2
"""Bytes of a number on the card that is neither quantised nor a sum: keys, values and activations are bfloat16."""
CARD_BASE = 600_000_000
"""Of the card: a process's CUDA context, and the code of cuBLAS, torch and Triton that is loaded into it. An estimate
until benchmarks/gpu/memory.py has measured it; it depends on the card and its driver."""
HOST_BASE = BASE + 1_660_000_000
"""Of the host: the process without experts. CUDA's driver and libraries take more than the process that `plan` counts;
how much is an estimate too."""
CUBLAS = 32 << 20
"""What torch gives to cuBLAS to work in, on Hopper; 8 MiB on cards before it."""
CARD_SLACK = 64 << 20
"""What torch's allocator keeps: its blocks are of 2 or 20 MiB, or more, and are rarely filled to the end."""


# ---------------------------------------- what a model takes


@dataclass(frozen=True)
class CardFootprint(Footprint):
    """Bytes of the card's memory, by what takes them; ``base`` is the CUDA context."""

    base: int = CARD_BASE


@dataclass(frozen=True)
class HostFootprint:
    """Bytes of the host's memory.

    Attributes:
        experts: those that are not kept on the card.
        base: the process itself.
    """

    experts: int
    base: int = HOST_BASE

    @property
    def total(self) -> int:
        """All of it."""
        return self.experts + self.base


def card_workspace_bytes(args: ModelArgs, weights: Weights, context: int, batch: int) -> int:
    """Return what the operations take on the card at most: a prompt's chunk, the decode step's graphs, and the logits.

    Of each of CHUNK tokens, and again of each of the batch for the graphs, which keep a decode step's tensors:

    - the stream into a block, out of it, and normed twice: 4 of dim bfloat16 numbers;
    - attention: q, k, v and what comes out in bfloat16; q and k again while they are rotated, twice in float32 and
      once in bfloat16. The scores are never all there: torch's fused kernels keep them within the chip;
    - experts: for each of its K choices the activations of both products, where weights are low-bit, as int8 in units
      of 64 columns with 16 bytes of scale and sums at most, dim and hidden_dim wide; the hidden activations in
      float32; and the part of the sum, dim wide, in float32. A dense feed-forward block counts as one choice, and
      its two first products and their product are tensors of their own.

    Besides: what a chunk's tokens may see of the context, as bool and as bfloat16; with a sliding window a copy of a
    layer's keys and values; of each sequence of the batch the logits in bfloat16 and float32, and sampling's sorted
    logits, their order (int64), probabilities and the probabilities' sums; CUBLAS and CARD_SLACK.
    """
    dim, hidden, chosen = args.dim, args.hidden_dim, args.moe.num_experts_per_tok if args.moe else 1
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    slots = min(context, args.sliding_window or context) + CHUNK

    def ready(cols: int) -> int:
        return 0 if weights.bits == 16 else -(-cols // 128) * 160

    attention = (2 * q + 2 * kv) * NUMBER + (q + kv) * (4 + 4 + NUMBER)
    mixture = chosen * (ready(dim) + ready(hidden) + 4 * hidden + 4 * dim)
    token = 4 * dim * NUMBER + attention + mixture + (0 if args.moe else 3 * hidden * NUMBER)
    ring = 2 * slots * kv * NUMBER if args.sliding_window else 0
    logits = batch * args.vocab_size * (NUMBER + 4 + 4 + 8 + 4 + 4)
    return (CHUNK + batch) * token + CHUNK * slots * (1 + NUMBER) + ring + logits + CUBLAS + CARD_SLACK


def card_footprint(
    args: ModelArgs, weights: Weights, context: int, batch: int, experts: int | None = None
) -> CardFootprint:
    """Return what a model takes of the card with every expert there, or so many bytes of them."""
    return CardFootprint(
        experts=weights.experts if experts is None else experts,
        rest=weights.rest,
        kv_cache=kv_cache_bytes(args, context, batch, NUMBER),
        workspace=card_workspace_bytes(args, weights, context, batch),
    )


def passing_slots(args: ModelArgs, batch: int) -> int:
    """Return how many slots there must be: a decode step of a layer has all of its experts on the card at a time."""
    return min(args.moe.num_experts, batch * args.moe.num_experts_per_tok) if args.moe else 0


# ---------------------------------------- plans


@dataclass(frozen=True)
class CardPlacement:
    """Which experts are on the card, where there is no room for all.

    Attributes:
        nbytes: of the card's memory for experts: that of slots and pinned ones.
        slots: whole experts that there is room for besides the pinned ones; the one used longest ago makes room.
        pinned: experts that stay on the card, by layer and number. All others lie in the host's memory too.
    """

    nbytes: int
    slots: int
    pinned: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class CardPlan:
    """How a model runs within a budget of the card and one of the host.

    Attributes:
        args: the model's shape.
        weights: in the chosen precision.
        context: tokens of a sequence.
        batch: sequences side by side.
        gpu_budget: bytes that the process may take of the card.
        host_budget: and of the host; None where nobody bounds it.
        placement: of the experts; None where all are on the card.
        card: what is taken of the card.
        host: what is taken of the host.
        reason: why this precision, and why these experts.
    """

    args: ModelArgs
    weights: Weights
    context: int
    batch: int
    gpu_budget: int
    host_budget: int | None
    placement: CardPlacement | None
    card: CardFootprint
    host: HostFootprint
    reason: str

    @property
    def bits(self) -> int | None:
        """Of a weight; None for a store, whose precision is its own."""
        return self.weights.bits

    @property
    def resident(self) -> int:
        """Experts that are on the card at a time."""
        placement = self.placement
        return self.weights.n_experts if placement is None else placement.slots + len(placement.pinned)

    @property
    def share(self) -> float:
        """How much of the experts is on the card, 0 to 1; under even routing the hit rate is no better."""
        return 1.0 if self.placement is None else self.resident / self.weights.n_experts

    @property
    def read_bytes(self) -> float:
        """Bytes of weights that a decode step of the batch reads from the card's memory."""
        return read_of_step(self.weights, touched_experts(self.args, self.batch))

    @property
    def link_bytes(self) -> float:
        """Bytes that it copies from the host, if no expert is likelier than another."""
        return touched_experts(self.args, self.batch) * self.weights.expert * (1 - self.share)

    def decode_tok_s(self, read: float, link: float) -> tuple[float, float | None]:
        """Return the most tokens a second that bandwidths allow: the card's memory, and the link where it is used.

        Keys and values come on top: they are few at first.
        """
        return self.batch * read / self.read_bytes, self.batch * link / self.link_bytes if self.link_bytes else None

    def together_tok_s(self, read: float, link: float) -> float:
        """Return the most tokens a second if nothing is computed while experts are copied."""
        return self.batch / (self.read_bytes / read + self.link_bytes / link)

    def prefill_tok_s(self, link: float) -> float | None:
        """Return the most prompt tokens a second where experts are copied: a chunk needs each of them once."""
        return CHUNK * link / (self.weights.experts * (1 - self.share)) if self.link_bytes else None


def make_card_plan(
    args: ModelArgs,
    gpu_budget: int,
    host_budget: int | None = None,
    bits: int | None = None,
    context: int = DEFAULT_CONTEXT,
    batch: int = 1,
    store: Weights | None = None,
) -> CardPlan:
    """Choose a precision, and the experts that are on the card.

    A precision that is asked for is kept. Otherwise it is the highest of CARD_PRECISIONS at which all experts fit, else
    the lowest of them with the rest of the experts in the host's memory. Where the host has no room for them either, as
    few as possible are pinned to the card, evenly over the layers. Slots take all room that is left.

    Args:
        args: the model's shape.
        gpu_budget: bytes that the process may take of the card.
        host_budget: and of the host; None for any number.
        bits: of CARD_PRECISIONS.
        context: tokens of a sequence, prompt and reply together.
        batch: sequences side by side.
        store: the weights of a store, which have a precision of their own.

    Raises:
        OptionError: a budget is too small (the hint is the smallest that works), or an argument is out of range.
    """
    if bits is not None and bits not in CARD_PRECISIONS:
        raise not_on_a_card(f"bits is {bits}")
    choices = check_request(args, bits, context, batch, store)
    if host_budget is not None and host_budget < HOST_BASE:
        raise OptionError(
            f"{show_size(host_budget)} of the host's memory is too little: a process that uses a card takes "
            f"{show_size(HOST_BASE)}",
            hint=f"the smallest that works is --memory {HOST_BASE}",
        )
    for weights in choices:
        whole = card_footprint(args, weights, context, batch)
        if whole.total <= gpu_budget:
            reason, host = _why(weights, choices), HostFootprint(0)
            return CardPlan(args, weights, context, batch, gpu_budget, host_budget, None, whole, host, reason)
    weights = choices[-1]
    found = _place(args, weights, gpu_budget, host_budget, context, batch)
    if found is None:
        raise _too_small(args, gpu_budget, host_budget, choices, context, batch)
    held = weights.n_experts - len(found.pinned)
    where = "the host's memory holds the rest"
    if found.pinned:
        where = f"the host's memory has room for {held} of the experts, so {len(found.pinned)} are pinned to the card"
    card, host = card_footprint(args, weights, context, batch, found.nbytes), HostFootprint(held * weights.expert)
    reason = _why(weights, choices, where)
    return CardPlan(args, weights, context, batch, gpu_budget, host_budget, found, card, host, reason)


def not_on_a_card(found: str) -> OptionError:
    """The refusal of a precision that the card has no kernels for."""
    return OptionError(
        f"{found}; a card computes with {any_of(CARD_PRECISIONS)} bits", hint="--bits 4, or --device cpu"
    )


def card_verdict(
    args: ModelArgs, weights: Weights, gpu_budget: int, host_budget: int | None, context: int, batch: int
) -> str:
    """Say whether a model in this precision "fits" on a card, is "cached" there, or "does not fit"."""
    if host_budget is not None and host_budget < HOST_BASE:
        return "does not fit"
    if card_footprint(args, weights, context, batch).total <= gpu_budget:
        return "fits"
    return "cached" if _place(args, weights, gpu_budget, host_budget, context, batch) else "does not fit"


def _held(weights: Weights, host_budget: int | None) -> int:
    """So many experts the host has room for."""
    if host_budget is None or not weights.expert:
        return weights.n_experts
    return min(weights.n_experts, max(0, host_budget - HOST_BASE) // weights.expert)


def _place(
    args: ModelArgs, weights: Weights, gpu_budget: int, host_budget: int | None, context: int, batch: int
) -> CardPlacement | None:
    """Share out what is left of the card; None where it is too little, or there are no experts."""
    if not weights.expert or args.moe is None:
        return None
    room = (gpu_budget - card_footprint(args, weights, context, batch, 0).total) // weights.expert
    n_pinned = weights.n_experts - _held(weights, host_budget)
    if room - n_pinned < passing_slots(args, batch):
        return None
    each, layers = args.moe.num_experts, args.n_layers
    by_number = [(layer, number) for number in range(each) for layer in range(layers)]
    return CardPlacement(room * weights.expert, room - n_pinned, frozenset(by_number[:n_pinned]))


def _why(weights: Weights, choices: list[Weights], where: str = "") -> str:
    if weights.bits is None:
        chosen = "the store has its own precision"
    elif len(choices) == 1:
        chosen = "as asked for"
    elif not where:
        chosen = f"the most of {any_of(CARD_PRECISIONS)} bits at which all of it fits on the card"
    else:
        chosen = f"at {any_of(CARD_PRECISIONS)} bits not all of it fits on the card"
    return f"{chosen}; {where}" if where else chosen


def _too_small(
    args: ModelArgs, gpu_budget: int, host_budget: int | None, choices: list[Weights], context: int, batch: int
) -> OptionError:
    weights = choices[-1]  # the one that may be cached; of a tiny model, where padding counts, another may take less
    bare, least = card_footprint(args, weights, context, batch, 0), passing_slots(args, batch)
    parts = [
        f"{show_size(bare.rest)} of weights" + (" that are no experts" if weights.n_experts else ""),
        f"{show_size(bare.kv_cache)} of KV cache",
        f"{show_size(bare.workspace)} of workspace",
        f"{show_size(bare.base)} for CUDA",
    ]
    works = [card_footprint(args, choice, context, batch).total for choice in choices]
    hints = []
    if weights.n_experts:
        held = _held(weights, host_budget)
        n_pinned = weights.n_experts - held
        works.append(bare.total + (n_pinned + least) * weights.expert)
        beside = f"{n_pinned} experts of {show_size(weights.expert)}, which the host has no room for, and {least} more"
        parts.insert(1, beside if n_pinned else f"{least} experts of {show_size(weights.expert)}")
        room = (gpu_budget - bare.total) // weights.expert
        if n_pinned and host_budget is not None and room >= least:
            needed = HOST_BASE + (weights.n_experts - (room - least)) * weights.expert
            hints.append(f"the smallest of the host's that works is --memory {needed} ({show_size(needed)})")
    hints.append(f"the smallest of the card's that works is --gpu-memory {min(works)} ({show_size(min(works))})")
    if weights.bits is not None:
        fewer = _that_fit(args, gpu_budget, host_budget, weights.bits, context, batch)
        hints += [f"what works within {show_size(gpu_budget)} is --bits {bits}" for bits in list(fewer)[:1]]
    return OptionError(
        f"{show_size(gpu_budget)} of the card's memory is too little for this model ({weights.label}): it needs "
        f"{', '.join(parts)}",
        hint="; or ".join(hints),
    )


def _that_fit(
    args: ModelArgs, gpu_budget: int, host_budget: int | None, above: int, context: int, batch: int
) -> Iterator[int]:
    for bits in CARD_PRECISIONS:
        weights = weights_at(args, bits)
        if bits < above and card_verdict(args, weights, gpu_budget, host_budget, context, batch) != "does not fit":
            yield bits
