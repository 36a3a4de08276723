"""A conversation that outgrows the model's context: the oldest turns are forgotten, never the system prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.chat import Message, Persona
from octavo.cli.options import sampling

if TYPE_CHECKING:
    from octavo.llm import LLM, Stream

REPLY_SHARE = 4  # of the context, a quarter is kept free for the reply


class Conversation:
    """What was said so far, and by whom the model is asked to be.

    Args:
        persona: system prompt and sampling defaults, or None.
        system: a system prompt in the place of the persona's.
        options: sampling options over the persona's, as text.

    Attributes:
        context: tokens the model can see at once, its reply included.
        turns: the user's and the assistant's messages in turn.

    Raises:
        OptionError: an unknown sampling option, or a value that will not do.
    """

    def __init__(self, llm: LLM, persona: Persona | None, system: str | None, options: dict[str, str]) -> None:
        self.llm = llm
        self._options = options
        self.context = llm.context
        self.turns: list[Message] = []
        self._asked: list[Message] = []  # the turns a reply is awaited to
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

    def ask(self, text: str) -> tuple[Stream, int]:
        """Queue the user's next turn; it is taken down with the reply, by `answer`.

        Oldest exchanges are dropped until the rest leaves room for a reply.

        Returns:
            The reply's stream, and how many exchanges were dropped.

        Raises:
            PromptError: the turn is blank, or alone too long for the context.
        """
        turns = [*self.turns, Message("user", text)]
        dropped = 0
        while len(turns) > 1 and not self._leaves_room(turns):
            turns, dropped = turns[2:], dropped + 1
        stream = self.llm.stream(self._with_system(turns), self._params)
        self._asked = turns
        return stream, dropped

    def answer(self, text: str) -> None:
        """Take down the last question and its reply; without a word of reply, neither."""
        if text:
            self.turns = [*self._asked, Message("assistant", text)]

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return [Message("system", self._system), *turns] if self._system else turns

    def _leaves_room(self, turns: list[Message]) -> bool:
        reply = self.context // REPLY_SHARE
        if self._params.max_tokens is not None:
            reply = min(reply, self._params.max_tokens)
        return len(self.llm.template.render(self._with_system(turns))) + reply <= self.context
