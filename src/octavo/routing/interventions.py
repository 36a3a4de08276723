"""What can stand in for a router's choice: experts disabled, swapped or forced, more or fewer of them, or chance.

Each intervention takes the `Routing` that the ones before it left, and gives another of which the same holds as of a
router's own: ids are distinct, best first, and the weights are the softmax of the chosen logits. Where an intervention
leaves a token's choice and its logits alone, the weights stay the same bit for bit. Layers are counted from 0 among
those that have routers; layer None, "*" as text, is all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.args import MoEArgs
from octavo.errors import OptionError
from octavo.hooks import Choose, rerouted
from octavo.model import Mixtral, Router, Routing

Array = npt.NDArray[Any]
Change = Callable[[Router, Tensor, Routing], Routing]
NEVER = float("-inf")  # the logit of an expert that must not be chosen
PARALLEL = 1e-4  # of two unit directions: what is left of one without the other, below which they count as the same


class Intervention(ABC):
    """What all have in common; `str` gives the text that `parse_intervention` reads."""

    layer: int | None  # None: all

    def at(self, layer: int) -> bool:
        """Whether a layer is meant."""
        return self.layer is None or self.layer == layer

    @abstractmethod
    def begin(self) -> Change:
        """Start: what is random begins with its seed."""

    def control(self, random: np.random.Generator, n_experts: int) -> Intervention | None:
        """One of the same kind that means chance's experts or direction; None where there is no such."""
        return None

    @property
    def named(self) -> tuple[int, ...]:
        """The experts it names."""
        return ()


@dataclass(frozen=True)
class _OfExperts(Intervention):
    """What concerns some experts alike."""

    layer: int | None
    experts: tuple[int, ...]

    def control(self, random: np.random.Generator, n_experts: int) -> Intervention | None:
        """As many others."""
        others = _others(self.experts, random, n_experts)
        return None if others is None else replace(self, experts=others)

    @property
    def named(self) -> tuple[int, ...]:
        """The experts it names."""
        return self.experts


@dataclass(frozen=True)
class Disable(_OfExperts):
    """The experts are never chosen: the next best take over, and the weights sum to 1 again.

    Args:
        layer: None for all.
        experts: of each such layer.
    """

    def __str__(self) -> str:
        return f"disable:{_star(self.layer)}:{_list(self.experts)}"

    def begin(self) -> Change:
        """See `Intervention`."""

        def change(router: Router, x_TD: Tensor, routing: Routing) -> Routing:
            experts = torch.tensor(self.experts, device=routing.logits_TE.device)
            logits_TE = routing.logits_TE.index_fill(1, experts, NEVER)
            return _chosen_anew(routing, logits_TE, routing.topk_ids_TK.shape[1])

        return change


@dataclass(frozen=True)
class Swap(Intervention):
    """Tokens that chose expert a get b, and those that chose b get a."""

    layer: int | None
    a: int
    b: int

    def __str__(self) -> str:
        return f"swap:{_star(self.layer)}:{self.a},{self.b}"

    def begin(self) -> Change:
        """See `Intervention`."""

        def change(router: Router, x_TD: Tensor, routing: Routing) -> Routing:
            other = torch.arange(routing.logits_TE.shape[1], device=routing.logits_TE.device)
            other[[self.a, self.b]] = other[[self.b, self.a]]
            return Routing(other[routing.topk_ids_TK], routing.topk_weights_TK, routing.logits_TE[:, other])

        return change

    def control(self, random: np.random.Generator, n_experts: int) -> Intervention | None:
        """Another pair of experts, both of them others."""
        others = _others(self.named, random, n_experts)
        return None if others is None else replace(self, a=others[0], b=others[1])

    @property
    def named(self) -> tuple[int, ...]:
        """The experts it names."""
        return self.a, self.b


@dataclass(frozen=True)
class Force(_OfExperts):
    """The experts are always among the chosen, in the place of the last ones where they were not.

    Their weights come from their own logits, so that one whom the router likes little still says little.

    Args:
        layer: None for all.
        experts: at most as many as a token gets.
    """

    def __str__(self) -> str:
        return f"force:{_star(self.layer)}:{_list(self.experts)}"

    def begin(self) -> Change:
        """See `Intervention`."""

        def change(router: Router, x_TD: Tensor, routing: Routing) -> Routing:
            ids_TK = routing.topk_ids_TK.clone()
            places = torch.arange(ids_TK.shape[1], device=ids_TK.device)
            forced = torch.tensor(self.experts, device=ids_TK.device)
            for expert in self.experts:
                absent = ~(ids_TK == expert).any(dim=1)
                last = places.where(~torch.isin(ids_TK, forced), -1).argmax(dim=1)
                ids_TK[absent, last[absent]] = expert
            best_first = routing.logits_TE.gather(1, ids_TK).argsort(dim=1, descending=True, stable=True)
            return _weighed(routing, routing.logits_TE, ids_TK.gather(1, best_first))

        return change


@dataclass(frozen=True)
class TopK(Intervention):
    """Another number of experts a token, from 1 to all of them."""

    k: int
    layer: int | None = None

    def __str__(self) -> str:
        return f"topk:{_star(self.layer)}:{self.k}"

    def begin(self) -> Change:
        """See `Intervention`."""
        return lambda router, x_TD, routing: _chosen_anew(routing, routing.logits_TE, self.k)


@dataclass(frozen=True, eq=False)
class Project(Intervention):
    """Remove from an expert's router row what lies along directions: the router no longer sees them.

    Args:
        layer: one layer; its router reads activations that no other layer has.
        expert: whose row.
        directions: [D], or [k, D] for a space of k dimensions; of any length and at any angle to each other.
        name: of the file they are from, for `str`.

    Raises:
        OptionError: not of one or two dimensions, not finite, zero, or one is a sum of the others.
    """

    layer: int
    expert: int
    directions: Array
    name: str = ""
    basis: Array = field(init=False, repr=False)  # [k, D], float32, orthonormal: the same space

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", _orthonormal(np.asarray(self.directions), str(self)))

    def __str__(self) -> str:
        return f"project:{self.layer}:{self.expert}:{self.name or 'DIRECTIONS'}"

    def begin(self) -> Change:
        """See `Intervention`."""
        return _projecting(self.expert, torch.from_numpy(self.basis))

    def control(self, random: np.random.Generator, n_experts: int) -> RandomProject:
        """As many random directions."""
        return RandomProject(self.layer, self.expert, int(random.integers(1 << 31)), len(self.basis))

    @property
    def named(self) -> tuple[int, ...]:
        """The experts it names."""
        return (self.expert,)


@dataclass(frozen=True)
class RandomProject(Intervention):
    """`Project`'s control: as many directions, drawn evenly from all there are."""

    layer: int
    expert: int
    seed: int = 0
    dimensions: int = 1

    def __str__(self) -> str:
        more = "" if self.dimensions == 1 else f"x{self.dimensions}"
        return f"random-project:{self.layer}:{self.expert}:{self.seed}{more}"

    def basis(self, dim: int) -> Array:
        """The directions: [dimensions, dim], float32, orthonormal."""
        drawn = np.random.default_rng([self.seed, self.layer, self.expert]).standard_normal((self.dimensions, dim))
        return _orthonormal(drawn, str(self))

    def begin(self) -> Change:
        """See `Intervention`."""
        made: list[Change] = []

        def change(router: Router, x_TD: Tensor, routing: Routing) -> Routing:
            if not made:  # only now the width is known
                made.append(_projecting(self.expert, torch.from_numpy(self.basis(x_TD.shape[1]))))
            return made[0](router, x_TD, routing)

        return change

    @property
    def named(self) -> tuple[int, ...]:
        """The experts it names."""
        return (self.expert,)


@dataclass(frozen=True)
class Shuffled(Intervention):
    """Each token gets what another token of the same forward chose: ids, weights and logits.

    The tokens of a forward form one random cycle, another one in each layer and forward, so that nobody keeps his own
    and each expert's load in the layer is exactly what its router gave. A forward of one token stays as it is.
    """

    seed: int = 0
    layer: int | None = None

    def __str__(self) -> str:
        return f"shuffle:{_star(self.layer)}:{self.seed}"

    def begin(self) -> Change:
        """See `Intervention`."""
        random = torch.Generator().manual_seed(self.seed)

        def change(router: Router, x_TD: Tensor, routing: Routing) -> Routing:
            cycle = torch.randperm(len(x_TD), generator=random)
            source = torch.empty_like(cycle)
            source[cycle] = cycle.roll(1)
            source = source.to(routing.topk_ids_TK.device)
            return Routing(*(part[source] for part in routing))

        return change


@dataclass(frozen=True)
class Random(Intervention):
    """Each token's logits are dealt out anew among the experts, all ways equally likely.

    So the choice is uniform without replacement, independent between tokens and layers, and a token's weights stay its
    own, in the same order: what is lost is only who speaks. A disabled expert stays disabled.
    """

    seed: int = 0
    layer: int | None = None

    def __str__(self) -> str:
        return f"random:{_star(self.layer)}:{self.seed}"

    def begin(self) -> Change:
        """See `Intervention`."""
        random = torch.Generator().manual_seed(self.seed)

        def change(router: Router, x_TD: Tensor, routing: Routing) -> Routing:
            logits_TE = routing.logits_TE
            never = logits_TE == NEVER
            drawn = torch.rand(logits_TE.shape, generator=random, dtype=torch.float64).to(logits_TE.device)
            source = never.byte().argsort(dim=1, stable=True)
            target = drawn.masked_fill(never, 2.0).argsort(dim=1, stable=True)  # the disabled last, as in the source
            dealt = torch.empty_like(target).scatter_(1, source, target)  # where each expert's logit goes
            logits_TE = torch.empty_like(logits_TE).scatter_(1, dealt, logits_TE)
            return Routing(dealt.gather(1, routing.topk_ids_TK), routing.topk_weights_TK, logits_TE)

        return change


# ------------------------------------------------------------------ carrying out


@contextmanager
def applied(model: Mixtral, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Let interventions stand in for a model's routers meanwhile; they compose in the order given.

    Raises:
        OptionError: see `prepared`.
    """
    with rerouted(model, prepared(model, interventions)):
        yield


def prepared(model: Mixtral, interventions: Sequence[Intervention]) -> Choose:
    """Check interventions against a model, and make of them what `octavo.hooks.rerouted` takes.

    What is random goes on from forward to forward; it begins again with another `prepared`.

    Raises:
        OptionError: the model is dense or has no such layer or expert; fewer experts are left than a token gets; a
            direction is not of the model's width; or they do not go together in this order.
    """
    check_interventions(model, interventions)
    changes = [(one, one.begin()) for one in interventions]

    def choose(layer: int, router: Router, x_TD: Tensor, routing: Routing) -> Routing:
        for one, change in changes:
            if one.at(layer):
                routing = change(router, x_TD, routing)
        return routing

    return choose


def check_interventions(model: Mixtral, interventions: Sequence[Intervention]) -> None:
    """Check them; see `prepared`.

    Raises:
        OptionError: see `prepared`.
    """
    moe, n_layers = model.args.moe, len(model.routers())
    if moe is None:
        raise OptionError("the model is dense; there is no routing to intervene in", hint="take a model of experts")
    for one in interventions:
        _in_range(one, "layer", () if one.layer is None else (one.layer,), n_layers)
        _in_range(one, "expert", one.named, moe.num_experts)
        if not one.named and not isinstance(one, TopK | Shuffled | Random):
            raise OptionError(f"{one}: names no expert", hint="give at least one")
        if len(set(one.named)) != len(one.named):
            raise OptionError(f"{one}: names an expert twice", hint="give different ones")
        if isinstance(one, Project) and one.basis.shape[1] != model.args.dim:
            raise OptionError(
                f"{one}: a direction of {one.basis.shape[1]} numbers; expected the model's width, {model.args.dim}",
                hint="it is one of what the layer's router reads",
            )
    for layer in range(n_layers):
        _check_order(moe, [one for one in interventions if one.at(layer)])


def _check_order(moe: MoEArgs, interventions: Sequence[Intervention]) -> None:
    """Go through what is done at one layer, and see that it can be."""
    k, disabled = moe.num_experts_per_tok, set[int]()
    dealt: Intervention | None = None  # the last that chose otherwise than by the router's rows
    for one in interventions:
        if isinstance(dealt, Force):
            raise OptionError(f"{one}: comes after {dealt} at the same layer", hint=f"put {dealt} last")
        if isinstance(one, Project | RandomProject) and dealt is not None:
            raise OptionError(f"{one}: comes after {dealt} at the same layer", hint="put what changes a row first")
        if isinstance(one, Disable):
            disabled.update(one.experts)
        elif isinstance(one, Swap):
            disabled = {{one.a: one.b, one.b: one.a}.get(expert, expert) for expert in disabled}
        elif isinstance(one, TopK):
            k = one.k
        elif isinstance(one, Force):
            if len(one.experts) > k:
                raise OptionError(f"{one}: more experts than the {k} a token gets", hint="force fewer")
            if disabled & set(one.experts):
                raise OptionError(f"{one}: an expert of these is disabled there", hint="do one or the other")
        if isinstance(one, Swap | Force | Shuffled | Random):
            dealt = one
        if not 1 <= k <= moe.num_experts:
            raise OptionError(f"{one}: expected 1 to {moe.num_experts} experts a token", hint="the model has no more")
    left = moe.num_experts - len(disabled)
    if k > left:
        culprit = next(one for one in reversed(interventions) if isinstance(one, Disable | TopK))
        raise OptionError(
            f"{culprit}: of {moe.num_experts} experts {left} are left in a layer, and a token gets {k}",
            hint=f"disable fewer, or add topk:*:{left}" if left else "disable fewer",
        )


def _in_range(one: Intervention, kind: str, values: Sequence[int], count: int) -> None:
    for value in values:
        if not 0 <= value < count:
            raise OptionError(f"{one}: there is no {kind} {value}", hint=f"{kind}s are 0 to {count - 1}")


def _chosen_anew(routing: Routing, logits_TE: Tensor, k: int) -> Routing:
    """Choose the best k by other logits."""
    ids_TE = logits_TE.argsort(dim=1, descending=True, stable=True)
    return _weighed(routing, logits_TE, ids_TE[:, :k])


def _weighed(routing: Routing, logits_TE: Tensor, ids_TK: Tensor) -> Routing:
    """Weigh another choice. Kernels round softmax in their own way, so that what is as it was keeps its weights."""
    chosen_TK = logits_TE.gather(1, ids_TK)
    weights_TK = chosen_TK.softmax(dim=1)
    if ids_TK.shape == routing.topk_ids_TK.shape:
        before_TK = routing.logits_TE.gather(1, routing.topk_ids_TK)
        same_T1 = ((ids_TK == routing.topk_ids_TK) & (chosen_TK == before_TK)).all(dim=1, keepdim=True)
        weights_TK = routing.topk_weights_TK.where(same_T1, weights_TK)
    return Routing(ids_TK, weights_TK, logits_TE)


def _projecting(expert: int, basis_KD: Tensor) -> Change:
    def change(router: Router, x_TD: Tensor, routing: Routing) -> Routing:
        basis = basis_KD.to(x_TD.device)
        logits_TE = routing.logits_TE.clone()
        logits_TE[:, expert] -= x_TD.float() @ basis.T @ (basis @ router.weight[expert].float())
        return _chosen_anew(routing, logits_TE, routing.topk_ids_TK.shape[1])

    return change


def _orthonormal(directions: Array, name: str) -> Array:
    """An orthonormal basis of what directions span, [k, D]."""
    hint = "a direction is a vector of the model's width that is not zero"
    if directions.ndim not in (1, 2) or directions.size == 0 or directions.dtype.kind not in "fiu":
        raise OptionError(f"{name}: {directions.dtype} {list(directions.shape)}; expected [D] or [k, D]", hint=hint)
    rows = np.atleast_2d(directions).astype(np.float64)
    if not np.isfinite(rows).all():
        raise OptionError(f"{name}: holds NaN or infinity; expected finite numbers", hint=hint)
    rows /= np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if (norms == 0).any():
        raise OptionError(f"{name}: a direction is zero", hint=hint)
    if len(rows) > rows.shape[1]:
        raise OptionError(f"{name}: {len(rows)} directions in {rows.shape[1]} dimensions", hint="give fewer")
    basis, triangle = np.linalg.qr((rows / norms).T)
    lengths = np.diag(triangle)
    if np.abs(lengths).min() < PARALLEL:
        raise OptionError(f"{name}: a direction is a sum of the others", hint="leave it out")
    return np.ascontiguousarray((basis * np.sign(lengths)).T, dtype=np.float32)  # one direction stays as it points


def _others(named: Sequence[int], random: np.random.Generator, n_experts: int) -> tuple[int, ...] | None:
    """As many experts that are not named; None where there are not enough."""
    rest = [expert for expert in range(n_experts) if expert not in named]
    if len(rest) < len(named):
        return None
    return tuple(sorted(int(expert) for expert in random.choice(rest, len(named), replace=False)))


# ------------------------------------------------------------------ as text

KINDS = {
    "disable": "disable:LAYER:EXPERT[,EXPERT...]",
    "swap": "swap:LAYER:A,B",
    "force": "force:LAYER:EXPERT[,EXPERT...]",
    "topk": "topk:LAYER:K",
    "project": "project:LAYER:EXPERT:FILE.npy",
    "random-project": "random-project:LAYER:EXPERT:SEED",
    "shuffle": "shuffle[:LAYER[:SEED]]",
    "random": "random[:LAYER[:SEED]]",
}
"""How each kind is written; LAYER is a number, or * for all."""


def parse_intervention(text: str, option: str = "--do") -> Intervention:
    """Read what `KINDS` describes.

    Args:
        text: such as "disable:3:5", "topk:*:1" or "shuffle".
        option: what to call it in errors.

    Raises:
        OptionError: it is none of these, or its file of directions cannot be used.
    """
    kind, *fields = text.strip().split(":")
    if kind not in KINDS:
        raise OptionError(f"{option} {text!r}: expected one of {', '.join(KINDS)}", hint="such as disable:3:5")
    try:
        return _parse(kind, fields)
    except ValueError:
        raise OptionError(
            f"{option} {text!r}: expected {KINDS[kind]}", hint="LAYER is a number, or * for all layers"
        ) from None


def parse_disabled(text: str, option: str = "--disable") -> Disable:
    """Read "LAYER:EXPERT", the everyday one; "*:EXPERT" is of all layers.

    Raises:
        OptionError: it is not that.
    """
    try:
        layer, experts = text.strip().split(":")
        return Disable(_layer(layer), _numbers(experts))
    except ValueError:
        raise OptionError(
            f"{option} {text!r}: expected LAYER:EXPERT", hint="such as 3:5, or *:5 for that expert of every layer"
        ) from None


def _parse(kind: str, fields: list[str]) -> Intervention:
    """ValueError stands for everything that is not as `KINDS` says."""
    if kind in ("shuffle", "random"):
        layer, seed = [*fields, *("*", "0")[len(fields) :]]
        made = Shuffled if kind == "shuffle" else Random
        return made(_number(seed), _layer(layer))
    if kind in ("project", "random-project"):
        layer, expert, rest = fields[0], *fields[1:2], ":".join(fields[2:])
        if kind == "random-project":
            seed, _, dimensions = rest.partition("x")
            return RandomProject(_number(layer), _number(expert), _number(seed), _number(dimensions or "1"))
        if not rest:
            raise ValueError
        return Project(_number(layer), _number(expert), _read_directions(Path(rest).expanduser()), rest)
    layer, rest = fields
    if kind == "topk":
        return TopK(_number(rest), _layer(layer))
    if kind == "swap":
        a, b = _numbers(rest)
        return Swap(_layer(layer), a, b)
    return (Disable if kind == "disable" else Force)(_layer(layer), _numbers(rest))


def _read_directions(path: Path) -> Array:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is no NumPy file of numbers"
        raise OptionError(f"{path}: cannot be read ({why})", hint="numpy.save(FILE, direction) writes one") from None
    if not isinstance(found, np.ndarray):
        raise OptionError(f"{path}: holds several arrays; expected one", hint="numpy.save(FILE, direction) writes one")
    return found


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise ValueError(text)
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(one) for one in text.split(","))


def _layer(text: str) -> int | None:
    return None if text == "*" else _number(text)


def _star(layer: int | None) -> str:
    return "*" if layer is None else str(layer)


def _list(experts: Sequence[int]) -> str:
    return ",".join(map(str, experts))
