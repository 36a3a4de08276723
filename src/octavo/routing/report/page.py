"""The page: figures and words put into one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from octavo.routing.report.kinds import Figure, Heatmap, Lines
from octavo.routing.report.svg import draw
from octavo.routing.report.tokens import TokenView, legible

FOLDER = Path(__file__).parent

ABOUT = (
    "A mixture of experts is a language model whose layers each have several networks, the experts, and a router. For "
    "every token, which is a word or a piece of one, the router scores the experts, and only the few with the highest "
    "scores compute. So each token uses a small part of the model, and different tokens use different parts. This page "
    "shows what was measured of that. Each figure says how to read it, what it does not show, what its numbers are "
    "shares of, and what chance alone would give."
)

SECTIONS: Mapping[str, tuple[str, str]] = {
    "tokens": (
        "The text, token by token",
        "Each token has the colour of the expert that the router scored highest for it. Move the slider to go from "
        "layer to layer, and press an expert's number to see its tokens alone. With more than eight experts colours "
        "repeat, and numbers tell them apart. A number means nothing beyond its layer: expert 3 of one layer and "
        "expert 3 of the next have nothing to do with each other.",
    ),
    "load": (
        "How busy the experts are",
        "If the router sent tokens anywhere at random, every expert would get the same share. A real one does not, and "
        "how far it departs from that is the first thing to know: an expert that nobody chooses is memory without "
        "use, and one that everybody chooses is no choice at all.",
    ),
    "domains": (
        "Whether experts have subjects",
        "People expect one expert for French and another for arithmetic. That can be measured: the text comes in "
        "domains, and each domain's tokens either go to the same experts as all others do, or elsewhere.",
    ),
    "order": (
        "From token to token, and from layer to layer",
        "Tokens in a row often go to the same expert, experts are chosen together, and a choice in one layer goes with "
        "a choice in the next. This is what a cache or a prefetcher can make use of.",
    ),
    "weights": (
        "How alike the experts are",
        "These figures need no text: they compare the experts' weights. Each expert is three matrices: w1 and w3 take "
        "a token's vector to the expert's neurons, and w2 takes it back. Experts that were copied from one another, "
        "as in some merged models, show up here.",
    ),
    "alignment": (
        "Whether routers know their experts",
        "The router has one row of weights for each expert, and a token goes where its vector agrees with the row "
        "best. If a row points to where its own expert's weights are strong, the router selects tokens that the "
        "expert is prepared for.",
    ),
    "cache": (
        "What a cache would hold",
        "A model whose experts do not fit into memory reads some of them from disk for each token. How often a token "
        "finds its experts in memory depends on how many are held, and on which ones are kept.",
    ),
}

DEFINITIONS = (
    (
        "Router, expert, top-k",
        "In each layer the router scores all E experts for a token; the K with the highest scores compute, and their "
        "outputs are added with weights made of the scores.",
    ),
    ("First choice", "The expert with the highest score. A token has K choices in each layer, best first."),
    (
        "Load",
        "An expert's share of all assignments, of which a token makes K: even routing gives 1/E, and the shares of a "
        "layer sum to 1. Some papers give the share of tokens that choose the expert, which is K times as much; here "
        "only a domain's shares are counted so, because that is how they were defined.",
    ),
    (
        "Baseline",
        "What the number would be if routing were even and each token's choices independent of all others. It is not "
        "what an untrained model does: that may be far from even.",
    ),
    (
        "Interval",
        "From a bootstrap over blocks of consecutive tokens. The intervals of one figure hold together: with the "
        "stated probability every one of them covers its true value. They tell of other text of the same kind, and "
        "not of other kinds of text.",
    ),
    (
        "Cosine",
        "Of two rows of numbers: 1 where they point the same way, 0 where they have nothing in common, −1 where they "
        "point opposite ways.",
    ),
)


def render(
    title: str,
    facts: Sequence[tuple[str, str]],
    figures: Sequence[Figure],
    *,
    tokens: TokenView | None = None,
    found: Sequence[str] = (),
    remarks: Sequence[str] = (),
    left_out: Sequence[tuple[str, str]] = (),
) -> str:
    """Put the page together.

    Args:
        title: its heading.
        facts: names and values for below it.
        figures: each stands in its section, in this order.
        tokens: the text, if there is one to show.
        found: sentences for the summary.
        remarks: what was measured how, and other things to know.
        left_out: what is missing, and how to get it.
    """
    sections = [("about", "What this page shows", _about(found, remarks, left_out))]
    for key, (heading, intro) in SECTIONS.items():
        body = "".join(_figure(figure) for figure in figures if figure.section == key)
        if key == "tokens" and tokens is not None:
            body = _text(tokens) + body
        if body:
            sections.append((key, heading, f'<p class="intro">{escape(intro)}</p>{body}'))
    definitions = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(meaning)}</dd></div>" for name, meaning in DEFINITIONS
    )
    sections.append(("definitions", "What the words mean", f'<dl class="definitions">{definitions}</dl>'))
    style, script = _part("page.css"), _part("page.js") if tokens is not None else ""
    policy = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    parts = {
        "policy": "; ".join(f"{name} {allowed}" for name, allowed in policy.items()),
        "title": escape(title),
        "style": style,
        "facts": "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts),
        "contents": "".join(f'<li><a href="#{key}">{escape(heading)}</a></li>' for key, heading, _ in sections),
        "sections": "\n".join(
            f'<section id="{key}"><h2>{escape(heading)}</h2>{body}</section>' for key, heading, body in sections
        ),
        "data": "" if tokens is None else f'<script type="application/json" id="token-data">{tokens.data}</script>',
        "script": script,
    }
    # One pass: what is put in is never searched for places of its own.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _part("page.html"))


def _about(found: Sequence[str], remarks: Sequence[str], left_out: Sequence[tuple[str, str]]) -> str:
    parts = [f'<p class="intro">{escape(ABOUT)}</p>']
    if found:
        parts.append(f"<h3>Found</h3>{_list(found)}")
    if remarks:
        parts.append(f"<h3>How it was measured</h3>{_list(remarks)}")
    if left_out:
        missing = "".join(f"<li>{escape(what)}: <code>{escape(how)}</code></li>" for what, how in left_out)
        parts.append(f'<h3>What is left out, and how to get it</h3><ul class="found">{missing}</ul>')
    return "".join(parts)


def _text(tokens: TokenView) -> str:
    """The places that the script fills."""
    part = f"{tokens.n_tokens:,} of {tokens.of:,} tokens are shown. " if tokens.n_tokens < tokens.of else ""
    return (
        '<div class="controls"><label>Text <select id="part"></select></label>'
        '<label>Layer <input type="range" id="layer" min="0" value="0"><output id="layer-number">0</output></label>'
        '<label><input type="checkbox" id="numbers"> expert numbers</label></div>'
        '<div id="chips" class="chips" role="group" aria-label="Experts, and the share of the tokens shown that have '
        'each as their first choice; press one to see its tokens alone"></div>'
        '<div id="text" tabindex="0" role="group" aria-label="The text; arrow keys move along it and change the layer">'
        "<noscript>The text is shown by a script, and scripts are off.</noscript></div>"
        '<p id="said" aria-live="polite"></p>'
        f'<p class="note">{part}The figures beside the numbers are shares of the tokens shown. With the text focused, '
        "left and right go along it, and up and down change the layer. With an expert pressed, its first choices are "
        "filled and its second choices underlined.</p>"
    )


def _figure(figure: Figure) -> str:
    """What it is on the left, and the drawing with what it says on the right, where there is room."""
    terms = [("Numbers", figure.denominator), ("Baseline", figure.baseline)]
    facts = "".join(f"<dt>{name}:</dt><dd>{escape(text)}</dd>" for name, text in terms if text)
    content = figure.content
    single = isinstance(content, Heatmap) and len(content.grids) == 1
    single = single or (isinstance(content, Lines) and len(content.panels) == 1)
    return (
        f'<div class="figure" id="figure-{figure.key}"><div class="words"><h3>{escape(figure.title)}</h3>'
        f"<p>{escape(figure.how)}</p><p>{escape(figure.limits)}</p><dl>{facts}</dl></div>"
        f'<div class="drawn{" single" * single}"><div>{draw(figure)}</div>{_list(figure.found)}</div></div>'
    )


def _list(sentences: Sequence[str]) -> str:
    return f'<ul class="found">{"".join(f"<li>{escape(one)}</li>" for one in sentences)}</ul>' if sentences else ""


def escape(text: str) -> str:
    """Text as HTML; somebody else's may be in it, so nothing in it acts."""
    return html.escape(legible(text))


def _part(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """How a policy allows this very text, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
