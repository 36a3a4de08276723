"""`/v1/chat/completions`: conversations, replies of a given form, and calls of tools."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from octavo.chat import Persona
from octavo.chat.tools import ToolUse
from octavo.completion import Choice, Chunk, Prepared
from octavo.engine import Constraint
from octavo.errors import OptionError
from octavo.grammar import Grammar
from octavo.llm import LLM
from octavo.serve import render
from octavo.serve.gate import Visit
from octavo.serve.outcome import finished, read, telling
from octavo.serve.protocol import ChatRequest
from octavo.serve.stream import DONE, event, updates
from octavo.serve.worker import Ticket
from octavo.tokenizer import Tokenizer


class ChatReply:
    """One request for a chat completion, and the way to its reply.

    Args:
        llm: to prepare with.
        grammar: makes the model's grammars, and keeps them.
        body: what was asked.
        persona: whose prompt and defaults hold where the request brings none.
    """

    def __init__(self, llm: LLM, grammar: Callable[[], Grammar], body: ChatRequest, persona: Persona | None) -> None:
        if llm.tokenizer is None:
            raise OptionError("the model has no tokenizer, and a conversation is text")
        self._llm, self._grammar, self._body, self._persona = llm, grammar, body, persona
        self._tokenizer: Tokenizer = llm.tokenizer
        self._use: ToolUse | None = None
        self.streams = bool(body.stream)
        self._head = render.Head("chat.completion.chunk" if self.streams else "chat.completion", body.model)

    def asked(self) -> object:
        """The messages, for a log that wants them."""
        return [f"{message.role}: {message.text}" for message in self._body.messages]

    def prepare(self) -> list[Prepared]:
        """Check and encode the conversation.

        Raises:
            UserError: what `LLM.prepare` and `Grammar` raise.
        """
        body = self._body
        self._use = ToolUse(
            self._llm.template,
            [tool.model_dump(exclude_none=True) for tool in body.tools or []],
            body.tool_choice
            if body.tool_choice is None or isinstance(body.tool_choice, str)
            else body.tool_choice.model_dump(),
            parallel=body.parallel_tool_calls is not False,
        )
        messages = [message.as_read() for message in body.messages]
        tools, constraint = self._use.tools, self._constraint(self._use)
        options = body.options()
        return [self._llm.prepare(messages, persona=self._persona, tools=tools, constraint=constraint, **options)]

    def _constraint(self, use: ToolUse) -> Callable[[], Constraint] | None:
        form = self._body.response_format
        if form is None or form.type == "text":
            return use.constraint(self._grammar()) if use.tools else None
        if use.tools:
            raise OptionError("response_format and tools do not go together", "leave one of them out")
        if form.type == "json_object" and form.value is not None:
            return self._grammar().json_schema(form.value, where="response_format.value")
        if form.json_schema is None:
            return self._grammar().json_object()
        return self._grammar().json_schema(form.json_schema.schema_, where="response_format.json_schema.schema")

    # ---------------------------------------- whole

    async def whole(self, tickets: Sequence[Ticket]) -> dict[str, Any]:
        """Wait for the reply, and put it together."""
        (completion,) = await read(tickets)
        choices = [self._choice(choice) for choice in completion.choices]
        return self._head(choices, usage=render.usage([completion.usage]), **render.extras([completion]))

    def _choice(self, choice: Choice) -> dict[str, Any]:
        message, reason = self._message(choice.text, choice.token_ids, str(choice.finish_reason))
        return {
            "index": choice.index,
            "message": {"role": "assistant", "refusal": None, **message},
            "logprobs": render.chat_logprobs(self._tokenizer, choice.logprobs),
            "finish_reason": reason,
        }

    def _message(self, text: str, ids: Sequence[int], reason: str) -> tuple[dict[str, Any], str]:
        """What was said, or the calls that were made, and why it ended."""
        content, calls = (text, []) if self._use is None else self._use.parse(ids, text)
        if not calls:
            return {"content": content}, reason
        return {"content": content, "tool_calls": [call.to_dict() for call in calls]}, "tool_calls"

    # ---------------------------------------- in events

    async def events(self, tickets: Sequence[Ticket], visit: Visit) -> AsyncGenerator[bytes, None]:
        """The reply in events."""
        async for data in telling(self._chunks(tickets), tickets, visit):
            yield data
        if visit.failed:
            return
        if self._body.include_usage:
            completion = finished(tickets[0])
            yield event(self._head([], usage=render.usage([completion.usage]), **render.extras([completion])))
        yield DONE

    async def _chunks(self, tickets: Sequence[Ticket]) -> AsyncGenerator[bytes, None]:
        usage: dict[str, Any] = {"usage": None} if self._body.include_usage else {}
        begun: dict[int, _Shown] = {}
        async for _, (index, chunk) in updates(tickets):
            if index not in begun:
                begun[index] = _Shown()
                yield event(self._head([_delta(index, {"role": "assistant", "content": ""})], **usage))
            for delta in self._deltas(index, chunk, begun[index]):
                yield event(self._head([delta], **usage))

    def _deltas(self, index: int, chunk: Chunk, shown: _Shown) -> list[dict[str, Any]]:
        """What a chunk adds. From where calls begin nothing is shown, until they are whole."""
        logprobs = render.chat_logprobs(self._tokenizer, chunk.logprobs) if chunk.logprobs else None
        shown.whole += chunk.text
        shown.ids += chunk.token_ids
        calling = self._use is not None and self._use.calling(shown.ids)
        deltas: list[dict[str, Any]] = []
        if (chunk.text and not calling) or logprobs:
            text = "" if calling else chunk.text
            shown.text += text
            deltas.append(_delta(index, {"content": text}, logprobs))
        reason = chunk.finish_reason
        if reason is None or reason == "cancelled":
            return deltas
        told: str = reason
        if calling:
            message, told = self._message(shown.whole, shown.ids, reason)
            if rest := _rest(message["content"], shown.text):
                deltas.append(_delta(index, {"content": rest}))
            if calls := message.get("tool_calls"):
                deltas.append(_delta(index, {"tool_calls": [{"index": at, **call} for at, call in enumerate(calls)]}))
        deltas.append(_delta(index, {}, finish_reason=told))
        return deltas


class _Shown:
    """What came of a reply so far, and what of it the client was told as text."""

    def __init__(self) -> None:
        self.whole, self.text, self.ids = "", "", list[int]()


def _rest(content: str | None, shown: str) -> str:
    """What of the content was not shown yet; blanks at its ends may have been cut."""
    content = content or ""
    start = shown if content.startswith(shown) else shown.strip()
    return content[len(start) :]


def _delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
