"""The operations around the products: norms, routing, and what blocks refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import needs_compiled, tiny_args
from octavo import kernels
from octavo.args import MoEArgs
from octavo.bench.synthetic import synthetic_model
from octavo.errors import OptionError
from octavo.kernels.block import Block, BlockStep, Heads
from octavo.kernels.ops import Matrix, normalize, route, spent
from octavo.model import RMSNorm, Router, Routing

pytestmark = [needs_compiled, pytest.mark.usefixtures("own_kernels")]
BITS = (16, 8, 4, 3, 2)
FLOATS = (torch.float32, torch.bfloat16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------- norms and routing


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 20), st.sampled_from((1e-6, 1e-2)), st.sampled_from(FLOATS))
def test_a_norm_is_the_models_and_of_the_same_bits_in_any_company(
    dim: int, tokens: int, eps: float, dtype: torch.dtype
) -> None:
    norm = RMSNorm(dim, eps).requires_grad_(False).to(dtype)
    norm.weight.copy_(random(dim, seed=dim))
    x = (random(tokens, dim, seed=tokens) * torch.logspace(-2, 2, tokens)[:, None]).to(dtype)
    kernels.set_threads(1)
    found, wanted = normalize(x, norm.weight, eps), norm(x)
    last_bits = 2**-6 if dtype == torch.bfloat16 else 2e-6  # rounded twice, now and then to another side
    assert ((found.float() - wanted.float()).abs() <= last_bits * wanted.float().abs()).all()
    assert dtype == torch.float32 or (found != wanted).sum() <= 1 + 0.02 * x.numel()
    assert torch.equal(found, torch.cat([normalize(row[None], norm.weight, eps) for row in x]))
    kernels.set_threads(2)
    assert torch.equal(found, normalize(x, norm.weight, eps))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 9), st.sampled_from(FLOATS), st.data())
def test_routing_is_the_models_and_of_the_same_bits_in_any_company(
    dim: int, tokens: int, experts: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    router = Router(dim, MoEArgs(experts, top_k)).requires_grad_(False).to(dtype)
    router.weight.copy_(random(experts, dim, seed=dim))
    x = random(tokens, dim, seed=tokens).to(data.draw(st.sampled_from(FLOATS)))
    kernels.set_threads(1)
    found, wanted = Routing(*route(x, router.weight, top_k)), router(x)
    apart = (found.logits_TE - wanted.logits_TE).abs()
    assert (apart <= 2e-6 * (x.float().abs() @ router.weight.float().abs().T)).all()
    ranked_TE = wanted.logits_TE.sort(descending=True).values
    clear_T = ((ranked_TE[:, :-1] - ranked_TE[:, 1:])[:, :top_k] > 1e-4).all(-1)
    assert torch.equal(found.topk_ids_TK[clear_T], wanted.topk_ids_TK[clear_T])
    assert torch.allclose(found.topk_weights_TK, wanted.topk_weights_TK, rtol=0, atol=1e-4)

    kernels.set_threads(2)
    alone = [route(row[None], router.weight, top_k) for row in x]
    assert all(torch.equal(found[i], torch.cat([one[i] for one in alone])) for i in range(3))


def test_equal_experts_go_by_index_and_not_a_number_before_all() -> None:
    gate, x = random(3, 40)[[0, 1, 1, 2, 0, 2]], 30 * random(9, 40, seed=1)
    for clean in (True, False):
        ids, weights, logits = route(x, gate, 4)
        ranked = logits.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(ids, ranked.indices[:, :4])
        assert torch.allclose(weights, ranked.values[:, :4].softmax(-1), rtol=1e-5, equal_nan=True)
        assert weights.isnan().any() != clean
        gate[4, 0] = x[5] = float("nan")


# ---------------------------------------- what is refused

NORM, K = torch.ones(48), torch.zeros(2, 3, 2, 5, 8)
ROTATION = torch.view_as_complex(random(4, 3, 2)).T


def a_step(**changes: Any) -> BlockStep:
    """Two layers, three rows, two key-value heads, five slots, eight numbers."""
    given = {"k": K.clone(), "v": K.clone(), "slots": torch.tensor([[0], [4], [2]]), "mask": None, "rotation": ROTATION}
    return BlockStep(*(given | changes).values())


def a_block(norm: Tensor = NORM, heads: tuple[int, int, int] = (4, 2, 8), n: int = 4) -> Block:
    """48 numbers a row; four heads, which share two keys of eight numbers."""
    matrices = [Matrix(random(*shape).bfloat16()) for shape in ((32, 48), (16, 48), (16, 48), (48, 32))]
    return Block(norm, 1e-5, matrices[:n], Heads(*heads))


def a_mixture(norm: Tensor, gate_ED: Tensor, top_k: int = 2) -> None:
    model = synthetic_model(tiny_args(dim=48), 16)
    a_block().set_mixture(norm, 1e-5, gate_ED, top_k, model.layers[0].feed_forward.experts.experts)


def decode(*shape: int, layer: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    a_block().forward(torch.zeros(shape, dtype=dtype), a_step(**changes), layer)


ALIKE = "do not lie alike, or the numbers of a head are not adjacent"
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: a_step(v=K.bfloat16()), "expected one"),
    (lambda: a_step(v=K[:, :, :, :4]), ALIKE),
    (lambda: a_step(v=K.transpose(2, 3).contiguous().transpose(2, 3)), ALIKE),
    (lambda: a_step(k=K.mT.contiguous().mT, v=K.mT.contiguous().mT), ALIKE),
    (lambda: a_step(slots=torch.tensor([[0], [4]])), r"expected int64 \[3, tokens\]"),
    (lambda: a_step(slots=torch.tensor([0, 4, 2])), r"expected int64 \[3, tokens\]"),
    (lambda: a_step(slots=torch.tensor([[0.0], [4], [2]])), "slots are torch.float32"),
    (lambda: a_step(slots=torch.tensor([[0], [5], [2]])), r"slots are \[\[0\], \[5\], \[2\]\]"),
    (lambda: a_step(slots=torch.tensor([[0], [-1], [2]])), "expected 0 to 4"),
    (lambda: a_step(mask=torch.ones(3, 1, 4).bool()), r"expected bool \[3, 1, 5\]"),
    (lambda: a_step(mask=torch.ones(3, 1, 5)), "the mask is torch.float32"),
    (lambda: a_step(rotation=ROTATION[:2]), "4 numbers for each of 3 tokens"),
    (lambda: a_step(rotation=ROTATION.to(torch.complex128)), "expected complex64"),
    (lambda: decode(2, 48), "expected torch.float32, 3 rows of 48"),
    (lambda: decode(3, 48, dtype=torch.bfloat16), "activations are torch.bfloat16"),
    (lambda: decode(3, 48, k=K.bfloat16(), v=K.bfloat16()), "the cache is torch.bfloat16"),
    (lambda: decode(3, 48, k=K[:, :, :1], v=K[:, :, :1]), r"heads \(1, 8\)"),
    (lambda: decode(3, 48, layer=2), "layer is 2; the cache has 2"),
    (lambda: decode(3, 48, layer=-1), "layer is -1"),
    (lambda: a_step(k=K[0], v=K[0]), "expected layers, rows"),
    (lambda: a_block(torch.ones(47)), "the norm has 47 numbers"),
    (lambda: a_block(heads=(8, 2, 8)), "do not fit"),
    (lambda: a_block(heads=(3, 2, 8)), "do not fit"),
    (lambda: a_block(n=3), "do not fit"),
    (lambda: a_mixture(NORM, torch.ones(8, 48), 9), "9 experts a token"),
    (lambda: a_mixture(NORM, torch.ones(8, 48), 0), "0 experts a token"),
    (lambda: a_mixture(NORM, torch.ones(9, 48)), "there are 8 experts"),
    (lambda: route(torch.ones(1, 48), torch.ones(3, 48), 4), "4 experts a token"),
    (lambda: a_mixture(NORM.bfloat16(), torch.ones(8, 48)), "expected one"),
    (lambda: a_mixture(torch.ones(47), torch.ones(8, 48)), r"\[..., 48\]"),
    (lambda: a_mixture(NORM, torch.ones(8, 47)), r"\[..., 48\]"),
    (lambda: a_mixture(NORM, torch.ones(8, 48).double()), "expected float32 or bfloat16"),
    (lambda: normalize(torch.ones(3, 8), torch.ones(8).bfloat16(), 1e-5), "expected one"),
    (lambda: route(torch.ones(3, 7), torch.ones(4, 8), 2), r"\[..., 8\]"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()


def test_what_fits_is_taken_however_it_lies() -> None:
    """A tensor's every other number, or its rows as columns."""
    block, x, slots, mask = (
        a_block(),
        random(48, 3, seed=1).T,
        torch.tensor([[0, 9, 4, 9, 2]]).T[::2],
        random(5, 1, 3).permute(2, 1, 0) > 0,
    )
    keys, alike = K.clone(), K.clone()
    found = block.attend(x, a_step(k=keys, slots=slots, mask=mask), 1)
    plain = {"slots": slots.clone(), "mask": mask.contiguous(), "rotation": ROTATION.contiguous()}
    assert torch.equal(found, block.attend(x.contiguous(), a_step(k=alike, **plain), 1))
    assert torch.equal(keys, alike)
    assert keys[1].any()
    assert not keys[0].any()


def test_views_are_read_as_what_they_show() -> None:
    weight = torch.arange(8.0)[::2]
    assert torch.equal(normalize(torch.ones(1, 4), weight, 1e-5), normalize(torch.ones(1, 4), weight.clone(), 1e-5))
    keys, alike, rotation = K.clone(), K.clone(), torch.polar(torch.ones(3, 4), random(3, 4))
    for k, turned in ((keys, rotation.conj()), (alike, rotation.conj().resolve_conj())):
        a_block().attend(random(3, 48), a_step(k=k, rotation=turned), 0)
    assert torch.equal(keys, alike)


def test_without_compiled_kernels_there_is_nothing_to_decode_with() -> None:
    kernels.use("reference")
    for call in (a_step, a_block, spent, lambda: normalize(K, K[0, 0, 0, 0], 1e-5)):
        with pytest.raises(OptionError, match="needs the compiled kernels"):
            call()
