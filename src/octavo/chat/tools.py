"""Tools that the assistant may call: what they are, making it call them, and reading its calls.

A call is written as Mistral's v3 writes it: the control token `[TOOL_CALLS]`, then a JSON list of
`{"name": ..., "arguments": {...}}`. A checkpoint's own template may write calls in another way, which is not known
here: its replies are shown as they are, and it cannot be made to call a tool.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from octavo.chat.messages import ChatTemplate, ToolCall, to_json
from octavo.errors import OptionError, PromptError

if TYPE_CHECKING:
    from torch import Tensor

    from octavo.grammar import Grammar, GrammarConstraint

MAX_TOOLS = 128
MAX_CALLS = 16  # in one reply
_ID_LETTERS = string.ascii_letters + string.digits
_FORM = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {JSON Schema}}}'


class ToolUse:
    """The tools of one request. One call before the reply (`constraint`), and one after it (`parse`).

    Args:
        template: the model's.
        tools: OpenAI's definitions of tools; None or none of them if there are no tools.
        tool_choice: "none", "auto", "required", or `{"type": "function", "function": {"name": ...}}`; None is
            "auto" where there are tools.
        parallel: several calls may be made in one reply; never more than one where the choice names a function.

    Attributes:
        tools: for `ChatTemplate.render`, checked; None if there are none, or none may be called.
        choice: "none", "auto", "required" or "named".

    Raises:
        OptionError: a malformed tool or choice; a choice without tools; a call is required and the template does
            not say how calls are written.
        PromptError: the template has no place for tools.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        *,
        parallel: bool = True,
    ) -> None:
        checked = check_tools(tools or [])
        self.choice, name = _read_choice(tool_choice, [tool["function"]["name"] for tool in checked])
        self._template = template
        self._parallel = parallel and name is None
        self._callable = {i: t["function"] for i, t in enumerate(checked) if name in (None, t["function"]["name"])}
        self.tools = checked if checked and self.choice != "none" else None
        template.check_has_tools([], self.tools)
        self._opener = template.tool_calls_id if self.tools else None
        if self.choice in ("required", "named") and self._opener is None:
            raise OptionError(
                f"tool_choice is {tool_choice!r}, but how this model's template ({template.name}) writes a call is "
                "not known, so that it cannot be made to call",
                'give tool_choice "auto"',
            )

    def constraint(self, grammar: Grammar) -> Callable[[], ToolConstraint | GrammarConstraint] | None:
        """What the reply may consist of; None for anything, as without tools.

        Where a call is required, a call of one of the tools; where it is up to the model, anything, until it
        begins a call. A call's arguments are valid against the function's parameters. Only where these cannot be
        enforced, and the function does not say `"strict": true`, they may be any object.

        Raises:
            OptionError: the parameters of a strict function cannot be enforced; llguidance is not installed.
        """
        if self._opener is None:
            return None
        made = grammar.lark(self._lark(grammar), where="tools")
        if self.choice != "auto":
            return made
        opener = self._opener
        return lambda: ToolConstraint(made(), opener)

    def calling(self, token_ids: Sequence[int]) -> bool:
        """Whether a reply that begins with these tokens makes a call. Its text is then not to be shown.

        For a stream: text is passed on until this is so. The calls come at the end, from `parse`, in one piece.
        """
        return self._opener is not None and self._opener in token_ids

    def parse(self, token_ids: Sequence[int], text: str) -> tuple[str | None, list[ToolCall]]:
        """The content and the calls of a whole reply.

        Args:
            token_ids: everything the model said.
            text: of these tokens, without what ended the reply.

        Returns:
            Content is None where there are only calls. A reply whose calls cannot be read, or are of no function
            that may be called, is content, all of it.
        """
        if self._opener is None:
            return text, []
        names = {function["name"] for function in self._callable.values()}
        return parse_tool_calls(self._template, token_ids, text, names)

    def _lark(self, grammar: Grammar) -> str:
        """The grammar of a list of calls, blanks as Python's `json.dumps` and its neighbours put them."""
        rules = [f'start: <[{self._opener}]> " "? "[" " "? call {self._more()} " "? "]"', f"call: {self._calls()}"]
        for at, function in self._callable.items():
            opening = f'"{{" " "? "\\"name\\":" " "? "\\"{function["name"]}\\"," " "? "\\"arguments\\":" " "?'
            ending = '(", \\"id\\": \\"" /[a-zA-Z0-9]{9}/ "\\"")? " "? "}"'
            rules += [
                f"call_{at}: {opening} arguments_{at} {ending}",
                f"arguments_{at}: {_rule(grammar, at, function)}",
            ]
        return "\n".join(rules) + "\n"

    def _more(self) -> str:
        return f'(" "? "," " "? call){{0,{MAX_CALLS - 1}}}' if self._parallel else ""

    def _calls(self) -> str:
        return " | ".join(f"call_{at}" for at in self._callable)


class ToolConstraint:
    """Anything, until a call begins; then what a call may consist of."""

    def __init__(self, call: GrammarConstraint, opener: int) -> None:
        self._call = call
        self._opener = opener
        self._begun = False

    def allowed(self) -> Tensor | None:
        """As `octavo.engine.Constraint`."""
        return self._call.allowed() if self._begun else None

    def accept(self, token_id: int) -> None:
        """As `octavo.engine.Constraint`."""
        self._begun = self._begun or token_id == self._opener
        if self._begun:
            self._call.accept(token_id)


def parse_tool_calls(
    template: ChatTemplate, token_ids: Sequence[int], text: str, names: set[str] | None = None
) -> tuple[str | None, list[ToolCall]]:
    """The content and the calls of a reply, each call with a new id of nine letters and digits.

    Args:
        template: the model's.
        token_ids: everything the model said.
        text: of these tokens, without what ended the reply.
        names: of the functions that may be called; None for any.

    Returns:
        As `ToolUse.parse`.
    """
    opener = template.tool_calls_id
    if opener is None or opener not in token_ids:
        return text, []
    before = template.decode(token_ids[: list(token_ids).index(opener)])
    calls = _read_calls(text.removeprefix(before), names)
    return (before.strip() or None, calls) if calls else (text, [])


def check_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's definitions of tools, with what may be left out filled in and what is not known left out.

    Raises:
        OptionError: another shape, a name that is no name or comes twice, or too many tools.
    """
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise OptionError(f"tools must be a list of tools, found {type(tools).__name__}", _FORM)
    if len(tools) > MAX_TOOLS:
        raise OptionError(f"tools has {len(tools)} tools; {MAX_TOOLS} are the limit")
    checked = [_check_tool(tool, f"tools[{at}]") for at, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in checked]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"tools has two functions named {name!r}", "a name may come once")
    return checked


def new_call_id() -> str:
    """An id for a tool call: nine letters and digits, as Mistral's templates want it."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))


def _check_tool(tool: object, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(tool.get("function"), Mapping):
        raise OptionError(f"{where} must be a mapping of type 'function' with a function", _FORM)
    function = tool["function"]
    name, strict = function.get("name"), function.get("strict") or False
    description, parameters = function.get("description") or "", function.get("parameters") or {}
    if not isinstance(name, str) or not re.fullmatch("[a-zA-Z0-9_-]{1,64}", name):
        raise OptionError(f"{where}.function.name must be 1 to 64 of a-z, A-Z, 0-9, _ and -, found {name!r}", _FORM)
    if not isinstance(description, str):
        raise OptionError(f"{where}.function.description must be a string, found {description!r}", _FORM)
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise OptionError(f"{where}.function.parameters must be a JSON Schema of type object", _FORM)
    if not isinstance(strict, bool):
        raise OptionError(f"{where}.function.strict must be true or false, found {strict!r}")
    try:
        json.dumps(parameters, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{where}.function.parameters is not JSON: {error}") from None
    made = {"name": name, "description": description, "parameters": dict(parameters)}
    return {"type": "function", "function": made | ({"strict": True} if strict else {})}


def _read_choice(choice: object, names: Sequence[str]) -> tuple[str, str | None]:
    """What was chosen, and the function's name where one was."""
    if choice is None:
        return ("auto" if names else "none"), None
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if choice.get("type") != "function" or not isinstance(name, str):
            raise OptionError(
                f"tool_choice {dict(choice)!r} names no function", '{"type": "function", "function": {"name": ...}}'
            )
        if name not in names:
            known = ", ".join(names) or "none"
            raise OptionError(f"tool_choice names the function {name!r}, which is not among the tools: {known}")
        return "named", name
    if choice not in ("none", "auto", "required"):
        raise OptionError(f'tool_choice must be "none", "auto", "required" or name a function, found {choice!r}')
    if choice != "none" and not names:
        raise OptionError(f'tool_choice is "{choice}", but there are no tools', "give tools, or leave tool_choice out")
    return str(choice), None


def _rule(grammar: Grammar, at: int, function: Mapping[str, Any]) -> str:
    """The grammar's rule for a function's arguments."""
    where = f"tools[{at}].function.parameters"
    try:
        return grammar.json_rule({"type": "object", **function["parameters"]}, where=where)
    except OptionError:
        if function.get("strict"):
            raise
        return grammar.json_rule({"type": "object"}, where=where)


def _read_calls(text: str, names: set[str] | None) -> list[ToolCall]:
    """The calls that JSON text makes; none if it is anything else."""
    calls = []
    try:
        found = json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return []
    for one in found if isinstance(found, list) else []:
        name = one.get("name") if isinstance(one, dict) else None
        arguments = one.get("arguments", {}) if isinstance(one, dict) else None
        if not isinstance(name, str) or not isinstance(arguments, dict) or (names is not None and name not in names):
            return []
        try:
            calls.append(ToolCall(new_call_id(), name, to_json(arguments)))
        except PromptError:  # nested too deeply
            return []
    return calls


def _not_json(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")
