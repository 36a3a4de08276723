"""`octavo routing ablate`: what a model is without some of its experts, or with another routing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from octavo.cli.routing.shared import Bar, documents_of, text_options
from octavo.cli.terminal import note

if TYPE_CHECKING:
    from octavo.routing.ablate import Effect, Estimate, Figures, Sweep

MANY = 16  # experts: tables of more columns, or rows, are for --json
DESTINATIONS = 3  # named of an expert's tokens


@click.command("ablate")
@click.argument("model")
@text_options
@click.option("--disable", "disabled", multiple=True, metavar="L:E", help="No token may choose expert E of layer L.")
@click.option("--do", "done", multiple=True, metavar="WHAT", help="Something else, such as topk:*:1; see above.")
@click.option("--sweep", is_flag=True, help="Disable each expert of each layer in turn.")
@click.option("--controls", type=int, default=0, metavar="N", help="Compare with N random others of the same layers.")
@click.option("--tokens", type=int, metavar="N", help="At most so many tokens of each file.")
@click.option("--memory", metavar="SIZE", help="All that may be taken, such as 12GiB: what does not fit is streamed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str,
    files: tuple[str, ...],
    texts: tuple[str, ...],
    labels: tuple[str, ...],
    disabled: tuple[str, ...],
    done: tuple[str, ...],
    sweep: bool,
    controls: int,
    tokens: int | None,
    memory: str | None,
    as_json: bool,
) -> None:
    """Read texts with MODEL as it is and with an intervention in its routing, and compare.

    MODEL is a folder, a weights file, a Hub id or menny. Layers and experts are counted from 0, and * is every layer.
    FILES are more texts; without any, the built-in ones are read: five languages, sums and code. Interventions are
    carried out in the order given, --disable first. WHAT is one of:

    \b
    disable:L:E,E   never choose them; the next best take over
    swap:L:A,B      who chose A gets B, and the other way round
    force:L:E       always among the chosen
    topk:L:K        K experts a token
    project:L:E:FILE.npy       the router does not see these directions in E's row
    random-project:L:E:SEED    as a control: a random direction
    shuffle:L:SEED  each token gets another one's choice; LAYER * and SEED 0 may be left out
    random:L:SEED   each token gets random experts, with its own weights

    \b
    octavo routing ablate menny --disable 3:5 --controls 5
    octavo routing ablate menny --do shuffle
    octavo routing ablate menny --sweep --tokens 300 --json
    """
    from octavo.cli.options import load
    from octavo.routing import ablate
    from octavo.routing.interventions import check_interventions, parse_disabled, parse_intervention

    if sweep and (disabled or done or controls):
        raise click.UsageError("--sweep disables every expert by itself; give it without --disable, --do or --controls")
    if not (sweep or disabled or done):
        raise click.UsageError("nothing to do: give --disable L:E, --do WHAT or --sweep")
    interventions = [*map(parse_disabled, disabled), *map(parse_intervention, done)]
    documents = documents_of(texts, files, labels)
    llm = load(model, None, None, None, memory, {})
    check_interventions(llm.model, interventions)
    sequences, domains = ablate.encode_documents(llm, documents, tokens)
    found: Sweep | Effect
    with Bar("reading") as bar:
        if sweep:
            found = ablate.sweep(llm, sequences, labels=domains, progress=bar)
        else:
            found = ablate.measure(llm, sequences, interventions, labels=domains, controls=controls, progress=bar)
    if as_json:
        click.echo(json.dumps({"model": model} | found.as_dict()))
        return
    click.echo("\n".join(_swept(found) if isinstance(found, ablate.Sweep) else _readable(found, controls)))
    note(f"nats a token; intervals hold together at {found.level:.0%}, over texts like these")


def _readable(effect: Effect, controls: int) -> Iterator[str]:
    """An effect as a table and sentences."""
    overall = effect.overall
    yield f"{', '.join(effect.interventions)}: {overall.n_tokens:,} predicted tokens"
    rows = {"all": overall} | effect.by_domain
    wide = max(map(len, rows))
    yield f"{'':{wide}}{'loss before':>13}{'after':>9}{'rise':>28}{'KL':>26}{'likeliest changed':>23}"
    for name, figures in rows.items():
        yield f"{name:{wide}}{_row(figures)}"
    yield ""
    yield _rise_in_words(overall)
    gone = effect.migration
    layers = [f"{layer}: {float(share):.1%}" for layer, share in enumerate(gone.value)]
    yield f"Choices that were made before and are not now, by layer: {', '.join(layers)}."
    yield from _destinations(effect)
    if effect.excess is not None:
        rises = [one.difference for one in effect.controls]
        below = sum(rise < float(overall.difference.value) for rise in rises)
        yield (
            f"Of {len(rises)} random others of the same kind ({min(rises):+.4f} to {max(rises):+.4f}), it costs more "
            f"than {below}; against their mean {_signed(effect.excess)}."
        )
        if len(rises) < controls:
            yield f"There are only {len(rises)} different ones."


def _row(figures: Figures) -> str:
    share, low, high = (f"{float(part):.1%}" for part in figures.flipped)
    return (
        f"{float(figures.before.value):13.4f}{float(figures.after.value):9.4f}{_signed(figures.difference):>28}"
        f"{_plain(figures.kl):>26}{f'{share} [{low}, {high}]':>23}"
    )


def _rise_in_words(figures: Figures) -> str:
    value, low, high = (float(part) for part in figures.difference)
    if low == high == 0:
        return "The loss is the same, to the last bit."
    if low <= 0 <= high:
        return f"The loss changes by {value:+.4f}, which cannot be told from nothing."
    verb, least, most = ("rises", low, high) if value > 0 else ("falls", -high, -low)
    times = f", {math.exp(value):.3g} times the perplexity" if value < 100 else ""
    return f"The loss {verb} by {abs(value):.4f} nats a token ({least:.4f} to {most:.4f}){times}."


def _destinations(effect: Effect) -> Iterator[str]:
    """Where the tokens of experts went that nobody chooses any more."""
    for layer, moved in enumerate(effect.moved):
        before, after = moved.sum(axis=1), moved.sum(axis=0)
        for expert in ((before > 0) & (after == 0)).nonzero()[0][:MANY]:
            shares = moved[expert] / before[expert]
            first = (-shares).argsort(kind="stable")[:DESTINATIONS]
            to = ", ".join(f"{other} ({shares[other]:.0%})" for other in first if shares[other] > 0)
            count = f"{n:,} choices" if (n := round(before[expert])) > 1 else "one choice"
            yield f"Layer {layer}, expert {expert}: its {count} went to {to}."


def _swept(sweep: Sweep) -> Iterator[str]:
    """A sweep as a map and sentences."""
    value, low, high = sweep.difference
    n_experts = value.shape[1]
    yield f"each expert disabled in turn: {sweep.n_tokens:,} predicted tokens, loss {sweep.before:.4f} with all"
    if n_experts <= MANY:
        yield f"{'layer':>5}" + "".join(f"{expert:>9}" for expert in range(n_experts))
        for layer, row in enumerate(value):
            yield f"{layer:5}" + "".join(f"{rise:+9.4f}" for rise in row)
    order = (-value).argsort(axis=None, kind="stable")
    yield ""
    for place in (*order[:3], order[-1]):
        at = int(place // n_experts), int(place % n_experts)
        which = "least" if place == order[-1] else "most"
        yield (
            f"Matters {which}: expert {at[1]} of layer {at[0]}, {_signed(sweep.difference.at(*at))}, with "
            f"{sweep.load[at]:.1%} of the layer's choices."
        )
    unsure = int(((low <= 0) & (high >= 0)).sum())
    yield f"Of {value.size} experts, {unsure} cannot be told from one that does nothing."


def _signed(one: Estimate) -> str:
    value, low, high = (float(part) for part in one)
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def _plain(one: Estimate) -> str:
    value, low, high = (float(part) for part in one)
    return f"{value:.4f} [{low:.4f}, {high:.4f}]"
