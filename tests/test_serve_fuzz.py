"""The API under requests that nobody thought of: made after its own document, and after requests that are nearly right.

The model is a random one of a few kilobytes with a tokenizer that has tool calls, so that replies cost next to nothing
and every kind of request is possible.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig

from conftest import tiny_model
from octavo import LLM, Tokenizer
from octavo.serve.app import create_app
from octavo.serve.config import ServeConfig
from octavo.serve.worker import Worker
from serve_fixtures import Running, running
from test_chat import FILES

KEY = "sk-of-the-fuzzer"
SETUP: dict[str, Any] = {"model_id": "tiny", "keys": (KEY,)}
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
CHAT, TEXT = "/chat/completions", "/completions"


def load() -> LLM:
    tokenizer = Tokenizer.from_file(FILES["v3"])
    return LLM(tiny_model(vocab_size=tokenizer.n_vocab, max_seq_len=112), tokenizer)


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    """The server; in the end it must be as it was in the beginning, and must not have complained."""
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        with running(load(), **SETUP) as one:
            one.http.headers.update(HEADERS)
            yield one
            assert one.idle(2.0)
            metrics = one.http.get(f"{one.root}/metrics").text
            for name in ("requests_running", "requests_waiting", "sequences_running"):
                assert f"\noctavo_{name} 0.0\n" in metrics
            body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
            assert one.post(CHAT, body).json()["usage"]["completion_tokens"] == 3
    finally:
        logging.getLogger().removeHandler(handler)
    assert errors == []


# ---------------------------------------- after the document


def document(mode: str, examples: int) -> Any:
    """The server's own document, for schemathesis; the same requests every time."""
    config = SchemathesisConfig.from_dict(
        {
            "seed": 1,
            "headers": HEADERS,
            "max-stream-events": 2000,  # it would leave a stream after 20
            "generation": {"mode": mode, "deterministic": True, "max-examples": examples, "database": "none"},
        }
    )
    llm = load()
    return schemathesis.openapi.from_dict(create_app(Worker(llm), ServeConfig(**SETUP)).openapi(), config=config)


load_all_checks()
UNSAID = CHECKS.get_one("positive_data_acceptance")  # fields that go together, tokens of the vocabulary, ...
FREELY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)  # what is found is small as it is


@document("all", 40).parametrize()
@settings(FREELY, max_examples=40)
def test_every_response_is_one_that_the_document_has(served: Running, case: schemathesis.Case) -> None:
    """No 5xx; status, content type, headers and body as documented; what is wrong is refused; keys are asked for."""
    if isinstance(case.body, dict) and case.body.get("n") in range(3, 129):
        case.body["n"] = 2
    case.call_and_validate(base_url=served.root, excluded_checks=[UNSAID])


def whole_numbers(value: Any) -> Any:
    """The same, with 1 for 1.0: JSON Schema calls that an integer, and the server does not."""
    if isinstance(value, dict):
        return {key: whole_numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [whole_numbers(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def said(body: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """A body that satisfies the document, made to satisfy what a document cannot say; and cheap."""
    body = whole_numbers(body)
    if body.get("n") in range(3, 129):
        body["n"] = 2
    if body.get("seed") is not None:
        body["seed"] %= 2**63  # such numbers are rounded on their way
    if not 0 < (body.get("max_tokens") or 0) < 6:
        body["max_tokens"] = 6
    if (body.get("max_completion_tokens") or 0) > 6:
        body["max_completion_tokens"] = 6
    if not body.get("stream"):
        body.pop("stream_options", None)
    if body.get("logit_bias"):
        body["logit_bias"] = {
            str(int(key) % vocab_size): value for key, value in body["logit_bias"].items() if key.isdecimal()
        }
    for name in ("audio", "functions", "function_call", "web_search_options", "suffix"):
        body.pop(name, None)
    return body


def said_in_chat(body: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    body = said(body, vocab_size)
    turns = [one.get("content") for one in body["messages"]]
    texts = [text[:20] for text in turns if isinstance(text, str) and text.strip()]
    body["messages"] = [{"role": "user", "content": (texts or ["Hi"])[0]}]
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    if (form := body.get("response_format")) is not None:
        body.pop("tools", None)
        if form.get("value") is not None:
            form["value"] = {"type": "boolean"}
        if form.get("json_schema") is not None:
            form["json_schema"]["schema"] = {"type": "object", "properties": {"a": {"enum": [1, 2]}}}
        elif form["type"] == "json_schema":
            form["type"] = "text"
    for tool in body.get("tools") or []:
        tool["function"]["parameters"] = {"type": "object", "properties": {}}
    body["tools"] = (body.get("tools") or [])[:1]
    if not body["tools"] or isinstance(body.get("tool_choice"), dict):
        body.pop("tool_choice", None)
    return body


def said_in_text(body: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    body = said(body, vocab_size)

    def one(prompt: Any) -> Any:
        return (prompt[:20] or "Hi") if isinstance(prompt, str) else [token % vocab_size for token in prompt][:20]

    prompt = body["prompt"]
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)  # a list is never empty
    body["prompt"] = [one(each) for each in prompt[:3]] if several else one(prompt)
    body.pop("best_of", None)
    return body


@document("positive", 50).include(method="POST", path_regex="completions$").parametrize()
@settings(FREELY, max_examples=50)
def test_requests_that_make_sense_get_replies(served: Running, case: schemathesis.Case) -> None:
    if not isinstance(case.body, dict) or case.method != "POST":
        return  # the other methods are the other test's
    chat = case.path.endswith(CHAT)
    case.body = (said_in_chat if chat else said_in_text)(case.body, served.worker.llm.model.args.vocab_size)
    response = case.call(base_url=served.root)
    assert response.status_code == 200, (response.text, case.body)
    case.validate_response(response)
    replied(response.headers["content-type"][0], response.text)


def replied(kind: str, text: str) -> None:
    """Assert a reply that came to its end, whole or in events."""
    if kind.startswith("text/event-stream"):
        *events, done, rest = text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        found = [json.loads(one.removeprefix("data: ")) for one in events]
        assert all("error" not in one for one in found)
        assert found[0]["choices"]
    else:
        assert kind == "application/json"
        assert all(choice["finish_reason"] for choice in json.loads(text)["choices"])


# ---------------------------------------- after requests that are nearly right

QUESTION = {"role": "user", "content": "Who are you?"}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "items": {"type": "boolean"}}}}
MANY: dict[str, Any] = {
    "model": "tiny", "max_tokens": 3, "n": 2, "stop": ["a", "b"], "seed": 3, "temperature": 1.5, "top_p": 0.9,
    "frequency_penalty": 0.5, "presence_penalty": -0.5, "logit_bias": {"5": 1.5}, "top_k": 5, "min_p": 0.1,
    "repetition_penalty": 1.1, "stream": True, "stream_options": {"include_usage": True},
}  # fmt: skip
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What time is it?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "content": "noon"},
]
FEW: dict[str, Any] = {"model": "tiny", "max_tokens": 3}
CHATS: list[dict[str, Any]] = [
    {**MANY, "messages": [QUESTION], "logprobs": True, "top_logprobs": 2},
    {**FEW, "messages": TURNS, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
    {**FEW, "messages": [QUESTION], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "now"}}},
    {**FEW, "messages": [QUESTION], "response_format": FORM, "max_completion_tokens": 3},
    {**FEW, "messages": [QUESTION], "response_format": {"type": "json_object"}, "stream": True, "modalities": ["text"]},
]
TEXTS: list[dict[str, Any]] = [
    {**MANY, "prompt": ["Once upon", "The sea"], "echo": True, "logprobs": 2, "best_of": 2},
    {**FEW, "prompt": [[5, 6, 7], [8]], "echo": True, "logprobs": 0, "max_tokens": 0},
    {**FEW, "prompt": [5, 6, 7], "stream": True, "suffix": None},
    {**FEW, "prompt": "Once upon a time", "user": "me"},
]
DEEP = "@deep@"  # what json.dumps could not write
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 5, 0.5, 1e308, -1e308, 5e-324, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400,
    float("nan"), float("inf"), float("-inf"), "", " ", "0", "\x00", "\ud800", "\udfff\ud800", "\u202e\ufeff",
    "\r\n\r\n", "[INST]", "</s>", "[TOOL_CALLS]", "x" * 100_000, "menny", "wizard", "function", "required", "text",
    "json_object", [], {}, [None], [[]], [{}], {"": None}, ["x"] * 300, [0] * 300, list(range(200)),
    {str(key): 1 for key in range(1500)},
    {"type": "string"}, {"$ref": "#"}, {"$ref": "https://example.org/x.json"}, {"type": "string", "pattern": "(a*)*$"},
    {"type": "string", "minLength": 10**9}, {"allOf": [{"type": "string"}, {"type": "null"}]}, {"enum": []}, DEEP,
]  # fmt: skip


def spots(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every place in a tree, as what holds it and its key or index there."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            spots(value[key], found)
    return found


@st.composite
def bodies(draw: st.DrawFn, right: list[dict[str, Any]]) -> bytes:
    """A body that is right, with one to three things changed, and sometimes a byte of what is sent."""
    body = copy.deepcopy(draw(st.sampled_from(right)))
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(spots(body, []) or [(body, "model")]))
        change = draw(st.sampled_from(["odd", "odd", "odd", "drop", "wrap", "twice", "add", "other"]))
        if change == "odd" or key not in (holder if isinstance(holder, dict) else range(len(holder))):
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif change == "drop":
            del holder[key]
        elif change == "wrap":
            holder[key] = draw(st.sampled_from([[holder[key]], {"a": holder[key]}, [[holder[key]]], str(holder[key])]))
        elif change == "twice" and isinstance(holder[key], (list, str)):
            holder[key] = holder[key] * draw(st.sampled_from([2, 20, 200]))
        elif change == "add" and isinstance(holder, dict):
            name = draw(
                st.sampled_from([*MANY, *CHATS[1], *TEXTS[0], "__class__", "", "\ud800", "response_format", "x"])
            )
            holder[name] = copy.deepcopy(draw(st.sampled_from(ODD)))
        else:
            other, its = draw(st.sampled_from(spots(body, [])))
            holder[key] = copy.deepcopy(other[its])
    data = json.dumps(body).replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000).encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(data) - 1))
        byte = draw(st.sampled_from([b"", b"\xff", b"\x00", b'"', b"{", b"\xed\xa0\x80"]))
        data = data[:at] + byte + data[at + draw(st.integers(0, 1)) :]
    return data


def post(served: Running, path: str, data: bytes) -> int:
    """Send a body; assert that it is replied to, or refused as the API refuses. Returns the status."""
    response = served.http.post(served.url + path, content=data)
    assert response.status_code in (200, 400, 404), (response.status_code, response.text[:300])
    if response.status_code == 200:
        replied(response.headers["content-type"].partition(";")[0], response.text)
    else:
        assert response.headers["content-type"] == "application/json"
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert 0 < len(error["message"]) < 2000
    return response.status_code


@pytest.mark.parametrize(("path", "right"), [(CHAT, CHATS), (TEXT, TEXTS)])
def test_what_is_changed_below_is_right(served: Running, path: str, right: list[dict[str, Any]]) -> None:
    for one in right:
        assert post(served, path, json.dumps(one).encode()) == 200, served.post(path, one).text


@settings(FREELY, max_examples=400)
@given(data=bodies(CHATS))
def test_conversations_that_are_nearly_right(served: Running, data: bytes) -> None:
    post(served, CHAT, data)


@settings(FREELY, max_examples=400)
@given(data=bodies(TEXTS))
def test_prompts_that_are_nearly_right(served: Running, data: bytes) -> None:
    post(served, TEXT, data)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"temperature": 1e39}, 200),  # more than float32 holds: a token beyond the vocabulary was drawn
        ({"temperature": 1e39, "top_k": 1}, 200),
        ({"temperature": 5e-324, "top_p": 5e-324, "min_p": 5e-324}, 200),
        ({"repetition_penalty": 1e-40}, 400),  # logits divided by it are infinite
        ({"repetition_penalty": 1e300}, 400),
        ({"logit_bias": {"40": 100, "41": -100}, "temperature": 0}, 200),
    ],
)
def test_extremes(served: Running, change: dict[str, Any], status: int) -> None:
    """Found by the above, and kept: with a constraint, as that makes most logits -inf."""
    body = {**FEW, "messages": [QUESTION], "response_format": FORM, "seed": 1, **change}
    assert post(served, CHAT, json.dumps(body).encode()) == status
