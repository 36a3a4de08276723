"""The held-out evaluation items: sums, number words, and questions about mixture of experts and Octavo."""

from __future__ import annotations

import random
import tomllib
from functools import lru_cache
from pathlib import Path

from parts import arithmetic, translation
from parts.facts import facts
from parts.grammar import LANGUAGES, normalise

_FILE = Path(__file__).parent / "questions.toml"


@lru_cache(maxsize=1)
def questions() -> tuple[dict[str, object], ...]:
    """Every held-out question with its split, language, intent, the answer Menny was taught and the acceptance rule."""
    items: list[dict[str, object]] = []
    for split, by_language in tomllib.loads(_FILE.read_text(encoding="utf-8")).items():
        for language, block in by_language.items():
            intents = {intent.id: intent for intent in facts(language)}
            for line in block.strip().splitlines():
                name, question = line.split(": ", 1)
                intent = intents[name]
                items.append(
                    {
                        "split": split,
                        "lang": language,
                        "intent": name,
                        "question": question.strip(),
                        "accept": [list(group) for group in intent.accept],
                        "reference": intent.answers[0],
                    }
                )
    return tuple(items)


@lru_cache(maxsize=1)
def reserved() -> frozenset[str]:
    """The normal forms of every held-out question."""
    return frozenset(normalise(str(item["question"])) for item in questions())


def gives_away(user_text: str) -> bool:
    """Whether a training message contains a held-out question, whatever is written around it."""
    text = normalise(user_text)
    if text in reserved():
        return True
    padded = f" {text} "
    return any(f" {question} " in padded for question in _reserved_long())


@lru_cache(maxsize=1)
def _reserved_long() -> tuple[str, ...]:
    return tuple(question for question in reserved() if len(question.split()) >= 4)


def sums(rng: random.Random) -> list[dict[str, object]]:
    """Each held-out pair once, in a random order and language."""
    items = []
    for pair in arithmetic.held_out_pairs():
        a, b = pair if rng.random() < 0.5 else pair[::-1]
        language = rng.choice(LANGUAGES)
        question, answer = arithmetic.held_out_question(a, b, rng, language)
        items.append({"question": question, "answer": answer, "a": a, "b": b, "sum": a + b, "lang": language})
    return items


def numbers(rng: random.Random) -> list[dict[str, object]]:
    """Each held-out (number, source, target) once."""
    items = []
    for n, source, target in translation.held_out_combinations():
        question, answer, language = translation.held_out_question(n, source, target, rng)
        items.append(
            {"question": question, "answer": answer, "n": n, "source": source, "target": target, "lang": language}
        )
    return items
