"""What weights give away: experts that are copies, routers that do nothing, and what changed between two models."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from octavo.errors import OptionError
from octavo.hub.models import MATRICES, MatrixName
from octavo.routing.experts import (
    Array,
    ExpertLayer,
    Progress,
    RouterLayer,
    best_assignment,
    inner_products,
    pair_products,
)
from octavo.routing.weights import ExpertWeights

Read = Callable[[int], Tensor]

COPY = 1 - 1e-5
"""Cosine from which on two experts are one: rounding to bfloat16 costs about 1e-6."""
NEAR_COPY = 0.9
"""Cosine from which on two experts are near copies: fine-tuned from one dense model, or one with noise added (of less
than half its size). Experts trained as a mixture from the start stay far below."""
COMMON_ORIGIN = 0.1
"""Cosine that every pair of a layer must reach to be of common origin; independent ones have 0 and a spread of
1 / sqrt(D F), which is 0.0001 for Mixtral 8x7B."""
SPREADS = 5
"""So many spreads must lie between 0 and a cosine as well, for small matrices; one spread is at most 1 / S."""
SAME_SPECTRUM = 1e-5
"""Relative distance of spectra below which experts of different layers are one, in whatever order of neurons: float32
costs about 1e-6, and no two trained matrices come so close."""
SAME_ROW = 1 - 1e-5
"""Cosine from which on two router rows are one, where their norms are the same as well."""
SAME_NORM = 1e-2
"""Relative difference up to which two norms are the same."""
WEAK_ROW = 0.1
"""A router row below this share of the layer's median norm is weak: its logit stays near 0 whatever the token."""
RANDOM_MIN_DIM = 256
"""Below it random rows are too alike by chance to be told from trained ones."""
RANDOM_SPREADS = 4
"""A router is random if each cosine is within so many spreads (1 / sqrt(dim)) of 0, and the rows' norms vary no more
than so many times as much as those of random rows would (relatively, 1 / sqrt(2 dim))."""
MOVED = 0.1
"""An expert counts as moved to another place only where that raises its cosine by more than this."""


@dataclass(frozen=True)
class Finding:
    """Something that a user would want to know.

    Attributes:
        kind: of experts "copies", "copies, neurons reordered", "near copies", "common origin", "zero expert", "copies
            across layers"; of routers "not finite", "dead router", "zero row", "weak row", "same router rows", "random
            router".
        layer: where; of copies across layers the first.
        experts: which, in that layer.
        value: the figure that crossed a threshold.
        text: one sentence.
    """

    kind: str
    layer: int
    experts: tuple[int, ...]
    value: float
    text: str


def findings(routers: Sequence[RouterLayer], layers: Sequence[ExpertLayer] = ()) -> list[Finding]:
    """Look for duplicated and upcycled experts and for dead routers: what a merged "4x7B" hides.

    Nothing found is no proof of anything. The thresholds are this module's constants.

    Args:
        routers: see `octavo.routing.experts.analyse_routers`.
        layers: see `octavo.routing.experts.analyse_experts`; may be empty.
    """
    found = [finding for one in routers for finding in _of_router(one)]
    found += [finding for one in layers for finding in _of_experts(one)]
    return found + list(_across_layers(layers))


# ---------------------------------------- routers


def _of_router(one: RouterLayer) -> Iterator[Finding]:
    norms, layer = one.norms, one.layer
    everyone = tuple(range(len(norms)))
    broken = tuple(np.flatnonzero(~np.isfinite(norms)).tolist())
    if broken:
        text = f"router rows {_list(broken)} hold numbers that are not finite: every token's choice is spoilt"
        yield Finding("not finite", layer, broken, float("nan"), text)
        return
    median = float(np.median(norms))
    if not norms.any():
        text = "every router row is zero: all experts get the same logit, and ties decide who is chosen"
        yield Finding("dead router", layer, everyone, 0.0, text)
        return
    zero = tuple(np.flatnonzero(norms == 0).tolist())
    if zero:
        text = f"router rows {_list(zero)} are zero: their logit is 0 whatever the token"
        yield Finding("zero row", layer, zero, 0.0, text)
    weak = tuple(np.flatnonzero((norms > 0) & (norms < WEAK_ROW * median)).tolist())
    if weak:
        value = float(norms[list(weak)].min() / median)
        text = f"router rows {_list(weak)} are short, {value:.2g} of the median norm at least: their logits stay near 0"
        yield Finding("weak row", layer, weak, value, text)
    same = (one.cosine >= SAME_ROW) & (np.abs(norms[:, None] - norms) <= SAME_NORM * np.maximum(norms[:, None], norms))
    groups = _groups(same)
    for group in groups:
        kind, what = ("dead router", "all") if len(group) == len(norms) else ("same router rows", _list(group))
        value = _lowest(one.cosine, group)
        text = f"{what} router rows are the same: these experts get the same logit for every token"
        yield Finding(kind, layer, group, value, text)
    if len(norms) > 2 and not (zero or weak or groups) and _looks_random(one):
        value = _extreme(one.cosine)
        text = (
            f"the router looks random: no cosine of two rows is beyond {value:.3f}, and the norms are alike; "
            "a router that was never trained sends tokens anywhere"
        )
        yield Finding("random router", layer, everyone, value, text)


def _looks_random(one: RouterLayer) -> bool:
    if one.dim < RANDOM_MIN_DIM:
        return False
    spread = float(np.std(one.norms)) / float(np.mean(one.norms))
    limit = RANDOM_SPREADS / math.sqrt(one.dim)
    return spread <= limit / math.sqrt(2) and _extreme(one.cosine) <= limit


# ---------------------------------------- experts


def _of_experts(one: ExpertLayer) -> Iterator[Finding]:
    placed = _over_matrices(one, lambda matrix: one.cosine[matrix])
    matched = _over_matrices(one, lambda matrix: one.matched[matrix])
    either = np.fmax(placed, matched)
    count = len(either)
    told = np.eye(count, dtype=bool)
    empty = tuple(np.flatnonzero(_over_matrices(one, lambda matrix: one.effective_rank[matrix]) == 0).tolist())
    if empty:
        text = f"a matrix of experts {_list(empty)} is all zeros: they add nothing"
        yield Finding("zero expert", one.layer, empty, 0.0, text)
    for kind, cosines, how in (
        ("copies", placed, "are the same"),
        ("copies, neurons reordered", matched, "are the same but for the order of their neurons"),
    ):
        for group in _groups((cosines >= COPY) & ~told):
            value = _lowest(cosines, group)
            yield Finding(kind, one.layer, group, value, f"experts {_list(group)} {how} (cosine {value:.6f})")
        told |= cosines >= COPY
    for group in _groups((either >= NEAR_COPY) & ~told):
        value = _lowest(either, group)
        text = f"experts {_list(group)} are nearly the same (cosine {value:.4f}): "
        text += "tuned from one dense model, or copies with noise"
        yield Finding("near copies", one.layer, group, value, text)
    if count < 2:
        return
    # How far matching got beyond what it gets from independent experts; 1 stays 1.
    beyond = _over_matrices(one, lambda m: (one.matched[m] - one.matched_null[m]) / (1 - one.matched_null[m]))
    kin = np.fmax(placed, beyond)
    value = _lowest(kin, tuple(range(count)))
    if max(COMMON_ORIGIN, SPREADS / one.spectra["w1"].shape[1]) <= value < NEAR_COPY:
        text = (
            f"every pair of experts is alike (cosine {value:.3f} and more, where independent ones have 0): "
            "they have grown from one dense model, or from one start"
        )
        yield Finding("common origin", one.layer, tuple(range(count)), value, text)


def _across_layers(layers: Sequence[ExpertLayer]) -> Iterator[Finding]:
    """Experts of different layers with the same singular values, which neither order nor rotation changes."""
    for one, other in itertools.combinations(layers, 2):
        apart = np.max([_spectral_distance(one.spectra[m], other.spectra[m]) for m in MATRICES], axis=0)
        for i, j in np.argwhere(apart <= SAME_SPECTRUM).tolist():
            text = (
                f"expert {i} has the same singular values in all matrices as expert {j} of layer {other.layer}: "
                "one is a copy of the other"
            )
            yield Finding("copies across layers", one.layer, (i,), float(apart[i, j]), text)


def _spectral_distance(one: np.ndarray, other: np.ndarray) -> Array:
    """[E, E] relative distances; 1 where both are zero: nothing can be told of these."""
    if one.shape != other.shape:
        return np.ones((len(one), len(other)))
    size = np.linalg.norm(one, axis=1)[:, None]
    apart = np.stack([np.linalg.norm(row.astype(np.float64) - other, axis=1) for row in one])
    found: Array = np.divide(apart, size, out=np.ones_like(apart), where=size > 0)
    return found


def _over_matrices(one: ExpertLayer, of: Callable[[str], Array]) -> Array:
    """The lowest of the three matrices."""
    found: Array = np.min([of(matrix) for matrix in MATRICES], axis=0)
    return found


def _groups(linked: np.ndarray) -> list[tuple[int, ...]]:
    """The connected groups of two and more."""
    left, found = set(range(len(linked))), []
    while left:
        group, new = set(), {min(left)}
        while new:
            group |= new
            new = {j for i in new for j in np.flatnonzero(linked[i] | linked[:, i]).tolist()} - group
        left -= group
        if len(group) > 1:
            found.append(tuple(sorted(group)))
    return found


def _lowest(cosines: Array, group: tuple[int, ...]) -> float:
    """Of the group's pairs; nan where one of them has none."""
    return float(np.min([cosines[pair] for pair in itertools.combinations(group, 2)]))


def _extreme(cosines: Array) -> float:
    return float(np.nanmax(np.abs(cosines[~np.eye(len(cosines), dtype=bool)])))


def _list(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


# ---------------------------------------- two models


@dataclass(frozen=True)
class Change:
    """How one router row or one matrix of an expert differs between two models, a and b.

    Attributes:
        layer: which.
        expert: its number in a.
        what: "router", "w1", "w2" or "w3".
        other: its number in b: another one where experts changed places.
        distance: Frobenius norm of b - a, divided by that of a; inf where only a is zero.
        cosine: between the two; nan where one is zero.
    """

    layer: int
    expert: int
    what: str
    other: int
    distance: float
    cosine: float


def diff(
    a: ExpertWeights,
    b: ExpertWeights,
    layers: Sequence[int] | None = None,
    *,
    routers_only: bool = False,
    progress: Progress | None = None,
) -> list[Change]:
    """Compare two models, or two revisions of one, router row by router row and expert by expert.

    Experts that changed places are recognised by their weights (with ``routers_only`` by their router rows) and
    compared with what they became.

    Args:
        a: the one.
        b: the other, of the same shape.
        layers: by default all that have experts.
        routers_only: leave the experts out.
        progress: called with a number of layers that are done.

    Returns:
        What is not finite, then what changed most; of equal changes, the lower layer and expert first.

    Raises:
        OptionError: the models have different shapes.
        UserError: see `ExpertWeights`.
    """
    check_alike(a, b)
    chosen = a.choose_layers(layers)
    found: list[Change] = []
    for layer, rows_a, rows_b in zip(chosen, a.routers(chosen), b.routers(chosen), strict=True):
        sides = (_rows(rows_a), _rows(rows_b))
        if routers_only:
            places = _places([_cosines(a, b, layer, *sides)])
        else:
            places = _places([_cosines(a, b, layer, *_readers(a, b, layer, matrix)) for matrix in MATRICES])
            for matrix in MATRICES:
                found += _changes(layer, matrix, places, *_readers(a, b, layer, matrix))
        found += _changes(layer, "router", places, *sides)
        if progress:
            progress(1)
    return sorted(found, key=_by_size)


def _by_size(one: Change) -> tuple[bool, float, int, int, str]:
    return not math.isnan(one.distance), -one.distance, one.layer, one.expert, one.what


def check_alike(a: ExpertWeights, b: ExpertWeights) -> None:
    """Refuse models of different counts.

    Raises:
        OptionError: other layers or experts.
    """
    for what, of_a, of_b in (
        ("layers", a.n_layers, b.n_layers),
        ("experts a layer", a.n_experts, b.n_experts),
        ("layers with experts", len(a.sparse_layers), len(b.sparse_layers)),
    ):
        if of_a != of_b:
            raise _unlike(a, b, f"{of_a} and {of_b} {what}")
    if a.sparse_layers != b.sparse_layers:
        raise _unlike(a, b, "experts in different layers")


def _unlike(a: ExpertWeights, b: ExpertWeights, what: str) -> OptionError:
    return OptionError(
        f"{a.name} and {b.name} cannot be compared: they have {what}", hint="compare two models of one shape"
    )


def _rows(router: Tensor) -> Read:
    return lambda expert: router[expert : expert + 1]


def _readers(a: ExpertWeights, b: ExpertWeights, layer: int, matrix: MatrixName) -> tuple[Read, Read]:
    return lambda expert: a.expert(layer, expert, matrix), lambda expert: b.expert(layer, expert, matrix)


def _cosines(a: ExpertWeights, b: ExpertWeights, layer: int, read_a: Read, read_b: Read) -> Array:
    """[E of a, E of b]; 0 where a norm is zero or not finite."""
    shapes: set[tuple[int, ...]] = set()
    norms: list[dict[int, float]] = [{}, {}]

    def noting(side: int, read: Read, expert: int) -> Tensor:
        tensor = read(expert)
        shapes.add(tuple(tensor.shape))
        if len(shapes) > 1:
            raise _unlike(
                a, b, f"tensors of shapes {' and '.join(str(list(s)) for s in sorted(shapes))} in layer {layer}"
            )
        if expert not in norms[side]:
            norms[side][expert] = math.sqrt(pair_products(tensor, tensor)[0])
        return tensor

    sides = [functools.partial(noting, side, read) for side, read in enumerate((read_a, read_b))]
    products = inner_products(sides[0], a.n_experts, sides[1])
    size_a, size_b = (np.array([side[expert] for expert in range(a.n_experts)]) for side in norms)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.nan_to_num(products / size_a[:, None] / size_b, nan=0, posinf=0, neginf=0)
    return found


def _places(cosines: Sequence[Array]) -> list[int]:
    """Where each expert of a is found in b: where it was, unless another place is clearly better."""
    mean = np.mean(cosines, axis=0)
    return [int(place) for place in best_assignment(mean + MOVED * np.eye(len(mean)))]


def _changes(layer: int, what: str, places: Sequence[int], read_a: Read, read_b: Read) -> Iterator[Change]:
    for expert, other in enumerate(places):
        aa, bb, ab, apart = pair_products(read_a(expert), read_b(other))
        distance = math.sqrt(apart / aa) if aa else math.inf if apart else 0.0
        cosine = max(-1.0, min(1.0, ab / math.sqrt(aa * bb))) if aa * bb else math.nan
        yield Change(layer, expert, what, other, distance, cosine)
