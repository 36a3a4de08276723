"""Interventions are what they say, and the controls above all: each is compared with a slow, obvious twin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import tiny_model
from octavo.args import MoEArgs
from octavo.errors import OptionError
from octavo.hooks import observed
from octavo.model import Router, Routing
from octavo.routing.interventions import (
    KINDS,
    Disable,
    Force,
    Intervention,
    Project,
    Random,
    RandomProject,
    Shuffled,
    Swap,
    TopK,
    applied,
    check_interventions,
    parse_disabled,
    parse_intervention,
)

T, D, E, K = 200, 16, 8, 2
MODEL = tiny_model()


def make_router(seed: int = 0, top_k: int = K, n_experts: int = E) -> tuple[Router, Tensor, Routing]:
    """A router, what it reads, and what it chooses."""
    torch.manual_seed(seed)
    router = Router(D, MoEArgs(n_experts, top_k)).requires_grad_(False)
    router.weight.normal_()
    x_TD = torch.randn(T, D)
    return router, x_TD, router(x_TD)


def change(one: Intervention, router: Router, x_TD: Tensor, routing: Routing) -> Routing:
    return one.begin()(router, x_TD, routing)


def slowly(logits: Tensor, k: int, banned: Sequence[int] = (), forced: Sequence[int] = ()) -> tuple[list, list]:
    """Ids and weights, token by token in Python."""
    all_ids, all_weights = [], []
    for row in logits.tolist():
        by_logit = sorted((e for e in range(len(row)) if e not in banned), key=lambda e: (-row[e], e))
        ids = by_logit[:k]
        for expert in forced:
            if expert not in ids:
                ids.remove(next(e for e in reversed(ids) if e not in forced))
                ids.append(expert)
        ids.sort(key=lambda e: (-row[e], e))
        powers = [math.exp(row[e]) for e in ids]
        all_ids.append(ids)
        all_weights.append([power / sum(powers) for power in powers])
    return all_ids, all_weights


def assert_is(routing: Routing, expected: tuple[list, list]) -> None:
    assert routing.topk_ids_TK.tolist() == expected[0]
    torch.testing.assert_close(routing.topk_weights_TK, torch.tensor(expected[1]), rtol=1e-5, atol=1e-6)


def same(one: Routing, other: Routing) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------ each of them


@pytest.mark.parametrize("banned", [(3,), (0, 7), (1, 2, 3, 4, 5, 6)])
def test_disabled_experts_are_never_chosen_and_the_next_best_take_over(banned: tuple[int, ...]) -> None:
    router, x, before = make_router()
    after = change(Disable(None, banned), router, x, before)
    assert_is(after, slowly(before.logits_TE, K, banned=banned))
    assert not np.isin(after.topk_ids_TK.numpy(), banned).any()
    untouched = ~np.isin(before.topk_ids_TK.numpy(), banned).any(axis=1)
    assert 0 < untouched.sum() < T
    assert torch.equal(after.topk_weights_TK[untouched], before.topk_weights_TK[untouched])


def test_swapped_experts_take_each_others_tokens_with_the_same_weights() -> None:
    router, x, before = make_router()
    after = change(Swap(None, 2, 5), router, x, before)
    expected = [[{2: 5, 5: 2}.get(e, e) for e in row] for row in before.topk_ids_TK.tolist()]
    assert after.topk_ids_TK.tolist() == expected != before.topk_ids_TK.tolist()
    assert torch.equal(after.topk_weights_TK, before.topk_weights_TK)
    assert torch.equal(after.logits_TE.gather(1, after.topk_ids_TK), before.logits_TE.gather(1, before.topk_ids_TK))
    assert same(change(Swap(None, 5, 2), router, x, after), before)


@pytest.mark.parametrize(("top_k", "forced"), [(1, (4,)), (2, (4,)), (2, (4, 1)), (3, (0, 7)), (8, (3,))])
def test_forced_experts_take_the_places_of_the_last(top_k: int, forced: tuple[int, ...]) -> None:
    router, x, before = make_router(top_k=top_k)
    after = change(Force(None, forced), router, x, before)
    assert_is(after, slowly(before.logits_TE, top_k, forced=forced))
    assert all((after.topk_ids_TK == expert).any(dim=1).all() for expert in forced)
    already = torch.stack([(before.topk_ids_TK == expert).any(dim=1) for expert in forced]).all(dim=0)
    assert torch.equal(after.topk_weights_TK[already], before.topk_weights_TK[already])
    assert already.any() or len(forced) == top_k


@pytest.mark.parametrize("k", range(1, E + 1))
def test_another_top_k_is_what_another_router_would_choose(k: int) -> None:
    router, x, before = make_router()
    other, _, expected = make_router(top_k=k)
    assert torch.equal(other.weight, router.weight)
    assert same(change(TopK(k), router, x, before), expected)


def test_weights_of_what_did_not_change_stay_bit_for_bit() -> None:
    """Kernels round otherwise than torch, so that weighing anew would change what nobody touched."""
    router, x, before = make_router()
    odd = before._replace(topk_weights_TK=before.topk_weights_TK + 1e-4)
    for one in (TopK(K), Force(None, (int(before.topk_ids_TK[0, 0]),)), Disable(None, (3,))):
        after = change(one, router, x, odd)
        kept = (after.topk_ids_TK == before.topk_ids_TK).all(dim=1)
        assert kept[0] or isinstance(one, Disable)
        assert torch.equal(after.topk_weights_TK[kept], odd.topk_weights_TK[kept])
    assert not torch.equal(after.topk_weights_TK, odd.topk_weights_TK)


@pytest.mark.parametrize("n_directions", [1, 3])
def test_a_projection_is_a_router_without_that_part_of_a_row(n_directions: int) -> None:
    router, x, before = make_router()
    directions = np.random.default_rng(1).standard_normal((n_directions, D)) * 7
    after = change(Project(0, 3, directions if n_directions > 1 else directions[0]), router, x, before)
    row = router.weight[3].double().numpy()
    inside, *_ = np.linalg.lstsq(directions.T, row, rcond=None)
    other = Router(D, MoEArgs(E, K)).requires_grad_(False)
    other.weight.copy_(router.weight)
    other.weight[3] = torch.from_numpy(row - directions.T @ inside).float()
    expected = other(x)
    torch.testing.assert_close(after.logits_TE, expected.logits_TE, rtol=1e-4, atol=1e-4)
    assert (after.topk_ids_TK == expected.topk_ids_TK).all(dim=1).float().mean() > 0.99  # but for near ties
    others = [e for e in range(E) if e != 3]
    assert torch.equal(after.logits_TE[:, others], before.logits_TE[:, others])
    assert not torch.equal(after.topk_ids_TK, before.topk_ids_TK)


def test_projecting_out_a_whole_row_leaves_a_logit_of_zero_and_what_is_orthogonal_changes_nothing() -> None:
    router, x, before = make_router()
    row = router.weight[5].numpy()
    gone = change(Project(0, 5, row), router, x, before)
    torch.testing.assert_close(gone.logits_TE[:, 5], torch.zeros(T), rtol=0, atol=1e-4)
    across = np.zeros(D)
    across[:2] = -row[1], row[0]
    kept = change(Project(0, 5, across), router, x, before)
    torch.testing.assert_close(kept.logits_TE, before.logits_TE, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ controls


def test_random_directions_are_of_unit_length_and_evenly_drawn() -> None:
    dim, n = 64, 400
    drawn = np.stack([RandomProject(1, 2, seed).basis(dim)[0] for seed in range(n)]).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-6)
    cosines = (drawn @ drawn.T)[np.triu_indices(n, 1)]
    assert np.abs(cosines).max() < 0.9  # another seed is another direction
    # Of even directions a cosine has mean 0 and square 1 / dim, with standard deviation sqrt(2) / dim.
    assert abs(cosines.mean()) < 5 / math.sqrt(dim * len(cosines)) + 1 / n
    assert abs((cosines**2).mean() * dim - 1) < 0.05
    assert np.array_equal(RandomProject(1, 2, 7).basis(dim), RandomProject(1, 2, 7).basis(dim))
    assert not np.array_equal(RandomProject(1, 2, 7).basis(dim), RandomProject(1, 3, 7).basis(dim))
    several = RandomProject(0, 0, 3, dimensions=5).basis(dim)
    np.testing.assert_allclose(several @ several.T, np.eye(5), atol=1e-6)


def test_a_random_projection_is_a_projection_of_that_direction() -> None:
    router, x, before = make_router()
    one = RandomProject(0, 3, seed=4)
    assert same(change(one, router, x, before), change(Project(0, 3, one.basis(D)), router, x, before))
    control = Project(0, 3, np.eye(D)[:2]).control(np.random.default_rng(0), E)
    assert (control.layer, control.expert, control.dimensions) == (0, 3, 2)


def test_shuffled_tokens_get_each_others_choices_and_loads_are_exactly_kept() -> None:
    router, x, before = make_router()
    after = change(Shuffled(seed=1), router, x, before)
    rows = [[tuple(map(tuple, part.tolist())) for part in one] for one in (before, after)]
    assert sorted(zip(*rows[0], strict=True)) == sorted(zip(*rows[1], strict=True))
    loads = [torch.bincount(one.topk_ids_TK.flatten(), minlength=E) for one in (before, after)]
    assert torch.equal(*loads)
    assert not (after.logits_TE == before.logits_TE).all(dim=1).any()  # nobody keeps his own
    assert same(change(Shuffled(seed=1), router, x, before), after)
    assert not same(change(Shuffled(seed=2), router, x, before), after)


@given(n=st.integers(2, 9), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_shuffle_is_one_cycle(n: int, seed: int) -> None:
    router, x, before = make_router()
    few = Routing(*(part[:n] for part in before))
    after = change(Shuffled(seed), router, x[:n], few)
    source = [(few.logits_TE == row).all(dim=1).nonzero().item() for row in after.logits_TE]
    seen, at = [0], source[0]
    while at != 0:
        seen.append(at)
        at = source[at]
    assert sorted(seen) == list(range(n))


def test_a_shuffle_of_one_token_is_none_and_each_forward_has_its_own() -> None:
    router, x, before = make_router()
    shuffle = Shuffled().begin()
    alone = Routing(*(part[:1] for part in before))
    assert same(shuffle(router, x[:1], alone), alone)
    assert not same(shuffle(router, x, before), shuffle(router, x, before))


def test_shuffling_and_chance_leave_no_relation_between_a_token_and_its_experts() -> None:
    """Tokens of eight kinds, each with an expert of its own: afterwards they agree as often as by chance."""
    torch.manual_seed(0)
    router = Router(D, MoEArgs(E, K)).requires_grad_(False)
    router.weight.copy_(torch.eye(E, D))
    kinds = torch.randint(0, E, (4000,))
    x = torch.eye(E, D)[kinds] * 9 + torch.randn(4000, D) * 0.01
    before = router(x)
    assert torch.equal(before.topk_ids_TK[:, 0], kinds)
    share = torch.bincount(kinds, minlength=E) / 4000
    for one, chance in ((Shuffled(), float((share**2).sum())), (Random(), 1 / E)):
        after = change(one, router, x, before)
        agree = float((after.topk_ids_TK[:, 0] == kinds).float().mean())
        assert abs(agree - chance) < 5 * math.sqrt(chance / 4000), one


def test_random_choices_are_uniform_pairs_with_the_tokens_own_weights() -> None:
    router, x, _ = make_router()
    x = x[:1].repeat(8000, 1)  # the router itself would always choose the same
    before = router(x)
    after = change(Random(seed=3), router, x, before)
    assert torch.equal(after.topk_weights_TK, before.topk_weights_TK)
    assert torch.equal(after.logits_TE.gather(1, after.topk_ids_TK), before.logits_TE.gather(1, before.topk_ids_TK))
    assert torch.equal(after.logits_TE.sort(dim=1).values, before.logits_TE.sort(dim=1).values)
    first, second = after.topk_ids_TK.T
    assert (first != second).all()
    counts = torch.bincount(first * E + second, minlength=E * E).view(E, E)
    expected = 8000 / (E * (E - 1))
    off = ~torch.eye(E, dtype=torch.bool)
    chi_square = float(((counts[off] - expected) ** 2 / expected).sum())
    assert 20 < chi_square < 105  # 55 degrees of freedom: beyond these once in 10,000
    assert same(change(Random(seed=3), router, x, before), after)
    assert not same(change(Random(seed=4), router, x, before), after)


def test_random_choices_leave_out_the_disabled_and_are_even_among_the_others() -> None:
    router, x, _ = make_router()
    x = x[:1].repeat(6000, 1)
    chance = change(Random(), router, x, change(Disable(None, (1, 4)), router, x, router(x)))
    load = torch.bincount(chance.topk_ids_TK.flatten(), minlength=E)
    assert load[[1, 4]].tolist() == [0, 0]
    others = load[[0, 2, 3, 5, 6, 7]].float()
    assert float(((others - 2000) ** 2 / 2000).sum()) < 26  # 5 degrees of freedom
    disabled_later = change(Disable(None, (1, 4)), router, x, change(Random(), router, x, router(x)))
    load = torch.bincount(disabled_later.topk_ids_TK.flatten(), minlength=E)
    assert load[[1, 4]].tolist() == [0, 0]
    assert float(((load[[0, 2, 3, 5, 6, 7]] - 2000) ** 2 / 2000).sum()) < 26


# ------------------------------------------------------------------ together, and in a model

LAYERS = st.none() | st.integers(0, 1)
EXPERT = st.integers(0, E - 1)
EXPERTS = st.lists(EXPERT, min_size=1, max_size=3, unique=True).map(tuple)
SEEDS = st.integers(0, 10**9 - 1)
ANY = st.one_of(
    st.builds(Disable, LAYERS, EXPERTS),
    st.lists(EXPERT, min_size=2, max_size=2, unique=True).flatmap(
        lambda pair: st.builds(Swap, LAYERS, st.just(pair[0]), st.just(pair[1]))
    ),
    st.builds(Force, LAYERS, EXPERTS),
    st.builds(TopK, st.integers(1, E), LAYERS),
    st.builds(RandomProject, st.integers(0, 1), EXPERT, SEEDS, st.integers(1, 3)),
    st.builds(Shuffled, SEEDS, LAYERS),
    st.builds(Random, SEEDS, LAYERS),
)


@given(interventions=st.lists(ANY, max_size=5), seed=st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_whatever_is_done_a_routing_stays_a_routing(interventions: list[Intervention], seed: int) -> None:
    """What is accepted gives distinct ids, best first, and weights that are the softmax of their logits."""
    try:
        check_interventions(MODEL, interventions)
    except OptionError:
        return
    chosen: list[Routing] = []
    ids = torch.randint(0, 101, (1, 12), generator=torch.Generator().manual_seed(seed))
    with applied(MODEL, interventions), observed(MODEL, chosen.extend):
        assert torch.isfinite(MODEL(ids)).all()
    for layer, one in enumerate(chosen):
        mine = [i for i in interventions if i.at(layer)]
        k = next((i.k for i in reversed(mine) if isinstance(i, TopK)), K)
        assert one.topk_ids_TK.shape == one.topk_weights_TK.shape == (12, k)
        assert all(len(set(row)) == k for row in one.topk_ids_TK.tolist())
        logits_TK = one.logits_TE.gather(1, one.topk_ids_TK)
        assert (logits_TK.diff(dim=1) <= 0).all()
        torch.testing.assert_close(one.topk_weights_TK, logits_TK.softmax(dim=1), rtol=1e-5, atol=1e-6)
        if not any(isinstance(i, Swap) for i in mine):
            for i in mine:
                if isinstance(i, Disable):
                    assert not np.isin(one.topk_ids_TK.numpy(), i.experts).any()
        for i in mine:
            if isinstance(i, Force):
                assert all((one.topk_ids_TK == expert).any(dim=1).all() for expert in i.experts)


def test_only_the_layers_meant_are_touched_and_only_meanwhile() -> None:
    ids = torch.arange(20)[None]
    plain, chosen = MODEL(ids), list[Routing]()
    with applied(MODEL, [Disable(1, (0, 1, 2))]), observed(MODEL, chosen.extend):
        changed = MODEL(ids)
    assert np.isin(chosen[0].topk_ids_TK.numpy(), (0, 1, 2)).any()
    assert not np.isin(chosen[1].topk_ids_TK.numpy(), (0, 1, 2)).any()
    assert not torch.equal(changed, plain)
    assert torch.equal(MODEL(ids), plain)
    with pytest.raises(ZeroDivisionError), applied(MODEL, [Random()]):
        raise ZeroDivisionError
    assert not any(router._forward_hooks for router in MODEL.routers())


@pytest.mark.parametrize(
    "identity",
    [[], [TopK(K)], [Swap(None, 1, 2), Swap(None, 1, 2)], [Swap(0, 3, 4), Swap(0, 4, 3)], [TopK(5), TopK(K)]],
)
def test_what_changes_nothing_changes_no_bit(identity: list[Intervention]) -> None:
    ids = torch.arange(30)[None]
    plain = MODEL(ids)
    with applied(MODEL, identity):
        assert torch.equal(MODEL(ids), plain) or identity == [TopK(5), TopK(K)]
        torch.testing.assert_close(MODEL(ids), plain)


@pytest.mark.parametrize(
    ("interventions", "words"),
    [
        ([Disable(2, (0,))], "disable:2:0: there is no layer 2"),
        ([Disable(-1, (0,))], "there is no layer -1"),
        ([Disable(0, (8,))], "there is no expert 8"),
        ([Swap(None, 0, 9)], "swap:*:0,9: there is no expert 9"),
        ([Swap(0, 1, 1)], "names an expert twice"),
        ([Disable(0, ())], "names no expert"),
        ([Disable(0, tuple(range(7)))], "of 8 experts 1 are left in a layer, and a token gets 2"),
        ([Disable(0, (0, 1, 2)), Disable(None, (3, 4, 5, 6))], "1 are left"),
        ([Disable(None, tuple(range(8))), TopK(1)], "0 are left"),
        ([Disable(0, (1,)), TopK(8)], "topk:*:8: of 8 experts 7 are left"),
        ([TopK(0)], "topk:*:0: expected 1 to 8"),
        ([TopK(9, 1)], "topk:1:9: expected 1 to 8"),
        ([Force(0, (1, 2, 3))], "more experts than the 2"),
        ([Disable(0, (1,)), Force(0, (1,))], "disabled"),
        ([Disable(0, (1,)), Swap(0, 1, 2), Force(0, (2,))], "disabled"),
        ([Force(0, (1,)), TopK(1)], "topk:*:1: comes after force:0:1"),
        ([Shuffled(), RandomProject(0, 1)], "comes after shuffle:*:0"),
        ([Project(0, 1, np.ones(31), "a.npy")], "project:0:1:a.npy: a direction of 31 numbers; expected"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(interventions: list[Intervention], words: str) -> None:
    with pytest.raises(OptionError) as caught, applied(MODEL, interventions):
        pass
    assert words in caught.value.message
    assert caught.value.hint
    assert not any(router._forward_hooks for router in MODEL.routers())


def test_what_is_fine_after_all_is_taken() -> None:
    check_interventions(MODEL, [Disable(None, tuple(range(7))), TopK(1), Shuffled(), Random()])
    check_interventions(MODEL, [Force(0, (1,)), TopK(1, 1), RandomProject(1, 2)])


def test_a_dense_model_has_no_routing() -> None:
    with pytest.raises(OptionError, match="dense"):
        check_interventions(tiny_model(moe=None), [TopK(1)])


@pytest.mark.parametrize(
    ("directions", "words"),
    [
        (np.zeros(D), "zero"),
        (np.array([[1.0] * D, [0.0] * D]), "zero"),
        (np.array([1.0, np.nan]), "NaN"),
        (np.array([np.inf, 1.0]), "infinity"),
        (np.ones((2, D)), "sum of the others"),
        (np.ones((2, 2, 2)), r"expected [D] or [k, D]"),
        (np.array(3.0), "expected [D]"),
        (np.ones((0, D)), "expected [D]"),
        (np.array(["a"] * D), "expected [D]"),
        (np.random.default_rng(0).standard_normal((4, 3)), "4 directions in 3 dimensions"),
    ],
)
def test_bad_directions_are_refused(directions: np.ndarray, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        Project(0, 1, directions)
    assert words in caught.value.message
    assert caught.value.hint


def test_directions_of_any_length_are_the_same() -> None:
    row = np.random.default_rng(0).standard_normal(D)
    for scale in (1e-300, -3.0, 1e300):
        np.testing.assert_allclose(
            np.abs(Project(0, 1, row * scale).basis), np.abs(Project(0, 1, row).basis), atol=1e-6
        )


# ------------------------------------------------------------------ as text


@given(ANY)
@settings(deadline=None)
def test_text_and_back(one: Intervention) -> None:
    assert parse_intervention(str(one)) == one
    if isinstance(one, Disable):
        assert parse_disabled(str(one).removeprefix("disable:")) == one


@given(
    st.text() | st.builds("{}:{}".format, st.sampled_from(sorted(KINDS)), st.text("0123456789:,*x-. ²", max_size=12))
)
@settings(max_examples=300, deadline=None)
def test_any_text_is_an_intervention_or_refused(text: str) -> None:
    for parse in (parse_intervention, parse_disabled):
        try:
            one: object = parse(text)
        except OptionError as error:
            one = error
        assert one.hint if isinstance(one, OptionError) else isinstance(one, Intervention)


@pytest.mark.parametrize("text", [
    "disable:3", "disable:3:", "disable::5", "disable:3:5:1", "disable:-1:2", "topk:1",
    "topk:1:2,3", "swap:1:2", "swap:1:2,3,4", "force:x:1", "project:*:1:a.npy",
    "project:1:2", "project:1:2:", "random-project:1:2", "shuffle:1:2:3", "random:a",
    "shuffle:*:1234567890",
])  # fmt: skip
def test_a_bad_text_is_told_what_was_expected(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_intervention(text)
    assert caught.value.message == f"--do {text!r}: expected {KINDS[text.split(':')[0]]}"


def test_short_forms() -> None:
    assert parse_intervention("shuffle") == Shuffled(0, None)
    assert parse_intervention("random:3") == Random(0, 3)
    assert parse_intervention("shuffle:*:7") == Shuffled(7, None)
    assert parse_disabled("*:5") == Disable(None, (5,))
    with pytest.raises(OptionError, match="--disable '5': expected LAYER:EXPERT"):
        parse_disabled("5")
    with pytest.raises(OptionError, match="expected one of disable, swap"):
        parse_intervention("destroy:1:2")


def test_directions_come_from_a_file(tmp_path: Path) -> None:
    path, directions = tmp_path / "a:b.npy", np.random.default_rng(0).standard_normal((2, D))
    np.save(path, directions)
    one = parse_intervention(f"project:1:5:{path}")
    assert isinstance(one, Project)
    assert (one.layer, one.expert, str(one)) == (1, 5, f"project:1:5:{path}")
    np.testing.assert_array_equal(one.basis, Project(1, 5, directions).basis)
    assert one != Project(1, 5, directions)  # arrays have no one equality
    np.savez(tmp_path / "several.npz", a=directions)
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npy").touch()
    for name, words in (
        ("several.npz", "several arrays"),
        ("objects.npy", "no NumPy file"),
        ("text.npy", "no NumPy file"),
        ("empty.npy", "no NumPy file"),
        ("absent.npy", "No such file"),
        ("", "directory"),
    ):
        with pytest.raises(OptionError) as caught:
            parse_intervention(f"project:1:5:{tmp_path / name}")
        assert str(tmp_path / name) in caught.value.message
        assert words in caught.value.message
