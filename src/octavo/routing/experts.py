"""Routers and experts compared by their weights alone: no text, no forward pass, no GPU.

Computed in float32 matrix by matrix, and summed in float64 where long sums meet. Of a layer about a third is in memory
at a time for as few and large experts as Mixtral's, less for many small ones.

E experts, D dim, F hidden, S = min(D, F). Independent experts have cosines of 0; what else independence would give is
told beside each figure that it does not leave at 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.errors import CheckpointError, OptionError
from octavo.hub.models import MATRICES, MatrixName
from octavo.routing.weights import ExpertWeights

Array = NDArray[np.float64]
Array32 = NDArray[np.float32]
Progress = Callable[[int], None]

HELD_BYTES = 1 << 30  # of stored matrices, when every pair of them is compared
GRAM_BYTES = 640 << 20
SAMPLE_BYTES = 640 << 20
CHUNK = 1 << 16  # elements of each matrix that are multiplied at a time: they stay in the processor's cache
LARGE = 512  # rows of a matrix from which on two eigenvalue problems side by side pay
ROUNDING = 1e-6  # eigenvalues of a Gram matrix, relative to the largest, below which float32 leaves noise only
NEURONS = 256
HINT_EXTRA = "pip install 'octavo[routing]'"


@dataclass(frozen=True, eq=False)
class RouterLayer:
    """One layer's router.

    Attributes:
        layer: which.
        cosine: float64 [E, E], between router rows; nan where a row is zero or not finite. Independent rows: 0, give
            or take 1 / sqrt(dim).
        norms: float64 [E], Euclidean, of the rows.
        dim: D.
    """

    layer: int
    cosine: Array
    norms: Array
    dim: int


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """One layer's experts. The dicts are by matrix: "w1" (gate), "w2" (down), "w3" (up).

    Attributes:
        layer: which.
        cosine: float64 [E, E], between whole matrices, neuron by neuron as they lie there. Independent: 0.
        matched: float64 [E, E], mean cosine of neurons after the best assignment of ``n_matched`` neurons of the
            expert with the lower number to all of the other's; made symmetric. The assignment is one for all three
            matrices: it maximises the sum of the cosines of w1 rows, w3 rows and w2 columns.
        matched_null: what that gives for independent Gaussian matrices: the best of many is above 0.
        n_matched: neurons of one side.
        spectra: float32 [E, S], singular values, largest first.
        effective_rank: float64 [E], exp of the entropy of the singular values divided by their sum (Roy and
            Vetterli, "The effective rank", EUSIPCO 2007); S at most.
        cka: float64 [E, E], linear CKA (Kornblith and others, ICML 2019) of what w1 makes of white noise, which
            is <G_i, G_j> / (|G_i| |G_j|) with G = w1^T w1: neurons may be in any order. Not centred: the noise has
            mean zero.
        cka_null: what that gives for independent Gaussian matrices, F / (F + D + 1): far above 0.
        ks: int64, 1, 2, 4, ... and S.
        alignment: float64 [E, len(ks)], E_i(k) = |V_k^T r_i|^2, r_i the i-th router row divided by its norm, V_k
            the first k right singular vectors of expert i's w1. Random directions: k / D.
        alignment_null: float64 [E (E - 1), len(ks)], the same of every router row with every other expert's V:
            expert 0's V with rows 1, 2, ..., then expert 1's.
    """

    layer: int
    cosine: dict[str, Array]
    matched: dict[str, Array]
    matched_null: dict[str, float]
    n_matched: int
    spectra: dict[str, Array32]
    effective_rank: dict[str, Array]
    cka: Array
    cka_null: float
    ks: NDArray[np.int64]
    alignment: Array
    alignment_null: Array


def analyse_routers(
    weights: ExpertWeights, layers: Sequence[int] | None = None, progress: Progress | None = None
) -> list[RouterLayer]:
    """Compare the rows of routers.

    Args:
        weights: whose.
        layers: by default all that have a router.
        progress: called with a number of routers that are done.

    Raises:
        UserError: see `ExpertWeights.router`.
    """
    found = []
    for layer, router in zip(weights.choose_layers(layers), weights.routers(layers), strict=True):
        rows = router.numpy().astype(np.float64)
        norms = np.linalg.norm(rows, axis=1)
        found.append(RouterLayer(layer, _cosines(rows @ rows.T), norms, rows.shape[1]))
        if progress:
            progress(1)
    return found


def steps(weights: ExpertWeights, layers: Sequence[int] | None = None) -> int:
    """How often, counted together, `analyse_experts` calls its progress."""
    experts = weights.n_experts
    return len(weights.choose_layers(layers)) * (len(MATRICES) * experts + experts * (experts - 1) // 2)


def analyse_experts(
    weights: ExpertWeights,
    layers: Sequence[int] | None = None,
    *,
    neurons: int = NEURONS,
    progress: Progress | None = None,
) -> Iterator[ExpertLayer]:
    """Compare experts, and experts with routers, layer by layer.

    Args:
        weights: whose.
        layers: by default all that have experts.
        neurons: so many of an expert, chosen at random, are matched with all of each other expert; all of them where
            it has no more.
        progress: called with steps that are done; see `steps`.

    Raises:
        OptionError: a layer that does not exist or is dense; neurons below 1; scipy is not installed.
        CheckpointError: a tensor is missing or damaged, or has values that are not finite.
        HubError: it cannot be fetched.
    """
    chosen = weights.choose_layers(layers)
    if isinstance(neurons, bool) or not isinstance(neurons, int) or neurons < 1:
        raise OptionError(f"neurons is {neurons!r}; expected a whole number from 1 on", hint=f"such as {NEURONS}")
    best_assignment(np.zeros((1, 1), np.float32))  # is scipy there? said now, not after minutes
    return (_analyse(_Layer(weights, layer), neurons, progress or (lambda done: None)) for layer in chosen)


@dataclass(frozen=True)
class _Layer:
    """Reads one layer's matrices, and refuses what cannot be computed with."""

    weights: ExpertWeights
    layer: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def read(self, matrix: MatrixName, expert: int) -> Tensor:
        tensor = self.weights.expert(self.layer, expert, matrix)
        first = self.shapes.setdefault(matrix, tuple(tensor.shape))
        if tuple(tensor.shape) != first:
            raise CheckpointError(
                f"{self.weights.name}: {matrix} of expert {expert} in layer {self.layer} has shape "
                f"{list(tensor.shape)}, that of expert 0 {list(first)}",
                hint="experts of different sizes cannot be compared",
            )
        return tensor

    def array(self, matrix: MatrixName, expert: int) -> Array32:
        found: Array32 = self.read(matrix, expert).to(torch.float32, copy=True).numpy()  # callers write to it
        return found


def _analyse(layer: _Layer, neurons: int, progress: Progress) -> ExpertLayer:
    count = layer.weights.n_experts
    cosine: dict[str, Array] = {}
    for matrix in MATRICES:
        products = inner_products(functools.partial(layer.read, matrix), count)
        _refuse_not_finite(layer, matrix, products)
        cosine[matrix] = _cosines(products)
    width, dim = layer.shapes["w1"]
    _check_shapes(layer, width, dim)
    decomposed = _decompose(layer, progress)
    n_matched = min(neurons, width)
    return ExpertLayer(
        layer.layer,
        cosine,
        _match_all(layer, n_matched, progress),
        dict(_null(width, dim, n_matched)),
        n_matched,
        **decomposed,
    )


def _refuse_not_finite(layer: _Layer, matrix: str, products: Array) -> None:
    wrong = np.flatnonzero(~np.isfinite(np.diag(products)))
    if len(wrong):
        raise CheckpointError(
            f"{layer.weights.name}: {matrix} of expert {wrong[0]} in layer {layer.layer} is not finite everywhere",
            hint="the checkpoint is damaged; `--routers` looks at the routers alone",
        )


def _check_shapes(layer: _Layer, width: int, dim: int) -> None:
    router = layer.weights.router(layer.layer)
    if layer.shapes["w3"] != (width, dim) or layer.shapes["w2"] != (dim, width) or router.shape[1] != dim:
        shapes = ", ".join(f"{matrix} {list(layer.shapes[matrix])}" for matrix in MATRICES)
        raise CheckpointError(
            f"{layer.weights.name}: the matrices of layer {layer.layer} do not fit together: {shapes}, "
            f"router {list(router.shape)}",
            hint="expected w1 and w3 [hidden, dim], w2 [dim, hidden], router [experts, dim]",
        )


# ---------------------------------------- inner products


def inner_products(left: Callable[[int], Tensor], count: int, right: Callable[[int], Tensor] | None = None) -> Array:
    """Return the inner products of matrices with one another, or with those of another model.

    So many are held at a time as ``HELD_BYTES`` allows, as they are stored.

    Args:
        left: reads the i-th.
        count: of matrices, on each side.
        right: reads the i-th of the other side.

    Returns:
        float64 [count, count].
    """
    out = np.zeros((count, count))
    nbytes = max(1, left(0).nbytes) if count else 1
    share = 1 if right is None and count * nbytes <= HELD_BYTES else 2
    size = max(1, HELD_BYTES // (share * nbytes))
    starts = range(0, count, size)
    for i in starts:
        rows = [left(index) for index in range(i, min(i + size, count))]
        for j in starts:
            if right is None and j < i:
                continue
            columns = rows if right is None and j == i else [(right or left)(k) for k in range(j, min(j + size, count))]
            found = _dots(rows, columns)
            out[i : i + len(rows), j : j + len(columns)] = found
            if right is None:
                out[j : j + len(columns), i : i + len(rows)] = found.T
            del columns
    return out


def _dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Array:
    """Inner products of tensors of one size: float32 within chunks, float64 over them."""
    out = torch.zeros(len(left), len(right), dtype=torch.float64)
    rows, columns = [t.reshape(-1) for t in left], [t.reshape(-1) for t in right]
    same = left is right
    for begin in range(0, rows[0].numel(), CHUNK):
        x = torch.stack([t[begin : begin + CHUNK].float() for t in rows])
        y = x if same else torch.stack([t[begin : begin + CHUNK].float() for t in columns])
        out += x @ y.T
    return out.numpy()


def pair_products(a: Tensor, b: Tensor) -> tuple[float, float, float, float]:
    """Return <a, a>, <b, b>, <a, b> and <a - b, a - b> of two tensors of one size, as exactly as `inner_products`."""
    sums = np.zeros(4)
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for begin in range(0, flat_a.numel(), CHUNK):
        x, y = (t[begin : begin + CHUNK].float() for t in (flat_a, flat_b))
        z = x - y
        sums += [float(u @ v) for u, v in ((x, x), (y, y), (x, y), (z, z))]
    aa, bb, ab, apart = sums.tolist()
    return aa, bb, ab, apart


def _cosines(products: Array) -> Array:
    """Inner products divided by the norms, which are on the diagonal; nan where one is zero or not finite."""
    norms = np.sqrt(np.diag(products))
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = products / norms[:, None] / norms
    return np.clip(found, -1, 1)


# ---------------------------------------- spectra, CKA, alignment


def _decompose(layer: _Layer, progress: Progress) -> dict[str, Any]:
    """Fields of `ExpertLayer` that come from Gram matrices. They square the condition of a matrix: see ROUNDING."""
    count = layer.weights.n_experts
    router = layer.weights.router(layer.layer).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        directions = (router / np.linalg.norm(router, axis=1, keepdims=True)).T  # [D, E]
    width, dim = layer.shapes["w1"]
    smaller = min(width, dim)
    ks = np.array(sorted({*(1 << n for n in range(smaller.bit_length())), smaller}), dtype=np.int64)
    aligned = np.empty((count, count, len(ks)))  # [V of, row of, k]
    spectra: dict[str, list[Array32]] = {matrix: [] for matrix in MATRICES}
    held: list[Tensor] = []
    room = max(1, GRAM_BYTES // (4 * dim * dim))
    products = np.empty((count, count))
    for expert in range(count):
        w1 = layer.array("w1", expert)
        gram = w1.T @ w1
        singular, projected = _project(w1, gram, directions)
        spectra["w1"].append(singular)
        aligned[expert] = np.cumsum(np.square(projected, dtype=np.float64), axis=0)[ks - 1].T
        del w1
        _compare_gram(products, held, expert, torch.from_numpy(gram), 0, room)
        del gram
        progress(1)
        for matrix, found in zip(("w2", "w3"), _two_spectra(layer, expert), strict=True):
            spectra[matrix].append(found)
        progress(2)
    for first in range(room, count, room):  # where not all Gram matrices fit into memory, they are made anew
        held.clear()
        for expert in range(first, count):
            w1 = layer.array("w1", expert)
            _compare_gram(products, held, expert, torch.from_numpy(w1.T @ w1), first, room)
    others = ~np.eye(count, dtype=bool)
    return {
        "spectra": {matrix: np.stack(found) for matrix, found in spectra.items()},
        "effective_rank": {m: np.array([effective_rank(one) for one in found]) for m, found in spectra.items()},
        "cka": _cosines(products),
        "cka_null": width / (width + dim + 1),
        "ks": ks,
        "alignment": aligned[~others],
        "alignment_null": aligned[others],
    }


def _compare_gram(products: Array, held: list[Tensor], expert: int, gram: Tensor, first: int, room: int) -> None:
    """Multiply a Gram matrix with those held, of the experts from ``first`` on; hold it too while there is room."""
    if len(held) < room:
        held.append(gram)
    found = _dots([gram], held)[0]
    products[expert, first : first + len(held)] = products[first : first + len(held), expert] = found


def _project(w1: Array32, gram: Array32, directions: Array32) -> tuple[Array32, Array32]:
    """Return w1's singular values [S], largest first, and V^T directions [S, E]."""
    width, dim = w1.shape
    if width >= dim:
        values, vectors = torch.linalg.eigh(torch.from_numpy(gram))
        return _singular(values.numpy()), (vectors.numpy().T @ directions)[::-1]
    # Fewer neurons than inputs: w1 = U s V^T, so V^T r = U^T w1 r / s, and the smaller matrix is decomposed.
    values, vectors = torch.linalg.eigh(torch.from_numpy(w1 @ w1.T))
    singular = _singular(values.numpy())
    projected = (vectors.numpy().T @ (w1 @ directions))[::-1]
    kept = singular > 0
    projected[kept] /= singular[kept, None]
    projected[~kept] = 0
    return singular, projected


def _two_spectra(layer: _Layer, expert: int) -> list[Array32]:
    """The singular values of w2 and w3, side by side: an eigenvalue problem alone mostly waits for memory."""
    grams = [_smaller_gram(layer.array(matrix, expert)) for matrix in ("w2", "w3")]
    threads = torch.get_num_threads()
    if threads == 1 or len(grams[0]) < LARGE:
        return [_spectrum(gram) for gram in grams]
    try:
        with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(max(1, threads // 2),)) as pool:
            return list(pool.map(_spectrum, grams))
    finally:
        torch.set_num_threads(threads)  # it is the whole process's in some of torch's libraries


def _smaller_gram(matrix: Array32) -> Array32:
    rows, columns = matrix.shape
    found: Array32 = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    return found


def _spectrum(gram: Array32) -> Array32:
    return _singular(torch.linalg.eigvalsh(torch.from_numpy(gram)).numpy())


def _singular(eigenvalues: Array32) -> Array32:
    """Singular values, largest first, of a Gram matrix's eigenvalues in rising order."""
    floor = ROUNDING * max(float(eigenvalues[-1]), 0.0)
    found: Array32 = np.sqrt(np.where(eigenvalues > floor, eigenvalues, 0))[::-1]
    return np.ascontiguousarray(found)


def effective_rank(singular: NDArray[np.floating[Any]]) -> float:
    """exp of the entropy of singular values divided by their sum (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = np.sum(singular, dtype=np.float64)
    if not total > 0:
        return 0.0
    shares = singular[singular > 0].astype(np.float64) / total
    return float(np.exp(-np.sum(shares * np.log(shares))))


# ---------------------------------------- matching neurons


@dataclass(frozen=True)
class _Neurons:
    """Neurons with each part divided by its norm: w1 and w3 rows [n, D], w2 columns [D, n]."""

    w1: Array32
    w2: Array32
    w3: Array32

    @classmethod
    def of(cls, w1: Array32, w2: Array32, w3: Array32) -> _Neurons:
        """Divides in place."""
        for matrix, axis in ((w1, 1), (w2, 0), (w3, 1)):
            tensor = torch.from_numpy(matrix)
            tensor /= torch.linalg.vector_norm(tensor, dim=axis, keepdim=True).clamp(min=torch.finfo(tensor.dtype).tiny)
        return cls(w1, w2, w3)

    def take(self, index: NDArray[np.int64]) -> _Neurons:
        return _Neurons(self.w1[index], np.ascontiguousarray(self.w2[:, index]), self.w3[index])

    def similarity(self, other: _Neurons) -> Array32:
        """The sum of the three cosines, [n, n of other]."""
        found: Array32 = self.w1 @ other.w1.T
        found += self.w3 @ other.w3.T
        found += self.w2.T @ other.w2
        return found

    def cosines(self, other: _Neurons) -> dict[str, float]:
        """Mean cosine of neurons with those at the same place."""
        return {
            "w1": float(np.mean(np.einsum("nd,nd->n", self.w1, other.w1), dtype=np.float64)),
            "w2": float(np.mean(np.einsum("dn,dn->n", self.w2, other.w2), dtype=np.float64)),
            "w3": float(np.mean(np.einsum("nd,nd->n", self.w3, other.w3), dtype=np.float64)),
        }


def _match_all(layer: _Layer, n_matched: int, progress: Progress) -> dict[str, Array]:
    """Match a sample of each expert with all neurons of every later one."""
    count, (width, dim) = layer.weights.n_experts, layer.shapes["w1"]
    index = np.sort(np.random.default_rng(0).choice(width, n_matched, replace=False))
    matched: dict[str, Array] = {matrix: np.eye(count) for matrix in MATRICES}
    room = max(1, SAMPLE_BYTES // (12 * n_matched * dim))  # three float32 vectors a neuron
    for first in range(0, count, room):
        samples: list[_Neurons] = []
        for j in range(first, count):
            whole = _Neurons.of(*(layer.array(matrix, j) for matrix in ("w1", "w2", "w3")))
            for i, sample in enumerate(samples, first):
                for matrix, value in match(sample, whole).items():
                    matched[matrix][i, j] = matched[matrix][j, i] = value
                progress(1)
            if len(samples) < room:
                samples.append(whole.take(index))
            del whole
    return matched


def match(sample: _Neurons, whole: _Neurons) -> dict[str, float]:
    """Mean cosines, by matrix, of a sample's neurons with those that the best assignment gives them."""
    return sample.cosines(whole.take(best_assignment(sample.similarity(whole))))


@functools.lru_cache(maxsize=8)
def _null(width: int, dim: int, n_matched: int) -> tuple[tuple[str, float], ...]:
    """What matching finds in independent Gaussian matrices; of small samples the mean over several."""
    rng = np.random.default_rng(1)

    def neurons(count: int) -> _Neurons:
        shapes = ((count, dim), (dim, count), (count, dim))
        return _Neurons.of(*(rng.standard_normal(shape, dtype=np.float32) for shape in shapes))

    whole = neurons(width)
    draws = [match(neurons(n_matched), whole) for _ in range(min(16, max(1, NEURONS // n_matched)))]
    return tuple((matrix, float(np.mean([draw[matrix] for draw in draws]))) for matrix in MATRICES)


def best_assignment(similarity: Array32 | Array) -> NDArray[np.int64]:
    """Return for each row a column of its own, so that the sum of what they pick is the largest (Hungarian method).

    Args:
        similarity: [n, at least n].

    Raises:
        OptionError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise OptionError("matching needs scipy, which is not installed", hint=HINT_EXTRA) from None
    columns: NDArray[np.int64] = linear_sum_assignment(similarity, maximize=True)[1]
    return columns


# ---------------------------------------- for files


def as_arrays(routers: Sequence[RouterLayer], layers: Sequence[ExpertLayer]) -> dict[str, NDArray[Any]]:
    """Return all of it as arrays with the layers along the first axis, such as "router_cosine" [L, E, E]; for npz.

    Matrices are part of the names: "cosine_w1" [L, E, E], "matched_w1", "matched_null_w1" [L], "spectra_w1" [L, E, S],
    "effective_rank_w1" [L, E].
    """
    found: dict[str, NDArray[Any]] = {}
    if routers:
        found["router_layers"] = np.array([one.layer for one in routers])
        found["router_cosine"] = np.stack([one.cosine for one in routers])
        found["router_norms"] = np.stack([one.norms for one in routers])
    if layers:
        found["layers"] = np.array([one.layer for one in layers])
        for name in ("cka", "cka_null", "alignment", "alignment_null", "n_matched"):
            found[name] = np.array([getattr(one, name) for one in layers])
        found["ks"] = layers[0].ks
        for name in ("cosine", "matched", "matched_null", "spectra", "effective_rank"):
            for matrix in MATRICES:
                found[f"{name}_{matrix}"] = np.array([getattr(one, name)[matrix] for one in layers])
    return found


def as_json(one: RouterLayer | ExpertLayer) -> dict[str, Any]:
    """Return a layer as what JSON can hold, nan as null; without spectra, which are long: `as_arrays` has them."""
    return {name: _plain(value) for name, value in vars(one).items() if name != "spectra"}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(inner) for inner in value] if value.ndim > 1 else [_plain(inner) for inner in value.tolist()]
    return None if isinstance(value, float) and not np.isfinite(value) else value
