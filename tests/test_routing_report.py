"""The report of routing: what stands on the page is what was measured, and it is safe, small and whole."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_server import HubServer
from octavo.cli.routing.shared import parse_layers
from octavo.errors import OptionError
from octavo.experts import RoutingTrace
from octavo.routing import published, stats
from octavo.routing.compare import findings
from octavo.routing.experts import ExpertLayer, RouterLayer, analyse_experts, analyse_routers
from octavo.routing.replay import curves
from octavo.routing.report import sources
from octavo.routing.report.build import Report, build_report
from octavo.routing.report.kinds import Figure
from octavo.routing.report.sources import report_on
from octavo.routing.report.tokens import PART, token_view, visible
from octavo.routing.weights import open_weights
from run_octavo import command, refused, run
from tiny_folder import make_tiny_folder

EXPERTS, TOP_K, LAYERS = 8, 2, 3
Weights = tuple[list[RouterLayer], list[ExpertLayer]]
HOSTILE = (
    "</script><img src=x onerror=window.hit=1>", "<!--<script>", "]]>", '" onmouseover="window.hit=1', "&lt;b&gt;",
    "\u202eevil", "\u2066", "\x00\x1b[2J", "\x9b", "שלום", "\u2028", "\ud800", "{{style}}", "$x^2$", "",
)  # fmt: skip


def random_trace(n_tokens: int, n_layers: int, experts: int, top_k: int, seed: int = 0, **fields: Any) -> RoutingTrace:
    random = np.random.default_rng(seed)
    ids = random.random((n_tokens, n_layers, experts)).argsort(axis=2)[:, :, :top_k].astype(np.int16)
    return RoutingTrace(ids, n_experts=experts, **fields)


def planted_trace(n_tokens: int = 900) -> RoutingTrace:
    """Three domains of four documents each; in layer 1, French always has expert 5 first and any other second."""
    random = np.random.default_rng(3)
    ids = random.random((n_tokens, LAYERS, EXPERTS)).argsort(axis=2)[:, :, :TOP_K].astype(np.int16)
    documents = (np.arange(n_tokens) * 12 // n_tokens).astype(np.int32)
    labels = tuple(("english", "french", "sums")[at // 4] for at in range(12))
    of_french = np.isin(documents, [at for at, label in enumerate(labels) if label == "french"])
    others = ids[of_french, 1]
    others[:, 1] = np.where(others[:, 0] == 5, others[:, 1], others[:, 0])
    others[:, 0] = 5
    ids[of_french, 1] = others
    ids[of_french & (np.arange(n_tokens) % 2 == 0), 2] = (1, 6)  # less so, but surely
    words = random.integers(0, 30, n_tokens)
    return RoutingTrace(
        ids,
        words.astype(np.int64),
        logits=random.normal(size=(n_tokens, LAYERS, EXPERTS)).astype(np.float32),
        documents=documents,
        pieces=tuple(f" w{word}" for word in words),
        labels=labels,
        n_experts=EXPERTS,
        model="planted",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("report") / "tiny", n_layers=LAYERS)


@pytest.fixture(scope="module")
def weights(folder: Path) -> Weights:
    opened = open_weights(folder)
    return analyse_routers(opened), list(analyse_experts(opened))


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return planted_trace()


@pytest.fixture(scope="module")
def report(trace: RoutingTrace, weights: Weights) -> Report:
    routers, experts = weights
    found = findings(routers, experts)
    return build_report(trace, routers, experts, curves(trace), found, date="2026-11-21", remarks=("By hand.",))


@pytest.fixture(scope="module")
def written(report: Report) -> str:
    return report.html()


def figure(report: Report, key: str) -> Figure:
    (found,) = (one for one in report.figures if one.key == key)
    return found


def drawn(written: str, key: str) -> str:
    """The part of the page that has a figure."""
    _, _, rest = written.partition(f'<div class="figure" id="figure-{key}">')
    assert rest, key
    return html.unescape(rest.split('<div class="figure"')[0].split("</section>")[0])


class Elements(HTMLParser):
    """All elements of a page, as a browser would see them."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.feed(written)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attrs)))


# ---------------------------------------- what it says


def test_the_cells_are_the_loads(written: str, trace: RoutingTrace) -> None:
    load = stats.load(trace)
    part = drawn(written, "load")
    for layer, expert in np.ndindex(load.value.shape):
        value, low, high = (100 * one[layer, expert] for one in (load.value, load.low, load.high))
        said = f"layer {layer}, expert {expert}: {value:.1f}\xa0% ({low:.1f} to {high:.1f}\xa0%); baseline 12.5\xa0%"
        assert f"<title>{said}</title>" in part
    assert part.count("<title>") == load.value.size


def test_the_points_are_the_repetition_and_mixtrals_stand_beside(written: str, trace: RoutingTrace) -> None:
    part = drawn(written, "repetition")
    for one in stats.repetition(trace):
        for layer, value in enumerate(one.value):
            low, high = one.low[layer], one.high[layer]
            assert f"measured, layer {layer}: {100 * value:.1f}\xa0% ({100 * low:.1f} to {100 * high:.1f}" in part
    for one in published.REPETITION:
        assert f": {100 * one.low:.1f} to {100 * one.high:.1f}\xa0%</title>" in part
    assert "12.5\xa0% for the first choice, 46.4\xa0% for any" in part


def test_a_domain_is_told_by_its_expert(report: Report, trace: RoutingTrace) -> None:
    share, contrast = stats.domain_specialisation(trace), stats.domain_contrast(trace)
    place = (trace.domains.index("french"), 1, 5)
    (said,) = (one for one in figure(report, "domain-contrast").found if one.startswith("french"))
    assert share.value[place] == 1
    assert "expert 5 of layer 1 is chosen by 100.0\xa0%" in said
    low, high = 100 * contrast.low[place], 100 * contrast.high[place]
    assert f"{100 * contrast.value[place]:.1f}\xa0points ({low:.1f} to {high:.1f}) more" in said
    assert contrast.low[place[0], 2, 1] > 0, "another expert is surely chosen more, but not as much"
    sure = int((contrast.beside[place[0]] != 0).sum())
    assert f"{sure} of its {LAYERS * EXPERTS} shares differ" in said


def test_a_domain_without_an_expert_of_its_own_is_told_so() -> None:
    trace = random_trace(400, 2, 8, 2, documents=(np.arange(400) // 50).astype(np.int32), labels=("a", "b") * 4)
    for said in figure(build_report(trace), "domain-contrast").found:
        assert "no expert is chosen more" in said


def test_weights_stand_as_they_were_measured(written: str, weights: Weights) -> None:
    routers, experts = weights
    part = drawn(written, "router-cosine")
    assert f"expert 2, other expert 6: {routers[1].cosine[2, 6]:.3f}</title>".replace("-", "−") in part
    assert "expert 2, other expert 2:" not in part
    part = drawn(written, "experts-matched")
    one = experts[2]
    said = f"expert 0, other expert 3: {one.matched['w2'][0, 3]:.3f}; baseline {one.matched_null['w2']:.3f}"
    assert f"{said}</title>".replace("-", "−") in part
    assert f"expert 4: {experts[0].effective_rank['w3'][4]:.0f}</title>" in drawn(written, "effective-rank")
    part = drawn(written, "alignment")
    assert f"own expert, directions k 4: {experts[1].alignment[:, 2].mean():.2f} (" in part
    assert "0.065 at k = 1, 0.285 at k = 64, 0.462 at k = 512" in part


def test_the_curves_are_the_replay(written: str, trace: RoutingTrace) -> None:
    part = drawn(written, "cache")
    for curve in curves(trace):
        for held, rate in zip(curve.n_held, curve.hit_rate, strict=True):
            share = 100 * held / (LAYERS * EXPERTS)
            assert f"{curve.label}, share of experts held {share:.0f}\xa0%: {100 * rate:.0f}\xa0%</title>" in part


def test_every_figure_says_how_to_read_it_and_what_it_does_not_show(report: Report, written: str) -> None:
    keys = [one.key for one in report.figures]
    assert len(set(keys)) == len(keys) == 22
    for one in report.figures:
        part = drawn(written, one.key)
        for sentence in (one.how, one.limits, one.denominator, one.baseline):
            assert sentence in part
        for sentence in (one.how, one.limits):
            assert sentence[0].isupper()
            assert sentence.endswith(".")
            assert sentence.count(". ") == 0, "one sentence"


def test_the_same_is_written_twice_the_same(trace: RoutingTrace) -> None:
    assert build_report(trace, seed=4).html() == build_report(trace, seed=4).html()


def test_the_head_has_model_tokens_documents_and_date(written: str) -> None:
    head = written[written.index("<header>") : written.index("</header>")]
    values = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", head)
    assert dict(values) == {
        "Model": "planted",
        "Experts": "2 of 8 for a token, in each of 3 layers",
        "Tokens": "900",
        "Documents": "12",
        "Domains": "3",
        "Layers whose experts were compared": "0, 1, 2",
        "Date": "2026-11-21",
    }


# ---------------------------------------- what is missing


def test_what_is_missing_is_left_out_and_said(trace: RoutingTrace, weights: Weights) -> None:
    routers, _ = weights
    of_routers = build_report(routers=routers).html()
    assert 'id="router-' not in of_routers
    assert 'id="figure-router-cosine"' in of_routers
    assert "token-data" not in of_routers
    for key in ("load", "alignment", "cache"):
        assert f'<section id="{key}">' not in of_routers
        assert f'href="#{key}"' not in of_routers
    assert "everything that is measured on it" in of_routers
    bare = build_report(RoutingTrace(trace.topk_ids, n_experts=EXPERTS))
    keys = {one.key for one in bare.figures}
    assert keys == {"load", "load-variation", "repetition", "coactivation", "transition"}
    said = " ".join(what for what, _ in bare.left_out)
    for word in ("no logits", "no labels", "no token ids", "routers", "cache"):
        assert word in said
    assert "--logits" in bare.html()


def test_nothing_is_nothing() -> None:
    with pytest.raises(OptionError, match="nothing to report"):
        build_report()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3))
def test_any_shape_makes_a_page(n_tokens: int, n_layers: int, experts: int, top_k: int, n_domains: int) -> None:
    documents = (np.arange(n_tokens) * min(n_domains, n_tokens) // n_tokens).astype(np.int32)
    labels = tuple(f"d{at}" for at in range(int(documents[-1]) + 1))
    trace = random_trace(n_tokens, n_layers, experts, min(top_k, experts), documents=documents, labels=labels)
    text = build_report(trace).html()
    assert "nan" not in text.replace("nano", "").lower().split("<script")[0]


# ---------------------------------------- the text


def unpacked(data: dict[str, Any]) -> Any:
    """What the page's script reads, [layers, tokens, ranks]."""
    raw = np.frombuffer(base64.b64decode(data["ids"]), np.uint8)
    if data["each"] == 0:
        ids = np.stack([raw >> 4, raw & 15], axis=-1)
    else:
        ids = raw.view(np.uint8 if data["each"] == 1 else "<u2")
    return ids.reshape(data["layers"], len(data["pieces"]), data["ranks"])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.sampled_from([1, 2, 8, 16, 17, 256, 257]), st.integers(1, 3))
def test_packing_keeps_the_first_two_choices(n_tokens: int, n_layers: int, experts: int, top_k: int) -> None:
    trace = random_trace(n_tokens, n_layers, experts, min(top_k, experts))
    data = json.loads(token_view(trace).data)
    ids = trace.topk_ids[:, :, :2].transpose(1, 0, 2)
    assert data["ranks"] == ids.shape[2]
    np.testing.assert_array_equal(unpacked(data), ids)


def test_parts_go_domain_by_domain() -> None:
    n_tokens = PART + 700
    documents = (np.arange(n_tokens) // 100).astype(np.int32)
    labels = tuple("ab"[at % 2] for at in range(int(documents[-1]) + 1))
    trace = random_trace(n_tokens, 1, 8, 2, documents=documents, labels=labels, token_ids=np.arange(n_tokens))
    data = json.loads(token_view(trace).data)
    shown = [int(piece.strip("⟨⟩ ")) for piece in data["pieces"]]
    assert sorted(shown) == list(range(n_tokens))
    for name, begin, end in data["parts"]:
        assert end - begin <= PART
        assert {labels[documents[token]] for token in shown[begin:end]} == {name[0]}
    np.testing.assert_array_equal(unpacked(data)[0], trace.topk_ids[shown, 0])
    fresh = [at for at in range(1, n_tokens) if documents[shown[at]] != documents[shown[at - 1]]]
    assert data["begins"] == fresh


def test_a_long_trace_shows_every_domain() -> None:
    n_tokens = 30_000
    documents = np.zeros(n_tokens, np.int32)
    documents[25_000:] = 1
    view = token_view(random_trace(n_tokens, 1, 8, 2, documents=documents, labels=("long", "short")))
    data = json.loads(view.data)
    assert (view.n_tokens, view.of) == (15_000, n_tokens)
    assert [end for _, _, end in data["parts"]][-1] == len(data["pieces"]) == 15_000
    assert sum(end - begin for name, begin, end in data["parts"] if name.startswith("short")) == 5_000


def test_twenty_thousand_tokens_of_mixtral_are_small() -> None:
    n_tokens, words = 20_000, np.random.default_rng(0).integers(0, 3000, 20_000)
    trace = random_trace(
        n_tokens, 32, 8, 2,
        pieces=tuple(f" word{word}" for word in words),
        documents=(np.arange(n_tokens) // 500).astype(np.int32), labels=tuple(f"domain {at // 5}" for at in range(40)),
    )  # fmt: skip
    size = len(build_report(trace).html().encode())
    assert size <= 5_000_000
    assert json.loads(token_view(trace).data)["layers"] == 32
    one = random_trace(n_tokens, 1, 200, 2).topk_ids
    wide = token_view(RoutingTrace(np.repeat(one, 94, axis=1), n_experts=200))
    assert len(wide.data) <= 4_000_000


# ---------------------------------------- whole and safe


def hostile_trace() -> RoutingTrace:
    """Every text that is somebody's else's tries something; each piece comes often enough to be counted."""
    n_tokens = len(HOSTILE) * 20
    trace = random_trace(n_tokens, 2, 8, 2)
    words = np.arange(n_tokens) % len(HOSTILE)
    documents = (np.arange(n_tokens) * len(HOSTILE) // n_tokens).astype(np.int32)
    return RoutingTrace(
        trace.topk_ids,
        words.astype(np.int64),
        documents=documents,
        pieces=tuple(HOSTILE[word] for word in words),
        labels=HOSTILE,
        n_experts=8,
        model=HOSTILE[0],
        revision=HOSTILE[3],
    )


def test_hostile_text_is_text(tmp_path: Path) -> None:
    trace = hostile_trace()
    report = build_report(trace, date=HOSTILE[0], remarks=HOSTILE)
    report.write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    elements = Elements(page).all
    assert [tag for tag, _ in elements].count("script") == 2
    allowed = "html head meta title style body header p h1 dl div dt dd nav ul li a main section h2 h3 label select "
    allowed += "input output noscript svg text line rect polygon polyline circle details summary code span "
    allowed += "table thead tbody tr th td footer script"
    assert {tag for tag, _ in elements} <= set(allowed.split())
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on") or name == "style"]
    source = next(text for text in re.findall(r'id="token-data">(.*?)</script>', page, re.S))
    data = json.loads(source)
    assert "<" not in source
    assert data["pieces"] == [visible(trace.pieces[token]) for token in np.argsort(trace.domain_ids, kind="stable")]  # type: ignore[index]
    shown = page.replace("\n", "").replace("\t", "")
    assert not re.search(
        "[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]", shown
    )
    assert "שלום" in page
    table = figure(report, "vocabulary-tokens")
    assert len(list(table.rows())) > len(HOSTILE)
    dataclasses.replace(report, figures=(table,)).write_figures(tmp_path)  # matplotlib takes none of it for a formula


def test_it_asks_for_nothing(written: str, report: Report) -> None:
    assert "http:" not in written
    assert "https:" not in written
    assert "@import" not in written
    assert "url(" not in written
    for _, attributes in Elements(written).all:
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), value


def test_the_policy_allows_what_is_there_and_nothing_else(written: str) -> None:
    (policy,) = (
        one["content"] for _, one in Elements(written).all if one.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("img-src") == "data:"
    (style,) = re.findall(r"<style>(.*?)</style>", written, re.S)
    (script,) = re.findall(r"<script>(.*?)</script>", written, re.S)
    for name, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(name) == f"'sha256-{digest}'"
    assert set(rules.values()) == {"'none'"}
    assert "default-src" in rules


def test_links_lead_somewhere_and_names_are_one_each(written: str) -> None:
    elements = Elements(written).all
    names = [one["id"] for _, one in elements if "id" in one]
    assert len(set(names)) == len(names)
    links = [one["href"] or "" for tag, one in elements if tag == "a"]
    assert len(links) >= 8
    assert {link.removeprefix("#") for link in links} <= set(names)


# ---------------------------------------- files


def test_every_figure_has_a_picture_and_a_table(trace: RoutingTrace, weights: Weights, tmp_path: Path) -> None:
    routers, experts = weights
    report = build_report(trace, routers[:1], experts[:1], curves(trace), findings(routers))
    written = report.write_figures(tmp_path / "new" / "figures")
    assert len(written) == 2 * len(report.figures)
    assert {path.name for path in (tmp_path / "new" / "figures").iterdir()} == {path.name for path in written}
    for one in report.figures:
        picture, table = (tmp_path / "new" / "figures" / f"{one.key}.{kind}" for kind in ("png", "csv"))
        data = picture.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 5_000
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert rows == [[str(cell) for cell in row] for row in one.rows()]
        assert len(rows) > (one.key != "findings")
        assert {len(row) for row in rows} == {len(rows[0])}


def test_the_tables_are_exact(report: Report, trace: RoutingTrace, tmp_path: Path) -> None:
    load, together = stats.load(trace), stats.coactivation(trace)
    rows = list(figure(report, "load").rows())
    assert rows[0] == ("panel", "layer", "expert", "value", "low", "high", "baseline")
    told = np.array([row[3:] for row in rows[1:]], np.float64).reshape(LAYERS, EXPERTS, 4)
    assert load.baseline is not None
    for at, array in enumerate((load.value, load.low, load.high, load.baseline)):
        np.testing.assert_array_equal(told[..., at], array)
    values = [row[3] for row in figure(report, "coactivation").rows()][1:]
    diagonal = np.isnan(together.value).ravel()
    assert [value == "" for value in values] == diagonal.tolist()
    np.testing.assert_array_equal(np.array(values)[~diagonal].astype(np.float64), together.value.ravel()[~diagonal])


def test_a_page_is_replaced_whole_or_not_at_all(report: Report, written: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    report.write(path)
    assert path.read_text(encoding="utf-8") == written
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]
    for bad in (tmp_path, tmp_path / "no" / "page.html"):
        with pytest.raises(OptionError, match="cannot be written"):
            report.write(bad)
    with pytest.raises(OptionError, match="cannot be written"):
        report.write_figures(path)


def test_without_matplotlib_it_says_how_to_get_it(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match="not installed") as caught:
        report.write_figures(tmp_path)
    assert "octavo[routing]" in str(caught.value.hint)


# ---------------------------------------- from a model, by the command


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 6)
    return path


def test_a_model_here(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = run("routing", "report", folder, "-o", out, "--text", text, "--label", "foxes")
    assert (done.code, done.out) == (0, f"{out}\n"), done.err
    page = out.read_text(encoding="utf-8")
    for key in ("load", "entropy", "alignment", "experts-matched", "cache", "router-norms"):
        assert f'id="figure-{key}"' in page
    assert f"<h1>{folder.name}</h1>" in page
    assert str(folder) not in page
    assert "The model read 1 documents: fox.txt." in page


def test_figures_of_the_command(folder: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "page.html", tmp_path / "figures"
    done = run("routing", "report", folder, "-o", out, "--only", "routers", "--figures", figures)
    assert (done.code, done.out) == (0, f"{out}\n"), done.err
    assert done.err == f"{figures}: 6 files\n"
    keys = ("findings", "router-cosine", "router-norms")
    assert {one.name for one in figures.iterdir()} == {f"{key}.{kind}" for key in keys for kind in ("png", "csv")}


def test_only(folder: Path, text: Path, tmp_path: Path) -> None:
    pages = {only: report_on(str(folder), only=only, texts=[str(text)]) for only in sources.ONLY}
    keys = {only: {one.key for one in made.figures} for only, made in pages.items()}
    assert keys["routers"] == {"findings", "router-cosine", "router-norms"}
    assert keys["weights"] > keys["routers"]
    assert "load" not in keys["weights"]
    assert "load" in keys["trace"]
    assert not keys["trace"] & keys["weights"]
    assert [one.tokens is None for one in pages.values()] == [True, True, False]


def test_layers(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def layers_of(made: Report) -> str:
        return dict(made.facts)["Layers whose experts were compared"]

    assert layers_of(report_on(str(folder), only="weights", layers=[2, 0])) == "0, 2"
    deep = make_tiny_folder(tmp_path / "deep", n_layers=7)
    assert layers_of(report_on(str(deep), only="weights")) == "0, 1, 2, 3, 4, 5, 6"
    monkeypatch.setattr(sources, "LARGE", 1000)
    made = report_on(str(deep), only="weights")
    assert layers_of(made) == "0, 2, 4, 6"
    assert "Experts of layers 0, 2, 4, 6 were compared, of 7" in made.html()
    refused(
        run("routing", "report", folder, "-o", tmp_path / "x.html", "--only", "weights", "--layers", "9"), "layer 9"
    )
    refused(run("routing", "report", folder, "-o", tmp_path / "x.html", "--layers", "1;2"), "1;2", hint="0-3")
    assert not (tmp_path / "x.html").exists()


def test_a_trace_with_and_without_its_model(folder: Path, trace: RoutingTrace, tmp_path: Path) -> None:
    file, out = tmp_path / "trace.safetensors", tmp_path / "page.html"
    trace.save(file)
    assert run("routing", "report", file, "-o", out).code == 0
    assert 'id="figure-load"' in out.read_text()
    assert 'id="figure-alignment"' not in out.read_text()
    assert run("routing", "report", file, "-o", out, "--model", folder, "--only", "routers").code == 0
    assert 'id="figure-router-norms"' in out.read_text()
    other = make_tiny_folder(tmp_path / "other" / "tiny", n_layers=2)
    refused(run("routing", "report", file, "-o", out, "--model", other), "3 layers", "2 that choose")


@pytest.fixture
def damaged(tmp_path: Path, trace: RoutingTrace) -> Path:
    path = tmp_path / "cut.safetensors"
    trace.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def test_bad_input_is_refused(folder: Path, trace: RoutingTrace, damaged: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "page.html", tmp_path / "trace.safetensors"
    trace.save(file)
    dense = make_tiny_folder(tmp_path / "dense" / "tiny", moe=None)
    refused(run("routing", "report", dense, "-o", out), "dense")
    refused(run("routing", "report", dense, "-o", out, "--only", "trace"), "dense")
    refused(run("routing", "report", damaged, "-o", out), "cut.safetensors")
    refused(run("routing", "report", tmp_path / "no.safetensors", "-o", out), "no.safetensors")
    refused(run("routing", "report", folder, "-o", tmp_path / "no" / "page.html"), "page.html", "no folder")
    refused(run("routing", "report", folder, "-o", out, "--text", tmp_path / "no.txt"), "no.txt")
    refused(run("routing", "report", file, "-o", out, "--memory", "1GiB"), "--memory", hint="leave")
    refused(run("routing", "report", file, "-o", out, "--only", "routers"), "--only routers", hint="--model")
    refused(run("routing", "report", folder, "-o", out, "--model", folder), "--model", hint="leave")
    refused(run("routing", "report", folder, "-o", out, "--label", "x"), "--label belongs to a --text")
    assert not out.exists()


@pytest.mark.parametrize("wrong", ["", "1,", "a", "-1", "1 2", "²"])
def test_layers_that_are_none(wrong: str) -> None:
    with pytest.raises(OptionError, match="--layers"):
        parse_layers(wrong)


def test_of_a_model_on_the_hub_only_routers_are_fetched(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with HubServer({"org/tiny": folder}) as hub:
        done = subprocess.run(
            command("routing", "report", "org/tiny", "-o", out),
            env=hub.environment(tmp_path / "home"), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        sent = hub.sent("*.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    (said,) = (line for line in done.stderr.splitlines() if "bytes were fetched, of the routers alone" in line)
    assert int(re.findall(r"([\d,]+) bytes", said)[0].replace(",", "")) >= sent
    assert sent < 3 << 20
    page = out.read_text(encoding="utf-8")
    assert 'id="figure-router-cosine"' in page
    assert 'id="figure-experts-cosine"' not in page
    assert said.split("org/tiny is")[1] in html.unescape(page)
    assert "--only weights" in page
