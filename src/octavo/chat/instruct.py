"""Mistral's `[INST]` templates, straight to token ids.

v1 is Mixtral 8x7B's: `[INST]` is text, and the system prompt goes before the first question.
v3 is Mixtral 8x22B's (v2 differs in tools only): `[INST]` is a control token, the system prompt goes before
the last question. Both as mistral-common encodes them, blank for blank.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

from octavo.chat.messages import ChatTemplate, Message, Role, read_conversation
from octavo.errors import TokenizerError
from octavo.tokenizer import Tokenizer


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

    def render(self, messages: Sequence[Message | Mapping[str, str]]) -> list[int]:
        return self._encode(messages, last="user")[0]

    def render_training(self, messages: Sequence[Message | Mapping[str, str]]) -> tuple[list[int], list[bool]]:
        return self._encode(messages, last="assistant")

    def _encode(self, messages: Sequence[Message | Mapping[str, str]], last: Role) -> tuple[list[int], list[bool]]:
        system, turns = read_conversation(messages, last)
        questions = [index for index, turn in enumerate(turns) if turn.role == "user"]
        informed = self._informed_question(questions)
        ids = self._tokenizer.encode("", bos=True)
        wrote = [False] * len(ids)
        for index, turn in enumerate(turns):
            if turn.role == "user":
                text = f"{system}\n\n{turn.content}" if system and index == informed else turn.content
                part = self._question(text)
            else:
                part = [*self._reply(turn.content), self._eos_id]
            ids += part
            wrote += [turn.role == "assistant"] * len(part)
        return ids, wrote

    @abc.abstractmethod
    def _informed_question(self, questions: list[int]) -> int:
        """Which of the user's turns the system prompt goes before."""

    @abc.abstractmethod
    def _question(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def _reply(self, text: str) -> list[int]: ...


class InstructV1(_Instruct):
    """Mixtral 8x7B's template: `[INST] question [/INST]`, all of it text."""

    name = "v1"

    def _informed_question(self, questions: list[int]) -> int:
        return questions[0]

    def _question(self, text: str) -> list[int]:
        return self._tokenizer.encode(f"[INST] {text} [/INST]")

    def _reply(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


class InstructV3(_Instruct):
    """Mixtral 8x22B's template: the question between the control tokens `[INST]` and `[/INST]`.

    Raises:
        TokenizerError: the tokenizer lacks one of the two.
    """

    name = "v3"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._open, self._close = self._control("[INST]"), self._control("[/INST]")

    def _control(self, name: str) -> int:
        found = self._tokenizer.control_id(name)
        if found is None:
            raise TokenizerError(f"{self._tokenizer.path}: {name} is not a control token, which template v3 needs")
        return found

    def _informed_question(self, questions: list[int]) -> int:
        return questions[-1]

    def _question(self, text: str) -> list[int]:
        return [self._open, *self._tokenizer.encode(text), self._close]

    def _reply(self, text: str) -> list[int]:
        return self._tokenizer.encode(text.rstrip(" "))
