"""Prefill and decode of the real engine, each beside the limit that bounds it, measured within the same seconds."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from octavo.engine import Engine
from octavo.kernels import backend, dot_peak, read_bandwidth, threads
from octavo.kernels.modules import KernelExperts, KernelLinear
from octavo.kernels.ops import Matrix
from octavo.model import Mixtral, MoEFeedForward, Router, Routing
from octavo.sampling import SamplingParams

STEPS_BETWEEN_READS = 8
"""Decode steps between two readings of the limit: the machine's bandwidth changes within seconds."""


@dataclass
class Watch:
    """What modules tell while they run.

    Attributes:
        kernel_seconds: spent in kernels.
        expert_bytes: of the experts that were chosen, each counted once a step and layer.
    """

    kernel_seconds: float = 0.0
    expert_bytes: int = 0
    _started: float = field(default=0.0, repr=False)

    def before(self, *_: Any) -> None:
        """A kernel begins."""
        self._started = time.perf_counter()

    def after(self, *_: Any) -> None:
        """A kernel ends."""
        self.kernel_seconds += time.perf_counter() - self._started


@contextmanager
def watching(model: Mixtral) -> Iterator[Watch]:
    """Hooks on kernels and routers, for as long as the context lasts."""
    watch, hooks = Watch(), []
    for module in model.modules():
        if isinstance(module, KernelLinear | KernelExperts):
            hooks += [module.register_forward_pre_hook(watch.before), module.register_forward_hook(watch.after)]
    for module in model.modules():
        if isinstance(module, MoEFeedForward) and isinstance(module.experts, KernelExperts):
            hooks.append(module.gate.register_forward_hook(_counter(watch, module.experts)))
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _counter(watch: Watch, experts: KernelExperts) -> Any:
    sizes = torch.tensor([sum(m.nbytes for m in expert) for expert in experts.experts.experts])

    def count(module: Router, inputs: Any, routing: Routing) -> None:
        watch.expert_bytes += int(sizes[torch.unique(routing.topk_ids_TK)].sum())

    return count


def matrices(model: nn.Module) -> list[Matrix]:
    """Every matrix that kernels multiply with."""
    found: list[Matrix] = []
    for module in model.modules():
        if isinstance(module, KernelLinear):
            found.append(module.matrix)
        elif isinstance(module, KernelExperts):
            found += [matrix for expert in module.experts.experts for matrix in expert]
    return found


@dataclass
class Bench:
    """One measurement.

    Attributes:
        model: computes with kernels.
        prompt: tokens to read.
        decode: steps to measure.
        batch: sequences side by side.
        seed: of the random tokens.
    """

    model: Mixtral
    prompt: int
    decode: int
    batch: int
    seed: int = 0

    def run(self) -> dict[str, Any]:
        """Measure, and return the figures of `octavo bench --json`."""
        engine = Engine(self.model, max_batch_size=self.batch, prefill_chunk=max(self.prompt, 1))
        with torch.inference_mode():
            self._prefill(engine, 8)  # first touches: pages, threads, arenas
        dot_limit = dot_peak(0.3)
        prefill_seconds = self._prefill(engine, self.prompt)
        dot_limit = statistics.median((dot_limit, dot_peak(0.3), dot_peak(0.3)))
        prefill_tok_s = self.prompt / prefill_seconds
        operations = 2 * self._multiplied_params() * self.prompt + 2 * self._head_params()
        return {
            "prompt": self.prompt,
            "decode": self.decode,
            "batch": self.batch,
            "prefill_tok_s": prefill_tok_s,
            "prefill_seconds": prefill_seconds,
            "dot_limit_gops": dot_limit / 1e9,
            "prefill_fraction_of_limit": operations / prefill_seconds / dot_limit,
            **self._decode(engine),
            "backend": backend().name,
            "threads": threads(),
            "torch_threads": torch.get_num_threads(),
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def _prompt(self, n: int, which: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + which)
        return torch.randint(0, self.model.args.vocab_size, (n,), generator=generator).tolist()

    def _prefill(self, engine: Engine, n: int) -> float:
        """Seconds to read a prompt of n random tokens, to the logits of its last."""
        seq_id = engine.add(self._prompt(n, 0), SamplingParams(max_tokens=2, temperature=1.0, seed=1))
        (event, *_) = engine.step()
        if event.error:
            raise event.error
        engine.cancel(seq_id)
        return event.prefill_seconds

    def _decode(self, engine: Engine) -> dict[str, Any]:
        """Decode in short stretches, with a plain read of all weights between each two."""
        for row in range(self.batch):
            params = SamplingParams(max_tokens=self.decode + self.batch + 8, temperature=1.0, seed=row)
            engine.add(self._prompt(16, row + 1), params)
        for _ in range(self.batch + 2):
            engine.step()
        weights, fixed = matrices(self.model), self._fixed_bytes()
        rates: list[float] = []
        limits: list[float] = []
        fractions: list[float] = []
        seconds_of_steps = bytes_of_steps = kernel_seconds = 0.0
        left = self.decode
        while left > 0:
            steps = min(left, STEPS_BETWEEN_READS)
            with watching(self.model) as watch:
                started = time.perf_counter()
                for _ in range(steps):
                    engine.step()
                seconds = time.perf_counter() - started
            limit = read_bandwidth(weights)
            nbytes = steps * fixed + watch.expert_bytes
            rates.append(self.batch * steps / seconds)
            limits.append(limit)
            fractions.append(nbytes / seconds / limit)
            seconds_of_steps, bytes_of_steps = seconds_of_steps + seconds, bytes_of_steps + nbytes
            kernel_seconds += watch.kernel_seconds
            left -= steps
        return {
            "decode_tok_s": statistics.median(rates),
            "bytes_per_token": round(bytes_of_steps / self.decode / self.batch),
            "read_limit_gbs": statistics.median(limits) / 1e9,
            "decode_fraction_of_limit": statistics.median(fractions),
            "outside_kernels_fraction": 1 - kernel_seconds / seconds_of_steps,
        }

    def _fixed_bytes(self) -> int:
        """Bytes that every step reads: attention and head; dense feed-forward blocks."""
        return sum(m.matrix.nbytes for m in self.model.modules() if isinstance(m, KernelLinear))

    def _head_params(self) -> int:
        return self.model.args.vocab_size * self.model.args.dim

    def _multiplied_params(self) -> int:
        """Parameters of the matrices that a prompt's token is multiplied with; the head is for its last one alone."""
        args = self.model.args
        experts = args.moe.num_experts_per_tok if args.moe else 1
        return args.n_layers * (args.attention_params + experts * args.expert_params)


def peak_rss_bytes() -> int:
    """The most memory this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
