"""Tiny random models of every family, as transformers makes and saves them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

HIDDEN, EXPERTS, LAYERS = 16, 4, 2
SIZES = {
    "vocab_size": 32,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
QWEN = {"moe_intermediate_size": 8, "num_experts": EXPERTS, "num_experts_per_tok": 2}
DEEPSEEK = {
    "moe_intermediate_size": 8,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
LLAMA = {"intermediate_size_mlp": 20, "head_dim": 4, "num_local_experts": EXPERTS, "num_experts_per_tok": 1}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vision_output_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
# The class of the peer, its configuration, and what it has beside routers and experts (router's own first).
SHARED_EXPERT = [f"shared_expert.{w}_proj.weight" for w in ("gate", "up", "down")]
SHARED_EXPERTS = [f"shared_experts.{w}_proj.weight" for w in ("gate", "up", "down")]
PEERS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mixtral": ("Mixtral", SIZES | LOCAL, []),
    "phimoe": ("Phimoe", SIZES | LOCAL, []),
    "minimax": ("MiniMax", SIZES | LOCAL | {"head_dim": 4}, []),
    "minimax_m2": ("MiniMaxM2", SIZES | LOCAL | {"head_dim": 4}, ["e_score_correction_bias"]),
    "qwen2_moe": (
        "Qwen2Moe",
        SIZES | QWEN | {"shared_expert_intermediate_size": 12, "mlp_only_layers": [0]},
        [*SHARED_EXPERT, "shared_expert_gate.weight"],
    ),
    "qwen3_moe": ("Qwen3Moe", SIZES | QWEN | {"head_dim": 4, "decoder_sparse_step": 2}, []),
    "olmoe": ("Olmoe", SIZES | {"num_experts": EXPERTS, "num_experts_per_tok": 2}, []),
    "deepseek_v2": ("DeepseekV2", SIZES | DEEPSEEK | LATENT, SHARED_EXPERTS),
    "deepseek_v3": ("DeepseekV3", SIZES | DEEPSEEK | LATENT, ["e_score_correction_bias", *SHARED_EXPERTS]),
    "glm4_moe": ("Glm4Moe", SIZES | DEEPSEEK | {"head_dim": 4}, ["e_score_correction_bias", *SHARED_EXPERTS]),
    "dbrx": (
        "Dbrx",
        {
            "d_model": HIDDEN,
            "n_heads": 4,
            "n_layers": LAYERS,
            "max_seq_len": 64,
            "vocab_size": 32,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": HIDDEN,
                "ffn_hidden_size": 24,
                "moe_num_experts": EXPERTS,
                "moe_top_k": 2,
            },
        },
        [],
    ),
    "granitemoe": ("GraniteMoe", SIZES | LOCAL, []),
    "gpt_oss": (
        "GptOss",
        SIZES | LOCAL | {"head_dim": 4},
        ["router.bias", "experts.gate_up_proj_bias", "experts.down_proj_bias"],
    ),
    "llama4_text": ("Llama4", SIZES | LLAMA | {"interleave_moe_layer_step": 2}, SHARED_EXPERT),
    "llama4": (
        "Llama4",
        {"text_config": SIZES | LLAMA | {"interleave_moe_layer_step": 1}, "vision_config": VISION},
        SHARED_EXPERT,
    ),
}
DENSE_FIRST = {"qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "llama4_text"}
APART = "per expert"
FUSED = "fused"


def peer_classes(family: str) -> tuple[Any, Any]:
    name = PEERS[family][0]
    config = "Llama4TextConfig" if family == "llama4_text" else f"{name}Config"
    model = "Llama4ForConditionalGeneration" if family == "llama4" else f"{name}ForCausalLM"
    return getattr(transformers, config), getattr(transformers, model)


@functools.cache
def peer_model(family: str) -> Any:
    config, model = peer_classes(family)
    torch.manual_seed(0)
    peer = model(config(**PEERS[family][1])).eval().requires_grad_(False)
    for name, parameter in peer.named_parameters():
        if "experts" in name and "bias" in name:  # not part of the logical matrices
            parameter.zero_()
        else:
            parameter.normal_(std=0.3)
    return peer


def saver(home: Path) -> Callable[..., Path]:
    """Return what saves a family's model as transformers does, once for each way, and returns the folder."""

    @functools.cache
    def save(family: str, way: str = APART, max_shard_size: str = "5GB") -> Path:
        folder = home / f"{family} {way} {max_shard_size}"
        peer_model(family).save_pretrained(folder, save_original_format=way == APART, max_shard_size=max_shard_size)
        return folder

    return save


def copy_of(folder: Path, target: Path, **config: object) -> Path:
    """The same model with another configuration; None takes a key away."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    changed = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
    return target
