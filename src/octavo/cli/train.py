"""`octavo train`: train a model from scratch, or go on where a run stopped."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import click

from octavo.cli.terminal import INTERRUPTED

if TYPE_CHECKING:
    from octavo.train.trainer import TrainResult


@click.command("train")
@click.argument("config")
@click.option(
    "--resume/--no-resume",
    default=True,
    show_default=True,
    help="Go on from the newest checkpoint; --no-resume refuses a folder that holds a run already.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def command(config: str, resume: bool, as_json: bool) -> int:
    """Train the model that CONFIG (a TOML file) describes.

    On the way it says how many tokens it trains on a second, and the model FLOP utilisation (MFU): the arithmetic
    that these tokens need, as a share of what the device was measured to reach in a large matrix product.

    Everything is written into the folder its [run] out names: checkpoints, metrics.jsonl, curves, and in the end
    the model, which octavo chat --model loads. Ctrl-C finishes the step, writes a checkpoint and exits with 130;
    the same command goes on from there.
    """
    from octavo.train.config import TrainConfig
    from octavo.train.trainer import train

    result = train(TrainConfig.from_toml(config), resume=resume)
    if as_json:
        click.echo(json.dumps(_summary(result)))
    return 0 if result.finished else INTERRUPTED


def _summary(result: TrainResult) -> dict[str, Any]:
    """The result as JSON has it: no NaN, no paths."""
    heldout = result.heldout
    return {
        "step": result.step,
        "finished": result.finished,
        "cross_entropy": _finite(result.ce),
        "heldout": None
        if heldout is None
        else {
            "loss": _finite(heldout.loss),
            "perplexity": _finite(heldout.perplexity),
            "spoken_loss": _finite(heldout.spoken_loss),
            "tokens": heldout.tokens,
        },
        "tokens_per_s": _finite(result.tokens_per_s),
        "mfu": _finite(result.mfu),
        "model": None if result.model_folder is None else str(result.model_folder),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
