"""The bars, what was measured, and whether they are met, from the JSON lines of run.sh.

    python benchmarks/gpu/report.py FOLDER/results.jsonl ...

Of a step that was run more than once the last line counts. A bar whose steps did not run is open.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Lines = dict[str, dict[str, Any]]


class Bar(NamedTuple):
    """What must be reached.

    Attributes:
        name: of the bar.
        least: to be reached, or most where `below`.
        of: the measured figure; KeyError where its steps did not run.
        form: the figure's format.
        below: whether the figure must be no more than `least`.
    """

    name: str
    least: float
    of: Callable[[Lines], float]
    form: str = "{:.3f}"
    below: bool = False


def transformers(lines: Lines) -> float:
    """The best of transformers' ways, in tokens a second."""
    rates = [line["decode_tok_s"] for step, line in lines.items() if "transformers-" in step and "decode_tok_s" in line]
    if not rates:
        raise KeyError("transformers")
    return max(rates)


def worst_plan(lines: Lines) -> float:
    """How far the card's memory was from a plan at most, as a share of it."""
    off = [
        abs(line["card_used_bytes"] / line["plan"]["card_total"] - 1)
        for line in lines.values()
        if "plan" in line and "card_used_bytes" in line
    ]
    if not off:
        raise KeyError("plan")
    return max(off)


def checks(prefix: str) -> Callable[[Lines], float]:
    """How many checks whose names begin so were wrong."""

    def wrong(lines: Lines) -> float:
        found = [line["right"] for step, line in lines.items() if step.startswith(prefix) and "right" in line]
        if not found:
            raise KeyError(prefix)
        return sum(not right for right in found)

    return wrong


def figure(step: str, name: str, beside: str | None = None) -> Callable[[Lines], float]:
    """A figure of a step, or how many times another step's it is."""
    return lambda lines: lines[step][name] / (1 if beside is None else lines[beside][name])


SHARE, RATE = "decode_fraction_of_limit", "decode_tok_s"
BARS = (
    Bar("bf16, batch 1: share of the copy bandwidth", 0.75, figure("model-16-planned", SHARE)),
    Bar("bf16, batch 1: times transformers", 4, lambda x: x["model-16-planned"][RATE] / transformers(x)),
    Bar("4 bits, batch 1: tokens/s", 350, figure("model-4-planned", RATE), "{:.1f}"),
    Bar("8 bits, batch 1: tokens/s", 230, figure("model-8-planned", RATE), "{:.1f}"),
    Bar(
        "bf16, prompt of 2,048: share of the matrix rate", 0.5, figure("model-16-prefill", "prefill_fraction_of_limit")
    ),
    Bar("bf16, batch 64: tokens/s", 2500, figure("model-16-batch-64", RATE), "{:.0f}"),
    Bar(
        "24 GiB, 4 bits: share of what link and hits allow", 0.8, figure("offload-24GiB", "decode_fraction_of_allowed")
    ),
    Bar("room for all: cached beside resident", 0.95, figure("offload-everything-fits", RATE, "offload-resident")),
    Bar("memory on the card: share off the plan", 0.03, worst_plan, below=True),
    Bar("parity, card and CPU: configurations that differ", 0, checks("check-parity"), "{:.0f}", below=True),
    Bar("kernels and placements beside references: wrong", 0, checks("check-"), "{:.0f}", below=True),
)


def read(files: list[str]) -> Lines:
    """The last line of each step; those of tiny shapes do not count."""
    lines: Lines = {}
    for file in files:
        for text in Path(file).read_text().splitlines():
            line = json.loads(text)
            if not line["tiny"] and "skipped" not in line:
                lines[line["step"]] = line
    return lines


def table(lines: Lines) -> Iterator[str]:
    """The bars."""
    yield f"{'bar':58} {'wanted':>8} {'measured':>9}"
    for bar in BARS:
        wanted = ("<= " if bar.below else ">= ") + f"{bar.least:g}"
        try:
            found = bar.of(lines)
        except KeyError:
            yield f"{bar.name:58} {wanted:>8} {'-':>9}  not measured"
            continue
        met = found <= bar.least if bar.below else found >= bar.least
        yield f"{bar.name:58} {wanted:>8} {bar.form.format(found):>9}  {'met' if met else 'NOT MET'}"


FIGURES = (
    "prefill_tok_s", "decode_tok_s", "decode_fraction_of_limit", "copy_limit_gbs", "matrix_limit_tflops", "hit_rate",
    "link_limit_gbs", "allowed_tok_s", "tokens_per_s", "mfu", "card_used_bytes", "failed",
)  # fmt: skip


def others(lines: Lines) -> Iterator[str]:
    """A line for each measurement of a model."""
    for step, line in lines.items():
        if not step.startswith(("check-", "kernel-", "attention-")):
            shown = [f"{name} {_short(line[name])}" for name in FIGURES if name in line]
            yield f"{step}: {', '.join(shown)}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) else str(value)


def best(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Of every kernel the default tiling and the fastest right one; of attention the fastest right way."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "microseconds" in line and line["right"]:
            name = line["step"]
            groups.setdefault(
                name if "tiling" in line else name.split("-", 2)[1] + " " + name.split("-")[2], []
            ).append(line)
    for name, found in groups.items():
        first = min(found, key=lambda line: line["microseconds"])
        default = next((line for line in found if line.get("tiling") == "default"), None)
        what = first.get("tiling", first["step"])
        text = f"{name}: {what} {first['microseconds']:.1f} us, {first['gb_s']:.0f} GB/s, {first['tflops']:.1f} TFLOP/s"
        yield text + (f"; default {default['microseconds']:.1f} us" if default else "")


def main() -> None:
    """Print the tables."""
    files = sys.argv[1:]
    lines = read(files)
    every = [json.loads(text) for file in files for text in Path(file).read_text().splitlines()]
    for part in (table(lines), others(lines), best([line for line in every if not line["tiny"]])):
        print("\n".join(part), end="\n\n")


if __name__ == "__main__":
    main()
