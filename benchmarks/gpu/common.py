"""What the scripts here share: their options, the shape they measure, random weights made on the card, JSON lines.

Importing this comes first: without a card it turns on Triton's interpreter, before a kernel is defined.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from octavo.args import ModelArgs, MoEArgs
from octavo.bench.limits import Sizes, copy_bandwidth, matrix_rate, seconds_of, synchronize
from octavo.shapes import shape

SHAPE = "mixtral-8x7b"
TINY = ModelArgs(
    dim=32, n_layers=2, head_dim=16, hidden_dim=16, n_heads=2, n_kv_heads=1, vocab_size=16, max_seq_len=512,
    moe=MoEArgs(4, 2),
)  # fmt: skip
TINY_SIZES = Sizes(copy=1 << 16, matrix=64, link=1 << 16, repeats=2)
STRETCH = 8  # decode steps that are timed together


@dataclass(frozen=True)
class Setting:
    """Where a script measures, and what.

    Attributes:
        device: the card, or a CPU in its place.
        tiny: a shape of no size, to see that the script runs.
        args: the model's shape.
        sizes: what is moved and multiplied to find the limits.
        out: JSON lines are added to this file; None for standard output alone.
    """

    device: torch.device
    tiny: bool
    args: ModelArgs
    sizes: Sizes
    out: Path | None

    @property
    def has_graphs(self) -> bool:
        """Whether what is launched can be recorded and replayed: on a card."""
        return self.device.type == "cuda"

    def tell(self, step: str, found: dict[str, Any]) -> None:
        """Print a result, and keep it."""
        line = json.dumps({"step": step, "tiny": self.tiny} | found)
        print(line, flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(line + "\n")

    def skip(self, step: str, why: str) -> None:
        """Say what is not measured here."""
        self.tell(step, {"skipped": why})

    def limits(self) -> dict[str, float]:
        """Of the card, now."""
        return {
            "copy_limit_gbs": copy_bandwidth(self.device, self.sizes) / 1e9,
            "matrix_limit_tflops": matrix_rate(self.device, self.sizes) / 1e12,
        }


def options(text: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every script; more may be added."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see that the script runs")
    parser.add_argument("--tiny", action="store_true", help="a shape of no size")
    parser.add_argument("--layers", type=int, help=f"so many of {SHAPE}'s")
    parser.add_argument("--out", type=Path, help="add JSON lines to this file")
    return parser


def setting(chosen: argparse.Namespace) -> Setting:
    """What the options of `options` say.

    Raises:
        SystemExit: there is no such device.
    """
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --device cpu --tiny shows that the script runs")
    args = dataclasses.replace(TINY, n_layers=chosen.layers or TINY.n_layers)
    if not chosen.tiny:
        args = shape(SHAPE, chosen.layers)
    return Setting(device, chosen.tiny, args, TINY_SIZES if chosen.tiny else Sizes(), chosen.out)


def forget() -> None:
    """Give back the card's memory that nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def median_seconds(work: Callable[[], object], where: Setting, repeats: int = 10, runs: int = 5) -> float:
    """The median of some runs, each of so many times one behind the other."""
    return statistics.median(seconds_of(work, where.device, repeats) for _ in range(1 if where.tiny else runs))


def replayed(work: Callable[[], object], where: Setting) -> Callable[[], object]:
    """The same work as a CUDA graph, without the gaps between launches; as it is where there are none."""
    if not where.has_graphs:
        return work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # once before: what is compiled or allocated cannot be recorded
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64; a NaN stays one."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def fill_random(model: nn.Module, seed: int = 0) -> None:
    """Norms of ones, and matrices with a variance of 1 / cols, by the device's own generator."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1)
        else:
            most = 3**0.5 * (1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
            parameter.uniform_(-most, most, generator=generator)


def time_peer(
    read: Callable[[Tensor], None], forget_tokens: Callable[[], None], where: Setting, prompt: int, decode: int
) -> dict[str, float]:
    """Prefill and decoding of another implementation, in the stretches of `octavo.bench`.

    Args:
        read: computes the logits of the last of some tokens [1, T], which follow those that were read before.
        forget_tokens: begins anew.
        where: it computes.
        prompt: tokens of the prompt whose reading is timed; 0 for none.
        decode: steps, behind a prompt of 16 tokens; 0 for none.
    """
    ids = torch.randint(0, where.args.vocab_size, (1, max(prompt, decode + 32)), device=where.device)

    def timed(work: Callable[[], object]) -> float:
        synchronize(where.device)
        started = time.perf_counter()
        work()
        synchronize(where.device)
        return time.perf_counter() - started

    found: dict[str, float] = {}
    if prompt:
        seconds = []
        for _ in range(4):
            forget_tokens()
            seconds.append(timed(lambda: read(ids[:, :prompt])))
        found["prefill_tok_s"] = prompt / statistics.median(seconds[1:])
    if decode:
        forget_tokens()
        read(ids[:, :16])
        for i in range(16, 24):
            read(ids[:, i : i + 1])  # what is compiled or recorded is so now
        rates = []
        for begin in range(24, 24 + decode, STRETCH):
            steps = [ids[:, i : i + 1] for i in range(begin, min(begin + STRETCH, 24 + decode))]
            rates.append(len(steps) / timed(lambda steps=steps: [read(one) for one in steps]))
        found["decode_tok_s"] = statistics.median(rates)
    if where.device.type == "cuda":
        found["card_peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def log(text: str) -> None:
    """Say something that is no result."""
    print(text, file=sys.stderr, flush=True)
