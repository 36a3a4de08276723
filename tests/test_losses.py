"""The auxiliary losses against transformers and against their formulas; the tap; the experts laid out for training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from conftest import tiny_args, tiny_model
from octavo.args import MoEArgs
from octavo.load import load_model
from octavo.model import ResidentExperts
from octavo.train.experts import TrainingExperts
from octavo.train.losses import RouterTap, load_balancing_loss, router_z_loss, weighted_cross_entropy

SHAPES = [(8, 2, 1), (8, 2, 5), (4, 1, 3), (16, 4, 2), (3, 3, 2)]


def router_logits(experts: int, layers: int, tokens: int = 60, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(tokens, experts, generator=generator) for _ in range(layers)]


def random_mask(shape: tuple[int, int], seed: int = 1) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.3
    mask[0, 0] = True
    return mask


@pytest.mark.parametrize(("experts", "top_k", "layers"), SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_and_its_gradient_are_transformers(experts: int, top_k: int, layers: int, masked: bool):
    ours = [x.requires_grad_() for x in router_logits(experts, layers)]
    theirs = [x.requires_grad_() for x in router_logits(experts, layers)]
    mask = random_mask((4, 15)) if masked else None
    loss = load_balancing_loss(ours, top_k, mask)
    expected = load_balancing_loss_func(tuple(theirs), experts, top_k, None if mask is None else mask.long())
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-8)


@given(
    experts=st.integers(1, 12),
    layers=st.integers(1, 4),
    tokens=st.integers(1, 40),
    data=st.data(),
)
@settings(deadline=None, max_examples=50)
def test_pads_do_not_count(experts: int, layers: int, tokens: int, data: st.DataObject):
    """A masked loss is the loss of the kept tokens alone, whatever the pads hold."""
    top_k = data.draw(st.integers(1, experts))
    logits = router_logits(experts, layers, tokens, seed=tokens)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    mask[0] = True
    kept = [x[mask] for x in logits]
    for per_layer in (False, True):
        masked = load_balancing_loss(logits, top_k, mask, per_layer=per_layer)
        alone = load_balancing_loss(kept, top_k, per_layer=per_layer)
        torch.testing.assert_close(masked, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(router_z_loss(logits, mask), router_z_loss(kept), rtol=1e-5, atol=1e-6)


def test_balance_loss_of_a_whole_model_is_the_one_transformers_reports(tmp_path: Path):
    """The same weights and the same padded batch in both, router logits of all layers included."""
    config = MixtralConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = MixtralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = load_model(tmp_path)
    ids, mask = torch.randint(0, 101, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    mask[0, 9:] = mask[2, 4:] = 0
    positions = torch.where(mask.bool(), torch.arange(12), -1)
    with torch.no_grad(), RouterTap(ours) as tap:
        ours(ids, positions_BT=positions)
        expected = theirs(ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert expected is not None
    loss = load_balancing_loss(tap.logits_TE, 2, mask)
    assert loss.item() == pytest.approx(float(expected), rel=1e-6)


def test_a_uniform_router_gives_top_k_and_a_collapsed_one_gives_the_number_of_experts():
    uniform = [torch.zeros(50, 8)]
    assert load_balancing_loss(uniform, 2).item() == pytest.approx(2.0, abs=1e-6)
    collapsed = torch.full((50, 8), -50.0)
    collapsed[:, :2] = 50.0
    assert load_balancing_loss([collapsed], 2).item() == pytest.approx(8.0, abs=1e-4)


def test_pooling_lets_layers_make_up_for_each_other_and_per_layer_does_not():
    """Two layers that each send everything to their own half of the experts: balanced pooled, lopsided apart."""
    first, second = torch.full((50, 4), -50.0), torch.full((50, 4), -50.0)
    first[:, :2], second[:, 2:] = 50.0, 50.0
    assert load_balancing_loss([first, second], 2).item() == pytest.approx(2.0, abs=1e-4)
    assert load_balancing_loss([first, second], 2, per_layer=True).item() == pytest.approx(4.0, abs=1e-4)


def test_no_layers_cost_nothing():
    assert load_balancing_loss([], 2).item() == 0
    assert router_z_loss([]).item() == 0


def test_z_loss_is_equation_five():
    (x,) = router_logits(8, 1)
    expected = sum(float(torch.log(torch.exp(row.double()).sum()) ** 2) for row in x) / len(x)
    assert router_z_loss([x]).item() == pytest.approx(expected, rel=1e-5)


def test_weighted_cross_entropy_is_a_weighted_sum_of_log_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(2, 3, 7, generator=generator), torch.rand(2, 3, generator=generator)
    targets = torch.randint(0, 7, (2, 3), generator=generator)
    expected = 0.0
    for b in range(2):
        for t in range(3):
            log_probs = logits[b, t] - logits[b, t].exp().sum().log()
            expected -= float(weights[b, t] * log_probs[targets[b, t]])
    assert weighted_cross_entropy(logits, targets, weights).item() == pytest.approx(expected, rel=1e-5)


def test_tap_collects_every_layer_in_order_and_lets_go():
    model = tiny_model()
    ids = torch.randint(0, 101, (2, 9))
    with RouterTap(model) as tap:
        tapped = model(ids)
        assert [x.shape for x in tap.logits_TE] == [(18, 8)] * 2
        assert torch.equal(tap.logits_TE[1].topk(2).indices, tap.topk_ids_TK[1])
        tap.clear()
        assert tap.logits_TE == []
    assert torch.equal(model(ids), tapped)
    assert tap.logits_TE == []
    with pytest.raises(ZeroDivisionError), RouterTap(model):
        _ = 1 / 0
    assert not any(router._forward_hooks for router in model.routers())


def test_tap_counts_assignments_without_pads():
    model = tiny_model()
    ids = torch.randint(0, 101, (2, 9))
    mask = random_mask((2, 9))
    with RouterTap(model) as tap:
        model(ids)
        counts = tap.expert_counts_LE(8, mask)
    assert counts.shape == (2, 8)
    assert counts.sum(-1).tolist() == [2 * int(mask.sum())] * 2
    for layer, chosen in enumerate(tap.topk_ids_TK):
        expected = [int((chosen[mask.flatten()] == e).sum()) for e in range(8)]
        assert counts[layer].tolist() == expected


def test_tap_of_a_dense_model_is_empty():
    model = tiny_model(moe=None)
    with RouterTap(model) as tap:
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert tap.logits_TE == []


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (4, 1), (5, 5), (16, 4)])
def test_training_experts_are_resident_experts(experts: int, top_k: int):
    """The same parameters, outputs and gradients; an expert nobody chose has a gradient of zero or none."""
    torch.manual_seed(0)
    moe = MoEArgs(experts, top_k)
    args = tiny_args(moe=moe)
    resident, training = ResidentExperts(args, moe), TrainingExperts(args, moe)
    training.load_state_dict(resident.state_dict())
    x = torch.randn(21, args.dim)
    logits = torch.randn(21, experts)
    logits[:, 0] = -100.0 if top_k < experts else 0.0
    results = []
    for module in (resident, training):
        x_TD = x.clone().requires_grad_()
        ranked, ids = logits.topk(top_k)
        weights = ranked.softmax(-1).requires_grad_()
        y = module(x_TD, ids, weights)
        y.square().sum().backward()
        results.append((y, x_TD.grad, weights.grad, [p.grad for p in module.parameters()]))
    for ours, theirs in zip(results[1][:3], results[0][:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(results[1][3], results[0][3], strict=True):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
