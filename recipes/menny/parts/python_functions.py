"""Short Python functions asked for in words, with a name and argument names of the asker's choosing.

Each entry: what it does, in English as the end of "a function that ..."; its usual name; its arguments; its
body with ``{0}``, ``{1}`` for the arguments. Names vary freely, so the model must copy them instead of reciting
one text.
"""

from __future__ import annotations

import random

from parts.grammar import ask, fill, held_out

FUNCTIONS = [
    (["adds two numbers", "returns the sum of two numbers", "sums two numbers"], "add", "nn", "return {0} + {1}"),
    (["subtracts two numbers", "returns the difference of two numbers"], "subtract", "nn", "return {0} - {1}"),
    (["multiplies two numbers", "returns the product of two numbers"], "multiply", "nn", "return {0} * {1}"),
    (["divides two numbers", "divides one number by another"], "divide", "nn", "return {0} / {1}"),
    (["doubles a number", "returns twice a number"], "double", "n", "return {0} * 2"),
    (["triples a number", "returns three times a number"], "triple", "n", "return {0} * 3"),
    (["squares a number", "returns the square of a number"], "square", "n", "return {0} * {0}"),
    (["cubes a number", "returns the cube of a number"], "cube", "n", "return {0} ** 3"),
    (["negates a number", "changes the sign of a number"], "negate", "n", "return -{0}"),
    (["adds one to a number", "increments a number"], "increment", "n", "return {0} + 1"),
    (["halves a number", "returns half of a number"], "half", "n", "return {0} / 2"),
    (["checks if a number is even", "tells if a number is even"], "is_even", "n", "return {0} % 2 == 0"),
    (["checks if a number is odd", "tells if a number is odd"], "is_odd", "n", "return {0} % 2 == 1"),
    (["checks if a number is positive"], "is_positive", "n", "return {0} > 0"),
    (["checks if a number is zero"], "is_zero", "n", "return {0} == 0"),
    (
        ["returns the larger of two numbers", "finds the maximum of two numbers"],
        "larger",
        "nn",
        "return {0} if {0} > {1} else {1}",
    ),
    (
        ["returns the smaller of two numbers", "finds the minimum of two numbers"],
        "smaller",
        "nn",
        "return {0} if {0} < {1} else {1}",
    ),
    (["returns the absolute value of a number"], "absolute", "n", "return {0} if {0} >= 0 else -{0}"),
    (
        ["returns the average of two numbers", "computes the mean of two numbers"],
        "average",
        "nn",
        "return ({0} + {1}) / 2",
    ),
    (["checks if two values are equal", "compares two values"], "equal", "nn", "return {0} == {1}"),
    (["raises a number to a power"], "power", "nn", "return {0} ** {1}"),
    (["returns the remainder of a division"], "remainder", "nn", "return {0} % {1}"),
    (["reverses a string", "turns a string around"], "reverse", "s", "return {0}[::-1]"),
    (["returns the length of a string", "counts the characters of a string"], "length", "s", "return len({0})"),
    (["makes a string upper case", "converts a string to upper case"], "upper", "s", "return {0}.upper()"),
    (["makes a string lower case", "converts a string to lower case"], "lower", "s", "return {0}.lower()"),
    (["removes spaces around a string", "strips a string"], "strip", "s", "return {0}.strip()"),
    (["counts the words in a string", "counts words"], "count_words", "s", "return len({0}.split())"),
    (["splits a string into words"], "words", "s", "return {0}.split()"),
    (
        ["checks if a string is a palindrome", "tells if a word is a palindrome"],
        "is_palindrome",
        "s",
        "return {0} == {0}[::-1]",
    ),
    (["joins two strings", "concatenates two strings"], "join", "ss", "return {0} + {1}"),
    (["repeats a string", "repeats a string some number of times"], "repeat", "sn", "return {0} * {1}"),
    (["says hello to a name", "greets someone", "returns a greeting"], "greet", "s", 'return "Hello, " + {0} + "!"'),
    (["returns the first character of a string"], "first_char", "s", "return {0}[0]"),
    (["returns the last character of a string"], "last_char", "s", "return {0}[-1]"),
    (["returns the sum of a list", "adds up a list", "sums a list of numbers"], "total", "l", "return sum({0})"),
    (["returns the largest number in a list", "finds the maximum of a list"], "largest", "l", "return max({0})"),
    (["returns the smallest number in a list", "finds the minimum of a list"], "smallest", "l", "return min({0})"),
    (["returns the average of a list", "computes the mean of a list"], "mean", "l", "return sum({0}) / len({0})"),
    (["sorts a list", "returns a sorted list"], "sort_list", "l", "return sorted({0})"),
    (["reverses a list"], "reverse_list", "l", "return {0}[::-1]"),
    (["counts the items of a list", "returns the length of a list"], "count", "l", "return len({0})"),
    (["returns the first item of a list", "gets the first element of a list"], "first", "l", "return {0}[0]"),
    (["returns the last item of a list", "gets the last element of a list"], "last", "l", "return {0}[-1]"),
    (["removes duplicates from a list"], "unique", "l", "return list(set({0}))"),
    (["checks if a list is empty"], "is_empty", "l", "return len({0}) == 0"),
    (["checks if an item is in a list", "tells if a list contains an item"], "contains", "ln", "return {1} in {0}"),
    (["squares every number in a list"], "squares", "l", "return [x * x for x in {0}]"),
    (["doubles every number in a list"], "doubles", "l", "return [x * 2 for x in {0}]"),
    (
        ["keeps the even numbers of a list", "filters the even numbers of a list"],
        "evens",
        "l",
        "return [x for x in {0} if x % 2 == 0]",
    ),
    (
        ["computes the factorial of a number", "returns the factorial of a number"],
        "factorial",
        "n",
        "result = 1\n    for i in range(1, {0} + 1):\n        result = result * i\n    return result",
    ),
    (
        ["returns the nth Fibonacci number", "computes Fibonacci numbers"],
        "fibonacci",
        "n",
        "a, b = 0, 1\n    for _ in range({0}):\n        a, b = b, a + b\n    return a",
    ),
    (
        ["counts the vowels in a string", "counts vowels"],
        "count_vowels",
        "s",
        'return sum(c in "aeiou" for c in {0}.lower())',
    ),
    (
        ["checks if a number is prime", "tells if a number is prime"],
        "is_prime",
        "n",
        "if {0} < 2:\n        return False\n    for i in range(2, {0}):\n"
        "        if {0} % i == 0:\n            return False\n    return True",
    ),
    (
        ["computes the softmax of a list", "returns a softmax"],
        "softmax",
        "l",
        "exps = [math.exp(x) for x in {0}]\n    return [e / sum(exps) for e in exps]",
    ),
    (
        ["returns the two largest scores", "picks the top two of a list", "does top-2 routing"],
        "top2",
        "l",
        "return sorted({0})[-2:]",
    ),
]


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "foo bar calc compute helper f g work run_it my_function do_it process apply solve result_of make "
    "func task step menny octavo test1 thing plus_one handle transform convert get_value answer"
)
ARGUMENTS = {
    "n": ["n", "x", "number", "value", "k", "a", "num", "m", "y"],
    "s": ["text", "s", "string", "word", "name", "t", "line"],
    "l": ["items", "numbers", "values", "xs", "data", "lst", "scores"],
}
PAIRS = [("a", "b"), ("x", "y"), ("first", "second"), ("m", "n"), ("left", "right"), ("p", "q")]

ASKS = {
    "en": [
        "write a Python function that D",
        "write a function that D",
        "write a function which D in Python",
        "Python function that D",
        "can you write a Python function that D",
        "i need a function that D",
        "give me a Python function that D",
        "show me a function that D",
        "how do i write a function that D",
        "a short Python function that D",
        "code a function that D",
        "please write a function that D",
        "write Python code that D",
        "define a function that D",
        "i want a Python function that D",
        "could you write a function that D",
        "help me write a function that D",
    ],
    "fr": ["écris une fonction Python : D", "une fonction Python : D", "donne-moi une fonction Python : D"],
    "de": ["schreibe eine Python-Funktion: D", "eine Python-Funktion: D", "gib mir eine Python-Funktion: D"],
    "es": ["escribe una función de Python: D", "una función de Python: D", "dame una función de Python: D"],
    "it": ["scrivi una funzione Python: D", "una funzione Python: D", "dammi una funzione Python: D"],
}
DESCRIBED = {
    "fr": {
        "add": "additionner deux nombres",
        "multiply": "multiplier deux nombres",
        "square": "le carré d'un nombre",
        "reverse": "inverser une chaîne",
        "is_even": "tester si un nombre est pair",
        "total": "la somme d'une liste",
        "factorial": "la factorielle d'un nombre",
        "largest": "le maximum d'une liste",
        "double": "doubler un nombre",
    },
    "de": {
        "add": "zwei Zahlen addieren",
        "multiply": "zwei Zahlen multiplizieren",
        "square": "eine Zahl quadrieren",
        "reverse": "einen Text umdrehen",
        "is_even": "prüfen, ob eine Zahl gerade ist",
        "total": "die Summe einer Liste",
        "factorial": "die Fakultät einer Zahl",
        "largest": "das Maximum einer Liste",
        "double": "eine Zahl verdoppeln",
    },
    "es": {
        "add": "sumar dos números",
        "multiply": "multiplicar dos números",
        "square": "el cuadrado de un número",
        "reverse": "invertir un texto",
        "is_even": "comprobar si un número es par",
        "total": "la suma de una lista",
        "factorial": "el factorial de un número",
        "largest": "el máximo de una lista",
        "double": "duplicar un número",
    },
    "it": {
        "add": "sommare due numeri",
        "multiply": "moltiplicare due numeri",
        "square": "il quadrato di un numero",
        "reverse": "rovesciare una stringa",
        "is_even": "controllare se un numero è pari",
        "total": "la somma di una lista",
        "factorial": "il fattoriale di un numero",
        "largest": "il massimo di una lista",
        "double": "raddoppiare un numero",
    },
}
HELD_OUT_PERCENT = 8


def naming_held_out(usual: str, name: str) -> bool:
    """Whether giving the function usually called ``usual`` this other name is kept out of training."""
    return held_out(f"function {usual} {name}", HELD_OUT_PERCENT)


def _arguments(kinds: str, rng: random.Random) -> tuple[str, ...]:
    if kinds in ("nn", "ss"):
        return rng.choice(PAIRS)
    names: list[str] = []
    for kind in kinds:
        names.append(rng.choice([n for n in ARGUMENTS[kind] if n not in names]))
    return tuple(names)


def _source(name: str, arguments: tuple[str, ...], body: str) -> str:
    return f"def {name}({', '.join(arguments)}):\n    {body.format(*arguments)}"


def turns(rng: random.Random, *, from_held_out: bool = False) -> list[tuple[str, str]]:
    """A request for a function and its source, for training or from the held-out namings."""
    while True:
        descriptions, usual, kinds, body = rng.choice(FUNCTIONS)
        named = from_held_out or rng.random() < 0.45
        name = rng.choice(NAMES) if named else usual
        if not named or naming_held_out(usual, name) == from_held_out:
            break
    language = "en"
    description = rng.choice(descriptions)
    if rng.random() < 0.2:
        language = rng.choice(list(DESCRIBED))
        if usual not in DESCRIBED[language]:
            language = "en"
        else:
            description = DESCRIBED[language][usual]
    core = rng.choice(ASKS[language])
    arguments = _arguments(kinds, rng)
    if named:
        core = _with_name(core, name, language, rng)
    text = fill(core, {"D": description})
    if len(arguments) == 1 and language == "en" and rng.random() < 0.15:
        text += rng.choice([f", with the argument {arguments[0]}", f", the argument is {arguments[0]}"])
    elif rng.random() < 0.9:
        arguments = _arguments_usual(kinds)
    return [(ask(text, rng, language, typos=False), _source(name, arguments, body))]


def _arguments_usual(kinds: str) -> tuple[str, ...]:
    """The argument names used when nobody asks for others."""
    if kinds in ("nn", "ss"):
        return ("a", "b")
    usual = {"n": "n", "s": "text", "l": "items"}
    return tuple(usual[k] for k in kinds)


def _with_name(core: str, name: str, language: str, rng: random.Random) -> str:
    called = {
        "en": ["called", "named"],
        "fr": ["appelée", "nommée"],
        "de": ["namens"],
        "es": ["llamada"],
        "it": ["chiamata"],
    }
    word = rng.choice(called[language])
    if language == "en":
        for noun in ("function that", "function which", "Python code that"):
            if noun in core:
                head = noun.split()[0] if noun != "Python code that" else "a Python function"
                return core.replace(noun, f"{head} {word} {name} {noun.split()[-1]}", 1)
        return core
    return core.replace(" :", f" {word} {name} :", 1) if language == "fr" else core.replace(":", f" {word} {name}:", 1)
