"""Which token ids an expert claims. See `octavo.routing.stats`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import OptionError
from octavo.experts import RoutingTrace
from octavo.routing.intervals import LEVEL, MOST, BlockBootstrap
from octavo.routing.measured import Measured, count, layers_of, notes

Array = npt.NDArray[Any]
SEEN = 10  # times an id must have come to count
_COUNTED = 400_000_000  # choices that may be counted again with ids moved elsewhere: a few seconds


@dataclass(frozen=True)
class TopToken:
    """A token id that an expert claims.

    Attributes:
        token_id: of the vocabulary.
        piece: its text where it first comes; None if the trace has no texts.
        share: of its tokens, those that choose the expert.
        count: how often it comes.
    """

    token_id: int
    piece: str | None
    share: float
    count: int


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """How far ids go to one expert each.

    Attributes:
        summary: by layer, the mean over ids of the share of the expert that claims most of the id's tokens.
        token_ids: those that came often enough, by rising number.
        counts: how often each came.
        trace: that it is of.
    """

    summary: Measured
    token_ids: Array
    counts: Array
    trace: RoutingTrace

    def shares(self, layer: int) -> Array:
        """N_xi / N_x: of each id's tokens, the share that choose each expert, [ids, E].

        Raises:
            OptionError: there is no such layer.
        """
        _check("layer", layer, self.trace.n_layers)
        which, number = _numbered(self.trace, self.token_ids)
        ids_KT = np.ascontiguousarray(self.trace.topk_ids[which, layer].T)
        return _claimed(number, ids_KT, len(self.counts), self.trace.experts) / self.counts[:, None]

    def top_tokens(self, layer: int, expert: int, n: int = 10) -> list[TopToken]:
        """The ids that an expert claims most: largest share first, of equal ones that which came most often.

        Args:
            layer, expert: which.
            n: ids, at most; those that never chose the expert are left out.

        Raises:
            OptionError: there is no such layer or expert.
        """
        _check("expert", expert, self.trace.experts)
        return self._top(self.shares(layer)[:, expert], n)

    def top_by_expert(self, layer: int, n: int = 3) -> list[list[TopToken]]:
        """`top_tokens` of every expert of a layer.

        Raises:
            OptionError: there is no such layer.
        """
        return [self._top(of_expert, n) for of_expert in self.shares(layer).T]

    def _top(self, shares: Array, n: int) -> list[TopToken]:
        best = np.lexsort((self.token_ids, -self.counts, -shares))[:n]
        return [
            TopToken(int(self.token_ids[i]), self._piece(self.token_ids[i]), float(shares[i]), int(self.counts[i]))
            for i in best
            if shares[i] > 0
        ]

    def _piece(self, token_id: int) -> str | None:
        if self.trace.pieces is None or self.trace.token_ids is None:
            return None
        return self.trace.pieces[int(np.argmax(self.trace.token_ids == token_id))]


def vocabulary_specialisation(
    trace: RoutingTrace, *, least: int = SEEN, level: float = LEVEL, seed: int = 0
) -> Vocabulary:
    """How far token ids go to one expert each: N_xi / N_x for ids x that came at least 10 times.

    The summary, axes (layer,), is the mean over these ids of the largest share. The largest of E shares is never as low
    as K/E, least of all of an id that came 10 times, so the baseline is the same mean with all ids moved along the
    text, by distances drawn at random and round the end: whatever goes to an expert in runs still does. The interval
    is that of the mean over ids, and never narrower than what moving does.

    Args:
        trace: of a text.
        least: how often an id must have come.

    Raises:
        OptionError: the trace has no token ids, none came so often, or there is no such level.
    """
    if trace.token_ids is None:
        raise OptionError("the trace has no token ids, which the vocabulary is told by", hint="record one that has")
    found, counts = np.unique(trace.token_ids, return_counts=True)
    token_ids, counts = found[counts >= least], counts[counts >= least]
    if not len(token_ids):
        raise OptionError(f"no token id comes {least} times in {trace.n_tokens} tokens", hint="record a longer text")
    which, number = _numbered(trace, token_ids)
    experts, n_ids = trace.experts, len(token_ids)
    random = np.random.default_rng(seed)
    times = int(np.clip(_COUNTED // trace.topk_ids.size, 8, 100))
    moves = random.integers(1, max(2, trace.n_tokens), size=times)
    largest, moved = np.empty((n_ids, trace.n_layers)), np.empty((times, trace.n_layers))
    for layer, ids_KT in enumerate(layers_of(trace)):
        largest[:, layer] = _claimed(number, ids_KT[:, which], n_ids, experts).max(axis=1) / counts
        for time, move in enumerate(moves):
            there = ids_KT[:, (which + move) % trace.n_tokens]
            moved[time, layer] = (_claimed(number, there, n_ids, experts).max(axis=1) / counts).mean()
    # Ids are what is drawn again; several together where there are many. Their order is the vocabulary's, no text's.
    group = np.arange(n_ids) * min(n_ids, MOST) // n_ids
    n_groups = int(group[-1]) + 1
    num = np.stack([np.bincount(group, weights=of_layer) for of_layer in largest.T], axis=1)
    bootstrap = BlockBootstrap(n_groups, level=level, seed=seed)
    part = bootstrap.add(num, count(group, n_groups)[:, None])
    low, high = bootstrap.means(part, 0, 1, variance=moved.var(axis=0, ddof=1))
    summary = Measured(
        "vocabulary specialisation",
        part.value,
        low,
        high,
        moved.mean(axis=0),
        ("layer",),
        f"tokens of an id; mean over the {n_ids} ids that come {least} times or more",
        "mean with ids moved along the text at random",
        level,
        notes(trace, "the largest of E shares: never as low as K/E; hold it beside the baseline"),
    )
    return Vocabulary(summary, token_ids, counts, trace)


def _numbered(trace: RoutingTrace, token_ids: Array) -> tuple[Array, Array]:
    """The tokens that are of these ids, and which of them each is."""
    assert trace.token_ids is not None
    number = np.minimum(np.searchsorted(token_ids, trace.token_ids), len(token_ids) - 1)
    which = np.flatnonzero(token_ids[number] == trace.token_ids)
    return which, number[which]


def _claimed(number: Array, ids_KT: Array, n_ids: int, experts: int) -> Array:
    """N_xi: how many tokens of each id choose each expert."""
    found: Array = sum(count(number * experts + ids_T, n_ids, experts) for ids_T in ids_KT)  # type: ignore[assignment]
    return found


def _check(kind: str, value: int, n: int) -> None:
    if not 0 <= value < n:
        raise OptionError(f"the trace has no {kind} {value}", hint=f"there are {n}: 0 to {n - 1}")
