"""`octavo convert`: a checkpoint in another layout."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from octavo.cli.terminal import note

if TYPE_CHECKING:
    from octavo.convert import Conversion

TARGETS = ("hf", "mistral", "mlx", "gguf")


@click.command("convert")
@click.argument("source")
@click.argument("target")
@click.option(
    "--to",
    required=True,
    type=click.Choice([*TARGETS, "octavo"]),
    metavar="|".join(TARGETS),  # octavo gets a hint
    help="The layout to be written.",
)
@click.option(
    "--dtype",
    metavar="DTYPE",
    help="float32, bfloat16 or float16; for gguf also q8_0 and q4_0, for mlx also q8 and q4. By default each tensor's.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit, if SOURCE is a Hub id.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print what is written as one JSON object.")
def command(
    source: str, target: str, to: str, dtype: str | None, revision: str | None, dry_run: bool, as_json: bool
) -> None:
    """Write the checkpoint SOURCE as TARGET in another layout, one tensor in memory at a time.

    SOURCE is a folder or file in any layout, a Hub id (read as it is needed, and not kept), or menny. TARGET is a
    folder that does not exist yet; with --to gguf it may be a .gguf file. An interrupted conversion goes on when the
    same command is given again. What runs fastest on a CPU is written by octavo quantize.

    \b
    octavo convert mistralai/Mixtral-8x7B-Instruct-v0.1 mixtral.gguf --to gguf --dtype q4_0
    octavo convert ./mixtral-8x7b-32kseqlen ./mixtral-hf --to hf --dry-run
    """
    from octavo.convert import plan_conversion
    from octavo.llm import SHIPPED, shipped_model

    conversion = plan_conversion(
        shipped_model() if source == SHIPPED else source,
        target,
        to=to,
        dtype=None if dtype is None else dtype.lower(),
        revision=revision,
    )
    carry_out(conversion, dry_run=dry_run, as_json=as_json)


def carry_out(conversion: Conversion, *, dry_run: bool, as_json: bool) -> None:
    """Write what is planned, with a progress bar, or only say what would be written."""
    if not dry_run:
        run_conversion(conversion)
    if as_json:
        click.echo(json.dumps(_summary(conversion)))
    elif dry_run:
        _list(conversion)
    else:
        click.echo(conversion.target)


def run_conversion(conversion: Conversion) -> None:
    from tqdm import tqdm

    bar = tqdm(
        desc=conversion.target.name, total=conversion.nbytes, unit="B", unit_scale=True, unit_divisor=1000,
        file=sys.stderr, mininterval=0.2, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    try:
        with bar:
            conversion.run(bar.update)
    except KeyboardInterrupt:
        note(f"interrupted; the same command goes on from here (what is written lies in {conversion.beside})")
        raise


def _list(conversion: Conversion) -> None:
    """Files, and how many tensors of which encoding each holds."""
    for file in conversion.files:
        encodings: dict[str, int] = {}
        for field in file.fields:
            encoding = field.format or field.encoding
            encodings[encoding] = encodings.get(encoding, 0) + 1
        kinds = ", ".join(f"{count} {encoding}" for encoding, count in sorted(encodings.items()))
        click.echo(f"{file.name}\t{file.size}\t{kinds}")
    for name, data in conversion.companions.items():
        click.echo(f"{name}\t{len(data)}")
    note(
        f"{conversion.checkpoint.location} (layout {conversion.checkpoint.layout_name}) would be written as "
        f"{conversion.target}: {conversion.nbytes:,} bytes"
    )


def _summary(conversion: Conversion) -> dict[str, Any]:
    return {
        "source": conversion.checkpoint.location,
        "layout": conversion.checkpoint.layout_name,
        "target": str(conversion.target),
        "bytes": conversion.nbytes,
        "files": [
            {"name": file.name, "bytes": file.size, "tensors": len(file.fields)} for file in conversion.files
        ] + [{"name": name, "bytes": len(data)} for name, data in conversion.companions.items()],
    }  # fmt: skip
