"""Experts and routers compared by their weights: against independent formulas, planted structure, and every layout."""

from __future__ import annotations

import itertools
import json
import re
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment

from layouts import CASES, make_sample
from moe_folders import Expert, assert_same, noisy, random_expert, random_layers, reordered, write_moe
from octavo.errors import CheckpointError, ConfigError, OptionError
from octavo.routing import experts as module
from octavo.routing.experts import (
    ExpertLayer,
    analyse_experts,
    analyse_routers,
    as_arrays,
    as_json,
    best_assignment,
    effective_rank,
    inner_products,
    pair_products,
    steps,
)
from octavo.routing.weights import ExpertWeights, open_weights
from octavo.storage.files import place_of
from run_octavo import refused, run
from tiny_folder import make_tiny_folder

MATRICES = ("w1", "w2", "w3")


def analysed(folder: Path, routers: list[torch.Tensor], layers: list[list[Expert]], **how: Any) -> list[ExpertLayer]:
    return list(analyse_experts(open_weights(write_moe(folder, routers, layers)), **how))


def off_diagonal(values: np.ndarray) -> np.ndarray:
    return values[~np.eye(len(values), dtype=bool)]


# ---------------------------------------- routers


def test_router_rows_by_hand(tmp_path: Path) -> None:
    router = torch.tensor([[3.0, 4, 0, 0], [4, 3, 0, 0], [0, 0, -2, 0], [0, 0, 0, 0]])
    layers = [[random_expert(np.random.default_rng(0), 6, 4) for _ in range(4)]]
    (one,) = analyse_routers(open_weights(write_moe(tmp_path, [router], layers)))
    np.testing.assert_allclose(one.norms, [5, 5, 2, 0])
    np.testing.assert_allclose(one.cosine[:3, :3], [[1, 0.96, 0], [0.96, 1, 0], [0, 0, 1]], atol=1e-12)
    assert np.isnan(one.cosine[3]).all()
    assert (one.layer, one.dim) == (0, 4)


def test_a_router_row_that_is_not_finite_spoils_itself_only(tmp_path: Path) -> None:
    routers, layers = random_layers(0, 1, 4, 6, 8)
    routers[0][2, 3] = float("nan")
    weights = open_weights(write_moe(tmp_path, routers, layers))
    (one,) = analyse_routers(weights)
    assert np.isfinite(one.norms).tolist() == [True, True, False, True]
    assert np.isfinite(one.cosine).sum() == 9
    (layer,) = analyse_experts(weights)
    assert np.isnan(layer.alignment[2]).all()
    assert np.isfinite(np.delete(layer.alignment, 2, axis=0)).all()
    plain = json.loads(json.dumps(as_json(one), allow_nan=False))
    assert plain["norms"][2] is None
    assert plain["cosine"][0][2] is None
    assert plain["cosine"][0][0] == pytest.approx(1)


# ---------------------------------------- independent formulas


@pytest.mark.parametrize(("width", "dim"), [(20, 12), (12, 12), (7, 12)])
def test_every_figure_by_its_definition(width: int, dim: int, tmp_path: Path) -> None:
    experts = 3
    routers, layers = random_layers(1, 2, experts, width, dim)
    layers[1][2] = noisy(layers[1][0], 0.5)
    done: list[int] = []
    weights = open_weights(write_moe(tmp_path, routers, layers))
    both = list(analyse_experts(weights, progress=done.append))
    assert sum(done) == steps(weights) == 2 * (9 + 3)
    assert [one.layer for one in both] == [0, 1]
    rank = min(width, dim)
    for one, router, theirs in zip(both, routers, layers, strict=True):
        exact = [{m: t.double().numpy() for m, t in zip(MATRICES, expert, strict=True)} for expert in theirs]
        assert one.n_matched == width
        assert one.ks.tolist() == sorted({k for k in (1, 2, 4, 8) if k <= rank} | {rank})
        assert one.cka_null == width / (width + dim + 1)
        for m in MATRICES:
            flat = np.stack([expert[m].ravel() for expert in exact])
            flat /= np.linalg.norm(flat, axis=1, keepdims=True)
            np.testing.assert_allclose(one.cosine[m], flat @ flat.T, atol=1e-6)
            singular = np.stack([np.linalg.svd(expert[m], compute_uv=False) for expert in exact])
            # Where matrices are square, the least may be small, and a Gram matrix squares it.
            np.testing.assert_allclose(one.spectra[m], singular, atol=2e-3 * singular.max())
            shares = singular / singular.sum(1, keepdims=True)
            np.testing.assert_allclose(one.effective_rank[m], np.exp(-(shares * np.log(shares)).sum(1)), rtol=1e-3)
        for i, j in itertools.product(range(experts), repeat=2):
            x, y = exact[i]["w1"], exact[j]["w1"]
            across = np.linalg.norm(x @ y.T) ** 2
            cka = across / np.linalg.norm(x @ x.T) / np.linalg.norm(y @ y.T)
            assert one.cka[i, j] == pytest.approx(cka, abs=1e-5)
        rows = router.double().numpy()
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        null = []
        for i, expert in enumerate(exact):
            v = np.linalg.svd(expert["w1"], full_matrices=False)[2]
            shares = np.array([[np.sum((v[:k] @ row) ** 2) for k in one.ks] for row in rows])
            np.testing.assert_allclose(one.alignment[i], shares[i], atol=1e-4)
            null += [shares[j] for j in range(experts) if j != i]
        np.testing.assert_allclose(one.alignment_null, null, atol=1e-4)
        for i, j in itertools.combinations(range(experts), 2):
            for m, value in matched_by_definition(exact[i], exact[j]).items():
                assert one.matched[m][i, j] == one.matched[m][j, i] == pytest.approx(value, abs=1e-6)
            assert all(one.matched[m][i, i] == 1 for m in MATRICES)


def matched_by_definition(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The full Hungarian method over all neurons, with plain loops."""

    def vectors(expert: Mapping[str, np.ndarray], neuron: int) -> dict[str, np.ndarray]:
        of = {"w1": expert["w1"][neuron], "w2": expert["w2"][:, neuron], "w3": expert["w3"][neuron]}
        return {m: v / np.linalg.norm(v) for m, v in of.items()}

    count = len(one["w1"])
    cosines = {m: np.zeros((count, count)) for m in MATRICES}
    for a, b in itertools.product(range(count), repeat=2):
        x, y = vectors(one, a), vectors(other, b)
        for m in MATRICES:
            cosines[m][a, b] = x[m] @ y[m]
    rows, columns = linear_sum_assignment(-sum(cosines.values()))
    return {m: float(values[rows, columns].mean()) for m, values in cosines.items()}


def test_full_rank_leaves_nothing_beyond_it(tmp_path: Path) -> None:
    routers, layers = random_layers(2, 1, 4, 40, 24)
    (one,) = analysed(tmp_path, routers, layers)
    np.testing.assert_allclose(one.alignment[:, -1], 1, atol=1e-5)
    assert (np.diff(one.alignment, axis=1) >= 0).all()
    assert (np.diff(one.alignment_null, axis=1) >= 0).all()
    for m in MATRICES:
        assert (np.diff(one.spectra[m], axis=1) <= 0).all()


def test_effective_rank_by_hand() -> None:
    assert effective_rank(np.array([2.0, 2, 2, 2])) == pytest.approx(4)
    assert effective_rank(np.array([5.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(np.array([0.5, 0.25, 0.25])) == pytest.approx(2**1.5)
    assert effective_rank(np.zeros(3)) == 0


@given(st.integers(1, 5), st.integers(5, 9), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_assignment_is_the_best_of_all(rows: int, columns: int, seed: int) -> None:
    rows = min(rows, 3)
    similarity = np.random.default_rng(seed).standard_normal((rows, columns))
    chosen = best_assignment(similarity)
    assert len(set(chosen.tolist())) == rows
    best = max(sum(similarity[range(rows), p]) for p in itertools.permutations(range(columns), rows))
    assert similarity[range(rows), chosen].sum() == pytest.approx(best)


# ---------------------------------------- planted structure


def test_copies_with_their_neurons_reordered_are_found_by_matching_and_cka(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    first, other = random_expert(rng, 96, 64), random_expert(rng, 96, 64)
    layers = [[first, reordered(first), noisy(first, 0.1), other]]
    (one,) = analysed(tmp_path, [torch.randn(4, 64)], layers, neurons=32)
    assert one.n_matched == 32
    assert one.cka[0, 1] == pytest.approx(1, abs=1e-5)
    assert one.cka[0, 3] == pytest.approx(one.cka_null, abs=0.05)
    for m in MATRICES:
        assert one.matched[m][0, 1] == pytest.approx(1, abs=1e-5)
        assert abs(one.cosine[m][0, 1]) < 0.1
        assert one.cosine[m][0, 2] == pytest.approx(1.01**-0.5, abs=0.002)
        assert one.matched[m][0, 2] == pytest.approx(1.01**-0.5, abs=0.002)
        assert one.matched[m][1, 2] == pytest.approx(1.01**-0.5, abs=0.002)
        np.testing.assert_allclose(one.spectra[m][0], one.spectra[m][1], rtol=1e-3)


def test_orthogonal_experts(tmp_path: Path) -> None:
    """Each reads and writes two dimensions of its own."""
    layers: list[list[Expert]] = [[]]
    for expert in range(4):
        w1 = torch.zeros(6, 8)
        w1[:, 2 * expert : 2 * expert + 2] = torch.from_numpy(np.random.default_rng(expert).random((6, 2))).float()
        layers[0].append((w1, w1.T.contiguous(), w1.clone()))
    router = torch.zeros(4, 8)
    router[[0, 1, 2, 3], [0, 2, 4, 7]] = 1  # each row within its expert's dimensions
    (one,) = analysed(tmp_path, [router], layers)
    for m in MATRICES:
        np.testing.assert_allclose(one.cosine[m], np.eye(4), atol=1e-6)
        np.testing.assert_allclose(one.matched[m], np.eye(4), atol=1e-6)
        np.testing.assert_allclose(one.spectra[m][:, 2:], 0)  # float32 leaves noise there, which is taken away
        assert (one.effective_rank[m] <= 2 + 1e-6).all()
    np.testing.assert_allclose(one.cka, np.eye(4), atol=1e-6)
    two = one.ks.tolist().index(2)
    np.testing.assert_allclose(one.alignment[:, two], 1, atol=1e-5)
    np.testing.assert_allclose(one.alignment_null[:, two], 0, atol=1e-5)


@pytest.mark.parametrize("width", [32, 12])
def test_router_rows_inside_and_outside_the_leading_directions(width: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    u = np.linalg.qr(rng.standard_normal((width, min(width, 16))))[0]
    v = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    rank = u.shape[1]
    w1 = torch.from_numpy(u * np.arange(rank, 0, -1) @ v[:, :rank].T).float()
    expert = (w1, *random_expert(rng, width, 16)[1:])
    rows = np.stack([v[:, 0], 3 * v[:, 2], v[:, 0] + v[:, 5], v[:, rank - 1]])  # 1st, 3rd, half 1st, the last
    (one,) = analysed(tmp_path, [torch.from_numpy(rows).float()], [[expert] * 4])
    ks = one.ks.tolist()
    assert ks[:4] == [1, 2, 4, 8]
    np.testing.assert_allclose(one.alignment[0], 1, atol=1e-4)
    np.testing.assert_allclose(one.alignment[1][:4], [0, 0, 1, 1], atol=1e-4)
    np.testing.assert_allclose(one.alignment[2][:4], [0.5, 0.5, 0.5, 1], atol=1e-4)
    np.testing.assert_allclose(one.alignment[3], [0] * (len(ks) - 1) + [1], atol=1e-4)
    # All experts are the same, so the null has every other row in the same place.
    np.testing.assert_allclose(one.alignment_null[:3], one.alignment[1:], atol=1e-5)


def test_independent_weights_are_at_their_nulls(tmp_path: Path) -> None:
    experts, width, dim = 8, 192, 96
    routers, layers = random_layers(5, 1, experts, width, dim)
    (one,) = analysed(tmp_path, routers, layers, neurons=64)
    for m in MATRICES:
        assert np.abs(off_diagonal(one.cosine[m])).max() < 5 / np.sqrt(width * dim)
        np.testing.assert_allclose(off_diagonal(one.matched[m]), one.matched_null[m], atol=0.05)
        assert off_diagonal(one.matched[m]).mean() == pytest.approx(one.matched_null[m], abs=0.015)
        assert one.matched_null[m] > 0.05
    np.testing.assert_allclose(off_diagonal(one.cka), one.cka_null, atol=0.02)
    spread = one.alignment_null.std(0) / np.sqrt(experts)
    assert (np.abs(one.alignment.mean(0) - one.alignment_null.mean(0)) <= 4 * spread + 1e-6).all()
    np.testing.assert_allclose(one.alignment_null.mean(0), one.ks / dim, atol=0.03)


def test_matching_says_what_it_would_find_in_independent_experts_of_any_shape(tmp_path: Path) -> None:
    """The best of more neurons is better."""
    nulls = []
    for width in (24, 384):
        routers, layers = random_layers(6, 1, 2, width, 32)
        (one,) = analysed(tmp_path / str(width), routers, layers, neurons=24)
        nulls.append(one.matched_null["w1"])
        assert one.matched["w1"][0, 1] == pytest.approx(nulls[-1], abs=0.06)
    assert nulls[1] > nulls[0] + 0.05


# ---------------------------------------- in little memory


def test_what_does_not_fit_into_memory_at_once_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    routers, layers = random_layers(7, 1, 7, 20, 16)
    layers[0][5] = reordered(layers[0][2])
    weights = open_weights(write_moe(tmp_path, routers, layers))
    (whole,) = analyse_experts(weights)
    done: list[int] = []
    monkeypatch.setattr(module, "HELD_BYTES", 4 * 20 * 16 * 5)  # two on each side
    monkeypatch.setattr(module, "GRAM_BYTES", 4 * 16 * 16 * 3)
    monkeypatch.setattr(module, "SAMPLE_BYTES", 12 * 20 * 16 * 2)
    monkeypatch.setattr(module, "CHUNK", 33)
    (parts,) = analyse_experts(weights, progress=done.append)
    assert sum(done) == steps(weights)
    assert_same(whole, parts)
    assert whole.matched["w1"][2, 5] == pytest.approx(1, abs=1e-5)


def test_no_more_matrices_are_held_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = torch.randn(9, 50)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def read(index: int) -> torch.Tensor:
        nonlocal most
        tensor = matrices[index].clone()
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(module, "HELD_BYTES", 200 * 4)
    np.testing.assert_allclose(inner_products(read, 9), matrices.double() @ matrices.double().T, atol=1e-4)
    assert most <= 5  # two and two, and the next
    other = torch.randn(9, 50)
    across = inner_products(read, 9, lambda index: other[index])
    np.testing.assert_allclose(across, matrices.double() @ other.double().T, atol=1e-4)


def test_long_sums_are_as_exact_as_float32_numbers_allow() -> None:
    rng = np.random.default_rng(8)
    x, y = (torch.from_numpy(rng.standard_normal(2_000_003, dtype=np.float32) + 1) for _ in range(2))
    exact = [float((a.double() * b.double()).sum()) for a, b in ((x, x), (y, y), (x, y), (x - y, x - y))]
    np.testing.assert_allclose(pair_products(x, y), exact, rtol=1e-6)
    np.testing.assert_allclose(inner_products([x, y].__getitem__, 2), [exact[0::2], exact[2:0:-1]], rtol=1e-6)
    assert pair_products(x, x.clone())[3] == 0


def test_side_by_side_eigenvalues_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    routers, layers = random_layers(9, 1, 2, 24, 20)
    weights = open_weights(write_moe(tmp_path, routers, layers))
    (alone,) = analyse_experts(weights)
    monkeypatch.setattr(module, "LARGE", 1)
    torch.set_num_threads(2)
    try:
        (together,) = analyse_experts(weights)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert_same(alone, together)


def test_nothing_of_a_file_stays_mapped(tmp_path: Path) -> None:
    routers, layers = random_layers(10, 1, 2, 8, 8)
    folder = write_moe(tmp_path, routers, layers)
    weights = open_weights(folder)
    for m, theirs in zip(MATRICES, layers[0][1], strict=True):
        tensor = weights.expert(0, 1, m)
        assert place_of(tensor) is None
        assert torch.equal(tensor, theirs)
        assert str(folder) in Path("/proc/self/maps").read_text()  # while it is used
        del tensor
        assert str(folder) not in Path("/proc/self/maps").read_text()


# ---------------------------------------- refusals


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ExpertWeights:
    return open_weights(write_moe(tmp_path_factory.mktemp("tiny"), *random_layers(11, 2, 4, 12, 8)))


@pytest.mark.parametrize("layer", [-1, 2, 31, True, "0"])
def test_a_layer_out_of_range_is_said_as_such(layer: Any, tiny: ExpertWeights) -> None:
    for ask in (tiny.router, lambda one: tiny.expert(one, 0, "w1"), lambda one: analyse_experts(tiny, [0, one])):
        with pytest.raises(OptionError, match=f"has no layer {layer!r}") as refusal:
            ask(layer)
        assert refusal.value.hint == "there are 2: layers 0 to 1"


def test_what_cannot_be_asked_for(tiny: ExpertWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="no layer is asked for"):
        analyse_routers(tiny, [])
    assert [one.layer for one in analyse_routers(tiny, [1, 0, 1])] == [0, 1]
    for expert, m in ((4, "w1"), (-1, "w1"), (0, "w4")):
        with pytest.raises(OptionError, match=f"has no expert {expert}, matrix '{m}'"):
            tiny.expert(0, expert, m)
    for neurons in (0, -1, True, 1.5):
        with pytest.raises(OptionError, match=f"neurons is {neurons!r}"):
            analyse_experts(tiny, neurons=neurons)
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(OptionError, match="scipy") as refusal:
        analyse_experts(tiny)
    assert refusal.value.hint == "pip install 'octavo[routing]'"


def test_models_that_have_no_experts_or_are_none(tmp_path: Path) -> None:
    dense = make_tiny_folder(tmp_path / "dense" / "tiny", moe=None)
    with pytest.raises(CheckpointError, match="is a dense model"):
        open_weights(dense)
    (tmp_path / "gguf").mkdir()
    CASES["gguf-dense"].write(make_sample(dense / "tokenizer.model", moe=None), tmp_path / "gguf")
    with pytest.raises(CheckpointError, match="is a dense model"):
        open_weights(tmp_path / "gguf")
    with pytest.raises(CheckpointError, match="no such folder"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(OptionError, match="is no Hub id"):
        open_weights(dense, "main")
    (dense / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="'gpt2' is none of the known families"):
        open_weights(dense)
    with pytest.raises(ConfigError, match="gpt2"):
        open_weights(dense / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"experts.1.w2": torch.full((8, 12), float("inf"))}, "w2 of expert 1 in layer 0 is not finite"),
        ({"experts.3.w1": torch.zeros(12, 9)}, r"\[12, 9\], expected \[12, 8\]"),
        ({"experts.0.w3": torch.zeros(12, 8).to(torch.float8_e4m3fn)}, "w3 of expert 0 in layer 0 is .*float8"),
        ({"gate": torch.zeros(5, 8)}, r"gate.* \[5, 8\], expected \[4, 8\]"),
        ({"experts.2.w2": None}, r"experts\.2\.w2"),
    ],
)
def test_tensors_that_cannot_be_compared(change: dict[str, torch.Tensor | None], says: str, tmp_path: Path) -> None:
    folder = write_moe(tmp_path, *random_layers(11, 1, 4, 12, 8))
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.0.block_sparse_moe.{name}.weight": tensor for name, tensor in change.items()}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=says):
        list(analyse_experts(open_weights(folder)))


# ---------------------------------------- the command


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    routers, layers = random_layers(12, 2, 4, 24, 16)
    layers[1][3] = reordered(layers[1][1])
    folder = write_moe(tmp_path / "model", routers, layers)
    done = run("routing", "experts", folder, "-o", tmp_path / "all.npz")
    assert (done.code, done.err) == (0, "")
    assert "layer 0, experts" in done.out
    assert re.search(r"mean cosine +-?0\.\d{3} +-?0\.\d{3} +-?0\.\d{3} +0\n", done.out)
    assert done.out.endswith(
        "layer 1: experts 1 and 3 are the same but for the order of their neurons (cosine 1.000000)\n"
    )
    kept = np.load(tmp_path / "all.npz")
    weights = open_weights(folder)
    expected = as_arrays(analyse_routers(weights), list(analyse_experts(weights)))
    assert set(kept) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(kept[name], value)
    assert kept["spectra_w2"].shape == (2, 4, 16)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["all.npz", "model"]


def test_the_command_prints_json(tmp_path: Path) -> None:
    routers, layers = random_layers(13, 3, 4, 24, 16)
    routers[2][1] = 0
    folder = write_moe(tmp_path, routers, layers)
    told = json.loads(run("routing", "experts", folder, "--layers", "0,2", "--neurons", 8, "--json").out)
    assert set(told) == {"model", "revision", "routers", "experts", "findings"}
    assert [one["layer"] for one in told["routers"]] == [one["layer"] for one in told["experts"]] == [0, 2]
    assert told["experts"][0]["n_matched"] == 8
    assert told["routers"][1]["cosine"][0][1] is None
    assert [(one["kind"], one["layer"], one["experts"]) for one in told["findings"]] == [("zero row", 2, [1])]
    only = json.loads(run("routing", "experts", folder, "--routers", "--json").out)
    assert (len(only["routers"]), only["experts"]) == (3, [])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--layers", "0-9"), "has no layer 3"),
        (("--layers", "2-1"), "--layers is '2-1'"),
        (("--layers", "first"), "--layers is 'first'"),
        (("--neurons", "0"), "neurons is 0"),
        (("--revision", "main"), "is no Hub id"),
        (("-o", "experts.csv"), "ends in .npz"),
        (("-o", "nowhere/experts.npz"), "there is no folder nowhere"),
    ],
)
def test_the_command_refuses(args: tuple[str, ...], says: str, tmp_path: Path) -> None:
    folder = write_moe(tmp_path, *random_layers(14, 3, 2, 4, 4))
    refused(run("routing", "experts", folder, *args), says)
