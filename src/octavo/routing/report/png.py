"""Figures as PNG files, with matplotlib, which comes with the extra `octavo[routing]`. One way for each kind."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import OptionError
from octavo.routing.report.kinds import Figure, Heatmap, Lines, Number, Series, Table, few

# Categorical colours that stay apart for colour-blind readers (Okabe and Ito), as on the page.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a800", "#7f7f7f")
MOST_PANELS = 9
MOST_LINES = 40  # of a table
COLUMNS = 3


def save_png(figure: Figure, path: Path) -> None:
    """Draw a figure; of many panels some, spread evenly.

    Raises:
        OptionError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise OptionError(
            "PNG files are drawn with matplotlib, which is not installed", hint="pip install 'octavo[routing]'"
        ) from None
    content = figure.content
    count = 1
    if isinstance(content, Heatmap):
        count = len(content.grids)
    elif isinstance(content, Lines):
        count = len(content.panels)
    shown = few(count, MOST_PANELS)
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    size = max(4.6, 3.4 * columns), 3.2 * rows + 0.7
    if isinstance(content, Table):
        size = 9.0, 0.25 * min(len(content.body), MOST_LINES) + 1.2
    canvas = Canvas(figsize=size, layout=None if isinstance(content, Table) else "constrained")
    panels = list(canvas.subplots(rows, columns, squeeze=False, sharey=isinstance(content, Lines)).flat)
    for spare in panels[len(shown) :]:
        spare.set_visible(False)
    for axes, at in zip(panels, shown, strict=False):
        match content:
            case Heatmap():
                image = _heatmap(axes, content, at)
            case Lines():
                _lines(axes, content, at)
            case Table():
                _table(axes, content)
    if isinstance(content, Heatmap):
        bar = canvas.colorbar(image, ax=panels[: len(shown)], shrink=0.8, format=_ticks(content.number))
        bar.ax.tick_params(labelsize=8)
    elif isinstance(content, Lines):
        entries: dict[str, Any] = {}
        for axes in panels[: len(shown)]:
            handles, names = axes.get_legend_handles_labels()
            entries |= dict(zip(names, handles, strict=True))
        if entries:
            canvas.legend(
                entries.values(), entries.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
            )
    left = f" ({len(shown)} of {count} panels)" if len(shown) < count else ""
    if isinstance(content, Table):
        panels[0].set_title(_plain(figure.title), fontsize=11, loc="left")
    else:
        canvas.suptitle(_plain(figure.title) + left, fontsize=11)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # tokens may be of scripts that its font lacks
        canvas.savefig(path, dpi=110, bbox_inches="tight" if isinstance(content, Table) else None)


def _heatmap(axes: Any, heatmap: Heatmap, at: int) -> Any:
    grid = heatmap.grids[at]
    least, most, colours = heatmap.least, heatmap.most, "Blues"
    if heatmap.middle is not None:
        span = max(most - heatmap.middle, heatmap.middle - least)
        least, most, colours = heatmap.middle - span, heatmap.middle + span, "PuOr"
    image = axes.imshow(grid.values, cmap=colours, vmin=least, vmax=most, aspect="auto", interpolation="nearest")
    axes.set_title(_plain(grid.title), fontsize=9)
    for axis, names, name in (
        (axes.xaxis, heatmap.columns, heatmap.column_name),
        (axes.yaxis, heatmap.rows, heatmap.row_name),
    ):
        ticks = few(len(names), 12)
        axis.set_ticks(ticks, [_plain(names[tick])[:16] for tick in ticks], fontsize=7)
        axis.set_label_text(_plain(name), fontsize=8)
    if max(len(name) for name in heatmap.columns) > 3:
        axes.tick_params(axis="x", rotation=60)
    if grid.values.size <= 100 and len(heatmap.grids) == 1:
        for (row, column), value in np.ndenumerate(grid.values):
            if np.isfinite(value):
                deep = abs(value - (heatmap.middle or least)) > 0.6 * (most - (heatmap.middle or least))
                text = heatmap.number.bare(value)
                axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if deep else "black")
    return image


def _lines(axes: Any, lines: Lines, at: int) -> None:
    title, panel = lines.panels[at]
    names = list(dict.fromkeys(one.name for _, other in lines.panels for one in other if one.role == "data"))
    for series in panel:
        _line(axes, series, names, lines.log_y)
    axes.set_title(_plain(title), fontsize=9)
    axes.set_xlabel(_plain(lines.x_name), fontsize=8)
    axes.set_ylabel(_plain(lines.y_name), fontsize=8)
    if lines.log_x:
        axes.set_xscale("log")
    if lines.log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(lines.least, lines.most)
        axes.yaxis.set_major_formatter(_ticks(lines.number))
    if lines.ticks:
        axes.set_xticks(lines.ticks, [lines.x_number(tick) for tick in lines.ticks])
        axes.minorticks_off()
    elif not lines.log_x:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)


def _line(axes: Any, series: Series, names: list[str], log_y: bool) -> None:
    label, y = _plain(series.name), np.where((series.y > 0) | (not log_y), series.y, np.nan)
    if series.role == "published":
        axes.vlines(series.x, series.low, series.high, color="black", alpha=0.5, linewidth=4, label=label)
        return
    if series.role == "baseline":
        colour, style = "#666666", {"linestyle": "--", "linewidth": 1}
    else:
        colour, style = COLOURS[names.index(series.name) % len(COLOURS)], {"linewidth": 1.4, "marker": "."}
    axes.plot(series.x, y, color=colour, label=label, **style)
    if series.low is not None and series.high is not None:
        axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.2, linewidth=0)


def _table(axes: Any, table: Table) -> None:
    axes.axis("off")
    rows = [[_plain(str(cell))[:60] for cell in row] for row in table.body[:MOST_LINES]] or [["–"] * len(table.header)]
    drawn = axes.table(rows, colLabels=[_plain(name) for name in table.header], loc="upper left", cellLoc="left")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(7)
    drawn.auto_set_column_width(range(len(table.header)))


def _ticks(number: Number) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value * number.scale:.3g}{number.unit}")


def _plain(text: str) -> str:
    """Text that matplotlib takes as it is: no formulas between dollars, and one line."""
    return " ".join(text.split()).replace("$", r"\$")
