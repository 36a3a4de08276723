"""What is said, by whom, and what a chat template must be able to do with it."""

from __future__ import annotations

import abc
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from octavo.errors import PromptError
from octavo.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
_OPTIONAL = ("name", "tool_calls", "tool_call_id")
# What OpenAI's client sends back of a reply of its own; nothing is lost while these say nothing.
_IDLE = ("refusal", "audio", "annotations", "function_call")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What the assistant asks of a tool.

    Attributes:
        id: names the call, for its result to refer to.
        name: the function.
        arguments: JSON text, of an object as a rule.
    """

    id: str
    name: str
    arguments: str

    @classmethod
    def of(cls, source: ToolCall | Mapping[str, Any]) -> ToolCall:
        """A call from a call, or from `{"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}`.

        Raises:
            PromptError: another shape.
        """
        if isinstance(source, ToolCall):
            return source
        function = source.get("function") if isinstance(source, Mapping) else None
        if not isinstance(function, Mapping) or source.get("type", "function") != "function":
            raise PromptError(
                "a tool call must be a mapping of id, type and function",
                '{"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}',
            )
        found = {"id": source.get("id"), "name": function.get("name"), "arguments": function.get("arguments", "")}
        for key, value in found.items():
            if not isinstance(value, str) or (key != "arguments" and not value):
                raise PromptError(f"the {key} of a tool call must be a string, found {value!r}")
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """The call as the OpenAI API has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    @property
    def value(self) -> Any:
        """The arguments, read; their text where that is not JSON, and no arguments where it is empty."""
        return json_or_text(self.arguments)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, or a part of one: a tool's result.

    Attributes:
        role: who speaks.
        content: what is said; "" where the assistant only calls tools.
        tool_calls: the assistant's.
        tool_call_id: the call that a tool's message answers.
        name: the speaker's or the tool's, for templates that show it.

    Raises:
        PromptError: an unknown role; content that is not a string; calls that are not the assistant's; a tool's
            message without the id of a call, or an id in another's.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise PromptError(f"role {self.role!r} is unknown", f"the roles are {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            kind = type(self.content).__name__
            raise PromptError(f"the content of {_article(self.role)} message must be a string, found {kind}")
        if self.tool_calls and self.role != "assistant":
            raise PromptError(f"{_article(self.role)} message has tool_calls, which are for the assistant to make")
        if self.role == "tool" and (not isinstance(self.tool_call_id, str) or not self.tool_call_id):
            raise PromptError("a tool message needs tool_call_id, the id of the call that it answers")
        if self.role != "tool" and self.tool_call_id is not None:
            raise PromptError(f"{_article(self.role)} message has tool_call_id, which is for a tool's to have")
        if not isinstance(self.name, str | None):
            raise PromptError(f"the name in {_article(self.role)} message must be a string, found {self.name!r}")

    @classmethod
    def of(cls, source: Message | Mapping[str, Any]) -> Message:
        """A message from a message, or from `{"role": ..., "content": ...}`.

        The OpenAI API's other keys are taken too: `tool_calls` (`content` may then be None), `tool_call_id` and
        `name`; and content as a list of parts `{"type": "text", "text": ...}`, which a blank line will separate.

        Raises:
            PromptError: a key missing or unknown, a part that is not text, and as the constructor.
        """
        if isinstance(source, Message):
            return source
        if not isinstance(source, Mapping):
            kind = type(source).__name__
            raise PromptError(f"a message must be a Message, or a mapping of role and content; found {kind}")
        given = {key: source[key] for key in source if not (key in _IDLE and not source[key])}
        calls = given.get("tool_calls") or ()
        required = {"role"} if calls else {"role", "content"}
        if not required <= set(given) <= {"role", "content", *_OPTIONAL}:
            keys = ", ".join(map(repr, source)) or "nothing"
            raise PromptError(
                f"a message needs the keys 'role' and 'content', and no others; found {keys}",
                f"but for the tools' sake also {', '.join(_OPTIONAL)}",
            )
        if not isinstance(calls, list | tuple):
            raise PromptError(f"tool_calls must be a list of tool calls, found {type(calls).__name__}")
        role: Any = given["role"]
        content: Any = given.get("content")
        if isinstance(content, list) and content:
            content = "\n\n".join(_texts(content, role))
        if content is None and calls:
            content = ""
        made = tuple(ToolCall.of(call) for call in calls)
        return cls(role, content, made, given.get("tool_call_id"), given.get("name"))


class ChatTemplate(abc.ABC):
    """How a checkpoint wants its conversations written.

    Attributes:
        name: "v1", "v3" or "own".
        stop_ids: the tokens that end the assistant's turn.
        has_tools: whether conversations may tell of tools, call them and bring their results.
        tool_calls_id: the control token that opens the assistant's calls; None if there is none.
    """

    name: str
    stop_ids: tuple[int, ...]
    has_tools: bool = False
    tool_calls_id: int | None = None
    _tokenizer: Tokenizer

    @abc.abstractmethod
    def render(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """The ids of a conversation, from BOS to the place where the assistant speaks.

        Args:
            messages: a system message or none, then user and assistant in turn; the user has the last word, or
                the tools that the assistant called.
            tools: that the assistant may call, as the OpenAI API has them (`octavo.chat.tools.check_tools`).

        Raises:
            PromptError: the conversation is empty, out of turn or not text; its last question is blank; a call
                has no result, or a result no call; the template has no place for tools.
            OptionError: a malformed tool.
        """

    @abc.abstractmethod
    def render_training(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], list[bool]]:
        """The ids of a whole conversation, and for each whether the assistant wrote it.

        The assistant's tokens are its replies', its calls' and the one that ends each; loss belongs on these.

        Args:
            messages: as for `render`, but the assistant has the last word.
            tools: as for `render`.

        Raises:
            PromptError, OptionError: as `render`.
        """

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of tokens, as `Tokenizer.decode`."""
        return self._tokenizer.decode(token_ids)

    def check_has_tools(self, turns: Iterable[Message], tools: Sequence[Mapping[str, Any]] | None) -> None:
        """Refuse what the template has no place for."""
        if not self.has_tools and (tools or any(turn.tool_calls or turn.role == "tool" for turn in turns)):
            raise PromptError(
                f"the model's chat template ({self.name}) has no place for tools",
                "leave tools and their messages out, or take a model that was trained with tools",
            )


def read_conversation(messages: Sequence[Message | Mapping[str, Any]], last: Role) -> tuple[str, list[Message]]:
    """Checks a conversation; returns the system prompt ("" for none) and the turns that follow it.

    Tools' results stand between the assistant's calls and what it, or the user, has to say next.

    Raises:
        PromptError: as `ChatTemplate.render`.
    """
    turns = [Message.of(message) for message in messages]
    system = turns.pop(0).content if turns and turns[0].role == "system" else ""
    if not turns:
        raise PromptError("the conversation is empty", "give at least one user message")
    skipped = len(messages) - len(turns)
    waiting: list[str] = []  # ids of calls without a result
    before: Role | None = None
    for index, turn in enumerate(turns):
        if waiting or (turn.role == "tool" and before in ("assistant", "tool")):
            _take_result(turn, index + skipped, waiting)
        else:
            expected = "assistant" if before == "user" or (before, turn.role) == ("tool", "assistant") else "user"
            if turn.role != expected:
                raise PromptError(
                    f"message {index + skipped} is the {turn.role}'s, but it is the {expected}'s turn",
                    "a system message may come first; then user and assistant alternate, the user first",
                )
        if turn.role == "user" and not turn.content.strip():
            raise PromptError("a user message is blank", "say something")
        waiting += [call.id for call in turn.tool_calls]
        before = turn.role
    if waiting and last != "assistant":
        raise PromptError(f"the tool call {waiting[0]!r} has no result", "add a message of role tool for each call")
    if before != last and (last, before) != ("user", "tool"):
        raise PromptError(f"the last message must be the {last}'s, found the {before}'s")
    return system, turns


def _take_result(turn: Message, index: int, waiting: list[str]) -> None:
    """Take a tool's message off the calls that wait for one."""
    if turn.role != "tool":
        raise PromptError(
            f"message {index} is the {turn.role}'s, but the tool call {waiting[0]!r} has no result yet",
            "a message of role tool for each call comes next",
        )
    if turn.tool_call_id not in waiting:
        raise PromptError(
            f"message {index} answers the tool call {turn.tool_call_id!r}, which was not made or has its result",
            "tool_call_id is the id of one of the assistant's calls just before",
        )
    waiting.remove(turn.tool_call_id)


def json_or_text(text: str) -> Any:
    """What JSON text says: {} for none; the text itself where it is not JSON, or too deep or long a number to read."""
    try:
        return json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return text


def to_json(value: Any) -> str:
    """JSON as templates write it.

    Raises:
        PromptError: the value is nested too deeply.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise PromptError("a tool, a call or a tool's result is nested too deeply", "say it in fewer levels") from None


def _texts(parts: Sequence[Any], role: str) -> Iterable[str]:
    """The texts of content that comes in parts."""
    for part in parts:
        if not isinstance(part, Mapping):
            raise PromptError(
                f"the content of {_article(role)} message must be a string, found list",
                'a list may hold parts such as {"type": "text", "text": "Hello"}',
            )
        kind, text = part.get("type"), part.get("text")
        if kind != "text":
            raise PromptError(
                f"the content of {_article(role)} message has a part of type {kind!r}; only text can be read",
                "the model sees no images and hears no sound",
            )
        if not isinstance(text, str):
            raise PromptError(f"a text part of {_article(role)} message must hold a string, found {text!r}")
        if text:
            yield text


def _article(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"
