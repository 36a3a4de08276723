"""What a figure is: plain data of three kinds, which `svg`, `png` and `Figure.rows` each draw or list in one way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Cell = str | int | float


@dataclass(frozen=True)
class Number:
    """How a value is written: times `scale`, with `digits` behind the point, then `unit`."""

    digits: int = 2
    scale: float = 1.0
    unit: str = ""

    def __call__(self, value: float) -> str:
        """The value in words; a dash for what is not a number."""
        return f"{self.bare(value)}{self.unit}" if np.isfinite(value) else "–"

    def bare(self, value: float) -> str:
        """The same without its unit."""
        return (
            f"{round(value * self.scale, self.digits) + 0.0:.{self.digits}f}".replace("-", "−")
            if np.isfinite(value)
            else "–"
        )


PERCENT = Number(1, 100, "\u00a0%")
SHARE = Number(0, 100, "\u00a0%")
POINTS = Number(1, 100, "\u00a0points")
PLAIN = Number(2)


@dataclass(frozen=True, eq=False)
class Grid:
    """One panel of a heatmap.

    Attributes:
        title: of the panel.
        values: [rows, columns]; NaN leaves a cell empty.
        low, high: the interval of each value, of its shape.
        baseline: what each value would be without what is looked for; broadcasts to its shape.
    """

    title: str
    values: Array
    low: Array | None = None
    high: Array | None = None
    baseline: Array | float | None = None


@dataclass(frozen=True, eq=False)
class Heatmap:
    """Panels of cells with one scale of colours.

    Attributes:
        grids: the panels, all with these rows and columns.
        rows, columns: their labels.
        row_name, column_name: what they are.
        number: how values are written.
        least, most: the ends of the colour scale.
        middle: the value without colour, where the scale has two sides; None for one that begins at `least`.
        together: so many panels, one after the other, are shown or folded away together.
    """

    grids: tuple[Grid, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_name: str
    column_name: str
    number: Number
    least: float
    most: float
    middle: float | None = None
    together: int = 1


@dataclass(frozen=True, eq=False)
class Series:
    """A line.

    Attributes:
        name: for the legend; lines of one name have one colour.
        x, y: its points.
        low, high: a band around it.
        role: "data" is drawn in a colour, "baseline" dashed and grey, "published" as a bar from low to high at each x.
    """

    name: str
    x: Array
    y: Array
    low: Array | None = None
    high: Array | None = None
    role: str = "data"


@dataclass(frozen=True, eq=False)
class Lines:
    """Panels of lines with the same axes.

    Attributes:
        panels: title and lines of each.
        x_name, y_name: of the axes.
        number: how y is written.
        x_number: how x is written.
        log_x, log_y: whether the axis is logarithmic.
        least, most: the ends of y; None for those of the data.
        ticks: the values of x that are written; empty for round ones.
        together: as in a heatmap.
    """

    panels: tuple[tuple[str, tuple[Series, ...]], ...]
    x_name: str
    y_name: str
    number: Number
    x_number: Number = Number(0)
    log_x: bool = False
    log_y: bool = False
    least: float | None = 0.0
    most: float | None = None
    ticks: tuple[float, ...] = ()
    together: int = 1


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers."""

    header: tuple[str, ...]
    body: tuple[tuple[Cell, ...], ...]


Content = Heatmap | Lines | Table


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure and the sentences that belong to it.

    Attributes:
        key: names its files and its place on the page.
        section: the key of the section it stands in.
        title: a few words.
        how: one sentence that says how to read it.
        limits: one sentence that says what it does not show.
        denominator: of what the numbers are a share, or what they are.
        baseline: what they are held beside; empty where there is nothing.
        content: the data.
        found: sentences with what was measured.
    """

    key: str
    section: str
    title: str
    how: str
    limits: str
    denominator: str
    baseline: str
    content: Content
    found: tuple[str, ...] = ()

    def rows(self) -> Iterator[Sequence[Cell]]:
        """All data as rows for a CSV file; the first has the names of the columns."""
        match self.content:
            case Heatmap():
                yield from _heatmap_rows(self.content)
            case Lines():
                yield from _lines_rows(self.content)
            case Table():
                yield self.content.header
                yield from self.content.body


def few(count: int, most: int) -> list[int]:
    """At most so many of 0 .. count - 1, spread evenly, the first and the last among them."""
    return sorted({round(float(at)) for at in np.linspace(0, count - 1, min(count, most))})


def _heatmap_rows(heatmap: Heatmap) -> Iterator[Sequence[Cell]]:
    yield "panel", heatmap.row_name, heatmap.column_name, "value", "low", "high", "baseline"
    for grid in heatmap.grids:
        shape = grid.values.shape
        layers = [grid.values, *(_filled(array, shape) for array in (grid.low, grid.high, grid.baseline))]
        for row, column in np.ndindex(shape):
            numbers = (_cell(float(layer[row, column])) for layer in layers)
            yield grid.title, heatmap.rows[row], heatmap.columns[column], *numbers


def _lines_rows(lines: Lines) -> Iterator[Sequence[Cell]]:
    yield "panel", "series", "role", lines.x_name, lines.y_name, "low", "high"
    for title, panel in lines.panels:
        for series in panel:
            low, high = (_filled(array, series.y.shape) for array in (series.low, series.high))
            for x, *numbers in zip(series.x, series.y, low, high, strict=True):
                yield title, series.name, series.role, _cell(x), *map(_cell, numbers)


def _filled(array: Array | float | None, shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(np.nan if array is None else np.asarray(array, np.float64), shape)


def _cell(value: float) -> Cell:
    """A number as it is kept; nothing where there is none."""
    if np.isnan(value):
        return ""
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(value)
