"""The same logits and tokens as transformers, from folders that transformers wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from octavo.cache import make_cache
from octavo.checkpoint.writer import save_folder
from octavo.load import load_model
from octavo.model import Mixtral

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1e6,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "mixtral": {},
    "experts-4-top-1": {"num_local_experts": 4, "num_experts_per_tok": 1},
    "experts-16-top-4": {"num_local_experts": 16, "num_experts_per_tok": 4},
    "experts-4-top-4": {"num_local_experts": 4, "num_experts_per_tok": 4},
    "wide-heads": {"head_dim": 16},
    "narrow-heads": {"head_dim": 4, "num_attention_heads": 6, "num_key_value_heads": 3},
    "one-kv-head": {"num_key_value_heads": 1},
    "full-kv-heads": {"num_key_value_heads": 4},
    "window-5": {"sliding_window": 5},
    "window-16-top-1": {"sliding_window": 16, "num_experts_per_tok": 1},
    "tied": {"tie_word_embeddings": True},
    "theta-1e4": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "theta-5e5-eps": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-3},
    "one-layer-wide": {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 24},
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that attention, routing and logits are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)


def mixtral(changes: dict[str, object], seed: int = 0) -> MixtralForCausalLM:
    settings = BASE | changes
    if "rope_parameters" in settings:
        settings.pop("rope_theta")
    model = MixtralForCausalLM(MixtralConfig(**settings, bos_token_id=1, eos_token_id=2)).eval()
    randomise(model, seed)
    return model


def logits_of(peer: torch.nn.Module, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return peer(ids, use_cache=False, **inputs).logits


def greedy(model: Mixtral, ids: list[int], tokens: int) -> list[int]:
    cache, new, out = make_cache(model.args, 1), ids, []
    for _ in range(tokens):
        new = [int(model(torch.tensor([new]), cache=cache, last_only=True).argmax())]
        out += new
    return out


@pytest.mark.parametrize("original", [True, False], ids=["per-expert", "fused"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens(name: str, original: bool, tmp_path: Path) -> None:
    peer = mixtral(CONFIGS[name], seed=sum(name.encode()))
    peer.save_pretrained(tmp_path, save_original_format=original)
    model, tokenizer = load_model(tmp_path)
    assert tokenizer is None
    ids = torch.randint(3, 97, (3, 37), generator=torch.Generator().manual_seed(1))
    expected = logits_of(peer, ids)
    actual = model(ids)
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()

    prompt = ids[:1, :9]
    with torch.inference_mode():
        theirs = peer.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, 9:].tolist()
    assert greedy(model, prompt[0].tolist(), 64) == theirs


@pytest.mark.parametrize("name", ["mixtral", "window-5", "wide-heads"])
def test_left_padded_batch_equals_single_prompts(name: str, tmp_path: Path) -> None:
    peer = mixtral(CONFIGS[name])
    peer.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 97, (n,), generator=generator) for n in (3, 11, 7)]
    longest = max(len(p) for p in prompts)
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(p)).long() for p in prompts])
    positions = mask.cumsum(1) - 1
    assert positions.min() == -1
    batched = model(ids, positions_BT=positions)
    theirs = logits_of(peer, ids, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        alone = model(prompt[None])[0]
        mine = batched[row, -len(prompt) :]
        assert torch.allclose(mine, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
        assert torch.allclose(mine, theirs[row, -len(prompt) :], rtol=0, atol=1e-5 * float(alone.abs().max()))


def test_dense_mistral(tmp_path: Path) -> None:
    settings = {k: v for k, v in BASE.items() if "expert" not in k}
    peer = MistralForCausalLM(MistralConfig(**settings, sliding_window=6)).eval()
    randomise(peer, 3)
    peer.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    assert model.args.moe is None
    ids = torch.arange(3, 40)[None]
    expected = logits_of(peer, ids)
    assert (model(ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one-file", "shards"])
@pytest.mark.parametrize("name", ["mixtral", "tied"])
def test_our_folders_load_in_transformers(name: str, shard_bytes: int, tmp_path: Path) -> None:
    peer = mixtral(CONFIGS[name])
    peer.save_pretrained(tmp_path / "theirs")
    model, _ = load_model(tmp_path / "theirs")
    save_folder(model.args, model.state_dict(), tmp_path / "ours", shard_bytes=shard_bytes)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (shard_bytes < 10**9)
    again = MixtralForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    for (key, value), (_, original) in zip(again.state_dict().items(), peer.state_dict().items(), strict=True):
        assert torch.equal(value, original), key
    reloaded, _ = load_model(tmp_path / "ours")
    ids = torch.arange(3, 40)[None]
    assert torch.equal(reloaded(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    peer = mixtral({}).to(dtype)
    peer.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.tensor([[1, 5, 9]])).dtype == torch.float32
    wide, _ = load_model(tmp_path, dtype="float32")
    # read again: `peer.float()` would keep rotary frequencies that were rounded to 16 bits
    peer = MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = logits_of(peer, torch.tensor([[1, 5, 9]]))
    assert torch.allclose(wide(torch.tensor([[1, 5, 9]])), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
