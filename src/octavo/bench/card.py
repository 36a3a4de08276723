"""Prefill and decode of the real engine on a card, each beside the limit that bounds it.

All of it runs on a CPU too, by Triton's interpreter: slowly, and without the figures of a card's memory.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from octavo.args import ModelArgs
from octavo.bench.limits import (
    MemoryWatch,
    Sizes,
    copy_bandwidth,
    link_bandwidth,
    matrix_rate,
    synchronize,
)
from octavo.bench.measure import (
    OTHER,
    STEPS_BETWEEN_READS,
    begin_decoding,
    context_for,
    median,
    peak_rss_bytes,
    prefill_operations,
    random_prompt,
    step,
)
from octavo.engine import Engine
from octavo.experts import LayerCounters
from octavo.experts.card import CachedExperts, CardCache
from octavo.experts.trace import record
from octavo.kernels.card import CardExperts, CardLinear
from octavo.machine import physical_memory
from octavo.model import Mixtral
from octavo.plan import CHUNK, touched_experts
from octavo.plan_card import CardPlan, make_card_plan
from octavo.sampling import SamplingParams

PREFILLS = 3
"""Prompts that are read and timed."""
WATCHED = 8
"""Decode steps of which the routers' choice is taken down, where several sequences may share an expert."""


def card_cache(model: Mixtral) -> CardCache | None:
    """The cache of a model's experts, where they do not all lie on the card."""
    return next((module.cache for module in model.modules() if isinstance(module, CachedExperts)), None)


def step_nbytes(model: Mixtral, experts: float) -> float:
    """Bytes of the weights that a decode step reads; of the embedding it reads next to nothing.

    Args:
        model: on a card.
        experts: of a layer that are needed, on average.
    """
    nbytes = 0.0
    for module in model.modules():
        if isinstance(module, CardLinear):
            nbytes += module.matrix.nbytes
        elif isinstance(module, CardExperts | CachedExperts):
            nbytes += experts * module.table.nbytes
    tied = model.args.tie_embeddings
    return nbytes + sum(
        parameter.nbytes for name, parameter in model.named_parameters() if tied or name != "tok_embeddings.weight"
    )


@dataclass
class CardBench:
    """One measurement.

    Attributes:
        model: whose weights lie on a card as `octavo.load.assemble_on_card` puts them there.
        prompt: tokens to read.
        decode: steps to measure.
        batch: sequences side by side.
        plan: how the model was loaded; what it predicts is told beside what is measured.
        seed: of the random tokens.
        sizes: what is moved and multiplied to find the limits.

    Raises:
        OptionError: so many tokens are more than the model's context.
    """

    model: Mixtral
    prompt: int
    decode: int
    batch: int
    plan: CardPlan | None = None
    seed: int = 0
    sizes: Sizes = field(default_factory=Sizes)
    context: int = field(init=False)

    def __post_init__(self) -> None:
        self.context = context_for(self.model.args, self.prompt, self.decode + WATCHED, self.batch)

    def run(self) -> dict[str, Any]:
        """Measure, and return the figures of `octavo bench --json`."""
        device, watch = self.model.device, MemoryWatch(self.model.device)
        with torch.inference_mode():
            engine = self._engine()
            figures = self._prefill(engine, watch) | self._decode(engine, watch)
        return {
            "prompt": self.prompt,
            "decode": self.decode,
            "batch": self.batch,
            **figures,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            **({} if self.plan is None else {"plan": plan_figures(self.plan)}),
            **({"card_peak_bytes": watch.allocated, "card_used_bytes": watch.used} if device.type == "cuda" else {}),
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def _engine(self) -> Engine:
        """As a person's who loads the model; without a plan, of the prompt's length, which is then read at once."""
        chunk = max(self.prompt, 1) if self.plan is None else CHUNK
        return Engine(
            self.model, max_batch_size=self.batch, prefill_chunk=chunk, context=self.context, whole_cache=True
        )

    def _prefill(self, engine: Engine, watch: MemoryWatch) -> dict[str, Any]:
        """Read prompts, with a large product between them."""
        cold = self._read_prompt(engine, OTHER)  # kernels are compiled; of cached experts the first come
        seconds, limits = [], []
        for which in range(PREFILLS):
            with watch.aside():
                limits.append(matrix_rate(self.model.device, self.sizes))
            seconds.append(self._read_prompt(engine, OTHER + 1 + which))
        typical, limit = statistics.median(seconds), statistics.median(limits)
        return {
            "prefill_tok_s": self.prompt / typical,
            "prefill_seconds": typical,
            "prefill_cold_seconds": cold,
            "matrix_limit_tflops": limit / 1e12,
            "prefill_fraction_of_limit": prefill_operations(self.model.args, self.prompt) / typical / limit,
        }

    def _read_prompt(self, engine: Engine, which: int) -> float:
        """Seconds to read a prompt of random tokens, to the first token of the reply."""
        ids = random_prompt(self.model.args, self.prompt, self.seed + which)
        synchronize(self.model.device)
        started = time.perf_counter()
        seq_id = engine.add(ids, SamplingParams(max_tokens=2, temperature=1.0, seed=1))
        while not step(engine):
            pass
        synchronize(self.model.device)
        seconds = time.perf_counter() - started
        engine.cancel(seq_id)
        return seconds

    def _decode(self, engine: Engine, watch: MemoryWatch) -> dict[str, Any]:
        """Decode in short stretches, with copies within the card's memory, and to it, between them."""
        device, cache = self.model.device, card_cache(self.model)
        begin_decoding(engine, self.decode + WATCHED, self.batch, self.seed)
        experts, seen = self._experts_of_steps(engine)
        nbytes = step_nbytes(self.model, experts)
        link = None if cache is None else _Link(cache, self.batch)
        rates: list[float] = []
        limits: list[float] = []
        fractions: list[float] = []
        left = self.decode
        while left > 0:
            steps = min(left, STEPS_BETWEEN_READS)
            synchronize(device)
            started = time.perf_counter()
            for _ in range(steps):
                step(engine)
            synchronize(device)
            seconds = (time.perf_counter() - started) / steps
            with watch.aside():
                limit = copy_bandwidth(device, self.sizes)
                if link is not None:
                    link.note(steps, seconds, nbytes / limit, link_bandwidth(device, self.sizes))
            rates.append(self.batch / seconds)
            limits.append(limit)
            fractions.append(nbytes / seconds / limit)
            left -= steps
        return {
            "decode_tok_s": statistics.median(rates),
            "bytes_per_token": round(nbytes / self.batch),
            "bytes_per_step": round(nbytes),
            "experts_per_step": experts,
            "experts_seen": seen,
            "copy_limit_gbs": statistics.median(limits) / 1e9,
            "decode_fraction_of_limit": statistics.median(fractions),
            **({} if link is None else link.figures()),
        }

    def _experts_of_steps(self, engine: Engine) -> tuple[float, bool]:
        """Experts of a layer that a step needs, on average, and whether they were seen or are what is expected."""
        moe = self.model.args.moe
        if moe is None or self.batch == 1:
            return float(moe.num_experts_per_tok if moe else 0), True
        with record(self.model) as recording:
            for _ in range(WATCHED):
                step(engine)
        counts = [
            len(set(routing.topk_ids_TK.flatten().tolist())) for layers in recording.forwards for routing in layers
        ]
        if not counts:  # where steps are replayed, nobody sees what routers choose
            return touched_experts(self.model.args, self.batch) / self.model.args.n_layers, False
        return statistics.mean(counts), True


class _Link:
    """What experts cost that are copied when they are needed: counters of the decoding, beside what the link can do."""

    def __init__(self, cache: CardCache, batch: int) -> None:
        self._cache, self._batch = cache, batch
        self._first = self._last = cache.counters.copy()
        self._steps = 0
        self._limits: list[float] = []
        self._by_link: list[float] = []
        self._allowed: list[float] = []
        self._fractions: list[float] = []

    def note(self, steps: int, seconds: float, read_seconds: float, limit: float) -> None:
        """Add a stretch that has just been decoded.

        Args:
            steps: of it.
            seconds: that one took.
            read_seconds: that a step's weights take to be read from the card's memory, at the least.
            limit: bytes a second over the link.
        """
        happened = self._cache.counters.since(self._last).total
        self._last = self._cache.counters.copy()
        self._steps += steps
        self._limits.append(limit)
        missing = happened.misses * self._cache.expert_nbytes / steps
        # Whether a missing expert is copied or computed by the CPU: what copying all would allow.
        if missing:
            self._by_link.append(self._batch * limit / missing)
        least = max(missing / limit, read_seconds)
        self._allowed.append(self._batch / least)
        self._fractions.append(least / seconds)

    def figures(self) -> dict[str, Any]:
        """Of all stretches; None for what the link allows where nothing was missing."""
        total: LayerCounters = self._cache.counters.since(self._first).total
        tokens = self._steps * self._batch
        return {
            "hits": total.hits,
            "misses": total.misses,
            "computed_by_cpu": total.computed,
            "hit_rate": total.hit_rate,
            "bytes_copied_per_token": round(total.nbytes / tokens),
            "wait_seconds_per_token": total.wait_seconds / tokens,
            "link_limit_gbs": statistics.median(self._limits) / 1e9,
            "allowed_by_link_tok_s": median(self._by_link),
            "allowed_tok_s": statistics.median(self._allowed),
            "decode_fraction_of_allowed": statistics.median(self._fractions),
        }


def plan_figures(plan: CardPlan) -> dict[str, Any]:
    """What a plan says, for JSON."""
    placement = plan.placement
    return {
        "gpu_budget": plan.gpu_budget,
        "card_total": plan.card.total,
        "card_experts": plan.card.experts,
        "card_base": plan.card.base,
        "host_total": plan.host.total,
        "context": plan.context,
        "slots": None if placement is None else placement.slots,
        "pinned": 0 if placement is None else len(placement.pinned),
    }


def card_plan(
    args: ModelArgs,
    device: torch.device,
    bits: int,
    context: int,
    batch: int,
    gpu_budget: int | None = None,
    host_budget: int | None = None,
) -> CardPlan:
    """Plan what lies on a card.

    Args:
        args: the model's shape.
        device: the card, or a CPU in its place.
        bits: of the weights.
        context: tokens of a sequence.
        batch: sequences side by side.
        gpu_budget: bytes of the card's memory; None for all of it.
        host_budget: bytes of the host's; None for no limit.

    Raises:
        OptionError: it does not fit.
    """
    if gpu_budget is None:
        gpu_budget = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else physical_memory()
    return make_card_plan(args, gpu_budget, host_budget, bits, context, batch)
