"""Plain text: small stories from a grammar, short explanations, and lists of sums, in five languages.

Held out by content: about one (hero, thing) in ten never meets in a training story.
"""

from __future__ import annotations

import random
import re
import tomllib
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from parts.arithmetic import draw_language, draw_pair, sum_text
from parts.grammar import capitalise, held_out

HELD_OUT_PERCENT = 10


@lru_cache(maxsize=1)
def _data() -> dict[str, dict[str, Any]]:
    return tomllib.loads((Path(__file__).parent / "stories.toml").read_text(encoding="utf-8"))


@cache
def _lines(language: str) -> list[list[str]]:
    """The sentences a story may have at each of its steps."""
    steps = _data()[language]["story"].strip().splitlines()
    return [[choice.strip() for choice in step.split(" | ")] for step in steps]


def meeting_held_out(language: str, hero: str, thing: str) -> bool:
    """Whether stories of this hero and this thing are kept out of training."""
    return held_out(f"story {language} {hero} {thing}", HELD_OUT_PERCENT)


def story(rng: random.Random, language: str, *, from_held_out: bool = False) -> str:
    """One story of five to eight sentences."""
    data = _data()[language]
    while True:
        hero, thing = rng.choice(data["heroes"]), rng.choice(data["things"])
        if meeting_held_out(language, hero, thing) == from_held_out:
            break
    some, the, pronoun = hero.split("|")
    one, that = thing.split("|")
    words = {"H": some, "T": the, "P": pronoun, "L": rng.choice(data["places"]), "O": one, "Q": that}
    steps = _lines(language)
    middle = [i for i in range(2, len(steps) - 1) if rng.random() < 0.75]
    sentences = [rng.choice(steps[i]) for i in [0, 1, *middle, len(steps) - 1]]
    filled = [re.sub(r"\b[HTPLOQ]\b", lambda m: words[m.group()], s) for s in sentences]
    return " ".join(capitalise(s) for s in filled)


def explanation(rng: random.Random, language: str) -> str:
    """One or two short explanations, each from its beginning, at times cut short at the end."""
    topics = _data()[language]["topics"].strip().splitlines()
    chosen = rng.sample(topics, rng.choice([1, 1, 2]))
    texts = []
    for topic in chosen:
        sentences = re.split(r"(?<=\.) ", topic.strip())
        texts.append(" ".join(sentences[: rng.randrange(3, len(sentences) + 1)]))
    return "\n".join(texts)


def sum_list(rng: random.Random) -> str:
    """A page of worked sums."""
    sums = [sum_text(*draw_pair(rng)) for _ in range(rng.randrange(4, 13))]
    return rng.choice(["\n", " "]).join(sums)


def document(rng: random.Random) -> str:
    """One plain-text document for the training text."""
    kind = rng.random()
    language = draw_language(rng)
    if kind < 0.62:
        return story(rng, language)
    if kind < 0.72:
        return explanation(rng, language)
    return sum_list(rng)
