"""What the weights of routers and experts say, as figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from octavo.routing import published
from octavo.routing.compare import Finding
from octavo.routing.experts import ExpertLayer, RouterLayer
from octavo.routing.report.kinds import PLAIN, Array, Figure, Grid, Heatmap, Lines, Number, Series, Table

MATRICES = ("w1", "w2", "w3")
MIXTRAL_DIM = 4096
POINTS = 60  # of a spectrum's line
FEW = 8  # experts that have a line each
_COSINE = Number(3)


def router_figures(routers: Sequence[RouterLayer]) -> Iterator[Figure]:
    """Figures of the routers alone.

    Args:
        routers: one a layer, at least one.
    """
    experts = _numbers(len(routers[0].norms))
    cosines = [_off_diagonal(one.cosine) for one in routers]
    deviation = 1 / math.sqrt(routers[0].dim)
    yield Figure(
        "router-cosine",
        "weights",
        "How alike the rows of a router are",
        "A cell is the cosine of two experts' router rows: blue means that the router likes the same tokens for both, "
        "orange that it likes one where it dislikes the other.",
        "It does not show how often both are chosen, which depends on the tokens that come; see co-activation.",
        "cosines of two rows; the diagonal, always 1, is left out",
        f"0, give or take {deviation:.3f}: independent rows of {routers[0].dim:,} numbers",
        _signed([f"layer {one.layer}" for one in routers], cosines, experts),
        (f"The rows most alike: {_extreme([f'layer {one.layer}' for one in routers], cosines)}.",),
    )
    norms = np.stack([one.norms for one in routers])
    yield Figure(
        "router-norms",
        "weights",
        "How long the rows of the routers are",
        "A cell is the length of an expert's router row: the longer, the higher and the lower the scores that the "
        "expert can get.",
        "It does not show load: a long row makes scores large on both sides of zero.",
        "Euclidean norms",
        "",
        Heatmap(
            (Grid("", norms),),
            tuple(str(one.layer) for one in routers),
            experts,
            "layer",
            "expert",
            PLAIN,
            0.0,
            float(np.nanmax(norms)) or 1.0,
        ),
    )


def expert_figures(layers: Sequence[ExpertLayer]) -> Iterator[Figure]:
    """Figures of the experts, and of how the routers fit them.

    Args:
        layers: one at least.
    """
    yield from _cosines(layers)
    yield _cka(layers)
    yield from _spectra(layers)
    yield _alignment(layers)


def findings_figure(findings: Sequence[Finding]) -> Figure:
    """What the detector of copies and dead routers says."""
    rows = tuple((one.layer, one.kind, ", ".join(map(str, one.experts)), one.text) for one in findings)
    return Figure(
        "findings",
        "weights",
        "Copies, near copies and dead routers",
        "A row is something that separately trained experts and a router in use would not show.",
        "It finds only what can be seen in the weights; experts may differ in numbers and still do the same.",
        "all layers that were looked at",
        "",
        Table(("layer", "finding", "experts", "measured"), rows),
        () if rows else ("The detector of copies and dead routers found nothing.",),
    )


def _cosines(layers: Sequence[ExpertLayer]) -> Iterator[Figure]:
    titles = [f"layer {layer.layer}, {matrix}" for layer in layers for matrix in MATRICES]
    experts = _numbers(len(layers[0].cka))
    plain = [_off_diagonal(layer.cosine[matrix]) for layer in layers for matrix in MATRICES]
    yield Figure(
        "experts-cosine",
        "weights",
        "How alike the experts are, number by number",
        "A cell is the cosine of the same matrix of two experts, taken as one long row of numbers: near 1 one is a "
        "copy of the other.",
        "It misses experts that do the same with their neurons in another order; the next figure does not.",
        "cosines of whole matrices; the diagonal, always 1, is left out",
        "0: experts that were trained from independent beginnings",
        _signed(titles, plain, experts, together=len(MATRICES)),
        (f"The experts most alike, number by number: {_extreme(titles, plain)}.",),
    )
    matched = [_off_diagonal(layer.matched[matrix]) for layer in layers for matrix in MATRICES]
    nulls = [layer.matched_null[matrix] for layer in layers for matrix in MATRICES]
    yield Figure(
        "experts-matched",
        "weights",
        "How alike the experts are after pairing their neurons",
        f"Before two experts are compared, {layers[0].n_matched:,} neurons of one are each paired with the neuron of "
        "the other that fits best; a cell is the mean cosine of these pairs.",
        "It does not show that two experts compute the same: paired neurons may be alike and still not equal.",
        "mean cosines of paired neurons",
        f"{min(nulls):.3f} to {max(nulls):.3f}, by matrix: the best pairs of independent random numbers",
        _signed(titles, matched, experts, nulls, together=len(MATRICES)),
        (f"The experts most alike after pairing: {_extreme(titles, matched)}.",),
    )


def _cka(layers: Sequence[ExpertLayer]) -> Figure:
    titles = [f"layer {layer.layer}" for layer in layers]
    values = [_off_diagonal(layer.cka) for layer in layers]
    grids = tuple(
        Grid(title, one, baseline=layer.cka_null) for title, one, layer in zip(titles, values, layers, strict=True)
    )
    experts = _numbers(len(layers[0].cka))
    return Figure(
        "experts-cka",
        "weights",
        "Whether experts see the same directions",
        "A cell is the linear CKA of what two experts' w1 make of random input: 1 means that they see the same "
        "directions with the same strength, whatever the order of their neurons.",
        "Independent experts are far above 0 here, because many neurons see nearly every direction: compare with the "
        "baseline.",
        "linear CKA, not centred; the diagonal, always 1, is left out",
        f"{layers[0].cka_null:.3f}: independent random matrices of this shape",
        Heatmap(grids, experts, experts, "expert", "other expert", _COSINE, 0.0, 1.0),
    )


def _spectra(layers: Sequence[ExpertLayer]) -> Iterator[Figure]:
    panels = []
    for layer in layers:
        for matrix in MATRICES:
            panels.append((f"layer {layer.layer}, {matrix}", tuple(_spectrum(layer.spectra[matrix]))))
    size = layers[0].spectra["w1"].shape[1]
    lines = (
        "a line is an expert" if len(layers[0].cka) <= FEW else "the line is the median expert, the band all of them"
    )
    yield Figure(
        "spectra",
        "weights",
        "Singular values of the experts",
        f"From left to right the {size:,} directions of a matrix, strongest first, and how strong each is; {lines}.",
        "It does not show what the directions mean, and a flat line is not a fault: random matrices have one too.",
        "singular values, at some 60 places of the row; those too small for float32 to tell from 0 are not drawn",
        "",
        Lines(
            tuple(panels), "place in the row", "singular value", PLAIN, log_x=True, log_y=True, together=len(MATRICES)
        ),
    )
    rows = tuple(str(layer.layer) for layer in layers)
    grids = tuple(Grid(matrix, np.stack([layer.effective_rank[matrix] for layer in layers])) for matrix in MATRICES)
    values = np.concatenate([grid.values.ravel() for grid in grids])
    yield Figure(
        "effective-rank",
        "weights",
        "Effective rank of the experts",
        "A cell is the number of equally strong directions that would be as spread out as an expert's are.",
        "It does not show how many directions the expert needs: weak ones may matter.",
        "exp of the entropy of the singular values, taken as shares of their sum",
        f"{size:,} is the most there can be",
        Heatmap(
            grids,
            rows,
            _numbers(len(layers[0].cka)),
            "layer",
            "expert",
            Number(0),
            float(values.min()) * 0.98,
            float(values.max()),
        ),
    )


def _spectrum(values: Array) -> Iterator[Series]:
    size = values.shape[1]
    places = np.unique(np.geomspace(1, size, POINTS).round().astype(int))
    shown, x = values[:, places - 1].astype(np.float64), places.astype(np.float64)
    if len(values) <= FEW:
        for expert, line in enumerate(shown):
            yield Series(f"expert {expert}", x, line)
    else:
        yield Series("median expert", x, np.median(shown, axis=0), shown.min(axis=0), shown.max(axis=0))


def _alignment(layers: Sequence[ExpertLayer]) -> Figure:
    panels, found = [], []
    dim = int(layers[0].ks[-1])
    for layer in layers:
        x, own, others = layer.ks.astype(np.float64), layer.alignment, layer.alignment_null
        low, high = np.quantile(others, (0.05, 0.95), axis=0)
        series = [
            Series("own expert", x, own.mean(axis=0), own.min(axis=0), own.max(axis=0)),
            Series("other experts", x, others.mean(axis=0), low, high, role="baseline"),
        ]
        if dim == MIXTRAL_DIM:
            means = published.ALIGNMENT
            at, values = (np.array([getattr(one, name) for one in means], np.float64) for name in ("k", "value"))
            series.append(Series("Mixtral 8x7B, published mean", at, values, values, values, role="published"))
        panels.append((f"layer {layer.layer}", tuple(series)))
        middle = int(np.argmin(np.abs(layer.ks - dim / 8)))  # far enough from both ends, where all is alike
        found.append(
            f"Layer {layer.layer}, {layer.ks[middle]:,} directions: {own[:, middle].mean():.3f} of a row lies in its "
            f"own expert's, {others[:, middle].mean():.3f} in another's."
        )
    told = ", ".join(f"{one.value:.3f} at k = {one.k}" for one in published.ALIGNMENT)
    found.append(
        f"Published means of Mixtral 8x7B, over all layers: {told}, of {MIXTRAL_DIM:,} directions; with fewer, "
        "the same k holds more by chance."
    )
    return Figure(
        "alignment",
        "alignment",
        "How much of a router row lies in its expert's strongest directions",
        "From left to right more of the directions that w1 is strongest in, and how much of the row they hold: the "
        "line is the mean of rows with their own experts (the band from the lowest to the highest), the dashed one of "
        "rows with other experts (the band from 5 to 95\u00a0%).",
        "It does not show that routing is right: a row may well point elsewhere, and tokens lie elsewhere too.",
        "squared length of the row's part in the first k right singular vectors of w1; rows have length 1",
        "every row with every other expert: exact, not sampled",
        Lines(
            tuple(panels),
            "directions k",
            "share of the row",
            PLAIN,
            log_x=True,
            most=1.0,
            ticks=tuple(float(k) for k in layers[0].ks[::3]),
        ),
        tuple(found),
    )


def _signed(
    titles: Sequence[str],
    values: Sequence[Array],
    names: tuple[str, ...],
    nulls: Sequence[float] = (),
    together: int = 1,
) -> Heatmap:
    """Square panels of cosines, on one scale of two sides."""
    bases: Sequence[float | None] = nulls or [None] * len(values)
    grids = tuple(Grid(title, one, baseline=base) for title, one, base in zip(titles, values, bases, strict=True))
    span = max((float(np.nanmax(np.abs(one))) for one in values if np.isfinite(one).any()), default=1.0) or 1.0
    return Heatmap(grids, names, names, "expert", "other expert", _COSINE, -span, span, middle=0.0, together=together)


def _extreme(titles: Sequence[str], values: Sequence[Array]) -> str:
    """Where the largest value is."""
    stacked = np.stack(values)
    if not np.isfinite(stacked).any():
        return "none"
    place = np.unravel_index(int(np.nanargmax(stacked)), stacked.shape)
    return f"{place[1]} and {place[2]} of {titles[int(place[0])]}, with a cosine of {_COSINE(float(stacked[place]))}"


def _off_diagonal(square: Array) -> Array:
    found = np.array(square, np.float64)
    np.fill_diagonal(found, np.nan)
    return found


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))
