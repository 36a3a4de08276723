"""`octavo routing report`: one page that explains a model of experts."""

from __future__ import annotations

import datetime
import sys

import click

from octavo.cli.routing.shared import check_place, parse_layers, text_options
from octavo.cli.terminal import note


@click.command("report")
@click.argument("source", metavar="MODEL|TRACE")
@click.option("--out", "-o", required=True, metavar="FILE", help="Where to: an HTML file.")
@text_options
@click.option("--only", type=click.Choice(("routers", "weights", "trace")), help="Of the model, only this.")
@click.option("--layers", metavar="L,L...", help="Compare experts of these layers; by default all, 4 of a large model.")
@click.option("--figures", metavar="DIR", help="Write each figure as PNG, and its data as CSV, there too.")
@click.option("--memory", metavar="SIZE", help="All that the model may take while it reads, such as 12GiB.")
@click.option("--model", metavar="MODEL", help="Beside a trace: show the weights of this model too.")
def command(
    source: str,
    files: tuple[str, ...],
    out: str,
    texts: tuple[str, ...],
    labels: tuple[str, ...],
    only: str | None,
    layers: str | None,
    figures: str | None,
    memory: str | None,
    model: str | None,
) -> None:
    """Write one page about a model of experts, or a trace of one. It opens in a browser, without a server or network.

    Of a MODEL here (a folder, a file, menny) experts and routers are compared, and the experts of every token of the
    texts (--text or FILES) are shown, by default of built-in ones. Of a Hub id only the routers are fetched; --only
    weights and --only trace fetch more, up to all of it. The page's path goes to stdout.

    \b
    octavo routing report menny -o report.html
    octavo routing report mistralai/Mixtral-8x7B-v0.1 -o routers.html
    octavo routing report trace.safetensors --model ./mixtral --layers 0,15,31 -o report.html
    """
    from tqdm import tqdm

    from octavo.routing.report.sources import report_on

    check_place(out, "report.html")
    chosen = parse_layers(layers)
    bars: list[tqdm[None]] = []

    def tell(what: str, done: int, total: int) -> None:
        """One bar for each thing that is measured; at most one is there at a time."""
        if not sys.stderr.isatty():
            return
        if not bars or bars[-1].desc != what:
            close()
            bars.append(tqdm(desc=what, total=total or None, file=sys.stderr, leave=False, dynamic_ncols=True))
        bars[-1].total = total or None
        bars[-1].update(done - bars[-1].n)

    def close() -> None:
        for bar in bars:
            bar.close()

    try:
        report = report_on(
            source,
            texts=(*texts, *files),
            labels=labels,
            only=only,  # type: ignore[arg-type]  # click knows the choices
            layers=chosen,
            memory=memory,
            model=model,
            date=datetime.date.today().isoformat(),
            tell=tell,
            remark=note,
        )
        report.write(out)
        if figures is not None:
            written = report.write_figures(figures, lambda done, total: tell("pictures", done, total))
    finally:
        close()
    if figures is not None:
        note(f"{figures}: {len(written)} files")
    click.echo(out)
