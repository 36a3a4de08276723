"""Figures as HTML: panels of SVG that we draw ourselves, and tables. One way for each kind; all text is escaped.

A panel is `WIDTH` units wide and is never shown narrower than so many pixels, so its text is as large as it says.
Colours are classes of `page.css`, so that they follow the reader's light or dark scheme; shades are opacity.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np

from octavo.routing.report.kinds import (
    Array,
    Figure,
    Grid,
    Heatmap,
    Lines,
    Number,
    Series,
    Table,
    few,
)

WIDTH = 280
N_COLOURS = 8  # `.s0` to `.s7` in page.css
OPEN_PANELS = 9  # a figure of more has some of them folded away
FEW_PANELS = 6  # which then are left open
MOST_CELLS = 1600  # a panel of more is one picture, without a number for each cell
MOST_DRAWN = 8192  # cells of a figure; of larger ones some panels are drawn
MOST_ROWS = 400  # of a table
TEXT, CELL_TEXT = 11.0, 10.5  # sizes of letters, as in page.css
CHARACTER = 0.62  # of its size, the width of a letter in a wide font
NARROW, WIDER = ".,:;-'|ilj \u00a0", {"−": 0.84, "%": 0.95, "m": 0.95, "w": 0.82, "…": 0.95}
RIGHT, TOP, PLOT_HEIGHT = 8, 22, 132
HUES = ((47, 134, 200), (213, 94, 0))  # of pictures: seen on light and on dark alike


def draw(figure: Figure) -> str:
    """The figure's content as HTML, its legend first."""
    match figure.content:
        case Heatmap():
            return _scale(figure.content) + _heatmap(figure.content)
        case Lines():
            lines = figure.content
            return _legend(lines) + _tiles([_plot(lines, *panel) for panel in lines.panels], lines.together)
        case Table():
            return _table(figure.content)


# ---------------------------------------- panels


def _tiles(panels: Sequence[str], together: int = 1, of: int | None = None) -> str:
    """Panels side by side as there is room; of many, most are folded away.

    Args:
        together: so many in a row are shown or folded away together.
        of: how many there are in all, where not all are drawn.
    """
    shown = set(range(len(panels)))
    if len(panels) > OPEN_PANELS:
        groups = few(-(-len(panels) // together), max(1, FEW_PANELS // together))
        shown = {at for at in shown if at // together in groups}
    note = "" if of is None else f'<p class="note">{len(panels)} of {of} panels are drawn; the CSV file has all.</p>'
    tiles = f'<div class="tiles">{"".join(panels[at] for at in sorted(shown))}</div>'
    left = len(panels) - len(shown)
    if left:
        rest = "".join(panel for at, panel in enumerate(panels) if at not in shown)
        plural = "s" * (left > 1)
        tiles += f'<details><summary>{left} more panel{plural}</summary><div class="tiles">{rest}</div></details>'
    return note + tiles


def _panel(title: str, height: float, label: str, parts: Iterator[str] | Sequence[str]) -> str:
    head = f'<div class="head">{escape(title)}</div>' if title else ""
    name = escape(f"{title}: {label}" if title else label)
    return (
        f'<div class="tile">{head}<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{name}">'
        f"{''.join(parts)}</svg></div>"
    )


def _text(x: float, y: float, text: str, kind: str = "", more: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{_n(x)}" y="{_n(y)}"{kind}{more}>{escape(text)}</text>'


def _n(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.1f}".removesuffix(".0")


def _cut(text: str, room: float) -> str:
    """The text, or as much of it as there is room for."""
    while len(text) > 2 and _width(text) > room:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def _width(text: str, size: float = TEXT) -> float:
    """How wide it is at most, about."""
    return size * sum(
        0.36 if letter in NARROW else WIDER.get(letter, 0.72 if letter.isupper() else CHARACTER + 0.02)
        for letter in text
    )


# ---------------------------------------- heatmaps


def _heatmap(heatmap: Heatmap) -> str:
    rows, columns = len(heatmap.rows), len(heatmap.columns)
    cells = min(rows * columns, MOST_CELLS)
    drawn = few(len(heatmap.grids), max(1, MOST_DRAWN // cells))
    of = len(heatmap.grids) if len(drawn) < len(heatmap.grids) else None
    number = _cell_number(heatmap)
    return _tiles([_grid(heatmap, heatmap.grids[at], number) for at in drawn], heatmap.together, of)


def _sizes(heatmap: Heatmap) -> tuple[float, float, float]:
    """Where cells begin, and how wide and tall they are."""
    rows, columns = len(heatmap.rows), len(heatmap.columns)
    left = min(92.0, max(_width(name) for name in (*heatmap.rows, heatmap.row_name)) + 6)
    wide = (WIDTH - left - 1) / columns
    most = max(22.0, 200 / rows) if rows * 22 < 500 else 480 / rows
    return left, wide, min(max(wide, min(13.0, 240 / rows)), most)


def _cell_number(heatmap: Heatmap) -> Number | None:
    """How values are written into cells, with as many digits as fit; None where there is no room."""
    _, wide, tall = _sizes(heatmap)
    if tall < 12.5:
        return None
    for digits in range(heatmap.number.digits, max(-1, heatmap.number.digits - 2), -1):
        number = dataclasses.replace(heatmap.number, digits=digits)
        known = [value for grid in heatmap.grids for value in grid.values[np.isfinite(grid.values)].tolist()]
        if max((_width(_short(number, value), CELL_TEXT) for value in known), default=0) < wide:
            return number
    return None


def _grid(heatmap: Heatmap, grid: Grid, number: Number | None) -> str:
    rows, columns = heatmap.rows, heatmap.columns
    left, wide, tall = _sizes(heatmap)
    slanted = any(_width(name) > max(wide, 26) for name in columns)
    room = min(84.0, max(map(_width, columns)) + 6) if slanted else 15.0
    top = 15 + room
    label = f"{heatmap.row_name} by {heatmap.column_name}"
    parts = [_text(0, top - 5, heatmap.row_name, "axis"), _text(WIDTH, 11, heatmap.column_name, "axis end")]
    for at in _thinned(len(rows), tall, 12.5):
        parts.append(_text(left - 5, top + (at + 0.5) * tall + 4, _cut(rows[at], left - 4), "end"))
    widest = 13.0 if slanted else max(map(_width, columns)) + 3
    for at in _thinned(len(columns), wide, widest):
        x = left + (at + 0.5) * wide
        if slanted:
            turn = f' transform="rotate(-90 {_n(x + 4)} {_n(top - 4)})"'
            parts.append(_text(x + 4, top - 4, _cut(columns[at], room), "", turn))
        else:
            parts.append(_text(x, top - 5, columns[at], "mid"))
    if len(rows) * len(columns) > MOST_CELLS:
        parts.append(
            f'<image x="{_n(left)}" y="{_n(top)}" width="{_n(wide * len(columns))}" height="{_n(tall * len(rows))}" '
            f'preserveAspectRatio="none" class="cells" href="{_picture(heatmap, grid.values)}"/>'
        )
    else:
        parts.extend(_cells(heatmap, grid, number, left, top, wide, tall))
    return _panel(grid.title, top + tall * len(rows) + 2, label, parts)


def _cells(
    heatmap: Heatmap, grid: Grid, number: Number | None, left: float, top: float, wide: float, tall: float
) -> Iterator[str]:
    shades = _shades(heatmap, grid.values)
    base = None if grid.baseline is None else np.broadcast_to(grid.baseline, grid.values.shape)
    gap = min(0.6, wide / 10)
    size = f'width="{_n(wide - gap)}" height="{_n(tall - gap)}"'
    for (row, column), value in np.ndenumerate(grid.values):
        if not np.isfinite(value):
            continue
        shade = float(shades[row, column])
        said = f"{heatmap.row_name} {heatmap.rows[row]}, {heatmap.column_name} {heatmap.columns[column]}: "
        said += heatmap.number(value)
        if grid.low is not None and grid.high is not None:
            low, high = float(grid.low[row, column]), float(grid.high[row, column])
            said += f" ({heatmap.number.bare(low)} to {heatmap.number(high)})"
        if base is not None and np.isfinite(base[row, column]):
            said += f"; baseline {heatmap.number(float(base[row, column]))}"
        x, y = left + column * wide, top + row * tall
        hue = "neg" if shade < 0 else "pos"
        yield (
            f'<rect x="{_n(x)}" y="{_n(y)}" {size} class="{hue}" fill-opacity="{abs(shade):.2f}">'
            f"<title>{escape(said)}</title></rect>"
        )
        if number is not None:
            kind = "cell deep" if abs(shade) > 0.72 else "cell"
            yield _text(x + wide / 2, y + tall / 2 + 3.8, _short(number, value), kind)


def _short(number: Number, value: float) -> str:
    """A number for a cell: without unit, and without a nought before the point."""
    bare = number.bare(value)
    return bare.replace("0.", ".", 1) if bare.lstrip("−").startswith("0.") else bare


def _shades(heatmap: Heatmap, values: Array) -> Array:
    """[rows, columns], -1 to 1: how deep the colour is, and on which side of the middle."""
    if heatmap.middle is None:
        span = (heatmap.most - heatmap.least) or 1.0
        return np.nan_to_num(np.clip((values - heatmap.least) / span, 0, 1))
    span = max(heatmap.most - heatmap.middle, heatmap.middle - heatmap.least) or 1.0
    return np.nan_to_num(np.clip((values - heatmap.middle) / span, -1, 1))


def _picture(heatmap: Heatmap, values: Array) -> str:
    """The cells as a PNG, a pixel for each, as a data address."""
    shades = _shades(heatmap, values)
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = np.where(shades[..., None] < 0, HUES[1], HUES[0])
    pixels[..., 3] = np.round(255 * np.abs(shades))
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">2I5B", values.shape[1], values.shape[0], 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _scale(heatmap: Heatmap) -> str:
    """Which colour means what."""
    ends = (heatmap.least, heatmap.most)
    stops = np.linspace(*ends, 11)
    shades = _shades(heatmap, stops[None])[0]
    cells = "".join(
        f'<rect x="{at * 12}" y="2" width="12" height="11" class="{"neg" if shade < 0 else "pos"}" '
        f'fill-opacity="{abs(shade):.2f}"/>'
        for at, shade in enumerate(shades.tolist())
    )
    low, high = map(heatmap.number, ends)
    return (
        f'<div class="legend"><span>{escape(low)}</span><svg class="scale" viewBox="0 0 132 15" aria-hidden="true">'
        f"{cells}</svg><span>{escape(high)}</span></div>"
    )


def _thinned(count: int, step: float, least: float) -> range:
    """Which labels there is room for."""
    return range(0, count, max(1, math.ceil(least / step)))


# ---------------------------------------- lines


def _plot(lines: Lines, title: str, panel: Sequence[Series]) -> str:
    everything = [series for _, one in lines.panels for series in one]
    x_low, x_high = _span([series.x for series in everything])
    low, high = _span([array for s in everything for array in (s.y, s.low, s.high) if array is not None], lines.log_y)
    if not lines.log_y:
        low = low if lines.least is None else min(low, lines.least)
        high = (high + 0.04 * (high - low)) if lines.most is None else max(high, lines.most)
        high = high if high > low else low + 1
    y_ticks = _log_ticks(low, high) if lines.log_y else _ticks(low, high, 5)
    y_texts = [f"{value:g}" if lines.log_y else _tick(lines.number, value, y_ticks) for value in y_ticks]
    left = max(map(_width, y_texts), default=0) + 8
    top, bottom = TOP, TOP + PLOT_HEIGHT
    x_of = Scale(x_low, x_high, left + 4, WIDTH - RIGHT, lines.log_x)
    y_of = Scale(low, high, bottom, top, lines.log_y)
    parts = [_text(0, 10, lines.y_name, "axis")]
    for value, text in zip(y_ticks, y_texts, strict=True):
        y = y_of(value)
        parts.append(f'<line x1="{_n(left)}" y1="{_n(y)}" x2="{WIDTH - RIGHT}" y2="{_n(y)}" class="rule"/>')
        parts.append(_text(left - 4, y + 4, text, "end"))
    taken = -math.inf
    whole = lines.x_number.digits == 0 and lines.x_number.scale == 1
    round_ones = _log_steps(x_low, x_high) if lines.log_x else _ticks(x_low, x_high, 6, whole=whole)
    for value in lines.ticks or round_ones:
        text = lines.x_number(value)
        x, half = x_of(value), _width(text) / 2
        x = min(x, WIDTH - half)
        if x - half > taken:
            parts.append(_text(x, bottom + 14, text, "mid"))
            taken = x + half + 4
    parts.append(_text(WIDTH - RIGHT, bottom + 28, lines.x_name, "axis end"))
    names = _names(lines)
    for series in panel:
        parts.extend(_line(lines, series, names, x_of, y_of))
    return _panel(title, bottom + 33, f"{lines.y_name} over {lines.x_name}", parts)


def _line(lines: Lines, series: Series, names: dict[str, int], x_of: Scale, y_of: Scale) -> Iterator[str]:
    known = np.isfinite(series.y) & ((series.y > 0) | (not lines.log_y))
    x, y = series.x[known], series.y[known]
    if not len(x):
        return
    low = None if series.low is None else series.low[known]
    high = None if series.high is None else series.high[known]
    if series.role == "published":
        assert low is not None
        assert high is not None
        for at, bottom, top in zip(x.tolist(), low.tolist(), high.tolist(), strict=True):
            said = f"{series.name}, {lines.x_name} {lines.x_number(at)}: "
            said += f"{lines.number.bare(bottom)} to {lines.number(top)}"
            yield (
                f'<rect x="{_n(x_of(at) - 3)}" y="{_n(y_of(top))}" width="6" class="published" '
                f'height="{_n(max(2.0, y_of(bottom) - y_of(top)))}"><title>{escape(said)}</title></rect>'
            )
        return
    kind = "baseline" if series.role == "baseline" else f"s{names[series.name] % N_COLOURS}"
    points = [f"{_n(x_of(a))},{_n(y_of(b))}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    if low is not None and high is not None:
        floor = y_of.low if lines.log_y else -math.inf
        upper = [f"{_n(x_of(a))},{_n(y_of(b))}" for a, b in zip(x.tolist(), high.tolist(), strict=True)]
        lower = [f"{_n(x_of(a))},{_n(y_of(max(b, floor)))}" for a, b in zip(x.tolist(), low.tolist(), strict=True)]
        yield f'<polygon points="{" ".join(upper + lower[::-1])}" class="band {kind}"/>'
    yield f'<polyline points="{" ".join(points)}" class="line {kind}"/>'
    if kind == "baseline" or len(x) > 64:
        return
    for at, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        said = f"{series.name}, {lines.x_name} {lines.x_number(a)}: {lines.number(b)}"
        if low is not None and high is not None:
            said += f" ({lines.number.bare(low[at])} to {lines.number(high[at])})"
        cx, cy = points[at].split(",")
        yield f'<circle cx="{cx}" cy="{cy}" r="2.4" class="dot {kind}"><title>{escape(said)}</title></circle>'


def _names(lines: Lines) -> dict[str, int]:
    """The colour of each name of data."""
    names: dict[str, int] = {}
    for _, panel in lines.panels:
        for series in panel:
            if series.role == "data":
                names.setdefault(series.name, len(names))
    return names


def _legend(lines: Lines) -> str:
    names = _names(lines)
    entries = {name: _stroke(f"s{at % N_COLOURS}") for name, at in names.items()}
    for _, panel in lines.panels:
        for series in panel:
            if series.role == "baseline":
                entries.setdefault(series.name, _stroke("baseline"))
            elif series.role == "published":
                entries.setdefault(series.name, '<rect x="9" y="1" width="6" height="12" class="published"/>')
    return _entries(entries)


def _stroke(kind: str) -> str:
    return f'<line x1="0" y1="7" x2="24" y2="7" class="line {kind}"/>'


def _entries(entries: Mapping[str, str]) -> str:
    """A legend: what is drawn for each name."""
    swatches = "".join(
        f'<li><svg class="swatch" viewBox="0 0 24 14" aria-hidden="true">{shape}</svg>{escape(name)}</li>'
        for name, shape in entries.items()
    )
    return f'<ul class="legend">{swatches}</ul>'


class Scale:
    """Places of values along an axis."""

    def __init__(self, low: float, high: float, begin: float, end: float, log: bool) -> None:
        self.low = low
        self._log = log
        self._low, self._high = (math.log(low), math.log(high)) if log else (low, high)
        self._begin, self._end = begin, end

    def __call__(self, value: float) -> float:
        value = math.log(value) if self._log else value
        share = (value - self._low) / ((self._high - self._low) or 1.0)
        return self._begin + share * (self._end - self._begin)


def _span(arrays: Sequence[Array], positive: bool = False) -> tuple[float, float]:
    values = np.concatenate([np.ravel(array) for array in arrays]) if arrays else np.zeros(1)
    values = values[np.isfinite(values) & ((values > 0) | (not positive))]
    if not len(values):
        return (1.0, 10.0) if positive else (0.0, 1.0)
    return float(values.min()), float(values.max())


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round values between two."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    step = next(step * times for times in (1, 2, 5, 10) if span / (step * times) <= most)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [at * step for at in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, every so many."""
    powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    return [10.0**power for power in powers[:: max(1, math.ceil(len(powers) / 5))]] or [low, high]


def _log_steps(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20... between two; powers of ten alone where that is enough."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [times * 10.0**power for power in powers for times in ((1, 2, 5) if len(powers) < 4 else (1,))]
    return [value for value in found if low <= value <= high]


def _tick(number: Number, value: float, ticks: Sequence[float]) -> str:
    """A tick's text, with no more digits than it needs."""
    if value and not 1e-3 <= abs(value * number.scale) < 1e5:
        return f"{value * number.scale:.0e}"
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=abs(value) or 1.0) * number.scale
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value * number.scale + 0.0:.{digits}f}{number.unit}".replace("-", "−")


# ---------------------------------------- tables


def _table(table: Table) -> str:
    if not table.body:
        return '<p class="note">Nothing.</p>'
    kinds = ["text" if isinstance(cell, str) else "number" for cell in table.body[0]]
    head = "".join(
        f'<th scope="col" class="{kind}">{escape(name)}</th>' for name, kind in zip(table.header, kinds, strict=True)
    )
    rows = []
    for row in table.body[:MOST_ROWS]:
        cells = "".join(f'<td class="{kind}">{escape(str(cell))}</td>' for cell, kind in zip(row, kinds, strict=True))
        rows.append(f"<tr>{cells}</tr>")
    more = len(table.body) - len(rows)
    note = f'<p class="note">{more} more rows are in the CSV file.</p>' if more > 0 else ""
    return (
        '<div class="wide" tabindex="0" role="group" aria-label="Table">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}"
    )
