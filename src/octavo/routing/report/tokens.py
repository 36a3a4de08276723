"""The text of a trace and who was chosen for each token, packed for the page's script."""

from __future__ import annotations

import base64
import json
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np

from octavo.experts import RoutingTrace
from octavo.routing.report.kinds import Array

MOST_TOKENS = 20_000
MOST_BYTES = 2_400_000  # of expert ids, before they are written as text
PART = 2_000  # tokens that the page shows at a time
_PICTURES = 0x2400  # symbols for the control characters 0 to 31
_BREAKS = {"\n": "↵\n", "\r": "␍", "\t": "⇥\t", "\x7f": "␡", "\u2028": "↵\n", "\u2029": "↵\n", "\x85": "↵\n"}
_JOINERS = "\u200c\u200d"  # format characters that a script needs to be written right


@dataclass(frozen=True)
class TokenView:
    """What the page needs to show the text.

    Attributes:
        data: a JSON object, safe to stand between script tags.
        n_tokens: how many are shown.
        of: how many the trace has.
    """

    data: str
    n_tokens: int
    of: int


def token_view(trace: RoutingTrace) -> TokenView:
    """Pack the text, domain by domain; of a long trace, the same number of tokens of each."""
    ranks = min(trace.top_k, 2)
    narrow = ranks == 2 and trace.experts <= 16  # two ids in a byte
    each = 1 if narrow else ranks * (1 if trace.experts <= 256 else 2)
    kept = _kept(trace, min(MOST_TOKENS, max(1, MOST_BYTES // (trace.n_layers * each))))
    documents = trace.document_ids[kept]
    packed: dict[str, Any] = {
        "experts": trace.experts,
        "layers": trace.n_layers,
        "ranks": ranks,
        "each": 0 if narrow else each // ranks,
        "ids": base64.b64encode(_packed(trace.topk_ids[kept][:, :, :ranks], narrow, trace.experts)).decode(),
        "parts": _parts(trace, kept),
        "begins": (1 + np.flatnonzero(np.diff(documents))).tolist(),
        "pieces": _pieces(trace, kept),
    }
    return TokenView(in_script(packed), len(kept), trace.n_tokens)


def visible(piece: str) -> str:
    """A token's text, so that all of it is seen and none of it acts: controls are symbols, and nothing is a dot."""
    return legible(piece) or "·"


def legible(text: str) -> str:
    """The same for text that may be empty."""
    return "".join(map(_seen, text))


def in_script(value: object) -> str:
    """JSON that no HTML parser takes for the end of a script, and that has no line breaks of JavaScript's own."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _seen(character: str) -> str:
    if character in _BREAKS:
        return _BREAKS[character]
    kind = unicodedata.category(character)
    if kind == "Cc":
        return chr(_PICTURES + ord(character)) if ord(character) < 32 else "\ufffd"
    if kind == "Cs":
        return "\ufffd"
    if kind == "Cf" and character not in _JOINERS:  # marks that turn or hide the text after them
        return f"⟨U+{ord(character):04X}⟩"
    return character


def _kept(trace: RoutingTrace, most: int) -> Array:
    """Which tokens are shown, and in which order: the first ones of each domain, domain after domain."""
    each = trace.n_tokens if trace.n_tokens <= most else max(1, most // len(trace.domains))
    domains = trace.domain_ids
    return np.concatenate([np.flatnonzero(domains == at)[:each] for at in range(len(trace.domains))])[:most]


def _parts(trace: RoutingTrace, kept: Array) -> list[list[Any]]:
    """[what it is called, its first token, and the one after its last] of each stretch that is shown at once."""
    domains, parts = trace.domain_ids[kept], []
    for at, domain in enumerate(trace.domains):
        begin, end = (int(np.searchsorted(domains, at, side)) for side in ("left", "right"))
        name = visible(domain) if trace.labels else "text"
        n_parts = -(-(end - begin) // PART)
        for part in range(n_parts):
            first, last = begin + part * PART, min(end, begin + (part + 1) * PART)
            which = f", part {part + 1} of {n_parts}" if n_parts > 1 else ""
            parts.append([f"{name}{which} ({last - first:,} tokens)", first, last])
    return parts


def _pieces(trace: RoutingTrace, kept: Array) -> list[str]:
    if trace.pieces is not None:
        return [visible(trace.pieces[token]) for token in kept]
    if trace.token_ids is not None:
        return [f"⟨{token}⟩ " for token in trace.token_ids[kept].tolist()]
    return ["◦ "] * len(kept)


def _packed(ids_TLR: Array, narrow: bool, experts: int) -> bytes:
    """Layer after layer, token after token: first and second choice."""
    ids_LTR = ids_TLR.transpose(1, 0, 2)
    if narrow:
        return (ids_LTR[..., 0] << 4 | ids_LTR[..., 1]).astype(np.uint8).tobytes()
    return ids_LTR.astype(np.uint8 if experts <= 256 else "<u2").tobytes()
