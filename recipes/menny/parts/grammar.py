"""A small phrase grammar: alternatives, macros, and the noise of real typing.

A template is a line such as ``{how|so how} does <the:router> work``. Braces hold alternatives and nest;
``<name: X>`` is a macro that wraps X in one of many openings. Nothing here knows a subject; the subjects are in
the TOML files beside.
"""

from __future__ import annotations

import hashlib
import random
import re
import tomllib
import unicodedata
from functools import cache
from pathlib import Path

LANGUAGES = ("en", "fr", "de", "es", "it")

_PHRASING = tomllib.loads((Path(__file__).parent / "phrasing.toml").read_text(encoding="utf-8"))
MACROS: dict[str, str] = {name: body.strip() for name, body in _PHRASING["macros"].items()}
_PREFIX: dict[str, list[str]] = _PHRASING["prefixes"]
_SUFFIX: dict[str, list[str]] = _PHRASING["suffixes"]
_IMPERATIVE = {language: frozenset(words.split()) for language, words in _PHRASING["imperatives"].items()}

_MACRO = re.compile(r"<(\w+):\s*")


def _expand_macros(template: str) -> str:
    """Replace every ``<name: X>`` by the alternatives of its macro; macros do not nest."""
    found = _MACRO.search(template)
    while found:
        end = template.index(">", found.end())
        inside = template[found.end() : end]
        body = re.sub(r"\bX\b", inside.replace("\\", r"\\"), MACROS[found.group(1)])
        template = template[: found.start()] + body + template[end + 1 :]
        found = _MACRO.search(template)
    return template


@cache
def _parse(template: str) -> tuple[object, ...]:
    """Template to a tree: a sequence of strings and, for each brace, a tuple of sequences."""
    text = _expand_macros(template)
    position = 0

    def sequence() -> tuple[object, ...]:
        nonlocal position
        parts: list[object] = []
        start = position
        while position < len(text) and text[position] not in "|}":
            if text[position] == "{":
                parts.append(text[start:position])
                position += 1
                alternatives = [sequence()]
                while text[position] == "|":
                    position += 1
                    alternatives.append(sequence())
                position += 1
                parts.append(("alt", tuple(alternatives)))
                start = position
            else:
                position += 1
        parts.append(text[start:position])
        return tuple(parts)

    tree = sequence()
    if position != len(text):
        raise ValueError(f"unbalanced braces in {template!r}")
    return tree


def _walk(tree: tuple[object, ...], rng: random.Random) -> str:
    out = []
    for part in tree:
        if isinstance(part, str):
            out.append(part)
        else:
            out.append(_walk(rng.choice(part[1]), rng))  # type: ignore[index]
    return "".join(out)


def expand(template: str, rng: random.Random) -> str:
    """One random reading of a template, with runs of blanks closed up."""
    return re.sub(r" +", " ", _walk(_parse(template), rng)).strip()


def fill(template: str, values: dict[str, str]) -> str:
    """Replace each stand-alone capital letter named in ``values`` (other capitals are words of the template)."""
    return re.sub(r"\b[A-Z]\b", lambda found: values.get(found.group(), found.group()), template)


def count_readings(template: str) -> int:
    """How many readings a template has (doubles counted twice)."""

    def count(tree: tuple[object, ...]) -> int:
        total = 1
        for part in tree:
            if not isinstance(part, str):
                total *= sum(count(alternative) for alternative in part[1])  # type: ignore[index]
        return total

    return count(_parse(template))


def held_out(key: str, percent: int) -> bool:
    """Whether the content named by ``key`` belongs to the held-out split; independent of the seed."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < percent


def normalise(text: str) -> str:
    """Lower case, no accents, no punctuation: two questions with the same normal form are the same question."""
    bare = unicodedata.normalize("NFD", text.lower())
    bare = "".join(c for c in bare if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^a-z0-9+\-*/]+", " ", bare.replace("'", "")).split())


_LAST_PUNCTUATION = ".?!…:`)"


def _typo(text: str, rng: random.Random) -> str:
    """One slip of the fingers inside a word of at least five letters; digits are never touched."""
    places = list(re.finditer(r"[a-zA-Z]{5,}", text))
    if not places:
        return text
    word = rng.choice(places)
    at = rng.randrange(word.start() + 1, word.end() - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return text[:at] + text[at + 1 :]
    if kind == 1:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + text[at] + text[at:]


def without_accents(text: str) -> str:
    """The text as typed on a keyboard without accents."""
    bare = unicodedata.normalize("NFD", text)
    return "".join(c for c in bare if not unicodedata.combining(c))


def capitalise(text: str) -> str:
    """First letter in upper case, the rest untouched."""
    return text[:1].upper() + text[1:]


def punctuate(core: str, language: str) -> str:
    """The mark a careful writer would end the sentence with."""
    if core[-1:] in _LAST_PUNCTUATION:
        return core
    first = re.split(r"[ ,]", core, maxsplit=1)[0].lower()
    if first in _IMPERATIVE[language]:
        return core + "."
    if language == "fr":
        return core + " ?"
    if language == "es":
        return "¿" + capitalise(core) + "?"
    return core + "?"


def ask(
    core: str,
    rng: random.Random,
    language: str = "en",
    *,
    plain: bool = False,
    typos: bool = True,
    statement: bool = False,
) -> str:
    """A question as someone types it: openings, politeness, careless case, missing marks, a rare slip.

    Args:
        core: the expanded question, lower case but for names, normally without its last mark.
        rng: the stream to draw from.
        language: one of ``LANGUAGES``.
        plain: leave openings and politeness out (small talk, which has its own).
        typos: allow a slip of the fingers (never where a word must be exact).
        statement: no question, so its marks are left as they are.
    """
    text = core
    decorated = not plain and text[-1:] not in "?!."
    if decorated and rng.random() < 0.14:
        text += rng.choice(_SUFFIX[language])
    if not statement and rng.random() < 0.72:
        text = punctuate(text, language)
    if decorated and rng.random() < 0.28:
        opening = rng.choice(_PREFIX[language])
        text = opening + text
    if rng.random() < 0.72:
        text = "¿" + capitalise(text[1:]) if text.startswith("¿") else capitalise(text)
        if language == "en":
            text = re.sub(r"\bi\b", "I", text)
    elif rng.random() < 0.5:
        text = text.lower()
    if typos and rng.random() < 0.04:
        text = _typo(text, rng)
    if typos and language != "en" and rng.random() < 0.08:
        text = without_accents(text)
    return text
