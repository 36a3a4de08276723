"""What a checkpoint says of itself beside its weights: the model's shape, and where texts end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.args import ModelArgs, MoEArgs
from octavo.errors import ConfigError
from octavo.storage.folder import Folder
from octavo.storage.source import TensorSource

CONFIG, PARAMS, GENERATION = "config.json", "params.json", "generation_config.json"
# The authors' first files came without a word about their shape, and their heads cannot be counted from outside.
PUBLISHED = (
    ModelArgs(4096, 32, 128, 14336, 32, 8, 32000, moe=MoEArgs(8, 2)),
    ModelArgs(6144, 56, 128, 16384, 48, 8, 32768, max_seq_len=65536, moe=MoEArgs(8, 2)),
    ModelArgs(6144, 56, 128, 16384, 48, 8, 32000, max_seq_len=65536, moe=MoEArgs(8, 2)),
)
"""Mixtral 8x7B; 8x22B Instruct; 8x22B."""


def read_config(folder: Folder) -> dict[str, Any]:
    """Return ``config.json``, or {} where there is none.

    Raises:
        ConfigError: it is no JSON object.
    """
    return folder.json(CONFIG) if CONFIG in folder.files() else {}


def read_args(folder: Folder, config: Mapping[str, Any], stored: TensorSource) -> ModelArgs:
    """Find the model's shape in ``config.json`` (of Hugging Face or MLX), ``params.json``, or the published sizes.

    Where both files are there, Mistral's own weights (``tok_embeddings.weight``) go with ``params.json``.

    Raises:
        ConfigError: none of them tells it, or what they tell makes no sense.
    """
    own = "tok_embeddings.weight" in stored
    where = f"{folder.location}/{CONFIG}"
    if PARAMS in folder.files() and (own or not config):
        return ModelArgs.from_params(folder.json(PARAMS), where=f"{folder.location}/{PARAMS}")
    if config and "dim" in config and "hidden_size" not in config:
        return ModelArgs.from_params(config, where=where)
    if config or not own:
        return ModelArgs.from_hf(folder.json(CONFIG), where=where)
    found = _sizes(stored)
    for args in PUBLISHED:
        if found == (args.vocab_size, args.dim, args.n_layers):
            return args
    raise ConfigError(
        f"{folder.location}: holds neither {CONFIG} nor {PARAMS}, and the weights are of no published Mixtral's sizes",
        hint=f"put the model's {CONFIG} or {PARAMS} beside its weights",
    )


def _sizes(stored: TensorSource) -> tuple[int, ...]:
    """Vocabulary, width and depth of weights under Mistral's names."""
    shape = stored.info("tok_embeddings.weight").shape
    return (*shape, sum(name.endswith(".attention_norm.weight") for name in stored.names()))


def read_eos_ids(folder: Folder) -> tuple[int, ...]:
    """Return the end-of-text ids of a folder's ``generation_config.json``, if it has one: an id, a list, or none.

    Raises:
        ConfigError: the file is no JSON object, or its eos_token_id is neither.
    """
    if GENERATION not in folder.files():
        return ()
    value = folder.json(GENERATION).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise ConfigError(
            f"{folder.location}/{GENERATION}: eos_token_id is {value!r}; expected a token id, a list of them, or null",
            hint="is this the file that came with the weights?",
        )
    return tuple(ids)
