"""What comes back for a prompt: the result types, and the way from a sequence's events to them.

Text comes out whole characters at a time, and never a part of a stop string: what might still become one is held
back until it is certain. Token ids are what the model said, all of it, a closing stop id or stop string included.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from octavo.chat import Message, Persona
from octavo.engine import Constraint, Event, PromptLogprobs
from octavo.errors import PromptError
from octavo.experts import CacheCounters
from octavo.sampling import SamplingParams, TokenLogprobs
from octavo.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled", "error"]
REPLY_SHARE = 4  # of the context, a quarter is kept free for the reply


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written; with several replies, those of all of them, the prompt once.

    Attributes:
        cached_tokens: of the prompt, those whose keys and values were there already.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds by the clock on the wall, so that other sequences in the batch count too.

    Attributes:
        time_to_first_token: from the request to the first token, waiting included.
        prefill_seconds: spent on the prompt's own chunks.
        decode_seconds: from the first token to the last one.
        tokens_per_second: tokens after each reply's first, by decode_seconds; 0 if there were none.
    """

    time_to_first_token: float
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Choice:
    """One reply.

    Attributes:
        index: which of the n.
        text: without the stop string or stop id that ended it.
        token_ids: everything the model said, stop id included.
        finish_reason: "stop" at an end-of-text token, stop id or stop string; "length" at max_tokens or where the
            context is full; "cancelled" if the stream was closed before; "error" if generation failed.
        logprobs: one a token, where asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The replies to one prompt; `text` and its neighbours are those of the first, mostly the only one.

    Attributes:
        choices: the replies.
        usage: tokens.
        timings: seconds.
        experts: what was read from the disk and what was in memory already, by layer, from the request to its last
            token, for all sequences in the batch; None where every expert stays in memory.
    """

    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings
    experts: CacheCounters | None = None

    @property
    def text(self) -> str:
        """The first reply's text."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first reply's token ids."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first reply ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """The first reply's log-probabilities, where asked for."""
        return self.choices[0].logprobs

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it: dicts, lists, numbers, text."""
        choices = [
            {
                "index": choice.index,
                "text": choice.text,
                "finish_reason": choice.finish_reason,
                "token_ids": list(choice.token_ids),
                "logprobs": _logprobs_to_json(choice.logprobs),
            }
            for choice in self.choices
        ]
        first = {name: value for name, value in choices[0].items() if name != "index"}
        usage = dataclasses.asdict(self.usage) | {"total_tokens": self.usage.total_tokens}
        timings, experts = dataclasses.asdict(self.timings), _counters_to_json(self.experts)
        return first | {"usage": usage, "timings": timings, "choices": choices, "experts": experts}


def _counters_to_json(counters: CacheCounters | None) -> dict[str, Any] | None:
    if counters is None:
        return None
    total = dataclasses.asdict(counters.total) | {"hit_rate": counters.hit_rate}
    layers = [
        {"layer": layer} | dataclasses.asdict(one) | {"hit_rate": one.hit_rate}
        for layer, one in counters.layers.items()
    ]
    return {"total": total, "layers": layers}


def _logprobs_to_json(logprobs: Sequence[TokenLogprobs] | None) -> list[dict[str, Any]] | None:
    if logprobs is None:
        return None
    return [
        {
            "token_id": one.token_id,
            "logprob": one.logprob,
            "top": [{"token_id": token_id, "logprob": logprob} for token_id, logprob in one.top],
        }
        for one in logprobs
    ]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a stream has to show next. The last one, whose text may be empty, carries the three at the end."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt that was checked and encoded, and what is asked of the replies.

    Attributes:
        ids: the prompt.
        params: how to sample and when to stop.
        stop_ids: that end a reply, besides those in `params`.
        mid_text: the reply goes on where the prompt's text ends; else it is a turn of its own.
        constraint: makes what each reply may consist of.
        prompt_logprobs: report those of the prompt, and of the k likeliest tokens in each place.
    """

    ids: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    mid_text: bool
    constraint: Callable[[], Constraint] | None = None
    prompt_logprobs: int | None = None


def leaves_room(prompt_tokens: float, context: int, params: SamplingParams) -> bool:
    """Whether a conversation of so many tokens leaves a reply its share of the context, or what it may have at most."""
    reply = context // REPLY_SHARE
    if params.max_tokens is not None:
        reply = min(reply, params.max_tokens)
    return prompt_tokens + reply <= context


def read_asked(
    messages: Sequence[Message | Mapping[str, Any]],
    params: SamplingParams | None,
    persona: Persona | str | Path | None,
    options: Mapping[str, Any],
) -> tuple[list[Message], SamplingParams]:
    """Return a conversation with its persona's system prompt, unless it brings one, and what holds for the reply.

    Raises:
        PromptError: it is no list of messages.
        OptionError: an unknown option, or one out of range.
        PersonaError: no such persona, or a file that cannot be used.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        kind = type(messages).__name__
        raise PromptError(f"a conversation must be a list of messages, found {kind}")
    turns = [Message.of(message) for message in messages]
    if persona is not None:
        persona = persona if isinstance(persona, Persona) else Persona.load(persona)
        params = params or SamplingParams.from_options(persona.sampling)
        if persona.system and not any(turn.role == "system" for turn in turns):
            turns.insert(0, Message("system", persona.system))
    params = SamplingParams.from_options(options, params)
    return turns, params


class StopStrings:
    """Cuts a text that comes in pieces where the first of some strings begins.

    The earliest beginning decides, not the earliest end, so the cut does not depend on how the text is cut into
    pieces: of "abcd" and "bc", "xabcd" is cut before "abcd". Strings that begin in the same place cut alike.

    Attributes:
        found: whether a stop string was met; what comes after is dropped.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Take the next piece; return the text that is certain to stand before any stop string."""
        if self.found or not self._stops:
            return "" if self.found else piece
        self._held += piece
        begun = self._begun()
        match = self._match()
        if match is not None and match <= begun:
            return self._cut(match)
        certain, self._held = self._held[:begun], self._held[begun:]
        return certain

    def flush(self) -> str:
        """Return what was held back, now that no more comes."""
        match = self._match()
        if match is not None:
            return self._cut(match)
        certain, self._held = self._held, ""
        return certain

    def _cut(self, at: int) -> str:
        certain, self._held, self.found = self._held[:at], "", True
        return certain

    def _match(self) -> int | None:
        """Where the first whole stop string begins."""
        starts = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        return min(starts, default=None)

    def _begun(self) -> int:
        """Where the first beginning of a stop string at the end of the text begins; the text's end if none does."""
        end = len(self._held)
        for at in range(max(0, end - self._longest + 1), end):
            if any(stop.startswith(self._held[at:]) for stop in self._stops):
                return at
        return end


class Reply:
    """One sequence's way from events to text."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams, *, mid_text: bool) -> None:
        self._detokenizer = None if tokenizer is None else tokenizer.detokenizer(mid_text=mid_text)
        self._stops = StopStrings(params.stop)
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.prompt_logprobs: PromptLogprobs | None = None
        self.cached_tokens = 0
        self.prefill_seconds = 0.0
        self.first_at: float | None = None
        self.last_at: float | None = None

    def take(self, event: Event, now: float) -> None:
        """Take in the next event."""
        if event.token_id is None:
            self.finish_reason, self.error = "error", event.error
            return
        if self.first_at is None:
            self.first_at, self.prefill_seconds = now, event.prefill_seconds
            self.cached_tokens, self.prompt_logprobs = event.cached_tokens, event.prompt_logprobs
        self.last_at = now
        self.token_ids.append(event.token_id)
        if self.logprobs is not None and event.logprobs is not None:
            self.logprobs.append(event.logprobs)
        if self._detokenizer is not None and event.finish_reason != "stop":
            self.text += self._stops.push(self._detokenizer.push(event.token_id))
        if event.finish_reason is not None:
            self._end(event.finish_reason)
        elif self._stops.found:
            self.finish_reason = "stop"

    def _end(self, reason: FinishReason) -> None:
        if self._detokenizer is not None:
            self.text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        self.finish_reason = "stop" if self._stops.found else reason

    def choice(self, index: int) -> Choice:
        logprobs = None if self.logprobs is None else tuple(self.logprobs)
        return Choice(index, self.text, tuple(self.token_ids), self.finish_reason or "cancelled", logprobs)


class Request:
    """One prompt and the replies to it.

    Args:
        prompt_tokens: how many.
        experts: counters that go on counting, if experts are streamed.
    """

    def __init__(self, prompt_tokens: int, experts: CacheCounters | None = None) -> None:
        self.prompt_tokens = prompt_tokens
        self._counters = experts
        self._before = None if experts is None else experts.copy()
        self._experts: CacheCounters | None = None
        self.replies: dict[int, Reply] = {}  # by sequence
        self.started_at = time.perf_counter()

    @property
    def done(self) -> bool:
        return all(reply.finish_reason is not None for reply in self.replies.values())

    def count(self) -> None:
        """Take down what was counted so far: once a reply is over, what others go on to read is not its own."""
        if self._counters is not None and self._before is not None:
            self._experts = self._counters.since(self._before)

    def raise_error(self) -> None:
        for reply in self.replies.values():
            if reply.error is not None:
                raise reply.error

    def usage(self) -> Usage:
        replies = self.replies.values()
        cached = max((reply.cached_tokens for reply in replies), default=0)
        return Usage(self.prompt_tokens, sum(len(reply.token_ids) for reply in replies), cached)

    def timings(self) -> Timings:
        replies = self.replies.values()
        first = min((reply.first_at for reply in replies if reply.first_at is not None), default=None)
        if first is None:
            return Timings(0.0, 0.0, 0.0, 0.0)
        decode_seconds = max(reply.last_at for reply in replies if reply.last_at is not None) - first
        after_first = sum(max(len(reply.token_ids) - 1, 0) for reply in replies)
        return Timings(
            time_to_first_token=first - self.started_at,
            prefill_seconds=max(reply.prefill_seconds for reply in replies),
            decode_seconds=decode_seconds,
            tokens_per_second=after_first / decode_seconds if decode_seconds > 0 else 0.0,
        )

    def completion(self) -> Completion:
        choices = tuple(reply.choice(index) for index, reply in enumerate(self.replies.values()))
        return Completion(choices, self.usage(), self.timings(), self._experts)
