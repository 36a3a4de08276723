"""A model on the card gives the logits of the same one on the CPU's kernels, and hooks see and change as much of it.

They are not the same bits: norms, attention and bfloat16 products add up in another order, so a rounding to bfloat16,
or of activations to int8, may fall to the other side. That moves logits by a last bit here and there; a wrong weight,
slot or position moves them by as much as they are large. What is low-bit alone is compared bit by bit in
test_card_kernels.

The interpreter takes some ten milliseconds for a program of a kernel: models are so small that most kernels are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from card_fixtures import CARD, poisoned
from conftest import needs_compiled, tiny_args
from octavo.args import MoEArgs
from octavo.bench.synthetic import synthetic_model
from octavo.cache import KVCache, RollingKVCache, StaticStep, make_cache
from octavo.card import CardBlock
from octavo.hooks import observed, rerouted
from octavo.kernels import card
from octavo.kernels.ops import Weight
from octavo.load import assemble_on_card
from octavo.model import Mixtral, Router, Routing, rotary_embedding

pytest.importorskip("octavo.kernels.triton", reason="Triton cannot be imported here", exc_type=ImportError)
pytestmark = [needs_compiled, pytest.mark.usefixtures(poisoned.__name__)]
F32, BF16 = torch.float32, torch.bfloat16
VOCABULARY = 16
SMALL = {"n_layers": 1, "dim": 16, "hidden_dim": 16, "vocab_size": VOCABULARY, "n_heads": 2, "n_kv_heads": 1}


class Pair(NamedTuple):
    """The same weights twice."""

    cpu: Mixtral
    card: Mixtral


def pair(bits: int, dtype: torch.dtype = BF16, device: torch.device = CARD, **changes: Any) -> Pair:
    """A random model on the CPU's kernels, whose norms are no ones, and on a card."""
    cpu = synthetic_model(tiny_args(**SMALL | {"moe": MoEArgs(3, 2)} | changes), bits).to(dtype)
    noise = torch.Generator().manual_seed(0)
    for name, parameter in cpu.named_parameters():
        if "norm" in name:
            parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=noise))

    def weight(name: str) -> Weight:
        path, _, rest = name.removesuffix(".weight").partition(".experts.")
        if not rest:
            return cpu.get_submodule(path).matrix.weight
        expert, which = rest.split(".")
        experts: Any = cpu.get_submodule(f"{path}.experts")
        w1, w3, w2 = experts.experts.experts[int(expert)]
        return {"w1": w1, "w3": w3, "w2": w2}[which].weight

    there = assemble_on_card(cpu.args, lambda name: cpu.get_parameter(name).to(device), weight, device)
    assert any(isinstance(module, CardBlock) for module in there.modules())
    return Pair(cpu, there)


def ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


PROMPT = ids(1, 3)


@pytest.fixture(scope="module")
def small() -> Pair:
    return pair(16)


def read(model: Mixtral, chunks: Sequence[Tensor], cache: KVCache | None = None) -> Tensor:
    """Logits of all chunks of a batch, one after the other."""
    rows = len(chunks[0])
    cache = cache or make_cache(model.args, rows, dtype=model.dtype, device=model.device)
    return torch.cat([model(one.to(model.device), cache=cache).cpu() for one in chunks], dim=1)


def near(found: Tensor, expected: Tensor) -> None:
    assert found.isfinite().all()
    assert float((found - expected).norm() / expected.norm()) < 2e-2


# ---------------------------------------- logits


@pytest.mark.parametrize(
    ("bits", "dtype", "changes"),
    [
        (16, BF16, {"n_layers": 2, "n_heads": 3}),  # queries', keys' and values' rows fill no panels of 16
        (16, F32, {"moe": None, "tie_embeddings": True, "n_kv_heads": 2}),
        (4, BF16, {"n_heads": 1, "head_dim": 16, "moe": MoEArgs(2, 1)}),
    ],
)
def test_a_prompt_in_two_chunks_and_a_step_give_the_cpus_logits(bits: int, dtype: torch.dtype, changes: Any) -> None:
    models = pair(bits, dtype, **changes)
    chunks = ids(2, 5).split([2, 2, 1], dim=1)
    near(read(models.card, chunks), read(models.cpu, chunks))


@pytest.mark.parametrize("kind", [RollingKVCache, KVCache])
def test_a_window_is_kept_to(kind: type[KVCache]) -> None:
    models = pair(16, sliding_window=3)
    chunks = ids(1, 6).split([4, 1, 1], dim=1)
    found, expected = (read(one, chunks, kind(one.args, 1, dtype=one.dtype, device=one.device)) for one in models)
    near(found, expected)


def test_rows_of_different_lengths_are_read_together(small: Pair) -> None:
    found = []
    for model in small:
        cache = KVCache(model.args, 3, dtype=model.dtype, device=model.device)
        for row, tokens in enumerate((2, 3, 1)):
            model(ids(1, tokens, seed=row).to(model.device), cache=cache.rows(row, row + 1))
        before = cache.k_LBHSK[:, 0].clone()
        rows = cache.rows(1, 3)
        steps = [model(ids(2, tokens, seed=9).to(model.device), cache=rows).cpu() for tokens in (2, 1)]
        assert torch.equal(cache.k_LBHSK[:, 0], before)
        found.append(torch.cat(steps, dim=1))
    near(found[1], found[0])


def test_without_a_cache_all_logits_are_the_same_too(small: Pair) -> None:
    near(small.card(PROMPT.to(CARD)).cpu(), small.cpu(PROMPT))


# ---------------------------------------- where tensors lie


@pytest.mark.parametrize(
    ("bits", "changes"), [(16, {}), (4, {"sliding_window": 3}), (4, {"sliding_window": 3, "moe": None})]
)
def test_a_forward_neither_waits_for_the_host_nor_gives_the_card_its_tensors(
    bits: int, changes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device "meta" a tensor has no numbers, so whoever asks for one fails, and so does what mixes devices."""
    launched = []

    def run(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        launched.append(kernel)
        assert {arg.device.type for arg in args if isinstance(arg, Tensor)} == {"meta"}, kernel

    monkeypatch.setattr(card, "_run", run)
    monkeypatch.setattr(card, "usable", lambda device: True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for "meta"
    meta = torch.device("meta")
    model = pair(bits, device=meta, **changes).card
    for kind in (KVCache, RollingKVCache):
        cache = kind(model.args, 2, dtype=model.dtype, device=meta)
        for tokens in (3, 2, 1):
            before = len(launched)
            model(torch.empty(2, tokens, dtype=torch.int64, device=meta), cache=cache)
            assert len(launched) > before
    lengths, live = (torch.empty(2, dtype=dtype, device=meta) for dtype in (torch.int64, torch.bool))
    step = StaticStep(cache, 3, lengths, live)
    x = torch.empty(2, 1, model.args.dim, dtype=model.dtype, device=meta)
    rotation = rotary_embedding(step.positions_BT, model.args.head_dim, model.args.rope_theta)
    assert model.layers[0](x, rotation, step, 0).shape == x.shape


# ---------------------------------------- hooks


@pytest.fixture(scope="module")
def two_layers() -> Pair:
    return pair(16, n_layers=2)


def test_who_observes_sees_what_was_chosen_and_changes_nothing(two_layers: Pair) -> None:
    seen: dict[str, list[Routing]] = {"cpu": [], "card": []}
    model = two_layers.card
    expected = read(model, [PROMPT])
    with observed(model, lambda layers: seen["card"].extend(layers)):
        assert torch.equal(read(model, [PROMPT]), expected)
    with observed(two_layers.cpu, lambda layers: seen["cpu"].extend(layers)):
        read(two_layers.cpu, [PROMPT])
    assert len(seen["cpu"]) == len(seen["card"]) == 2
    for ours, theirs in zip(seen["card"], seen["cpu"], strict=True):
        assert torch.equal(ours.topk_ids_TK.cpu(), theirs.topk_ids_TK)
        near(ours.topk_weights_TK.cpu(), theirs.topk_weights_TK)
        near(ours.logits_TE.cpu(), theirs.logits_TE)


@pytest.mark.parametrize("path", ["attention", "attention.wk", "ffn_norm", "feed_forward.experts"])
def test_a_hook_is_called_and_the_logits_stay(path: str, small: Pair) -> None:
    model, calls = small.card, list[Any]()
    chunks = PROMPT.split(2, dim=1) if path == "attention" else [PROMPT]
    handle = model.layers[0].get_submodule(path).register_forward_hook(lambda *call: calls.append(call))
    found = read(model, chunks)
    handle.remove()
    assert len(calls) == len(chunks)
    near(found, read(small.cpu, chunks))


def test_other_choices_are_computed_with(small: Pair) -> None:
    def last(layer: int, router: Router, x_TD: Tensor, routing: Routing) -> Routing:
        ids_TK = routing.logits_TE.argsort(dim=-1)[:, :2]
        return Routing(ids_TK, routing.topk_weights_TK.flip(-1), routing.logits_TE)

    found = []
    for model in small:
        with rerouted(model, last):
            found.append(read(model, [PROMPT]))
    near(found[1], found[0])
    unchanged = read(small.cpu, [PROMPT])
    assert (found[1] - unchanged).norm() > 0.1 * unchanged.norm()
