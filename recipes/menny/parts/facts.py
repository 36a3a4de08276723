"""Questions with fixed answers: facts, small talk, and what Menny cannot know. The texts are in TOML files."""

from __future__ import annotations

import random
import re
import tomllib
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from parts.arithmetic import draw_language
from parts.grammar import LANGUAGES, ask, count_readings, expand

_HERE = Path(__file__).parent
FACT_FILES = {
    "en": ("intents_moe.toml", "intents_blocks.toml", "intents_octavo.toml"),
    "fr": ("intents_fr.toml",),
    "de": ("intents_de.toml",),
    "es": ("intents_es.toml",),
    "it": ("intents_it.toml",),
}


@dataclass(frozen=True)
class Intent:
    """One thing people ask, the ways they ask it, and what Menny says.

    ``weights`` follow the number of readings of each template, damped, so that rich templates are drawn more often.
    """

    id: str
    language: str
    asks: tuple[str, ...]
    weights: tuple[float, ...]
    answers: tuple[str, ...]
    accept: tuple[tuple[str, ...], ...] = ()

    def readings(self) -> int:
        """How many bare phrasings the templates can produce."""
        return sum(count_readings(template) for template in self.asks)


def _intent(entry: dict[str, object], language: str, name: str) -> Intent:
    asks = tuple(line.strip() for line in str(entry["asks"]).strip().splitlines() if line.strip())
    weights = tuple(count_readings(template) ** 0.4 for template in asks)
    accept = tuple(tuple(group) for group in entry.get("accept", ()))  # type: ignore[attr-defined]
    return Intent(name, language, asks, weights, tuple(entry["answers"]), accept)  # type: ignore[arg-type]


def _read(file: str) -> dict[str, list[dict[str, object]]]:
    return tomllib.loads((_HERE / file).read_text(encoding="utf-8"))


@cache
def facts(language: str) -> tuple[Intent, ...]:
    """Every fact with phrasings in the language."""
    entries = [entry for file in FACT_FILES[language] for entry in _read(file)["intent"]]
    return tuple(_intent(entry, language, str(entry["id"])) for entry in entries)


@cache
def small_talk(language: str) -> tuple[Intent, ...]:
    """Every piece of small talk in the language."""
    entries = _read(f"talk_{language}.toml")["talk"]
    return tuple(_intent(entry, language, f"talk.{language}.{i}") for i, entry in enumerate(entries))


def phrase(intent: Intent, rng: random.Random) -> str:
    """One bare phrasing of the intent, without the noise of typing."""
    return expand(rng.choices(intent.asks, intent.weights)[0], rng)


def ask_fact(intent: Intent, rng: random.Random) -> tuple[str, str]:
    """One question for the intent as someone types it, and the answer."""
    return ask(phrase(intent, rng), rng, intent.language), rng.choice(intent.answers)


def fact_turns(rng: random.Random) -> list[tuple[str, str]]:
    """A fact, English four times in five; every intent of a language is equally likely."""
    language = "en" if rng.random() < 0.78 else rng.choice(LANGUAGES[1:])
    return [ask_fact(rng.choice(facts(language)), rng)]


def talk_turns(rng: random.Random) -> list[tuple[str, str]]:
    """A piece of small talk."""
    intent = rng.choice(small_talk(draw_language(rng)))
    template = rng.choices(intent.asks, intent.weights)[0]
    statement = template.endswith(("{|!|.}", "{|.}", "{|.|!}", "{|?|.|!}", "{|?}"))
    text = ask(expand(template, rng), rng, intent.language, plain=rng.random() < 0.8, statement=statement)
    return [(text, rng.choice(intent.answers))]


@lru_cache(maxsize=1)
def _unknown() -> dict[str, dict[str, object]]:
    return tomllib.loads((_HERE / "unknown.toml").read_text(encoding="utf-8"))


def unknown_turns(rng: random.Random) -> list[tuple[str, str]]:
    """A question about the world, and Menny's shrug."""
    language = draw_language(rng)
    section, slots = _unknown()[language], _unknown()["slots"]
    kind = "medical" if language == "en" and rng.random() < 0.12 else "asks"
    template = rng.choice(str(section[kind]).strip().splitlines())

    def fill(match: re.Match[str]) -> str:
        name = match.group()
        return rng.choice(str(slots.get(f"{name}_{language}", slots[name])).split())

    core = re.sub(r"\b(COUNTRY|CITY|YEAR)\b", fill, expand(template, rng))
    answers = section["medical_answers" if kind == "medical" else "answers"]
    return [(ask(core, rng, language), rng.choice(answers))]  # type: ignore[call-overload]
