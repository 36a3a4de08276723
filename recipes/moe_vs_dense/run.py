"""Does sparsity pay? A mixture of experts, a dense model of the same active size, and a mixture without balance loss.

``python recipes/moe_vs_dense/run.py`` (or ``make experiment``) trains the three on Menny's text with the same number
of tokens in the same order, and writes results.json and pictures into docs/experiments/moe-vs-dense/. Runs that are
finished already are not repeated; an interrupted one goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

from octavo.train.config import TrainConfig
from octavo.train.plot import COLOURS, read_metrics, smooth
from octavo.train.trainer import train

MENNY = Path("runs/menny")
RUNS = Path("runs/moe_vs_dense")
DOCS = Path("docs/experiments/moe-vs-dense")
EXPERT_HIDDEN, TOP_K = 192, 2
VARIANTS = {
    "moe": "mixture of experts",
    "dense": "dense, same active size",
    "unbalanced": "mixture, no balance loss",
}


def config(variant: str, seed: int, steps: int, threads: int) -> TrainConfig:
    """The three differ in nothing but the feed-forward block and the balance loss."""
    model: dict[str, Any] = {
        "dim": 128,
        "n_layers": 4,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 32,
        "hidden_dim": EXPERT_HIDDEN,
        "vocab_size": 3072,
        "max_seq_len": 256,
        "moe": {"num_experts": 8, "num_experts_per_tok": TOP_K},
    }
    if variant == "dense":
        del model["moe"]
        model["hidden_dim"] = TOP_K * EXPERT_HIDDEN
    return TrainConfig.from_dict(
        {
            "model": model,
            "data": {
                "train": str(MENNY / "data/train.jsonl"),
                "heldout": str(MENNY / "data/heldout.jsonl"),
                "tokenizer": str(MENNY / "tokenizer.model"),
                "seq_len": 256,
            },
            "optim": {"steps": steps, "batch_rows": 16, "lr": 3e-3, "warmup_steps": 50},
            "loss": {"balance": 0.0 if variant == "unbalanced" else 0.01, "z": 0.001, "balance_per_layer": True},
            "run": {
                "out": str(RUNS / f"{variant}-{seed}"),
                "seed": seed,
                "threads": threads,
                "device": "cpu",
                "eval_every": max(steps // 10, 1),
                "eval_rows": 512,
                "checkpoint_every": max(steps // 4, 1),
                "keep": 1,
            },
        }
    )


def run(variant: str, seed: int, steps: int, threads: int) -> dict[str, Any]:
    """Train one variant, or take its finished run; return what is reported of it."""
    settings = config(variant, seed, steps, threads)
    print(f"{VARIANTS[variant]}, seed {seed}", file=sys.stderr)
    train(settings)
    records = read_metrics(settings.run.out / "metrics.jsonl")
    trained = [r for r in records if "ce" in r]
    heldout = {r["step"]: r["heldout"]["loss"] for r in records if "heldout" in r}
    late = [r["load"] for r in trained if r["step"] > 0.8 * steps and r["load"]]
    load = [[statistics.mean(r[n][e] for r in late) for e in range(8)] for n in range(4)] if late else []
    return {
        "variant": variant,
        "seed": seed,
        "parameters": settings.model.n_params,
        "active_parameters": settings.model.n_active_params,
        "tokens": steps * 16 * 256,
        "heldout_loss": heldout[steps],
        "heldout": sorted(heldout.items()),
        "training": [(r["step"], r["ce"]) for r in trained],
        "load": load,
        "smallest_share": min((share for layer in load for share in layer), default=None),
        "largest_share": max((share for layer in load for share in layer), default=None),
    }


def draw_losses(results: list[dict[str, Any]], path: Path) -> None:
    """Training (thin) and held-out (dots) losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for colour, (variant, label) in zip(COLOURS, VARIANTS.items(), strict=False):
        for n, result in enumerate(r for r in results if r["variant"] == variant):
            steps, losses = zip(*result["training"], strict=True)
            axes.plot(steps, smooth(list(losses)), color=colour, linewidth=0.8, alpha=0.6)
            steps, losses = zip(*result["heldout"], strict=True)
            axes.plot(steps, losses, "o-", color=colour, markersize=4, label=None if n else f"{label}, held-out")
    axes.set_xlabel("step of 4,096 tokens")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_ylim(top=4)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def draw_loads(results: list[dict[str, Any]], path: Path) -> None:
    """Share of assignments of every expert in the last fifth of training, with and without the balance loss."""
    from matplotlib.figure import Figure

    sparse = [next(r for r in results if r["variant"] == variant) for variant in ("moe", "unbalanced")]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, result in zip(figure.subplots(1, 2, sharey=True), sparse, strict=True):
        image = axes.imshow([[100 * s for s in layer] for layer in result["load"]], vmin=0, vmax=50, cmap="viridis")
        for layer, shares in enumerate(result["load"]):
            for expert, share in enumerate(shares):
                axes.text(
                    expert, layer, f"{100 * share:.0f}", ha="center", va="center", color="w" if share < 0.35 else "k"
                )
        axes.set_title(VARIANTS[result["variant"]], fontsize=10)
        axes.set_xlabel("expert")
        axes.set_xticks(range(8))
    figure.axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=figure.axes, label="share of assignments (%)")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, draw, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of 4,096 tokens (default 500)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args()
    results = [run(v, s, options.steps, options.threads) for s in range(options.seeds) for v in VARIANTS]
    DOCS.mkdir(parents=True, exist_ok=True)
    draw_losses(results, DOCS / "losses.png")
    draw_loads(results, DOCS / "loads.png")
    short = [{k: v for k, v in r.items() if k not in ("training", "heldout")} for r in results]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} used"
    report = {"date": date.today().isoformat(), "machine": machine, "steps": options.steps, "runs": short}
    (DOCS / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for variant, label in VARIANTS.items():
        mine = [r for r in results if r["variant"] == variant]
        losses = ", ".join(f"{r['heldout_loss']:.4f}" for r in mine)
        print(f"{label}: {mine[0]['active_parameters']:,} active, held-out loss {losses}")


if __name__ == "__main__":
    main()
