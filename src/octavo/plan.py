"""What a model takes, and how it runs within a budget: arithmetic alone, before a single tensor is allocated.

A budget holds all of a process: weights, key-value cache, what the operations need while they compute, and the process
itself. Where the experts do not all fit, the first part of each stays in memory, its head, and the rest, its tail, is
read from disk when a token is routed to it: so the disk works while the heads are computed with, in every layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from octavo.args import ModelArgs
from octavo.errors import OptionError
from octavo.quant.formats import FORMATS
from octavo.quant.presets import PRESETS

BETWEEN = 1.2e-3
"""Seconds of a layer in which neither products nor reads are under way, where experts are streamed: 30 to 50 ms of a
token's 32 layers, measured."""
BESIDE = 0.45
"""Of the disk's speed is left while products stream from memory: from what six budgets took, see docs/log.md."""
PRECISIONS = (32, 16, 8, 4, 3, 2)
"""Bits of a weight, best first."""
UNASKED = (16, 8, 4)
"""Of these the planner chooses. Below 4 bits a model loses what a person would notice; that is for them to ask for."""
PASSING = 2
"""Slots for tails at least: one in use, and one that the next is read into."""
SLOTS = 4
"""So many where there is room: what the disk needs to be busy."""
DEFAULT_CONTEXT = 4096

BASE = 340_000_000
"""A process without weights: the peak resident memory of `octavo generate` with a model of 100 kB was 253 to 257 MB
(torch 2.13 for CPUs, Linux; 237 of them after `import octavo.llm` and one product), and runs of the full-size model
took up to 40 more than 300. Other builds of torch take more."""

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgtp])(i?b?)|b?)\s*", re.IGNORECASE | re.ASCII)
_EXPERT = re.compile(r"(layers\.\d+\.feed_forward\.experts\.\d+)\.w[123]\.weight")


def parse_size(text: str) -> int:
    """Return how many bytes a size is: "24GiB", "24 gb", "1.5TiB", "8000MB", or plain bytes.

    kB, MB, GB, TB and PB are powers of 1000, and KiB to PiB of 1024. A letter alone is of 1024 too, as docker, systemd
    and `free -h` have it: "24G" is 24 GiB. Upper and lower case are the same; part of a byte is dropped.

    Raises:
        OptionError: it is none, or zero.
    """
    found = _SIZE.fullmatch(text)
    if found is None or (found[2] is None and "." in found[1]):
        raise OptionError(f"{text!r} is no size; expected a number and a unit", hint="such as 24GiB, 24GB or 1.5TiB")
    power = 1 + "kmgtp".index(found[2].lower()) if found[2] else 0
    nbytes = int(Fraction(found[1]) * (1000 if (found[3] or "").lower() == "b" else 1024) ** power)
    if not 0 < nbytes < 2**63:
        raise OptionError(
            f"{text!r} is {'nothing' if nbytes == 0 else 'more than any machine has'}", hint="such as 24GiB"
        )
    return nbytes


def show_size(nbytes: float) -> str:
    """Bytes as people read them, in powers of 1000: "93.4 GB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.{0 if unit in ('MB', 'kB') and nbytes >= 10 * scale else 1}f} {unit}"
    return f"{nbytes:.0f} bytes"


# ---------------------------------------- what a model takes


@dataclass(frozen=True)
class Weights:
    """The bytes of a model's weights in one precision.

    Attributes:
        bits: of `PRECISIONS`; None for a store, whose precision is its own.
        label: of the precision.
        n_experts: in all layers; 0 for a dense model, whose feed-forward blocks count among the rest.
        experts: bytes of all experts.
        expert: bytes of the largest one, and so of a slot.
        rest: bytes of everything else.
        embedding: that part of ``rest`` of which a token reads one row only.
        number: bytes of a number that is not quantised, and of one in the key-value cache.
    """

    bits: int | None
    label: str
    n_experts: int
    experts: int
    expert: int
    rest: int
    embedding: int
    number: int

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return self.experts + self.rest


def weights_at(args: ModelArgs, bits: int) -> Weights:
    """Count a model's weights as bfloat16 or float16 (16 bits), float32, or low-bit by `octavo.quant.presets`.

    Raises:
        OptionError: no such precision.
    """
    if bits not in PRECISIONS:
        raise OptionError(f"bits is {bits!r}; expected one of {', '.join(map(str, PRECISIONS))}")
    number = 4 if bits == 32 else 2
    feed_forward, others = PRESETS.get(str(bits), (None, None))

    def matrix(rows: int, cols: int, name: str | None) -> int:
        return rows * cols * number if name is None else FORMATS[name].nbytes(rows, cols)

    dim, hidden, moe = args.dim, args.hidden_dim, args.moe
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    attention = matrix(q, dim, others) + 2 * matrix(kv, dim, others) + matrix(dim, q, others)
    expert = 2 * matrix(hidden, dim, feed_forward) + matrix(dim, hidden, feed_forward)
    block = attention + 2 * dim * number + (moe.num_experts * dim * number if moe else expert)
    embedding = args.vocab_size * dim * number
    output = 0 if args.tie_embeddings else matrix(args.vocab_size, dim, others)
    n_experts = args.n_layers * moe.num_experts if moe else 0
    return Weights(
        bits=bits,
        label="float32" if bits == 32 else f"{bits} bits",
        n_experts=n_experts,
        experts=n_experts * expert,
        expert=expert if moe else 0,
        rest=args.n_layers * block + embedding + output + dim * number,
        embedding=0 if args.tie_embeddings else embedding,
        number=number,
    )


def weights_of_store(args: ModelArgs, nbytes: Mapping[str, int], number: int) -> Weights:
    """Count the weights of a store of `octavo quantize`, whose tensors may be of different formats.

    Args:
        args: its shape.
        nbytes: of every tensor, by canonical name.
        number: bytes of a number that is not quantised.
    """
    experts: dict[str, int] = {}
    for name, size in nbytes.items():
        if match := _EXPERT.fullmatch(name):
            experts[match[1]] = experts.get(match[1], 0) + size
    total = sum(nbytes.values())
    return Weights(
        bits=None,
        label=f"store, {8 * total / args.n_params:.2f} bits",
        n_experts=len(experts),
        experts=sum(experts.values()),
        expert=max(experts.values(), default=0),
        rest=total - sum(experts.values()),
        embedding=0 if args.tie_embeddings else nbytes["tok_embeddings.weight"],
        number=number,
    )


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory, by what takes them.

    Attributes:
        experts: those that are in memory, or the slots for them.
        rest: all other weights.
        kv_cache: keys and values.
        workspace: what a forward needs besides.
        base: the process itself.
    """

    experts: int
    rest: int
    kv_cache: int
    workspace: int
    base: int = BASE

    @property
    def weights(self) -> int:
        """Bytes of weights."""
        return self.experts + self.rest

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.workspace + self.base


def footprint(args: ModelArgs, bits: int, context: int = DEFAULT_CONTEXT, batch: int = 1) -> Footprint:
    """Return what a model takes with every expert in memory.

    Args:
        args: its shape.
        bits: of `PRECISIONS`.
        context: tokens of a sequence, prompt and reply together.
        batch: sequences side by side.

    Raises:
        OptionError: no such precision.
    """
    return footprint_of(args, weights_at(args, bits), context, batch)


def kv_cache_bytes(args: ModelArgs, context: int, batch: int, number: int) -> int:
    """Return the bytes of keys and values of ``number`` bytes each; a sliding window bounds them."""
    slots = min(context, args.sliding_window or context)
    return 2 * args.n_layers * args.n_kv_heads * args.head_dim * slots * batch * number


CHUNK = 512  # tokens of a prompt that are computed at a time: `Engine`'s prefill_chunk, kBlockTokens of csrc/block.cpp
THREADS = 16  # each has a little room of its own; more of them than this are rare, and megabytes
SLACK = 32 << 20  # what malloc keeps, and arenas whose blocks are larger than what is asked of them
_TASK_FLOATS = 2 * CHUNK * 128  # csrc/moe.cpp: two results of a task, kDownPanels panels of 16 rows wide


def workspace_bytes(args: ModelArgs, weights: Weights, context: int, batch: int) -> int:
    """Return what a forward of CHUNK tokens needs at most, and the logits of a batch.

    Counted from csrc: the arenas keep what the largest call took, so attention's and the mixture's add up.

    - Attending::run (block.cpp): normed, q, k, v and mixed as numbers, rotated q and k as floats; a thread has the
      scores of the heads that share keys, over all slots, and a list of slots.
    - moe (moe.cpp): every chosen expert's tokens twice, as wide as dim and as hidden_dim, made ready for the kernels:
      bfloat16, or int8 in units of 64 columns with 16 bytes of scale and sums (kernels.h, unit_bytes).
    - around them, in torch: the stream into a block, out of it, and normed. A dense feed-forward block is computed
      module by module: w1 x, w3 x and their product are tensors of their own. A prompt with a sliding window is
      computed beside a copy of the layer's keys and values (cache.py, _RollingStep).

    Blocks of real sizes took 75 to 120 MB where this says 109 to 160.
    """
    number, dim, hidden = weights.number, args.dim, args.hidden_dim
    q, kv, shared = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.n_heads // args.n_kv_heads
    width, slots = -(-args.head_dim // 16) * 16, min(context, args.sliding_window or context) + CHUNK
    ring = 2 * slots * kv * number if args.sliding_window else 0

    def ready(cols: int) -> int:
        return cols * number if weights.bits in (16, 32) else -(-cols // 128) * 160

    attention = CHUNK * ((dim + 2 * q + 2 * kv) * number + (args.n_heads + args.n_kv_heads) * width * 4)
    attention += THREADS * 4 * (shared * (slots + width) + slots)
    chosen = args.moe.num_experts_per_tok if args.moe else 1
    mixture = CHUNK * chosen * (ready(dim) + ready(hidden)) + THREADS * 4 * _TASK_FLOATS
    around = CHUNK * (4 * dim + (0 if args.moe else 3 * hidden)) * number
    return attention + mixture + around + ring + batch * args.vocab_size * (number + 3 * 4) + SLACK


def footprint_of(args: ModelArgs, weights: Weights, context: int, batch: int, experts: int | None = None) -> Footprint:
    """With every expert in memory, or so many bytes of them; in that case embeddings are read from disk by the row."""
    return Footprint(
        experts=weights.experts if experts is None else experts,
        rest=weights.rest - (weights.embedding if experts is not None and weights.n_experts else 0),
        kv_cache=kv_cache_bytes(args, context, batch, weights.number),
        workspace=workspace_bytes(args, weights, context, batch),
    )


def touched_experts(args: ModelArgs, batch: int) -> float:
    """Return how many experts a decode step of a batch reads, routing spread evenly."""
    if args.moe is None:
        return 0.0
    missed = (1 - args.moe.num_experts_per_tok / args.moe.num_experts) ** batch
    return args.n_layers * args.moe.num_experts * (1 - missed)


def read_of_step(weights: Weights, touched: float) -> float:
    """Return the bytes of weights that a step computes with which reads so many experts."""
    return weights.rest - weights.embedding + touched * weights.experts / max(weights.n_experts, 1)


# ---------------------------------------- plans


@dataclass(frozen=True)
class Placement:
    """Which experts are in memory, where they do not all fit.

    Attributes:
        nbytes: of memory for experts.
        slots: tails that there is room for at a time; the one used longest ago makes room for the next.
        pinned: experts of which all stays, by layer and number; of the others as long a head as there is room for.
        prefetch: read what the next layer's router would choose now, before it does.
    """

    nbytes: int
    slots: int
    pinned: frozenset[tuple[int, int]] = frozenset()
    prefetch: bool = False

    def head_share(self, n_experts: int, expert: int) -> float:
        """Return how much of an expert that is not pinned stays in memory, 0 to 1.

        Args:
            n_experts: in all layers.
            expert: bytes of one.
        """
        others = n_experts - len(self.pinned)
        if others <= self.slots:
            return 1.0
        room = self.nbytes - (len(self.pinned) + self.slots) * expert
        return min(1.0, max(0.0, room / ((others - self.slots) * expert)))

    def resident_share(self, n_experts: int, expert: int) -> float:
        """Return how much of all experts stays in memory, 0 to 1; the tails in slots do not count."""
        pinned = len(self.pinned) / n_experts
        return pinned + (1 - pinned) * self.head_share(n_experts, expert)


def place_experts(
    nbytes: int, expert: int, pinned: Iterable[tuple[int, int]] = (), prefetch: bool = False
) -> Placement:
    """Return how so many bytes are shared out among experts of ``expert`` bytes.

    Raises:
        OptionError: they are less than PASSING experts take.
    """
    pinned = frozenset(pinned)
    slots = min(SLOTS, nbytes // expert - len(pinned))
    if slots < PASSING:
        raise OptionError(
            f"{nbytes} bytes of memory for experts of {expert}, {len(pinned)} of them pinned, are too few",
            hint=f"give {(PASSING + len(pinned)) * expert} bytes or more",
        )
    return Placement(nbytes, slots, pinned, prefetch)


@dataclass(frozen=True)
class MemoryPlan:
    """How a model runs within a budget.

    Attributes:
        args: the model's shape.
        weights: in the chosen precision.
        budget: bytes that all of the process may take.
        context: tokens of a sequence.
        batch: sequences side by side.
        placement: of the experts; None where all weights are in memory.
        footprint: what is taken of the budget.
        reason: why this precision, and why these experts.
    """

    args: ModelArgs
    weights: Weights
    budget: int
    context: int
    batch: int
    placement: Placement | None
    footprint: Footprint
    reason: str

    @property
    def bits(self) -> int | None:
        """Of a weight; None for a store, whose precision is its own."""
        return self.weights.bits

    @property
    def share(self) -> float:
        """How much of the experts stays in memory, 0 to 1."""
        if self.placement is None:
            return 1.0
        return self.placement.resident_share(self.weights.n_experts, self.weights.expert)

    @property
    def resident(self) -> int:
        """So many experts' worth of memory."""
        return int(self.share * self.weights.n_experts)

    @property
    def streamed(self) -> int:
        """And so many that is read from disk."""
        return self.weights.n_experts - self.resident

    @property
    def _touched(self) -> float:
        return touched_experts(self.args, self.batch)

    @property
    def read_bytes(self) -> float:
        """Bytes of weights that a decode step of the batch reads from memory."""
        return read_of_step(self.weights, self._touched)

    @property
    def disk_bytes(self) -> float:
        """Bytes that it reads from disk, if no expert is likelier than another."""
        return self._touched * self.weights.expert * (1 - self.share)

    def decode_tok_s(self, read: float, disk: float) -> tuple[float, float | None]:
        """Return the most tokens a second that bandwidths allow: that of memory, and that of disk where it is used.

        Keys and values come on top: they are few at first.
        """
        return self.batch * read / self.read_bytes, self.batch * disk / self.disk_bytes if self.disk_bytes else None

    def expected_tok_s(self, read: float, disk: float) -> float:
        """Return the tokens a second to expect: while experts are computed with the disk works too, at less speed."""
        others = self.weights.rest - self.weights.embedding
        experts = (self.read_bytes - others) / read
        seconds = others / read + experts + max(0.0, self.disk_bytes / disk - BESIDE * experts)
        if self.disk_bytes:
            seconds += self.args.n_layers * BETWEEN
        return self.batch / seconds

    def prefill_tok_s(self, disk: float) -> float | None:
        """Return the most prompt tokens a second where experts are streamed: a chunk reads each of them once."""
        return CHUNK * disk / (self.weights.experts * (1 - self.share)) if self.disk_bytes else None


def make_plan(
    args: ModelArgs,
    budget: int,
    bits: int | None = None,
    context: int = DEFAULT_CONTEXT,
    batch: int = 1,
    store: Weights | None = None,
) -> MemoryPlan:
    """Choose a precision, and the experts that stay in memory.

    A precision that is asked for is kept. Otherwise it is the highest of `UNASKED` at which all experts fit, else the
    lowest of them with some experts streamed.

    Args:
        args: the model's shape.
        budget: bytes that all of the process may take.
        bits: of `PRECISIONS`.
        context: tokens of a sequence, prompt and reply together.
        batch: sequences side by side.
        store: the weights of a store, which have a precision of their own.

    Raises:
        OptionError: the budget is too small (the hint is the smallest that works), or an argument is out of range.
    """
    choices = check_request(args, bits, context, batch, store)
    for weights in choices:
        whole = footprint_of(args, weights, context, batch)
        if whole.total <= budget:
            reason = _why(weights, choices, fits=True)
            return MemoryPlan(args, weights, budget, context, batch, None, whole, reason)
    weights = choices[-1]
    room = budget - footprint_of(args, weights, context, batch, experts=0).total
    if not weights.expert or room < PASSING * weights.expert:
        raise _too_small(args, budget, choices, context, batch)
    room = min(room, max(weights.experts, PASSING * weights.expert))  # all, where only embeddings stay on the disk
    placement = place_experts(room, weights.expert)
    size = footprint_of(args, weights, context, batch, experts=room)
    return MemoryPlan(args, weights, budget, context, batch, placement, size, _why(weights, choices, fits=False))


def verdict(args: ModelArgs, weights: Weights, budget: int, context: int, batch: int) -> str:
    """Say whether a model in this precision "fits", "streams" or "does not fit"."""
    if footprint_of(args, weights, context, batch).total <= budget:
        return "fits"
    return "streams" if _least(args, weights, context, batch) <= budget else "does not fit"


def check_request(args: ModelArgs, bits: int | None, context: int, batch: int, store: Weights | None) -> list[Weights]:
    """Return the weights to choose among, best first; the arguments are `make_plan`'s.

    Raises:
        OptionError: one is out of range, or a precision is asked of a store.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise OptionError(f"{name} is {value}; expected an integer of at least 1")
    if context > (most := args.max_seq_len):
        raise OptionError(f"context is {context}; this model's is {most} tokens", hint=f"--context {most}")
    if store is not None and bits is not None:
        raise OptionError(f"bits is {bits}; this is a store, which has its own precision", hint="leave the option out")
    return [store] if store else [weights_at(args, each) for each in (UNASKED if bits is None else (bits,))]


def _why(weights: Weights, choices: list[Weights], *, fits: bool) -> str:
    if weights.bits is None:
        chosen = "the store has its own precision"
    elif len(choices) == 1:
        chosen = "as asked for"
    elif fits:
        chosen = f"the most of {any_of(UNASKED)} bits at which all of it fits"
    else:
        chosen = f"at {any_of(UNASKED)} bits not all of it fits, and fewer must be asked for"
    return chosen if fits else f"{chosen}; what every token needs stays in memory, and experts fill the rest"


def any_of(numbers: Sequence[int]) -> str:
    """In words: "16, 8 or 4"."""
    return " or ".join((", ".join(map(str, numbers[:-1])), str(numbers[-1])))


def _least(args: ModelArgs, weights: Weights, context: int, batch: int) -> int:
    """The smallest budget in this precision that streams; of a dense model, which has no experts, everything."""
    return footprint_of(args, weights, context, batch, experts=PASSING * weights.expert).total


def _too_small(args: ModelArgs, budget: int, choices: list[Weights], context: int, batch: int) -> OptionError:
    weights = choices[-1]  # the one that may stream; of a tiny model, where padding counts, another may take less
    wholes = [footprint_of(args, choice, context, batch).total for choice in choices]
    least = min(_least(args, weights, context, batch), *wholes)
    bare = footprint_of(args, weights, context, batch, experts=0)
    parts = [
        f"{show_size(bare.rest)} of weights" + (" that are no experts" if weights.n_experts else ""),
        f"{show_size(bare.kv_cache)} of KV cache",
        f"{show_size(bare.workspace + bare.base)} for the process and its workspace",
    ]
    if weights.n_experts:
        parts.insert(1, f"{PASSING} experts of {show_size(weights.expert)}")
    hint = f"the smallest that works is --memory {least} ({show_size(least)})"
    smaller = [] if weights.bits is None else list(_that_fit(args, budget, weights.bits, context, batch))
    if smaller:
        hint += f"; what works within {show_size(budget)} is --bits {smaller[0]}"
    return OptionError(
        f"{show_size(budget)} of memory is too little for this model ({weights.label}): it needs {', '.join(parts)}",
        hint=hint,
    )


def _that_fit(args: ModelArgs, budget: int, above: int, context: int, batch: int) -> Iterator[int]:
    for bits in PRECISIONS:
        if bits < above and verdict(args, weights_at(args, bits), budget, context, batch) != "does not fit":
            yield bits
