"""`octavo bench`: how fast a model runs here, and how close that is to what the machine can do."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from octavo.cli.options import SHAPE_BITS
from octavo.cli.terminal import note
from octavo.errors import OptionError


@click.command()
@click.option("--shape", metavar="NAME", help="Random weights of this shape, such as mixtral-8x7b.")
@click.option("--layers", type=click.IntRange(1), metavar="N", help="So many of the shape's layers.")
@click.option("--model", "-m", metavar="M", help="A real model instead: a folder, store, weights file or Hub id.")
@click.option(
    "--bits", type=click.Choice(SHAPE_BITS), metavar="N", help="16, 8, 4, 3 or 2; 4 for a shape, a model's own for it."
)
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Prompt tokens.")
@click.option("--decode", type=click.IntRange(1), default=64, show_default=True, metavar="N", help="Decode steps.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Sequences at once.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    shape: str | None,
    layers: int | None,
    model: str | None,
    bits: str | None,
    prompt: int,
    decode: int,
    batch: int,
    as_json: bool,
) -> None:
    """Measure prefill and decode, beside the machine's read bandwidth and integer dot products.

    Prompts are random tokens, and replies are sampled, so that routing spreads over the experts. On a machine with
    other work the figures mean little.

    \b
    octavo bench --shape mixtral-8x7b --layers 4 --bits 4 --prompt 512 --decode 64
    octavo bench --model ./mixtral-4bit --batch 8 --json
    """
    if (shape is None) == (model is None):
        raise OptionError(
            "octavo bench needs either --shape or --model", hint="such as --shape mixtral-8x7b --layers 4"
        )
    if model is not None and layers is not None:
        raise OptionError("--layers belongs to --shape; a model has its own", hint="leave one of them out")
    from octavo.bench.measure import Bench
    from octavo.kernels import backend

    started = time.perf_counter()
    loaded = _load(model, bits) if model is not None else _synthetic(str(shape), layers, bits)
    note(f"{backend()}; ready after {time.perf_counter() - started:.1f} s")
    args = loaded.args
    found = {"shape": shape, "model": model, "layers": args.n_layers, "bits": bits or (None if model else "4")}
    found |= Bench(loaded, prompt, decode, batch).run()
    click.echo(json.dumps(found, indent=2) if as_json else _readable(found))


def _synthetic(shape: str, layers: int | None, bits: str | None) -> Any:
    from octavo.bench.synthetic import synthetic_model
    from octavo.shapes import shape as shape_of

    return synthetic_model(shape_of(shape, layers), int(bits or 4))


def _load(model: str, bits: str | None) -> Any:
    from octavo.llm import LLM

    return LLM.load(model, dtype="bfloat16", bits=None if bits == "16" else bits).model


def _readable(found: dict[str, Any]) -> str:
    return (
        f"prefill {found['prefill_tok_s']:8.1f} tokens/s   {found['prefill_fraction_of_limit']:6.1%} of "
        f"{found['dot_limit_gops']:.0f} G integer operations/s\n"
        f"decode  {found['decode_tok_s']:8.1f} tokens/s   {found['decode_fraction_of_limit']:6.1%} of "
        f"{found['read_limit_gbs']:.1f} GB/s, {found['bytes_per_token'] / 1e6:.1f} MB a token\n"
        f"outside the kernels {found['outside_kernels_fraction']:.1%} of decode time; "
        f"peak memory {found['peak_rss_bytes'] / 1e9:.2f} GB; {found['backend']}, {found['threads']} threads"
    )
