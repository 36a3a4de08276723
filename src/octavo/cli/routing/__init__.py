"""`octavo routing VERB`: one module per verb, imported when it is called for."""

from __future__ import annotations

import click

from octavo.cli.verbs import lazy

VERBS = ("trace", "import", "stats", "replay", "experts", "diff", "ablate", "report")


@click.group("routing", cls=lazy("octavo.cli.routing", *VERBS))
def command() -> None:
    """See inside a model: record who is routed where, compare experts, put it all on one page.

    \b
    octavo routing report menny -o report.html               one page about a model
    octavo routing trace MODEL --text FILE --label NAME      record which experts a text is routed to
    octavo routing stats trace.safetensors                   what the record says, with intervals
    octavo routing experts MODEL                             compare routers and experts by their weights
    octavo routing ablate MODEL --disable 3:5                what a model is without an expert
    """
