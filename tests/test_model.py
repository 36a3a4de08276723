"""The model against slow, obvious references, and the equalities that caches must keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import tiny_args, tiny_model
from octavo.args import ModelArgs, MoEArgs
from octavo.cache import KVCache, RollingKVCache, make_cache
from octavo.errors import ConfigError, PromptError
from octavo.model import MoEFeedForward, Router

MIXTRAL_8X7B = ModelArgs(
    dim=4096,
    n_layers=32,
    head_dim=128,
    hidden_dim=14336,
    n_heads=32,
    n_kv_heads=8,
    vocab_size=32000,
    moe=MoEArgs(num_experts=8, num_experts_per_tok=2),
)


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=0, atol=2e-5 * float(expected.detach().abs().max()))


def random_ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 101, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def test_sizes_of_mixtral_8x7b() -> None:
    assert MIXTRAL_8X7B.n_params == 46_702_792_704
    assert MIXTRAL_8X7B.n_active_params == 12_879_925_248
    assert MIXTRAL_8X7B.expert_params == 176_160_768
    assert MIXTRAL_8X7B.attention_params == 41_943_040


@pytest.mark.parametrize(
    "changes",
    [{}, {"moe": None}, {"tie_embeddings": True}, {"n_kv_heads": 1, "head_dim": 6}, {"n_layers": 5}],
)
def test_counted_parameters_are_the_models(changes: dict[str, object]) -> None:
    model = tiny_model(**changes)
    assert sum(p.numel() for p in model.parameters()) == model.args.n_params


def naive_moe(block: MoEFeedForward, x_TD: Tensor) -> Tensor:
    """The formula, token by token and expert by expert."""
    rows = []
    for x in x_TD:
        logits = [torch.dot(row, x) for row in block.gate.weight]
        chosen = sorted(range(len(logits)), key=lambda e: (-logits[e].item(), e))[: block.gate.top_k]
        weights = torch.softmax(torch.stack([logits[e] for e in chosen]), 0)
        y = torch.zeros_like(x)
        for weight, e in zip(weights, chosen, strict=True):
            expert = block.experts[e]  # type: ignore[index]
            gate, up = expert.w1.weight @ x, expert.w3.weight @ x
            y = y + weight * (expert.w2.weight @ (gate / (1 + torch.exp(-gate)) * up))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (4, 1), (16, 4), (3, 3)])
def test_moe_and_its_gradients_equal_nested_loops(experts: int, top_k: int) -> None:
    torch.manual_seed(experts)
    moe = MoEArgs(experts, top_k)
    block = MoEFeedForward(tiny_args(moe=moe), moe)
    x_TD = torch.randn(13, 32)
    x_TD.requires_grad_()
    fast = block(x_TD[None])[0]
    slow = naive_moe(block, x_TD)
    assert close(fast, slow)
    probe = torch.randn_like(slow)
    inputs = [x_TD, *block.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(fast, inputs, probe, allow_unused=True),
        torch.autograd.grad(slow, inputs, probe, allow_unused=True),
        strict=True,
    ):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_router_is_softmax_over_all_then_renormalised() -> None:
    torch.manual_seed(0)
    router = Router(32, MoEArgs(8, 2))
    x_TD = torch.randn(500, 32)
    ids, weights, logits = router(x_TD)
    top, top_ids = logits.softmax(-1).topk(2)
    assert torch.equal(ids, top_ids)
    assert torch.allclose(weights, top / top.sum(-1, keepdim=True), atol=2e-7)


def test_router_breaks_ties_towards_the_lower_index_and_computes_in_float32() -> None:
    router = Router(4, MoEArgs(8, 2)).bfloat16()
    torch.nn.init.zeros_(router.weight)
    routing = router(torch.randn(3, 4).bfloat16())
    assert routing.topk_ids_TK.tolist() == [[0, 1]] * 3
    assert routing.logits_TE.dtype == routing.topk_weights_TK.dtype == torch.float32


WINDOWS = [None, 1, 5, 16, 300]


@pytest.mark.parametrize("window", WINDOWS)
def test_prefill_equals_step_by_step(window: int | None) -> None:
    model = tiny_model(sliding_window=window)
    ids = random_ids(2, 40)
    whole = model(ids)
    cache = make_cache(model.args, 2)
    steps = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(40)], dim=1)
    assert close(steps, whole)
    assert close(model(ids, last_only=True), whole[:, -1:])


@settings(max_examples=25, deadline=None)
@given(
    window=st.sampled_from(WINDOWS),
    chunks=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    rolling=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_chunking_equals_one_forward(window: int | None, chunks: list[int], rolling: bool, seed: int) -> None:
    model = tiny_model(seed % 3, sliding_window=window)
    ids = random_ids(1, sum(chunks), seed)
    cache = RollingKVCache(model.args, 1) if rolling and window else KVCache(model.args, 1, capacity=1 + seed % 7)
    parts = [model(piece, cache=cache) for piece in ids.split(chunks, dim=1)]
    assert close(torch.cat(parts, dim=1), model(ids))
    assert cache.lengths == [sum(chunks)]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    window=st.sampled_from(WINDOWS),
    seed=st.integers(0, 99),
)
def test_rows_of_different_lengths_decode_as_if_alone(lengths: list[int], window: int | None, seed: int) -> None:
    model = tiny_model(sliding_window=window)
    cache = make_cache(model.args, len(lengths))
    prompts = [random_ids(1, n, seed + i) for i, n in enumerate(lengths)]
    new = random_ids(len(lengths), 3, seed)
    for row, prompt in enumerate(prompts):
        model(prompt, cache=cache.rows(row, row + 1))
    together = torch.cat([model(new[:, t : t + 1], cache=cache) for t in range(3)], dim=1)
    for row, prompt in enumerate(prompts):
        alone = model(torch.cat((prompt, new[row : row + 1]), dim=1))[:, -3:]
        assert close(together[row : row + 1], alone)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_are_never_seen(side: str, window: int | None) -> None:
    model = tiny_model(sliding_window=window)
    ids = random_ids(1, 12)
    pad = (5, 0) if side == "left" else (0, 5)
    positions = torch.nn.functional.pad(torch.arange(12)[None], pad, value=-1)
    kept = slice(5, None) if side == "left" else slice(0, 12)
    for filler in (0, 77):
        padded = model(torch.nn.functional.pad(ids, pad, value=filler), positions_BT=positions)
        assert padded.isfinite().all()
        assert close(padded[:, kept], model(ids))


@pytest.mark.parametrize("window", WINDOWS)
def test_left_padded_prompts_continue_in_a_cache(window: int | None) -> None:
    model = tiny_model(sliding_window=window)
    ids, new = random_ids(2, 12), random_ids(2, 4, seed=1)
    positions = torch.arange(12).expand(2, 12).clone()
    positions[1] = torch.cat((torch.full((7,), -1), torch.arange(5)))
    cache = make_cache(model.args, 2)
    model(ids, positions_BT=positions, cache=cache)
    steps = torch.cat([model(new[:, t : t + 1], cache=cache) for t in range(4)], dim=1)
    assert close(steps[:1], model(torch.cat((ids[:1], new[:1]), 1))[:, -4:])
    assert close(steps[1:], model(torch.cat((ids[1:, 7:], new[1:]), 1))[:, -4:])


@pytest.mark.parametrize("window", [None, 5])
def test_rows_are_reset_and_copied(window: int | None) -> None:
    model = tiny_model(sliding_window=window)
    first, second, new = random_ids(1, 9, 1), random_ids(1, 14, 2), random_ids(1, 1, 3)
    cache = make_cache(model.args, 3)
    model(first, cache=cache.rows(0, 1))
    model(second, cache=cache.rows(1, 2))
    cache.reset_row(0)
    cache.copy_row(1, 0)
    cache.reset_row(1)
    assert cache.lengths == [14, 0, 0]
    expected = model(torch.cat((second, new), 1))[:, -1:]
    assert close(model(new, cache=cache.rows(0, 1)), expected)
    assert close(model(first, cache=cache.rows(1, 2)), model(first))


def test_a_rolling_cache_does_not_grow() -> None:
    model = tiny_model(sliding_window=16)
    cache = make_cache(model.args, 1)
    assert isinstance(cache, RollingKVCache)
    before = cache.nbytes
    model(random_ids(1, 200), cache=cache)
    assert cache.nbytes == before == 2 * 2 * 2 * 16 * 8 * 4  # k and v, layers, kv heads, window, head_dim, bytes


def test_context_overflow_is_a_user_error() -> None:
    model = tiny_model(max_seq_len=16)
    cache = make_cache(model.args, 1)
    model(random_ids(1, 16), cache=cache)
    with pytest.raises(PromptError, match="17 tokens do not fit into the model's context of 16"):
        model(random_ids(1, 1), cache=cache)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"n_layers": -1}, "n_layers is -1"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads = 3 does not divide"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"vocab_size": True}, "vocab_size"),
    ],
)
def test_nonsensical_sizes(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_args(**changes)


def test_more_choices_than_experts() -> None:
    with pytest.raises(ConfigError, match="only 4 experts"):
        MoEArgs(num_experts=4, num_experts_per_tok=5)
