"""The routing view as HTML: who speaks each token, how busy each expert is. Pure functions; all text is escaped.

An expert is told by its number everywhere; the colour only helps the eye. Classes are styled by `page.css`.
"""

from __future__ import annotations

from html import escape

import numpy as np

from octavo.ui.backend import Array, Routed

N_COLOURS = 8  # `.octavo-e0` to `.octavo-e7` in page.css; more experts use them again


def routing_view(routed: Routed, layer: int) -> str:
    """Everything about a reply.

    Args:
        layer: whose experts colour the tokens, from 0.
    """
    if not len(routed.topk_ids):
        return '<p class="octavo-hint">The experts show up here as soon as a reply comes.</p>'
    shares_LE = shares(routed.topk_ids, routed.n_experts)
    parts = (
        legend(routed.n_experts),
        tokens(routed, layer),
        bars(shares_LE[layer], layer),
        grid(shares_LE, layer),
    )
    return "".join(parts)


def shares(topk_ids: Array, n_experts: int) -> Array:
    """Each expert's share of all assignments: [layers, experts], every layer sums to 1."""
    n_tokens, n_layers, top_k = topk_ids.shape
    of_layer = np.arange(n_layers)[None, :, None] * n_experts
    counts = np.bincount((topk_ids + of_layer).ravel(), minlength=n_layers * n_experts)
    shares_LE: Array = counts.reshape(n_layers, n_experts) / max(n_tokens * top_k, 1)
    return shares_LE


def legend(n_experts: int) -> str:
    """Which colour is whose."""
    chips = "".join(f'<li class="octavo-chip {_colour(e)}">{e}</li>' for e in range(n_experts))
    return f'<ul class="octavo-legend" aria-label="Experts by colour"><li>Expert</li>{chips}</ul>'


def tokens(routed: Routed, layer: int) -> str:
    """The reply, each token in the colour of its first choice and with its number."""
    first = routed.topk_ids[:, layer, 0].tolist()
    spans = []
    for piece, chosen in zip(routed.pieces, routed.topk_ids[:, layer].tolist(), strict=False):
        title = f"expert {chosen[0]}" + (f", then {', '.join(map(str, chosen[1:]))}" if chosen[1:] else "")
        spans.append(
            f'<span class="octavo-token {_colour(chosen[0])}" data-expert="{chosen[0]}" title="{title}">'
            f"{_visible(piece)}</span>"
        )
    label = f"The reply's {len(first)} tokens by first-choice expert of layer {layer + 1}"
    return f'<div class="octavo-tokens" tabindex="0" role="group" aria-label="{label}">{"".join(spans)}</div>'


def bars(shares_E: Array, layer: int) -> str:
    """How the assignments of one layer fall to its experts; the line is an even share."""
    even, most = 1 / len(shares_E), max(float(shares_E.max()), 2 / len(shares_E))
    rows = "".join(
        f'<tr><th scope="row">{e}</th><td class="octavo-track" aria-hidden="true">'
        f'<span class="octavo-bar {_colour(e)}" style="width:{100 * share / most:.1f}%"></span>'
        f'<span class="octavo-even" style="left:{100 * even / most:.1f}%"></span></td>'
        f"<td>{100 * share:.1f} %</td></tr>"
        for e, share in enumerate(shares_E.tolist())
    )
    caption = f"Layer {layer + 1}: share of assignments, expert by expert (the line is an even share)"
    return f'<table class="octavo-bars"><caption>{caption}</caption><tbody>{rows}</tbody></table>'


def grid(shares_LE: Array, layer: int) -> str:
    """All layers at a glance: the busier an expert, the darker its cell. The chosen layer is marked."""
    n_experts = shares_LE.shape[1]
    most = float(shares_LE.max()) or 1.0
    head = "".join(f'<th scope="col">{e}</th>' for e in range(n_experts))
    rows = []
    for row, of_layer in enumerate(shares_LE.tolist()):
        cells = "".join(
            f'<td style="--load:{100 * share / most:.0f}%" title="layer {row + 1}, expert {e}: {100 * share:.1f} %">'
            f"{100 * share:.0f}</td>"
            for e, share in enumerate(of_layer)
        )
        chosen = ' class="octavo-chosen" aria-current="true"' if row == layer else ""
        rows.append(f'<tr{chosen}><th scope="row">{row + 1}</th>{cells}</tr>')
    return (
        '<div class="octavo-scroll" tabindex="0" role="group" aria-label="Load of all layers">'
        '<table class="octavo-grid"><caption>All layers: share in percent, layers down, experts across</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _colour(expert: int) -> str:
    return f"octavo-e{expert % N_COLOURS}"


def _visible(piece: str) -> str:
    """A token's text, escaped; line breaks can be seen, and where there is no text a dot can."""
    return escape(piece).replace("\n", "↵\n") or "·"
