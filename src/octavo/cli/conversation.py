"""A conversation that outgrows the model's context: the oldest turns are forgotten, never the system prompt.

Of a model that runs elsewhere nothing tells how many tokens fit: turns are forgotten when its server refuses them, and
once a reply was cut short at the context's end, before. How many there are is then estimated from the last count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.chat import Message, Persona
from octavo.cli.options import sampling
from octavo.completion import leaves_room
from octavo.remote import RemoteModel, RemoteStream, TooLongError

if TYPE_CHECKING:
    from octavo.llm import LLM, Stream


class Conversation:
    """What was said so far, and by whom the model is asked to be.

    Args:
        persona: system prompt and sampling defaults, or None.
        system: a system prompt in the place of the persona's.
        options: sampling options over the persona's, as text.

    Attributes:
        llm: who replies.
        turns: the user's and the assistant's messages in turn.

    Raises:
        OptionError: an unknown sampling option, or a value that will not do.
    """

    def __init__(
        self, llm: LLM | RemoteModel, persona: Persona | None, system: str | None, options: dict[str, str]
    ) -> None:
        self.llm = llm
        self._options = options
        self.turns: list[Message] = []
        self._asked: list[Message] = []  # the turns a reply is awaited to
        self._stream: Stream | RemoteStream | None = None  # that reply
        self._tokens_per_character = 0.0  # of what a server counted last
        self.become(persona)
        if system is not None:
            self._system = system

    def become(self, persona: Persona | None) -> None:
        """Speak as this persona from now on; what was said stays.

        Raises:
            OptionError: as the constructor.
        """
        self._params = sampling(persona, self._options)
        self.persona = persona
        self._system = persona.system if persona else ""

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = []

    def ask(self, text: str) -> tuple[Stream | RemoteStream, int]:
        """Queue the user's next turn; it is taken down with the reply, by `answer`.

        Oldest exchanges are dropped until the rest leaves room for a reply.

        Returns:
            The reply's stream, and how many exchanges were dropped.

        Raises:
            PromptError: the turn is blank, or alone too long for the context.
            HubError: a server refused, or could not be reached.
        """
        turns = [*self.turns, Message("user", text)]
        dropped = 0
        while True:
            if len(turns) == 1 or self._leaves_room(turns):
                try:
                    self._stream = stream = self.llm.stream(self._with_system(turns), self._params)
                    break
                except TooLongError:
                    if len(turns) == 1:
                        raise
            turns, dropped = turns[2:], dropped + 1
        self._asked = turns
        return stream, dropped

    def answer(self, text: str) -> None:
        """Take down the last question and its reply; without a word of reply, neither."""
        if isinstance(self._stream, RemoteStream) and (usage := self._stream.result.usage).prompt_tokens:
            self._tokens_per_character = usage.prompt_tokens / _characters(self._with_system(self._asked))
        if text:
            self.turns = [*self._asked, Message("assistant", text)]

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return [Message("system", self._system), *turns] if self._system else turns

    def _leaves_room(self, turns: list[Message]) -> bool:
        context = self.llm.context
        if context is None:
            return True  # for all that is known
        return leaves_room(self._count(self._with_system(turns)), context, self._params)

    def _count(self, messages: list[Message]) -> float:
        """Tokens of a prompt; of a model elsewhere about so many."""
        if isinstance(self.llm, RemoteModel):
            return _characters(messages) * self._tokens_per_character
        return len(self.llm.template.render(messages))


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages)
