"""What is said, by whom, and what a chat template must be able to do with it."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from octavo.errors import PromptError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Raises:
        PromptError: an unknown role, or content that is not a string.
    """

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise PromptError(f"role {self.role!r} is unknown", f"the roles are {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            kind = type(self.content).__name__
            raise PromptError(f"the content of a {self.role} message must be a string, found {kind}")

    @classmethod
    def of(cls, source: Message | Mapping[str, str]) -> Message:
        """A message from a message, or from `{"role": ..., "content": ...}`.

        Raises:
            PromptError: a key missing or unknown, and as the constructor.
        """
        if isinstance(source, Message):
            return source
        if not isinstance(source, Mapping):
            kind = type(source).__name__
            raise PromptError(f"a message must be a Message, or a mapping of role and content; found {kind}")
        if set(source) != {"role", "content"}:
            keys = ", ".join(map(repr, source)) or "nothing"
            raise PromptError(f"a message needs the keys 'role' and 'content', and no others; found {keys}")
        return cls(source["role"], source["content"])  # type: ignore[arg-type]  # the constructor checks the role


class ChatTemplate(abc.ABC):
    """How a checkpoint wants its conversations written.

    Attributes:
        name: "v1", "v3" or "own".
        stop_ids: the tokens that end the assistant's turn.
    """

    name: str
    stop_ids: tuple[int, ...]

    @abc.abstractmethod
    def render(self, messages: Sequence[Message | Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, from BOS to the place where the assistant speaks.

        Args:
            messages: a system message or none, then user and assistant in turn; the user has the last word.

        Raises:
            PromptError: the conversation is empty, out of turn or not text, or its last question is blank.
        """

    @abc.abstractmethod
    def render_training(self, messages: Sequence[Message | Mapping[str, str]]) -> tuple[list[int], list[bool]]:
        """The ids of a whole conversation, and for each whether the assistant wrote it.

        The assistant's tokens are its replies' and the one that ends each; loss belongs on these.

        Args:
            messages: as for `render`, but the assistant has the last word.

        Raises:
            PromptError: as `render`.
        """


def read_conversation(messages: Sequence[Message | Mapping[str, str]], last: Role) -> tuple[str, list[Message]]:
    """Checks a conversation; returns the system prompt ("" for none) and the turns that follow it.

    Raises:
        PromptError: as `ChatTemplate.render`.
    """
    turns = [Message.of(message) for message in messages]
    system = turns.pop(0).content if turns and turns[0].role == "system" else ""
    if not turns:
        raise PromptError("the conversation is empty", "give at least one user message")
    skipped = len(messages) - len(turns)
    for index, turn in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if turn.role != expected:
            raise PromptError(
                f"message {index + skipped} is the {turn.role}'s, but it is the {expected}'s turn",
                "a system message may come first; then user and assistant alternate, the user first",
            )
        if turn.role == "user" and not turn.content.strip():
            raise PromptError("a user message is blank", "say something")
    if turns[-1].role != last:
        raise PromptError(f"the last message must be the {last}'s, found the {turns[-1].role}'s")
    return system, turns
