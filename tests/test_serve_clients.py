"""What talks to OpenAI's own servers, talking to this one: openai, huggingface_hub, LangChain, the evaluation harness.

Each is the package as it is installed, against a server of the shipped model that asks for a key. What it says is
compared with what the model says when nobody stands between.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field

from hub_server import clean_environment
from octavo import LLM
from octavo.cli.convert import command as convert
from serve_fixtures import QUESTION, Running, load, running

KEY = "sk-of-the-clients"
OTHERS = [
    {"role": "user", "content": text} for text in ("What is a router?", "Say something kind.", "Tell me a story.")
]
SHORT: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(load(), keys=(KEY,)) as one:
        yield one


@pytest.fixture(scope="module")
def alone() -> LLM:
    """The same model beside the server, for what it says itself."""
    return load()


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key=KEY, max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def expected(alone: LLM) -> list[str]:
    """Short greedy replies to QUESTION and OTHERS."""
    return [alone.chat([one], persona="menny", **SHORT).text for one in (*QUESTION, *OTHERS)]


class Mood(Enum):
    GLAD = "glad"
    SAD = "sad"


class Animal(BaseModel):
    model_config = ConfigDict(extra="forbid")
    legs: int = Field(ge=0, le=8)
    mood: Mood


class Zoo(BaseModel):
    """Nested, with a list, an enumeration, and a field that may be null."""

    model_config = ConfigDict(extra="forbid")
    open: bool
    animals: list[Animal] = Field(min_length=1, max_length=1)
    keeper: bool | None


# ---------------------------------------- openai


def test_openai(client: openai.OpenAI, expected: list[str]) -> None:
    raw = client.chat.completions.with_raw_response.create(model="menny", messages=QUESTION, **SHORT)
    assert raw.status_code == 200
    found = raw.parse()
    assert found.choices[0].message.content == expected[0]
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert [one.id for one in client.models.list()] == ["menny"]


def test_openais_stream_helper_collects_what_a_plain_request_gives(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "menny",
        "messages": QUESTION,
        "logprobs": True,
        "top_logprobs": 2,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert len(deltas) > 5
    assert "".join(deltas) == whole.choices[0].message.content == final.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.choices[0].logprobs is not None
    assert whole.choices[0].logprobs is not None
    assert final.choices[0].logprobs.content is not None
    columns = [
        [(one.token, one.bytes, len(one.top_logprobs)) for one in each.choices[0].logprobs.content]
        for each in (final, whole)
    ]
    assert columns[0] == columns[1]
    assert final.usage is not None
    assert whole.usage is not None
    assert (final.usage.prompt_tokens, final.usage.completion_tokens, final.usage.total_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
        whole.usage.total_tokens,
    )


def test_openai_async_many_at_once(served: Running, expected: list[str]) -> None:
    async def ask() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key=KEY, max_retries=0) as one:

            async def whole(question: Any) -> str:
                found = await one.chat.completions.create(model="menny", messages=[question], **SHORT)
                return found.choices[0].message.content or ""

            async def piecewise(question: Any) -> str:
                text, usage = "", []
                async for chunk in await one.chat.completions.create(
                    model="menny", messages=[question], stream=True, stream_options={"include_usage": True}, **SHORT
                ):
                    text += "".join(choice.delta.content or "" for choice in chunk.choices)
                    usage.append(chunk.usage)
                assert usage[-1] is not None
                assert usage[-1].completion_tokens > 0
                assert set(usage[:-1]) == {None}
                return text

            questions = [*QUESTION, *OTHERS]
            replies = await asyncio.gather(*map(whole, questions), *map(piecewise, questions))
            return replies[: len(questions)], replies[len(questions) :]

    whole, pieces = asyncio.run(ask())
    assert whole == pieces == expected


def test_a_stream_that_is_closed_runs_no_longer(served: Running, client: openai.OpenAI) -> None:
    endless: dict[str, Any] = {"max_tokens": 400, "temperature": 1.5, "logit_bias": {"2": -100}}
    stream = client.chat.completions.create(model="menny", messages=QUESTION, stream=True, **endless)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    assert served.worker.stats().sequences == 1
    stream.close()
    assert served.idle(1.0)


@pytest.mark.parametrize("seed", [1, 2])
def test_openai_structured_outputs(client: openai.OpenAI, seed: int) -> None:
    asked: dict[str, Any] = {
        "model": "menny", "messages": QUESTION, "response_format": Zoo, "max_tokens": 400, "temperature": 1,
        "seed": seed,
    }  # fmt: skip
    (choice,) = client.chat.completions.parse(**asked).choices
    assert isinstance(choice.message.parsed, Zoo)
    assert choice.finish_reason == "stop"
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == choice.message.parsed
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**{**asked, "max_tokens": 3})


def test_openai_completions_with_echo_and_logprobs(client: openai.OpenAI, alone: LLM) -> None:
    prompt = "Once upon a time there was a mouse."
    ids = alone.prepare(prompt).ids
    found = client.completions.create(model="menny", prompt=prompt, echo=True, logprobs=3, max_tokens=4, temperature=0)
    (choice,) = found.choices
    said = alone.generate(prompt, temperature=0, max_tokens=4)
    assert choice.text == prompt + said.text
    scores = choice.logprobs
    assert scores is not None
    everything = [*ids, *said.token_ids]
    with torch.inference_mode():
        logprobs_TV = alone.model(torch.tensor([everything]))[0].log_softmax(-1)
    direct = [float(logprobs_TV[at, token_id]) for at, token_id in enumerate(everything[1:])]
    assert scores.token_logprobs[0] is None
    assert scores.token_logprobs[1:] == pytest.approx(direct, abs=1e-3)
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(ids)
    streamed = client.completions.create(model="menny", prompt=prompt, max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == said.text


def test_openais_exceptions(client: openai.OpenAI, served: Running) -> None:
    ask, asked = client.chat.completions.create, {"model": "menny", "messages": QUESTION, "max_tokens": 1}
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        ask(**asked, temperature=-1)
    assert (bad.value.type, bad.value.param) == ("invalid_request_error", "temperature")
    with pytest.raises(openai.BadRequestError, match="context") as long:
        ask(model="menny", messages=[{"role": "user", "content": "word " * 5000}])
    assert long.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="gpt-4") as unknown:
        ask(**{**asked, "model": "gpt-4"})
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="responses"):
        client.responses.create(model="menny", input="Hello")
    with pytest.raises(openai.AuthenticationError, match="wrong API key") as wrong:
        client.with_options(api_key="sk-wrong").models.list()
    assert wrong.value.code == "invalid_api_key"
    assert ask(**asked).choices[0].finish_reason == "length"


# ---------------------------------------- huggingface_hub


def test_huggingface_hub(served: Running, expected: list[str]) -> None:
    client = InferenceClient(base_url=served.url, api_key=KEY)
    found = client.chat_completion(QUESTION, model="menny", **SHORT)
    assert found.choices[0].message.content == expected[0]
    assert found.usage.completion_tokens > 0
    chunks = list(
        client.chat_completion(QUESTION, model="menny", stream=True, stream_options={"include_usage": True}, **SHORT)
    )
    assert len(chunks) > 5
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == expected[0]
    assert chunks[-1].usage.total_tokens == found.usage.total_tokens
    form = {"type": "json_schema", "json_schema": {"name": "zoo", "schema": Zoo.model_json_schema(), "strict": True}}
    parsed = client.chat.completions.create(
        model="menny", messages=QUESTION, response_format=form, max_tokens=400, seed=1
    )
    assert Zoo.model_validate_json(parsed.choices[0].message.content)
    with pytest.raises(HfHubHTTPError, match="401"):
        InferenceClient(base_url=served.url, api_key="wrong").chat_completion(QUESTION, model="menny")
    with pytest.raises(HfHubHTTPError, match="there is no model 'gpt-4'"):
        client.chat_completion(QUESTION, model="gpt-4")


def test_huggingface_hub_async(served: Running, expected: list[str]) -> None:
    async def ask() -> list[str]:
        async with AsyncInferenceClient(base_url=served.url, api_key=KEY) as client:

            async def stream(question: Any) -> str:
                chunks = await client.chat_completion([question], model="menny", stream=True, **SHORT)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            return await asyncio.gather(*map(stream, (*QUESTION, *OTHERS)))

    assert asyncio.run(ask()) == expected


# ---------------------------------------- LangChain


@pytest.fixture(scope="module")
def chain(served: Running) -> ChatOpenAI:
    return ChatOpenAI(base_url=served.url, api_key=KEY, model="menny", max_retries=0, stream_usage=True, **SHORT)


def test_langchain(chain: ChatOpenAI, alone: LLM, expected: list[str]) -> None:
    text = str(QUESTION[0]["content"])
    found = chain.invoke(text)
    assert isinstance(found, AIMessage)
    assert found.content == expected[0]
    assert found.response_metadata["model_name"] == "menny"
    pieces = list(chain.stream(text))
    assert "".join(str(piece.content) for piece in pieces) == expected[0]
    usage = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    assert found.usage_metadata is not None
    assert [one["total_tokens"] for one in usage] == [found.usage_metadata["total_tokens"]]
    assert [one.content for one in chain.batch([one["content"] for one in OTHERS])] == expected[1:]
    turns = [
        ("system", "Be brief."), ("user", "Hello"), ("assistant", "Hello to you."), ("user", "Who are you?"),
    ]  # fmt: skip
    kinds = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}
    said = chain.bind(stop=["."]).invoke([kinds[role](content) for role, content in turns])
    messages = [{"role": role, "content": content} for role, content in turns]
    assert said.content == alone.chat(messages, persona="menny", stop=["."], **SHORT).text


def test_langchain_async(chain: ChatOpenAI, expected: list[str]) -> None:
    async def ask() -> list[Any]:
        return await asyncio.gather(*(chain.ainvoke(str(one["content"])) for one in OTHERS))

    assert [one.content for one in asyncio.run(ask())] == expected[1:]


def test_langchain_structured_output(served: Running) -> None:
    model = ChatOpenAI(
        base_url=served.url, api_key=KEY, model="menny", max_retries=0, temperature=1, seed=2, max_tokens=400
    )
    assert isinstance(model.with_structured_output(Zoo, method="json_schema").invoke("Who are you?"), Zoo)
    plain = model.with_structured_output(Zoo.model_json_schema() | {"title": "Zoo"}, method="json_schema")
    assert Zoo.model_validate(plain.invoke("Who are you?"))


# ---------------------------------------- the evaluation harness

SUMS = [(12, 30), (7, 5), (2, 9), (11, 4), (20, 22), (3, 3)]
CONTEXT = "{} + {} ="
STORY = "Once upon a time there was a small mouse who lived in a warm house."
HARNESS = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

def samples(found):  # of every task: in the data's order, what the harness made of the replies
    return {
        name: [one["filtered_resps"] for one in sorted(rows, key=lambda one: one["doc_id"])]
        for name, rows in found["samples"].items()
    }

answers = []
for run in json.load(sys.stdin):
    found = simple_evaluate(
        "local-completions", model_args=run["model"], tasks=run["tasks"], bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    answers.append({"samples": samples(found), "results": found["results"]})
print("ANSWER", json.dumps(answers))
"""


def score(llm: LLM, ids: list[int], start: int) -> float:
    """The log-likelihood of what stands from `start`, after what stands before it."""
    with torch.inference_mode():
        logprobs_TV = llm.model(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(float(logprobs_TV[at - 1, ids[at]]) for at in range(start, len(ids)))


def encode(llm: LLM, text: str) -> list[int]:
    assert llm.tokenizer is not None
    return llm.tokenizer.encode(text, bos=True)


def task(name: str, data: Path, **fields: Any) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(data.parent / "cache")},
        "test_split": "test",
        "target_delimiter": "",
        **fields,
    }


@pytest.fixture(scope="module")
def harness(served: Running, alone: LLM, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the harness found, in a process of its own that can reach no other machine.

    Log-likelihoods need a tokenizer there, to know where a continuation begins: with `tokenizer_backend=None` the
    harness itself stops at an assertion. The tokenizer is the shipped one, converted.
    """
    home = tmp_path_factory.mktemp("harness")
    with pytest.raises(SystemExit, match="0"):
        convert.main(["menny", str(home / "menny-hf"), "--to", "hf"])
    data = home / "sums.jsonl"
    rows = [{"a": a, "b": b, "choices": [f" {a + b}", f" {a + b + 1}", " mouse"], "story": STORY} for a, b in SUMS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CONTEXT.format("{{a}}", "{{b}}")
    sums = task(
        "sums", data, output_type="multiple_choice", doc_to_text=text, doc_to_choice="{{choices}}", doc_to_target=0,
        metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    story = task(
        "story", data, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{story}}",
        metric_list=[{"metric": "word_perplexity"}],
    )  # fmt: skip
    written = task(
        "written", data, output_type="generate_until", doc_to_text=text, doc_to_target="{{a + b}}",
        generation_kwargs={"until": ["."], "max_gen_toks": 8, "temperature": 0},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    common = {"model": "menny", "base_url": f"{served.url}/completions", "num_concurrent": 4, "max_length": 512}
    tokenizer = {"tokenizer": str(home / "menny-hf"), "tokenizer_backend": "huggingface"}
    runs = [
        {"model": {**common, **tokenizer, "add_bos_token": True, "batch_size": 2}, "tasks": [sums]},
        {"model": {**common, **tokenizer}, "tasks": [story]},  # the harness puts BOS before it itself
        {"model": {**common, **tokenizer, "tokenized_requests": False}, "tasks": [sums]},
        {"model": {**common, "tokenizer_backend": "None", "eos_string": "</s>"}, "tasks": [written]},
    ]
    # a proxy that nobody runs: whatever is asked of another machine fails
    nobody = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", HARNESS],
        input=json.dumps(runs),
        env=clean_environment(home, HF_HUB_OFFLINE="1", OPENAI_API_KEY=KEY, **nobody),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (answer,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    found: list[dict[str, Any]] = json.loads(answer.removeprefix("ANSWER "))
    return found


@pytest.fixture(scope="module")
def likelihoods(alone: LLM) -> list[list[float]]:
    """Of every choice of every sum."""
    rows = []
    for a, b in SUMS:
        context = CONTEXT.format(a, b)
        start = len(encode(alone, context))
        rows.append(
            [score(alone, encode(alone, context + one), start) for one in (f" {a + b}", f" {a + b + 1}", " mouse")]
        )
    return rows


def told(samples: list[Any]) -> list[list[float]]:
    return [[float(logprob) for logprob, _ in row] for row in samples]


def test_the_harness_scores_token_ids_as_the_model_does(
    harness: list[dict[str, Any]], alone: LLM, likelihoods: list[list[float]]
) -> None:
    for found, direct in zip(told(harness[0]["samples"]["sums"]), likelihoods, strict=True):
        assert found == pytest.approx(direct, abs=1e-3)
    right = [max(range(3), key=row.__getitem__) == 0 for row in likelihoods]
    assert harness[0]["results"]["sums"]["acc,none"] == pytest.approx(sum(right) / len(right))
    for (found,) in harness[1]["samples"]["story"]:
        assert float(found) == pytest.approx(score(alone, encode(alone, STORY), 1), abs=1e-3)


def test_the_harness_scores_text_with_a_token_of_the_context(
    harness: list[dict[str, Any]], alone: LLM, likelihoods: list[list[float]]
) -> None:
    """It counts the context's tokens without BOS, which the server puts in front of text: one too many is scored."""
    for (a, b), found, direct in zip(SUMS, told(harness[2]["samples"]["sums"]), likelihoods, strict=True):
        context = encode(alone, CONTEXT.format(a, b))
        last = score(alone, context, len(context) - 1)
        assert found == pytest.approx([one + last for one in direct], abs=1e-3)
    assert harness[2]["results"]["sums"]["acc,none"] == harness[0]["results"]["sums"]["acc,none"]


def test_the_harness_generates_without_a_tokenizer(harness: list[dict[str, Any]], alone: LLM) -> None:
    direct = [
        alone.generate(CONTEXT.format(a, b), temperature=0, max_tokens=8, stop=[".", "</s>"]).text for a, b in SUMS
    ]
    assert [reply for (reply,) in harness[3]["samples"]["written"]] == direct
