"""Two pictures of a run, drawn from its metrics: the losses, and how each layer's experts share the tokens.

The only importer of matplotlib, which comes with the extra `octavo[train]`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Categorical colours that stay apart for colour-blind readers (Okabe and Ito); eight, as there are experts.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7A7A7A", "#B8A800")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a half-written last line is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average over about a fiftieth of the values, corrected for its start."""
    weight = 1 - 1 / max(1.0, len(values) / 50)
    out, mean = [], 0.0
    for n, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**n))
    return out


def plot_run(metrics: Path, folder: Path) -> list[Path]:
    """Draw `curves.png` and, for a sparse model, `experts.png` into `folder`.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    steps = [r for r in records if "ce" in r]
    evals = [r for r in records if "heldout" in r]
    if not steps:
        return []
    written = [_save(_curves(Figure, steps, evals), folder / "curves.png")]
    if steps[-1].get("load"):
        written.append(_save(_experts(Figure, steps), folder / "experts.png"))
    return written


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def _curves(figure_of: Any, steps: list[dict[str, Any]], evals: list[dict[str, Any]]) -> Any:
    figure = figure_of(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    x = [r["step"] for r in steps]
    ce = [r["ce"] for r in steps]
    top.plot(x, ce, color=COLOURS[5], linewidth=0.6, alpha=0.5)
    top.plot(x, smooth(ce), color=COLOURS[0], label="training, weighted as configured")
    for key, colour, label in (
        ("loss", COLOURS[3], "held-out, all tokens"),
        ("spoken_loss", COLOURS[2], "held-out, tokens the model speaks"),
    ):
        points = [(r["step"], r["heldout"][key]) for r in evals]
        if points:
            top.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=label)
            top.annotate(f"{points[-1][1]:.3f}", points[-1], textcoords="offset points", xytext=(0, 6),
                         ha="right", color=colour, fontsize=8)  # fmt: skip
    top.set_ylabel("cross-entropy (nats per token)")
    top.set_ylim(bottom=0, top=max(smooth(ce)[0], ce[0]) * 1.05)
    top.legend(frameon=False)
    if any(r["balance"] for r in steps):
        bottom.plot(x, [r["balance"] for r in steps], color=COLOURS[2], linewidth=0.8)
        bottom.set_ylabel("balance loss", color=COLOURS[2])
    rate = bottom.twinx()
    rate.plot(x, [r["lr"] for r in steps], color=COLOURS[6], linewidth=0.8)
    rate.set_ylabel("learning rate", color=COLOURS[6])
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
    return figure


def _experts(figure_of: Any, steps: list[dict[str, Any]]) -> Any:
    """A panel a layer: each expert's share of the assignments over the steps, the even share dashed."""
    n_layers, n_experts = len(steps[-1]["load"]), len(steps[-1]["load"][0])
    columns = min(n_layers, 4)
    rows = -(-n_layers // columns)
    figure = figure_of(figsize=(3.4 * columns, 2.6 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    x = [r["step"] for r in steps]
    for layer, axes in zip(range(n_layers), panels, strict=False):
        for expert in range(n_experts):
            share = smooth([100 * r["load"][layer][expert] for r in steps])
            axes.plot(x, share, color=COLOURS[expert % len(COLOURS)], linewidth=1, label=f"expert {expert}")
        axes.axhline(100 / n_experts, color="black", linestyle="--", linewidth=0.6)
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.grid(alpha=0.25)
    # Shared axes: one limit for all panels, and the last panel of each column carries the steps.
    panels[0].set_ylim(0, 105 * max(max(map(max, r["load"])) for r in steps[len(steps) // 50 :]))
    for spare in panels[n_layers:]:
        spare.set_visible(False)
        panels[panels.index(spare) - columns].tick_params(labelbottom=True)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("share of assignments (%)", fontsize=10)
    if n_experts <= len(COLOURS):
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure
