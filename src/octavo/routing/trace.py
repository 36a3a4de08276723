"""Record which experts the tokens of texts are routed to, and those of the replies to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.checkpoint import open_checkpoint
from octavo.engine import Engine
from octavo.errors import OptionError, PromptError, TokenizerError
from octavo.experts import RoutingTrace
from octavo.experts.trace import Routed
from octavo.hooks import observed
from octavo.llm import LLM, SHIPPED, shipped_model
from octavo.routing.texts import Document, encode, tokenizer_for
from octavo.sampling import SamplingParams
from octavo.tokenizer import Tokenizer
from octavo.watch import RoutingWatch

Array = npt.NDArray[Any]
Progress = Callable[[int, int], object]


def trace_documents(
    llm: LLM,
    documents: Sequence[Document],
    *,
    generate: int = 0,
    logits: bool = False,
    tokens: int | None = None,
    model: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> RoutingTrace:
    """Route documents, several at a time, and take down the experts of every token.

    An engine of its own computes them, which keeps nothing of one sequence for another: every token is routed, whatever
    has been computed before. Documents that are the same are computed once, and stand in the trace as often as they
    came. One that is longer than the context is cut into windows; each is a sequence and has a document number of its
    own, and begins as the document does where that is with BOS.

    Args:
        llm: of experts. Of its budget, if it has one, the key-value cache is taken anew: load it for this.
        documents: a conversation is written with the model's chat template, if it has one.
        generate: of each document, and of the last window of one, so many greedy tokens of a reply too, unless it ends
            before; none to a conversation that the assistant has ended.
        logits: take down the routers' logits.
        tokens: at most so many of the documents of each label, the replies not counted.
        model, revision: what the trace is to say whose it is.
        progress: called with how many tokens are routed, and how many there will be at most.

    Raises:
        OptionError: the model is dense, a number is out of range, or there is no document.
        PromptError: the model's chat template has no place for a conversation.
        TokenizerError: the model has no tokenizer.
    """
    if not documents:
        raise OptionError("there is no document to record", hint="give one at least")
    for name, value, least in (("generate", generate, 0), ("tokens", tokens, 1)):
        if value is not None and value < least:
            raise OptionError(f"{name} is {value}; expected {least} or more", hint=f"such as {name}=100")
    windows = _windows(llm, documents, generate, tokens)
    if not windows:
        raise PromptError(f"{documents[0].name}: holds no token, nor does any other", "give it at least a word")
    routed = _Run(llm, windows, logits=logits, progress=progress).route()
    return _put_together(llm, windows, routed, model, revision)


def token_pieces(tokenizer: Tokenizer, token_ids: Iterable[int]) -> tuple[str, ...]:
    """The text of each token; put together they read as the whole.

    A character of several tokens stands at the last of them, the others show their bytes: `<0xF0>`. A control token
    shows its name.
    """
    detokenizer = tokenizer.detokenizer()
    found = []
    for token_id in token_ids:
        text, piece = detokenizer.push(token_id), tokenizer.piece(token_id)
        if piece is None:
            text += tokenizer.token_name(token_id) or f"<{token_id}>"
        elif not text:
            text = "".join(f"<0x{byte:02X}>" for byte in piece.text if byte >= 0x80)
        found.append(text)
    return tuple(found)


def tokenizer_of(model: str) -> Tokenizer:
    """The tokenizer of "menny", a folder or a Hub id, of which nothing else is fetched.

    Raises:
        UserError: there is no such model, or it has no tokenizer.
    """
    tokenizer = open_checkpoint(shipped_model() if model == SHIPPED else model).tokenizer()
    if tokenizer is None:
        raise TokenizerError(f"{model}: holds no tokenizer", "leave the model out, and with it the tokens' text")
    return tokenizer


def revision_of(folder: Path) -> str | None:
    """The commit of a folder in the Hub's cache; None of any other."""
    return folder.name if folder.parent.name == "snapshots" else None


@dataclass(frozen=True)
class _Window:
    """A sequence to route: a document, or a part of one; `n_new` tokens of a reply are wanted."""

    prompt: tuple[int, ...]
    pieces: tuple[str, ...]
    label: str
    n_new: int


def _windows(llm: LLM, documents: Sequence[Document], generate: int, tokens: int | None) -> list[_Window]:
    """What is to be computed, in the order of the documents."""
    tokenizer = tokenizer_for(llm)
    size = llm.context - generate - 1  # the last token of a reply is not routed, so one more is generated
    if size < 2:
        raise OptionError(
            f"generate is {generate}, and the context holds {llm.context} tokens: no room is left for the text",
            hint=f"give at most {max(llm.context - 3, 0)}",
        )
    left: dict[str, int] = {}
    found: list[_Window] = []
    for document in documents:
        ids = encode(llm, document)
        if tokens is not None:
            ids = ids[: left.setdefault(document.label, tokens)]
            left[document.label] -= len(ids)
        answered = document.messages is not None and document.messages[-1].get("role") == "assistant"
        found += _cut(tokenizer, ids, size, document.label, 0 if answered else generate)
    return found


def _cut(tokenizer: Tokenizer, ids: list[int], size: int, label: str, n_new: int) -> Iterator[_Window]:
    pieces = token_pieces(tokenizer, ids)
    n_again = 1 if ids[:1] == [tokenizer.bos_id] else 0
    begin, end = 0, size
    while begin < len(ids):
        again = n_again if begin else 0
        yield _Window(
            (*ids[:again], *ids[begin:end]),
            (*pieces[:again], *pieces[begin:end]),
            label,
            n_new if end >= len(ids) else 0,
        )
        begin, end = end, end + size - n_again


@dataclass(frozen=True)
class _Done:
    """How a sequence was routed: prompt and reply, but for the reply's last token."""

    routed: Routed
    reply: tuple[int, ...]


class _Run:
    """One engine, and what it routes."""

    def __init__(self, llm: LLM, windows: Sequence[_Window], *, logits: bool, progress: Progress | None) -> None:
        # Prompts that are the same are prefilled once by the engine, and only one of them would be seen.
        self._wanted: dict[tuple[int, ...], int] = {}
        for window in windows:
            self._wanted[window.prompt] = max(window.n_new, self._wanted.get(window.prompt, 0))
        own = llm.engine
        self._engine = Engine(
            llm.model,
            max_batch_size=own.max_batch_size,
            prefill_chunk=own.prefill_chunk,
            context=own.context,
            whole_cache=llm.plan is not None,
        )
        self._watch = RoutingWatch(self._engine, weights=True, logits=logits)
        turns = llm.template.stop_ids if llm.converses else ()
        self._stop_ids = llm.eos_ids | frozenset(turns)
        self._progress = progress
        self._n_done = 0
        self._n_total = sum(len(prompt) + n_new for prompt, n_new in self._wanted.items())

    def route(self) -> dict[tuple[int, ...], _Done]:
        """All of them to their end, by prompt."""
        under_way: dict[int, tuple[int, ...]] = {}
        replies: dict[int, list[int]] = {}
        done: dict[tuple[int, ...], _Done] = {}
        try:
            for prompt, n_new in self._wanted.items():
                params = SamplingParams(temperature=0, max_tokens=n_new + 1)
                seq_id = self._engine.add(prompt, params, stop_ids=self._stop_ids)
                under_way[seq_id], replies[seq_id] = prompt, []
                self._watch.watch(seq_id)
            with observed(self._engine.model, lambda layers: self._tell(len(layers[0].topk_ids_TK))):
                while self._engine.has_work:
                    for event in self._engine.step():
                        if event.token_id is None:
                            raise event.error or RuntimeError("a sequence failed for no reason")
                        replies[event.seq_id].append(event.token_id)
                        if event.finish_reason is not None:
                            prompt = under_way.pop(event.seq_id)
                            done[prompt] = self._finish(event.seq_id, prompt, tuple(replies.pop(event.seq_id)[:-1]))
        finally:
            for seq_id in under_way:
                self._engine.cancel(seq_id)
                self._watch.forget(seq_id)
        if self._progress is not None:  # replies may have ended early
            self._progress(self._n_done, self._n_done)
        return done

    def _finish(self, seq_id: int, prompt: tuple[int, ...], reply: tuple[int, ...]) -> _Done:
        routed = self._watch.routed(seq_id)
        self._watch.forget(seq_id)
        if len(routed.ids) != len(prompt) + len(reply):
            raise RuntimeError(f"{len(routed.ids)} tokens were routed, of {len(prompt) + len(reply)} computed")
        return _Done(routed, reply)

    def _tell(self, n_tokens: int) -> None:
        self._n_done += n_tokens
        if self._progress is not None:
            self._progress(self._n_done, self._n_total)


def _put_together(
    llm: LLM, windows: Sequence[_Window], done: dict[tuple[int, ...], _Done], model: str | None, revision: str | None
) -> RoutingTrace:
    parts: list[Routed] = []
    token_ids: list[int] = []
    documents: list[int] = []
    decoded: list[bool] = []
    pieces: list[str] = []
    tokenizer = tokenizer_for(llm)
    for number, window in enumerate(windows):
        found, n_prompt = done[window.prompt], len(window.prompt)
        reply = found.reply[: window.n_new]
        ids = [*window.prompt, *reply]
        parts.append(found.routed.select(slice(len(ids))))
        token_ids += ids
        documents += [number] * len(ids)
        decoded += [False] * n_prompt + [True] * len(reply)
        pieces += [*window.pieces, *(token_pieces(tokenizer, ids)[n_prompt:] if reply else ())]
    routed = Routed.joined(parts)
    moe = llm.model.args.moe
    return RoutingTrace(
        routed.ids,
        np.array(token_ids, np.int64),
        topk_weights=routed.weights,
        logits=routed.logits,
        documents=np.array(documents, np.int32),
        decoded=np.array(decoded),
        pieces=tuple(pieces),
        labels=tuple(window.label for window in windows),
        n_experts=None if moe is None else moe.num_experts,
        model=model,
        revision=revision,
    )
