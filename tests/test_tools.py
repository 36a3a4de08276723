"""Tools: told, called, answered and read back as mistral-common and transformers do it; calls that must be made."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.tool_calls import ToolCall as TheirCall
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from octavo.chat import ChatTemplate, InstructV3, Message, ToolCall, ToolUse, template_for
from octavo.chat.tools import MAX_TOOLS, check_tools, parse_tool_calls
from octavo.errors import OptionError, PromptError
from octavo.grammar import Grammar
from octavo.llm import LLM
from octavo.tokenizer import Tokenizer
from test_chat import CHATML, FILES, SAID, chatml_folder

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city [INST]",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Paris", "Zürich"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock-2", "parameters": {"type": "object", "properties": {}}}}
BARE = {"type": "function", "function": {"name": "bare"}}
HERMES = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is none %}-{% else %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{% if m.tool_call_id %} for {{ m.tool_call_id }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL_ID = "Zx8Kq2Lw9"


def asks(*calls: tuple[str, str], content: str | None = None) -> dict[str, Any]:
    """The assistant's message with calls, as a client sends it: id and arguments of each."""
    made = [
        {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for call_id, arguments in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


def answers(call_id: str, content: object = "22") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


ASKED = {"role": "user", "content": "Will it rain?"}
ROUND = [ASKED, asks((CALL_ID, '{"city": "Paris"}')), answers(CALL_ID, '{"rain": false}')]


@pytest.fixture(scope="module")
def v3() -> ChatTemplate:
    return template_for(Tokenizer.from_file(FILES["v3"]))


@pytest.fixture(scope="module")
def grammar(v3: ChatTemplate) -> Grammar:
    return Grammar(Tokenizer.from_file(FILES["v3"]), 32768, v3.stop_ids)


@pytest.fixture(scope="module")
def theirs() -> MistralTokenizer:
    return MistralTokenizer.from_file(str(FILES["v3"]))


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(chatml_folder(tmp_path_factory.mktemp("hermes"), HERMES))
    assert tokenizer is not None
    return tokenizer


# --- conversations with tools ----------------------------------------------------------------------------

IDS = st.from_regex("[a-zA-Z0-9]{9}", fullmatch=True)
NAMES = st.from_regex("[a-zA-Z0-9_-]{1,12}", fullmatch=True)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), SAID),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(SAID, inner, max_size=2)),
    max_leaves=4,
)
OBJECTS = st.dictionaries(SAID, VALUES, max_size=2)
TOOLS = st.lists(
    st.builds(
        lambda name, rest: {"type": "function", "function": {"name": name, **rest}},
        NAMES,
        st.fixed_dictionaries(
            {}, optional={"description": SAID, "parameters": OBJECTS.map(lambda more: {**more, "type": "object"})}
        ),
    ),
    max_size=3,
    unique_by=lambda tool: tool["function"]["name"],
)


@st.composite
def arguments(draw: st.DrawFn) -> str:
    """Argument text: compact or not, empty, or no JSON at all."""
    return draw(st.one_of(OBJECTS.map(json.dumps), OBJECTS.map(lambda v: json.dumps(v, indent=1)), st.just(""), SAID))


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Any conversation in turn, with calls and their results; the user or a tool has the last word."""
    turns: list[dict[str, Any]] = [{"role": "system", "content": draw(SAID)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(SAID)})
        for _ in range(draw(st.integers(0, 2))):
            ids = draw(st.lists(IDS, min_size=1, max_size=2, unique=True))
            turns.append(asks(*[(call_id, draw(arguments())) for call_id in ids]))
            turns += [answers(call_id, draw(arguments())) for call_id in draw(st.permutations(ids))]
        turns.append({"role": "assistant", "content": draw(SAID)})
    return turns[: draw(st.sampled_from([i for i, t in enumerate(turns, 1) if _may_end(turns, i)]))]


def _may_end(turns: list[dict[str, Any]], stop: int) -> bool:
    after = turns[stop]["role"] if stop < len(turns) else "user"
    return turns[stop - 1]["role"] in ("user", "tool") and after != "tool"


def theirs_of(message: dict[str, Any]) -> Any:
    """A message as mistral-common has it."""
    kinds: dict[str, Any] = {"system": SystemMessage, "user": UserMessage, "tool": ToolMessage}
    fields = {key: value for key, value in message.items() if key != "role"}
    if message["role"] == "assistant":
        calls = [TheirCall.model_validate(call) for call in fields.pop("tool_calls", [])]
        return AssistantMessage(**fields, tool_calls=calls or None)
    return kinds[message["role"]](**fields)


@settings(deadline=None, max_examples=80)
@given(messages=conversations(), tools=TOOLS)
def test_as_mistral_common(
    v3: ChatTemplate, theirs: MistralTokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> None:
    request = ChatCompletionRequest(
        messages=[theirs_of(m) for m in messages], tools=[Tool.from_openai(tool) for tool in tools] or None
    )
    # Their validator wants each schema's keywords to make sense; what is rendered does not depend on it.
    normal = theirs._instruct_request_normalizer.from_chat_completion_request(request)
    expected = theirs.instruct_tokenizer.encode_instruct(normal).tokens
    assert v3.render(messages, tools) == expected


def test_golden(v3: ChatTemplate) -> None:
    """A conversation with a tool, mark for mark."""
    ids = v3.render(
        [{"role": "system", "content": "Be nice"}, *ROUND, {"role": "assistant", "content": "No."}, ASKED], [BARE]
    )
    tokenizer = Tokenizer.from_file(FILES["v3"])
    names = [tokenizer.token_name(i) for i in ids if tokenizer.control_id(tokenizer.token_name(i)) == i]
    assert " ".join(names) == (
        "<s> [INST] [/INST] [TOOL_CALLS] </s> [TOOL_RESULTS] [/TOOL_RESULTS] </s> "
        "[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [INST] [/INST]"
    )
    assert tokenizer.decode(ids) == (
        'Will it rain? [{"name": "weather", "arguments": {"city": "Paris"}, "id": "Zx8Kq2Lw9"}]'
        ' {"content": {"rain": false}, "call_id": "Zx8Kq2Lw9"} No.'
        ' [{"type": "function", "function": {"name": "bare", "description": "", "parameters": {}}}]'
        " Be nice\n\nWill it rain?"
    )


def test_content_in_parts(v3: ChatTemplate, theirs: MistralTokenizer) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": ""}, {"type": "text", "text": "there"}]
    request = ChatCompletionRequest(messages=[UserMessage(content=parts)])
    assert v3.render([{"role": "user", "content": parts}]) == theirs.encode_chat_completion(request).tokens


@settings(deadline=None, max_examples=30)
@given(messages=conversations(), reply=SAID)
def test_training_ids(v3: ChatTemplate, messages: list[dict[str, Any]], reply: str) -> None:
    """The marked tokens are what the assistant says and calls, and what the model sees before is its prompt."""
    tokenizer = Tokenizer.from_file(FILES["v3"])
    opener = tokenizer.control_id("[TOOL_CALLS]")
    if messages[-1]["role"] == "tool":
        messages = [*messages, {"role": "assistant", "content": reply}]
    else:
        messages = [*messages, asks((CALL_ID, "{}"))]
    ids, wrote = v3.render_training(messages, [WEATHER])
    prompt = v3.render(messages[:-1], [WEATHER])
    assert ids[: len(prompt)] == prompt
    assert all(wrote[len(prompt) :])
    spoken = [i for i, mine in zip(ids, wrote, strict=True) if mine]
    turns = [m for m in messages if m["role"] == "assistant"]
    assert spoken.count(2) == len(turns)
    assert spoken.count(opener) == ids.count(opener) == sum("tool_calls" in turn for turn in turns)


def test_ids_of_other_makers(v3: ChatTemplate) -> None:
    """A call's id that is not nine letters and digits becomes one that is: the same for the call and its result."""
    long = "call_3f5b1c2d4e5f60718293a4b5"
    text = v3.decode(v3.render([ASKED, asks((long, "{}")), answers(long)]))
    used = re.findall(r'id": "([^"]*)"', text)
    assert len(used) == 2
    assert used[0] == used[1]
    assert re.fullmatch("[a-zA-Z0-9]{9}", used[0])
    other = v3.decode(v3.render([ASKED, asks((long + "x", "{}")), answers(long + "x")]))
    assert used[0] not in other


def test_words_beside_a_call_are_kept(v3: ChatTemplate) -> None:
    text = v3.decode(v3.render([ASKED, asks((CALL_ID, "{}"), content="Let me see."), answers(CALL_ID)]))
    assert "Let me see. [{" in text


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([ASKED, asks((CALL_ID, "{}"))], f"the tool call '{CALL_ID}' has no result"),
        ([ASKED, asks((CALL_ID, "{}")), ASKED], "message 2 is the user's, but the tool call"),
        ([ASKED, asks((CALL_ID, "{}"), ("b", "{}")), answers(CALL_ID)], "the tool call 'b' has no result"),
        ([ASKED, asks((CALL_ID, "{}")), answers("other")], "message 2 answers the tool call 'other'"),
        ([*ROUND, answers(CALL_ID)], "message 3 answers the tool call"),
        ([ASKED, {"role": "assistant", "content": "No"}, answers(CALL_ID)], "message 2 answers the tool call"),
        ([ASKED, answers(CALL_ID)], "message 1 is the tool's, but it is the assistant's turn"),
        ([answers(CALL_ID)], "message 0 is the tool's, but it is the user's turn"),
        ([*ROUND, {"role": "system", "content": "x"}], "message 3 is the system's, but it is the user's turn"),
        ([*ROUND, {"role": "assistant", "content": "No"}], "the last message must be the user's"),
        ([{"role": "tool", "content": "x"}], "a tool message needs tool_call_id"),
        ([{**ASKED, "tool_call_id": "x"}], "a user message has tool_call_id"),
        ([{**asks((CALL_ID, "{}")), "role": "user", "content": "x"}], "a user message has tool_calls"),
        ([{"role": "assistant", "content": None}], "must be a string, found NoneType"),
        ([{"role": "assistant", "tool_calls": 3, "content": "x"}], "tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [3], "content": "x"}], "a tool call must be a mapping"),
        ([{"role": "assistant", "tool_calls": [{"id": "x", "function": {}}]}], "the name of a tool call must be"),
        ([{**ASKED, "name": 3}], "the name in a user message"),
        ([{**ASKED, "refusal": "no"}], "found 'role', 'content', 'refusal'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "part of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "must hold a string, found 3"),
        ([{"role": "user", "content": []}], "must be a string, found list"),
        ([{"role": "user", "content": [{"type": "text", "text": " "}]}], "blank"),
    ],
)
def test_conversations_that_are_none(v3: ChatTemplate, messages: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(PromptError, match=says):
        v3.render(messages, [WEATHER])


def test_what_openai_s_client_sends_back(v3: ChatTemplate) -> None:
    """A message dumped whole has keys that say nothing."""
    idle = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "name": None}
    assert v3.render([{**message, **idle} for message in ROUND]) == v3.render(ROUND)
    assert Message.of(ROUND[1]) == Message("assistant", "", (ToolCall(CALL_ID, "weather", '{"city": "Paris"}'),))
    assert Message.of(ROUND[1]).tool_calls[0].to_dict() == ROUND[1]["tool_calls"][0]


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 600 + "1" + "}" * 600, "1" * 5000, '"\\ud800"'])
def test_results_that_are_hard_to_read(v3: ChatTemplate, hermes: Tokenizer, content: str) -> None:
    """They are read, kept as text, or refused in so many words; nothing else."""
    for template in (v3, template_for(hermes)):
        messages = [ASKED, asks((CALL_ID, content)), answers(CALL_ID, content)]
        if content.startswith('"'):
            with pytest.raises(PromptError, match="surrogate"):
                template.render(messages)
        else:
            assert content in template.decode(template.render(messages)).replace('\\"', '"').replace('": ', '":')


def test_templates_without_tools(v3: ChatTemplate) -> None:
    menny = LLM.load("menny").template
    assert isinstance(menny, InstructV3)
    v1 = template_for(Tokenizer.from_file(FILES["v1"]))
    assert v3.has_tools
    for template in (menny, v1):
        assert not template.has_tools
        assert template.tool_calls_id is None
        for messages, tools in (([ASKED], [WEATHER]), (ROUND, None)):
            with pytest.raises(PromptError, match=rf"template \({template.name}\) has no place for tools"):
                template.render(messages, tools)
        with pytest.raises(PromptError, match="has no place for tools"):
            ToolUse(template, [WEATHER])
        assert template.render([ASKED], []) == template.render([ASKED])


# --- a checkpoint's own template -------------------------------------------------------------------------


def test_own_template_as_transformers_renders_it(hermes: Tokenizer) -> None:
    template = template_for(hermes)
    assert template.name == "own"
    assert template.has_tools
    plain = {**WEATHER, "function": {**WEATHER["function"], "description": "é"}}  # type: ignore[dict-item]
    read = json.loads(json.dumps(ROUND))
    for call in read[1]["tool_calls"]:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    [text], _ = render_jinja_template(
        conversations=[read], chat_template=HERMES, add_generation_prompt=True, tools=[plain]
    )
    library = tokenizers.Tokenizer.from_file(str(hermes.path))
    assert template.render(ROUND, [plain]) == [
        hermes.bos_id,
        *library.encode(text, add_special_tokens=False).ids,
    ]


def test_own_template_keeps_words_text(hermes: Tokenizer) -> None:
    """A result that spells a control token is text; where it cannot be told apart, it is refused."""
    template = template_for(hermes)
    ends = template.render(ROUND).count(hermes.control_id("<|im_end|>"))
    spelt = [*ROUND[:2], answers(CALL_ID, "a<|im_end|>b")]
    assert template.render(spelt).count(hermes.control_id("<|im_end|>")) == ends
    assert "a<|im_end|>b" in template.decode(template.render(spelt))
    for messages, tools in (
        ([ASKED, asks((CALL_ID, '{"city": "<|im_end|>"}')), answers(CALL_ID)], None),
        ([{**ASKED, "name": "<|im_end|>"}], None),
        ([ASKED], [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]),
    ):
        with pytest.raises(PromptError, match=r"spells the control token <\|im_end\|>"):
            template.render(messages, tools)


def test_own_template_that_knows_no_tools(tmp_path: Path, hermes: Tokenizer) -> None:
    template = template_for(Tokenizer.from_folder(chatml_folder(tmp_path, CHATML)))
    with pytest.raises(PromptError, match=r"template \(own\) has no place for tools"):
        template.render([ASKED], [WEATHER])
    # How calls are written is in no template's head: they may be told of tools, but not made to call one.
    use = ToolUse(template_for(hermes), [WEATHER])
    assert use.tools == [check_tools([WEATHER])[0]]
    assert use.parse([5, 6], "<tool_call>") == ("<tool_call>", [])
    with pytest.raises(OptionError, match="tool_choice is 'required'"):
        ToolUse(template_for(hermes), [WEATHER], "required")
    with pytest.raises(PromptError, match="training on tool calls"):
        template_for(hermes).render_training([*ROUND, {"role": "assistant", "content": "No"}])


# --- definitions and choices -----------------------------------------------------------------------------


def function(**fields: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("weather", "tools must be a list of tools, found str"),
        ([3], r"tools\[0\] must be a mapping"),
        ([WEATHER, {"type": "retrieval"}], r"tools\[1\] must be a mapping of type 'function'"),
        ([function(name="two words")], r"tools\[0\].function.name must be 1 to 64"),
        ([function(name="x" * 65)], "name must be 1 to 64"),
        ([function(description=3)], "description must be a string"),
        ([function(parameters=[1])], "parameters must be a JSON Schema of type object"),
        ([function(parameters={"type": "string"})], "parameters must be a JSON Schema of type object"),
        ([function(parameters={"a": {1}})], "parameters is not JSON"),
        ([function(strict="yes")], "strict must be true or false"),
        ([WEATHER, BARE, WEATHER], "two functions named 'weather'"),
        ([function()] * (MAX_TOOLS + 1), "128 are the limit"),
    ],
)
def test_tools_that_are_none(v3: ChatTemplate, tools: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        ToolUse(v3, tools)
    with pytest.raises(OptionError, match=says):
        v3.render([ASKED], tools)


@pytest.mark.parametrize(
    ("tools", "choice", "says"),
    [
        ([], "required", "there are no tools"),
        ([], {"type": "function", "function": {"name": "weather"}}, "not among the tools: none"),
        ([WEATHER], "any", 'must be "none", "auto", "required"'),
        ([WEATHER], 3, "found 3"),
        ([WEATHER], {"type": "function"}, "names no function"),
        ([WEATHER], {"type": "function", "function": {"name": "clock"}}, "not among the tools: weather"),
    ],
)
def test_choices_that_are_none(v3: ChatTemplate, tools: Any, choice: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        ToolUse(v3, tools, choice)


def test_no_tools_at_all(v3: ChatTemplate, grammar: Grammar) -> None:
    opener = v3.tool_calls_id
    assert opener is not None
    for use in (ToolUse(v3), ToolUse(v3, []), ToolUse(v3, [WEATHER], "none")):
        assert use.choice == "none"
        assert use.tools is None
        assert use.constraint(grammar) is None
        assert not use.calling([opener])
        assert use.parse([opener, 5], "[]") == ("[]", [])


# --- calls -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(given_=st.lists(st.tuples(NAMES, OBJECTS), min_size=1, max_size=3))
def test_what_was_called_is_read_back(v3: ChatTemplate, given_: list[tuple[str, dict[str, Any]]]) -> None:
    """A reply as the template writes it gives the calls it was made of, with new ids."""
    calls = [ToolCall(CALL_ID, name, json.dumps(value)) for name, value in given_]
    prompt = v3.render([ASKED])
    ids, _ = v3.render_training([ASKED, Message("assistant", "", tuple(calls))])
    reply = ids[len(prompt) :]
    content, found = parse_tool_calls(v3, reply, v3.decode(reply))
    assert content is None
    assert [(call.name, call.value) for call in found] == [(call.name, call.value) for call in calls]
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", call.id) for call in found)
    assert len({CALL_ID, *(call.id for call in found)}) == len(found) + 1


def test_words_before_a_call(v3: ChatTemplate) -> None:
    tokenizer = Tokenizer.from_file(FILES["v3"])
    ids = [*tokenizer.encode("I look:"), int(v3.tool_calls_id or 0), *tokenizer.encode('[{"name": "bare"}]')]
    content, (call,) = ToolUse(v3, [BARE]).parse([*ids, 2], tokenizer.decode(ids))
    assert (content, call.name, call.arguments) == ("I look:", "bare", "{}")
    assert not ToolUse(v3, [BARE]).calling(ids[:2])
    assert ToolUse(v3, [BARE]).calling(ids[:-3])


@pytest.mark.parametrize(
    "said",
    [
        "",
        "[]",
        "3",
        "null",
        '[{"name": "bare"}',
        '[{"name": "bare"}] and more',
        '[{"name": "other", "arguments": {}}]',
        '[{"name": 3}]',
        '[{"arguments": {}}]',
        '[{"name": "bare", "arguments": [1]}]',
        '[{"name": "bare", "arguments": {"a": NaN}}]',
        '[{"name": "bare"}, 3]',
        "[" * 3000,
        '[{"name": "bare", "arguments": ' + '{"a":' * 3000,
    ],
)
def test_a_reply_that_calls_nothing_stays_content(v3: ChatTemplate, said: str) -> None:
    ids = [int(v3.tool_calls_id or 0), *Tokenizer.from_file(FILES["v3"]).encode(said)]
    assert ToolUse(v3, [BARE]).parse(ids, said) == (said, [])
    # The same words without the control token are no call, be they ever so well-formed.
    assert ToolUse(v3, [BARE]).parse(ids[1:], '[{"name": "bare"}]') == ('[{"name": "bare"}]', [])


def walk(make: Any, rng: random.Random, template: ChatTemplate, *, call_at: int = 0) -> list[int] | None:
    """Tokens drawn from those allowed, mostly such as end the reply; None if it did not end."""
    tokenizer = Tokenizer.from_file(FILES["v3"])
    soonest = [2, *(i for text in '}]"' for i in tokenizer.encode(text)[-1:])]
    constraint, ids = make(), []
    for at in range(400):
        allowed_V = constraint.allowed()
        if allowed_V is None:
            token_id = int(template.tool_calls_id or 0) if at >= call_at else rng.randrange(1000, 30000)
        else:
            hasty = [i for i in soonest if allowed_V[i]] if rng.random() < 0.7 + at / 200 else []
            token_id = rng.choice(hasty or allowed_V.nonzero().flatten().tolist())
        constraint.accept(token_id)
        if token_id == 2:
            return ids
        ids.append(token_id)
    return None


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=["auto", "required", "named"])
def test_calls_are_valid(v3: ChatTemplate, grammar: Grammar, choice: Any, seed: int) -> None:
    use = ToolUse(v3, [WEATHER, CLOCK, BARE], choice)
    words = 3 if choice == "auto" else 0
    ids = walk(use.constraint(grammar), random.Random(seed), v3, call_at=words)
    assert ids is not None
    assert ids.index(int(v3.tool_calls_id or 0)) == words
    content, calls = use.parse(ids, v3.decode(ids))
    assert (content is None) == (words == 0)
    assert calls
    if choice is NAMED:
        assert [call.name for call in calls] == ["weather"]
    for call in calls:
        assert call.name in ("weather", "clock-2", "bare")
        if call.name == "weather":
            jsonschema.validate(call.value, WEATHER["function"]["parameters"])  # type: ignore[index]


def test_one_call_where_several_are_not_wanted(v3: ChatTemplate, grammar: Grammar) -> None:
    tokenizer = Tokenizer.from_file(FILES["v3"])
    text = ' [{"name": "bare", "arguments": {}}, {"name": "bare", "arguments": {}}]'
    named = {"type": "function", "function": {"name": "bare"}}
    for choice, parallel, several in (("required", True, True), ("required", False, False), (named, True, False)):
        make = ToolUse(v3, [BARE], choice, parallel=parallel).constraint(grammar)
        assert make is not None
        constraint, taken = make(), 0
        for token_id in [int(v3.tool_calls_id or 0), *tokenizer.encode(text.lstrip())]:
            allowed_V = constraint.allowed()
            assert allowed_V is not None
            if not allowed_V[token_id]:
                break
            constraint.accept(token_id)
            taken += 1
        said = tokenizer.encode(text.lstrip())
        assert (taken == len(said) + 1) == several


def test_a_required_call_comes_first(v3: ChatTemplate, grammar: Grammar) -> None:
    make = ToolUse(v3, [WEATHER], "required").constraint(grammar)
    assert make is not None
    allowed_V = make().allowed()
    assert allowed_V is not None
    assert allowed_V.nonzero().flatten().tolist() == [v3.tool_calls_id]
    free = ToolUse(v3, [WEATHER]).constraint(grammar)
    assert free is not None
    assert free().allowed() is None


def test_parameters_that_cannot_be_enforced(v3: ChatTemplate, grammar: Grammar) -> None:
    """They are refused where the function is strict; elsewhere any object will do."""
    parameters = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    strict = [BARE, function(parameters=parameters, strict=True)]
    with pytest.raises(OptionError, match=r"tools\[1\].function.parameters: .*not"):
        ToolUse(v3, strict, "required").constraint(grammar)
    use = ToolUse(v3, [function(parameters=parameters)], "required")
    ids = walk(use.constraint(grammar), random.Random(0), v3)
    assert ids is not None
    assert use.parse(ids, v3.decode(ids))[1][0].name == "f"
