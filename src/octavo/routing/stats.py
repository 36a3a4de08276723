"""What a routing trace says: each metric with its intervals, its denominator and its baseline. numpy only.

All functions take `level`, of all intervals of the metric together (0.5 to 0.999), and `seed`, of the resamples. L
layers, E experts, K chosen of them for a token. N_i is how many tokens choose expert i, with any of their K choices.
The definitions of co-activation, saturation, domain and vocabulary specialisation are those of the OLMoE paper
(Muennighoff et al. 2024, arXiv:2409.02060), that of repetition is the Mixtral paper's (see `octavo.routing.published`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from octavo.errors import OptionError
from octavo.experts import RoutingTrace
from octavo.routing.domains import Distance, domain_contrast, domain_distance, domain_specialisation, need_labels
from octavo.routing.intervals import LEVEL, BlockBootstrap, binomial_variance, influences, share_intervals, student
from octavo.routing.measured import Measured, blocks_of, choices, count, layers_of, notes, sums
from octavo.routing.vocabulary import TopToken, Vocabulary, vocabulary_specialisation

__all__ = [
    "METRICS",
    "Distance",
    "Measured",
    "TopToken",
    "Vocabulary",
    "coactivation",
    "domain_contrast",
    "domain_distance",
    "domain_specialisation",
    "load",
    "load_variation",
    "repetition",
    "router_entropy",
    "saturation",
    "transition",
    "vocabulary_specialisation",
]

Array = npt.NDArray[Any]
_ENTROPY_CHUNK = 1 << 22  # logits at once


def load(
    trace: RoutingTrace,
    per: Literal["assignments", "tokens"] = "assignments",
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Measured:
    """How busy each expert is, axes (layer, expert).

    Args:
        trace: of a text.
        per: "assignments": its share of all K assignments a token, N_i / (tokens x K), baseline 1/E;
            "tokens": the share of tokens that choose it, N_i / tokens, baseline K/E. Both are called load.

    Raises:
        OptionError: `per` is something else, or there is no such level.
    """
    if per not in ("assignments", "tokens"):
        raise OptionError(f"per is {per!r}; expected assignments or tokens", hint="they differ by the factor top_k")
    times = trace.top_k if per == "assignments" else 1
    num, den = _loads(trace)
    value, low, high = share_intervals(num, den * times, level=level, seed=seed)
    return Measured(
        f"load per {per}",
        value,
        low,
        high,
        _filled(value, trace.top_k / times / trace.experts),
        ("layer", "expert"),
        "all assignments (tokens x K): the shares of a layer sum to 1" if times > 1 else "tokens",
        "1/E: even routing" if per == "assignments" else "K/E: even routing",
        level,
        notes(trace),
    )


def load_variation(trace: RoutingTrace, *, level: float = LEVEL, seed: int = 0) -> Measured:
    """How uneven each layer's load is: the standard deviation of the experts' loads over their mean, axes (layer,).

    In a sample even an even router's loads differ, so that their plain coefficient of variation is too high. Here what
    the blocks say of that noise is taken off: value^2 = plain^2 - noise^2, or 0, and the baseline is 0. The interval is
    the plain value give or take how far the vector of loads strays among resamples, which holds by the triangle
    inequality for even and uneven loads alike; it is wide above.

    Raises:
        OptionError: there is no such level.
    """
    experts = trace.experts
    num, den = _loads(trace)
    influence, part = influences(num, den * trace.top_k)
    bootstrap = BlockBootstrap(len(num), level=level, seed=seed)
    unit = bootstrap.stray_together(influence, lambda vectors: np.linalg.norm(vectors, axis=-1))
    few = student(2.6, part.n_blocks[:, 0] - 1) / 2.6
    unit = np.maximum(unit, np.sqrt(binomial_variance(part).sum(axis=1)))
    plain = np.linalg.norm(part.value - 1 / experts, axis=1)
    far = bootstrap.critical * unit * few
    noise = part.variance.sum(axis=1)
    most = math.sqrt(max(0.0, experts / trace.top_k - 1))
    scale = math.sqrt(experts)  # of a distance between vectors of shares, to a coefficient of variation
    value = scale * np.sqrt(np.maximum(0, plain**2 - noise))
    low, high = (np.clip(scale * bound, 0, most) for bound in (plain - far, plain + far))
    return Measured(
        "load variation",
        value,
        np.minimum(low, value),
        high,
        np.zeros_like(value),
        ("layer",),
        "the mean load, 1/E",
        "0: even routing",
        level,
        notes(trace, "corrected for the unevenness that a sample has by chance"),
    )


def repetition(
    trace: RoutingTrace, by_domain: bool = False, *, level: float = LEVEL, seed: int = 0
) -> tuple[Measured, Measured]:
    """How often consecutive tokens of a document go to the same expert, axes (layer,) or (domain, layer).

    The first result is of first choices: those of both tokens are the same; baseline 1/E. The second is of any choice:
    some expert is among the K choices of both; baseline 1 - C(E-K, K) / C(E, K).

    Raises:
        OptionError: no document has two tokens, domains were asked for and the trace has no labels, or there is no such
            level.
    """
    documents = trace.document_ids
    joined = documents[1:] == documents[:-1]
    if not joined.any():
        raise OptionError("no document of the trace has two tokens in a row", hint="repetition takes a longer text")
    if by_domain:
        need_labels(trace, least=1)
    block, domain_of_block = blocks_of(trace, by_domain=by_domain)
    n_blocks, n_domains = len(domain_of_block), len(trace.domains) if by_domain else 1
    block = block[1:][joined]
    den = count(block, n_blocks).astype(np.float64)
    num = np.empty((2, n_blocks, trace.n_layers))
    for layer, ids_KT in enumerate(layers_of(trace)):
        meet = np.zeros(int(joined.sum()), dtype=bool)
        for here in ids_KT:
            for there in ids_KT:
                meet |= (here[1:] == there[:-1])[joined]
        num[0, :, layer] = sums((ids_KT[0, 1:] == ids_KT[0, :-1])[joined], block, n_blocks)
        num[1, :, layer] = sums(meet, block, n_blocks)
    experts, top_k = trace.experts, trace.top_k
    chance = 1 - math.comb(experts - top_k, top_k) / math.comb(experts, top_k)
    told = (
        ("repetition of the first choice", 1 / experts, "1/E: even routing, tokens independent"),
        ("repetition of any choice", chance, "1 - C(E-K, K) / C(E, K): even routing, tokens independent"),
    )
    found = []
    for of_choice, (name, baseline, baseline_name) in zip(num, told, strict=True):
        bootstrap = BlockBootstrap(n_blocks, level=level, seed=seed)
        parts = []
        for domain in range(n_domains):
            rows = np.flatnonzero(domain_of_block == domain)
            parts.append(bootstrap.add(of_choice[rows], den[rows, None], rows))
        value = np.stack([part.value for part in parts])
        low, high = (np.stack(bounds) for bounds in zip(*map(bootstrap.shares, parts), strict=True))
        if not by_domain:
            value, low, high = value[0], low[0], high[0]
        found.append(
            Measured(
                name,
                value,
                low,
                high,
                _filled(value, baseline),
                ("domain", "layer") if by_domain else ("layer",),
                "pairs of consecutive tokens of one document",
                baseline_name,
                level,
                notes(trace, "uneven load alone raises it above the baseline"),
            )
        )
    return found[0], found[1]


def coactivation(trace: RoutingTrace, *, level: float = LEVEL, seed: int = 0) -> Measured:
    """Of the tokens that choose expert i, the share that choose j as well: N_ij / N_i, axes (layer, expert, other).

    All pairs of a token's K choices count. It is not symmetric, as i and j are not chosen equally often. The diagonal,
    which would be 1, is nan; so are the rows of experts that no token chose. The baseline is (K-1) / (E-1).

    Raises:
        OptionError: a token has one expert only, or there is no such level.
    """
    experts, top_k = trace.experts, trace.top_k
    if top_k < 2:
        raise OptionError("each token has one expert; none is active beside another", hint="it takes top_k 2 or more")
    block, of_blocks = blocks_of(trace, entries=experts**2)
    n_blocks, shape = len(of_blocks), (trace.n_layers, experts, experts)
    bootstrap = BlockBootstrap(n_blocks, level=level, seed=seed, entries=math.prod(shape))
    parts, diagonal = [], np.arange(experts)
    for ids_KT in layers_of(trace):
        pairs = np.zeros((n_blocks, experts, experts), dtype=np.int64)
        for a in range(top_k - 1):
            row = (block * experts + ids_KT[a]) * experts
            pairs += count((row + ids_KT[a + 1 :]).ravel(), n_blocks, experts, experts)
        both = (pairs + pairs.transpose(0, 2, 1)).astype(np.float64)
        alone = both.sum(axis=2, keepdims=True) / (top_k - 1)  # each token that chooses i has K - 1 others
        parts.append(bootstrap.add(both, alone))
    value, low, high = _stacked(bootstrap, parts)
    for bounds in (value, low, high):
        bounds[:, diagonal, diagonal] = np.nan
    return Measured(
        "co-activation",
        value,
        low,
        high,
        _filled(value, (top_k - 1) / (experts - 1)),
        ("layer", "expert", "other"),
        "tokens that choose the expert (row), with any of their K choices",
        "(K-1)/(E-1): even routing",
        level,
        notes(trace, "the diagonal is left out; a busy expert is beside all others more often than the baseline"),
    )


def transition(trace: RoutingTrace, *, level: float = LEVEL, seed: int = 0) -> Measured:
    """Of the tokens whose first choice in a layer is i, the share whose first choice in the next one is j.

    Axes (layer, expert, next): entry l goes from layer l to l + 1. Rows sum to 1, and are nan where nobody chose i.
    The baseline is 1/E; with an uneven load, independent layers have the next layer's load in every row.

    Raises:
        OptionError: there is one layer only, or there is no such level.
    """
    experts = trace.experts
    if trace.n_layers < 2:
        raise OptionError("the trace is of one layer; there is no next one", hint="transition takes two layers or more")
    block, of_blocks = blocks_of(trace, entries=experts**2)
    n_blocks, shape = len(of_blocks), (trace.n_layers - 1, experts, experts)
    bootstrap = BlockBootstrap(n_blocks, level=level, seed=seed, entries=math.prod(shape))
    parts = []
    before: Array | None = None
    for ids_KT in layers_of(trace):
        if before is not None:
            pairs = count((block * experts + before) * experts + ids_KT[0], n_blocks, experts, experts)
            parts.append(bootstrap.add(pairs, pairs.sum(axis=2, keepdims=True)))
        before = ids_KT[0]
    value, low, high = _stacked(bootstrap, parts)
    return Measured(
        "transition",
        value,
        low,
        high,
        _filled(value, 1 / experts),
        ("layer", "expert", "next"),
        "tokens whose first choice in the layer is the expert (row)",
        "1/E: even routing, layers independent",
        level,
        notes(trace, "with an uneven load, independence means the load of the next layer in every row, not 1/E"),
    )


def router_entropy(trace: RoutingTrace, *, level: float = LEVEL, seed: int = 0) -> Measured:
    """How undecided the routers are: the mean entropy, in bits, of the softmax of a token's logits, axes (layer,).

    There is no baseline. The most there can be is log2(E), of a router that tells no expert from another: a reference
    which no trained router should come near.

    Raises:
        OptionError: the trace has no logits, or there is no such level.
    """
    if trace.logits is None:
        raise OptionError("the trace has no logits, which entropy is of", hint="octavo routing trace --logits")
    block, of_blocks = blocks_of(trace)
    n_blocks, most = len(of_blocks), math.log2(trace.experts)
    num = np.zeros((n_blocks, trace.n_layers))
    step = max(1, _ENTROPY_CHUNK // (trace.experts * trace.n_layers))
    for begin in range(0, trace.n_tokens, step):
        entropy_TL = _entropy(trace.logits[begin : begin + step])
        for layer in range(trace.n_layers):
            num[:, layer] += sums(entropy_TL[:, layer], block[begin : begin + step], n_blocks)
    bootstrap = BlockBootstrap(n_blocks, level=level, seed=seed)
    part = bootstrap.add(num, count(block, n_blocks)[:, None])
    low, high = bootstrap.means(part, 0, most)
    return Measured(
        "router entropy",
        part.value,
        low,
        high,
        None,
        ("layer",),
        "tokens; bits",
        f"none; log2(E) = {most:.3g} bits is the most there can be",
        level,
    )


def saturation(trace: RoutingTrace, later: RoutingTrace, *, level: float = LEVEL, seed: int = 0) -> Measured:
    """How far routing is what a later checkpoint makes of it: the mean of |choices now and later| / K, axes (layer,).

    The baseline is K/E.

    Args:
        trace: by the earlier checkpoint.
        later: of the same tokens, by the later one.

    Raises:
        OptionError: the traces are of different tokens, layers, experts or top_k, or there is no such level.
    """
    experts = _same_text(trace, later)
    block, of_blocks = blocks_of(trace)
    n_blocks = len(of_blocks)
    num = np.zeros((n_blocks, trace.n_layers))
    for layer, (now_KT, later_KT) in enumerate(zip(layers_of(trace), layers_of(later), strict=True)):
        same = sum((one == other).astype(np.float64) for one in now_KT for other in later_KT)
        num[:, layer] = sums(np.asarray(same), block, n_blocks)
    value, low, high = share_intervals(num, count(block, n_blocks)[:, None] * trace.top_k, level=level, seed=seed)
    unchecked = trace.token_ids is None or later.token_ids is None
    return Measured(
        "saturation",
        value,
        low,
        high,
        _filled(value, trace.top_k / experts),
        ("layer",),
        "all choices (tokens x K)",
        "K/E: even routing, the checkpoints independent",
        level,
        notes(trace, "no token ids: that both are of the same text was not checked" if unchecked else ""),
    )


METRICS: Mapping[str, Callable[..., Measured | tuple[Measured, ...] | Vocabulary]] = {
    "load": load,
    "load-variation": load_variation,
    "repetition": repetition,
    "coactivation": coactivation,
    "transition": transition,
    "domain-specialisation": domain_specialisation,
    "domain-contrast": domain_contrast,
    "domain-distance": domain_distance,
    "vocabulary": vocabulary_specialisation,
    "entropy": router_entropy,
    "saturation": saturation,
}
"""Every metric by its name on the command line."""


# ---------------------------------------- helpers


def _loads(trace: RoutingTrace) -> tuple[Array, Array]:
    """By block, tokens that choose each expert, [B, L, E], and tokens, [B, 1, 1]."""
    block, of_blocks = blocks_of(trace, entries=trace.n_layers * trace.experts)
    return choices(trace, block, len(of_blocks)), count(block, len(of_blocks))[:, None, None]


def _filled(like: Array, value: float) -> Array:
    return np.full(like.shape, value, dtype=np.float64)


def _stacked(bootstrap: BlockBootstrap, parts: list[Any]) -> tuple[Array, Array, Array]:
    bounds = [bootstrap.shares(part) for part in parts]
    return np.stack([part.value for part in parts]), np.stack([b[0] for b in bounds]), np.stack([b[1] for b in bounds])


def _entropy(logits: Array) -> Array:
    """In bits, of the last dimension's softmax."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    weights = np.exp(shifted)
    total = weights.sum(axis=-1)
    mean = np.where(weights > 0, weights * np.where(weights > 0, shifted, 0), 0).sum(axis=-1) / total
    bits: Array = (np.log(total) - mean) / math.log(2)
    return bits


def _same_text(trace: RoutingTrace, later: RoutingTrace) -> int:
    """The number of experts; OptionError where two traces are not of the same tokens and the same shape of model."""
    # One that does not tell how many experts there are may just not have chosen the last ones.
    least = max(trace.experts, later.experts)

    def shape(one: RoutingTrace) -> str:
        experts = least if one.n_experts is None and one.logits is None else one.experts
        return f"{one.n_tokens} tokens, {one.n_layers} layers and {one.top_k} of {experts} experts"

    hint = "record both with one model's checkpoints and the same texts"
    if shape(trace) != shape(later):
        raise OptionError(f"the later trace is of {shape(later)}; this one is of {shape(trace)}", hint=hint)
    if not np.array_equal(trace.document_ids, later.document_ids):
        raise OptionError("the later trace's documents begin elsewhere", hint=hint)
    if trace.token_ids is not None and later.token_ids is not None:
        differ = np.flatnonzero(trace.token_ids != later.token_ids)
        if len(differ):
            raise OptionError(f"the later trace is of other tokens, from token {differ[0]} on", hint=hint)
    return least
