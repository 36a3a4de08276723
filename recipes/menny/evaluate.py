"""Judge a model by its answers.

``python recipes/menny/evaluate.py --model FOLDER --data runs/menny/data``

Asks every held-out sum, number word and question, greedily, and prints one JSON object: exact shares for sums
and number words, shares answered rightly for the dev and the test questions, and every failure. Held-out loss
is the trainer's business.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus import MENNY

Item = dict[str, Any]
Answer = Callable[[list[str]], list[str]]

MAX_TOKENS = 80


def load_answerer(model: Path, system: str | None) -> Answer:
    """A function from questions to greedy replies. The one place that knows Octavo's interface."""
    import octavo

    llm = octavo.LLM.load(model, max_batch_size=32)

    def answer(questions: list[str]) -> list[str]:
        prompts = []
        for question in questions:
            messages = [octavo.Message("system", system)] if system else []
            prompts.append(llm.template.render([*messages, octavo.Message("user", question)]))
        return [reply.text for reply in llm.generate(prompts, temperature=0.0, max_tokens=MAX_TOKENS)]

    return answer


def read(path: Path) -> list[Item]:
    """The items of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sum_right(item: Item, reply: str) -> bool:
    """The reply opens with exactly the sum as it is taught; a remark may follow."""
    return reply.strip().startswith(item["answer"])


def number_right(item: Item, reply: str) -> bool:
    """The reply is exactly the word or the digits and a full stop."""
    return reply.strip() == item["answer"]


def question_right(item: Item, reply: str) -> bool:
    """Every group of the acceptance rule is met by one of its expressions."""
    return all(any(re.search(rule, reply) for rule in group) for group in item["accept"])


def judge(items: list[Item], answer: Answer, right: Callable[[Item, str], bool], by: str) -> Item:
    """Ask the items, and sum up: share right, shares by the field ``by``, failures."""
    replies = answer([item["question"] for item in items])
    groups: dict[str, list[bool]] = {}
    failures = []
    for item, reply in zip(items, replies, strict=True):
        good = right(item, reply)
        groups.setdefault(str(item[by]), []).append(good)
        if not good:
            expected = item.get("answer", item.get("reference"))
            failures.append({"question": item["question"], "reply": reply, "expected": expected, by: item[by]})
    count = len(items)
    return {
        "count": count,
        "right": round((count - len(failures)) / count, 4) if count else None,
        f"by_{by}": {name: round(sum(goods) / len(goods), 4) for name, goods in sorted(groups.items())},
        "failures": failures,
    }


def sample(items: list[Item], limit: int | None) -> list[Item]:
    """All items, or the same random ones every time."""
    return items if limit is None or limit >= len(items) else random.Random(0).sample(items, limit)


def evaluate(answer: Answer, data: Path, limit: int | None = None) -> Item:
    """The whole report."""
    questions = read(data / "eval_questions.jsonl")
    report = {
        "sums": judge(sample(read(data / "eval_sums.jsonl"), limit), answer, sum_right, "lang"),
        "numbers": judge(sample(read(data / "eval_numbers.jsonl"), limit), answer, number_right, "target"),
    }
    for split in ("dev", "test"):
        chosen = sample([q for q in questions if q["split"] == split], limit)
        report[f"questions_{split}"] = judge(chosen, answer, question_right, "lang")
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model folder")
    parser.add_argument("--data", type=Path, required=True, help="the folder corpus.py wrote")
    parser.add_argument("--limit", type=int, help="ask at most this many items of each kind")
    parser.add_argument("--system", choices=["none", "menny"], default="none", help="the system prompt to ask under")
    parser.add_argument("--out", type=Path, help="write the report here as well")
    options = parser.parse_args()
    start = time.perf_counter()
    answer = load_answerer(options.model, MENNY if options.system == "menny" else None)
    report = evaluate(answer, options.data, options.limit)
    report["model"] = options.model.name
    report["system"] = options.system
    text = json.dumps(report, ensure_ascii=False, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    for name, part in report.items():
        if isinstance(part, dict):
            print(f"{name:16} {part['right']:.1%} of {part['count']}", file=sys.stderr)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
