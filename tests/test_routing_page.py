"""The report of routing in a real browser, opened as a file: it loads nothing, can be read, and answers keys."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.experts import RoutingTrace
from octavo.routing.compare import findings
from octavo.routing.experts import analyse_experts, analyse_routers
from octavo.routing.replay import curves
from octavo.routing.report.build import build_report
from octavo.routing.weights import open_weights
from tiny_folder import make_tiny_folder
from ui_browser import CHROMIUM, browser

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="chromium is not installed" if CHROMIUM is None else "playwright is not installed",
)

LAYERS, EXPERTS, TOKENS = 4, 8, 600
ATTACK = "</script><img src=x onerror=window.hit=1><script>window.hit=1</script>"
SMALLEST = 10  # pixels of a letter
TEXTS = """() => [...document.querySelectorAll("svg text")].filter(one => one.checkVisibility()).map(one => {
  const svg = one.ownerSVGElement, size = parseFloat(getComputedStyle(one).fontSize);
  return size * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
})"""
LETTERS = """() => [...document.querySelectorAll("body *")].filter(one => !one.closest("svg, script, style")
  && [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()))
  .map(one => parseFloat(getComputedStyle(one).fontSize))"""
OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll(".tile svg")) {
    if (!svg.checkVisibility()) continue;
    const boxes = [...svg.querySelectorAll("text")].map(one => [one.textContent, one.getBoundingClientRect(),
      one.getAttribute("class")]);
    for (const [i, [name, a]] of boxes.entries()) for (const [other, b] of boxes.slice(i + 1)) {
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const tall = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1.5 && tall > 4.5) found.push(svg.getAttribute("aria-label") + ": " + name + " / " + other);
    }
  }
  return found;
}"""
OUTSIDE = """() => [...document.querySelectorAll(".tile svg text")].filter(one => {
  const box = one.getBoundingClientRect();
  return one.checkVisibility() && (box.left < 0 || box.right > innerWidth);
}).map(one => one.textContent)"""


def make_trace() -> RoutingTrace:
    """Routing at random, three domains; one of the tokens tries something."""
    random = np.random.default_rng(0)
    ids = random.random((TOKENS, LAYERS, EXPERTS)).argsort(axis=2)[:, :, :2].astype(np.int16)
    words = random.integers(0, 25, TOKENS)
    pieces = [f" word{word}" for word in words]
    pieces[5], pieces[6], pieces[7] = ATTACK, "\n", " שלום"
    return RoutingTrace(
        ids,
        words,
        logits=random.normal(size=(TOKENS, LAYERS, EXPERTS)).astype(np.float32),
        documents=(np.arange(TOKENS) // 50).astype(np.int32),
        pieces=tuple(pieces),
        labels=tuple(("english", "a domain with quite a long name", ATTACK)[at // 4] for at in range(12)),
        n_experts=EXPERTS,
        model="tiny",
    )


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return make_trace()


@pytest.fixture(scope="module")
def file(trace: RoutingTrace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    weights = open_weights(make_tiny_folder(folder / "tiny", n_layers=LAYERS))
    routers, experts = analyse_routers(weights), list(analyse_experts(weights, [0, 3]))
    report = build_report(
        trace, routers, experts, curves(trace), findings(routers, experts), date="2026-11-21", remarks=("By hand.",)
    )
    report.write(folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as one:
        yield one


@contextmanager
def opened(chromium: Any, file: Path, width: int = 1400, **options: Any) -> Iterator[Any]:
    """The page as a file. It must ask for nothing else, and run without an error."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
    asked, errors = [], []
    tab = context.new_page()
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text))
    tab.goto(file.as_uri())
    try:
        yield tab
        assert {url for url in asked if not url.startswith("data:")} == {file.as_uri()}
        assert errors == []
    finally:
        context.close()


@pytest.fixture(scope="module")
def shared(chromium: Any, file: Path) -> Iterator[Any]:
    with opened(chromium, file) as one:
        yield one


@pytest.fixture
def tab(shared: Any) -> Any:
    """The wide page, as it is when it is opened."""
    shared.reload()
    return shared


def colours(tab: Any) -> list[int]:
    """Of each token shown, the expert whose colour it has."""
    found = tab.evaluate("[...document.querySelectorAll('#text span')].map(one => one.className)")
    return [int(name.split()[1].removeprefix("s")) if " s" in name else -1 for name in found]


def test_tokens_have_the_colour_of_their_first_choice_in_every_layer(tab: Any, trace: RoutingTrace) -> None:
    for layer in (0, 3, 1):
        tab.locator("#layer").fill(str(layer))
        assert colours(tab) == trace.topk_ids[:200, layer, 0].tolist()
        assert tab.inner_text("#layer-number") == str(layer)
    shares = tab.locator("#chips small").all_inner_texts()
    counts = np.bincount(trace.topk_ids[:200, 1, 0], minlength=EXPERTS)
    assert shares == [f"{count / 2:.0f} %" if count % 2 == 0 else f"{(count + 1) // 2} %" for count in counts]


def test_the_slider_answers_keys(tab: Any, trace: RoutingTrace) -> None:
    tab.focus("#layer")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert colours(tab) == trace.topk_ids[:200, 2, 0].tolist()
    assert tab.get_attribute("#layer", "aria-valuetext") == "layer 2"
    tab.keyboard.press("End")
    assert colours(tab) == trace.topk_ids[:200, LAYERS - 1, 0].tolist()


def test_keys_walk_along_the_text_and_through_the_layers(tab: Any, trace: RoutingTrace) -> None:
    def said(token: int, layer: int) -> str:
        first, second = trace.topk_ids[token, layer]
        return f"in layer {layer} its first choice is expert {first}, its second expert {second}."

    tab.focus("#text")
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#said").endswith(said(2, 0))
    tab.keyboard.press("ArrowUp")
    assert tab.inner_text("#said").endswith(said(2, 1))
    assert colours(tab) == trace.topk_ids[:200, 1, 0].tolist()
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowDown")
    assert tab.inner_text("#said").endswith(said(1, 0))
    tab.keyboard.press("End")
    assert tab.inner_text("#said").endswith(said(199, 0))
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#text .now").count() == 1
    tab.keyboard.press("Home")
    assert tab.inner_text("#said").endswith(said(0, 0))


def test_a_token_that_is_pointed_at_says_its_experts(tab: Any, trace: RoutingTrace) -> None:
    tab.hover("#text span:nth-of-type(12)")
    first, second = trace.topk_ids[11, 0]
    assert tab.inner_text("#said").endswith(f"first choice is expert {first}, its second expert {second}.")


def test_one_expert_can_be_looked_at_alone(tab: Any, trace: RoutingTrace) -> None:
    chip = tab.locator("#chips button").nth(3)
    chip.press("Enter")
    assert chip.get_attribute("aria-pressed") == "true"
    kinds = tab.evaluate("[...document.querySelectorAll('#text span')].map(one => one.className)")
    for kind, (first, second) in zip(kinds, trace.topk_ids[:200, 0].tolist(), strict=True):
        assert kind == ("t s3" if first == 3 else "t second s3" if second == 3 else "t dim")
    chip.click()
    assert colours(tab) == trace.topk_ids[:200, 0, 0].tolist()


def test_other_texts_and_numbers(tab: Any, trace: RoutingTrace) -> None:
    names = tab.locator("#part option").all_inner_texts()
    assert names == ["english (200 tokens)", "a domain with quite a long name (200 tokens)", f"{ATTACK} (200 tokens)"]
    tab.select_option("#part", index=2)
    assert colours(tab) == trace.topk_ids[400:, 0, 0].tolist()
    assert tab.locator("#text hr").count() == 3  # four documents
    tab.check("#numbers")
    shown = tab.evaluate(
        "[...document.querySelectorAll('#text span')].map(one => getComputedStyle(one, '::after').content)"
    )
    assert shown == [f'"{expert}"' for expert in trace.topk_ids[400:, 0, 0]]


def test_hostile_text_stays_text(tab: Any) -> None:
    assert tab.evaluate("window.hit") is None
    assert tab.locator("#text span").nth(5).inner_text() == ATTACK
    assert tab.locator("img").count() == 0
    assert ATTACK in tab.inner_text("#figure-domain-contrast")


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (400, "dark")])
def test_it_can_be_read(chromium: Any, file: Path, width: int, scheme: str) -> None:
    with opened(chromium, file, width, color_scheme=scheme) as tab:
        for fold in tab.locator("details").all():
            fold.evaluate("one => one.open = true")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        sizes = tab.evaluate(TEXTS)
        assert len(sizes) > 1000
        assert min(sizes) >= SMALLEST
        assert min(tab.evaluate(LETTERS)) >= SMALLEST
        assert tab.evaluate(OVERLAPS) == []
        assert tab.evaluate(OUTSIDE) == []
        assert tab.evaluate("[...document.querySelectorAll('.tile svg')].every(one => one.getBBox().height > 40)")
        paper, ink = tab.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        dark = [sum(map(int, colour[4:-1].split(","))) < 300 for colour in (paper, ink)]
        assert dark == [scheme == "dark", scheme == "light"]


def test_on_paper_all_of_the_text_is_there(chromium: Any, file: Path) -> None:
    hidden = "(one => one.scrollHeight - one.clientHeight)(document.getElementById('text'))"
    with opened(chromium, file, 400) as tab:
        assert tab.evaluate(hidden) > 100
        tab.emulate_media(media="print")
        assert tab.evaluate(hidden) <= 1
        assert not tab.is_visible("nav")


def test_without_scripts_the_figures_are_there(chromium: Any, file: Path) -> None:
    with opened(chromium, file, java_script_enabled=False) as tab:
        assert tab.is_visible("#figure-load svg")
        assert "scripts are off" in tab.inner_text("#text")
