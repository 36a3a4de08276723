"""Hooks on routers: observers are told everything and change nothing, also where blocks are one compiled call."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from conftest import needs_compiled, tiny_args, tiny_model
from octavo.bench.synthetic import synthetic_model
from octavo.cache import make_cache
from octavo.hooks import observe, observed, rerouted
from octavo.kernels.block import Block
from octavo.model import Mixtral, Router, Routing

Forward = Sequence[Routing]


def run(model: Mixtral, chunks: Sequence[Tensor]) -> list[Tensor]:
    """The logits of a prompt's chunks, one after the other."""
    cache = make_cache(model.args, 1, dtype=model.dtype)
    with torch.inference_mode():
        return [model(chunk, cache=cache) for chunk in chunks]


def prompt(*sizes: int) -> list[Tensor]:
    ids = torch.randint(0, 100, (1, sum(sizes)), generator=torch.Generator().manual_seed(3))
    return list(ids.split(sizes, dim=1))


def same(one: Forward, other: Forward) -> bool:
    parts = [(a, b) for mine, theirs in zip(one, other, strict=True) for a, b in zip(mine, theirs, strict=True)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in parts)


def test_a_forward_is_told_once_with_every_layer() -> None:
    model, told = tiny_model(n_layers=3), []
    seen: list[Routing] = []
    plain = [router.register_forward_hook(lambda _, __, out: seen.append(out)) for router in model.routers()]
    with observed(model, told.append):
        run(model, prompt(5, 1, 7))
    run(model, prompt(2))  # after it, nothing is told
    assert [len(forward[0].topk_ids_TK) for forward in told] == [5, 1, 7]
    for number, forward in enumerate(told):
        assert same(forward, seen[3 * number : 3 * number + 3])
    for hook in plain:
        hook.remove()
    assert all(not router._forward_hooks for router in model.routers())


def test_what_begins_in_the_middle_of_a_forward_is_told_of_the_next() -> None:
    model, told, hooks = tiny_model(n_layers=3), [], []

    def begin(*_: object) -> None:
        if not hooks:
            hooks.extend(observe(model.routers(), told.append))

    model.layers[1].register_forward_pre_hook(begin)
    run(model, prompt(4, 3))
    assert [len(forward[0].topk_ids_TK) for forward in told] == [3]


def test_another_choice_is_computed_with_and_told() -> None:
    model, told = tiny_model(), []
    inputs: list[tuple[int, Tensor]] = []

    def choose(layer: int, router: Router, x_TD: Tensor, routing: Routing) -> Routing:
        inputs.append((layer, x_TD))
        return Routing((routing.topk_ids_TK + 1) % 8, routing.topk_weights_TK, routing.logits_TE)

    (expected,) = run(model, prompt(6))
    with rerouted(model, choose), observed(model, told.append):
        (found,) = run(model, prompt(6))
    assert not torch.equal(found, expected)
    for (layer, x_TD), routing in zip(inputs, told[0], strict=True):
        assert torch.equal(routing.topk_ids_TK, (model.routers()[layer](x_TD).topk_ids_TK + 1) % 8)
    assert torch.equal(run(model, prompt(6))[0], expected)


# ---------------------------------------- compiled blocks


@needs_compiled
@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_who_merely_observes_takes_no_block_apart(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = synthetic_model(tiny_args(n_layers=3, max_seq_len=700), bits).to(dtype)
    chunks = prompt(600, 1, 3)  # more than a block computes at a time
    expected = run(model, chunks)
    apart: list[Forward] = []
    hook = model.routers()[0].register_forward_hook(lambda *_: None)  # might do anything: that block goes in parts
    others = [block.ffn_norm.register_forward_hook(lambda *_: None) for block in model.layers]
    with observed(model, apart.append):
        for found, wanted in zip(run(model, chunks), expected, strict=True):
            assert torch.equal(found, wanted)
    for one in (hook, *others):
        one.remove()

    whole, again = [], []
    monkeypatch.setattr(Block, "attend", None)  # nothing may be computed in parts
    with observed(model, whole.append), observed(model, again.append):
        for found, wanted in zip(run(model, chunks), expected, strict=True):
            assert torch.equal(found, wanted)
    assert len(whole) == len(again) == len(apart) == 3
    for one, other, third in zip(whole, again, apart, strict=True):
        assert same(one, other)
        assert same(one, third)


@needs_compiled
@pytest.mark.usefixtures("own_kernels")
def test_an_observer_sees_what_a_hook_before_it_chose() -> None:
    model, told = synthetic_model(tiny_args(), 8), []

    def choose(layer: int, router: Router, x_TD: Tensor, routing: Routing) -> Routing:
        return Routing(routing.topk_ids_TK.flip(-1), routing.topk_weights_TK, routing.logits_TE)

    plain: list[Forward] = []
    with observed(model, plain.append):
        run(model, prompt(4))
    with rerouted(model, choose), observed(model, told.append):
        run(model, prompt(4))
    assert torch.equal(told[0][0].topk_ids_TK, plain[0][0].topk_ids_TK.flip(-1))
