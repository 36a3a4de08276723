"""The shape of a model in GGUF metadata, for the architecture "llama", which is what Mistral and Mixtral are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from octavo.args import DEFAULT_ROPE_THETA, SIZE_LIMIT, ModelArgs, MoEArgs
from octavo.errors import CheckpointError, ConfigError
from octavo.storage.source import TensorSource

ARCHITECTURE = "llama"
LLAMA_ROPE_THETA = 10_000.0  # llama.cpp's, where the key is absent
QUANTIZATION_VERSION = 2
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
_HINT = "is this the GGUF file of a Mistral or Mixtral model, and a whole one?"


def gguf_model_args(metadata: Mapping[str, Any], source: TensorSource) -> ModelArgs:
    """Read the shape of a model.

    Two facts come from the tensors: the vocabulary is as long as ``token_embd.weight``, and without ``output.weight``
    the embeddings are tied. A file that says nothing of ``rope.freq_base`` has llama.cpp's 10,000 if it is dense; if
    it has experts it has Mixtral's 1,000,000, which params.json leaves out and converters had to know.

    Args:
        metadata: of a ``GGUFFile`` or ``GGUFSource``.
        source: its tensors.

    Raises:
        ConfigError: a key is missing or makes no sense, or the architecture is another one.
        CheckpointError: there is no embedding.
    """
    try:
        return _Metadata(metadata).args(source)
    except ConfigError as error:
        raise ConfigError(f"{source.location}: {error.message}", error.hint or _HINT) from None


class _Metadata:
    """Typed access to the keys of the architecture."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata

    def args(self, source: TensorSource) -> ModelArgs:
        architecture = self.metadata.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise ConfigError(
                f"general.architecture is {architecture!r}; expected {ARCHITECTURE!r}",
                hint="Octavo runs Mixtral-class models; other architectures need another tool",
            )
        self.refuse_scaled_rope()
        dim, n_heads = self.integer("embedding_length"), self.integer("attention.head_count")
        n_experts = self.integer("expert_count", 0)
        return ModelArgs(
            dim=dim,
            n_layers=self.integer("block_count"),
            head_dim=self.head_dim(dim, n_heads),
            hidden_dim=self.integer("feed_forward_length"),
            n_heads=n_heads,
            n_kv_heads=self.integer("attention.head_count_kv", n_heads),
            vocab_size=_vocab_size(source),
            norm_eps=self.number("attention.layer_norm_rms_epsilon"),
            rope_theta=self.number("rope.freq_base", DEFAULT_ROPE_THETA if n_experts else LLAMA_ROPE_THETA),
            sliding_window=self.integer("attention.sliding_window", 0) or None,
            max_seq_len=self.integer("context_length"),
            tie_embeddings="output.weight" not in source,
            moe=MoEArgs(n_experts, self.integer("expert_used_count")) if n_experts else None,
        )

    def value(self, key: str) -> Any:
        """None where it is absent; what may differ between layers but does not, once."""
        value = self.metadata.get(f"{ARCHITECTURE}.{key}")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            return value[0]
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 <= value < SIZE_LIMIT:
            raise ConfigError(f"{ARCHITECTURE}.{key} is {_shown(value)}; expected a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float):
            raise ConfigError(f"{ARCHITECTURE}.{key} is {_shown(value)}; expected a number")
        return float(str(np.float32(value)))  # 1e-05 is kept as 9.999999747e-06: the shortest number is meant

    def head_dim(self, dim: int, n_heads: int) -> int:
        rotated = self.integer("rope.dimension_count", 0)
        head_dim = self.integer("attention.key_length", 0) or rotated or dim // max(n_heads, 1)
        same = {head_dim, rotated or head_dim, self.integer("attention.value_length", head_dim)}
        if len(same) > 1:
            raise ConfigError(
                f"keys, values and rotary embeddings have {sorted(same)} dimensions a head; expected the same for all"
            )
        return head_dim

    def refuse_scaled_rope(self) -> None:
        kind, factor = self.value("rope.scaling.type"), self.value("rope.scaling.factor")
        if kind not in (None, "none") or factor not in (None, 0.0, 1.0) or self.value("rope.scale_linear") is not None:
            raise ConfigError(
                f"{ARCHITECTURE}.rope.scaling is {kind!r} by {factor!r}; expected none",
                hint="scaled rotary embeddings are not supported; computing without the scaling would be wrong",
            )


def _vocab_size(source: TensorSource) -> int:
    shape = source.info("token_embd.weight").shape
    if len(shape) != 2:
        raise CheckpointError(
            f"{source.location}: token_embd.weight has shape {list(shape)}; expected [vocabulary, dim]", hint=_HINT
        )
    return shape[0]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def gguf_metadata(args: ModelArgs, name: str, encoding: str) -> dict[str, Any]:
    """Return all that llama.cpp wants to know of a model, the tokenizer left out.

    Args:
        args: of the model.
        name: for people to read.
        encoding: of most tensors, one of ``FILE_TYPES``.
    """
    metadata: dict[str, Any] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[encoding],
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    keys: dict[str, Any] = {
        "vocab_size": args.vocab_size,
        "context_length": args.max_seq_len,
        "embedding_length": args.dim,
        "block_count": args.n_layers,
        "feed_forward_length": args.hidden_dim,
        "rope.dimension_count": args.head_dim,
        "rope.freq_base": float(args.rope_theta),
        "attention.head_count": args.n_heads,
        "attention.head_count_kv": args.n_kv_heads,
        "attention.key_length": args.head_dim,
        "attention.value_length": args.head_dim,
        "attention.layer_norm_rms_epsilon": float(args.norm_eps),
    }
    if args.sliding_window is not None:
        keys["attention.sliding_window"] = args.sliding_window
    if args.moe is not None:
        keys |= {"expert_count": args.moe.num_experts, "expert_used_count": args.moe.num_experts_per_tok}
    return metadata | {f"{ARCHITECTURE}.{key}": value for key, value in keys.items()}
