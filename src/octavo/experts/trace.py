"""Which experts the tokens of texts were routed to: recorded from a model, kept in a file, read again.

A trace is one safetensors file of ``topk_ids`` [tokens, layers, top_k], int16, as vLLM returns routed experts. All else
is optional: the other tensors of `RoutingTrace`, ``text`` (the tokens' texts in UTF-8, one after the other) with
``text_ends`` (int64, where each ends), and in the header's metadata, as ``routing``, a JSON object of labels,
n_experts, model and revision.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.args import ModelArgs
from octavo.errors import CheckpointError, OptionError
from octavo.hooks import observed
from octavo.model import Mixtral, Routing
from octavo.storage.files import PlainFile
from octavo.storage.safetensors import SafetensorsFile, save_tensors

Array = npt.NDArray[Any]
_ENCODINGS = {
    "topk_ids": "I16",
    "token_ids": "I64",
    "topk_weights": "F32",
    "logits": "F32",
    "documents": "I32",
    "decoded": "BOOL",
    "text": "U8",
    "text_ends": "I64",
}
_NOTES = "routing"
_HINT = "octavo routing trace records one"
MAX_EXPERTS = 1 << 15  # what int16 has numbers for


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The experts that each token was routed to, in every layer that has a router.

    Attributes:
        topk_ids: [tokens, layers, top_k], int16, best first; of one token and layer no two are the same.
        token_ids: [tokens], int64.
        topk_weights: [tokens, layers, top_k], float32: what each expert's output counts.
        logits: [tokens, layers, experts], float32: the routers' own.
        documents: [tokens], int32: which text each token is of, from 0 upwards; None where all are of one.
        decoded: [tokens], bool: computed one by one, as replies are, and not as a part of a prompt.
        pieces: each token's text.
        labels: what each document is an example of, such as "french".
        n_experts: of a layer.
        model, revision: whose routing it is.

    Raises:
        OptionError: shapes or dtypes are others, there is no token, or ids are negative, repeated or too high.
    """

    topk_ids: Array
    token_ids: Array | None = None
    topk_weights: Array | None = None
    logits: Array | None = None
    documents: Array | None = None
    decoded: Array | None = None
    pieces: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    n_experts: int | None = None
    model: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        ids = self.topk_ids
        _expect("topk_ids", ids, np.int16, "[tokens, layers, top_k]", ids.ndim == 3 and 0 not in ids.shape)
        tokens, wide = ids.shape[:1], (*ids.shape[:2], self._known_experts)
        _check_ids(ids, self._known_experts)
        for name, dtype, shape in (
            ("token_ids", np.int64, tokens),
            ("topk_weights", np.float32, ids.shape),
            ("logits", np.float32, wide),
            ("documents", np.int32, tokens),
            ("decoded", np.bool_, tokens),
        ):
            array = getattr(self, name)
            if array is not None:
                _expect(name, array, dtype, f"{list(shape)}, as topk_ids", array.shape == shape)
                if array.dtype.kind == "f" and np.isnan(array).any():
                    raise OptionError(f"{name} holds NaN; expected numbers", _HINT)
        if self.pieces is not None and len(self.pieces) != ids.shape[0]:
            raise OptionError(f"there are texts of {len(self.pieces)} tokens; expected {ids.shape[0]}", _HINT)
        self._check_documents()

    def _check_documents(self) -> None:
        documents = self.document_ids
        if documents[0] != 0 or not np.isin(np.diff(documents), (0, 1)).all():
            raise OptionError("documents are not numbered 0, 1, 2... in the order of the tokens", _HINT)
        if self.labels is not None and len(self.labels) != documents[-1] + 1:
            raise OptionError(f"there are {len(self.labels)} labels for {documents[-1] + 1} documents", _HINT)

    @property
    def n_tokens(self) -> int:
        """How many tokens."""
        return int(self.topk_ids.shape[0])

    @property
    def n_layers(self) -> int:
        """How many layers that have a router."""
        return int(self.topk_ids.shape[1])

    @property
    def top_k(self) -> int:
        """How many experts a token is sent to."""
        return int(self.topk_ids.shape[2])

    @functools.cached_property
    def experts(self) -> int:
        """How many experts a layer has; where that is not known, as many as the highest id tells of."""
        known = self._known_experts
        return int(self.topk_ids.max()) + 1 if known is None else known

    @property
    def _known_experts(self) -> int | None:
        if self.n_experts is None and self.logits is not None and self.logits.ndim:
            return int(self.logits.shape[-1])
        return self.n_experts

    @property
    def document_ids(self) -> Array:
        """[tokens], int32: which document each is of."""
        return np.zeros(self.n_tokens, np.int32) if self.documents is None else self.documents

    @functools.cached_property
    def domains(self) -> tuple[str, ...]:
        """The different labels, in the order in which they come; ("all",) without labels."""
        return tuple(dict.fromkeys(self.labels or ("all",)))

    @property
    def domain_ids(self) -> Array:
        """[tokens], int32: which of `domains` each is of."""
        if self.labels is None:
            return np.zeros(self.n_tokens, np.int32)
        numbers = {label: number for number, label in enumerate(self.domains)}
        return np.array([numbers[label] for label in self.labels], np.int32)[self.document_ids]

    def select(self, tokens: Array | slice) -> RoutingTrace:
        """The trace of some tokens; documents of which none is left are left out.

        Args:
            tokens: bool [tokens], or a slice that steps forward.

        Raises:
            OptionError: no token is left.
        """
        which = np.arange(self.n_tokens)[tokens]
        arrays = ("topk_ids", "token_ids", "topk_weights", "logits", "decoded")
        found = {name: array[which] for name in arrays if (array := getattr(self, name)) is not None}
        left, documents = np.unique(self.document_ids[which], return_inverse=True)
        return RoutingTrace(
            **found,
            documents=None if self.documents is None else documents.astype(np.int32),
            pieces=None if self.pieces is None else tuple(self.pieces[token] for token in which),
            labels=None if self.labels is None else tuple(self.labels[document] for document in left),
            n_experts=self.n_experts,
            model=self.model,
            revision=self.revision,
        )

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
        save_tensors(self._tensors(), Path(path), {_NOTES: json.dumps(self._notes())})

    def _tensors(self) -> dict[str, Tensor]:
        arrays = {name: getattr(self, name) for name in _ENCODINGS if name in vars(self)}
        if self.pieces is not None:
            encoded = [piece.encode("utf-8", "replace") for piece in self.pieces]
            arrays["text"] = np.frombuffer(bytearray(b"".join(encoded)), np.uint8)
            arrays["text_ends"] = np.cumsum([len(piece) for piece in encoded], dtype=np.int64)
        return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items() if a is not None}

    def _notes(self) -> dict[str, Any]:
        notes = {name: getattr(self, name) for name in ("labels", "n_experts", "model", "revision")}
        return {name: value for name, value in notes.items() if value is not None}


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
        arrays: dict[str, Any] = {name: file.read(name).numpy() for name in _ENCODINGS if name in file}
        pieces = _read_pieces(arrays.pop("text", None), arrays.pop("text_ends", None))
        return RoutingTrace(**arrays, **_read_notes(file.metadata), pieces=pieces)
    except OptionError as error:
        raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from None


def _read_pieces(text: Array | None, ends: Array | None) -> tuple[str, ...] | None:
    if text is None and ends is None:
        return None
    if text is None or ends is None or text.ndim != 1 or ends.ndim != 1:
        raise OptionError("the tokens' text is not whole: it takes vectors text and text_ends", _HINT)
    limits = [0, *ends.tolist()]
    if sorted(limits) != limits or limits[-1] != len(text):
        raise OptionError("text_ends do not rise from 0 to the end of text", _HINT)
    data = text.tobytes()
    return tuple(data[begin:end].decode("utf-8", "replace") for begin, end in itertools.pairwise(limits))


def _read_notes(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the header says of the trace; it may be anybody's."""
    try:
        notes = json.loads(metadata.get(_NOTES, "{}"))
        labels, n_experts = notes.get("labels"), notes.get("n_experts")
        texts = [*(labels or ()), *(notes[name] for name in ("model", "revision") if name in notes)]
        if labels is not None and not isinstance(labels, list):
            raise TypeError("labels are no list")
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("labels, model and revision are texts")
        if n_experts is not None and (type(n_experts) is not int or not 1 <= n_experts <= MAX_EXPERTS):
            raise TypeError(f"n_experts is {n_experts!r}")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise OptionError(f"the header's {_NOTES!r} cannot be read ({error})", _HINT) from None
    return {
        "labels": None if labels is None else tuple(labels),
        "n_experts": n_experts,
        "model": notes.get("model"),
        "revision": notes.get("revision"),
    }


class Routed(NamedTuple):
    """How some tokens were routed.

    Attributes:
        ids: [tokens, layers, top_k], int16, best first.
        weights: the same shape, float32; None where they were not asked for.
        logits: [tokens, layers, experts], float32; None where they were not asked for.
    """

    ids: Array
    weights: Array | None = None
    logits: Array | None = None

    @classmethod
    def of(cls, forwards: Sequence[Sequence[Routing]], *, weights: bool, logits: bool) -> Routed:
        """The tokens of some forwards, each one `Routing` a layer: layer beside layer, one token behind the other."""
        layers = list(zip(*forwards, strict=True))
        return cls(
            _stacked([[one.topk_ids_TK for one in layer] for layer in layers]).astype(np.int16),
            _stacked([[one.topk_weights_TK for one in layer] for layer in layers]) if weights else None,
            _stacked([[one.logits_TE for one in layer] for layer in layers]) if logits else None,
        )

    @classmethod
    def joined(cls, parts: Sequence[Routed]) -> Routed:
        """The tokens of several, one behind the other."""
        ids, weights, logits = zip(*parts, strict=True)
        return cls(np.concatenate(ids), _joined(weights), _joined(logits))

    def select(self, tokens: Array | slice) -> Routed:
        """A copy of some of the tokens."""
        weights, logits = (None if one is None else one[tokens].copy() for one in self[1:])
        return Routed(self.ids[tokens].copy(), weights, logits)


def _stacked(layers: Sequence[Sequence[Tensor]]) -> Array:
    found: Array = torch.stack([torch.cat(list(parts)) for parts in layers], dim=1).cpu().numpy()
    return found


def _joined(arrays: Sequence[Array | None]) -> Array | None:
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if there else None


@dataclass
class Recording:
    """What the routers of a model chose so far.

    Attributes:
        forwards: of each forward that came to its end, one `Routing` a layer.
    """

    forwards: list[Sequence[Routing]] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        """How many tokens were routed together, in each forward that came to its end."""
        return [len(layers[0].topk_ids_TK) for layers in self.forwards]

    def trace(self) -> RoutingTrace:
        """Everything so far, token after token: ids, weights and logits.

        Raises:
            OptionError: nothing was routed.
        """
        if not self.forwards:
            raise OptionError("nothing was routed while it was recorded", hint="run a model of experts meanwhile")
        routed = Routed.of(self.forwards, weights=True, logits=True)
        n_experts = self.forwards[0][0].logits_TE.shape[1]
        return RoutingTrace(routed.ids, topk_weights=routed.weights, logits=routed.logits, n_experts=n_experts)


@contextmanager
def record(model: Mixtral) -> Iterator[Recording]:
    """Record what the model's routers choose, and hooks that are there already make of it.

    Tokens are taken in the order in which they are computed: run one sequence for a trace of its text.
    `octavo.routing.trace` records texts, many at a time.
    """
    recording = Recording()
    with observed(model, recording.forwards.append):
        yield recording


def _check_ids(ids: Array, n_experts: int | None) -> None:
    in_order = np.sort(ids, axis=2)
    limit = MAX_EXPERTS if n_experts is None else n_experts
    for wrong, what in (
        (in_order[:, :, :1] < 0, "an expert is negative"),
        (np.diff(in_order, axis=2) == 0, "an expert is repeated"),
        (in_order[:, :, -1:] >= limit, f"there are {n_experts} experts, the first is 0"),
    ):
        if wrong.any():
            token, layer, _ = np.argwhere(wrong)[0]
            raise OptionError(
                f"token {token} is routed to {ids[token, layer].tolist()} in layer {layer}: {what}", _HINT
            )


def _expect(name: str, array: Array, dtype: type[np.generic], shape: str, fits: bool) -> None:
    if array.dtype != dtype or not fits:
        raise OptionError(
            f"{name} is {array.dtype} {list(array.shape)}; expected {np.dtype(dtype)} {shape}", hint=_HINT
        )
