"""The local engine behind the page: one worker steps it, every reply's routing is watched."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Protocol

import numpy as np

from octavo.chat import Message
from octavo.completion import Chunk, Completion, Prepared, Request, leaves_room
from octavo.llm import LLM
from octavo.sampling import SamplingParams
from octavo.ui.backend import Routed
from octavo.watch import RoutingWatch

NOTHING = Routed((), np.empty((0, 1, 1), np.int16), 0)


class Update(Protocol):
    """A chunk of a reply."""

    @property
    def chunk(self) -> Chunk: ...


class Ticket(Protocol):
    """A request under way, as `octavo.serve.worker.Ticket` is one."""

    def __iter__(self) -> Iterator[Update]: ...

    def cancel(self) -> None: ...

    @property
    def request(self) -> Request | None: ...

    @property
    def result(self) -> Completion: ...


class Worker(Protocol):
    """Who steps the engine, as `octavo.serve.worker.Worker` does."""

    def submit(self, prepared: Prepared) -> Ticket: ...


class LocalModel:
    """A `Backend` of an `LLM` and the worker that steps it; its replies' routing can be watched.

    Attributes:
        context: tokens of a conversation.
        n_layers, n_experts: of the model; no experts for a dense one.
    """

    def __init__(self, llm: LLM, worker: Worker) -> None:
        self._llm = llm
        self._worker = worker
        self._watch = RoutingWatch(llm) if llm.model.args.moe else None
        self.context = llm.context
        self.n_layers = llm.model.args.n_layers
        self.n_experts = self._watch.n_experts if self._watch else 0

    def stream(self, messages: Sequence[Message], params: SamplingParams) -> LocalStream:
        """Begin a reply. The oldest exchanges are left out where the rest would leave no room for it.

        Raises:
            UserError: the conversation is blank, or its last message alone too long for the context; the worker takes
                no more.
        """
        fitting, dropped = self._fitting(list(messages), params)
        prepared = self._llm.prepare(fitting, params)
        with ExitStack() as catching:
            if self._watch is not None:
                catching.enter_context(self._watch.catch())
            ticket = self._worker.submit(prepared)
            return LocalStream(ticket, self._llm, self._watch, catching.pop_all(), dropped)

    def _fitting(self, messages: list[Message], params: SamplingParams) -> tuple[list[Message], int]:
        """The conversation's end that leaves room for a reply, and how many exchanges that leaves out."""
        system = messages[:1] if messages and messages[0].role == "system" else []
        turns, dropped = messages[len(system) :], 0
        while len(turns) > 2:
            if leaves_room(len(self._llm.template.render(system + turns)), self.context, params):
                break
            turns, dropped = turns[2:], dropped + 1
        return system + turns, dropped


class LocalStream:
    """A reply of the local engine, whose routing can be looked at while it comes, and afterwards.

    Attributes:
        note: what else is to be said about the reply; "" for nothing.
    """

    def __init__(self, ticket: Ticket, llm: LLM, watch: RoutingWatch | None, catching: ExitStack, dropped: int) -> None:
        self._ticket = ticket
        self._watch = watch
        self._catching = catching  # until the sequence has an id to watch it by
        self._tokenizer = llm.tokenizer
        self._detokenizer = llm.tokenizer.detokenizer() if llm.tokenizer else None
        self._pieces: list[str] = []
        self._lock = threading.Lock()
        self._seq_id: int | None = None
        self._final: Routed | None = None
        self.note = f"the oldest {dropped} of the exchanges no longer fit and were left out" if dropped else ""

    def __iter__(self) -> Iterator[Chunk]:
        """The reply's chunks; they end soon after `close`."""
        try:
            for update in self._ticket:
                self._begin_watch()
                yield update.chunk
        finally:
            self.close()
            self._settle()

    def close(self) -> None:
        """Stop the model. Nothing happens if the reply is over."""
        self._ticket.cancel()
        self._begin_watch()
        self._catching.close()

    @property
    def result(self) -> Completion:
        """The reply, once it is over."""
        return self._ticket.result

    def routed(self) -> Routed:
        """The experts so far."""
        request, watch, seq_id = self._ticket.request, self._watch, self._seq_id
        if self._final is not None or request is None or watch is None or seq_id is None:
            return self._final or NOTHING
        reply = request.replies[seq_id]
        token_ids = list(reply.token_ids)
        n_prompt = request.prompt_tokens - reply.cached_tokens
        ids = watch.ids(seq_id, n_prompt)[: len(token_ids)]
        so_far = Routed(self._texts(token_ids)[: len(ids)], ids, watch.n_experts)
        return self._final or so_far  # it may have come to its end meanwhile, and be watched no more

    def _settle(self) -> None:
        """The reply is over: keep what there is of its routing, and watch no more."""
        final = self.routed()
        with self._lock:
            self._final = final
            if self._watch is not None and self._seq_id is not None:
                self._watch.forget(self._seq_id)
        self._catching.close()

    def _begin_watch(self) -> None:
        """Watch the sequence, as soon as it is known."""
        if self._seq_id is not None or self._watch is None or self._ticket.request is None:
            return
        with self._lock:
            if self._seq_id is None and self._final is None:
                self._seq_id = next(iter(self._ticket.request.replies))
                self._watch.watch(self._seq_id)
        self._catching.close()

    def _texts(self, token_ids: list[int]) -> tuple[str, ...]:
        """Each token's text; where it completes no character, its name in the vocabulary."""
        if self._tokenizer is None or self._detokenizer is None:
            return tuple(map(str, token_ids))
        with self._lock:  # the reply and the layer slider may ask at the same time
            for token_id in token_ids[len(self._pieces) :]:
                self._pieces.append(self._detokenizer.push(token_id) or self._tokenizer.token_name(token_id))
            return tuple(self._pieces[: len(token_ids)])
