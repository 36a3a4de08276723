"""config.json in all its spellings, and back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig

from octavo.args import ModelArgs, MoEArgs
from octavo.errors import ConfigError

MIXTRAL_8X22B: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 65536,
    "sliding_window": None,
    "hidden_act": "silu",
}


def read(**changes: object) -> ModelArgs:
    return ModelArgs.from_hf(MIXTRAL_8X22B | changes)


def test_mixtral_8x22b() -> None:
    args = read()
    assert (args.head_dim, args.moe, args.max_seq_len) == (128, MoEArgs(8, 2), 65536)
    assert round(args.n_params / 1e9, 2) == 140.62
    assert round(args.n_active_params / 1e9, 2) == 39.15
    assert args.expert_params == 301_989_888


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": 1e4}, 1e4),
        ({"rope_theta": None}, 1e6),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 1e4, "rope_scaling": None}, 1e4),
    ],
)
def test_theta_of_either_transformers(changes: dict[str, object], theta: float) -> None:
    assert read(**changes).rope_theta == theta


@pytest.mark.parametrize(
    ("written", "window"), [(None, None), (4096, 4096), ("4096", 4096), ([4096], 4096), ([64, 64], 64), ([None], None)]
)
def test_sliding_window_in_all_spellings(written: object, window: int | None) -> None:
    assert read(sliding_window=written).sliding_window == window
    without = {key: value for key, value in MIXTRAL_8X22B.items() if key != "sliding_window"}
    assert ModelArgs.from_hf(without | {"_sliding_window": written}).sliding_window == window


def test_absent_keys_that_may_be_absent() -> None:
    args = read(head_dim=None, num_key_value_heads=None)
    assert (args.head_dim, args.n_kv_heads) == (128, 48)
    assert read(head_dim=64).head_dim == 64
    assert read(model_type="mistral").moe is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"num_local_experts": None}, "'num_local_experts' is missing"),
        ({"num_experts_per_tok": 9}, "only 8 experts"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        ({"num_attention_heads": -3}, "num_attention_heads is -3"),
        ({"num_key_value_heads": 7}, "does not divide"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rms_norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_type is 'linear'"),
        ({"rope_parameters": 3}, "rope_parameters is 3"),
        ({"sliding_window": [64, None]}, "sliding_window is"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"sliding_window": {"a": 1}}, "sliding_window is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": 10**12}, "hidden_size is 1e"),
    ],
)
def test_nonsense_is_named_with_its_file(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        ModelArgs.from_hf(MIXTRAL_8X22B | changes, where="some/config.json")
    assert caught.value.message.startswith("some/config.json")
    assert caught.value.hint


sizes = st.integers(1, 64)


@given(
    dim=sizes,
    layers=sizes,
    pairs=sizes,
    hidden=sizes,
    kv=sizes,
    group=sizes,
    vocab=sizes,
    window=st.none() | sizes,
    moe=st.none() | st.tuples(sizes, sizes).map(lambda t: MoEArgs(max(t), min(t))),
    tie=st.booleans(),
    theta=st.floats(1, 1e8),
)
def test_out_and_in_again(
    dim: int,
    layers: int,
    pairs: int,
    hidden: int,
    kv: int,
    group: int,
    vocab: int,
    window: int | None,
    moe: MoEArgs | None,
    tie: bool,
    theta: float,
) -> None:
    args = ModelArgs(
        dim=dim,
        n_layers=layers,
        head_dim=2 * pairs,
        hidden_dim=hidden,
        n_heads=kv * group,
        n_kv_heads=kv,
        vocab_size=vocab,
        sliding_window=window,
        rope_theta=theta,
        tie_embeddings=tie,
        moe=moe,
    )
    assert ModelArgs.from_hf(args.to_hf()) == args


def test_what_a_dense_config_leaves_out_is_what_transformers_takes() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    args = ModelArgs.from_hf(sizes | {"model_type": "mistral", "vocab_size": 50})
    theirs = MistralConfig(**sizes, vocab_size=50)
    assert args.norm_eps == theirs.rms_norm_eps
    assert args.rope_theta == theirs.rope_parameters["rope_theta"]
    assert args.sliding_window == theirs.sliding_window
    assert (
        ModelArgs.from_hf(sizes | {"model_type": "mistral", "vocab_size": 50, "sliding_window": None}).sliding_window
        is None
    )


def test_params_round_trip_and_theta() -> None:
    args = ModelArgs.from_hf(MIXTRAL_8X22B)
    assert ModelArgs.from_params(args.to_params()) == args
    params = {key: value for key, value in args.to_params().items() if key != "rope_theta"}
    assert ModelArgs.from_params(params).rope_theta == 1e6
    assert ModelArgs.from_params(params | {"sliding_window": 4096}).rope_theta == 1e6
    dense = {key: value for key, value in params.items() if key != "moe"}
    assert ModelArgs.from_params(dense).rope_theta == 1e6
    assert ModelArgs.from_params(dense | {"_sliding_window": 4096}).rope_theta == 1e4  # Mistral 7B v0.1
