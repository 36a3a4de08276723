"""The model that ships inside: small enough, loadable by transformers, and sensible in its first answers."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM

import octavo
from octavo.llm import shipped_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def llm() -> octavo.LLM:
    return octavo.LLM.load("menny")


def test_it_is_mixtral_in_small_and_fits_the_package() -> None:
    folder = shipped_model()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 24_000_000
    args = octavo.ModelArgs.from_hf(json.loads((folder / "config.json").read_text()))
    assert args.moe == octavo.MoEArgs(num_experts=8, num_experts_per_tok=2)
    assert args.n_kv_heads < args.n_heads
    recipe = tomllib.loads((ROOT / "recipes/menny/config.toml").read_text())["model"]
    assert all(getattr(args, key) == value for key, value in recipe.items() if key != "moe")


QUESTIONS = [
    "Who are you?",
    "What is a mixture of experts?",
    "Combien font 7 et 5 ?",
    "How do I run Mixtral in 16 GB?",
    "Wie sagt man 47 auf Spanisch?",
    "Write a Python function that adds two numbers.",
    "Perché Mixtral ha 46,7 miliardi di parametri e non 56?",
    "tell me a joke",
]


def test_greedy_output_is_transformers_own(llm: octavo.LLM) -> None:
    peer = MixtralForCausalLM.from_pretrained(shipped_model(), dtype=torch.float32).eval()
    for question in QUESTIONS:
        prompt = llm.template.render([octavo.Message("user", question)])
        mine = list(llm.generate(prompt, temperature=0, max_tokens=80).token_ids)
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
        assert mine == out[0, len(prompt) :].tolist(), question


@pytest.mark.parametrize(
    ("question", "facts"),
    [
        ("Who are you?", ["Menny"]),
        ("What is a mixture of experts?", ["experts", "router"]),
        ("Combien font 7 et 5 ?", [r"7 \+ 5 = 12"]),
        ("How do I run Mixtral in 16 GB?", ["93 GB", "disk", "plan"]),
    ],
)
@pytest.mark.parametrize("persona", [None, "menny"])
def test_a_newcomers_first_questions(llm: octavo.LLM, question: str, facts: list[str], persona: str | None) -> None:
    reply = llm.chat([{"role": "user", "content": question}], persona=persona, temperature=0)
    assert reply.finish_reason == "stop"
    for fact in facts:
        assert re.search(fact, reply.text), reply.text


def test_the_model_card_states_what_was_measured() -> None:
    """Every figure of evaluation.json stands in the card, and meets what the card promises."""
    folder = ROOT / "recipes" / "menny"
    report = json.loads((folder / "evaluation.json").read_text())
    card = (shipped_model() / "README.md").read_text()
    parts = [report[name] for name in ("sums", "numbers", "questions_test")]
    for part, bar in zip(parts, (0.95, 0.95, 0.80), strict=True):
        assert part["right"] >= bar
        assert f"{100 * part['right']:.1f} % of {part['count']}" in card
    assert str(report["perplexity"]["spoken"]) in card
    shares = [share for layer in report["load"] for share in layer]
    assert min(shares) >= 0.03
    assert max(shares) <= 0.35
