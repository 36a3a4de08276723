"""What the page needs of whoever replies: the local engine, or a model elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from octavo.chat import Message
from octavo.completion import Chunk, Completion
from octavo.sampling import SamplingParams

Array = npt.NDArray[Any]


class Stream(Protocol):
    """A reply as it comes. `close` may be called from another thread than the one that iterates."""

    def __iter__(self) -> Iterator[Chunk]:
        """The reply's chunks; they end soon after `close`."""
        ...

    def close(self) -> None:
        """Stop the model. Nothing happens if the reply is over."""
        ...

    @property
    def result(self) -> Completion:
        """The reply, once it is over."""
        ...


class Backend(Protocol):
    """Who replies, to many at once. `octavo.remote.RemoteModel` is one, and so is `octavo.ui.local.LocalModel`."""

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> Stream:
        """Begin a reply.

        Raises:
            UserError: it cannot be given, and why.
        """
        ...


@dataclass(frozen=True, slots=True)
class Routed:
    """A reply's tokens and the experts they were routed to, so far.

    Attributes:
        pieces: the text of each token.
        topk_ids: [tokens, layers, top_k], int16, best first.
        n_experts: of each layer.
    """

    pieces: tuple[str, ...]
    topk_ids: Array
    n_experts: int
