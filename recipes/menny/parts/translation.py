"""Number words between digits and five languages, and a small stock of everyday words.

Held out by content: about one (number, source, target) in ten, digits counting as a language of their own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from parts.arithmetic import draw_language, punctuated
from parts.grammar import LANGUAGES, ask, fill, held_out
from parts.numbers import spell

FORMS = ("digits", *LANGUAGES)
HELD_OUT_PERCENT = 10
IRREGULAR = (*range(21), *range(30, 101, 10))  # numbers whose words are not put together from others

NAMES = {
    "en": {"en": "English", "fr": "French", "de": "German", "es": "Spanish", "it": "Italian"},
    "fr": {"en": "anglais", "fr": "français", "de": "allemand", "es": "espagnol", "it": "italien"},
    "de": {"en": "Englisch", "fr": "Französisch", "de": "Deutsch", "es": "Spanisch", "it": "Italienisch"},
    "es": {"en": "inglés", "fr": "francés", "de": "alemán", "es": "español", "it": "italiano"},
    "it": {"en": "inglese", "fr": "francese", "de": "tedesco", "es": "spagnolo", "it": "italiano"},
}
INTO_WORDS = {
    "en": [
        "how do you say W in L",
        "how do i say W in L",
        "what is W in L",
        "what's W in L",
        "W in L",
        "translate W into L",
        "translate W to L",
        "say W in L",
        "what is the L word for W",
        "what's the L for W",
        "can you translate W into L",
        "how would you say W in L",
        "how does one say W in L",
        "tell me W in L",
        "the L word for W",
        "give me W in L",
        "what does one call W in L",
        "i need W in L",
        "please translate W into L",
        "how is W said in L",
    ],
    "fr": [
        "comment dit-on W en L",
        "comment on dit W en L",
        "W en L",
        "traduis W en L",
        "que donne W en L",
        "dis W en L",
        "comment dire W en L",
        "peux-tu traduire W en L",
        "c'est quoi W en L",
        "comment se dit W en L",
    ],
    "de": [
        "wie sagt man W auf L",
        "was heißt W auf L",
        "W auf L",
        "wie heißt W auf L",
        "sag W auf L",
        "was ist W auf L",
        "kannst du mir W auf L sagen",
        "wie sage ich W auf L",
        "übersetze W auf L",
    ],
    "es": [
        "cómo se dice W en L",
        "W en L",
        "traduce W al L",
        "qué es W en L",
        "cómo digo W en L",
        "dime W en L",
        "puedes traducir W al L",
        "cuál es la palabra en L para W",
    ],
    "it": [
        "come si dice W in L",
        "W in L",
        "traduci W in L",
        "che cos'è W in L",
        "come dico W in L",
        "dimmi W in L",
        "puoi tradurre W in L",
        "qual è la parola in L per W",
    ],
}
INTO_DIGITS = {
    "en": [
        "write W in digits",
        "what number is W",
        "W in digits",
        "W as a number",
        "how do you write W in digits",
        "put W into digits",
        "which number is W",
        "W in figures",
        "write W as a number",
    ],
    "fr": [
        "écris W en chiffres",
        "W en chiffres",
        "quel nombre est W",
        "comment écrit-on W en chiffres",
        "c'est quel nombre, W",
    ],
    "de": ["schreibe W in Ziffern", "W in Ziffern", "welche Zahl ist W", "wie schreibt man W in Ziffern", "W als Zahl"],
    "es": ["escribe W en cifras", "W en cifras", "qué número es W", "cómo se escribe W en cifras", "W en números"],
    "it": ["scrivi W in cifre", "W in cifre", "che numero è W", "come si scrive W in cifre", "W in numeri"],
}
OWN_WORDS = {
    "en": ["write W in words", "spell out W", "W in words", "how do you write W in words", "put W into words"],
    "fr": ["écris W en lettres", "W en lettres", "comment écrit-on W en lettres", "écris W en toutes lettres"],
    "de": ["schreibe W in Worten", "W in Worten", "wie schreibt man W in Worten", "schreibe W als Wort"],
    "es": ["escribe W en letras", "W en letras", "cómo se escribe W en letras", "escribe W con palabras"],
    "it": ["scrivi W in lettere", "W in lettere", "come si scrive W in lettere", "scrivi W a parole"],
}
COUNT = {
    "en": ["count from A to B in L", "can you count from A to B in L", "A to B in L", "count in L from A to B"],
    "fr": ["compte de A à B en L", "peux-tu compter de A à B en L", "compte en L de A à B"],
    "de": ["zähle von A bis B auf L", "kannst du von A bis B auf L zählen", "zähle auf L von A bis B"],
    "es": ["cuenta de A a B en L", "puedes contar de A a B en L", "cuenta en L de A a B"],
    "it": ["conta da A a B in L", "puoi contare da A a B in L", "conta in L da A a B"],
}
WORDS = """
cat chat Katze gato gatto
dog chien Hund perro cane
house maison Haus casa casa
book livre Buch libro libro
water eau Wasser agua acqua
bread pain Brot pan pane
sun soleil Sonne sol sole
moon lune Mond luna luna
star étoile Stern estrella stella
tree arbre Baum árbol albero
flower fleur Blume flor fiore
bird oiseau Vogel pájaro uccello
fish poisson Fisch pez pesce
horse cheval Pferd caballo cavallo
apple pomme Apfel manzana mela
milk lait Milch leche latte
cheese fromage Käse queso formaggio
coffee café Kaffee café caffè
tea thé Tee té tè
day jour Tag día giorno
night nuit Nacht noche notte
morning matin Morgen mañana mattina
year année Jahr año anno
hand main Hand mano mano
eye œil Auge ojo occhio
head tête Kopf cabeza testa
heart cœur Herz corazón cuore
mother mère Mutter madre madre
father père Vater padre padre
sister sœur Schwester hermana sorella
brother frère Bruder hermano fratello
friend ami Freund amigo amico
school école Schule escuela scuola
street rue Straße calle strada
city ville Stadt ciudad città
river rivière Fluss río fiume
sea mer Meer mar mare
mountain montagne Berg montaña montagna
snow neige Schnee nieve neve
rain pluie Regen lluvia pioggia
fire feu Feuer fuego fuoco
door porte Tür puerta porta
window fenêtre Fenster ventana finestra
table table Tisch mesa tavolo
chair chaise Stuhl silla sedia
red rouge rot rojo rosso
green vert grün verde verde
blue bleu blau azul blu
white blanc weiß blanco bianco
black noir schwarz negro nero
yellow jaune gelb amarillo giallo
thanks merci danke gracias grazie
yes oui ja sí sì
hello bonjour hallo hola ciao
monday lundi Montag lunes lunedì
friday vendredi Freitag viernes venerdì
sunday dimanche Sonntag domingo domenica
expert expert Experte experto esperto
machine machine Maschine máquina macchina
"""
TABLE = [dict(zip(LANGUAGES, line.split(), strict=True)) for line in WORDS.strip().splitlines()]


def combination_held_out(n: int, source: str, target: str) -> bool:
    """Whether translating n from one form into another belongs to the held-out split."""
    return held_out(f"number {n} {source} {target}", HELD_OUT_PERCENT)


def held_out_combinations() -> list[tuple[int, str, str]]:
    """Every held-out (number, source, target)."""
    triples = ((n, s, t) for n in range(101) for s in FORMS for t in FORMS if s != t)
    return [triple for triple in triples if combination_held_out(*triple)]


def written(n: int, form: str) -> str:
    """The number in one of the six forms."""
    return str(n) if form == "digits" else spell(n, form)


def _core(word: str, source: str, target: str, language: str, rng: random.Random) -> str:
    if target == "digits":
        return fill(rng.choice(INTO_DIGITS[language]), {"W": word})
    if source == "digits" and target == language:
        return fill(rng.choice(OWN_WORDS[language]), {"W": word})
    template = rng.choice(INTO_WORDS[language])
    return fill(template, {"L": NAMES[language][target], "W": word})


def _asked_in(source: str, target: str, rng: random.Random) -> str:
    """The language of the question: the source's as a rule, any other at times."""
    if source in LANGUAGES and rng.random() < 0.7:
        return source
    if target in LANGUAGES and rng.random() < 0.2:
        return target
    return draw_language(rng)


def one_number(rng: random.Random, numbers: Sequence[int] = range(101)) -> tuple[str, str]:
    """One of the numbers from one form into another."""
    while True:
        n = rng.choice(numbers)
        source, target = rng.sample(FORMS, 2)
        if not combination_held_out(n, source, target):
            break
    language = _asked_in(source, target, rng)
    word = written(n, source)
    core = _core(word, source, target, language, rng)
    if rng.random() < 0.12:
        quoted = rng.choice(["“W”", "'W'", '"W"'] if language == "en" else ["“W”", "«W»", '"W"'])
        core = core.replace(word, fill(quoted, {"W": word}), 1)
    return ask(core, rng, language, typos=False), written(n, target) + "."


def several_numbers(rng: random.Random) -> tuple[str, str]:
    """Two to four numbers at once into the same form."""
    source, target = rng.sample(FORMS, 2)
    numbers = []
    while len(numbers) < rng.randrange(2, 5):
        n = rng.randrange(101)
        if not combination_held_out(n, source, target):
            numbers.append(n)
    language = _asked_in(source, target, rng)
    core = _core(", ".join(written(n, source) for n in numbers), source, target, language, rng)
    return ask(core, rng, language, typos=False), ", ".join(written(n, target) for n in numbers) + "."


def counting(rng: random.Random) -> tuple[str, str]:
    """A run of numbers counted aloud."""
    while True:
        target = rng.choice(LANGUAGES)
        first = rng.choice([0, 1, 1, 1, rng.randrange(95)])
        last = first + rng.randrange(2, 9)
        run = range(first, min(last, 100) + 1)
        if not any(combination_held_out(n, "digits", target) for n in run):
            break
    language = draw_language(rng)
    values = {"L": NAMES[language][target], "A": str(run[0]), "B": str(run[-1])}
    core = fill(rng.choice(COUNT[language]), values)
    return ask(core, rng, language, typos=False), ", ".join(spell(n, target) for n in run) + "."


def everyday_word(rng: random.Random) -> tuple[str, str]:
    """One everyday word from one language into another."""
    row = rng.choice(TABLE)
    source, target = rng.sample(LANGUAGES, 2)
    core = fill(rng.choice(INTO_WORDS[source]), {"L": NAMES[source][target], "W": row[source]})
    return ask(core, rng, source, typos=False), row[target] + "."


def turns(rng: random.Random) -> list[tuple[str, str]]:
    """Question and answer pairs of translation for the training text."""
    kind = rng.random()
    if kind < 0.68:
        return [one_number(rng)]
    if kind < 0.80:
        return [several_numbers(rng)]
    if kind < 0.86:
        return [counting(rng)]
    return [everyday_word(rng)]


def irregular_turns(rng: random.Random) -> list[tuple[str, str]]:
    """As ``turns``, with more of the numbers whose words must be learned one by one."""
    return [one_number(rng, IRREGULAR)] if rng.random() < 0.4 else turns(rng)


def held_out_question(n: int, source: str, target: str, rng: random.Random) -> tuple[str, str, str]:
    """A held-out combination as (question, exact answer, language of the question)."""
    language = source if source in LANGUAGES else draw_language(rng)
    core = _core(written(n, source), source, target, language, rng)
    return punctuated(core, language), written(n, target) + ".", language
