"""Train Menny's tokenizer.

``python recipes/menny/train_tokenizer.py --data runs/menny/data --out runs/menny/tokenizer.model``

A byte-fallback BPE in the manner of Mistral's: every digit alone, no normalisation, blanks kept, control
symbols for the chat. Compound number words are shown to it with a digit in their joints, so it learns
``sieben``, ``und``, ``vierzig`` and never ``siebenundvierzig``: the model then reads and writes such words part
by part, which is what lets it translate numbers it has not met in that pair of languages.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from parts.numbers import joint_table

VOCABULARY = 3072


def texts(data: Path, share: float, seed: int) -> Iterator[str]:
    """A sample of the training text, message by message."""
    rng = random.Random(seed)
    table = joint_table()
    compound = re.compile(r"\b(" + "|".join(sorted(map(re.escape, table), key=len, reverse=True)) + r")\b")
    for line in (data / "train.jsonl").open(encoding="utf-8"):
        if rng.random() > share:
            continue
        row = json.loads(line)
        parts = [row["text"]] if "text" in row else [m["content"] for m in row["messages"] if m["role"] != "system"]
        for part in parts:
            yield compound.sub(lambda m: table[m.group()], part)
    # Number words alone, so that their parts are pieces whatever the sample holds.
    for split in table.values():
        for _ in range(20):
            yield split


def train(data: Path, out: Path, share: float, seed: int) -> sentencepiece.SentencePieceProcessor:
    """Train and write the model; deterministic (one thread, fixed sample)."""
    sentences = []
    for text in texts(data, share, seed):
        sentences += text.split("\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.99995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        control_symbols=["[INST]", "[/INST]"],
        num_threads=1,
        minloglevel=1,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.2, help="share of the documents to train on")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    tokenizer = train(options.data, options.out, options.share, options.seed)
    if (tokenizer.piece_to_id("[INST]"), tokenizer.piece_to_id("[/INST]")) != (3, 4):
        raise SystemExit("the control symbols did not get ids 3 and 4")
    count = sample = total = 0
    for number, line in enumerate((options.data / "train.jsonl").open(encoding="utf-8")):
        total += 1
        if number % 20 == 0:
            row = json.loads(line)
            parts = [row["text"]] if "text" in row else [m["content"] for m in row["messages"]]
            count += sum(len(tokenizer.encode(part)) for part in parts) + 2 * len(parts)
            sample += 1
    print(json.dumps({"vocabulary": tokenizer.get_piece_size(), "train_tokens_about": round(count / sample * total)}))


if __name__ == "__main__":
    main()
