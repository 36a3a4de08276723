"""The kernels through Python: equal to torch's arithmetic, and the same bits however they are called."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import needs_compiled
from octavo import kernels
from octavo.errors import OptionError
from octavo.kernels import reference
from octavo.kernels.modules import KernelExperts, KernelLinear
from octavo.quant.formats import FORMATS, Packed
from octavo.quant.quantize import dequantize, quantize

KINDS = (*FORMATS, "bf16")
pytestmark = pytest.mark.usefixtures("own_kernels")


def random_weight(kind: str, rows: int, cols: int, seed: int = 0) -> Packed | Tensor:
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) / cols**0.5
    return w.bfloat16() if kind == "bf16" else quantize(w, FORMATS[kind], "rtn")


def random_x(tokens: int, cols: int, seed: int = 1) -> Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed)) * 3


def exact(x: Tensor, w: Packed | Tensor) -> Tensor:
    """The product of the same rounded numbers, in float64."""
    if isinstance(w, Tensor):
        return x.bfloat16().double() @ w.double().T
    return reference.rounded(x).double() @ dequantize(w).double().T


def close(y: Tensor, x: Tensor, w: Packed | Tensor) -> bool:
    """Within float32 rounding of sums of such terms."""
    wide = dequantize(w) if isinstance(w, Packed) else w
    terms = x.double().abs() @ wide.double().abs().T
    return bool(((y.double() - exact(x, w)).abs() <= 2e-6 * terms + 1e-30).all())


@pytest.mark.parametrize("name", kernels.available())
@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_the_product_of_the_rounded_numbers(kind: str, name: str) -> None:
    kernels.use(name)
    for rows, cols in ((16, 64), (50, 200), (33, 129), (1, 1), (128, 512)):
        w = random_weight(kind, rows, cols)
        for tokens in (0, 1, 2, 7, 8, 9, 31):
            x = random_x(tokens, cols)
            y = kernels.linear(x, w)
            assert y.shape == (tokens, rows)
            assert close(y, x, w), (rows, cols, tokens)


@needs_compiled
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS), rows=st.integers(1, 70), cols=st.integers(1, 300), tokens=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_a_token_gives_the_same_bits_in_any_company(kind: str, rows: int, cols: int, tokens: int, seed: int) -> None:
    w, x = random_weight(kind, rows, cols, seed), random_x(tokens, cols, seed + 1)
    kernels.set_threads(1)
    together = kernels.linear(x, w)
    assert torch.equal(together, torch.cat([kernels.linear(one[None], w) for one in x]))
    kernels.set_threads(2)
    assert torch.equal(together, kernels.linear(x, w))


@needs_compiled
@pytest.mark.parametrize("kind", list(FORMATS))
def test_every_instruction_set_gives_the_same_bits(kind: str) -> None:
    w, x = random_weight(kind, 70, 333), random_x(19, 333)
    results = []
    for name in kernels.available()[:-1]:  # all but torch
        kernels.use(name)
        results.append(kernels.linear(x, w))
    assert len(results) >= 2
    assert all(torch.equal(results[0], other) for other in results[1:])


def random_layer(kinds: tuple[str, str, str], experts: int = 4, dim: int = 96, hidden: int = 200) -> list[Any]:
    shapes = ((hidden, dim), (hidden, dim), (dim, hidden))
    return [tuple(random_weight(kinds[i], *shapes[i], seed=10 * e + i) for i in range(3)) for e in range(experts)]


def random_routing(tokens: int, experts: int, k: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)])
    return ids, torch.rand(tokens, k, generator=g).softmax(-1)


@pytest.mark.parametrize("name", kernels.available())
@pytest.mark.parametrize("kinds", [*[(k, k, k) for k in KINDS], ("q4", "q3", "q8"), ("bf16", "q2", "q4")])
def test_moe_is_the_weighted_sum_of_its_experts(kinds: tuple[str, str, str], name: str) -> None:
    kernels.use(name)
    layer = random_layer(kinds)
    experts = kernels.ExpertSet(layer)
    for tokens in (1, 2, 9, 40):
        x, (ids, weights) = random_x(tokens, 96), random_routing(tokens, 4)
        y = kernels.moe(x, ids, weights, experts)
        expected = reference.moe(x, ids, weights, layer)
        assert (y - expected).abs().max() <= 0.01 * expected.abs().max()  # a rounding of the hidden values may flip
        assert ((y - expected).abs() <= 1e-4 * expected.abs().max()).float().mean() > 0.9


@needs_compiled
@pytest.mark.parametrize("kind", KINDS)
def test_moe_gives_the_same_bits_for_one_token_and_for_many_on_any_threads(kind: str) -> None:
    experts = kernels.ExpertSet(random_layer((kind, kind, kind)))
    x, (ids, weights) = random_x(33, 96), random_routing(33, 4)
    kernels.set_threads(1)
    together = kernels.moe(x, ids, weights, experts)
    for n in (2, 3):
        kernels.set_threads(n)
        assert torch.equal(together, kernels.moe(x, ids, weights, experts))
    apart = [kernels.moe(x[i : i + 1], ids[i : i + 1], weights[i : i + 1], experts) for i in range(33)]
    assert torch.equal(together, torch.cat(apart))


def test_experts_that_nobody_chose_and_no_tokens_at_all() -> None:
    layer = random_layer(("q4", "q4", "q4"))
    experts = kernels.ExpertSet(layer)
    ids = torch.full((5, 1), 3)
    x = random_x(5, 96)
    y = kernels.moe(x, ids, torch.ones(5, 1), experts)
    alone = kernels.moe(x, ids * 0, torch.ones(5, 1), kernels.ExpertSet(layer[3:]))
    assert torch.equal(y, alone)
    nothing = kernels.moe(x[:0], ids[:0], torch.ones(0, 1), experts)
    assert nothing.shape == (0, 96)


def test_bfloat16_activations_stay_bfloat16() -> None:
    w, x = random_weight("q4", 40, 100), random_x(3, 100).bfloat16()
    y = kernels.linear(x, w)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, kernels.linear(x.float(), w).bfloat16())


def test_not_a_number_spoils_its_own_token_alone() -> None:
    w, x = random_weight("q4", 40, 100), random_x(4, 100)
    clean = kernels.linear(x, w)
    x[2, 7] = float("nan")
    y = kernels.linear(x, w)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def test_what_does_not_fit_is_told() -> None:
    w = random_weight("q4", 40, 100)
    with pytest.raises(OptionError, match=r"expected float32 or bfloat16 \[..., 100\]"):
        kernels.linear(random_x(3, 99), w)
    with pytest.raises(OptionError, match="float16"):
        kernels.linear(random_x(3, 100).half(), w)
    with pytest.raises(OptionError, match="expected bfloat16"):
        kernels.linear(random_x(3, 4), torch.randn(5, 4))
    with pytest.raises(OptionError, match="'sse9' do not run here; expected one of"):
        kernels.use("sse9")
    with pytest.raises(OptionError, match="threads is 0"):
        kernels.set_threads(0)
    with pytest.raises(OptionError, match="x has 2 tokens"):
        kernels.moe(
            random_x(2, 96), torch.zeros(3, 1).long(), torch.ones(3, 1), kernels.ExpertSet(random_layer(("q4",) * 3))
        )


@needs_compiled
def test_an_expert_that_is_not_there_is_refused() -> None:
    experts = kernels.ExpertSet(random_layer(("q4",) * 3))
    for bad in (4, -1):
        with pytest.raises(IndexError):
            kernels.moe(random_x(1, 96), torch.full((1, 1), bad), torch.ones(1, 1), experts)


def test_modules_say_what_they_are() -> None:
    assert "40 x 100, q4" in repr(KernelLinear(random_weight("q4", 40, 100)))
    assert "4 x 200 x 96, bfloat16" in repr(KernelExperts(random_layer(("bf16",) * 3)))


@needs_compiled
def test_limits_are_measured() -> None:
    from octavo.kernels.ops import Matrix

    assert kernels.dot_peak(0.02) > 1e9
    assert kernels.read_bandwidth([Matrix(random_weight("q8", 512, 512))]) > 1e6


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_threads_follow_the_environment_and_the_cores() -> None:
    show = "from octavo import kernels; print(kernels.threads())"
    expected = "3" if kernels.backend().compiled else "1"
    assert run_python(show, OMP_NUM_THREADS="3") == expected
    assert int(run_python(show, OMP_NUM_THREADS="")) <= len(os.sched_getaffinity(0))


def test_without_the_compiled_module_torch_computes_and_says_so() -> None:
    code = """
import sys
sys.modules["octavo.kernels._native"] = None  # as if it had never been built
import octavo
from octavo import kernels
print(kernels.backend())
llm = octavo.LLM.load("menny", bits=4)
print(llm.generate("7 + 5 =", temperature=0, max_tokens=4).text)
"""
    backend, text = run_python(code).splitlines()[:2]
    assert backend == "cpu backend: reference (built without a C++ compiler)"
    assert text
