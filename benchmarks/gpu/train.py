"""`octavo train` on the card: tokens a second and model FLOP utilisation, lap after lap.

    python benchmarks/gpu/train.py

A sparse model of 1.25 B parameters, 8 experts of which 2 are active, rows of 2,048 tokens, random words. Weights and
AdamW's state are float32 (15 GB with the final checkpoint on the disk, in --folder), products bfloat16.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import options, setting

from octavo.llm import shipped_model
from octavo.train.config import TrainConfig
from octavo.train.trainer import train

MODEL = {"dim": 2048, "n_layers": 6, "head_dim": 128, "hidden_dim": 3584, "n_heads": 16, "n_kv_heads": 4}
TINY = {"dim": 64, "n_layers": 2, "head_dim": 32, "hidden_dim": 64, "n_heads": 2, "n_kv_heads": 1}
SYLLABLES = ("ba", "ten", "lo", "mir", "sa", "kel", "du", "ran", "fi", "sho")


def write_text(path: Path, documents: int, words: int) -> None:
    """Documents of random words."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(documents):
            text = " ".join("".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(words))
            file.write(json.dumps({"text": text}) + "\n")


def settings(folder: Path, device: str, tiny: bool, rows: int, steps: int) -> dict[str, Any]:
    """The tables of the run's TOML file."""
    length = 64 if tiny else 2048
    shape = TINY if tiny else MODEL
    return {
        "model": shape
        | {"vocab_size": 3072 if tiny else 32000, "max_seq_len": length}
        | {"moe": {"num_experts": 8, "num_experts_per_tok": 2}},
        "data": {"train": str(folder / "text.jsonl"), "tokenizer": str(shipped_model()), "seq_len": length},
        "optim": {"steps": steps, "warmup_steps": 2, "lr": 3e-4, "batch_rows": rows},
        "run": {
            "out": str(folder / "run"),
            "device": device,
            "dtype": "bfloat16" if device == "cuda" else "auto",
            "log_every": max(1, steps // 8),
            "checkpoint_every": 0,
            "keep": 1,
        },
    }


def main() -> None:
    """Train, and tell how fast."""
    parser = options(__doc__)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, help="where the run is written, and deleted again")
    chosen = parser.parse_args()
    where = setting(chosen)
    rows, steps = (2, 4) if where.tiny else (chosen.rows, chosen.steps)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        write_text(folder / "text.jsonl", 20 if where.tiny else 2000, 200 if where.tiny else 1000)
        result = train(TrainConfig.from_dict(settings(folder, where.device.type, where.tiny, rows, steps)))
        laps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    later = [lap for lap in laps if "mfu" in lap][1:]  # the first has the start in it
    found = {
        "rows": rows,
        "steps": steps,
        "tokens_per_s": statistics.median(lap["tokens_per_s"] for lap in later),
        "mfu": statistics.median(lap["mfu"] for lap in later),
        "tokens_per_s_of_all": result.tokens_per_s,
        "cross_entropy": result.ce,
    }
    if where.device.type == "cuda":
        found["card_peak_bytes"] = torch.cuda.max_memory_allocated()
    where.tell("train", found)


if __name__ == "__main__":
    main()
