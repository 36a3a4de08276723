"""A checkpoint's own chat template: jinja2, as transformers runs it, but a person's words stay text.

The template is rendered twice: once with the messages, and once with a mark in the place of each of them. The
second rendering tells which stretches of the first are the template's own words: only they may become control
tokens. (Were the first rendering tokenised as it is, a question that spells `<|im_end|>` would end its turn.)
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from octavo.chat.messages import ChatTemplate, Message, Role, read_conversation, to_json
from octavo.chat.tools import check_tools
from octavo.errors import PromptError, TokenizerError
from octavo.tokenizer import TemplatePart, Tokenizer

# What templates do to a message's content, commonest first.
_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.rstrip, str.lstrip)
_TRIAL = (Message("user", "Ask1"), Message("assistant", "Say1"), Message("user", "Ask2"))


class _Part(NamedTuple):
    """A stretch of the rendered template; `role` says whose words it is, None for the template's own."""

    text: str
    role: Role | None


class OwnTemplate(ChatTemplate):
    """The jinja2 template that a checkpoint carries, in a sandbox. It has tools if it uses the variable `tools`.

    Raises:
        TokenizerError: the checkpoint carries none, or it has a syntax error.
    """

    name = "own"

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None:
            raise TokenizerError(f"{tokenizer.path}: the checkpoint has no chat_template")
        self._tokenizer = tokenizer
        self._source = tokenizer.chat_template
        try:
            self._template = _environment().from_string(self._source)
        except jinja2.TemplateSyntaxError as error:
            where = f"{tokenizer.path.parent}: line {error.lineno} of the chat template"
            raise TokenizerError(
                f"{where}: {error.message}",
                "mend chat_template in tokenizer_config.json, or chat_template.jinja",
            ) from None
        self._bos = "" if tokenizer.bos_id is None else tokenizer.token_name(tokenizer.bos_id)
        self._eos = "" if tokenizer.eos_id is None else tokenizer.token_name(tokenizer.eos_id)
        self.has_tools = "tools" in jinja2.meta.find_undeclared_variables(_environment().parse(self._source))
        # With [ARGS] calls are written otherwise, and that is not read here.
        if self.has_tools and "[TOOL_CALLS]" in self._source and "[ARGS]" not in self._source:
            self.tool_calls_id = tokenizer.control_id("[TOOL_CALLS]")
        ends = (tokenizer.eos_id, self._turn_end())
        self.stop_ids = tuple(dict.fromkeys(i for i in ends if i is not None))

    def is_instruct(self) -> bool:
        """Whether a trial conversation comes out in Mistral's `[INST]` format, blanks aside."""
        try:
            text = "".join(self._render_text(_TRIAL, generation=True).split())
        except PromptError:
            return False
        return text.removeprefix(self._bos) == f"[INST]Ask1[/INST]Say1{self._eos}[INST]Ask2[/INST]"

    def render(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        ids = self._encode(self._conversation(messages, tools, "user"))
        return self._with_one_bos(ids, [False] * len(ids))[0]

    def render_training(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[int], list[bool]]:
        if any(Message.of(message).tool_calls for message in messages):
            raise PromptError(
                "training on tool calls takes Mistral's template v3; who wrote what in the checkpoint's own "
                "template is not known for calls",
                "leave conversations with tool calls out, or train without chat_template",
            )
        parts = self._conversation(messages, tools, "assistant")
        if all(part.role is None for part in parts):
            where = self._tokenizer.path.parent
            raise TokenizerError(
                f"{where}: the chat template rewrites what is said, so there is no telling who wrote what",
                "train without chat_template",
            )
        ids: list[int] = []
        wrote: list[bool] = []
        for replied, group in itertools.groupby(parts, key=lambda part: part.role == "assistant"):
            new = self._encode(group)
            # The token that ends a reply is the template's word, but the assistant has to say it.
            ends = bool(wrote) and not replied and bool(new) and new[0] in self.stop_ids
            wrote += [replied or (ends and at == 0) for at in range(len(new))]
            ids += new
        return self._with_one_bos(ids, wrote)

    def _conversation(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        last: Role,
    ) -> list[_Part]:
        read_conversation(messages, last)
        turns = [Message.of(message) for message in messages]
        self.check_has_tools(turns, tools)
        return self._parts(turns, check_tools(tools) if tools else None, generation=last == "user")

    def _encode(self, parts: Iterable[_Part]) -> list[int]:
        return self._tokenizer.encode_template([TemplatePart(part.text, part.role is None) for part in parts])

    def _with_one_bos(self, ids: list[int], wrote: list[bool]) -> tuple[list[int], list[bool]]:
        """Opens the ids with BOS exactly once, unless neither the template nor the tokenizer asks for it."""
        bos = self._tokenizer.bos_id
        found = sum(1 for _ in itertools.takewhile(lambda i: i == bos, ids))
        if bos is None or (not found and not self._tokenizer.adds_bos):
            return ids, wrote
        return [bos, *ids[found:]], [False, *wrote[found:]]

    def _turn_end(self) -> int | None:
        """The control token that follows a reply in the trial conversation, if one does."""
        try:
            parts = self._parts(_TRIAL, generation=True)
        except PromptError:
            return None
        after = [part for said, part in itertools.pairwise(parts) if said.role == "assistant"]
        first = next(iter(self._encode(after)), None)
        if first is None or self._tokenizer.control_id(self._tokenizer.token_name(first)) != first:
            return None
        return first

    def _render_text(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, *, generation: bool
    ) -> str:
        try:
            return self._template.render(
                messages=[_as_templates_have_it(message) for message in messages],
                tools=tools,
                add_generation_prompt=generation,
                bos_token=self._bos,
                eos_token=self._eos,
            )
        except Exception as error:  # a template is a program: it may fail in any way it likes
            raise PromptError(
                f"the checkpoint's chat template refuses this conversation: {error}",
                "not every template takes a system message; see chat_template beside the tokenizer",
            ) from None

    def _parts(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, *, generation: bool
    ) -> list[_Part]:
        """The rendered conversation, in stretches by author."""
        self._check_names(messages, tools)
        text = self._render_text(messages, tools, generation=generation)
        stem = _unused_word([self._source, text])
        marks = [
            # Where there are only calls, a template may look whether there is content.
            dataclasses.replace(message, content=f"{stem}{at}x")
            if message.content or not message.tool_calls
            else message
            for at, message in enumerate(messages)
        ]
        try:
            layout = re.split(f"{stem}([0-9]+)x", self._render_text(marks, tools, generation=generation))
        except PromptError:  # it reads the messages, and a mark was not to its liking
            layout = []
        roles = list(dict.fromkeys(message.role for message in messages))
        for choice in itertools.product(_TRIMS, repeat=len(roles)):
            parts = _fill(layout, messages, dict(zip(roles, choice, strict=True)))
            if "".join(part.text for part in parts) == text:
                return parts
        return [_Part(self._checked(text, messages), None)]

    def _check_names(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> None:
        """Refuse control tokens in what is not marked, and so passes for the template's words: tools, calls, names."""
        spoken = [*(tools or ())]
        for message in messages:
            made = _as_templates_have_it(message)
            spoken += [{key: value} for key, value in made.items() if key not in ("role", "content")]
        spelt = self._tokenizer.find_control(to_json(spoken)) if spoken else None
        if spelt is not None:
            raise PromptError(
                f"a tool, a tool call or a name spells the control token {spelt}, and the checkpoint's chat template "
                "would take it for one",
                "leave that spelling out",
            )

    def _checked(self, text: str, messages: Sequence[Message]) -> str:
        """A rendering whose authors cannot be told apart: fit to use if no message spells a control token."""
        for message in messages:
            spelt = self._tokenizer.find_control(message.content)
            if spelt is not None:
                raise PromptError(
                    f"a {message.role} message spells the control token {spelt}, and the checkpoint's chat "
                    "template rewrites messages, so that it cannot be kept as text",
                    "leave that spelling out",
                )
        return text


def _as_templates_have_it(message: Message) -> dict[str, Any]:
    """A message in transformers' form: like OpenAI's, but arguments are read."""
    content = None if message.tool_calls and not message.content else message.content
    made: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        made["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.value}}
            for call in message.tool_calls
        ]
    optional = {"tool_call_id": message.tool_call_id, "name": message.name}
    return made | {key: value for key, value in optional.items() if value is not None}


def _fill(
    layout: Sequence[str], messages: Sequence[Message], trims: Mapping[Role, Callable[[str], str]]
) -> list[_Part]:
    """Puts messages in their marks' places. `layout`: the template's words and marks' numbers in turn."""
    parts: list[_Part] = []
    for at, text in enumerate(layout):
        if at % 2:
            message = messages[int(text)]
            parts.append(_Part(trims[message.role](message.content), message.role))
        elif text:
            parts.append(_Part(text, None))
    return parts


def _unused_word(texts: Sequence[str]) -> str:
    """A word that none of the texts contains: letters only, which no template trims or escapes."""
    word = "octavomark"
    while any(word in text for text in texts):
        word += "q"
    return word


@functools.cache
def _environment() -> jinja2.Environment:
    """The environment that chat templates are written for: transformers'."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for trainers; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """Plain JSON; jinja2's own filter escapes it for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
