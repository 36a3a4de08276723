"""Write the built-in texts of ``octavo routing trace``, one file for each domain of Menny's training.

``python recipes/menny/routing_texts.py``

Writes english, french, german, spanish, italian, sums and code.jsonl into src/octavo/routing/texts. Of content that
training kept out there are the stories (the hero never met the thing), the sums (the pair was never added) and the
functions (never asked for by this name). The conversations of the five languages, facts and small talk, are of what
Menny was taught, in phrasings drawn with a seed of their own: training's seeds are numbers, these are words, and no
text here holds one of the evaluation's questions. Of the conversations one in three ends with a question, so that a
reply can be recorded. The same files come of every run.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

from corpus import Document, Turns, write_jsonl
from parts import arithmetic, evaluation_sets, facts, python_functions, stories
from parts.grammar import LANGUAGES

OUT = Path(__file__).parents[2] / "src" / "octavo" / "routing" / "texts"
NAMES = {"en": "english", "fr": "french", "de": "german", "es": "spanish", "it": "italian"}
STORIES, TALKS = 7, 8  # of each language
SUMS, FUNCTIONS = 22, 18  # conversations


def conversation(exchanges: Turns, *, answered: bool) -> Document:
    """Questions and answers, the last of them left out where it is not answered."""
    messages = []
    for user, assistant in exchanges:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages if answered else messages[:-1]}


def conversations(count: int, draw: Callable[[], tuple[str, str]], turns: int) -> list[Document]:
    """So many conversations of so many questions each."""
    return [conversation([draw() for _ in range(turns)], answered=n % 3 != 2) for n in range(count)]


def talk(rng: random.Random, language: str) -> tuple[str, str]:
    """A fact three times in four, else small talk."""
    while True:
        known = facts.facts(language) if rng.random() < 0.75 else facts.small_talk(language)
        pair = facts.ask_fact(rng.choice(known), rng)
        if not evaluation_sets.gives_away(pair[0]):
            return pair


def of_language(language: str) -> list[Document]:
    """Stories and conversations, in turn as far as they go."""
    rng = random.Random(f"routing texts, {language}")
    told: list[Document] = [{"text": stories.story(rng, language, from_held_out=True)} for _ in range(STORIES)]
    talked = conversations(TALKS, lambda: talk(rng, language), turns=3)
    return [one for pair in zip(told, talked, strict=False) for one in pair] + talked[STORIES:]


def held_out_sum(rng: random.Random) -> tuple[str, str]:
    """A sum that training never had, asked in any language."""
    a, b = rng.sample(rng.choice(arithmetic.held_out_pairs()), 2)
    return arithmetic.held_out_question(a, b, rng, rng.choice(LANGUAGES))


def build() -> dict[str, list[Document]]:
    """The documents of each domain."""
    texts = {NAMES[language]: of_language(language) for language in LANGUAGES}
    rng = random.Random("routing texts, sums")
    texts["sums"] = conversations(SUMS, lambda: held_out_sum(rng), turns=3)
    rng = random.Random("routing texts, code")
    texts["code"] = conversations(FUNCTIONS, lambda: python_functions.turns(rng, from_held_out=True)[0], turns=2)
    return texts


def write(out: Path) -> None:
    """One file for each domain."""
    out.mkdir(parents=True, exist_ok=True)
    for name, documents in build().items():
        write_jsonl(out / f"{name}.jsonl", documents)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
