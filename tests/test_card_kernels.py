"""The card's kernels: the CPU's bits where weights are low-bit, and what float64 computes where they are bfloat16.

Triton's interpreter takes a millisecond for every call in a program, so matrices are as small as they can be while
panels, groups and blocks are cut off somewhere. On a machine with a GPU the same tests run there.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from card_fixtures import CARD, LAUNCHES, as_bytes, emulate, poisoned, tools
from conftest import needs_compiled
from octavo.args import MoEArgs
from octavo.bench.synthetic import random_packed
from octavo.errors import OptionError
from octavo.kernels import card, ops, reference
from octavo.model import RMSNorm, Router, rotary_embedding, rotate
from octavo.quant.formats import FORMATS, Packed

products = pytest.importorskip("octavo.kernels.triton", reason="Triton cannot be imported here", exc_type=ImportError)
pytestmark = [needs_compiled, pytest.mark.usefixtures(poisoned.__name__)]
F32, BF16 = torch.float32, torch.bfloat16


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def matrix(name: str, rows: int, cols: int, seed: int = 0) -> ops.Weight:
    """Random numbers, or random bytes: every code, scales of either sign; in rows that pad a panel they are 0."""
    if name == "bf16":
        return (random(rows, cols, seed=seed) / cols**0.5).to(BF16)
    chosen = FORMATS[name]
    data = torch.randint(256, (chosen.nbytes(rows, cols),), dtype=torch.uint8, generator=generator(seed))
    packed = random_packed(data, chosen, (rows, cols))
    scales = data.view(-1, chosen.panel_nbytes(cols) // chosen.block_nbytes, chosen.block_nbytes)[:, :, :64].view(BF16)
    scales.unflatten(-1, (2, 16))[-1, :, :, (rows - 1) % 16 + 1 :] = 0
    return packed


def same(found: Tensor, expected: Tensor) -> None:
    """Equal bits; a NaN is equal to a NaN."""
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def distance(found: Tensor, expected: Tensor) -> float:
    """Of two tensors, relative to the second one's norm."""
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


# ---------------------------------------- matrices


@pytest.mark.parametrize(
    ("name", "tokens", "rows", "cols", "dtype"),
    [
        ("q4", 1, 16, 500, BF16),  # eight groups at a time
        ("q4", 3, 40, 200, F32),  # two at a time; half a panel; three tokens for four
        ("q8", 2, 16, 450, F32),
        ("q8", 8, 20, 70, BF16),
        ("q4", 9, 70, 200, F32),  # tiles
        ("q8", 70, 20, 130, BF16),  # two tiles of tokens
    ],
)
def test_low_bit_products_have_the_bits_of_the_cpus(
    name: str, tokens: int, rows: int, cols: int, dtype: torch.dtype
) -> None:
    w, x = matrix(name, rows, cols), random(tokens, cols, dtype=dtype)
    found = card.linear(x.to(CARD), card.to_card(w, CARD))
    assert found.dtype == dtype
    same(found, ops.linear(x, ops.Matrix(w)))


def strange(cols: int) -> Tensor:
    """Tokens in which something is to be treated apart; the last one is ordinary."""
    x = random(8, cols)
    x[0, 3], x[1, 70], x[2, cols - 1] = float("nan"), float("inf"), float("-inf")
    x[3] *= 1e-37
    x[4, :64], x[4, 64:] = 0, 2e-36
    x[5, :64] = 3e38
    x[6] = torch.arange(cols) % 255 * 0.5 - 63.5  # ties between two integers
    return x


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_activations_are_rounded_by_the_cpus_rule(bits: int, dtype: torch.dtype) -> None:
    x = strange(130).to(dtype)
    a = card.activations(x.to(CARD), card.Kind(FORMATS[f"q{bits}"], 16, 130))
    same_activations(a, x, bits)


def same_activations(a: card.Activations, x: Tensor, bits: int) -> None:
    q, scales = reference.quantize_activations(torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 128)))
    if bits == 4:  # as nibbles come, a word's low halves of bytes first
        q = q.unflatten(-1, (-1, 8))[..., [0, 4, 1, 5, 2, 6, 3, 7]].flatten(-2)
    assert a.q is not None
    assert a.scales is not None
    same(a.scales, scales)
    there = ~scales.isnan()
    same(a.q.cpu().view(q.shape)[there], q[there])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("tokens", [8, 9])
def test_what_is_no_number_or_tiny_comes_out_as_on_the_cpu(tokens: int) -> None:
    w, x = matrix("q4", 16, 130), strange(130)
    x = torch.cat((x, x[7:]))[:tokens]
    expected = ops.linear(x, ops.Matrix(w))
    assert expected.isnan().all(1).tolist() == [True] * 3 + [False] * (tokens - 3)
    same(card.linear(x.to(CARD), card.to_card(w, CARD)), expected)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_bfloat16_products_are_near_those_of_float64(tokens: int) -> None:
    w, x = matrix("bf16", 20, 520), random(tokens, 520)
    expected = x.to(BF16).double() @ w.double().T
    found = card.linear(x.to(CARD), card.to_card(w, CARD))
    assert distance(found, expected) < (1e-6 if tokens <= 2 else 4e-3)  # more than two: torch's own, in bfloat16
    found = card.linear(x.to(BF16).to(CARD), card.to_card(w, CARD))
    assert found.dtype == BF16
    assert distance(found, expected) < 4e-3


def test_rows_of_several_matrices_become_those_of_one() -> None:
    x = random(3, 100)
    for name in ("q4", "q8", "bf16"):
        several = [matrix(name, rows, 100, seed=rows) for rows in (32, 16, 48)]
        joined = card.join_rows([card.to_card(w, CARD) for w in several])
        assert joined is not None
        format, rows, cols = joined.kind
        whole = joined.data.cpu() if format is None else Packed(joined.data.cpu(), format, (rows, cols))
        same(ops.linear(x, whole), torch.cat([ops.linear(x, w) for w in several], dim=1))
    apart = [("q4", 32), ("q4", 20)], [("q4", 16), ("q8", 16)], [("q4", 16), ("bf16", 16)]
    for two in apart:
        assert card.join_rows([card.to_card(matrix(name, rows, 100), CARD) for name, rows in two]) is None


def test_what_does_not_fit_is_refused() -> None:
    q4, q8 = (card.to_card(matrix(name, 16, 64), CARD) for name in ("q4", "q8"))
    x = torch.zeros(2, 64, device=CARD)
    for weight in (matrix("q3", 16, 64), matrix("q2", 16, 64), torch.zeros(16, 64), torch.zeros(3, 3, dtype=BF16)):
        with pytest.raises(OptionError, match="a weight matrix is"):
            card.to_card(weight, CARD)
    for wrong in (x[:, :63], x.half(), x.long()):
        with pytest.raises(OptionError, match=r"activations are .*; expected float32 or bfloat16 \[tokens, 64\]"):
            card.linear(wrong, q4)
    with pytest.raises(OptionError, match="made for weights of 4 bits, and these have 8"):
        card.linear_of(card.activations(x, q4.kind), q8)
    with pytest.raises(OptionError, match="the same input are q4 and q8"):
        card.activations(x, q4.kind, q8.kind)
    with pytest.raises(OptionError, match="experts of a layer are of different formats"):
        card.CardExperts([[q4, q4, q4], [q8, q8, q4]])
    ids, weights = torch.zeros(2, 1, dtype=torch.int64, device=CARD), torch.zeros(2, 1, device=CARD)
    table = card.CardExperts([[q4, q4, card.to_card(matrix("q4", 64, 16), CARD)]]).table
    for parts in (torch.zeros(2, 1, 63, device=CARD), torch.zeros(1, 1, 64, device=CARD)):
        with pytest.raises(OptionError, match="x has 2 tokens"):
            card.moe_into(parts, x, ids, weights, table)


# ---------------------------------------- experts


class Layer(NamedTuple):
    """Experts on both."""

    cpu: ops.ExpertSet
    card: card.CardExperts

    def parts(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What each choice adds, by the CPU's kernels: [T, K, D]."""
        experts, parts = dict(enumerate(self.cpu.experts)), torch.zeros(*ids.shape, x.shape[1])
        for place in range(ids.shape[1]):
            part = torch.zeros(x.shape)
            ops.moe_part(part, x, ids[:, [place]], weights[:, [place]], experts)
            parts[:, place] = part
        return parts

    def parts_on_card(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        parts = torch.full((*ids.shape, x.shape[1]), float("nan"), device=CARD)
        card.moe_into(parts, x.to(CARD), ids.to(CARD), weights.to(CARD), self.card.table)
        return parts


@functools.cache
def layer(names: str, n: int, dim: int = 48, hidden: int = 100) -> Layer:
    """Experts whose w1, w3 and w2 are of these formats."""
    shapes = ((hidden, dim), (hidden, dim), (dim, hidden))
    wanted = list(zip(names.split(), shapes, strict=True))
    weights: list[Any] = [
        tuple(matrix(name, *shape, seed=3 * e + i) for i, (name, shape) in enumerate(wanted)) for e in range(n)
    ]
    return Layer(ops.ExpertSet(weights), card.CardExperts([[card.to_card(w, CARD) for w in one] for one in weights]))


def chosen(tokens: int, n: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Ids and weights of a random router."""
    weights, ids = random(tokens, n, seed=tokens + n).topk(top_k)
    return ids, weights.softmax(-1)


@pytest.mark.parametrize(
    ("names", "n", "tokens", "top_k", "dtype"),
    [
        ("q4 q4 q4", 4, 1, 2, BF16),
        ("q8 q8 q4", 4, 3, 1, F32),
        ("q4 q4 q4", 2, 9, 2, F32),  # tiles; every expert has all tokens
        ("q8 q8 q4", 3, 12, 3, BF16),
    ],
)
def test_low_bit_experts_have_the_bits_of_the_cpus(
    names: str, n: int, tokens: int, top_k: int, dtype: torch.dtype
) -> None:
    experts, x = layer(names, n), random(tokens, 48, dtype=dtype)
    ids, weights = chosen(tokens, n, top_k)
    parts = experts.parts_on_card(x, ids, weights)
    same(parts, experts.parts(x, ids, weights))
    y = card.combine(parts, x.to(CARD))
    assert y.dtype == dtype
    if top_k <= 2:  # of two numbers the sum is the same in either order
        same(y, ops.moe(x, ids, weights, experts.cpu))


def test_all_tokens_may_choose_one_expert() -> None:
    experts, x = layer("q4 q4 q4", 4), random(10, 48)
    ids, weights = torch.full((10, 1), 2), torch.ones(10, 1)
    same(experts.card(x.to(CARD), ids.to(CARD), weights.to(CARD)), ops.moe(x, ids, weights, experts.cpu))


def test_rows_that_fill_up_a_panel_may_be_anything() -> None:
    """Synthetic models have random scales there; a store has zeros."""
    q4, shapes = FORMATS["q4"], ((100, 48), (100, 48), (48, 100))
    weights = [random_packed(torch.randint(256, (q4.nbytes(*s),), dtype=torch.uint8), q4, s) for s in shapes]
    experts = ops.ExpertSet([tuple(weights)])
    there = card.CardExperts([[card.to_card(w, CARD) for w in weights]])
    x, ids, ones = random(2, 48), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    same(there(x.to(CARD), ids.to(CARD), ones.to(CARD)), ops.moe(x, ids, ones, experts))


@pytest.mark.parametrize("tokens", [2, 9])
def test_experts_that_are_not_on_the_card_leave_their_places_alone(tokens: int) -> None:
    experts, x = layer("q4 q4 q4", 2), random(tokens, 48)
    ids, weights = chosen(tokens, 2, 2)
    addresses = experts.card.table.addresses_E3.clone()
    addresses[1] = 0
    parts = torch.full((tokens, 2, 48), 7.0, device=CARD)
    table = card.ExpertTable(experts.card.table.kinds, addresses)
    card.moe_into(parts, x.to(CARD), ids.to(CARD), weights.to(CARD), table)
    expected = experts.parts(x, ids, weights)
    expected[ids == 1] = 7.0
    same(parts, expected)


@pytest.mark.parametrize(
    ("names", "tokens", "near"),
    [
        ("q4 q4 bf16", 1, 1e-6),  # of equal numbers
        ("bf16 bf16 bf16", 1, 2e-3),  # what is between is rounded to bfloat16, and perhaps to the other side
        ("bf16 bf16 bf16", 5, 2e-3),  # tiles
        ("bf16 bf16 q4", 1, 2e-2),  # a group of int8 may be rounded by another scale
    ],
)
def test_bfloat16_experts_are_near_the_cpus(names: str, tokens: int, near: float) -> None:
    experts, x = layer(names, 2), random(tokens, 48).to(BF16).float()
    ids, weights = chosen(tokens, 2, 2)
    assert distance(experts.parts_on_card(x, ids, weights), experts.parts(x, ids, weights)) < near


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_parts_are_added_one_after_the_other(dtype: torch.dtype) -> None:
    parts, like = random(2, 3, 1030) * torch.tensor([1e4, 1.0, 1e-4])[:, None], random(2, 1030, seed=1, dtype=dtype)
    total = ((0 + parts[:, 0]) + parts[:, 1]) + parts[:, 2]
    same(card.combine(parts.to(CARD), like.to(CARD)), total.to(dtype))
    same(card.combine(parts.to(CARD), like.to(CARD), onto=True), like + total.to(dtype))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), n_experts=st.integers(1, 9), top_k=st.integers(1, 3), M=st.sampled_from((1, 2, 16, 64)))
def test_choices_are_sorted_by_expert_and_cut_into_blocks(data: Any, n_experts: int, top_k: int, M: int) -> None:
    tokens = data.draw(st.integers(1, 40))
    liked = range(n_experts)
    if data.draw(st.booleans()):
        liked = data.draw(st.lists(st.sampled_from(liked), min_size=1))  # nobody chooses the others
    which = torch.randint(len(liked), (tokens, top_k), generator=generator(tokens))
    ids = torch.tensor(liked)[which]
    order, blocks = (found.cpu() for found in card._dispatch(ids.to(CARD), n_experts, M))
    same(order.long(), ids.flatten().argsort(stable=True))
    expected = []
    for expert, count in enumerate(torch.bincount(ids.flatten(), minlength=n_experts).tolist()):
        begin = int((ids < expert).sum())
        expected += [[expert, at, min(at + M, begin + count)] for at in range(begin, begin + count, M)]
    expected += [[-1, 0, 0]] * (len(blocks) - len(expected))
    assert blocks.tolist() == expected


def test_products_are_cut_so_that_every_program_has_its_whole_share() -> None:
    for tokens, first, second in product([*range(1, 70), 1000], (4, 8, 16), (4, 8, 16)):
        up, down = card.tiling(tokens, [first, second], rows_together=64)
        assert up.M == down.M
        for how, bits in ((up, first), (down, second)):
            assert how.M & how.M - 1 == how.R & how.R - 1 == how.N & how.N - 1 == 0
            assert how.tile or (tokens <= how.M and bits <= 8) or how.M * how.R * how.N == 4096
            assert not how.tile or how.M >= 16  # the tensor cores' least
            assert bits == 16 or how.R % 16 == 0
        assert up.R % 64 == 0  # a group of what w2 is given


# ---------------------------------------- norms, routers, rotation


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_norm_is_the_models(dtype: torch.dtype, bits: int) -> None:
    x, norm = random(2, 300, dtype=dtype) * 3, RMSNorm(300, 1e-5).requires_grad_(False)
    norm.weight.copy_(1 + 0.1 * random(300, seed=1))
    norm = norm.to(dtype)
    kind = card.Kind(FORMATS["q4"] if bits == 4 else None, 16, 300)
    a = card.normalize(x.to(CARD), norm.weight.to(CARD), norm.eps, kind)
    near(a.x, norm(x))
    if bits == 4:
        same_activations(a, a.x.cpu(), 4)
    else:
        assert a.q is None


def near(found: Tensor, expected: Tensor) -> None:
    """But for the last bits: float32 in another order, and a rounding of it to bfloat16 on either side."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.cpu(), expected, rtol=2**-7 if found.dtype == BF16 else 3e-6, atol=1e-6)


def routed(x: Tensor, added: Tensor, norm: RMSNorm, router: Router, *kinds: card.Kind) -> Any:
    tensors = (x.to(CARD), added.to(CARD), norm.weight.to(CARD), norm.eps, router.weight.to(CARD), router.top_k)
    return card.add_normalize_route(*tensors, *kinds)


@pytest.mark.parametrize(("dtype", "n_experts", "top_k"), [(F32, 6, 3), (BF16, 8, 2), (F32, 5, 1)])
def test_a_router_chooses_as_the_models(dtype: torch.dtype, n_experts: int, top_k: int) -> None:
    x, added = random(4, 100, dtype=dtype), random(4, 100, seed=1, dtype=dtype)
    norm = RMSNorm(100, 1e-5).requires_grad_(False).to(dtype)
    router = Router(100, MoEArgs(n_experts, top_k)).requires_grad_(False)
    router.weight.copy_(random(n_experts, 100, seed=2) / 10)
    total, a, found = routed(x, added, norm, router, card.Kind(FORMATS["q8"], 16, 100))
    same(total, x + added)
    near(a.x, norm(x + added))
    same_activations(a, a.x.cpu(), 8)
    expected = router(a.x.cpu())
    same(found.topk_ids_TK, expected.topk_ids_TK)
    near(found.topk_weights_TK, expected.topk_weights_TK)
    near(found.logits_TE, expected.logits_TE)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_of_equal_experts_the_first_is_chosen_and_nan_stays_among_experts() -> None:
    x, norm, router = random(3, 64), RMSNorm(64, 1e-5).requires_grad_(False), Router(64, MoEArgs(6, 3))
    router.requires_grad_(False).weight.copy_(random(2, 64, seed=1)[[0, 1, 0, 1, 0, 1]])
    x[1, 5] = float("nan")
    _, _, found = routed(x, torch.zeros_like(x), norm, router)
    logits = found.logits_TE.cpu()
    same(logits[:, 2:], logits[:, :-2])
    same(found.topk_ids_TK, logits.sort(descending=True, stable=True)[1][:, :3])
    assert {tuple(ids) for ids in found.topk_ids_TK[[0, 2]].tolist()} <= {(0, 2, 4), (1, 3, 5)}
    near(found.topk_weights_TK[[0, 2]], torch.full((2, 3), 1 / 3))
    assert logits[1].isnan().all()
    assert found.topk_weights_TK[1].isnan().all()


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "head_dim"), [(F32, 4, 2, 6), (BF16, 2, 2, 8)])
def test_keys_and_values_come_into_their_slots(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    B, T, S = 2, 2, 5
    qkv = random(B * T, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    rotation = rotary_embedding(torch.tensor([[3, 900], [0, 7]]), head_dim, 1e4)
    caches = torch.full((2, B, kv_heads, S + 3, head_dim), 9.0, dtype=dtype, device=CARD)
    slots = torch.tensor([[4, 0], [1, 2]])
    k, v = caches[:, :, :, :S]  # of which the cache has more
    queries = card.rotate_and_store(qkv.to(CARD), rotation.to(CARD), heads, k, v, slots.to(CARD))
    q, new_k, new_v = qkv.view(B, T, -1, head_dim).split([heads, kv_heads, kv_heads], dim=2)
    near(queries.view(B, T, heads, head_dim), rotate(q, rotation))
    expected = torch.full((2, B, kv_heads, S + 3, head_dim), 9.0, dtype=dtype)
    for b, t in product(range(B), range(T)):
        expected[0, b, :, slots[b, t]], expected[1, b, :, slots[b, t]] = rotate(new_k, rotation)[b, t], new_v[b, t]
    near(caches[0], expected[0])
    same(caches[1], expected[1])
    with pytest.raises(OptionError, match="do not lie alike"):
        card.rotate_and_store(qkv, rotation, heads, k, v.clone(), slots)


# ---------------------------------------- PTX, which the interpreter does not run


def test_the_emulator_does_what_nvidia_says_of_its_instructions() -> None:
    def run(body: str, *inputs: int) -> int:
        (out,) = emulate(f"{{ {body} }}", 1, *inputs)
        return int(out.item())

    a, b = 0x03020100, 0x07060504
    assert run("prmt.b32 $0, $1, $2, 0x7531;", a, b) == 0x07050301  # as `cub::PRMT` is explained
    assert run("prmt.b32 $0, $1, $2, 0x3210;", a, b) == a
    assert run("prmt.b32 $0, $1, $2, 0x7654;", a, b) == b
    assert run("prmt.b32 $0, $1, $2, $3;", a, b, 0xFFFF0123) == 0x00010203  # 16 bits of the selectors count
    assert run("prmt.b32 $0, $1, 0, 0xba98;", 0x80007FFF) == 0xFF0000FF  # signs
    assert run("prmt.b32 $0, $1, $2, 0xf4c0;", 0x81, 0x80000080) == 0xFF80FF81
    for selectors in (0, 0x1234, 0x9ABC, 0xFEDC):  # as the manual has it: a byte of b:a, or its sign
        both = 0xF1E2D3C4_5A6B7C8D
        chosen_bytes = [both >> 8 * (selectors >> 4 * i & 7) & 255 for i in range(4)]
        signed = [(255 if byte > 127 else 0) if selectors >> 4 * i & 8 else byte for i, byte in enumerate(chosen_bytes)]
        expected = int.from_bytes(bytes(signed), "little")
        assert run("prmt.b32 $0, $1, $2, $3;", both & 0xFFFFFFFF, both >> 32, selectors) == expected
    assert run("dp4a.s32.s32 $0, $1, $2, $3;", 0x01020304, 0x01010101, 10) == 20
    assert run("dp4a.s32.s32 $0, $1, $2, $3;", 0x0000FFFF, 0x00000502, 3) == 0xFFFFFFFC  # -1 * 2 - 1 * 5 + 3
    assert run("dp4a.s32.s32 $0, $1, $2, $3;", 0x80808080, 0x80808080, -1) == 65535
    assert run("dp4a.s32.s32 $0, $1, $2, $3;", 1, 1, 0x7FFFFFFF) == 0x80000000  # without .sat
    assert run("xor.b32 $0, $1, 0x80;", 0xFF) == 0x7F
    assert run("and.b32 $0, $1, 0xf0;", 0xFF) == 0xF0
    assert run("add.u32 $0, $1, $2;", 0xFFFFFFFF, 2) == 1
    assert run("shr.u32 $0, $1, 16;", 0x80000001) == 0x8000
    assert run(".reg .b32 v, w; xor.b32 v, $1, 1; xor.b32 w, v, 2; xor.b32 $0, w, v;", 4) == 2
    for wrong in ("xor.b32 v, $1, $1;", "xor.b32 $1, $1, $1;"):  # not declared; an input
        with pytest.raises(AssertionError):
            run(wrong, 1)
    for wrong in (".reg .b32 v; xor.b32 $0, v, v;", "prmt.b32.f4e $0, $1, $1, $1;", "mov.b32 $0, $1;"):
        with pytest.raises(KeyError):  # read before it is written; instructions that are not emulated
            run(wrong, 1)


BOOK = np.array((FORMATS["q4"].books or ((),))[0])


def every_word() -> Any:
    """Words with all 65536 patterns in either half, the other one random."""
    rng = np.random.default_rng(0)
    half, others = np.arange(1 << 16, dtype=np.uint32), rng.integers(0, 1 << 16, (2, 1 << 16), dtype=np.uint32)
    return np.concatenate([half | others[0] << np.uint32(16), half << np.uint32(16) | others[1]]), rng


def signed(words: Any) -> Any:
    return words.astype(np.uint32).view(np.int32).astype(np.int64)


def test_q4s_dot_in_ptx_is_the_plain_sum() -> None:
    words, rng = every_word()
    codes = words[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    registers = products.Q4_BOOK[16:]
    for x in (rng.integers(-127, 128, (len(words), 8)), rng.choice([-127, 127], (len(words), 8))):
        low, high = (np.ascontiguousarray(half.astype(np.int8)).view(np.uint32)[:, 0] for half in np.split(x, 2, 1))
        acc = rng.integers(-(1 << 24), 1 << 24, len(words))
        (found,) = emulate(products.Q4_DOT.value, 1, words, low, high, acc, *registers)
        np.testing.assert_array_equal(signed(found), acc + (BOOK[codes] * x).sum(1))


def test_q4s_values_in_ptx_are_the_books() -> None:
    words, _ = every_word()
    low, high = emulate(products.Q4_VALUES.value, 2, words)
    nibbles = words[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    np.testing.assert_array_equal(as_bytes(low), BOOK[nibbles[:, ::2]])
    np.testing.assert_array_equal(as_bytes(high), BOOK[nibbles[:, 1::2]])


def test_q8s_dot_in_ptx_is_the_plain_sum() -> None:
    words, rng = every_word()
    for x in (rng.integers(-127, 128, (len(words), 4)), rng.choice([-127, 127], (len(words), 4))):
        acc = rng.integers(-(1 << 24), 1 << 24, len(words))
        (found,) = emulate(
            products.Q8_DOT.value, 1, words, np.ascontiguousarray(x.astype(np.int8)).view(np.uint32)[:, 0], acc
        )
        codes = words[:, None] >> np.arange(0, 32, 8, dtype=np.uint32) & 255
        np.testing.assert_array_equal(signed(found), acc + ((codes.astype(np.int64) - 128) * x).sum(1))


@pytest.mark.skipif(CARD.type == "cuda", reason="the kernels are compiled here, and run their PTX themselves")
@pytest.mark.parametrize(("name", "tokens"), [("q4", 2), ("q8", 1), ("q4", 9)])
def test_kernels_give_ptx_the_operands_it_wants(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of integers, and with scales of 1, every sum is exact, so that it does not matter how a sum is rounded."""
    from triton.runtime import interpreter

    used = set[str]()

    def inline_asm(_: Any, asm: str, constraints: str, values: Any, types: Any, pure: bool, pack: int) -> Any:
        used.add(asm)
        outputs, shape = constraints.count("="), values[0].data.shape
        arrays = [np.ascontiguousarray(one.data).reshape(-1, pack) for one in values]
        registers = [one.view(np.uint32)[:, 0] if pack > 1 else one[:, 0] for one in arrays]
        assert len(registers) == constraints.count(",") + 1 - outputs
        found = emulate(asm, outputs, *registers)
        results = [
            interpreter.TensorHandle(one.view(np.int8 if pack > 1 else np.int32).reshape(shape), type.scalar)
            for one, type in zip(found, types, strict=True)
        ]
        return SimpleNamespace(get_result=results.__getitem__)

    def run(kernel: Any, grid: Any, *args: Any, num_warps: int, num_stages: int = 3, **constants: Any) -> None:
        kernel[grid](*args, **constants | {"ASM": True})

    w, x = matrix(name, 16, 128), torch.randint(-127, 128, (tokens, 128), generator=generator(1)).float()
    x[:, ::64] = 127
    assert isinstance(w, Packed)
    w.data[:64].view(BF16)[:] = 1
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", inline_asm)
    monkeypatch.setattr(card, "_run", run)
    same(card.linear(x, card.to_card(w, CARD)), ops.linear(x, ops.Matrix(w)))
    ptx = products.Q8_DOT if name == "q8" else products.Q4_DOT if tokens <= 8 else products.Q4_VALUES
    assert used == {ptx.value}


# ---------------------------------------- compiled

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may have, by compute capability (the CUDA programming guide's table)."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `card_fixtures` tells of the kernels that Mixtral's layers launch."""
    for tool in tools():
        if not tool.exists():
            pytest.skip(f"Triton came without {tool.name}")
    folder = str(tmp_path_factory.mktemp("triton"))
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
    program = os.path.join(os.path.dirname(__file__), "card_fixtures.py")
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_compile_for_cards_that_are_not_here(compiled: list[dict[str, Any]]) -> None:
    assert [list(one) for one in LAUNCHES] == list({tuple(one["case"]): one["case"] for one in compiled}.values())
    kernels = {
        name
        for module in card._kernels()[:2]
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }
    assert {one["kernel"] for one in compiled} == kernels
    for one in compiled:
        capability, _, tokens, _ = one["case"]
        assert one["shared"] <= SHARED[capability], one
        assert tokens > 1 or one["stack"] == 0, f"registers are spilled: {one}"


def test_a_compiler_leaves_low_bit_arithmetic_as_it_is_written(compiled: list[dict[str, Any]]) -> None:
    """No approximations, no flushed numbers, no products and sums that become one where that was not asked for."""
    for one in compiled:
        _, bits, _, _ = one["case"]
        found = set(one["arithmetic"])
        assert not {op for op in found if op.startswith(("add.f", "sub.f", "mul.f", "mad", "add.ftz", "mul.ftz"))}, one
        if one["kernel"] in ("quantize_kernel", "gate_and_up_kernel", "down_kernel", "linear_kernel") and bits < 16:
            assert found <= {f"{op}.rn.f32" for op in ("add", "sub", "mul", "fma", "div")}, one
        if one["kernel"] in ("quantize_kernel", "norm_kernel", "combine_kernel", "rotate_kernel"):
            assert "fma.rn.f32" not in found, one  # there is none in them


def test_bfloat16_weights_are_loaded_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    few = [one for one in compiled if one["case"][1:3] == [16, 1]]
    assert [one["kernel"] for one in few] == ["gate_and_up_kernel", "down_kernel"]
    for one in few:
        assert one["loads"]["ld.global.v4.b32"] >= 4, one
        assert "ld.global.b16" not in one["loads"], one
