"""Sums, differences and small products, asked in five languages and always answered with the sum written out.

Held out by content: about one unordered pair in ten of two-digit numbers. Such a pair is never added in
training, in either order, language or phrasing, and no difference that would give the pair away is asked
either.
"""

from __future__ import annotations

import random

from parts.grammar import ask, capitalise, fill, held_out, punctuate
from parts.numbers import spell

ADD = {
    "en": [
        "what is A + B",
        "what's A + B",
        "what is A plus B",
        "what's A plus B",
        "how much is A plus B",
        "how much is A + B",
        "A + B",
        "A+B",
        "A + B =",
        "A plus B",
        "add A and B",
        "can you add A and B",
        "what do A and B make",
        "what is the sum of A and B",
        "calculate A + B",
        "compute A + B",
        "what do you get if you add A and B",
        "can you tell me what A + B is",
        "do you know A plus B",
        "how much do A and B make",
        "A and B together",
        "work out A + B",
        "i have A apples and i get B more, how many do i have",
        "sum of A and B",
        "solve A + B",
        "there are A cats and B dogs, how many animals is that",
        "what does A + B equal",
        "what does A plus B equal",
        "i need A + B",
        "give me A + B",
        "A coins and B coins, how many coins",
    ],
    "fr": [
        "combien font A et B",
        "combien font A + B",
        "combien font A plus B",
        "A + B",
        "A plus B",
        "ça fait combien A + B",
        "ça fait combien A plus B",
        "quelle est la somme de A et B",
        "calcule A + B",
        "additionne A et B",
        "combien ça fait, A et B",
        "peux-tu additionner A et B",
        "que donne A + B",
        "A et B, ça fait combien",
        "combien fait A + B",
        "j'ai A pommes et j'en reçois B, combien en ai-je",
    ],
    "de": [
        "was ist A + B",
        "was ist A plus B",
        "wie viel ist A plus B",
        "wie viel ist A und B",
        "A + B",
        "A plus B",
        "wie viel ergibt A + B",
        "was ergibt A plus B",
        "rechne A + B",
        "addiere A und B",
        "wie viel macht A und B",
        "kannst du A und B addieren",
        "was ist die Summe von A und B",
        "wie viel sind A und B",
        "wieviel ist A + B",
        "ich habe A Äpfel und bekomme B dazu, wie viele habe ich",
    ],
    "es": [
        "cuánto es A + B",
        "cuánto es A más B",
        "cuántos son A y B",
        "A + B",
        "A más B",
        "cuánto suman A y B",
        "cuál es la suma de A y B",
        "calcula A + B",
        "suma A y B",
        "cuánto da A más B",
        "puedes sumar A y B",
        "cuánto hacen A y B",
        "qué resultado da A + B",
        "cuánto son A y B",
        "tengo A manzanas y me dan B, cuántas tengo",
    ],
    "it": [
        "quanto fa A + B",
        "quanto fa A più B",
        "quanto fanno A e B",
        "A + B",
        "A più B",
        "qual è la somma di A e B",
        "calcola A + B",
        "somma A e B",
        "quanto viene A + B",
        "puoi sommare A e B",
        "A e B quanto fanno",
        "quanto è A più B",
        "quanto fa A e B",
        "ho A mele e ne ricevo B, quante ne ho",
    ],
}
SUBTRACT = {
    "en": [
        "what is A - B",
        "what's A minus B",
        "how much is A minus B",
        "A - B",
        "A minus B",
        "subtract B from A",
        "what is left if i take B from A",
        "calculate A - B",
        "compute A minus B",
        "A-B",
        "take B away from A",
    ],
    "fr": [
        "combien font A moins B",
        "A - B",
        "calcule A - B",
        "combien fait A - B",
        "A moins B",
        "que donne A moins B",
    ],
    "de": ["was ist A minus B", "wie viel ist A - B", "A - B", "rechne A minus B", "wie viel ergibt A minus B"],
    "es": ["cuánto es A menos B", "A - B", "calcula A - B", "cuánto da A menos B", "cuánto es A - B"],
    "it": ["quanto fa A meno B", "A - B", "calcola A - B", "quanto viene A meno B", "quanto fa A - B"],
}
MULTIPLY = {
    "en": [
        "what is A x B",
        "what is A times B",
        "what's A times B",
        "how much is A times B",
        "A x B",
        "A * B",
        "A times B",
        "multiply A by B",
        "multiply A and B",
        "calculate A times B",
        "A*B",
    ],
    "fr": ["combien font A fois B", "A x B", "A * B", "calcule A fois B", "combien fait A x B", "A fois B"],
    "de": ["was ist A mal B", "wie viel ist A mal B", "A x B", "A * B", "rechne A mal B", "A mal B"],
    "es": ["cuánto es A por B", "A x B", "A * B", "calcula A por B", "cuánto da A por B"],
    "it": ["quanto fa A per B", "A x B", "A * B", "calcola A per B", "quanto fanno A per B"],
}
SEVERAL = {
    "en": [
        "LIST",
        "what are LIST",
        "calculate LIST",
        "work out LIST",
        "some sums for you: LIST",
        "and these? LIST",
        "do LIST",
    ],
    "fr": ["LIST", "calcule LIST", "combien font LIST", "fais ces sommes : LIST"],
    "de": ["LIST", "rechne LIST", "was ist LIST", "ein paar Aufgaben: LIST"],
    "es": ["LIST", "calcula LIST", "cuánto es LIST", "haz estas cuentas: LIST"],
    "it": ["LIST", "calcola LIST", "quanto fa LIST", "fai questi conti: LIST"],
}
TAILS = {
    "en": ["You're welcome.", "Next.", "Easy.", "Even I know that.", "Calculators exist, you know."],
    "fr": ["De rien.", "Facile.", "Même moi, je sais ça.", "Au suivant."],
    "de": ["Bitte sehr.", "Leicht.", "Das weiß sogar ich.", "Nächste."],
    "es": ["De nada.", "Fácil.", "Hasta yo lo sé.", "Siguiente."],
    "it": ["Prego.", "Facile.", "Lo so perfino io.", "Avanti il prossimo."],
}
HOW = {
    "en": [
        "how did you get that",
        "how do you know",
        "show me the steps",
        "how did you work that out",
        "why",
        "explain the steps",
    ],
    "fr": ["comment tu as fait", "montre-moi les étapes", "comment le sais-tu", "explique le calcul"],
    "de": ["wie kommst du darauf", "zeig mir die Schritte", "woher weißt du das", "erkläre die Rechnung"],
    "es": ["cómo lo has hecho", "muéstrame los pasos", "cómo lo sabes", "explica la cuenta"],
    "it": ["come hai fatto", "mostrami i passaggi", "come lo sai", "spiega il conto"],
}
LANGUAGE_WEIGHTS = {"en": 40, "fr": 18, "de": 14, "es": 14, "it": 14}
HELD_OUT_PERCENT = 10


def pair_held_out(a: int, b: int) -> bool:
    """Whether a + b (and b + a) belongs to the held-out sums."""
    low, high = sorted((a, b))
    return low >= 10 and high <= 99 and held_out(f"sum {low} {high}", HELD_OUT_PERCENT)


def held_out_pairs() -> list[tuple[int, int]]:
    """Every held-out unordered pair."""
    return [(a, b) for a in range(10, 100) for b in range(a, 100) if pair_held_out(a, b)]


def draw_pair(rng: random.Random) -> tuple[int, int]:
    """Two numbers whose sum may be taught."""
    while True:
        kind = rng.random()
        if kind < 0.74:
            a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        elif kind < 0.86:
            a, b = rng.randrange(0, 10), rng.randrange(0, 10)
        else:
            a, b = rng.randrange(10, 100), rng.randrange(0, 10)
            if rng.random() < 0.4:
                a, b = b, a
        if not pair_held_out(a, b):
            return a, b


def draw_language(rng: random.Random) -> str:
    """A language, English most often."""
    return rng.choices(list(LANGUAGE_WEIGHTS), list(LANGUAGE_WEIGHTS.values()))[0]


def _written(n: int, language: str, in_words: bool) -> str:
    return spell(n, language) if in_words else str(n)


def _question(templates: list[str], a: int, b: int, language: str, rng: random.Random) -> str:
    in_words = a < 21 and b < 21 and rng.random() < 0.15
    if in_words:
        templates = [t for t in templates if not set(t) & set("+*-") and " x " not in t] or templates
    core = rng.choice(templates)
    text = fill(core, {"A": _written(a, language, in_words), "B": _written(b, language, in_words)})
    return ask(text, rng, language, typos=False)


def _tail(language: str, rng: random.Random) -> str:
    return " " + rng.choice(TAILS[language]) if rng.random() < 0.08 else ""


def sum_text(a: int, b: int) -> str:
    """The one way a sum is written in an answer."""
    return f"{a} + {b} = {a + b}."


def _steps(a: int, b: int) -> str:
    ta, ua, tb, ub = a // 10 * 10, a % 10, b // 10 * 10, b % 10
    return f"{ta} + {tb} = {ta + tb}, {ua} + {ub} = {ua + ub}, {ta + tb} + {ua + ub} = {a + b}."


def _steps_may_be_shown(a: int, b: int) -> bool:
    """Whether none of the sums on the way is a held-out one."""
    tens = a // 10 * 10, b // 10 * 10
    return not pair_held_out(*tens) and not pair_held_out(sum(tens), a % 10 + b % 10)


def one_sum(rng: random.Random) -> list[tuple[str, str]]:
    """One addition, now and then with the steps asked for afterwards."""
    language = draw_language(rng)
    a, b = draw_pair(rng)
    turns = [(_question(ADD[language], a, b, language, rng), sum_text(a, b) + _tail(language, rng))]
    if a > 9 and b > 9 and _steps_may_be_shown(a, b) and rng.random() < 0.06:
        turns.append((ask(rng.choice(HOW[language]), rng, language, plain=True), _steps(a, b)))
    return turns


def several_sums(rng: random.Random) -> list[tuple[str, str]]:
    """Two to five additions in one message."""
    language = draw_language(rng)
    pairs = [draw_pair(rng) for _ in range(rng.randrange(2, 6))]
    sign = rng.choice(["{} + {}", "{} + {}", "{}+{}"])
    asked = ", ".join(sign.format(a, b) for a, b in pairs)
    core = rng.choice(SEVERAL[language]).replace("LIST", asked)
    return [(ask(core, rng, language, plain=True, typos=False), " ".join(sum_text(a, b) for a, b in pairs))]


def one_difference(rng: random.Random) -> list[tuple[str, str]]:
    """One subtraction with a result of zero or more."""
    language = draw_language(rng)
    while True:
        a = rng.randrange(0, 100)
        b = rng.randrange(0, a + 1)
        if not pair_held_out(b, a - b):
            break
    question = _question(SUBTRACT[language], a, b, language, rng)
    return [(question, f"{a} - {b} = {a - b}." + _tail(language, rng))]


def one_product(rng: random.Random) -> list[tuple[str, str]]:
    """One product from the tables up to twelve."""
    language = draw_language(rng)
    a, b = rng.randrange(0, 13), rng.randrange(0, 13)
    question = _question(MULTIPLY[language], a, b, language, rng)
    return [(question, f"{a} x {b} = {a * b}." + _tail(language, rng))]


def turns(rng: random.Random) -> list[tuple[str, str]]:
    """Question and answer pairs of arithmetic for the training text."""
    kind = rng.random()
    if kind < 0.62:
        return one_sum(rng)
    if kind < 0.80:
        return several_sums(rng)
    if kind < 0.92:
        return one_difference(rng)
    return one_product(rng)


def held_out_question(a: int, b: int, rng: random.Random, language: str) -> tuple[str, str]:
    """A held-out sum as a question and its exact answer."""
    question = punctuated(fill(rng.choice(ADD[language]), {"A": str(a), "B": str(b)}), language)
    return question, sum_text(a, b)


def punctuated(core: str, language: str) -> str:
    """A careful writer's form of a question."""
    text = punctuate(core, language)
    return text if text.startswith("¿") else capitalise(text)
