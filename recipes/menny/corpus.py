"""Write Menny's training text.

``python recipes/menny/corpus.py --out runs/menny/data --seed 1``

Writes train.jsonl, heldout.jsonl and the evaluation items eval_sums.jsonl, eval_numbers.jsonl,
eval_questions.jsonl. Every sentence comes from the grammars and tables in ``parts``; the same seed gives the
same bytes. ``--stage 2`` writes the text of the second stage of training, with more number words.
Held-out content (pairs of summands, translations, phrasings, meetings of hero and thing, function namings) is chosen
by hash and depends on neither seed nor stage.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from parts import arithmetic, evaluation_sets, facts, python_functions, stories, translation
from parts.grammar import LANGUAGES

Turns = list[tuple[str, str]]
Document = dict[str, object]

PERSONA = Path(__file__).parents[2] / "src" / "octavo" / "personas" / "menny.toml"
MENNY = str(tomllib.loads(PERSONA.read_text(encoding="utf-8"))["system"])
OTHER_SYSTEMS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a friendly teacher.",
    "Be concise.",
    "You are an expert in machine learning.",
    "Answer the user's question.",
    "You are a chatbot on a small computer.",
    "Keep your answers short and correct.",
    "You are Octavo's built-in assistant.",
    "Tu es une assistante utile.",
    "Du bist eine hilfreiche Assistentin.",
    "Eres una asistente útil.",
    "Sei un'assistente utile.",
)
MENNY_SHARE, OTHER_SYSTEM_SHARE = 0.20, 0.04
MULTI_TURN_SHARE = 0.35
SAME_DOMAIN_SHARE = 0.35

Domains = dict[str, tuple[float, Callable[[random.Random], Turns]]]
DOMAINS: Domains = {
    "arithmetic": (0.24, arithmetic.turns),
    "translation": (0.17, translation.turns),
    "facts": (0.34, facts.fact_turns),
    "talk": (0.12, facts.talk_turns),
    "python": (0.08, python_functions.turns),
    "unknown": (0.04, facts.unknown_turns),
}
STAGES: dict[int, Domains] = {1: DOMAINS, 2: DOMAINS | {"translation": (0.50, translation.irregular_turns)}}
TEXT_SHARE = 0.10


def _domain(rng: random.Random, domains: Domains) -> str:
    return rng.choices(list(domains), [weight for weight, _ in domains.values()])[0]


def allowed_turns(domain: str, rng: random.Random, domains: Domains = DOMAINS) -> Turns:
    """Question and answer pairs of a domain, none of which gives a held-out question away."""
    draw = domains[domain][1]
    while True:
        pairs = draw(rng)
        if domain not in ("facts", "talk", "unknown") or not any(evaluation_sets.gives_away(u) for u, _ in pairs):
            return pairs


def system_prompt(rng: random.Random) -> str | None:
    """The persona's prompt, another prompt, or none."""
    kind = rng.random()
    if kind < MENNY_SHARE:
        return MENNY
    return rng.choice(OTHER_SYSTEMS) if kind < MENNY_SHARE + OTHER_SYSTEM_SHARE else None


def dialogue(pairs: Iterable[tuple[str, str]], domain: str, system: str | None = None) -> Document:
    """A document of a conversation."""
    messages = [{"role": "system", "content": system}] if system else []
    for user, assistant in pairs:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return {"messages": messages, "domain": domain}


def document(rng: random.Random, domains: Domains = DOMAINS) -> Document:
    """One training document."""
    if rng.random() < TEXT_SHARE:
        return {"text": stories.document(rng), "domain": "text"}
    domain = _domain(rng, domains)
    pairs = allowed_turns(domain, rng, domains)
    if rng.random() < MULTI_TURN_SHARE:
        same = rng.random() < SAME_DOMAIN_SHARE
        for _ in range(rng.choice([1, 1, 2, 3])):
            pairs = pairs + allowed_turns(domain if same else _domain(rng, domains), rng, domains)
        domain = domain if same else "mixed"
    return dialogue(pairs, domain, system_prompt(rng))


def held_out_documents(rng: random.Random, sums: list[Document], numbers: list[Document]) -> list[Document]:
    """Documents of held-out content only, for the held-out loss."""
    documents = [dialogue([(str(i["question"]), str(i["answer"]))], "arithmetic") for i in sums]
    for _ in range(500):
        a, b = rng.choice(arithmetic.held_out_pairs())
        pair = arithmetic.held_out_question(b, a, rng, rng.choice(LANGUAGES))
        documents.append(dialogue([pair], "arithmetic", system_prompt(rng)))
    documents += [dialogue([(str(i["question"]), str(i["answer"]))], "translation") for i in numbers]
    for item in evaluation_sets.questions():
        pair = (str(item["question"]), str(item["reference"]))
        documents += [dialogue([pair], "facts"), dialogue([pair], "facts", MENNY)]
    for _ in range(450):
        documents.append(dialogue(python_functions.turns(rng, from_held_out=True), "python", system_prompt(rng)))
    for i in range(700):
        text = stories.story(rng, LANGUAGES[i % 5], from_held_out=True)
        documents.append({"text": text, "domain": "text"})
    single = [d for d in documents if "messages" in d]
    for _ in range(300):
        parts = [m for d in rng.sample(single, 2) for m in d["messages"] if m["role"] != "system"]  # type: ignore[attr-defined]
        documents.append({"messages": parts, "domain": "mixed"})
    rng.shuffle(documents)
    return documents


def write_jsonl(path: Path, rows: Iterable[Document]) -> None:
    """One JSON object a line, UTF-8 as it is."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def build(out: Path, seed: int, documents: int, stage: int = 1) -> dict[str, object]:
    """Write every file into ``out``; returns counts."""
    out.mkdir(parents=True, exist_ok=True)
    sums = evaluation_sets.sums(random.Random("sums"))
    numbers = evaluation_sets.numbers(random.Random("numbers"))
    rng = random.Random(seed)
    train: list[Document] = []
    seen: Counter[str] = Counter()
    while len(train) < documents:
        made = document(rng, STAGES[stage])
        key = json.dumps(made, ensure_ascii=False)
        # A short question may come up again, as it does in life, but not without end.
        if seen[key] < 4:
            seen[key] += 1
            train.append(made)
    held = held_out_documents(random.Random("held out"), sums, numbers)
    write_jsonl(out / "train.jsonl", train)
    write_jsonl(out / "heldout.jsonl", held)
    write_jsonl(out / "eval_sums.jsonl", sums)
    write_jsonl(out / "eval_numbers.jsonl", numbers)
    write_jsonl(out / "eval_questions.jsonl", evaluation_sets.questions())
    return {
        "train_documents": len(train),
        "train_distinct": len(seen),
        "train_domains": dict(Counter(str(d["domain"]) for d in train)),
        "heldout_documents": len(held),
        "heldout_domains": dict(Counter(str(d["domain"]) for d in held)),
        "eval_sums": len(sums),
        "eval_numbers": len(numbers),
        "eval_questions": dict(Counter(str(q["split"]) for q in evaluation_sets.questions())),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--documents", type=int, default=250_000)
    parser.add_argument("--stage", type=int, choices=list(STAGES), default=1)
    options = parser.parse_args()
    start = time.perf_counter()
    counts = build(options.out, options.seed, options.documents, options.stage)
    print(json.dumps(counts, ensure_ascii=False, indent=2))
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
