"""Which experts the tokens of a text were routed to: recorded from a model, kept in a file, read again.

A trace is one safetensors file of ``topk_ids`` [tokens, layers, top_k], int16, as vLLM returns routed experts, and
perhaps ``token_ids`` [tokens], int64, and ``topk_weights`` [tokens, layers, top_k], float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from torch import nn

from octavo.args import ModelArgs
from octavo.errors import CheckpointError, OptionError
from octavo.model import Mixtral, Routing
from octavo.storage.files import PlainFile
from octavo.storage.safetensors import SafetensorsFile

Array = npt.NDArray[Any]
_ENCODINGS = {"topk_ids": "I16", "token_ids": "I64", "topk_weights": "F32"}
_HINT = "octavo.experts.trace.record records one, and RoutingTrace.save writes it"


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The experts that each token was routed to, in every layer.

    Attributes:
        topk_ids: [tokens, layers, top_k], int16; of one token and layer no two are the same.
        token_ids: [tokens], int64: the text itself.
        topk_weights: [tokens, layers, top_k], float32: what each expert's output counts.

    Raises:
        OptionError: shapes or dtypes are others, there is no token, or ids are negative or repeated.
    """

    topk_ids: Array
    token_ids: Array | None = None
    topk_weights: Array | None = None

    def __post_init__(self) -> None:
        ids = self.topk_ids
        _expect("topk_ids", ids, np.int16, "[tokens, layers, top_k]", ids.ndim == 3 and 0 not in ids.shape)
        tokens = ids.shape[:1]
        if self.token_ids is not None:
            fits = self.token_ids.shape == tokens
            _expect("token_ids", self.token_ids, np.int64, f"{list(tokens)}, as topk_ids", fits)
        if self.topk_weights is not None:
            fits = self.topk_weights.shape == ids.shape
            _expect("topk_weights", self.topk_weights, np.float32, f"{list(ids.shape)}, as topk_ids", fits)
        in_order = np.sort(ids, axis=2)
        for wrong, what in ((in_order[:, :, :1] < 0, "negative"), (np.diff(in_order, axis=2) == 0, "repeated")):
            if wrong.any():
                token, layer, _ = np.argwhere(wrong)[0]
                chosen = ids[token, layer].tolist()
                raise OptionError(f"token {token} is routed to {chosen} in layer {layer}: an expert is {what}", _HINT)

    def check(self, args: ModelArgs) -> None:
        """See that it may be of a model of this shape.

        Raises:
            OptionError: the model has other layers or experts, or chooses another number of them.
        """
        _, layers, top_k = self.topk_ids.shape
        if args.moe is None:
            raise OptionError("the model is dense; a routing trace is of experts", hint="leave the trace out")
        chosen, experts = args.moe.num_experts_per_tok, args.moe.num_experts
        if (layers, top_k) != (args.n_layers, chosen) or self.topk_ids.max() >= experts:
            raise OptionError(
                f"the trace is of {layers} layers and {top_k} experts a token, the highest {self.topk_ids.max()}; "
                f"the model has {args.n_layers} layers and {chosen} experts a token of {experts}",
                hint="record a trace with this model",
            )

    def save(self, path: str | Path) -> None:
        """Write it beside its place, and move it there.

        Raises:
            CheckpointError: the disk is full, or the place cannot be written.
        """
        path = Path(path)
        beside = path.with_name(f".{path.name}.new-{os.getpid()}")
        tensors = {name: np.ascontiguousarray(array) for name, array in vars(self).items() if array is not None}
        try:
            save_file(tensors, beside)
            beside.replace(path)
        except Exception as error:  # safetensors has an exception of its own for a full disk
            raise CheckpointError(
                f"{path}: could not be written ({error})", hint="is the disk full, or not yours to write?"
            ) from error
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)


def read_trace(path: str | Path) -> RoutingTrace:
    """Read a trace.

    Raises:
        CheckpointError: there is no such file, it is no safetensors file or a damaged one, or what it holds is no
            trace.
    """
    file = SafetensorsFile(PlainFile(Path(path)))
    if "topk_ids" not in file:
        there = ", ".join(file.names()[:5]) or "nothing"
        raise CheckpointError(f"{path}: holds no topk_ids, which a routing trace has (it holds {there})", hint=_HINT)
    for name, encoding in _ENCODINGS.items():
        if name in file and (found := file.info(name).encoding) != encoding:
            raise CheckpointError(f"{path}: {name} is {found}; expected {encoding}", hint=_HINT)
    try:
        return RoutingTrace(**{name: file.read(name).numpy() for name in _ENCODINGS if name in file})
    except OptionError as error:
        raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from None


@dataclass
class Recording:
    """What the routers of a model chose so far.

    Attributes:
        layers: ids [tokens of a step, top_k] of each step, by layer.
    """

    layers: list[list[Array]] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        """How many tokens were routed together, in each forward that came to its end."""
        whole = min(map(len, self.layers), default=0)
        return [len(ids) for ids in self.layers[0][:whole]] if whole else []

    def trace(self) -> RoutingTrace:
        """Everything so far, token after token.

        Raises:
            OptionError: nothing was routed.
        """
        whole = len(self.steps)
        if not whole:
            raise OptionError("nothing was routed while it was recorded", hint="run a model of experts meanwhile")
        return RoutingTrace(np.stack([np.concatenate(ids[:whole]) for ids in self.layers], axis=1))


@contextmanager
def record(model: Mixtral) -> Iterator[Recording]:
    """Record what the model's routers choose, and hooks that are there already make of it.

    Tokens are taken in the order in which they are computed: run one sequence for a trace of its text.
    """
    routers = model.routers()
    recording = Recording([[] for _ in routers])
    hooks = [
        router.register_forward_hook(partial(_note, ids)) for router, ids in zip(routers, recording.layers, strict=True)
    ]
    try:
        yield recording
    finally:
        for hook in hooks:
            hook.remove()


def _note(ids: list[Array], router: nn.Module, inputs: Any, routing: Routing) -> None:
    ids.append(routing.topk_ids_TK.cpu().numpy().astype(np.int16))


def _expect(name: str, array: Array, dtype: type[np.generic], shape: str, fits: bool) -> None:
    if array.dtype != dtype or not fits:
        raise OptionError(
            f"{name} is {array.dtype} {list(array.shape)}; expected {np.dtype(dtype)} {shape}", hint=_HINT
        )
