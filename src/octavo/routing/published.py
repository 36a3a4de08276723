"""Figures that others have published, to hold beside one's own. What exactly they are of stands with each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PublishedRange:
    """A figure of several domains, as the range from the lowest to the highest.

    Attributes:
        model: as its authors call it.
        metric: "first" or "any", the two results of `octavo.routing.stats.repetition`.
        layer: from 0.
        low, high: shares, over the domains.
        baseline: what even random routing gives.
        n_domains: that it was measured on.
        source, table: where it stands.
        measured: what exactly it is.
    """

    model: str
    metric: Literal["first", "any"]
    layer: int
    low: float
    high: float
    baseline: float
    n_domains: int
    source: str
    table: str
    measured: str


@dataclass(frozen=True)
class PublishedMean:
    """The mean of a figure of the weights alone.

    Attributes:
        model: as its authors call it.
        metric: "alignment".
        matrix: of each expert, whose right singular vectors are meant.
        k: how many of them.
        value: the mean over layers and experts.
        measured: what exactly it is.
    """

    model: str
    metric: str
    matrix: str
    k: int
    value: float
    measured: str


MIXTRAL = "Mixtral 8x7B"
MIXTRAL_PAPER = "Jiang et al. 2024, Mixtral of Experts, arXiv:2401.04088"
FIRST_BASELINE = 1 / 8
ANY_BASELINE = 1 - 15 / 28  # 1 - C(6, 2) / C(8, 2)

_RANGES = {
    "first": {0: (0.136, 0.149), 15: (0.236, 0.284), 31: (0.197, 0.263)},
    "any": {0: (0.449, 0.499), 15: (0.616, 0.670), 31: (0.445, 0.536)},
}
_MEASURED = {
    "first": "share of consecutive tokens whose first choice is the same expert",
    "any": "share of consecutive tokens whose first or second choices have an expert in common",
}


def _ranges(metric: Literal["first", "any"], baseline: float) -> tuple[PublishedRange, ...]:
    return tuple(
        PublishedRange(MIXTRAL, metric, layer, low, high, baseline, 8, MIXTRAL_PAPER, "table 5", _MEASURED[metric])
        for layer, (low, high) in _RANGES[metric].items()
    )


REPETITION = (*_ranges("first", FIRST_BASELINE), *_ranges("any", ANY_BASELINE))
"""Repetition of Mixtral 8x7B in three of its 32 layers, over eight domains."""

ALIGNMENT = tuple(
    PublishedMean(
        MIXTRAL,
        "alignment",
        "w1",
        k,
        value,
        "||V_k^T r_i||^2: how much of an expert's router row, of length 1, lies in the span of the first k right "
        "singular vectors of its own w1; the mean over layers and experts",
    )
    for k, value in ((1, 0.065), (64, 0.285), (512, 0.462))
)
"""Router-expert alignment of Mixtral 8x7B. By chance it is k / 4096: 0.0002, 0.016 and 0.125."""


def repetition_range(metric: Literal["first", "any"], layer: int) -> PublishedRange | None:
    """What was published of a layer; None if it was not."""
    return next((one for one in REPETITION if (one.metric, one.layer) == (metric, layer)), None)
