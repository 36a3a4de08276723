"""How fast the model that ships inside answers, beside transformers in the same run.

``python benchmarks/shipped.py`` on a quiet machine. Runs alternate between the two, and medians are compared. Writes
benchmarks/results/shipped.json. Without transformers its columns are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import octavo
from octavo.llm import shipped_model

RESULTS = Path(__file__).parent / "results" / "shipped.json"
OCTAVO = [sys.executable, "-m", "octavo"]
PROMPT_TOKENS, NEW_TOKENS = 64, 128
QUESTIONS = ["What is a mixture of experts?", "Who are you?", "Combien font 7 et 5 ?", "How do I run Mixtral in 16 GB?"]


def seconds_of(command: list[str], until_output: bool) -> float:
    """Wall-clock seconds of a process, to its end or to its first byte of stdout."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        if until_output:
            process.stdout.read(1)
            seconds = time.perf_counter() - started
            process.communicate()
        else:
            process.communicate()
            seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds


def random_prompts(batch: int, vocab_size: int) -> list[list[int]]:
    """Random tokens, so that routing spreads over the experts."""
    return torch.randint(300, vocab_size, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(7)).tolist()


def octavo_decoder(llm: octavo.LLM, batch: int) -> Callable[[], float]:
    """Return a function that generates once and gives tokens a second of decoding."""
    prompts = random_prompts(batch, llm.model.args.vocab_size)
    never = dict.fromkeys(llm.eos_ids, -100.0)
    params = octavo.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logit_bias=never)

    def run() -> float:
        started = time.perf_counter()
        done = llm.generate(prompts, params)
        seconds = time.perf_counter() - started
        assert all(len(one.token_ids) == NEW_TOKENS for one in done)
        return batch * NEW_TOKENS / seconds

    return run


def transformers_decoder(folder: Path, batch: int) -> Callable[[], float]:
    """The same for transformers' generate, in float32 as well."""
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(random_prompts(batch, model.config.vocab_size))
    limits: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

    def run() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **limits)
        assert out.shape[1] == PROMPT_TOKENS + NEW_TOKENS
        return batch * NEW_TOKENS / (time.perf_counter() - started)

    return run


def alternate(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of each contender's figure; they take turns, after one round of warm-up."""
    seen: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            value = run()
            if turn:
                seen[name].append(value)
    return {name: round(statistics.median(values), 1) for name, values in seen.items()}


def stream_speed(llm: octavo.LLM) -> float:
    """Tokens a second of a chat reply as a person sees it: from the first chunk to the last."""
    speeds = []
    for question in QUESTIONS * 3:
        with llm.stream([{"role": "user", "content": question}], persona="menny", seed=1) as stream:
            for _ in stream:
                pass
        speeds.append(stream.result.timings.tokens_per_second)
    return round(statistics.median(speeds), 1)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    question = [*OCTAVO, "generate", "Who are you?"]
    seconds_of(question, until_output=True)  # warms the file cache
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "help_s": round(statistics.median(seconds_of([*OCTAVO, "--help"], False) for _ in range(rounds)), 3),
        "first_token_s": round(statistics.median(seconds_of(question, True) for _ in range(rounds)), 2),
    }
    llm = octavo.LLM.load("menny")
    report["stream_tok_s"] = stream_speed(llm)
    with_peer = importlib.util.find_spec("transformers") is not None
    for batch in (1, 8):
        contenders = {"octavo": octavo_decoder(llm, batch)}
        if with_peer:
            contenders["transformers"] = transformers_decoder(shipped_model(), batch)
        report[f"generate_tok_s_batch_{batch}"] = alternate(contenders, rounds)
    print(json.dumps(report, indent=1))
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
