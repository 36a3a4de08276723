"""`octavo routing replay`: what caches of any size and policy would have made of a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octavo.cli.options import SHAPE_BITS
from octavo.cli.routing.shared import Bar
from octavo.cli.terminal import note
from octavo.errors import OptionError

if TYPE_CHECKING:
    from octavo.args import ModelArgs
    from octavo.experts import RoutingTrace
    from octavo.plan import Weights
    from octavo.routing.replay import Curve


@click.command("replay")
@click.argument("trace", metavar="TRACE")
@click.option("--model", "-m", metavar="MODEL|SHAPE", help="Whose sizes count; by default sizes are in experts.")
@click.option(
    "--bits", type=click.Choice(SHAPE_BITS), metavar="N", help="16, 8, 4, 3 or 2: its precision; 4 by default."
)
@click.option(
    "--memory",
    multiple=True,
    metavar="SIZE",
    help="All that may be taken, such as 12GiB; without --model, experts in the cache. Repeatable.",
)
@click.option(
    "--policy", multiple=True, metavar="NAME", help="lru, lfu, pinned, pinned+lru, belady or octavo. Repeatable."
)
@click.option("--prior", metavar="FILE", help="A trace that fills the caches, in the place of the first half.")
@click.option("--tokens", type=click.IntRange(0), metavar="N", help="Replay so many; by default 4000, and with 0 all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    trace: str,
    model: str | None,
    bits: str | None,
    memory: tuple[str, ...],
    policy: tuple[str, ...],
    prior: str | None,
    tokens: int | None,
    as_json: bool,
) -> None:
    """Replay TRACE with caches of several sizes: how often would each policy have had the expert that was needed?

    Tokens come one at a time, as in decoding. The first half of them fills the caches, the second half is counted. A
    cache holds whole experts of all layers; octavo holds parts of all, as without a trace. belady knows the future: no
    policy of whole experts does better. even is what any fixed choice finds where routing is even.

    \b
    octavo routing replay trace.safetensors
    octavo routing replay trace.safetensors --model mixtral-8x7b --bits 4 --memory 8GiB --memory 16GiB
    """
    from octavo.experts import read_trace
    from octavo.routing.replay import LABELS, TOKENS, curves, experts_within

    if model is None and bits is not None:
        raise click.UsageError("--bits is of a --model")
    found, before = read_trace(Path(trace)), None if prior is None else read_trace(Path(prior))
    sized = None if model is None else _sized(model, bits, found, before)
    held = None
    if memory:
        held = [_number(size) if sized is None else experts_within(*sized, _parse(size)) for size in memory]
    with Bar("replaying", unit=" policies") as bar:
        replayed = curves(
            found,
            1 if sized is None else sized[1].expert,
            policies=policy or tuple(LABELS),
            sizes=held,
            prior=before,
            tokens=TOKENS if tokens is None else tokens or None,
            progress=bar,
        )
    one = replayed[0]
    filled = "another trace" if before is not None else "those before them"
    note(
        f"{one.tokens:,} of {found.n_tokens:,} tokens are counted, and {filled} fill the caches; of {one.requests:,} "
        f"requests {one.compulsory:,} are for experts that nobody asked for before"
    )
    rows = list(_rows(found, replayed, sized))
    if as_json:
        about = {"trace": trace, "model": model, "precision": None if sized is None else sized[1].label}
        counts = {"tokens": one.tokens, "requests": one.requests, "compulsory": one.compulsory, "sizes": rows}
        click.echo(json.dumps(about | counts, indent=2))
    else:
        click.echo("\n".join(_table(rows, [curve.policy for curve in replayed])))


def _sized(model: str, bits: str | None, trace: RoutingTrace, prior: RoutingTrace | None) -> tuple[ModelArgs, Weights]:
    """The model's shape and its weights, in 4 bits unless they have a precision or are asked for in one."""
    from octavo.cli.headers import read_model
    from octavo.plan import UNASKED, weights_at

    found = read_model(model)
    for one in (trace, prior):
        if one is not None:
            one.check(found.args)
    if found.store is not None and bits is not None:
        raise OptionError(f"--bits is {bits}; {model} is a store, which has its own precision", hint="leave it out")
    return found.args, found.store or weights_at(found.args, int(bits or UNASKED[-1]))


def _parse(size: str) -> int:
    from octavo.plan import parse_size

    return parse_size(size)


def _number(size: str) -> int:
    if not size.isdecimal():
        raise OptionError(
            f"--memory is {size!r}; without --model it is a number of experts", hint="such as --memory 64"
        )
    return int(size)


def _rows(
    trace: RoutingTrace, replayed: Sequence[Curve], sized: tuple[ModelArgs, Weights] | None
) -> Iterator[dict[str, Any]]:
    """Size by size; bytes where the model is known, and numbers of experts where it is not."""
    from octavo.routing.replay import baseline, budget_for

    n_experts = trace.n_layers * trace.experts if sized is None else sized[1].n_experts
    for number, held in enumerate(replayed[0].n_held):
        yield {
            "experts": held,
            "expert_bytes": None if sized is None else replayed[0].nbytes[number],
            "memory": None if sized is None else budget_for(*sized, held),
            "even": baseline(held, n_experts),
            "hit_rate": {curve.policy: curve.hit_rate[number] for curve in replayed},
            "read_per_token": {curve.policy: curve.read_per_token[number] for curve in replayed},
        }


def _table(rows: Sequence[dict[str, Any]], policies: Sequence[str]) -> Iterator[str]:
    """Hit rates, and below them what a token reads."""
    from octavo.plan import show_size

    in_bytes = rows[0]["memory"] is not None

    def line(head: str, memory: str, experts: object, cells: Sequence[str]) -> str:
        return f"{head:12}{memory if in_bytes else '':>{10 * in_bytes}}{experts:>9}" + "".join(
            f"{c:>12}" for c in cells
        )

    def sizes(row: dict[str, Any]) -> tuple[str, object]:
        return show_size(row["memory"] or 0), row["experts"]

    yield line("hit rate", "memory", "experts", (*policies, "even"))
    for row in rows:
        yield line("", *sizes(row), [f"{rate:.1%}" for rate in (*row["hit_rate"].values(), row["even"])])
    yield line("read a token", "memory", "experts", policies)
    for row in rows:
        read = row["read_per_token"].values()
        yield line("", *sizes(row), [show_size(size) if in_bytes else f"{size:.2f}" for size in read])
