"""Shapes of well-known models, by name: what can be known of them without their files."""

from __future__ import annotations

import dataclasses

from octavo.args import ModelArgs, MoEArgs
from octavo.errors import OptionError

SHAPES = {
    "mixtral-8x7b": ModelArgs(
        dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, vocab_size=32000,
        moe=MoEArgs(8, 2),
    ),
    "mixtral-8x22b": ModelArgs(
        dim=6144, n_layers=56, head_dim=128, hidden_dim=16384, n_heads=48, n_kv_heads=8, vocab_size=32768,
        max_seq_len=65536, moe=MoEArgs(8, 2),
    ),
    "mistral-7b": ModelArgs(
        dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, vocab_size=32000,
        rope_theta=10000.0, sliding_window=4096,
    ),
    "menny": ModelArgs(
        dim=256, n_layers=5, head_dim=32, hidden_dim=256, n_heads=8, n_kv_heads=2, vocab_size=3072, max_seq_len=512,
        moe=MoEArgs(8, 2),
    ),
}  # fmt: skip


def shape(name: str, n_layers: int | None = None) -> ModelArgs:
    """Return a model's shape, perhaps with fewer or more layers.

    Raises:
        OptionError: no such shape.
        ConfigError: the number of layers is not positive.
    """
    if name not in SHAPES:
        raise OptionError(
            f"shape is {name!r}; expected one of {', '.join(SHAPES)}", hint="a folder or Hub id is given with --model"
        )
    args = SHAPES[name]
    return args if n_layers is None else dataclasses.replace(args, n_layers=n_layers)
