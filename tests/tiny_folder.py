"""A model folder as `octavo train` leaves it: random tiny weights, and a tokenizer trained here."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece

from conftest import tiny_model
from octavo.checkpoint.writer import save_folder

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A mixture of experts sends every token to two of eight experts, which the router chooses.",
    "Wer reist, hat viel zu erzählen; wer liest, auch. Où est la bibliothèque, s'il vous plaît ?",
] * 4
VOCAB_SIZE = 420


def make_tiny_folder(folder: Path, *, converses: bool = True, seed: int = 1, **changes: object) -> Path:
    """Write the folder and return it.

    Args:
        converses: `[INST]` and `[/INST]` are control tokens, so that the model counts as a chat model.
        changes: fields of `ModelArgs`, over those of `conftest.tiny_args`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = folder.parent / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]", "[/INST]"] if converses else [],
        minloglevel=2,
    )
    model = tiny_model(seed=seed, vocab_size=VOCAB_SIZE, **changes)
    save_folder(model.args, model.state_dict(), folder, copy=(prefix.with_suffix(".model"),))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder
