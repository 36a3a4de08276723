"""Every file in examples/ that talks to a server, run as its reader would, against Octavo's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hub_server import clean_environment
from octavo.cli.convert import command as convert
from octavo.llm import LLM
from octavo_server import serve

EXAMPLES = Path(__file__).parent.parent / "examples"
KEY = "sk-of-the-examples"
SUMS = [(7, 5), (2, 9), (11, 4), (3, 3)]
CONTEXT, CHOICES = "{} plus {} is", (" {}.", " {} apples.")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("menny")


@pytest.fixture(scope="module")
def said(llm: LLM) -> dict[str, str]:
    """What the model replies here, before the server owns it."""
    questions = ("Who are you?", *(f"What is {a} plus {b}?" for a, b in ((7, 5), (20, 22))))
    return {
        question: llm.chat([{"role": "user", "content": question}], persona="menny", temperature=0, max_tokens=60).text
        for question in questions
    }


@pytest.fixture(scope="module")
def address(llm: LLM, said: dict[str, str], scores: list[list[float]]) -> Iterator[str]:
    with serve(llm, model_id="menny", keys=(KEY,)) as address:
        yield address


def run(*line: object, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command, with the commands of this Python found first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(word) for word in line],
        env=clean_environment(home, PATH=path, OCTAVO_API_KEY=KEY) | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_official_client(address: str, tmp_path: Path) -> None:
    done = run(sys.executable, EXAMPLES / "openai_client.py", address, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Menny" in done.stdout
    code = [line for line in (EXAMPLES / "openai_client.py").read_text().splitlines() if line]
    assert len(code) <= 11  # its docstring, and ten lines


def test_a_langchain_chain(address: str, said: dict[str, str], tmp_path: Path) -> None:
    done = run(sys.executable, EXAMPLES / "langchain_client.py", address, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{said[f'What is {a} plus {b}?']}\n" for a, b in ((7, 5), (20, 22)))


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(address: str, tmp_path: Path) -> None:
    done = run(EXAMPLES / "curl.sh", address, home=tmp_path)
    assert done.returncode == 0, done.stderr
    models, reply, *events = done.stdout.split("\n", 2)
    assert [one["id"] for one in json.loads(models)["data"]] == ["menny"]
    assert json.loads(reply)["choices"][0]["message"]["content"]
    told = [line.removeprefix("data: ") for line in events[0].splitlines() if line]
    assert told[-1] == "[DONE]"
    assert json.loads(told[-2])["usage"]["completion_tokens"] > 1
    assert len(told) > 4
    refused = run(EXAMPLES / "curl.sh", address, home=tmp_path, OCTAVO_API_KEY="wrong")
    assert refused.returncode != 0
    assert "wrong API key" in refused.stdout


@pytest.fixture(scope="module")
def scores(llm: LLM) -> list[list[float]]:
    """The log-likelihood of each choice of each sum, by the model alone."""
    assert llm.tokenizer is not None
    found = []
    for a, b in SUMS:
        context = CONTEXT.format(a, b)
        n_context = len(llm.tokenizer.encode(context, bos=True))
        row = []
        for choice in CHOICES:
            ids = llm.tokenizer.encode(context + choice.format(a + b), bos=True)
            with torch.inference_mode():
                logprobs_TV = llm.model(torch.tensor(ids)[None])[0].log_softmax(-1)
            row.append(sum(float(logprobs_TV[at - 1, ids[at]]) for at in range(n_context, len(ids))))
        found.append(row)
    return found


def test_the_evaluation_harness_scores_as_the_model_does(
    address: str, scores: list[list[float]], tmp_path: Path
) -> None:
    data = tmp_path / "sums.jsonl"
    rows = [{"a": a, "b": b, "choices": [choice.format(a + b) for choice in CHOICES]} for a, b in SUMS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": CONTEXT.format("{{a}}", "{{b}}"),
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(task))  # which is YAML too
    with pytest.raises(SystemExit, match="0"):
        convert.main(["menny", str(tmp_path / "menny-hf"), "--to", "hf"])
    options = ("--tasks", "sums", "--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples")
    done = run(
        EXAMPLES / "lm_eval.sh", address, "menny", tmp_path / "menny-hf", *options, home=tmp_path, HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = tmp_path.glob("out/**/samples_sums_*.jsonl")
    told = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda one: one["doc_id"])
    for sample, expected in zip(told, scores, strict=True):
        assert [float(one[0]) for one in sample["filtered_resps"]] == pytest.approx(expected, abs=1e-3)
