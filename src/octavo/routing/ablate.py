"""What interventions in the routing do to a model: to its loss, to what it predicts, and to where tokens go.

Texts are read twice, teacher-forced, as the model is and with the interventions, so that every figure is of pairs: the
same token, with and without. Figures are per predicted token: every token of a text but its first.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.errors import OptionError, PromptError
from octavo.hooks import Choose, observed, rerouted
from octavo.llm import LLM
from octavo.model import Mixtral, Routing
from octavo.routing.intervals import LEVEL, BlockBootstrap, cut_blocks, share_intervals
from octavo.routing.interventions import Disable, Intervention, check_interventions, prepared
from octavo.routing.texts import Document, encode

Array = npt.NDArray[Any]
Progress = Callable[[int, int], object]

WINDOW = 512  # tokens read at once: all their logits are in memory, twice
TRIES = 20  # draws for each control, where one that fits may be hard to come by


class Estimate(NamedTuple):
    """A figure and its interval: arrays of one shape, float64, a single number too."""

    value: Array
    low: Array
    high: Array

    def at(self, *index: int) -> Estimate:
        """One entry of it."""
        return Estimate(*(np.asarray(part[index]) for part in self))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; None stands for what no number is known of."""
        return {
            name: np.where(np.isfinite(part), part, np.array(None)).tolist()
            for name, part in zip(self._fields, self, strict=True)
        }


@dataclasses.dataclass(frozen=True)
class Figures:
    """What became of some tokens.

    Attributes:
        n_tokens: predicted ones.
        before, after: mean loss, in nats a token.
        difference: after less before, of pairs.
        kl: mean KL divergence of the predictions after from those before, in nats a token.
        flipped: share of tokens for which another next token became the likeliest.
    """

    n_tokens: int
    before: Estimate
    after: Estimate
    difference: Estimate
    kl: Estimate
    flipped: Estimate


@dataclasses.dataclass(frozen=True)
class Control:
    """Other interventions of the same kind, for comparison.

    Attributes:
        interventions: what was done instead.
        difference: of the mean loss, in nats a token.
    """

    interventions: tuple[str, ...]
    difference: float


@dataclasses.dataclass(frozen=True, eq=False)
class Effect:
    """What interventions did.

    Attributes:
        interventions: as text.
        overall: of all tokens.
        by_domain: of each label's; empty where there is one at most.
        migration: [L], share of the choices that were made before and are not after, of each layer.
        moved: [L, E, E], how many choices of one expert became another's; on the diagonal, those that stayed. Where
            several were lost and gained at once, each lost one is shared among the gained.
        controls: of chance's experts.
        excess: how much more the loss rose than with the controls on average, of pairs; None without controls. The
            interval is over texts, for these controls.
        level: of the intervals: that all of a figure hold, such as every domain's rise.
    """

    interventions: tuple[str, ...]
    overall: Figures
    by_domain: dict[str, Figures]
    migration: Estimate
    moved: Array
    controls: tuple[Control, ...]
    excess: Estimate | None
    level: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "interventions": list(self.interventions),
            "level": self.level,
            "overall": _figures_as_dict(self.overall),
            "by_domain": {name: _figures_as_dict(one) for name, one in self.by_domain.items()},
            "migration": self.migration.as_dict(),
            "moved": self.moved.tolist(),
            "controls": [dataclasses.asdict(one) for one in self.controls],
            "excess": None if self.excess is None else self.excess.as_dict(),
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """What each expert is worth: the model without it, one at a time.

    Attributes:
        n_tokens: predicted ones.
        before: mean loss of the model as it is, in nats a token.
        difference: [L, E], by how much the mean loss rises without the expert.
        by_domain: the same for each label's tokens; empty where there is one at most.
        kl: [L, E], mean KL divergence, in nats a token.
        load: [L, E], share of the layer's choices that the expert gets in the model as it is.
        level: of the intervals: that all of a figure hold, where domains are one figure and all tokens another.
    """

    n_tokens: int
    before: float
    difference: Estimate
    by_domain: dict[str, Estimate]
    kl: Estimate
    load: Array
    level: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "n_tokens": self.n_tokens,
            "level": self.level,
            "before": self.before,
            "difference": self.difference.as_dict(),
            "by_domain": {name: one.as_dict() for name, one in self.by_domain.items()},
            "kl": self.kl.as_dict(),
            "load": self.load.tolist(),
        }


def measure(
    model: LLM | Mixtral,
    sequences: Sequence[Sequence[int]],
    interventions: Sequence[Intervention],
    *,
    labels: Sequence[str] | None = None,
    controls: int = 0,
    window: int = WINDOW,
    seed: int = 0,
    level: float = LEVEL,
    progress: Progress | None = None,
) -> Effect:
    """Read texts with a model as it is and with interventions.

    A text longer than a window is read in several, each of which begins with the last token of the one before, after
    BOS where the text has it, so that each token is predicted once.

    Args:
        model: of experts; they may be quantised or streamed.
        sequences: token ids of each text.
        interventions: in their order; none at all changes nothing.
        labels: of each text, such as "french".
        controls: compare with so many others of the same kind: other experts of the same layers disabled, swapped or
            forced, random directions projected out. There may be fewer different ones; all of them are taken then.
        window: tokens read at once, at most; no more than the model's context are.
        seed: of what is drawn.
        level: of the intervals, from 0.5 to 0.999.
        progress: called with how many tokens are computed, and how many there will be.

    Raises:
        OptionError: a number is out of range, or an intervention does not fit: see `interventions.prepared`; controls
            of what has none.
        PromptError: no text has two tokens, or one has a token that the model does not know.
    """
    mixtral, interventions = _mixtral(model), _merged(interventions)
    check_interventions(mixtral, interventions)
    others = _draw_controls(mixtral, interventions, controls, seed)
    texts = _Texts(model, sequences, labels, window)
    variants = _read(mixtral, texts, [interventions, *others], progress)
    blocks = _Blocks(texts, level, seed)
    one, before = variants[0], texts.losses
    rises = [variant.losses - before for variant in variants]
    excess = None
    if others:
        excess = blocks.means((rises[0] - np.mean(rises[1:], axis=0))[:, None]).at(0, 0)
    figures = blocks.figures(before, one)
    return Effect(
        tuple(map(str, interventions)),
        figures[0],
        dict(zip(texts.domains, figures[1:], strict=True)) if len(texts.domains) > 1 else {},
        blocks.shares(one.gone, texts.top_k).at(0),
        one.moved,
        tuple(
            Control(tuple(map(str, other)), float(rise.mean())) for other, rise in zip(others, rises[1:], strict=True)
        ),
        excess,
        level,
    )


def sweep(
    model: LLM | Mixtral,
    sequences: Sequence[Sequence[int]],
    *,
    labels: Sequence[str] | None = None,
    window: int = WINDOW,
    seed: int = 0,
    level: float = LEVEL,
    progress: Progress | None = None,
) -> Sweep:
    """Disable each expert of each layer in turn. Texts are read once for each, and once as the model is.

    Args:
        as for `measure`.

    Raises:
        OptionError, PromptError: see `measure`.
    """
    mixtral = _mixtral(model)
    check_interventions(mixtral, ())
    n_layers, n_experts = len(mixtral.routers()), mixtral.routers()[0].weight.shape[0]
    each = [[Disable(layer, (expert,))] for layer, expert in itertools.product(range(n_layers), range(n_experts))]
    for one in each:
        check_interventions(mixtral, one)
    texts = _Texts(model, sequences, labels, window)
    variants = _read(mixtral, texts, each, progress)
    blocks = _Blocks(texts, level, seed)
    shape = (-1, n_layers, n_experts)
    rises = np.stack([variant.losses - texts.losses for variant in variants], axis=1)
    difference = Estimate(*(part.reshape(shape) for part in blocks.means(rises)))
    kl = blocks.means(np.stack([variant.kl for variant in variants], axis=1), least=0)
    return Sweep(
        len(texts.losses),
        float(texts.losses.mean()),
        difference.at(0),
        {name: difference.at(1 + at) for at, name in enumerate(texts.domains)} if len(texts.domains) > 1 else {},
        Estimate(*(part.reshape(shape) for part in kl)).at(0),
        texts.chosen / texts.chosen.sum(axis=1, keepdims=True),
        level,
    )


# ------------------------------------------------------------------ what is read


def encode_documents(
    llm: LLM, documents: Sequence[Document], tokens: int | None = None
) -> tuple[list[list[int]], list[str]]:
    """Encode texts and conversations for `measure` and `sweep`.

    Args:
        tokens: at most so many of the documents of each label.

    Returns:
        Token ids and the label of each document; those are left out for which no tokens are left.

    Raises:
        OptionError: `tokens` is less than 2.
        PromptError: the model's chat template has no place for a conversation.
        TokenizerError: the model has no tokenizer.
    """
    if tokens is not None and tokens < 2:
        raise OptionError(f"tokens is {tokens}; expected 2 or more", hint="such as 1000 of each label")
    left: dict[str, int] = {}
    sequences, labels = list[list[int]](), list[str]()
    for document in documents:
        if tokens is not None and left.setdefault(document.label, tokens) < 2:
            continue
        ids = encode(llm, document)
        if tokens is not None:
            ids = ids[: left[document.label]]
            left[document.label] -= len(ids)
        sequences.append(ids)
        labels.append(document.label)
    return sequences, labels


class _Window(NamedTuple):
    """Token ids, and how many of the first ones are repeated from earlier, and so not measured."""

    ids: tuple[int, ...]
    n_again: int


class _Texts:
    """Texts cut into windows, and how the model as it is reads them.

    Attributes:
        windows: of all.
        domains: labels, in the order of appearance.
        document, domain: [N], of each predicted token.
        losses: [N], as the model is; filled in while reading.
        chosen: [L, E], how often each expert was; filled in while reading.
    """

    def __init__(
        self, model: LLM | Mixtral, sequences: Sequence[Sequence[int]], labels: Sequence[str] | None, window: int
    ) -> None:
        labels = ["all"] * len(sequences) if labels is None else labels
        if len(labels) != len(sequences):
            raise OptionError(f"there are {len(labels)} labels for {len(sequences)} texts", hint="give one for each")
        if window < 3:
            raise OptionError(f"window is {window}; expected 3 or more tokens", hint=f"the default is {WINDOW}")
        args = _mixtral(model).args
        size = min(window, model.context if isinstance(model, LLM) else args.max_seq_len)
        tokenizer = model.tokenizer if isinstance(model, LLM) else None
        self.top_k = args.moe.num_experts_per_tok if args.moe else 0
        self.windows: list[_Window] = []
        documents, domains = list[int](), list[str]()
        for ids, label in zip(sequences, labels, strict=True):
            if ids and not 0 <= min(ids) <= max(ids) < args.vocab_size:
                raise PromptError(
                    f"a text has token {max(ids) if min(ids) >= 0 else min(ids)}; the model knows 0 to "
                    f"{args.vocab_size - 1}",
                    "encode it with this model's tokenizer",
                )
            if len(ids) < 2:
                continue  # nothing follows its only token
            begins = tuple(ids[:1]) if tokenizer is not None and ids[0] == tokenizer.bos_id else ()
            documents += [len(domains)] * (len(ids) - 1)
            domains.append(label)
            self.windows += _cut(tuple(ids), begins, size)
        if not domains:
            raise PromptError("no text has two tokens, so that none can be predicted", "give a longer one")
        self.domains = tuple(dict.fromkeys(domains))
        self.document = np.array(documents)
        self.domain = np.array([self.domains.index(label) for label in domains])[self.document]
        self.losses = np.empty(0)
        self.chosen = np.empty((0, 0))


def _cut(ids: tuple[int, ...], begins: tuple[int, ...], size: int) -> Iterator[_Window]:
    yield _Window(ids[:size], 0)
    at, step = size - 1, size - 1 - len(begins)
    while at + 1 < len(ids):
        yield _Window(begins + ids[at : at + 1 + step], len(begins))
        at += step


class _Forward:
    """One forward over a window, of its measured tokens.

    Attributes:
        logprobs: [n, V], float32, after each.
        ids: of each layer [n, K].
    """

    def __init__(self, model: Mixtral, window: _Window, choose: Choose | None) -> None:
        routed: list[Routing] = []
        measured = slice(window.n_again, -1)
        with nullcontext() if choose is None else rerouted(model, choose), observed(model, routed.extend):
            logits = model(torch.tensor([window.ids], device=model.device))[0, measured]
        self.logprobs: Tensor = logits.log_softmax(dim=-1)
        self.ids = [one.topk_ids_TK[measured] for one in routed]

    def losses(self, window: _Window) -> Tensor:
        """Of what came next, in nats."""
        following = torch.tensor(window.ids[window.n_again + 1 :], device=self.logprobs.device)
        return -self.logprobs.gather(1, following[:, None])[:, 0]


class _Variant:
    """What becomes of the texts with some interventions.

    Attributes:
        losses, kl, flipped: [N].
        gone: [N, L], how many of the choices of before were not made.
        moved: [L, E, E], see `Effect`.
    """

    def __init__(self, choose: Choose, n_layers: int, n_experts: int) -> None:
        self.choose = choose
        self._parts: list[tuple[Array, ...]] = []
        self.moved = np.zeros((n_layers, n_experts, n_experts))

    def compare(self, model: Mixtral, window: _Window, before: _Forward) -> None:
        """Read a window, and compare it with how it was read before."""
        after = _Forward(model, window, self.choose)
        p_NV, losses = before.logprobs, after.losses(window)
        kl = (p_NV.exp() * (p_NV - after.logprobs)).sum(dim=-1, dtype=torch.float64).clamp(min=0)
        flipped = p_NV.argmax(dim=-1) != after.logprobs.argmax(dim=-1)
        gone = [self._migrate(layer, *ids) for layer, ids in enumerate(zip(before.ids, after.ids, strict=True))]
        parts = (losses.double(), kl, flipped.double(), torch.stack(gone, dim=1))
        self._parts.append(tuple(part.cpu().numpy() for part in parts))

    def _migrate(self, layer: int, before_TK: Tensor, after_TK: Tensor) -> Tensor:
        """Count where choices went; return how many of each token's are gone."""
        n_experts = self.moved.shape[1]
        before, after = (
            torch.zeros(len(ids), n_experts, dtype=torch.float64, device=ids.device).scatter_(1, ids, 1)
            for ids in (before_TK, after_TK)
        )
        lost, gained = before * (1 - after), after * (1 - before)
        to = gained / gained.sum(dim=1, keepdim=True).clamp(min=1)
        self.moved[layer] += (lost.T @ to + (before * after).sum(dim=0).diag()).cpu().numpy()
        return lost.sum(dim=1)

    def finish(self) -> None:
        """Put the windows together."""
        self.losses, self.kl, self.flipped, self.gone = map(np.concatenate, zip(*self._parts, strict=True))


@torch.inference_mode()
def _read(
    model: Mixtral, texts: _Texts, wanted: Sequence[Sequence[Intervention]], progress: Progress | None
) -> list[_Variant]:
    """Read the texts as the model is, and with each of what is wanted."""
    n_layers, n_experts = len(model.routers()), model.routers()[0].weight.shape[0]
    variants = [_Variant(prepared(model, one), n_layers, n_experts) for one in wanted]
    done, total = 0, (1 + len(variants)) * sum(len(window.ids) for window in texts.windows)
    losses, chosen = [], np.zeros((n_layers, n_experts))
    for window in texts.windows:
        before = _Forward(model, window, None)
        losses.append(before.losses(window).double().cpu().numpy())
        for layer, ids in enumerate(before.ids):
            chosen[layer] += torch.bincount(ids.flatten(), minlength=n_experts).cpu().numpy()
        for variant in (None, *variants):
            if variant is not None:
                variant.compare(model, window, before)
            done += len(window.ids)
            if progress is not None:
                progress(done, total)
    for variant in variants:
        variant.finish()
    texts.losses, texts.chosen = np.concatenate(losses), chosen
    return variants


class _Blocks:
    """Figures of all tokens, and of each domain's where there are several, with intervals that hold together."""

    def __init__(self, texts: _Texts, level: float, seed: int) -> None:
        self._block, group = cut_blocks(texts.document, texts.domain)
        counts = np.bincount(self._block, minlength=len(group))
        parts = [np.ones(len(group), dtype=bool)]
        if len(texts.domains) > 1:
            parts += [group == domain for domain in range(len(texts.domains))]
        self._mine = np.stack(parts, axis=1)[:, :, None]  # [blocks, parts, 1]
        self._counts = counts[:, None, None] * self._mine
        self._level, self._seed = level, seed

    def means(self, values: Array, least: float = -np.inf) -> Estimate:
        """Means of [N, M]: [parts, M], the first part all."""

        def mean(sums: Array, counts: Array) -> tuple[Array, Array, Array]:
            bootstrap = BlockBootstrap(len(sums), level=self._level, seed=self._seed, entries=sums[0].size)
            part = bootstrap.add(sums, counts)
            return (part.value, *bootstrap.means(part, least, np.inf))

        return self._estimate(mean, values, self._counts)

    def shares(self, counts: Array, of: int = 1) -> Estimate:
        """Shares, of [N, M] that count up to `of`: [parts, M]."""
        share = partial(share_intervals, level=self._level, seed=self._seed)
        return self._estimate(share, counts, self._counts * of)

    def _estimate(
        self, estimate: Callable[[Array, Array], tuple[Array, Array, Array]], values: Array, counts: Array
    ) -> Estimate:
        """From sums over blocks; the intervals of all tokens' figures need not wait for those of domains."""
        sums = np.zeros((len(counts), values.shape[1]))
        np.add.at(sums, self._block, values)
        split = sums[:, None] * self._mine
        found = [
            estimate(split[:, part], counts[:, part]) for part in (slice(0, 1), slice(1, None)) if split[:, part].size
        ]
        return Estimate(*map(np.concatenate, zip(*found, strict=True)))

    def figures(self, before: Array, after: _Variant) -> list[Figures]:
        """Of each part."""
        found = [
            self.means(before[:, None], least=0),
            self.means(after.losses[:, None], least=0),
            self.means((after.losses - before)[:, None]),
            self.means(after.kl[:, None], least=0),
            self.shares(after.flipped[:, None]),
        ]
        n_tokens = self._counts.sum(axis=(0, 2))
        return [Figures(int(n), *(one.at(part, 0) for one in found)) for part, n in enumerate(n_tokens)]


def _draw_controls(
    model: Mixtral, interventions: Sequence[Intervention], count: int, seed: int
) -> list[list[Intervention]]:
    """Different ones, as many as asked for or as there are."""
    if count < 0:
        raise OptionError(f"controls is {count}; expected 0 or more", hint="such as 5")
    n_experts, random = model.routers()[0].weight.shape[0], np.random.default_rng(seed)
    found: dict[tuple[str, ...], list[Intervention]] = {}
    for _ in range(TRIES * count):
        drawn = [one.control(random, n_experts) or one for one in interventions]
        if all(one is other for one, other in zip(interventions, drawn, strict=True)):
            raise OptionError(
                "there is nothing random to compare these interventions with",
                hint="controls are of disabled, swapped or forced experts, of which there must be others; shuffle and "
                "random are controls themselves",
            )
        found.setdefault(tuple(map(str, drawn)), drawn)
        if len(found) == count:
            break
    return list(found.values())


def _merged(interventions: Sequence[Intervention]) -> list[Intervention]:
    """With those that disable experts of the same layers one after another made one: its controls are others of all."""
    merged: list[Intervention] = []
    for one in interventions:
        last = merged[-1] if merged else None
        if isinstance(one, Disable) and isinstance(last, Disable) and one.layer == last.layer:
            merged[-1] = Disable(one.layer, tuple(dict.fromkeys(last.experts + one.experts)))
        else:
            merged.append(one)
    return merged


def _mixtral(model: LLM | Mixtral) -> Mixtral:
    return model.model if isinstance(model, LLM) else model


def _figures_as_dict(figures: Figures) -> dict[str, Any]:
    values = {field.name: getattr(figures, field.name) for field in dataclasses.fields(figures)}
    return {name: one.as_dict() if isinstance(one, Estimate) else one for name, one in values.items()}
