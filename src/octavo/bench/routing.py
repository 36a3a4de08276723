"""Other routing than a model's own, to measure with: even, sticky, or that of a recorded trace."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.args import ModelArgs, MoEArgs
from octavo.errors import OptionError
from octavo.experts.trace import RoutingTrace, read_trace
from octavo.hooks import rerouted
from octavo.model import Mixtral, Router, Routing

KINDS = "uniform, sticky:P (P from 0 to 1) or trace:FILE"


class Choice(Protocol):
    """Chooses experts in a router's place."""

    def __call__(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Return ids [tokens, top_k], int64, and weights [tokens, top_k], float32, for a layer's next tokens."""
        ...


class Sticky:
    """Each of the experts of a layer's last token stays with some probability; the others are chosen evenly.

    Tokens that are computed together count one behind the other.

    Args:
        moe: the experts.
        stay: that probability; with 0 every token's experts are even and independent.
        seed: of all.
    """

    def __init__(self, moe: MoEArgs, stay: float, seed: int = 0) -> None:
        self.moe, self.stay = moe, stay
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._last: dict[int, npt.NDArray[Any]] = {}

    def __call__(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """See `Choice`; all weights are the same."""
        top_k = self.moe.num_experts_per_tok
        order = self._random.random((tokens, self.moe.num_experts))
        stays = self._random.random((tokens, top_k)) < self.stay
        ids = np.empty((tokens, top_k), dtype=np.int64)
        last = self._last.get(layer)
        for token in range(tokens):
            if last is not None:
                order[token, last[stays[token]]] = -1
            last = ids[token] = np.argsort(order[token])[:top_k]
        if last is not None:
            self._last[layer] = last
        return torch.from_numpy(ids), torch.full((tokens, top_k), 1 / top_k)


class Traced:
    """Token after token of a trace, from its beginning again when it ends; every layer on its own."""

    def __init__(self, trace: RoutingTrace) -> None:
        self.trace = trace
        self._next: dict[int, int] = {}

    def __call__(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """See `Choice`; where the trace has no weights, all are the same."""
        count, _, top_k = self.trace.topk_ids.shape
        begin = self._next.get(layer, 0)
        self._next[layer] = begin + tokens
        which = np.arange(begin, begin + tokens) % count
        ids = torch.from_numpy(self.trace.topk_ids[which, layer].astype(np.int64))
        if self.trace.topk_weights is None:
            return ids, torch.full((tokens, top_k), 1 / top_k)
        return ids, torch.from_numpy(self.trace.topk_weights[which, layer])


def parse_routing(text: str, args: ModelArgs, seed: int = 0) -> Choice:
    """Return what `--routing` says.

    Args:
        text: "uniform", "sticky:P" or "trace:FILE".
        args: the model's shape.
        seed: of random choices.

    Raises:
        OptionError: it is none of these, the model is dense, or the trace is another model's.
        CheckpointError: the trace cannot be read.
    """
    if args.moe is None:
        raise OptionError("--routing is for models with experts; this one is dense", hint="leave it out")
    kind, _, value = text.partition(":")
    if text == "uniform":
        return Sticky(args.moe, 0, seed)
    if kind == "sticky":
        return Sticky(args.moe, _probability(value), seed)
    if kind == "trace" and value:
        trace = read_trace(Path(value).expanduser())
        trace.check(args)
        return Traced(trace)
    raise OptionError(f"--routing is {text!r}; expected {KINDS}", hint="such as --routing sticky:0.5")


def routed(model: Mixtral, choice: Choice | None) -> AbstractContextManager[None]:
    """Let something else choose in the routers' place; None leaves them alone."""
    if choice is None:
        return nullcontext()

    def choose(layer: int, router: Router, x_TD: Tensor, routing: Routing) -> Routing:
        ids, weights = choice(layer, len(routing.topk_ids_TK))
        device = routing.topk_ids_TK.device
        return Routing(ids.to(device), weights.to(device), routing.logits_TE)

    return rerouted(model, choose)


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise OptionError(f"--routing sticky:{text}: expected a probability from 0 to 1", hint="such as sticky:0.5")
    return value
