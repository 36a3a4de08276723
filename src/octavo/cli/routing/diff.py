"""`octavo routing diff`: what changed between two models, or two revisions of one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from octavo.cli.routing.experts import routers_only, tell_fetched, without_nan
from octavo.cli.routing.shared import Bar, parse_layers
from octavo.errors import OptionError

if TYPE_CHECKING:
    from octavo.routing.compare import Change

SHOWN = 20


@click.command("diff")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--routers", is_flag=True, help="Only routers.")
@click.option("--layers", metavar="L,L,...", help="Only these, such as 0,15 or 0-3; by default all.")
@click.option("--all", "every", is_flag=True, help="Of Hub ids: fetch and compare all experts.")
@click.option("--revision-a", metavar="REV", help="Branch, tag or commit of A, a Hub id.")
@click.option("--revision-b", metavar="REV", help="The same of B.")
@click.option("--top", type=int, default=SHOWN, show_default=True, metavar="N", help="How many changes to print.")
@click.option("--json", "as_json", is_flag=True, help="Print all of them as a JSON list of objects.")
def command(
    a: str,
    b: str,
    routers: bool,
    layers: str | None,
    every: bool,
    revision_a: str | None,
    revision_b: str | None,
    top: int,
    as_json: bool,
) -> None:
    """Say how the routers and experts of models A and B differ, the largest change first.

    A distance is |B - A| / |A|. Experts that changed places are compared with what they became. Of Hub ids only
    routers are fetched, unless --layers or --all asks for experts.

    \b
    octavo routing diff ./base ./tuned
    octavo routing diff owner/name owner/name --revision-a v1 --revision-b main
    """
    if top < 1:
        raise OptionError(f"--top is {top}; expected a number from 1 on", hint="such as --top 50")
    from octavo.routing.compare import check_alike, diff
    from octavo.routing.weights import open_weights

    one, other = open_weights(a, revision_a), open_weights(b, revision_b)
    check_alike(one, other)
    chosen = one.choose_layers(parse_layers(layers))
    for weights in (one, other):
        routers = routers_only(weights, chosen, routers=routers, experts=every or layers is not None)
    with Bar("layers", len(chosen), unit=" layers") as bar:
        found = diff(one, other, chosen, routers_only=routers, progress=bar.add)
    if as_json:
        click.echo("[\n" + ",\n".join(json.dumps(without_nan(vars(change))) for change in found) + "\n]")
    else:
        click.echo("\n".join(_lines(found, top)))
    tell_fetched(one, other)


def _lines(found: list[Change], top: int) -> list[str]:
    changed = [change for change in found if change.distance != 0 or change.other != change.expert]
    total = f"{len(changed)} of {len(found)} router rows and matrices differ"
    if not changed:
        return [total]
    lines = [f"{total}; the {min(top, len(changed))} that changed most:", "layer  expert  of       distance    cosine"]
    for change in changed[:top]:
        moved = "" if change.other == change.expert else f"  is expert {change.other} in B"
        which = f"{change.layer:5}  {change.expert:6}  {change.what:<6}"
        lines.append(f"{which}  {change.distance:9.6f}  {change.cosine:8.5f}{moved}")
    return lines
