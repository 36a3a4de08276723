"""Shared fixtures: random tiny models, in memory and as folders that transformers wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # the card's kernels, before anything defines them: on this CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from octavo import kernels
from octavo.args import ModelArgs, MoEArgs
from octavo.model import Mixtral

torch.set_num_threads(1)  # tiny tensors: a second thread only waits
needs_compiled = pytest.mark.skipif(
    not kernels.backend().compiled, reason=f"no compiled kernels: {kernels.backend().reason}"
)


@pytest.fixture
def own_kernels() -> Iterator[None]:
    """A test may choose kernels and their threads; others find them as they were."""
    threads = kernels.threads()
    yield
    kernels.use(None)
    kernels.set_threads(threads)


def tiny_args(**changes: object) -> ModelArgs:
    """A Mixtral small enough to run in milliseconds; ``changes`` replace fields."""
    fields: dict[str, object] = {
        "dim": 32,
        "n_layers": 2,
        "head_dim": 8,
        "hidden_dim": 48,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 101,
        "max_seq_len": 256,
        "moe": MoEArgs(num_experts=8, num_experts_per_tok=2),
    }
    return ModelArgs(**(fields | changes))  # type: ignore[arg-type]


def tiny_model(seed: int = 0, **changes: object) -> Mixtral:
    """A random Mixtral with weights large enough that routing and logits vary."""
    torch.manual_seed(seed)
    model = Mixtral(tiny_args(**changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
        else:
            parameter.normal_(std=0.25)
    return model


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody's own keys are sent to anybody by a test."""
    for name in ("OCTAVO_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
