"""Conversations: messages, personas, and the templates that turn them straight into token ids.

Rendering a template to text and tokenising the text is how BOS gets doubled, and how a person's `[INST]`
becomes a control token. Here the ids are put together piece by piece, and a person's words stay text.
"""

from __future__ import annotations

from octavo.chat.instruct import InstructV1, InstructV3
from octavo.chat.messages import ChatTemplate, Message, Role, ToolCall
from octavo.chat.persona import Persona
from octavo.chat.tools import ToolUse
from octavo.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "InstructV1",
    "InstructV3",
    "Message",
    "Persona",
    "Role",
    "ToolCall",
    "ToolUse",
    "template_for",
]


def template_for(tokenizer: Tokenizer) -> ChatTemplate:
    """The template for a checkpoint's conversations.

    The checkpoint's own chat_template, unless that only spells Mistral's `[INST]` format (a trial
    conversation tells). For that one, and without a template, the ids are made here: v3 (8x22B) if `[INST]`
    is a control token of the tokenizer, v1 (8x7B) if it is text.

    Raises:
        TokenizerError: the checkpoint's template has a syntax error; the tokenizer has no end-of-text token.
    """
    if tokenizer.chat_template is not None:
        # jinja2 takes a while to import, and most checkpoints here do without.
        from octavo.chat.own_template import OwnTemplate

        own = OwnTemplate(tokenizer)
        if not own.is_instruct():
            return own
    return InstructV1(tokenizer) if tokenizer.control_id("[INST]") is None else InstructV3(tokenizer)
