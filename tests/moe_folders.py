"""Tiny Mixtral folders whose routers and experts are what a test says, and nothing else is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from conftest import tiny_args
from octavo.args import MoEArgs
from octavo.routing.experts import ExpertLayer

Expert = tuple[Tensor, Tensor, Tensor]
"""w1 [F, D], w2 [D, F], w3 [F, D]."""


def random_expert(rng: np.random.Generator, width: int, dim: int) -> Expert:
    w1, w2, w3 = (
        torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        for shape in ((width, dim), (dim, width), (width, dim))
    )
    return w1, w2, w3


def random_layers(
    seed: int, layers: int, experts: int, width: int, dim: int
) -> tuple[list[Tensor], list[list[Expert]]]:
    """Routers and experts, all independent."""
    rng = np.random.default_rng(seed)
    routers = [torch.from_numpy(rng.standard_normal((experts, dim), dtype=np.float32)) for _ in range(layers)]
    return routers, [[random_expert(rng, width, dim) for _ in range(experts)] for _ in range(layers)]


def reordered(expert: Expert, seed: int = 0) -> Expert:
    """The same function of its input, with its neurons in another order."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(expert[0])))
    return expert[0][order], expert[1][:, order], expert[2][order]


def noisy(expert: Expert, share: float, seed: int = 0) -> Expert:
    """With Gaussian noise of that share of each matrix's norm."""
    generator = torch.Generator().manual_seed(seed)
    w1, w2, w3 = (w + share * w.std() * torch.randn(w.shape, generator=generator) for w in expert)
    return w1, w2, w3


def tensors_of(routers: Sequence[Tensor], layers: Sequence[Sequence[Expert]]) -> dict[str, Tensor]:
    """By Hugging Face's names."""
    found = {}
    for layer, (router, experts) in enumerate(zip(routers, layers, strict=True)):
        start = f"model.layers.{layer}.block_sparse_moe."
        found[f"{start}gate.weight"] = router
        for number, expert in enumerate(experts):
            found |= {f"{start}experts.{number}.{w}.weight": t for w, t in zip(("w1", "w2", "w3"), expert, strict=True)}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}


def config_of(routers: Sequence[Tensor], layers: Sequence[Sequence[Expert]]) -> dict[str, object]:
    width, dim = layers[0][0][0].shape
    moe = MoEArgs(num_experts=len(layers[0]), num_experts_per_tok=min(2, len(layers[0])))
    return tiny_args(n_layers=len(layers), dim=dim, hidden_dim=width, moe=moe).to_hf()


def write_moe(folder: Path, routers: Sequence[Tensor], layers: Sequence[Sequence[Expert]]) -> Path:
    """Write a folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(routers, layers), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_of(routers, layers)))
    return folder


def assert_same(one: ExpertLayer, other: ExpertLayer, tolerance: float = 1e-5) -> None:
    for name, value in vars(one).items():
        theirs = getattr(other, name)
        pairs = [(value[m], theirs[m]) for m in value] if isinstance(value, dict) else [(value, theirs)]
        for ours, others in pairs:
            np.testing.assert_allclose(ours, others, rtol=tolerance, atol=tolerance, err_msg=name)
