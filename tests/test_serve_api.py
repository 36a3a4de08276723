"""The API as its clients use it: openai's package and plain HTTP, against a server of the shipped model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from conftest import tiny_model
from octavo import LLM, Persona, Tokenizer
from serve_fixtures import QUESTION, Running, load, running
from test_chat import FILES


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load()


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Running]:
    with running(llm) as one:
        yield one


@pytest.fixture(scope="module")
def alone() -> LLM:
    """The same model beside the server, for what it says itself."""
    return load()


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key="none", max_retries=0) as one:
        yield one


def events(response: httpx.Response) -> list[Any]:
    """The data of every event; the last one must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---------------------------------------- chat


def test_a_reply_is_what_the_model_says_alone(client: openai.OpenAI, alone: LLM) -> None:
    expected = alone.chat(QUESTION, persona="menny", temperature=0)
    found = client.chat.completions.create(model="menny", messages=QUESTION, temperature=0)
    (choice,) = found.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    assert found.usage.completion_tokens == expected.usage.completion_tokens
    assert found.usage.total_tokens == expected.usage.total_tokens
    assert found.model == "menny"
    assert found.object == "chat.completion"


def test_a_stream_says_the_same_in_pieces(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "menny", "messages": QUESTION, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert len({chunk.id for chunk in chunks}) == 1
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert len(pieces) > 5
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in pieces)


def test_async_clients_at_once(served: Running, client: openai.OpenAI) -> None:
    questions = ["Who are you?", "What is two plus two?", "Say something kind.", "What is a router?"] * 2

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as one:

            async def stream(question: str) -> str:
                chunks = await one.chat.completions.create(
                    model="menny",
                    messages=[{"role": "user", "content": question}],
                    temperature=0,
                    max_tokens=24,
                    stream=True,
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            return await asyncio.gather(*map(stream, questions))

    together = asyncio.run(ask())
    for question, text in zip(questions[:4], together[:4], strict=True):
        messages = [{"role": "user", "content": question}]
        one = client.chat.completions.create(model="menny", messages=messages, temperature=0, max_tokens=24)
        assert one.choices[0].message.content == text
    assert together[:4] == together[4:]


def test_sampling_options_reach_the_model(client: openai.OpenAI, alone: LLM) -> None:
    options: dict[str, Any] = {
        "temperature": 4.0, "top_p": 0.99, "seed": 7, "max_tokens": 12, "n": 3, "frequency_penalty": 0.5,
        "presence_penalty": -0.5, "stop": ["zebra"],
    }  # fmt: skip
    ours = {"top_k": 40, "min_p": 0.0001, "repetition_penalty": 1.05}
    bias = {"17": 2.5}
    expected = alone.chat(QUESTION, persona="menny", **options, **ours, logit_bias={17: 2.5})
    found = client.chat.completions.create(
        model="menny", messages=QUESTION, **options, logit_bias=bias, extra_body=ours
    )
    assert [choice.message.content for choice in found.choices] == [choice.text for choice in expected.choices]
    assert len({choice.text for choice in expected.choices}) > 1
    assert found.usage.completion_tokens == expected.usage.completion_tokens


def test_a_persona_speaks_unless_the_request_brings_its_own_prompt(served: Running, alone: LLM) -> None:
    persona = Persona.load("menny")
    with running(load(), model_id="tiny/model") as other:
        names = [one["id"] for one in other.http.get(f"{other.url}/models").json()["data"]]
        assert names == ["tiny/model", *Persona.shipped()]
        assert other.http.get(f"{other.url}/models/tiny/model").json()["id"] == "tiny/model"
        tokens = {}
        for model in ("tiny/model", "menny"):
            body = {"model": model, "messages": QUESTION, "max_tokens": 1}
            tokens[model] = other.post("/chat/completions", body).json()["usage"]["prompt_tokens"]
        own = [{"role": "developer", "content": "Be brief."}, *QUESTION]
        brought = other.post("/chat/completions", {"model": "menny", "messages": own, "max_tokens": 1}).json()
    system = [{"role": "system", "content": persona.system}]
    assert tokens["menny"] == len(alone.prepare([*system, *QUESTION]).ids)
    assert tokens["tiny/model"] == len(alone.prepare(QUESTION).ids) < tokens["menny"]
    brief = [{"role": "system", "content": "Be brief."}]
    assert brought["usage"]["prompt_tokens"] == len(alone.prepare([*brief, *QUESTION]).ids)


def test_a_max_completion_tokens_and_a_stop_string_end_a_reply(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "menny", "messages": QUESTION, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content
    cut = client.chat.completions.create(**options, max_completion_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 3
    assert whole.startswith(cut.choices[0].message.content)
    word = whole.split()[4]
    stopped = client.chat.completions.create(**options, stop=word)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == whole[: whole.index(word)]


def test_log_probabilities_are_the_models_own(client: openai.OpenAI, alone: LLM) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
    expected = alone.chat(QUESTION, persona="menny", logprobs=3, **options)
    asked: dict[str, Any] = {"model": "menny", "messages": QUESTION, "logprobs": True, "top_logprobs": 3, **options}
    found = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-4)
    assert [len(one.top_logprobs) for one in found] == [3] * 6
    assert b"".join(bytes(one.bytes) for one in found).decode().strip() == expected.text
    streamed = [
        one
        for chunk in client.chat.completions.create(**asked, stream=True)
        for one in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [one.token for one in streamed] == [one.token for one in found]
    bare = client.chat.completions.create(**{**asked, "top_logprobs": None}).choices[0].logprobs.content
    assert [one.top_logprobs for one in bare] == [[]] * 6


def test_json_replies(client: openai.OpenAI, served: Running) -> None:
    class Mood(BaseModel):
        mood: Literal["glad", "sad"]
        sure: bool

    parsed = client.chat.completions.parse(
        model="menny", messages=QUESTION, response_format=Mood, max_tokens=60, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Mood)
    body = {"model": "menny", "messages": QUESTION, "response_format": {"type": "json_object"}, "stream": True}
    response = served.post("/chat/completions", {**body, "max_tokens": 60, "seed": 3})
    chunks = events(response)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    if chunks[-1]["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)
    assert text.lstrip().startswith("{")


def test_a_schema_that_cannot_be_used_is_refused(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(model="menny", messages=QUESTION, response_format=schema)


def test_tools_are_refused_by_a_template_that_has_none(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError, match="tools") as refused:
        client.chat.completions.create(model="menny", messages=QUESTION, tools=[tool])
    assert refused.value.body["type"] == "invalid_request_error"
    found = client.chat.completions.create(
        model="menny", messages=QUESTION, tools=[tool], tool_choice="none", max_tokens=2
    )
    assert found.choices[0].finish_reason == "length"


def test_tools_are_called() -> None:
    tokenizer = Tokenizer.from_file(FILES["v3"])
    model = tiny_model(vocab_size=tokenizer.n_vocab, max_seq_len=512)
    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {**city, "additionalProperties": False}}}
    with running(LLM(model, tokenizer), model_id="tiny") as one, openai.OpenAI(base_url=one.url, api_key="x") as client:
        asked: dict[str, Any] = {
            "model": "tiny", "messages": QUESTION, "tools": [tool], "tool_choice": "required", "seed": 1,
            "parallel_tool_calls": False, "max_tokens": 200,
        }  # fmt: skip
        (choice,) = client.chat.completions.create(**asked).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Oslo")
        chunks = list(client.chat.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
        (streamed,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert streamed.function.arguments == call.function.arguments
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        answer = {"role": "tool", "tool_call_id": call.id, "content": "22"}
        again = [*QUESTION, choice.message, answer]
        said = client.chat.completions.create(**{**asked, "messages": again, "tool_choice": "none", "max_tokens": 5})
        assert said.choices[0].message.content is not None
        assert said.usage.completion_tokens == 5


def test_a_second_turn_reuses_the_first(client: openai.OpenAI) -> None:
    # The template puts a system prompt before the last question: with one, a next turn has nothing in common.
    asked = [{"role": "system", "content": ""}, {"role": "user", "content": "Tell me about the sea, moon and tide."}]
    first = client.chat.completions.create(model="menny", messages=asked, temperature=0, max_tokens=64)
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    again = [*asked, answer, {"role": "user", "content": "And then?"}]
    second = client.chat.completions.create(model="menny", messages=again, temperature=0, max_tokens=4)
    assert first.usage.prompt_tokens < second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens


# ---------------------------------------- completions


def test_every_form_of_prompt(client: openai.OpenAI, alone: LLM) -> None:
    texts = ["Once upon a time", "The sea"]
    ids = [alone.prepare(text).ids for text in texts]
    expected = [one.text for one in alone.generate(texts, temperature=0, max_tokens=8)]
    options: dict[str, Any] = {"model": "menny", "temperature": 0, "max_tokens": 8}
    assert [one.text for one in client.completions.create(prompt=texts, **options).choices] == expected
    assert [one.text for one in client.completions.create(prompt=ids, **options).choices] == expected
    assert client.completions.create(prompt=ids[0], **options).choices[0].text == expected[0]
    several = client.completions.create(prompt=texts, n=2, **options)
    assert [one.index for one in several.choices] == [0, 1, 2, 3]
    assert [one.text for one in several.choices] == [expected[0], expected[0], expected[1], expected[1]]
    assert several.usage.prompt_tokens == sum(map(len, ids))
    short = client.completions.create(model="menny", prompt="Once", seed=1)
    assert short.usage.completion_tokens <= 16


def test_a_stream_of_several_prompts(served: Running) -> None:
    body = {"model": "menny", "prompt": ["Once upon", "The sea"], "temperature": 0, "max_tokens": 8, "n": 2}
    whole = served.post("/completions", body).json()
    response = served.post("/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    texts, reasons = [""] * 4, [None] * 4
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt(served: Running, alone: LLM, max_tokens: int, stream: bool) -> None:
    ids = alone.prepare("Once upon a time there was a mouse.").ids
    body = {"model": "menny", "prompt": [ids], "echo": True, "logprobs": 2, "max_tokens": max_tokens, "temperature": 0}
    if stream:
        pieces = [one["choices"][0] for one in events(served.post("/completions", {**body, "stream": True}))]
        text = "".join(one["text"] for one in pieces)
        columns = [one["logprobs"] for one in pieces if one["logprobs"]]
        scores = {name: [value for one in columns for value in one[name]] for name in columns[0]}
        assert pieces[-1]["finish_reason"] == "length"
    else:
        (choice,) = served.post("/completions", body).json()["choices"]
        text, scores = choice["text"], choice["logprobs"]
    assert {len(column) for column in scores.values()} == {len(ids) + max_tokens}
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    logits = alone.model(torch_ids(ids))[0].float().log_softmax(-1)
    expected = [float(logits[at, token_id]) for at, token_id in enumerate(ids[1:])]
    assert scores["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-3)
    for top, best in zip(scores["top_logprobs"][1 : len(ids)], logits.max(-1).values.tolist()[:-1], strict=True):
        assert max(top.values()) == pytest.approx(best, abs=1e-3)
    assert text.startswith("Once upon a time there was a mouse.")
    for offset, token in list(zip(scores["text_offset"], scores["tokens"], strict=True))[2:]:
        assert text[offset:].startswith(token)


def torch_ids(ids: list[int]) -> Any:
    import torch

    return torch.tensor([ids])


def test_offsets_without_echo_go_on_from_the_prompt(served: Running) -> None:
    body = {"model": "menny", "prompt": "The sea", "logprobs": 0, "max_tokens": 4, "temperature": 0}
    (choice,) = served.post("/completions", body).json()["choices"]
    assert choice["logprobs"]["text_offset"][0] == len("The sea")
    for offset, token in zip(choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"], strict=True):
        assert ("The sea" + choice["text"])[offset:].startswith(token)


# ---------------------------------------- the rest


def test_models_health_metrics_and_embeddings(client: openai.OpenAI, served: Running) -> None:
    assert [one.id for one in client.models.list()] == ["menny"]
    assert client.models.retrieve("menny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model="menny", input="Hello")
    assert served.http.get(f"{served.root}/health").json() == {"status": "ok"}
    metrics = served.http.get(f"{served.root}/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "octavo_requests_running 0.0" in metrics.text


def test_the_document_names_every_route_and_no_status_that_is_not_given(served: Running) -> None:
    document = served.http.get(f"{served.root}/openapi.json").json()
    routes = {f"{method} {path}" for path, methods in document["paths"].items() for method in methods}
    assert routes == {
        "get /v1/models", "get /v1/models/{model}", "post /v1/chat/completions", "post /v1/completions",
        "post /v1/embeddings", "get /health", "get /metrics",
    }  # fmt: skip
    assert "422" not in json.dumps(document)
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert {"200", "400", "401", "404", "413", "429", "503"} <= set(document["paths"][path]["post"]["responses"])
