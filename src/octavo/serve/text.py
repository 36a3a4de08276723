"""`/v1/completions`: text or token ids, continued; with the prompt's own log-probabilities where asked for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from octavo.completion import Choice, Completion, Prepared
from octavo.errors import OptionError
from octavo.llm import LLM
from octavo.sampling import TokenLogprobs
from octavo.serve import render
from octavo.serve.gate import Visit
from octavo.serve.outcome import finished, read, telling
from octavo.serve.protocol import CompletionRequest
from octavo.serve.stream import DONE, event, updates
from octavo.serve.worker import Ticket
from octavo.tokenizer import Tokenizer


class TextReply:
    """One request for completions, and the way to its reply.

    Args:
        llm: to prepare with.
        body: what was asked.
    """

    def __init__(self, llm: LLM, body: CompletionRequest) -> None:
        if llm.tokenizer is None:
            raise OptionError("the model has no tokenizer, and a completion is text")
        self._llm, self._body = llm, body
        self._tokenizer: Tokenizer = llm.tokenizer
        self._n = body.n or 1
        self._echo = bool(body.echo)
        self._untold = body.max_tokens == 0  # a reply of no tokens is made with one
        self._prepared: list[Prepared] = []
        self._head = render.Head("text_completion", body.model)
        self.streams = bool(body.stream)

    def asked(self) -> object:
        """The prompts, for a log that wants them."""
        return self._body.prompts

    def prepare(self) -> list[Prepared]:
        """Check and encode every prompt.

        Raises:
            UserError: what `LLM.prepare` raises.
        """
        wanted = self._body.logprobs if self._echo else None
        options = self._body.options()
        self._prepared = [self._llm.prepare(prompt, prompt_logprobs=wanted, **options) for prompt in self._body.prompts]
        return self._prepared

    async def whole(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """Wait for all, and put the reply together."""
        completions = await read(tickets)
        choices = [
            self._choice(at, choice, tickets[at])
            for at, completion in enumerate(completions)
            for choice in completion.choices
        ]
        return self._head(choices, usage=self._usage(completions), **render.extras(completions))

    async def events(self, tickets: Sequence[Ticket], visit: Visit) -> AsyncGenerator[bytes, None]:
        """The reply in events."""
        usage: dict[str, Any] = {"usage": None} if self._body.include_usage else {}
        columns: dict[int, render.TextLogprobs] = {}
        async for data in telling(self._chunks(tickets, columns, usage), tickets, visit):
            yield data
        if visit.failed:
            return
        completions = [finished(ticket) for ticket in tickets]
        if self._body.include_usage:
            yield event(self._head([], usage=self._usage(completions), **render.extras(completions)))
        yield DONE

    async def _chunks(
        self, tickets: Sequence[Ticket], columns: dict[int, render.TextLogprobs], usage: dict[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        async for at, (index, chunk) in updates(tickets):
            number = at * self._n + index
            if number not in columns:
                columns[number] = render.TextLogprobs(self._tokenizer, self._prepared[at].ids, echo=self._echo)
                if self._echo:
                    logprobs = self._prompt_logprobs(columns[number], at, index, tickets[at])
                    yield event(self._head([render.text_choice(number, self._prompt(at), logprobs)], **usage))
            text, reason = chunk.text, chunk.finish_reason
            logprobs = None
            if self._untold:
                text, reason = "", None if reason is None else "length"
            elif chunk.logprobs is not None:
                logprobs = columns[number].reply(chunk.logprobs)
            if text or logprobs or reason:
                yield event(self._head([render.text_choice(number, text, logprobs, reason)], **usage))

    def _prompt(self, at: int) -> str:
        prompt = self._body.prompts[at]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _prompt_logprobs(
        self, columns: render.TextLogprobs, at: int, index: int, ticket: Ticket
    ) -> dict[str, Any] | None:
        if self._body.logprobs is None or ticket.request is None:
            return None
        found = tuple(ticket.request.replies.values())[index].prompt_logprobs
        ids = self._prepared[at].ids
        return columns.prompt(ids, found if found is not None else [None] * len(ids))

    def _choice(self, at: int, choice: Choice, ticket: Ticket) -> dict[str, Any]:
        text, reason = choice.text, str(choice.finish_reason)
        told: Sequence[TokenLogprobs] = choice.logprobs or ()
        if self._untold:
            text, reason, told = "", "length", ()
        logprobs = None
        if self._body.logprobs is not None:
            columns = render.TextLogprobs(self._tokenizer, self._prepared[at].ids, echo=self._echo)
            before = self._prompt_logprobs(columns, at, choice.index, ticket) if self._echo else None
            logprobs = render.join_columns(before, columns.reply(told))
        text = self._prompt(at) + text if self._echo else text
        return render.text_choice(at * self._n + choice.index, text, logprobs, reason)

    def _usage(self, completions: Sequence[Completion]) -> dict[str, Any]:
        untold = sum(one.usage.completion_tokens for one in completions) if self._untold else 0
        return render.usage([one.usage for one in completions], untold=untold)
