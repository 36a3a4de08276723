"""`octavo quantize`: a checkpoint as a store, in 8, 4, 3 or 2 bits."""

from __future__ import annotations

import click

from octavo.cli.convert import carry_out
from octavo.cli.options import BITS
from octavo.errors import OptionError


@click.command("quantize")
@click.argument("source")
@click.argument("target")
@click.option("--bits", required=True, type=click.Choice(BITS), metavar="N", help="8, 4, 3 or 2: of the experts.")
@click.option(
    "--override",
    "overrides",
    multiple=True,
    metavar="PATTERN=FORMAT",
    help="Of tensors whose names match, such as 'layers.0.*.w?.weight=q8'; 16 keeps them as they are. Repeatable.",
)
@click.option(
    "--method",
    metavar="METHOD",
    default="optimal",
    show_default=True,
    help="optimal, or rtn: round to nearest, which is quicker and further off.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit, if SOURCE is a Hub id.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what is written as one JSON object.")
def command(
    source: str,
    target: str,
    bits: str,
    overrides: tuple[str, ...],
    method: str,
    revision: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the checkpoint SOURCE as the store TARGET, quantised as the CPU's kernels read it.

    SOURCE is a folder or file in any layout, a Hub id (read as it is needed, and not kept), or menny. TARGET is a
    folder that does not exist yet, and opens like any other checkpoint. Routers, norms and the embedding are kept. An
    interrupted run goes on when the same command is given again.

    \b
    octavo quantize mistralai/Mixtral-8x7B-Instruct-v0.1 mixtral-q4 --bits 4
    octavo quantize ./mixtral mixtral-q3 --bits 3 --override 'output.weight=q8' --override 'layers.0.*.w?.weight=q4'
    """
    from octavo.convert import plan_quantization
    from octavo.llm import SHIPPED, shipped_model

    conversion = plan_quantization(
        shipped_model() if source == SHIPPED else source,
        target,
        bits=bits,
        overrides=_parse(overrides),
        method=method,
        revision=revision,
    )
    carry_out(conversion, dry_run=dry_run, as_json=as_json)


def _parse(overrides: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in overrides:
        pattern, equals, name = text.partition("=")
        if not (pattern and equals and name):
            raise OptionError(f"--override {text!r}: expected PATTERN=FORMAT", hint="such as 'output.weight=q8'")
        found[pattern.strip()] = name.strip()
    return found
