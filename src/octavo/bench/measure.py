"""Prefill and decode of the real engine, each beside the limit that bounds it, measured within the same seconds."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.args import ModelArgs
from octavo.bench.routing import Choice, routed
from octavo.engine import Engine, Event
from octavo.errors import OptionError
from octavo.experts import DiskCache, StreamedExperts
from octavo.experts.replay import replay
from octavo.experts.trace import Recording, record
from octavo.kernels import backend, dot_peak, read_bandwidth, threads
from octavo.kernels.modules import KernelExperts, KernelLinear
from octavo.kernels.ops import Matrix, spent
from octavo.model import Mixtral
from octavo.plan import MemoryPlan
from octavo.sampling import SamplingParams

STEPS_BETWEEN_READS = 8
"""Decode steps between two readings of the limits: the machine's bandwidths change within seconds."""
BURSTS = 8  # reads of what a token may lack of a layer, nothing else going on: what its reads can reach
EXPERTS_PER_READ = 4
"""So many are read to find the disk's."""
DOT_SECONDS = 0.3
"""How long products in registers are measured at a time."""
SHORT = 16
"""Tokens of the prompts before decoding."""
OTHER = 1 << 20
"""The seed of a prompt that is none of the others."""


def matrices(model: nn.Module) -> list[Matrix]:
    """Every matrix in memory that kernels multiply with; experts that are streamed are left out."""
    found: list[Matrix] = []
    for module in model.modules():
        if isinstance(module, KernelLinear):
            found.append(module.matrix)
        elif isinstance(module, KernelExperts):
            found += [matrix for expert in module.experts.experts for matrix in expert]
    return found


def cache_of(model: nn.Module) -> DiskCache | None:
    """The cache of a model's experts, where they are streamed."""
    return next((module.cache for module in model.modules() if isinstance(module, StreamedExperts)), None)


def context_for(args: ModelArgs, prompt: int, decode: int, batch: int) -> int:
    """Return how many tokens a sequence of a measurement has at most.

    Raises:
        OptionError: more than the model's context.
    """
    context = max(prompt + 8, SHORT + decode + batch + 8)
    if context > args.max_seq_len:
        raise OptionError(
            f"a prompt of {prompt} tokens or {decode} steps of decoding need a context of {context}; "
            f"this model's is {args.max_seq_len} tokens",
            hint="give fewer, such as --prompt 100 --decode 32",
        )
    return context


@dataclass
class Bench:
    """One measurement.

    Attributes:
        model: computes with kernels.
        prompt: tokens to read.
        decode: steps to measure.
        batch: sequences side by side.
        plan: how the model was loaded; what it predicts is told beside what is measured. The model's experts are
            streamed only where it has a placement.
        choice: chooses experts in the routers' place.
        seed: of the random tokens.

    Raises:
        OptionError: so many tokens are more than the model's context.
    """

    model: Mixtral
    prompt: int
    decode: int
    batch: int
    plan: MemoryPlan | None = None
    choice: Choice | None = None
    seed: int = 0
    context: int = field(init=False)

    def __post_init__(self) -> None:
        self.context = context_for(self.model.args, self.prompt, self.decode, self.batch)

    def run(self) -> dict[str, Any]:
        """Measure, and return the figures of `octavo bench --json`."""
        cache = cache_of(self.model)
        # Routers with hooks are not part of a compiled block: nothing is recorded where nobody asks for it.
        recorded = nullcontext(Recording()) if cache is None else record(self.model)
        with torch.inference_mode(), routed(self.model, self.choice), recorded as recording:
            return self._run(_Disk(cache, recording, self.plan) if cache and self.plan else None)

    def _run(self, disk: _Disk | None) -> dict[str, Any]:
        if self.plan is None:
            engine = Engine(self.model, max_batch_size=self.batch, prefill_chunk=max(self.prompt, 1))
        else:
            engine = Engine(self.model, max_batch_size=self.batch, context=self.context, whole_cache=True)
        # First touches: pages, threads, arenas; and the first read of experts that then stay.
        cold_seconds = self._prefill(engine, 8 if disk is None else self.prompt, OTHER)
        dot_limit = dot_peak(DOT_SECONDS)
        prefill_seconds = self._prefill(engine, self.prompt, 0)
        dot_limit = statistics.median((dot_limit, dot_peak(DOT_SECONDS), dot_peak(DOT_SECONDS)))
        prefill_tok_s = self.prompt / prefill_seconds
        operations = prefill_operations(self.model.args, self.prompt)
        return {
            "prompt": self.prompt,
            "decode": self.decode,
            "batch": self.batch,
            "prefill_tok_s": prefill_tok_s,
            "prefill_seconds": prefill_seconds,
            **({} if disk is None else {"prefill_cold_seconds": cold_seconds}),
            "dot_limit_gops": dot_limit / 1e9,
            "prefill_fraction_of_limit": operations / prefill_seconds / dot_limit,
            **self._decode(engine, disk),
            "backend": backend().name,
            "threads": threads(),
            "torch_threads": torch.get_num_threads(),
            **({} if self.plan is None else {"plan": _told(self.plan)}),
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def _prefill(self, engine: Engine, n: int, which: int) -> float:
        """Seconds to read a prompt of n random tokens, to the logits of its last."""
        ids = random_prompt(self.model.args, n, self.seed + which)
        seq_id = engine.add(ids, SamplingParams(max_tokens=2, temperature=1.0, seed=1))
        while not (events := step(engine)):
            pass
        engine.cancel(seq_id)
        return events[0].prefill_seconds

    def _decode(self, engine: Engine, disk: _Disk | None) -> dict[str, Any]:
        """Decode in short stretches, with a plain read of all weights in memory, and of some on disk, between them."""
        begin_decoding(engine, self.decode, self.batch, self.seed)
        if disk is not None:
            disk.begin()
        weights = matrices(self.model)
        rates: list[float] = []
        limits: list[float] = []
        fractions: list[float] = []
        seconds_of_steps = bytes_of_steps = seconds_in_products = 0.0
        left = self.decode
        while left > 0:
            steps = min(left, STEPS_BETWEEN_READS)
            before, started = spent(), time.perf_counter()
            for _ in range(steps):
                step(engine)
            seconds, after = time.perf_counter() - started, spent()
            if disk is not None:
                disk.note(self.batch * steps, seconds)
            limit = read_bandwidth(weights)
            nbytes = after[1] - before[1]
            rates.append(self.batch * steps / seconds)
            limits.append(limit)
            fractions.append(nbytes / seconds / limit)
            seconds_of_steps, bytes_of_steps = seconds_of_steps + seconds, bytes_of_steps + nbytes
            seconds_in_products += after[0] - before[0]
            left -= steps
        return {
            "decode_tok_s": statistics.median(rates),
            "bytes_per_token": round(bytes_of_steps / self.decode / self.batch),
            "read_limit_gbs": statistics.median(limits) / 1e9,
            "decode_fraction_of_limit": statistics.median(fractions),
            "outside_kernels_fraction": 1 - seconds_in_products / seconds_of_steps,
            **({} if disk is None else disk.figures()),
        }


class _Disk:
    """What experts cost that are read when they are needed: counters of the decoding, beside what the disk can do."""

    def __init__(self, cache: DiskCache, recording: Recording, plan: MemoryPlan) -> None:
        self._cache, self._recording, self._plan = cache, recording, plan
        self._tokens = self._skip = 0
        self._limits: list[float] = []
        self._bursts: list[float] = []
        self._allowed: list[float] = []
        self._fractions: list[float] = []

    def begin(self) -> None:
        """From now on it counts."""
        self._skip = len(self._recording.steps)
        self._first = self._last = self._cache.counters.copy()

    def note(self, tokens: int, seconds: float) -> None:
        """Add a stretch that has just been decoded, and measure the disk."""
        happened = self._cache.counters.since(self._last).total
        self._tokens += tokens
        limit = self._cache.disk_bandwidth(EXPERTS_PER_READ * self._plan.weights.expert)
        self._limits.append(limit)
        of_a_layer = self._plan.args.moe.num_experts_per_tok if self._plan.args.moe else 0
        self._bursts += [self._cache.disk_bandwidth(self._cache.tail_nbytes * of_a_layer) for _ in range(BURSTS)]
        if happened.nbytes and limit:
            self._allowed.append(limit * tokens / happened.nbytes)
            self._fractions.append(happened.nbytes / seconds / limit)
        self._last = self._cache.counters.copy()

    def figures(self) -> dict[str, Any]:
        """Of all stretches; None for what the disk allows where nothing was read."""
        weights, total = self._plan.weights, self._cache.counters.since(self._first).total
        trace = self._recording.trace()
        same = replay(
            trace.topk_ids,
            self._cache.placement,
            weights.n_experts,
            weights.expert,
            steps=self._recording.steps,
            skip=self._skip,
        )
        return {
            "hits": total.hits,
            "misses": total.misses,
            "hit_rate": total.hit_rate,
            "replay_hits": same.hits,
            "replay_hit_rate": same.hit_rate,
            "bytes_read_per_token": round(total.nbytes / self._tokens),
            "wait_seconds_per_token": total.wait_seconds / self._tokens,
            "disk_limit_gbs": statistics.median(self._limits) / 1e9,
            "disk_burst_gbs": statistics.median(self._bursts) / 1e9,
            "allowed_by_disk_tok_s": median(self._allowed),
            "decode_fraction_of_allowed": median(self._fractions),
        }


def median(values: list[float]) -> float | None:
    """None where there are none."""
    return statistics.median(values) if values else None


def random_prompt(args: ModelArgs, n: int, seed: int) -> list[int]:
    """Some of the model's token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, args.vocab_size, (n,), generator=generator).tolist()


def prefill_operations(args: ModelArgs, prompt: int) -> int:
    """Operations (two a product) of the matrices with a prompt; the head is for its last token alone."""
    experts = args.moe.num_experts_per_tok if args.moe else 1
    multiplied = args.n_layers * (args.attention_params + experts * args.expert_params)
    return 2 * multiplied * prompt + 2 * args.vocab_size * args.dim


def begin_decoding(engine: Engine, decode: int, batch: int, seed: int) -> None:
    """Add so many sequences, with room for so many steps, and go on until all are decoded side by side."""
    for row in range(batch):
        params = SamplingParams(max_tokens=decode + batch + 8, temperature=1.0, seed=row)
        engine.add(random_prompt(engine.model.args, SHORT, seed + row + 1), params)
    for _ in range(batch + 2):
        step(engine)


def step(engine: Engine) -> list[Event]:
    """One step, of which a failure is raised."""
    events = engine.step()
    for event in events:
        if event.error:
            raise event.error
    return events


def _told(plan: MemoryPlan) -> dict[str, Any]:
    """What a plan says, for JSON."""
    placement = plan.placement
    return {
        "budget": plan.budget,
        "total": plan.footprint.total,
        "context": plan.context,
        "share": plan.share,
        "slots": None if placement is None else placement.slots,
        "pinned": 0 if placement is None else len(placement.pinned),
    }


def peak_rss_bytes() -> int:
    """The most memory this process has had, in bytes; not what its parent had, which Linux's getrusage may tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
