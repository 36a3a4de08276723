"""Which tensor of a model gets which format.

The router, norms and embeddings stay as they are stored: small differences decide between experts, and of the
embeddings a token reads one row. At 3 and 2 bits the experts, most of a model by far, get the low-bit format, and
attention and output four bits.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from octavo.errors import OptionError
from octavo.quant.formats import FORMATS

KEPT = "16"
"""Among overrides: the tensor stays as it is stored."""

PRESETS: Mapping[str, tuple[str, str]] = {"8": ("q8", "q8"), "4": ("q4", "q4"), "3": ("q3", "q4"), "2": ("q2", "q4")}
"""By bits: the format of the feed-forward matrices, experts or not, and that of attention and output."""

_STAY = ("*norm.weight", "*.feed_forward.gate.weight", "tok_embeddings.weight")


def preset(bits: int | str, names: Iterable[str], overrides: Mapping[str, str] | None = None) -> dict[str, str]:
    """Choose a format for every tensor of a model that is to be quantised.

    Args:
        bits: 8, 4, 3 or 2.
        names: canonical, of all tensors of the model. A tied output is not one of them.
        overrides: formats (KEPT: none) by canonical name or a pattern of names, such as
            ``layers.*.attention.*.weight``; of several that match, the last counts. A pattern passes over routers,
            norms and embeddings.

    Returns:
        Names of formats by canonical name. Tensors that are not among them stay as they are stored.

    Raises:
        OptionError: there is no such preset or format, or a pattern matches nothing, or nothing but what always stays.
    """
    if str(bits) not in PRESETS:
        raise OptionError(f"bits is {bits!r}; expected one of {', '.join(PRESETS)}")
    feed_forward, others = PRESETS[str(bits)]
    names = list(names)
    quantised = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in _STAY)]
    chosen = {name: feed_forward if ".feed_forward." in name else others for name in quantised}
    for pattern, format in (overrides or {}).items():
        if format not in FORMATS and format != KEPT:
            raise OptionError(
                f"{pattern}={format}: the format {format!r} is unknown; expected one of {', '.join(FORMATS)}, {KEPT}",
                hint=f"{KEPT} keeps a tensor as it is stored",
            )
        for name in _matching(pattern, format, names, quantised):
            chosen[name] = format
    return {name: format for name, format in chosen.items() if format != KEPT}


def _matching(pattern: str, format: str, names: list[str], quantised: list[str]) -> list[str]:
    """The tensors that a pattern means, of those that may be quantised."""
    meant = [name for name in quantised if fnmatchcase(name, pattern)]
    staying = [name for name in names if fnmatchcase(name, pattern)]
    if meant or (staying and format == KEPT):
        return meant
    if staying:
        raise OptionError(
            f"{pattern}={format}: {staying[0]} stays as it is stored",
            hint="routers, norms and embeddings are not quantised",
        )
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    raise OptionError(
        f"{pattern}={format}: no tensor of this model has such a name",
        hint=f"did you mean {' or '.join(near)}?" if near else "names are such as layers.0.attention.wq.weight",
    )
