"""Mistral's `[INST]` templates, straight to token ids.

v1 is Mixtral 8x7B's: `[INST]` is text, and the system prompt goes before the first question.
v3 is Mixtral 8x22B's (v2 differs in tools only): `[INST]` is a control token, the system prompt and the tools
go before the last question. Both as mistral-common encodes them, blank for blank.
"""

from __future__ import annotations

import abc
import hashlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.chat.messages import ChatTemplate, Message, Role, ToolCall, json_or_text, read_conversation, to_json
from octavo.chat.tools import check_tools
from octavo.errors import TokenizerError
from octavo.tokenizer import Tokenizer

_TOOL_MARKS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")


class _Instruct(ChatTemplate):
    """What both versions share: BOS once, and EOS after every reply.

    Raises:
        TokenizerError: the tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_id is None:
            raise TokenizerError(
                f"{tokenizer.path}: no end-of-text token, and a conversation needs one",
                "name it as eos_token in tokenizer_config.json",
            )
        self._tokenizer = tokenizer
        self._eos_id = tokenizer.eos_id
        self.stop_ids = (tokenizer.eos_id,)

    def render(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        return self._encode(messages, tools, last="user")[0]

    def render_training(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], list[bool]]:
        return self._encode(messages, tools, last="assistant")

    def _encode(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        last: Role,
    ) -> tuple[list[int], list[bool]]:
        system, turns = read_conversation(messages, last)
        self.check_has_tools(turns, tools)
        questions = [index for index, turn in enumerate(turns) if turn.role == "user"]
        informed = self._informed_question(questions)
        ids = self._tokenizer.encode("", bos=True)
        wrote = [False] * len(ids)
        for index, turn in enumerate(turns):
            if turn.role == "user":
                text = f"{system}\n\n{turn.content}" if system and index == informed else turn.content
                part = self._question(text)
                if tools and index == informed:
                    part = [*self._available(tools), *part]
            elif turn.role == "tool":
                part = self._result(turn)
            else:
                part = [*self._reply(turn), self._eos_id]
            ids += part
            wrote += [turn.role == "assistant"] * len(part)
        return ids, wrote

    @abc.abstractmethod
    def _informed_question(self, questions: list[int]) -> int:
        """Which of the user's turns the system prompt, and the tools, go before."""

    @abc.abstractmethod
    def _question(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def _reply(self, turn: Message) -> list[int]: ...

    def _available(self, tools: Sequence[Mapping[str, Any]]) -> list[int]:
        raise NotImplementedError  # for templates that have tools

    def _result(self, turn: Message) -> list[int]:
        raise NotImplementedError


class InstructV1(_Instruct):
    """Mixtral 8x7B's template: `[INST] question [/INST]`, all of it text. It has no tools."""

    name = "v1"

    def _informed_question(self, questions: list[int]) -> int:
        return questions[0]

    def _question(self, text: str) -> list[int]:
        return self._tokenizer.encode(f"[INST] {text} [/INST]")

    def _reply(self, turn: Message) -> list[int]:
        return self._tokenizer.encode(turn.content)


class InstructV3(_Instruct):
    """Mixtral 8x22B's template: the question between the control tokens `[INST]` and `[/INST]`.

    It has tools if the tokenizer has the control tokens for them: `[AVAILABLE_TOOLS]` and `[TOOL_RESULTS]`, each
    with its end, and `[TOOL_CALLS]`.

    Raises:
        TokenizerError: the tokenizer lacks one of the two.
    """

    name = "v3"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._open, self._close = self._control("[INST]"), self._control("[/INST]")
        self.has_tools = all(tokenizer.control_id(mark) is not None for mark in _TOOL_MARKS)
        self.tool_calls_id = tokenizer.control_id("[TOOL_CALLS]") if self.has_tools else None

    def _control(self, name: str) -> int:
        found = self._tokenizer.control_id(name)
        if found is None:
            raise TokenizerError(f"{self._tokenizer.path}: {name} is not a control token, which template v3 needs")
        return found

    def _informed_question(self, questions: list[int]) -> int:
        return questions[-1]

    def _question(self, text: str) -> list[int]:
        return [self._open, *self._tokenizer.encode(text), self._close]

    def _reply(self, turn: Message) -> list[int]:
        ids = self._tokenizer.encode(turn.content.rstrip(" "))
        if turn.tool_calls:
            calls = [_call(call) for call in turn.tool_calls]
            ids += [self._control("[TOOL_CALLS]"), *self._json(calls)]
        return ids

    def _available(self, tools: Sequence[Mapping[str, Any]]) -> list[int]:
        shown = [{"type": "function", "function": _shown(tool["function"])} for tool in check_tools(tools)]
        return [self._control("[AVAILABLE_TOOLS]"), *self._json(shown), self._control("[/AVAILABLE_TOOLS]")]

    def _result(self, turn: Message) -> list[int]:
        result = {"content": json_or_text(turn.content), "call_id": _call_id(turn.tool_call_id or "")}
        return [self._control("[TOOL_RESULTS]"), *self._json(result), self._control("[/TOOL_RESULTS]")]

    def _json(self, value: Any) -> list[int]:
        return self._tokenizer.encode(to_json(value))


def _shown(function: Mapping[str, Any]) -> dict[str, Any]:
    """What the model reads about a function, in the order of its training."""
    return {key: function[key] for key in ("name", "description", "parameters")}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.value, "id": _call_id(call.id)}


def _call_id(given: str) -> str:
    """An id as the template wants it, nine letters and digits; of one that is not, a digest that is."""
    if re.fullmatch("[a-zA-Z0-9]{9}", given):
        return given
    alphabet = string.ascii_letters + string.digits
    number = int.from_bytes(hashlib.blake2b(given.encode(errors="replace"), digest_size=8).digest(), "little")
    return "".join(alphabet[number // len(alphabet) ** place % len(alphabet)] for place in range(9))
