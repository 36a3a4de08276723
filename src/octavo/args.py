"""The shape of a model: frozen, validated, and known before a single tensor is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.errors import ConfigError

DEFAULT_ROPE_THETA = 1_000_000.0  # Mixtral's; its params.json leaves it out
DENSE_ROPE_THETA = 10_000.0  # Mistral 7B's, likewise; and transformers' for a MistralConfig
DENSE_WINDOW = 4096  # transformers' for a MistralConfig that does not speak of it
DEFAULT_MAX_SEQ_LEN = 32_768
SIZE_LIMIT = 2**31  # of any one size, and
PARAMS_LIMIT = 2**50  # of all parameters together: beyond lies nonsense, and then overflow
FLOAT_LIMIT = 1e300  # JSON's whole numbers may be larger than any float


@dataclass(frozen=True)
class MoEArgs:
    """The sparse part: how many experts a block has, and how many a token visits."""

    num_experts: int
    num_experts_per_tok: int

    def __post_init__(self) -> None:
        _positive(self, "num_experts", "num_experts_per_tok")
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but there are only {self.num_experts} experts",
                hint="a token cannot visit more experts than there are; Mixtral has 8 and visits 2",
            )


@dataclass(frozen=True)
class ModelArgs:
    """Everything about a model's architecture, by the authors' names.

    ``moe=None`` is a dense Mistral. ``sliding_window=W`` lets a token see itself and the W - 1 before it.

    Raises:
        ConfigError: a size is not a positive integer, or sizes do not fit each other.
    """

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = DEFAULT_ROPE_THETA
    sliding_window: int | None = None
    max_seq_len: int = DEFAULT_MAX_SEQ_LEN
    tie_embeddings: bool = False
    moe: MoEArgs | None = None

    def __post_init__(self) -> None:
        _positive(
            self,
            "dim",
            "n_layers",
            "head_dim",
            "hidden_dim",
            "n_heads",
            "n_kv_heads",
            "vocab_size",
            "max_seq_len",
        )
        if self.sliding_window is not None:
            _positive(self, "sliding_window")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads is {self.n_heads}, which n_kv_heads = {self.n_kv_heads} does not divide",
                hint="grouped-query attention shares each key-value head between equally many query heads",
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embeddings rotate pairs and need an even number")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")):
                raise ConfigError(f"{name} is {value!r}; expected a positive number")
        if self.n_params >= PARAMS_LIMIT:
            raise ConfigError(f"the sizes make a model of {self.n_params:.1e} parameters, more than any machine holds")

    @property
    def attention_params(self) -> int:
        """Parameters of one block's attention: wq, wk, wv and wo."""
        return 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)

    @property
    def expert_params(self) -> int:
        """Parameters of one SwiGLU feed-forward network: w1, w2 and w3."""
        return 3 * self.dim * self.hidden_dim

    def _count(self, experts: int) -> int:
        router = self.moe.num_experts * self.dim if self.moe else 0
        block = self.attention_params + experts * self.expert_params + router + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.n_layers * block + embeddings + self.dim

    @property
    def n_params(self) -> int:
        """All parameters: 46,702,792,704 for Mixtral 8x7B."""
        return self._count(self.moe.num_experts if self.moe else 1)

    @property
    def n_active_params(self) -> int:
        """Parameters one token touches, both embeddings counted whole: 12,879,925,248 for Mixtral 8x7B."""
        return self._count(self.moe.num_experts_per_tok if self.moe else 1)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = "config.json") -> ModelArgs:
        """Read a Hugging Face ``config.json`` of a Mixtral or Mistral.

        Args:
            config: the parsed JSON; both transformers 4 and 5 spellings are read.
            where: the file's name, for error messages.

        Raises:
            ConfigError: a key is missing or makes no sense, or the architecture is another one.
        """
        return _read(_HFConfig(config, where))

    @classmethod
    def from_params(cls, params: Mapping[str, Any], where: str = "params.json") -> ModelArgs:
        """Read Mistral's own ``params.json``, or the ``config.json`` with the same keys of MLX's first examples.

        Args:
            params: the parsed JSON.
            where: the file's name, for error messages.

        Raises:
            ConfigError: a key is missing or makes no sense.
        """
        return _read(_MistralConfig(params, where))

    def to_params(self) -> dict[str, Any]:
        """Return the ``params.json`` that mistral-inference reads."""
        params: dict[str, Any] = {
            "dim": self.dim,
            "n_layers": self.n_layers,
            "head_dim": self.head_dim,
            "hidden_dim": self.hidden_dim,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "norm_eps": self.norm_eps,
            "vocab_size": self.vocab_size,
            "rope_theta": self.rope_theta,
            "max_seq_len": self.max_seq_len,
        }
        if self.sliding_window is not None:
            params["sliding_window"] = self.sliding_window
        if self.tie_embeddings:
            params["tied_embeddings"] = True
        if self.moe:
            params["moe"] = {
                "num_experts": self.moe.num_experts,
                "num_experts_per_tok": self.moe.num_experts_per_tok,
            }
        return params

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json`` that transformers reads as MixtralForCausalLM (or MistralForCausalLM)."""
        config: dict[str, Any] = {
            "architectures": ["MixtralForCausalLM" if self.moe else "MistralForCausalLM"],
            "model_type": "mixtral" if self.moe else "mistral",
            "hidden_act": "silu",
            "hidden_size": self.dim,
            "intermediate_size": self.hidden_dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "sliding_window": self.sliding_window,
            "max_position_embeddings": self.max_seq_len,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_embeddings,
        }
        if self.moe:
            config["num_local_experts"] = self.moe.num_experts
            config["num_experts_per_tok"] = self.moe.num_experts_per_tok
        return config


class _Config:
    """One JSON object being read: typed access with errors that name the file and the key."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise ConfigError(
                    f"{self.where}: the key {key!r} is missing; expected a positive integer",
                    hint="is this the file that came with the weights?",
                )
            return default
        return _check_size(key, value)

    def number(self, value: Any, key: str, default: float) -> float:
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > FLOAT_LIMIT:
            raise ConfigError(f"{self.where}: {key} is {value!r}; expected a number")
        return float(value)

    def nested(self, key: str) -> Mapping[str, Any]:
        value = self.config.get(key) or {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}: {key} is {value!r}; expected an object")
        return value

    def sliding_window(self, default: int | None = None) -> int | None:
        """Accept null, an integer, a numeric string or a list of equal values."""
        key = "sliding_window" if "sliding_window" in self.config else "_sliding_window"
        value = self.config.get(key, default)
        values = value if isinstance(value, list) else [value]
        windows = {
            int(v) if isinstance(v, str) and v.isdigit() else v for v in values if not isinstance(v, list | dict)
        }
        if len(windows) == 1:
            window = windows.pop()
            if window is None or (isinstance(window, int) and not isinstance(window, bool) and window > 0):
                return window
        raise ConfigError(
            f"{self.where}: {key} is {value!r}; expected null or one positive integer for all layers",
            hint="windows that differ between layers are not supported",
        )


class _HFConfig(_Config):
    """Hugging Face's ``config.json``."""

    def args(self) -> ModelArgs:
        kind = self.config.get("model_type")
        if kind not in ("mixtral", "mistral"):
            raise ConfigError(
                f"{self.where}: model_type is {kind!r}; expected 'mixtral' or 'mistral'",
                hint="Octavo runs Mixtral-class models; other architectures need another tool",
            )
        activation = self.config.get("hidden_act", "silu")
        if activation != "silu":
            raise ConfigError(f"{self.where}: hidden_act is {activation!r}; expected 'silu', SwiGLU's activation")
        dense = kind == "mistral"
        dim, n_heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        return ModelArgs(
            dim=dim,
            n_layers=self.integer("num_hidden_layers"),
            head_dim=self.integer("head_dim", default=max(dim // max(n_heads, 1), 1)),
            hidden_dim=self.integer("intermediate_size"),
            n_heads=n_heads,
            n_kv_heads=self.integer("num_key_value_heads", default=n_heads),
            vocab_size=self.integer("vocab_size"),
            norm_eps=self.number(self.config.get("rms_norm_eps"), "rms_norm_eps", 1e-6 if dense else 1e-5),
            rope_theta=self.rope_theta(DENSE_ROPE_THETA if dense else DEFAULT_ROPE_THETA),
            sliding_window=self.sliding_window(DENSE_WINDOW if dense else None),
            max_seq_len=self.integer("max_position_embeddings", default=DEFAULT_MAX_SEQ_LEN),
            tie_embeddings=bool(self.config.get("tie_word_embeddings", False)),
            moe=None if dense else self.moe(),
        )

    def moe(self) -> MoEArgs:
        return MoEArgs(self.integer("num_local_experts"), self.integer("num_experts_per_tok"))

    def rope_theta(self, default: float) -> float:
        """Find theta where transformers 4 (top level) or 5 (``rope_parameters``) put it."""
        nested = self.nested("rope_parameters") or self.nested("rope_scaling")
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default":
            raise ConfigError(
                f"{self.where}: rope_type is {kind!r}; expected 'default'",
                hint="scaled rotary embeddings are not supported; computing without the scaling would be wrong",
            )
        return self.number(nested.get("rope_theta", self.config.get("rope_theta")), "rope_theta", default)


class _MistralConfig(_Config):
    """Mistral's ``params.json``, and the ``config.json`` of MLX's first examples, which has the same keys."""

    def args(self) -> ModelArgs:
        dim, n_heads = self.integer("dim"), self.integer("n_heads")
        moe = _Config(self.nested("moe"), f"{self.where}: moe")
        window = self.sliding_window()
        # As the authors' code had it while Mistral 7B with its window was the only model.
        theta = DENSE_ROPE_THETA if window and not moe.config else DEFAULT_ROPE_THETA
        return ModelArgs(
            dim=dim,
            n_layers=self.integer("n_layers"),
            head_dim=self.integer("head_dim", default=max(dim // max(n_heads, 1), 1)),
            hidden_dim=self.integer("hidden_dim"),
            n_heads=n_heads,
            n_kv_heads=self.integer("n_kv_heads", default=n_heads),
            vocab_size=self.integer("vocab_size"),
            norm_eps=self.number(self.config.get("norm_eps"), "norm_eps", 1e-5),
            rope_theta=self.number(self.config.get("rope_theta"), "rope_theta", theta),
            sliding_window=window,
            max_seq_len=self.integer("max_seq_len", default=DEFAULT_MAX_SEQ_LEN),
            tie_embeddings=bool(self.config.get("tied_embeddings", False)),
            moe=MoEArgs(moe.integer("num_experts"), moe.integer("num_experts_per_tok")) if moe.config else None,
        )


def _read(config: _HFConfig | _MistralConfig) -> ModelArgs:
    """Read it, and see to it that an error names the file."""
    try:
        return config.args()
    except ConfigError as error:
        message = error.message if error.message.startswith(config.where) else f"{config.where}: {error.message}"
        raise ConfigError(message, error.hint or "is this the file that came with the weights?") from None


def _positive(args: object, *names: str) -> None:
    for name in names:
        _check_size(name, getattr(args, name))


def _check_size(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{name} is {value!r}; expected a positive integer")
    if value >= SIZE_LIMIT:
        shown = f"{value:.3g}" if value < PARAMS_LIMIT else "far too large"
        raise ConfigError(f"{name} is {shown}; expected a positive integer below {SIZE_LIMIT}")
    return value
