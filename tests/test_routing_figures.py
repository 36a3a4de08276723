"""Kinds of figures, drawn: numbers, colours and places are those of the data."""

from __future__ import annotations

import base64
import re
from io import BytesIO

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from octavo.routing.report import svg
from octavo.routing.report.kinds import PERCENT, PLAIN, Figure, Grid, Heatmap, Lines, Number, Series, Table, few


def test_a_large_panel_is_a_picture_and_large_figures_lose_panels() -> None:
    values = np.random.default_rng(0).random((90, 90))
    names = tuple(map(str, range(90)))
    heatmap = Heatmap(tuple(Grid(f"layer {at}", values) for at in range(40)), names, names, "a", "b", PLAIN, 0.0, 1.0)
    text = svg.draw(Figure("k", "load", "t", "h", "l", "d", "b", heatmap))
    assert text.count("<image") == len(few(40, svg.MOST_DRAWN // svg.MOST_CELLS)) == 5
    assert "5 of 40 panels are drawn" in text
    (data,) = set(re.findall(r'href="data:image/png;base64,([^"]+)"', text))
    assert base64.b64decode(data).startswith(b"\x89PNG")
    pixels = imread(BytesIO(base64.b64decode(data)))
    np.testing.assert_allclose(pixels[..., 3], values, atol=1 / 255)


def test_two_sided_colours() -> None:
    values = np.array([[-0.5, 0.0, 0.25, np.nan]])
    heatmap = Heatmap((Grid("", values),), ("0",), tuple("abcd"), "row", "column", PLAIN, -0.5, 0.5, middle=0.0)
    text = svg.draw(Figure("k", "load", "t", "h", "l", "d", "b", heatmap))
    cells = re.findall(r'class="(pos|neg)" fill-opacity="([\d.]+)"><title>', text)
    assert cells == [("neg", "1.00"), ("pos", "0.00"), ("pos", "0.50")]
    assert ">−.50<" in text


@given(st.integers(1, 400), st.integers(1, 40))
def test_few(count: int, most: int) -> None:
    chosen = few(count, most)
    assert len(chosen) == len(set(chosen)) == min(count, most)
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    assert most == 1 or chosen[-1] == count - 1


@given(st.floats(-1e6, 1e6), st.integers(0, 3))
def test_numbers_are_rounded_as_python_rounds(value: float, digits: int) -> None:
    written = Number(digits, 100, "%")(value)
    assert float(written.removesuffix("%").replace("−", "-")) == round(value * 100, digits)
    assert not re.fullmatch(r"−0\.?0*%", written)


def test_many_rows_are_cut_and_said() -> None:
    table = Table(("a", "b"), tuple((at, f"<{at}>") for at in range(500)))
    text = svg.draw(Figure("k", "load", "t", "h", "l", "d", "b", table))
    assert "100 more rows are in the CSV file" in text
    assert "&lt;399&gt;" in text
    assert "&lt;400&gt;" not in text


def test_points_lie_where_their_values_are() -> None:
    x, y = np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.25, 0.5])
    series = Series("a", x, y)
    lines = Lines((("", (series,)),), "x", "y", PERCENT, most=0.5)
    text = svg.draw(Figure("k", "load", "t", "h", "l", "d", "b", lines))
    points = [tuple(map(float, pair)) for pair in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', text)]
    assert len(points) == 3
    np.testing.assert_allclose(np.diff([a for a, _ in points]), (points[2][0] - points[0][0]) / 2, atol=0.1)
    np.testing.assert_allclose(np.diff([b for _, b in points]), -svg.PLOT_HEIGHT / 2, atol=0.1)
