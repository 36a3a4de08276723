"""What a routing trace says, as figures. See `weight_figures` for what the weights say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

import numpy as np

from octavo.errors import OptionError
from octavo.experts import RoutingTrace
from octavo.routing import published, stats
from octavo.routing.intervals import LEVEL
from octavo.routing.measured import Measured
from octavo.routing.replay import Curve
from octavo.routing.report.kinds import (
    PERCENT,
    PLAIN,
    POINTS,
    SHARE,
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
from octavo.routing.report.tokens import visible

CLAIMED = 3  # tokens listed for each expert
CLAIMED_LAYERS = 3
Missing = tuple[str, str]
"""What is left out, and how to get it."""


class _Options(TypedDict):
    level: float
    seed: int


def trace_figures(
    trace: RoutingTrace, *, seed: int = 0, progress: Callable[[str], None] | None = None
) -> tuple[list[Figure], list[Missing]]:
    """Measure everything of a trace, and make figures of it.

    Args:
        seed: of what is drawn for the intervals.
        progress: is told what is measured next.

    Returns:
        The figures, and what cannot be shown of this trace.
    """
    figures: list[Figure] = []
    missing: list[Missing] = []
    options = _Options(level=LEVEL, seed=seed)
    makers: tuple[tuple[str, Callable[[], Iterator[Figure]]], ...] = (
        ("Load", lambda: _load(trace, options)),
        ("Router entropy", lambda: _entropy(trace, options)),
        ("Domains", lambda: _domains(trace, options)),
        ("Vocabulary", lambda: _vocabulary(trace, options)),
        ("Repetition", lambda: _repetition(trace, options)),
        ("Repetition of each domain", lambda: _repetition_by_domain(trace, options)),
        ("Co-activation", lambda: _coactivation(trace, options)),
        ("Transitions", lambda: _transition(trace, options)),
    )
    for name, make in makers:
        if progress is not None:
            progress(name)
        try:
            figures.extend(make())
        except OptionError as error:
            missing.append((f"{name} ({error.message})", error.hint or "octavo routing trace --help"))
    return figures, missing


# ---------------------------------------- load


def _load(trace: RoutingTrace, options: _Options) -> Iterator[Figure]:
    load = stats.load(trace, **options)
    busiest = np.unravel_index(int(load.value.argmax()), load.value.shape)
    idlest = np.unravel_index(int(load.value.argmin()), load.value.shape)
    unused = int((load.value == 0).sum())
    found = [
        f"Busiest is expert {busiest[1]} of layer {busiest[0]} with {_interval(load, busiest)} of the layer's "
        f"assignments, and idlest expert {idlest[1]} of layer {idlest[0]} with {_interval(load, idlest)}; even routing "
        f"gives {PERCENT(1 / trace.experts)}.",
    ]
    if unused:
        found.append(f"{unused} of {load.value.size} experts are chosen by no token of this text.")
    yield Figure(
        "load",
        "load",
        "Load of each expert",
        "A row is a layer, a cell an expert, and the darker it is the more of the layer's assignments it gets; every "
        "row sums to 100 %.",
        "It does not show how much an expert contributes: a busy expert may be given small weights.",
        load.denominator + _hold(load),
        f"{load.baseline_name} ({PERCENT(1 / trace.experts)})",
        _by_layer((Grid("", load.value, load.low, load.high, load.baseline),), trace, _most(load)),
        tuple(found),
    )
    variation = stats.load_variation(trace, **options)
    yield Figure(
        "load-variation",
        "load",
        "How uneven the load is",
        "The height is a layer's coefficient of variation: the standard deviation of its loads divided by their mean.",
        "It does not tell whether one expert is far off or all of them a little.",
        f"relative to {variation.denominator}; {variation.note}{_hold(variation)}",
        variation.baseline_name,
        _over_layers("coefficient of variation", variation, PLAIN),
    )


def _entropy(trace: RoutingTrace, options: _Options) -> Iterator[Figure]:
    entropy = stats.router_entropy(trace, **options)
    most = math.log2(trace.experts)
    layers = np.arange(trace.n_layers, dtype=np.float64)
    ceiling = Series("the most there can be", layers, np.full(trace.n_layers, most), role="baseline")
    yield Figure(
        "entropy",
        "load",
        "How undecided the routers are",
        "The height is the mean entropy of a router's probabilities over all experts: 0 bits means that it is sure of "
        "one expert, and the dashed line that all are the same to it.",
        "It does not show whether different tokens get different experts: a router may be sure of the same one always.",
        entropy.denominator + _hold(entropy),
        entropy.baseline_name,
        _over_layers("bits", entropy, PLAIN, ceiling),
    )


# ---------------------------------------- domains


def _domains(trace: RoutingTrace, options: _Options) -> Iterator[Figure]:
    share = stats.domain_specialisation(trace, **options)
    contrast = stats.domain_contrast(trace, **options)
    distance = stats.domain_distance(trace, **options)
    found = tuple(_domain_sentence(trace, at, share, contrast) for at in range(len(trace.domains)))
    span = max(0.01, float(np.nanmax(np.abs(contrast.value))))
    grids = _domain_grids(trace, contrast)
    yield Figure(
        "domain-contrast",
        "domains",
        "Which experts a domain chooses more, or less, than the others",
        "A panel is a domain; a blue cell is an expert that a larger share of its tokens chooses than of all other "
        "domains' tokens, an orange one an expert that a smaller share chooses, in percentage points.",
        "It does not show why: a domain has its own words, and an expert may have been chosen for a comma.",
        contrast.denominator + _hold(contrast),
        contrast.baseline_name,
        Heatmap(
            grids,
            _numbers(trace.n_layers),
            _numbers(trace.experts),
            "layer",
            "expert",
            POINTS,
            -span,
            span,
            middle=0.0,
        ),
        found,
    )
    grids = _domain_grids(trace, share)
    yield Figure(
        "domain-load",
        "domains",
        "Share of a domain's tokens that choose each expert",
        f"A panel is a domain, a cell the share of its tokens that have the expert among their {trace.top_k} choices; "
        f"a row sums to {100 * trace.top_k}\u00a0%.",
        "An expert that is busy everywhere is dark in every panel, which says nothing of the domain.",
        share.denominator + _hold(share),
        f"{share.baseline_name} ({PERCENT(trace.top_k / trace.experts)})",
        _by_layer(grids, trace, _most(share)),
    )
    beyond = "more than" if distance.specialised else "no more than"
    assert distance.baseline is not None
    yield Figure(
        "domain-distance",
        "domains",
        "How differently each domain is routed",
        "The height is the share of a domain's assignments that would have to go to other experts for its load to be "
        "that of all other domains; the dashed line is what labels give that were shuffled.",
        "It does not show which experts make the difference, and in a sample it is never 0.",
        distance.denominator + _hold(distance),
        distance.baseline_name,
        Lines(
            tuple(
                (
                    visible(domain),
                    (
                        _series("measured", distance.value[at], distance.low[at], distance.high[at]),
                        _series("shuffled labels", distance.baseline[at], role="baseline"),
                    ),
                )
                for at, domain in enumerate(trace.domains)
            ),
            "layer",
            "distance",
            PERCENT,
        ),
        (
            f"Taken together the domains are routed apart {beyond} shuffled labels are (p = {distance.p_value:.2g}).",
            _sentence(distance.note),
        ),
    )


def _domain_sentence(trace: RoutingTrace, at: int, share: Measured, contrast: Measured) -> str:
    """What sets a domain apart most, in words."""
    domain = visible(trace.domains[at])
    of_domain = contrast.value[at]
    sure = int((contrast.beside[at] != 0).sum())
    if not (contrast.low[at] > 0).any():
        return f"{domain}: no expert is chosen more than by the other domains, beyond its interval."
    # Of the experts that are surely chosen more, the one that is so most.
    layer, expert = np.unravel_index(
        int(np.nanargmax(np.where(contrast.low[at] > 0, of_domain, -np.inf))), of_domain.shape
    )
    place = (at, int(layer), int(expert))
    other = share.value[place] - contrast.value[place]
    return (
        f"{domain}: expert {expert} of layer {layer} is chosen by {_interval(share, place)} of its tokens and by "
        f"{PERCENT(float(other))} of the others', {_interval(contrast, place, POINTS.unit)} more; "
        f"{sure} of its {of_domain.size} shares differ from the others' beyond their intervals."
    )


def _vocabulary(trace: RoutingTrace, options: _Options) -> Iterator[Figure]:
    vocabulary = stats.vocabulary_specialisation(trace, **options)
    summary = vocabulary.summary
    yield Figure(
        "vocabulary",
        "domains",
        "How far a token's experts depend on which token it is",
        "For every token of the vocabulary that the text has often enough, take the expert that gets the largest share "
        "of its occurrences; the height is the mean of that share.",
        "It does not show whether the expert knows anything about the token, or of tokens that are rare.",
        summary.denominator + _hold(summary),
        summary.baseline_name,
        _over_layers("largest share", summary, PERCENT),
    )
    rows: list[tuple[str | int | float, ...]] = []
    for layer in few(trace.n_layers, CLAIMED_LAYERS):
        for expert, tokens in enumerate(vocabulary.top_by_expert(layer, CLAIMED)):
            for token in tokens:
                piece = f"⟨{token.token_id}⟩" if token.piece is None else visible(token.piece).replace(" ", "␣")
                rows.append((layer, expert, piece, round(100 * token.share, 1), token.count))
    yield Figure(
        "vocabulary-tokens",
        "domains",
        "The tokens that each expert claims most",
        f"For each expert, the {CLAIMED} tokens that choose it in the largest share of their occurrences.",
        "A share of 100 % may rest on few occurrences, and other experts may claim the same token as their second.",
        summary.denominator.split(";")[0] + f", with any of its {trace.top_k} choices",
        f"K/E: even routing ({PERCENT(trace.top_k / trace.experts)}); the largest of many shares is higher by chance",
        Table(("layer", "expert", "token", "share of its occurrences, %", "occurrences"), tuple(rows)),
    )


# ---------------------------------------- order


def _repetition(trace: RoutingTrace, options: _Options) -> Iterator[Figure]:
    first, either = stats.repetition(trace, **options)
    panels = (
        ("the same first choice", (*_measured_and_baseline(first), *_published(trace, "first"))),
        ("some expert in common", (*_measured_and_baseline(either), *_published(trace, "any"))),
    )
    beside = _published(trace, "first")
    most = (int(np.nanargmax(first.value)),)
    found = [
        f"Layer {most[0]} repeats most: {_interval(first, most)} of consecutive tokens have the same first choice, and "
        f"{_interval(either, most)} some expert in common.",
        _sentence(first.note),
    ]
    if beside:
        found.append(f"The published values are those of {published.MIXTRAL_PAPER}, table 5.")
    yield Figure(
        "repetition",
        "order",
        "How often consecutive tokens go to the same expert",
        "The line is measured, the dashed line is even routing, and the grey bars are the published ranges over eight "
        "domains of Mixtral 8x7B: above the dashed line, tokens in a row share experts more often than by chance.",
        "It does not show why: an expert that is busy anyway is repeated more often, without any order in time.",
        first.denominator + _hold(first),
        f"{PERCENT(_constant(first))} for the first choice, {PERCENT(_constant(either))} for any (even routing, tokens "
        "independent)",
        Lines(panels, "layer", "share of pairs", PERCENT),
        tuple(found),
    )


def _repetition_by_domain(trace: RoutingTrace, options: _Options) -> Iterator[Figure]:
    first, either = stats.repetition(trace, by_domain=True, **options)
    layers = np.arange(trace.n_layers, dtype=np.float64)
    panels = []
    for at, domain in enumerate(trace.domains):
        panel: list[Series] = []
        for name, one, metric in (("first choice", first, "first"), ("any choice", either, "any")):
            assert one.baseline is not None
            panel.append(_series(name, one.value[at], one.low[at], one.high[at]))
            panel.append(Series("even routing", layers, one.baseline[at], role="baseline"))
            panel.extend(_published(trace, metric))
        panels.append((visible(domain), tuple(panel)))
    yield Figure(
        "repetition-domains",
        "order",
        "Repetition in each domain",
        "A panel is a domain: the lower line is of first choices, the upper one of any; dashed lines and grey bars are "
        "even routing and the published ranges of Mixtral 8x7B.",
        "It does not separate the subject from the style: text that repeats its words repeats its experts.",
        first.denominator + _hold(first),
        f"{PERCENT(_constant(first))} for the first choice, {PERCENT(_constant(either))} for any (even routing, tokens "
        "independent)",
        Lines(tuple(panels), "layer", "share of pairs", PERCENT),
    )


def _published(trace: RoutingTrace, metric: str) -> tuple[Series, ...]:
    """Mixtral's ranges, where they can be held beside a model of as many experts and choices."""
    if (trace.experts, trace.top_k) != (8, 2):
        return ()
    ranges = [one for one in published.REPETITION if one.metric == metric]
    deepest = max(one.layer for one in ranges)
    depth = (trace.n_layers - 1) / deepest  # other models: at the same part of their depth
    name = "Mixtral 8x7B, published" + ("" if depth == 1 else " (layers 0, 15, 31 at the same relative depth)")
    x = np.array([one.layer * depth for one in ranges])
    low, high = np.array([one.low for one in ranges]), np.array([one.high for one in ranges])
    return (Series(name, x, (low + high) / 2, low, high, role="published"),)


def _coactivation(trace: RoutingTrace, options: _Options) -> Iterator[Figure]:
    together = stats.coactivation(trace, **options)
    yield Figure(
        "coactivation",
        "order",
        "Which experts are chosen together",
        "Of the tokens that choose the row's expert, the share that also choose the column's.",
        "It does not show that two experts work together: two busy ones meet often, whatever the token is.",
        together.denominator + _hold(together),
        f"{together.baseline_name} ({PERCENT((trace.top_k - 1) / (trace.experts - 1))})",
        _square(trace, together, [f"layer {layer}" for layer in range(trace.n_layers)], "other expert"),
    )


def _transition(trace: RoutingTrace, options: _Options) -> Iterator[Figure]:
    after = stats.transition(trace, **options)
    titles = [f"layer {layer} to layer {layer + 1}" for layer in range(trace.n_layers - 1)]
    yield Figure(
        "transition",
        "order",
        "Where a token goes in the next layer",
        "Of the tokens whose first choice is the row's expert, the share whose first choice in the next layer is the "
        "column's; every row sums to 100 %.",
        "It does not show a cause: the same kinds of token may have experts of their own in both layers.",
        after.denominator + _hold(after),
        f"{after.baseline_name} ({PERCENT(1 / trace.experts)})",
        _square(trace, after, titles, "next expert"),
    )


# ---------------------------------------- cache


def cache_figure(curves: Sequence[Curve], n_experts: int) -> Figure:
    """How often tokens find their experts in memory, by how many are held.

    Args:
        curves: by `octavo.routing.replay.curves`.
        n_experts: in all layers together.
    """
    lines = [
        Series(curve.label, np.array(curve.n_held) / n_experts, np.array(curve.hit_rate, np.float64))
        for curve in curves
    ]
    ends = np.array([0.0, 1.0])
    one = curves[0]
    found = []
    half = int(np.argmin(np.abs(np.array(one.n_held) / n_experts - 0.5)))
    said = "; ".join(f"{curve.label} {PERCENT(curve.hit_rate[half])}" for curve in curves)
    found.append(f"With {one.n_held[half]} of {n_experts} experts held: {said}.")
    return Figure(
        "cache",
        "cache",
        "Hit rate by the share of experts held",
        "A line is a rule for what to keep, and the higher it is, the fewer experts are read from disk; Belady's bound "
        "knows the future, and no rule that keeps whole experts can do better.",
        "It does not show time: reads cost more or less, depending on the disk and on what is computed meanwhile.",
        f"requests for experts by the trace's second half ({one.requests:,}); the first half fills the cache",
        "k/N, the share of experts held: what a cache that knows nothing would find",
        Lines(
            (("", (*lines, Series("k/N", ends, ends, role="baseline"))),),
            "share of experts held",
            "hit rate",
            SHARE,
            SHARE,
            most=1.0,
            ticks=(0.0, 0.25, 0.5, 0.75, 1.0),
        ),
        tuple(found),
    )


# ---------------------------------------- helpers


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _by_layer(grids: tuple[Grid, ...], trace: RoutingTrace, most: float) -> Heatmap:
    return Heatmap(
        grids, _numbers(trace.n_layers), _numbers(trace.experts), "layer", "expert", PERCENT, 0.0, most or 1.0
    )


def _domain_grids(trace: RoutingTrace, measured: Measured) -> tuple[Grid, ...]:
    assert measured.baseline is not None
    value, low, high, base = measured.value, measured.low, measured.high, measured.baseline
    return tuple(
        Grid(visible(domain), value[at], low[at], high[at], base[at]) for at, domain in enumerate(trace.domains)
    )


def _square(trace: RoutingTrace, measured: Measured, titles: Sequence[str], other: str) -> Heatmap:
    assert measured.baseline is not None
    value, low, high, base = measured.value, measured.low, measured.high, measured.baseline
    grids = tuple(Grid(title, value[at], low[at], high[at], base[at]) for at, title in enumerate(titles))
    experts = _numbers(trace.experts)
    return Heatmap(grids, experts, experts, "expert", other, PERCENT, 0.0, _most(measured))


def _most(measured: Measured) -> float:
    """The end of a colour scale: what is even has at most half of the colour."""
    return max(2 * _constant(measured), float(np.nanmax(measured.value, initial=0)))


def _over_layers(y_name: str, measured: Measured, number: Number, *more: Series) -> Lines:
    return Lines((("", (*_measured_and_baseline(measured), *more)),), "layer", y_name, number)


def _measured_and_baseline(measured: Measured) -> Iterator[Series]:
    yield _series("measured", measured.value, measured.low, measured.high)
    if measured.baseline is not None:
        yield _series("baseline", np.broadcast_to(measured.baseline, measured.value.shape), role="baseline")


def _series(name: str, y: Array, low: Array | None = None, high: Array | None = None, role: str = "data") -> Series:
    return Series(name, np.arange(len(y), dtype=np.float64), y, low, high, role)


def _interval(measured: Measured, place: tuple[int, ...] | tuple[np.intp, ...], unit: str = PERCENT.unit) -> str:
    value, low, high = (float(one[place]) for one in (measured.value, measured.low, measured.high))
    return f"{PERCENT.bare(value)}{unit} ({PERCENT.bare(low)} to {PERCENT.bare(high)})"


def _constant(measured: Measured) -> float:
    """A baseline that is the same everywhere."""
    assert measured.baseline is not None
    return float(measured.baseline.flat[0])


def _hold(measured: Measured) -> str:
    return f"; intervals that hold together with {measured.level:.0%} probability".replace("%", PERCENT.unit)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
