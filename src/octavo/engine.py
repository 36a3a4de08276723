"""Many sequences at once through one model: admit, prefill in chunks, decode as a batch, finish, cancel.

The engine knows token ids only. Each sequence owns one row of the key-value cache; rows 0..n-1 always belong
to the n sequences being decoded and row n to the one being prefilled, so that a decode step is one forward
over `cache.rows(0, n)`. A sequence's tokens depend on its prompt, its parameters and its seed, never on its
neighbours beyond float rounding: every sequence has its own random generator and sees its own row alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from octavo.args import ModelArgs
from octavo.cache import KVCache, make_cache
from octavo.card import on_card
from octavo.decode import Decoder, Launched, launch, send
from octavo.errors import OctavoError, OptionError, PromptError
from octavo.kernels import torch_on_one_thread
from octavo.kernels.memory import taking
from octavo.kernels.modules import uses_kernels
from octavo.machine import check_room
from octavo.model import Mixtral
from octavo.plan import CHUNK, kv_cache_bytes
from octavo.prefix import PrefixCache
from octavo.sampling import (
    History,
    SamplingParams,
    TokenLogprobs,
    make_generator,
    sample,
    token_logprobs,
    tokens_logprobs,
)
from octavo.sampling_batch import BatchParams, batch_params, samples_on_device, uniforms

FinishReason = Literal["stop", "length", "error"]
PromptLogprobs = tuple[TokenLogprobs | None, ...]


class Event(NamedTuple):
    """One new token of one sequence, or its failure.

    Attributes:
        seq_id: as `Engine.add` returned it.
        token_id: the token, a stop id included; None only where `finish_reason` is "error".
        logprobs: where the sequence's parameters ask for them.
        finish_reason: None while the sequence goes on; "stop" at a stop id; "length" at max_tokens or where
            the context is full; "error" where `error` says what went wrong. No event follows a finish.
        error: the exception that ended this sequence and no other one's.
        prefill_seconds: with a sequence's first token, the time spent on its prompt.
        cached_tokens: with the first token, how many of the prompt's had been computed for others before.
        prompt_logprobs: with the first token, where asked for: of each token of the prompt, None for the first.
    """

    seq_id: int
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    prefill_seconds: float = 0.0
    cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None


class Constraint(Protocol):
    """What a reply may consist of, such as JSON; one for each sequence."""

    def allowed(self) -> Tensor | None:
        """Return bool [V] on the CPU, the tokens that may come next, one at least; None for all."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on with this token, which was allowed."""
        ...


@dataclass(slots=True, eq=False)
class _Sequence:
    """A prompt, what was asked of it, and how far it has come."""

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]
    limit: int  # new tokens at most
    generator: torch.Generator
    history: History | None
    constraint: Constraint | None
    wants_prompt: int | None  # log-probabilities of the prompt, and so many of the likeliest tokens'
    generated: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    n_prefilled: int = 0
    n_cached: int = 0
    prefill_seconds: float = 0.0
    failed: bool = False
    over: bool = False  # finished, failed or cancelled: its row is free at the next compaction


class Engine:
    """Generate for up to `max_batch_size` sequences at a time; more wait, first come, first served.

    Args:
        model: in evaluation mode.
        max_batch_size: rows of the key-value cache, all of which grow with the longest sequence.
        prefill_chunk: at most so many prompt tokens are read between two decode steps, so that a long prompt
            does not hold up the others.
        context: tokens of a sequence, prompt and reply together, where they are fewer than the model's.
        prefix_bytes: of keys and values that are kept of sequences that are over, for prompts that begin like these.
        whole_cache: make the key-value cache once, as large as it can become (`octavo.plan.kv_cache_bytes`); one that
            grows needs room for two at a time.
        ahead: decode by `octavo.decode`, on the device alone: a step is begun before the host has seen the last one's
            tokens. Needs the whole cache. By default for models on a card.

    Attributes:
        context: tokens of a sequence.
        computing: sequences, and how many tokens of each, of the forward that is running: what a hook on a module sees,
            row after row.

    Not thread-safe: one thread calls `add`, `step` and `cancel`.
    """

    def __init__(
        self,
        model: Mixtral,
        *,
        max_batch_size: int = 8,
        prefill_chunk: int = CHUNK,
        context: int | None = None,
        prefix_bytes: int = 0,
        whole_cache: bool = False,
        ahead: bool | None = None,
    ) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise OptionError(f"{name} is {value}; expected an integer of at least 1")
        self._args = model.args if context is None else with_context(model.args, context)
        self._ahead = on_card(model) if ahead is None else ahead
        self._whole_cache = whole_cache or self._ahead
        self._stale = False  # the cache, after a failure
        self.context = self._args.max_seq_len
        self.model = model
        self.max_batch_size = max_batch_size
        self.prefill_chunk = prefill_chunk
        self._torch_threads = torch_on_one_thread if uses_kernels(model) else nullcontext
        self._cache: KVCache | None = None
        self._decoder: Decoder | None = None
        self._launched: Launched | None = None
        self._params: tuple[list[_Sequence], BatchParams] | None = None  # of the last step that was launched
        self._prefixes = PrefixCache(prefix_bytes)
        self.computing: tuple[tuple[int, int], ...] = ()
        self._live: dict[int, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._prefilling: _Sequence | None = None
        self._running: list[_Sequence] = []  # by row
        self._outbox: list[Event] = []  # what the next return of `step` tells
        self._stepping = False
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._live or self._outbox)

    @property
    def n_running(self) -> int:
        """Sequences that have a row of the cache."""
        return len(self._live) - len(self._waiting)

    @property
    def n_waiting(self) -> int:
        """Sequences that wait for one."""
        return len(self._waiting)

    @property
    def prefix_nbytes(self) -> int:
        """Bytes of keys and values that are kept of sequences that are over."""
        return self._prefixes.nbytes

    def add(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        stop_ids: Iterable[int] = (),
        index: int = 0,
        constraint: Constraint | None = None,
        prompt_logprobs: int | None = None,
    ) -> int:
        """Queue a prompt.

        Args:
            ids: the prompt's token ids.
            params: `max_tokens`, `stop_ids`, `logprobs`, the sampling options and `seed`; `n` and `stop` are
                the caller's business.
            stop_ids: ids that end the sequence, besides those in `params`.
            index: which of several replies to the same prompt this is; its seed is `params.seed + index`.
                Replies queued one after another share one prefill.
            constraint: what the reply may consist of.
            prompt_logprobs: report the prompt's own log-probabilities, and the k likeliest tokens'; see
                `SamplingParams.logprobs`.

        Returns:
            The sequence's id, in every event about it.

        Raises:
            PromptError: no ids, ids that are not the model's, or more than the context has room for.
            OptionError: `params.logit_bias` names an id that is not the model's.
        """
        prompt = tuple(int(i) for i in ids)
        self.check(prompt, params)
        room = self.context - len(prompt)
        sequence = _Sequence(
            id=self._next_id,
            prompt=prompt,
            params=params,
            stop_ids=frozenset(stop_ids) | frozenset(params.stop_ids),
            limit=room if params.max_tokens is None else min(params.max_tokens, room),
            generator=make_generator(params.seed, index),
            history=History(prompt, self.model.args.vocab_size) if params.penalizes else None,
            constraint=constraint,
            wants_prompt=prompt_logprobs,
        )
        self._next_id += 1
        self._live[sequence.id] = sequence
        self._waiting.append(sequence)
        return sequence.id

    def cancel(self, seq_id: int) -> None:
        """End a sequence; no event about it follows. Nothing happens if it is over already."""
        self._outbox = [event for event in self._outbox if event.seq_id != seq_id]
        sequence = self._live.pop(seq_id, None)
        if sequence is None:
            return
        sequence.over = True
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif not self._stepping:  # a step compacts by itself, when it is done with its rows
            with torch.inference_mode():
                self._compact()

    def step(self) -> list[Event]:
        """Read one chunk of prompts at most, then decode one token for each running sequence.

        A sequence whose logits cannot be sampled from fails alone. If the model itself fails, all sequences
        in the cache fail; those that wait go on. Either way each is told by an event. If the step is
        interrupted (KeyboardInterrupt), the sequences in the cache are lost too, and the next step tells.

        Returns:
            The new tokens and failures, in the order they came about.
        """
        self._stepping = True
        try:
            with torch.inference_mode(), self._torch_threads():
                n_decoding = len(self._running)
                self._prefill()
                self._decode(n_decoding)
                self._compact()
        except Exception as error:
            self._abandon(error)
        except BaseException:
            self._abandon(OctavoError("generation was interrupted"))
            raise
        finally:
            self._stepping = False
        events, self._outbox = self._outbox, []
        return events

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """See whether `add` would take a prompt; from any thread.

        Raises:
            UserError: what `add` raises.
        """
        args = self.model.args
        if not prompt:
            raise PromptError("the prompt is empty", "give at least one token, such as the beginning-of-text id")
        for low_or_high in (min(prompt), max(prompt)):
            if not 0 <= low_or_high < args.vocab_size:
                raise PromptError(
                    f"the prompt holds token id {low_or_high}; expected 0 to {args.vocab_size - 1}",
                    "was it encoded by another model's tokenizer?",
                )
        if len(prompt) >= self.context:
            whose, mend = "the model's context", "shorten the prompt"
            if self.context < args.max_seq_len:
                whose = "the context that was asked for or planned"
                mend += f", or load the model with more: context= or -o context=N, up to {args.max_seq_len}"
            raise PromptError(
                f"the prompt has {len(prompt)} tokens; {whose} holds {self.context}, "
                "at least one of them for the reply",
                mend,
            )
        for token_id in params.logit_bias:
            if token_id >= args.vocab_size:
                raise OptionError(
                    f"logit_bias names token id {token_id}; expected 0 to {args.vocab_size - 1}",
                    "token ids are the model's own; another model's mean other tokens",
                )

    # ---------------------------------------- inside a step

    def _prefill(self) -> None:
        """Read the next chunk of the prompt in hand, and of others while these are short.

        Where a prompt is cut does not depend on its neighbours.
        """
        left = self.prefill_chunk
        while (sequence := self._prefilling or self._admit()) is not None:
            chunk = sequence.prompt[sequence.n_prefilled :][: self.prefill_chunk]
            left -= len(chunk)
            if left < 0:
                return
            self._read_prompt(sequence, chunk)

    def _read_prompt(self, sequence: _Sequence, chunk: tuple[int, ...]) -> None:
        """Read a chunk of a prompt; at its end, choose the first token."""
        row, start = len(self._running), sequence.n_prefilled
        started = time.perf_counter()
        logits_1TV = self._forward([sequence], [chunk], row, last_only=sequence.wants_prompt is None)
        sequence.prefill_seconds += time.perf_counter() - started
        sequence.n_prefilled += len(chunk)
        if sequence.wants_prompt is not None:
            following = sequence.prompt[start + 1 : sequence.n_prefilled + 1]
            rows = logits_1TV[0, : len(following)]
            sequence.prompt_logprobs += tokens_logprobs(rows, following, sequence.wants_prompt)
        if sequence.n_prefilled == len(sequence.prompt):
            self._prefilling = None
            self._running.append(sequence)
            # Rows are copied before anything is chosen: the first token may already be the last.
            for one in (sequence, *self._share_prefill(sequence, row)):
                self._choose(one, logits_1TV[0, -1])

    def _admit(self) -> _Sequence | None:
        """Give the longest waiting sequence the row behind the running ones, if there is one."""
        if not self._waiting or len(self._running) >= self.max_batch_size:
            return None
        self._prefilling = sequence = self._waiting.popleft()
        row = len(self._running)
        match = None if sequence.wants_prompt is not None else self._prefixes.find(sequence.prompt)
        if match is None:
            self._rows.reset_row(row)
        else:
            self._rows.restore_row(row, match.saved, match.length)
            sequence.n_prefilled = sequence.n_cached = match.length
        return sequence

    def _share_prefill(self, sequence: _Sequence, row: int) -> list[_Sequence]:
        """Start those next in line that have the same prompt from a copy of its row."""
        twins: list[_Sequence] = []
        while (
            self._waiting
            and (self._waiting[0].prompt, self._waiting[0].wants_prompt) == (sequence.prompt, sequence.wants_prompt)
            and len(self._running) < self.max_batch_size
        ):
            twin = self._waiting.popleft()
            self._rows.copy_row(row, len(self._running))
            self._running.append(twin)
            twin.prefill_seconds, twin.n_cached = sequence.prefill_seconds, sequence.n_cached
            twin.prompt_logprobs = sequence.prompt_logprobs
            twins.append(twin)
        return twins

    def _decode(self, n: int) -> None:
        """One token for each of the first n rows."""
        running = self._running[:n]
        if self._may_go_ahead(running):
            self._decode_ahead(running)
            return
        self._collect(None)
        running = [sequence for sequence in running if not sequence.over]
        if len(running) < n:  # some ended with what was under way: rows are closed up before the next step
            return
        if n == 0:
            return
        tokens = [sequence.generated[-1] for sequence in running]
        if self._ahead and self._decoder_of_rows().is_usable():
            logits_BV = self._decoder_of_rows().step(send([tokens], torch.int64, self.model.device)[0]).cpu()
        else:
            logits_BV = self._forward(running, [(token,) for token in tokens], 0)[:, 0]
        for sequence, logits_V in zip(running, logits_BV, strict=True):
            self._choose(sequence, logits_V)

    # ---------------------------------------- decoding ahead of the host

    def _may_go_ahead(self, running: Sequence[_Sequence]) -> bool:
        """Whether the device can choose all of these sequences' tokens, and nobody wants to look on."""
        if not self._ahead or not running or not self._decoder_of_rows().is_usable():
            return False
        return all(one.constraint is None and samples_on_device(one.params) for one in running)

    def _decode_ahead(self, running: list[_Sequence]) -> None:
        """Begin a step, then look at the one before: while the host is at it, the device computes.

        A sequence that turns out to be over was computed with once too often, which nobody is told. One that is bound
        to end with the tokens under way is not: it would leave a gap among the rows.
        """
        if self._launched is None:
            self._launched = self._launch(running)
        under_way = self._launched.sequences
        if any(len(one.generated) + (one in under_way) >= one.limit for one in running):
            self._collect(None)
        else:
            self._collect(self._launch(running))

    def _launch(self, running: list[_Sequence]) -> Launched:
        device = self.model.device
        if self._params is None or self._params[0] != running:
            self._params = (running, batch_params([one.params for one in running], device))
        how = self._params[1]
        pinned = device.type == "cuda"
        numbers = uniforms([one.params for one in running], [one.generator for one in running], pinned=pinned)
        return launch(self._decoder_of_rows(), running, self._last_tokens(running), how, numbers)

    def _last_tokens(self, running: list[_Sequence]) -> Tensor:
        """The token to feed to each: what is under way on the device, or what the host has."""
        device, before = self.model.device, self._launched
        known = send([[one.generated[-1] for one in running]], torch.int64, device)[0]
        if before is None:
            return known
        if before.sequences == running:
            return before.ids_B
        place = {id(one): row for row, one in enumerate(before.sequences)}
        rows = send([[place.get(id(one), -1) for one in running]], torch.int64, device)[0]
        return torch.where(rows < 0, known, before.ids_B[rows.clamp(min=0)])

    def _collect(self, following: Launched | None) -> None:
        """Tell the tokens of the step under way; another one may be under way behind it."""
        launched, self._launched = self._launched, following
        if launched is None:
            return
        for sequence, (token_id, ok) in zip(launched.sequences, launched.tokens(), strict=True):
            if sequence.over:
                continue
            if ok:
                self._accept(sequence, token_id)
            else:
                self._fail(sequence, OctavoError("the model's logits are NaN, infinite or all -inf"))

    def _decoder_of_rows(self) -> Decoder:
        if self._decoder is None:
            self._decoder = Decoder(self.model, self._rows)
        return self._decoder

    # ---------------------------------------- one forward, and what is chosen of it

    def _forward(
        self, sequences: Sequence[_Sequence], ids_BT: Sequence[tuple[int, ...]], row: int, *, last_only: bool = True
    ) -> Tensor:
        """Return logits `[B, T, V]`, or the last ones `[B, 1, V]`, float32, on the CPU: one transfer a step."""
        ids = torch.tensor(ids_BT, dtype=torch.int64, device=self.model.device)
        cache = self._rows.rows(row, row + len(ids_BT))
        self.computing = tuple((one.id, len(tokens)) for one, tokens in zip(sequences, ids_BT, strict=True))
        try:
            logits: Tensor = self.model(ids, cache=cache, last_only=last_only)
        finally:
            self.computing = ()
        return logits.cpu()

    def _choose(self, sequence: _Sequence, logits_V: Tensor) -> None:
        """Draw the sequence's next token and tell it."""
        if sequence.over:  # cancelled while this step ran
            return
        params, constraint = sequence.params, sequence.constraint
        try:
            allowed_V = None if constraint is None else constraint.allowed()
            possible_V = logits_V if allowed_V is None else logits_V.masked_fill(~allowed_V, -torch.inf)
            token_id = sample(possible_V, params, sequence.generator, sequence.history)
            if constraint is not None:
                constraint.accept(token_id)
            wanted = params.logprobs
            logprobs = None if wanted is None else token_logprobs(logits_V, token_id, wanted)
        except Exception as error:
            self._fail(sequence, error)
            return
        self._accept(sequence, token_id, logprobs)

    def _fail(self, sequence: _Sequence, error: Exception) -> None:
        sequence.failed = True
        self._rows.wipe_row(self._running.index(sequence))
        self._tell(sequence, Event(sequence.id, None, finish_reason="error", error=error))

    def _accept(self, sequence: _Sequence, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Take a token for a sequence's next, and tell it."""
        if sequence.history is not None:
            sequence.history.append(token_id)
        sequence.generated.append(token_id)
        reason: FinishReason | None = None
        if token_id in sequence.stop_ids:
            reason = "stop"
        elif len(sequence.generated) >= sequence.limit:
            reason = "length"
        event = Event(sequence.id, token_id, logprobs, reason)
        if len(sequence.generated) == 1:
            of_prompt = None if sequence.wants_prompt is None else tuple(sequence.prompt_logprobs)
            event = event._replace(
                prefill_seconds=sequence.prefill_seconds, cached_tokens=sequence.n_cached, prompt_logprobs=of_prompt
            )
        self._tell(sequence, event)

    def _tell(self, sequence: _Sequence, event: Event) -> None:
        self._outbox.append(event)
        if event.finish_reason:
            sequence.over = True
            self._live.pop(sequence.id, None)

    def _compact(self) -> None:
        """Close the gaps that finished sequences left, by moving rows from the end into them."""
        for row, sequence in enumerate(self._running):
            if sequence.over:
                self._save(sequence, row)
        n_before = len(self._running)
        keep = sum(not sequence.over for sequence in self._running)
        gaps = [row for row in range(keep) if self._running[row].over]
        movers = [row for row in range(keep, n_before) if not self._running[row].over]
        for gap, mover in zip(gaps, movers, strict=True):
            self._rows.copy_row(mover, gap)
            self._running[gap] = self._running[mover]
        del self._running[keep:]
        if self._prefilling is not None and self._prefilling.over:
            self._prefilling = None
        if self._prefilling is not None and keep < n_before:
            self._rows.copy_row(n_before, keep)
        if self._decoder is not None:
            for row in range(keep + (self._prefilling is not None), n_before + (self._prefilling is not None)):
                self._rows.reset_row(row)  # how long unused rows are decides how much of all is looked at

    def _save(self, sequence: _Sequence, row: int) -> None:
        """Keep a sequence's keys and values for prompts that begin like it: those of all tokens but the last."""
        rows, ids = self._rows, (*sequence.prompt, *sequence.generated)
        n = rows.lengths[row]
        if n <= rows.capacity and self._prefixes.wants(ids[:n], n * rows.token_nbytes) and not sequence.failed:
            self._prefixes.add(ids[:n], rows.save_row(row))

    @property
    def _rows(self) -> KVCache:
        """The cache, made when first needed."""
        if self._cache is None:
            args, batch, dtype, device = self._args, self.max_batch_size, self.model.dtype, self.model.device
            if self._whole_cache and device.type == "cpu":
                check_room(kv_cache_bytes(args, self.context, batch, dtype.itemsize))
            with taking("KV cache", kv_cache_bytes(args, self.context, batch, dtype.itemsize), device):
                self._cache = make_cache(args, batch, whole=self._whole_cache, dtype=dtype, device=device)
            self._decoder = None
        elif self._stale:
            self._cache.wipe()
        self._stale = False
        return self._cache

    def _abandon(self, error: Exception) -> None:
        """End every sequence that has a row, and give up the cache, whose state nobody knows.

        One that takes all its memory at once is wiped instead: the error's traceback may hold it for long, and there
        is no room for two.
        """
        told = {event.seq_id for event in self._outbox if event.finish_reason}
        waiting = {sequence.id for sequence in self._waiting}
        for sequence in [one for one in self._live.values() if one.id not in waiting]:
            del self._live[sequence.id]
            sequence.over = True
            if sequence.id not in told:
                self._outbox.append(Event(sequence.id, None, finish_reason="error", error=error))
        self._running, self._prefilling, self._launched, self._stale = [], None, None, True
        if not self._whole_cache:
            self._cache = None


def with_context(args: ModelArgs, context: int) -> ModelArgs:
    """The same model, of whose context fewer tokens are used.

    Raises:
        OptionError: it has no so long one.
    """
    if not 1 <= context <= args.max_seq_len:
        raise OptionError(
            f"context is {context}; expected 1 to this model's {args.max_seq_len} tokens",
            f"give at most {args.max_seq_len}",
        )
    return dataclasses.replace(args, max_seq_len=context)
