"""Number words from 0 to 100 in five languages."""

from __future__ import annotations

from functools import cache

from parts.grammar import LANGUAGES


def _words(text: str) -> list[str]:
    return text.split()


_EN = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_EN_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_FR = _words(
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize"
    " dix-sept dix-huit dix-neuf"
)
_FR_TENS = {2: "vingt", 3: "trente", 4: "quarante", 5: "cinquante", 6: "soixante"}
_DE = _words(
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn "
    "sechzehn siebzehn achtzehn neunzehn"
)
_DE_TENS = ["zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]
_ES = _words(
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis "
    "diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco "
    "veintiséis veintisiete veintiocho veintinueve"
)
_ES_TENS = {3: "treinta", 4: "cuarenta", 5: "cincuenta", 6: "sesenta", 7: "setenta", 8: "ochenta", 9: "noventa"}
_IT = _words(
    "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici "
    "sedici diciassette diciotto diciannove"
)
_IT_TENS = _words("venti trenta quaranta cinquanta sessanta settanta ottanta novanta")


def english(n: int) -> str:
    """``47`` -> ``forty-seven``."""
    if n == 100:
        return "one hundred"
    if n < 20:
        return _EN[n]
    tens, unit = _EN_TENS[n // 10 - 2], n % 10
    return f"{tens}-{_EN[unit]}" if unit else tens


def french(n: int) -> str:
    """``71`` -> ``soixante et onze``; the traditional spelling, hyphens except around "et"."""
    if n == 100:
        return "cent"
    if n < 20:
        return _FR[n]
    if n >= 80:
        return "quatre-vingts" if n == 80 else f"quatre-vingt-{_FR[n - 80]}"
    base = 60 if n >= 60 else n // 10 * 10
    tens, rest = _FR_TENS[base // 10], n - base
    if rest == 0:
        return tens
    return f"{tens} et {_FR[rest]}" if rest in (1, 11) else f"{tens}-{_FR[rest]}"


def german(n: int) -> str:
    """``47`` -> ``siebenundvierzig``."""
    if n == 100:
        return "hundert"
    if n < 20:
        return _DE[n]
    tens, unit = _DE_TENS[n // 10 - 2], n % 10
    if not unit:
        return tens
    return f"{'ein' if unit == 1 else _DE[unit]}und{tens}"


def spanish(n: int) -> str:
    """``47`` -> ``cuarenta y siete``."""
    if n == 100:
        return "cien"
    if n < 30:
        return _ES[n]
    tens, unit = _ES_TENS[n // 10], n % 10
    return f"{tens} y {_ES[unit]}" if unit else tens


def italian(n: int) -> str:
    """``43`` -> ``quarantatré``; the vowel of the ten falls before uno and otto."""
    if n == 100:
        return "cento"
    if n < 20:
        return _IT[n]
    tens, unit = _IT_TENS[n // 10 - 2], n % 10
    if not unit:
        return tens
    if unit in (1, 8):
        tens = tens[:-1]
    return tens + ("tré" if unit == 3 else _IT[unit])


SPELL = {"en": english, "fr": french, "de": german, "es": spanish, "it": italian}


@cache
def spell(n: int, language: str) -> str:
    """The word for n in one of the five languages."""
    return SPELL[language](n)


def _german_joints(n: int) -> str:
    unit = n % 10
    return "".join(("ein" if unit == 1 else _DE[unit], "0und0", _DE_TENS[n // 10 - 2]))


def jointed(n: int, language: str) -> str:
    """The word with a digit between its parts, so that a tokenizer trained on it learns the parts and never a joint."""
    word = spell(n, language)
    if language in ("en", "fr"):
        return word.replace("-", "0-0")
    if n < 20 or n == 100:
        return word
    unit = n % 10
    if language == "de" and unit:
        return _german_joints(n)
    if language == "es" and 20 < n < 30:
        return "veinti0" + word.removeprefix("veinti")
    if language == "it" and unit:
        tail = "tré" if unit == 3 else _IT[unit]
        return word.removesuffix(tail) + "0" + tail
    return word


def joint_table() -> dict[str, str]:
    """Every compound number word -> its jointed form."""
    table = {}
    for language in LANGUAGES:
        for n in range(101):
            word, split = spell(n, language), jointed(n, language)
            if word != split:
                table[word] = split
    return table
