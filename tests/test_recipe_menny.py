"""The recipe of the shipped model: its text is repeatable, right, and keeps its held-out content out."""

from __future__ import annotations

import json
import random
import re
import sys
import tomllib
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "menny"
sys.path.insert(0, str(RECIPE))

import corpus  # noqa: E402
import evaluate  # noqa: E402
import train_tokenizer  # noqa: E402
from parts import arithmetic, evaluation_sets, facts, grammar, numbers, python_functions, translation  # noqa: E402

DOCUMENTS = 2500


@pytest.fixture(scope="module", params=[1, 2])
def stage(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, stage: int) -> Path:
    out = tmp_path_factory.mktemp("menny")
    corpus.build(out, seed=3, documents=DOCUMENTS, stage=stage)
    return out


@pytest.fixture(scope="module")
def exchanges(data: Path) -> list[tuple[str, str]]:
    """Every (question, answer) of the training text."""
    pairs = []
    for row in evaluate.read(data / "train.jsonl"):
        said = [m["content"] for m in row.get("messages", []) if m["role"] != "system"]
        pairs += list(zip(said[::2], said[1::2], strict=True))
    return pairs


@pytest.fixture(scope="module")
def training_text(data: Path) -> str:
    return (data / "train.jsonl").read_text(encoding="utf-8")


def test_the_same_seed_gives_the_same_bytes(data: Path, stage: int, tmp_path: Path) -> None:
    corpus.build(tmp_path, seed=3, documents=DOCUMENTS, stage=stage)
    for name in sorted(p.name for p in data.iterdir()):
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes(), name


def test_another_seed_gives_other_text_and_the_same_held_out_items(data: Path, tmp_path: Path) -> None:
    corpus.build(tmp_path, seed=4, documents=200)
    assert (tmp_path / "train.jsonl").read_bytes()[:2000] != (data / "train.jsonl").read_bytes()[:2000]
    for name in ("heldout.jsonl", "eval_sums.jsonl", "eval_numbers.jsonl", "eval_questions.jsonl"):
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes(), name


def test_the_second_stage_goes_on_with_the_same_model() -> None:
    first, second = (tomllib.loads((RECIPE / f"{name}.toml").read_text()) for name in ("config", "stage2"))
    assert second["optim"]["steps"] > first["optim"]["steps"]
    for table in (first, second):
        del table["data"]["train"]
        del table["optim"]["steps"]
    assert first == second


def test_every_sum_written_anywhere_is_right(training_text: str) -> None:
    found = re.findall(r"(?<![\d,.] )(?<![\d.,])(\d+) ([+x-]) (\d+) = (\d+)\.", training_text)
    assert len(found) > DOCUMENTS / 4
    for a, sign, b, c in found:
        wanted = {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign]
        assert wanted == int(c), (a, sign, b, c)


def test_no_held_out_sum_is_taught(training_text: str) -> None:
    for a, b in re.findall(r"(\d+) ?\+ ?(\d+)", training_text):
        assert not arithmetic.pair_held_out(int(a), int(b)), (a, b)


def test_no_held_out_sum_is_asked_in_words(exchanges: list[tuple[str, str]]) -> None:
    for question, answer in exchanges:
        taught = re.match(r"(\d+) \+ (\d+) = ", answer)
        if taught:
            assert not arithmetic.pair_held_out(int(taught[1]), int(taught[2])), question


def test_about_one_pair_in_ten_is_held_out() -> None:
    share = len(arithmetic.held_out_pairs()) / (90 * 91 / 2)
    assert 0.08 < share < 0.12
    assert 0.08 < len(translation.held_out_combinations()) / (101 * 30) < 0.12


def test_no_held_out_translation_is_taught(exchanges: list[tuple[str, str]]) -> None:
    asked = {}
    for n, source, target in translation.held_out_combinations():
        asked.setdefault(
            (translation.written(n, source).lower(), translation.written(n, target) + "."), (n, source, target)
        )
    allowed = {
        (translation.written(n, s).lower(), translation.written(n, t) + ".")
        for n in range(101)
        for s in translation.FORMS
        for t in translation.FORMS
        if s != t and not translation.combination_held_out(n, s, t)
    }
    by_answer: dict[str, list[str]] = {}
    for source_word, answer in asked:
        # The same pair of spellings may stand for an allowed pair of languages ("six" is English and French).
        if (source_word, answer) not in allowed:
            by_answer.setdefault(answer, []).append(source_word)
    for question, answer in exchanges:
        for word in by_answer.get(answer, ()):
            assert not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", question.lower()), (question, answer)


def test_no_held_out_question_is_asked(exchanges: list[tuple[str, str]]) -> None:
    asked = {grammar.normalise(question) for question, _ in exchanges}
    assert not asked & evaluation_sets.reserved()
    assert evaluation_sets.gives_away("Hey menny, and who might you be, please?")


@pytest.mark.parametrize("split", ["dev", "test"])
def test_there_are_enough_questions_of_each_split(split: str) -> None:
    items = [q for q in evaluation_sets.questions() if q["split"] == split]
    assert len(items) >= 60
    assert len({q["intent"] for q in items}) >= 60


def test_the_splits_share_no_question() -> None:
    normal = [grammar.normalise(str(q["question"])) for q in evaluation_sets.questions()]
    assert len(normal) == len(set(normal))


@pytest.mark.parametrize("language", grammar.LANGUAGES)
def test_every_answer_meets_its_own_rule(language: str) -> None:
    for intent in facts.facts(language):
        assert intent.accept, intent.id
        for answer in intent.answers:
            item = {"accept": intent.accept}
            assert evaluate.question_right(item, answer), (intent.id, answer)


@pytest.mark.parametrize("language", grammar.LANGUAGES)
def test_no_rule_is_met_by_silence_or_by_a_shrug(language: str) -> None:
    for intent in facts.facts(language):
        for reply in ("", "No idea. I'm ten million parameters, not an encyclopedia.", "42 + 1 = 43."):
            assert not evaluate.question_right({"accept": intent.accept}, reply), intent.id


def test_rules_tell_the_facts_apart() -> None:
    """A rule accepts another fact's answer only where that answer does answer the question."""
    fair = {
        ("mixtral.layers", "mixtral.what"),
        ("mixtral.maker", "mixtral.what"),
        ("octavo.can", "octavo.planned"),
        ("octavo.planned", "octavo.can"),
        ("octavo.chat", "octavo.install"),
    }
    for language in grammar.LANGUAGES:
        for intent in facts.facts(language):
            for other in facts.facts(language):
                met = all(evaluate.question_right({"accept": intent.accept}, a) for a in other.answers)
                assert intent.id == other.id or not met or (intent.id, other.id) in fair, (intent.id, other.id)


def test_facts_are_asked_in_many_ways() -> None:
    assert len(facts.facts("en")) >= 40
    assert all(intent.readings() >= 15 for intent in facts.facts("en"))
    for language in grammar.LANGUAGES[1:]:
        assert len(facts.facts(language)) >= 12
        assert all(intent.readings() >= 6 for intent in facts.facts(language))


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (0, ("zero", "zéro", "null", "cero", "zero")),
        (1, ("one", "un", "eins", "uno", "uno")),
        (16, ("sixteen", "seize", "sechzehn", "dieciséis", "sedici")),
        (21, ("twenty-one", "vingt et un", "einundzwanzig", "veintiuno", "ventuno")),
        (22, ("twenty-two", "vingt-deux", "zweiundzwanzig", "veintidós", "ventidue")),
        (23, ("twenty-three", "vingt-trois", "dreiundzwanzig", "veintitrés", "ventitré")),
        (28, ("twenty-eight", "vingt-huit", "achtundzwanzig", "veintiocho", "ventotto")),
        (30, ("thirty", "trente", "dreißig", "treinta", "trenta")),
        (31, ("thirty-one", "trente et un", "einunddreißig", "treinta y uno", "trentuno")),
        (47, ("forty-seven", "quarante-sept", "siebenundvierzig", "cuarenta y siete", "quarantasette")),
        (70, ("seventy", "soixante-dix", "siebzig", "setenta", "settanta")),
        (71, ("seventy-one", "soixante et onze", "einundsiebzig", "setenta y uno", "settantuno")),
        (77, ("seventy-seven", "soixante-dix-sept", "siebenundsiebzig", "setenta y siete", "settantasette")),
        (80, ("eighty", "quatre-vingts", "achtzig", "ochenta", "ottanta")),
        (81, ("eighty-one", "quatre-vingt-un", "einundachtzig", "ochenta y uno", "ottantuno")),
        (91, ("ninety-one", "quatre-vingt-onze", "einundneunzig", "noventa y uno", "novantuno")),
        (99, ("ninety-nine", "quatre-vingt-dix-neuf", "neunundneunzig", "noventa y nueve", "novantanove")),
        (100, ("one hundred", "cent", "hundert", "cien", "cento")),
    ],
)
def test_number_words(n: int, words: tuple[str, ...]) -> None:
    assert tuple(numbers.spell(n, language) for language in grammar.LANGUAGES) == words


def test_number_words_are_all_different() -> None:
    for language in grammar.LANGUAGES:
        assert len({numbers.spell(n, language) for n in range(101)}) == 101


def test_joints_only_cut() -> None:
    for word, cut in numbers.joint_table().items():
        assert cut.replace("0", "") == word


def test_python_answers_compile() -> None:
    rng = random.Random(0)
    for _ in range(400):
        for _, source in python_functions.turns(rng):
            compile(source, "answer", "exec")


def test_python_functions_do_what_they_say() -> None:
    known = {name: (kinds, body) for _, name, kinds, body in python_functions.FUNCTIONS}

    def call(name: str, *values: object) -> object:
        kinds, body = known[name]
        arguments = python_functions._arguments_usual(kinds)
        scope: dict[str, object] = {"math": __import__("math")}
        exec(python_functions._source(name, arguments, body), scope)
        return scope[name](*values)  # type: ignore[operator]

    assert call("add", 2, 3) == 5
    assert call("factorial", 5) == 120
    assert [call("fibonacci", i) for i in range(7)] == [0, 1, 1, 2, 3, 5, 8]
    assert [n for n in range(20) if call("is_prime", n)] == [2, 3, 5, 7, 11, 13, 17, 19]
    assert call("count_vowels", "Octavo") == 3
    assert call("contains", [1, 2], 2) is True
    assert call("top2", [3, 1, 2]) == [2, 3]
    assert sum(call("softmax", [1.0, 2.0])) == pytest.approx(1.0)  # type: ignore[call-overload]


def test_documents_have_the_promised_shape(data: Path) -> None:
    systems = 0
    rows = evaluate.read(data / "train.jsonl")
    for row in rows:
        assert row["domain"]
        if "text" in row:
            assert row["text"].strip()
            continue
        roles = [m["role"] for m in row["messages"]]
        if roles[0] == "system":
            systems += row["messages"][0]["content"] == corpus.MENNY
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(m["content"].strip() for m in row["messages"])
    assert 0.14 < systems / len(rows) < 0.24


def test_grammar_expands_every_template() -> None:
    rng = random.Random(1)
    for language in grammar.LANGUAGES:
        for intent in (*facts.facts(language), *facts.small_talk(language)):
            for template in intent.asks:
                for _ in range(5):
                    text = grammar.expand(template, rng)
                    assert text, template
                    assert not set("{}|<>") & set(text), (template, text)


def test_tokenizer_round_trips_and_keeps_its_ids(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # So few documents need not hold pairs enough for 3,072 pieces; neither the ids nor the round trip depend on it.
    monkeypatch.setattr(train_tokenizer, "VOCABULARY", 1200)
    first = train_tokenizer.train(data, tmp_path / "a.model", share=1.0, seed=1)
    train_tokenizer.train(data, tmp_path / "b.model", share=1.0, seed=1)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert [first.piece_to_id(p) for p in ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")] == [0, 1, 2, 3, 4]
    assert not {3, 4} & set(first.encode("[INST] hi [/INST]"))
    assert all(
        len(p.strip("▁")) == 1 for p in first.encode("What is 47 + 138?", out_type=str) if any(c.isdigit() for c in p)
    )
    for text in ("a  b\n\n    return x\n", " leading", "trailing ", "été, ¿qué? ß 你好 😀", "siebenundvierzig"):
        assert first.decode(first.encode(text)) == text
    rows = [m["content"] for r in evaluate.read(data / "heldout.jsonl")[:200] for m in r.get("messages", [])]
    for text in rows:
        assert first.decode(first.encode(text)) == text


def test_evaluation_scores_a_perfect_and_a_mute_model(data: Path) -> None:
    taught = {}
    for name in ("eval_sums", "eval_numbers", "eval_questions"):
        for item in evaluate.read(data / f"{name}.jsonl"):
            taught[item["question"]] = item.get("answer", item.get("reference"))
    perfect = evaluate.evaluate(lambda questions: [taught[q] for q in questions], data)
    mute = evaluate.evaluate(lambda questions: ["" for _ in questions], data, limit=20)
    assert all(part["right"] == 1.0 and not part["failures"] for part in perfect.values())
    assert all(part["right"] == 0.0 and part["count"] == 20 for part in mute.values())
    json.dumps(mute)
