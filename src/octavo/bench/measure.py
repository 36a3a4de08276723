"""Prefill and decode of the real engine, each beside the limit that bounds it, measured within the same seconds."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from octavo.engine import Engine
from octavo.kernels import backend, dot_peak, read_bandwidth, threads
from octavo.kernels.modules import KernelExperts, KernelLinear
from octavo.kernels.ops import Matrix, spent
from octavo.model import Mixtral
from octavo.sampling import SamplingParams

STEPS_BETWEEN_READS = 8
"""Decode steps between two readings of the limit: the machine's bandwidth changes within seconds."""


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
                engine.step()
            seconds, after = time.perf_counter() - started, spent()
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
        }

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
