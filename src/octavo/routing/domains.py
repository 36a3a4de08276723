"""How routing differs between domains, which are the labels of a trace's documents. See `octavo.routing.stats`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import OptionError
from octavo.experts import RoutingTrace
from octavo.routing.intervals import LEVEL, BlockBootstrap, Part, binomial_variance, cut_blocks, influences, student
from octavo.routing.measured import Measured, blocks_of, choices, count, notes

Array = npt.NDArray[Any]
_CHUNK = 1 << 24  # numbers of one product
_BY_TEXT = "domains differ in their texts as well: what a few texts have in common counts as the domain's"
_BY_BLOCKS = (
    "there are too few documents to shuffle whole, so blocks of tokens were: two texts of one kind may differ too"
)


@dataclass(frozen=True, eq=False)
class Distance(Measured):
    """`domain_distance`, with the answer to whether it is more than chance.

    Attributes:
        null_high: what shuffled labels stay below in all domains and layers together, with probability `level`.
        p_value: share of shuffled labels whose most conspicuous entry is at least as conspicuous as the trace's.
    """

    null_high: Array | None = None
    p_value: float = 1.0

    @property
    def specialised(self) -> bool:
        """Whether some domain is routed differently from the others, beyond what shuffled labels show."""
        return self.p_value <= 1 - self.level


def domain_specialisation(trace: RoutingTrace, *, level: float = LEVEL, seed: int = 0) -> Measured:
    """Of a domain's tokens, the share that choose expert i: N_iD / N_D, axes (domain, layer, expert); baseline K/E.

    An expert that is busy everywhere is above the baseline in all domains: see `domain_contrast`.

    Raises:
        OptionError: the trace has no labels, or there is no such level.
    """
    need_labels(trace, least=1)
    of = _Domains(trace)
    bootstrap = BlockBootstrap(len(of.domain), level=level, seed=seed, entries=of.entries)
    parts = [bootstrap.add(of.num[rows], of.den[rows], rows) for rows in of.rows]
    value = np.stack([part.value for part in parts])
    low, high = (np.stack(bounds) for bounds in zip(*map(bootstrap.shares, parts), strict=True))
    return Measured(
        "domain specialisation",
        value,
        low,
        high,
        np.full(value.shape, trace.top_k / trace.experts),
        ("domain", "layer", "expert"),
        "tokens of the domain",
        "K/E: even routing",
        level,
        notes(trace, "an expert that is busy everywhere is above the baseline in all domains"),
    )


def domain_contrast(trace: RoutingTrace, *, level: float = LEVEL, seed: int = 0) -> Measured:
    """The same against the other domains: N_iD / N_D less the same share of all other domains' tokens together.

    Axes (domain, layer, expert), from -1 to 1; baseline 0. The interval is put together from those of the two shares
    (Newcombe's method).

    Raises:
        OptionError: the trace has fewer than two domains, or there is no such level.
    """
    need_labels(trace, least=2)
    of = _Domains(trace)
    bootstrap = BlockBootstrap(len(of.domain), level=level, seed=seed, entries=of.entries)
    pairs = []
    for domain in range(len(of.rows)):
        influence, inside, outside = of.against(domain)
        bootstrap.stray(influence)
        pairs.append((inside, outside))
    value, low, high = [], [], []
    for inside, outside in pairs:
        p, q = inside.value, outside.value
        (p_low, p_high), (q_low, q_high) = bootstrap.shares(inside), bootstrap.shares(outside)
        value.append(p - q)
        low.append(p - q - np.hypot(p - p_low, q_high - q))
        high.append(p - q + np.hypot(p_high - p, q - q_low))
    values = np.stack(value)
    return Measured(
        "domain contrast",
        values,
        np.clip(np.stack(low), -1, 1),
        np.clip(np.stack(high), -1, 1),
        np.zeros_like(values),
        ("domain", "layer", "expert"),
        "tokens of the domain, and tokens of all others",
        "0: the same share as in the other domains",
        level,
        notes(trace, _BY_TEXT),
    )


def domain_distance(trace: RoutingTrace, *, level: float = LEVEL, seed: int = 0) -> Distance:
    """How differently a domain is routed: total variation distance to the other domains' load, axes (domain, layer).

    Both loads are shares of assignments; the distance is half the sum of their absolute differences, from 0 to 1: so
    many of the assignments would have to go elsewhere. In a sample it is never 0, so the baseline is the mean with
    labels shuffled, among whole documents or, where there are too few to shuffle, among blocks of tokens (see `note`).
    The interval is the distance give or take how far the differences stray among resamples, and holds for the true
    distance by the triangle inequality.

    Raises:
        OptionError: the trace has fewer than two domains, or there is no such level.
    """
    need_labels(trace, least=2)
    of = _Domains(trace)
    bootstrap = BlockBootstrap(len(of.domain), level=level, seed=seed, entries=of.entries)
    value, units, few = [], [], []
    for domain in range(len(of.rows)):
        influence, inside, outside = of.against(domain, times=trace.top_k)
        unit = bootstrap.stray_together(influence, _half_sum)
        least = np.sqrt(binomial_variance(inside) + binomial_variance(outside)).sum(axis=-1) / 2
        units.append(np.maximum(unit, least))
        freedom = np.minimum(inside.n_blocks, outside.n_blocks)[..., 0] - 1
        few.append(student(2.6, freedom) / 2.6)
        value.append(_half_sum(inside.value - outside.value))
    values, far = np.stack(value), bootstrap.critical * np.stack(units) * np.stack(few)
    mean, high, p_value, whole = _shuffled(trace, of, values, level, seed)
    return Distance(
        "domain distance",
        values,
        np.clip(values - far, 0, 1),
        np.clip(values + far, 0, 1),
        mean,
        ("domain", "layer"),
        "assignments (tokens x K) of the domain, and of all others",
        "mean with labels shuffled among " + ("documents" if whole else "blocks"),
        level,
        notes(trace, _BY_TEXT if whole else _BY_BLOCKS, "never 0 in a sample: hold it beside the baseline"),
        null_high=high,
        p_value=p_value,
    )


def need_labels(trace: RoutingTrace, least: int) -> None:
    """Raises OptionError where a trace has no labels, or fewer than so many different ones."""
    hint = "octavo routing trace --label NAME, once for each --text"
    if trace.labels is None:
        raise OptionError("the trace has no labels, which domains are told by", hint=hint)
    if len(trace.domains) < least:
        raise OptionError(f"the trace has one domain only, {trace.domains[0]!r}; expected {least} or more", hint=hint)


class _Domains:
    """Counts by block, and which blocks are of which domain.

    Attributes:
        domain: of each block.
        rows: by domain, its blocks.
        num: tokens that choose each expert, [B, L, E].
        den: tokens, [B, 1, 1].
        entries: domains x layers x experts.
    """

    def __init__(self, trace: RoutingTrace) -> None:
        per_domain = trace.n_layers * trace.experts
        block, self.domain = blocks_of(trace, by_domain=True, entries=per_domain)
        n_blocks = len(self.domain)
        self.rows = [np.flatnonzero(self.domain == domain) for domain in range(len(trace.domains))]
        self.num = choices(trace, block, n_blocks)
        self.den = count(block, n_blocks)[:, None, None]
        self.entries = per_domain * len(self.rows)

    def against(self, domain: int, times: int = 1) -> tuple[Array, Part, Part]:
        """How blocks move the difference between a domain's shares and the others', [B, L, E], and both shares.

        Args:
            domain: which.
            times: assignments a token that the shares are of.
        """
        found = np.empty(self.num.shape)
        parts = []
        for rows, sign in ((self.rows[domain], 1), (np.flatnonzero(self.domain != domain), -1)):
            influence, part = influences(self.num[rows], self.den[rows] * times)
            found[rows] = sign * influence
            parts.append(part)
        return found, parts[0], parts[1]


def _half_sum(differences: Array) -> Array:
    """The total variation distance, of the last dimension."""
    found: Array = np.abs(differences).sum(axis=-1) / 2
    return found


def _shuffled(
    trace: RoutingTrace, of: _Domains, values: Array, level: float, seed: int
) -> tuple[Array, Array, float, bool]:
    """Distances with shuffled labels: their mean, what they stay below together, the p-value of `values`, and whether
    whole documents were shuffled."""
    num, domain, whole = of.num, of.domain, False
    documents = np.bincount(trace.domain_ids[np.flatnonzero(np.diff(trace.document_ids, prepend=-1))])
    alone = sum(1 / math.comb(int(documents.sum()), int(n)) for n in documents)  # some domain keeps just its own
    if alone < (1 - level) / 4:
        block, domain = cut_blocks(trace.document_ids, trace.domain_ids, most=max(64, len(num)), whole=True)
        num, whole = choices(trace, block, len(domain)), True
    units, domains = num.reshape(len(num), -1).astype(np.float32), np.arange(len(of.rows))
    times = max(999, math.ceil(10 / (1 - level)) - 1)
    found = np.empty((times, *values.shape), dtype=np.float32)
    random = np.random.default_rng(seed)
    step = max(1, _CHUNK // (len(domains) * max(units.shape)))
    for begin in range(0, times, step):
        some = min(step, times - begin)
        labels = random.permuted(np.broadcast_to(domain, (some, len(domain))), axis=1)
        picked = (labels[:, None, :] == domains[:, None]).astype(np.float32)
        found[begin : begin + some] = _distances(
            (picked.reshape(-1, len(domain)) @ units).reshape(some, -1, *num.shape[1:])
        )
    mean, spread = found.mean(axis=0, dtype=np.float64), found.std(axis=0, dtype=np.float64)
    spread = np.maximum(spread, 1e-9)
    worst = ((found - mean) / spread).max(axis=(1, 2))
    least = ((values - mean) / spread).max() - 1e-6  # ties count for chance
    p_value = (1 + int((worst >= least).sum())) / (1 + times)
    high = np.minimum(1, mean + float(np.quantile(worst, level, method="higher")) * spread)
    return mean, high, p_value, whole


def _distances(num: Array) -> Array:
    """Between each domain's load and that of the others, of counts [..., domains, L, E]."""
    others = num.sum(axis=-3, keepdims=True) - num
    return _half_sum(_share(num) - _share(others))


def _share(num: Array) -> Array:
    found: Array = num / np.maximum(num.sum(axis=-1, keepdims=True), 1)
    return found
