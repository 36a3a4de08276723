"""A tokenizer, documents and a config small enough to train on in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import sentencepiece

from octavo.tokenizer import Tokenizer
from octavo.train.config import TrainConfig

CONTROLS = ["[INST]", "[/INST]"]


def sums(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions about sums, and now and then a plain sentence."""
    rng = random.Random(seed)
    made: list[dict[str, Any]] = []
    for _ in range(count):
        a, b = rng.randrange(20), rng.randrange(20)
        if rng.random() < 0.3:
            made.append({"text": f"After {a} comes {a + 1}."})
            continue
        question = {"role": "user", "content": f"What is {a} plus {b}?"}
        made.append({"messages": [question, {"role": "assistant", "content": f"{a} plus {b} is {a + b}."}]})
    return made


def make_tokenizer(folder: Path, vocab_size: int = 320, controls: list[str] | None = None) -> Tokenizer:
    """Train a byte-fallback BPE on the sums; with the control tokens of the v3 template unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [t for d in sums(400) for t in [d.get("text") or d["messages"][0]["content"]]]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=CONTROLS if controls is None else controls,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return Tokenizer.from_file(folder / "tokenizer.model")


def make_world(folder: Path) -> Path:
    """Write tokenizer.model, train.jsonl and heldout.jsonl into a folder."""
    make_tokenizer(folder)
    for name, count, seed in (("train", 600, 1), ("heldout", 60, 2)):
        lines = "".join(json.dumps(d) + "\n" for d in sums(count, seed))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def tables(world: Path, out: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """The config's tables; `changes` update them table by table, None removes a key."""
    made: dict[str, dict[str, Any]] = {
        "model": {
            "dim": 32, "n_layers": 2, "head_dim": 8, "hidden_dim": 32, "n_heads": 4, "n_kv_heads": 2,
            "vocab_size": 320, "moe": {"num_experts": 4, "num_experts_per_tok": 2},
        },
        "data": {
            "train": str(world / "train.jsonl"), "heldout": str(world / "heldout.jsonl"),
            "tokenizer": str(world / "tokenizer.model"), "seq_len": 48,
        },
        "optim": {"steps": 12, "lr": 5e-3, "warmup_steps": 4, "batch_rows": 4},
        "loss": {},
        "run": {
            "out": str(out), "device": "cpu", "dtype": "float32", "threads": 1, "log_every": 1, "eval_every": 6,
            "eval_rows": 16, "checkpoint_every": 6,
        },
    }  # fmt: skip
    for table, change in changes.items():
        made[table] = {k: v for k, v in {**made[table], **change}.items() if v is not None}
    return made


def make_config(world: Path, out: Path, **changes: dict[str, Any]) -> TrainConfig:
    """`tables`, checked and built."""
    return TrainConfig.from_dict(tables(world, out, **changes))
