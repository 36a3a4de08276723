"""Copies, kin and dead routers are found where they were planted, and only there; two models are told apart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hub_server import HubServer, run_python
from moe_folders import Expert, noisy, random_expert, random_layers, reordered, write_moe
from octavo.errors import OptionError
from octavo.routing import compare
from octavo.routing.compare import Change, Finding, diff, findings
from octavo.routing.experts import RouterLayer, analyse_experts, analyse_routers
from octavo.routing.weights import open_weights
from run_octavo import refused, run

DIM, WIDTH = 64, 96
MOVED = (0, 2)


def found_in(folder: Path, routers: list[Tensor], layers: list[list[Expert]], **how: Any) -> list[Finding]:
    weights = open_weights(write_moe(folder, routers, layers))
    return findings(analyse_routers(weights), list(analyse_experts(weights, **how)))


def told(found: list[Finding]) -> list[tuple[str, int, tuple[int, ...]]]:
    return [(one.kind, one.layer, one.experts) for one in found]


def of_rows(rows: Any) -> list[Finding]:
    rows = np.asarray(rows, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = rows @ rows.T / norms / norms[:, None]
    return findings([RouterLayer(7, cosine, norms, rows.shape[1])])


# ---------------------------------------- routers


def trained_rows(dim: int = 512, experts: int = 8, seed: int = 0) -> np.ndarray:
    """Rows with something in common, as trained routers have."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((experts, dim)) + rng.standard_normal(dim)


def test_a_router_like_a_trained_one_is_not_remarked_on() -> None:
    assert of_rows(trained_rows()) == []
    assert of_rows(trained_rows(16)) == []


@given(st.integers(0, 10_000), st.sampled_from([2, 3, 8, 64]), st.sampled_from([16, 256, 4096]))
@settings(max_examples=40, deadline=None)
def test_random_routers_are_found_where_rows_are_long_enough_to_tell(seed: int, experts: int, dim: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((experts, dim)) * 0.02
    kinds = {one.kind for one in of_rows(rows)}
    assert kinds == ({"random router"} if experts > 2 and dim >= 256 else set()) or experts == 64


def test_rows_that_are_the_same() -> None:
    rows = trained_rows()
    rows[5] = rows[2] * (1 + 1e-4)
    (one,) = of_rows(rows)
    assert (one.kind, one.layer, one.experts) == ("same router rows", 7, (2, 5))
    assert one.value == pytest.approx(1)
    assert "2 and 5 router rows are the same" in one.text
    rows[5] = 2 * rows[2]  # the same direction, but another logit
    assert of_rows(rows) == []
    (one,) = of_rows(np.repeat(rows[:1], 8, axis=0))
    assert (one.kind, one.experts) == ("dead router", tuple(range(8)))


def test_rows_that_are_zero_short_or_not_finite() -> None:
    rows = trained_rows()
    rows[3] = 0
    assert told(of_rows(rows)) == [("zero row", 7, (3,))]
    rows[3] = 0.05 * trained_rows(seed=1)[3]
    (one,) = of_rows(rows)
    assert (one.kind, one.experts) == ("weak row", (3,))
    assert 0.03 < one.value < 0.1
    rows[3] *= 4
    assert of_rows(rows) == []
    rows[3, 1] = math.inf
    rows[6, 0] = math.nan
    (one,) = of_rows(rows)
    assert (one.kind, one.experts) == ("not finite", (3, 6))
    assert math.isnan(one.value)
    assert told(of_rows(np.zeros((4, 512)))) == [("dead router", 7, (0, 1, 2, 3))]


# ---------------------------------------- experts


def test_independent_experts_are_not_remarked_on(tmp_path: Path) -> None:
    for seed in range(3):
        assert found_in(tmp_path / str(seed), *random_layers(seed, 2, 8, WIDTH, DIM), neurons=32) == []


def test_copies_of_all_kinds_in_one_layer(tmp_path: Path) -> None:
    routers, layers = random_layers(20, 2, 8, WIDTH, DIM)
    experts = layers[1]
    experts[3] = experts[0]
    experts[4] = reordered(experts[1])
    experts[5] = noisy(experts[2], 0.3)
    found = found_in(tmp_path, routers, layers, neurons=32)
    assert told(found) == [
        ("copies", 1, (0, 3)),
        ("copies, neurons reordered", 1, (1, 4)),
        ("near copies", 1, (2, 5)),
    ]
    assert [one.value for one in found[:2]] == pytest.approx([1, 1], abs=1e-5)
    assert found[2].value == pytest.approx(1.09**-0.5, abs=0.01)
    assert "experts 1 and 4" in found[1].text


def test_near_copies_with_their_neurons_reordered(tmp_path: Path) -> None:
    routers, layers = random_layers(21, 1, 4, WIDTH, DIM)
    layers[0][3] = reordered(noisy(layers[0][0], 0.3))
    assert told(found_in(tmp_path, routers, layers)) == [("near copies", 0, (0, 3))]


@pytest.mark.parametrize(("share", "kind"), [(1e-4, "copies"), (0.1, "near copies"), (1.0, "common origin")])
def test_a_merged_model_is_told_by_its_experts(share: float, kind: str, tmp_path: Path) -> None:
    """Each expert is the same dense model, tuned a little, or trained on for long."""
    rng = np.random.default_rng(22)
    dense = random_expert(rng, WIDTH, DIM)
    layers = [[noisy(dense, share, seed) for seed in range(4)]]
    found = found_in(tmp_path, [torch.from_numpy(trained_rows(DIM, 4)).float()], layers)
    assert told(found) == [(kind, 0, (0, 1, 2, 3))]
    assert found[0].value == pytest.approx(1 / (1 + share**2), abs=0.03)


def test_one_independent_expert_is_enough_against_a_common_origin(tmp_path: Path) -> None:
    rng = np.random.default_rng(23)
    dense = random_expert(rng, WIDTH, DIM)
    layers = [[*(noisy(dense, 1.0, seed) for seed in range(3)), random_expert(rng, WIDTH, DIM)]]
    assert found_in(tmp_path, [torch.randn(4, DIM)], layers) == []


def test_an_expert_that_comes_back_in_another_layer(tmp_path: Path) -> None:
    routers, layers = random_layers(24, 3, 4, WIDTH, DIM)
    layers[2][1] = reordered(layers[0][3])
    layers[1][0] = noisy(layers[0][2], 0.01)  # nearly: not told
    (one,) = found_in(tmp_path, routers, layers)
    assert (one.kind, one.layer, one.experts) == ("copies across layers", 0, (3,))
    assert "expert 1 of layer 2" in one.text
    assert one.value < 1e-6


def test_an_expert_of_zeros(tmp_path: Path) -> None:
    routers, layers = random_layers(25, 2, 4, WIDTH, DIM)
    for layer in layers:
        layer[1] = tuple(torch.zeros_like(w) for w in layer[1])  # type: ignore[assignment]
    found = found_in(tmp_path, routers, layers)
    assert told(found) == [("zero expert", 0, (1,)), ("zero expert", 1, (1,))]


def test_the_shipped_model_is_sound() -> None:
    weights = open_weights("menny")
    assert findings(analyse_routers(weights), list(analyse_experts(weights, [0, 4]))) == []


def test_every_kind_is_described() -> None:
    described = Finding.__doc__ or ""
    source = Path(compare.__file__).read_text()
    kinds = (
        "copies", "copies, neurons reordered", "near copies", "common origin", "copies across layers", "zero expert",
        "not finite", "dead router", "zero row", "weak row", "same router rows", "random router",
    )  # fmt: skip
    for kind in kinds:
        assert kind in " ".join(described.split())
        assert f'"{kind}"' in source


# ---------------------------------------- two models


def pair(tmp_path: Path, seed: int = 30, layers: int = 2) -> tuple[list[Tensor], list[list[Expert]], Path]:
    routers, experts = random_layers(seed, layers, 4, 24, 16)
    return routers, experts, write_moe(tmp_path / "a", routers, experts)


def compared(a: Path, b: Path, *args: Any, **how: Any) -> list[Change]:
    return diff(open_weights(a), open_weights(b), *args, **how)


def test_a_model_and_itself(tmp_path: Path) -> None:
    *_, a = pair(tmp_path)
    done: list[int] = []
    found = compared(a, a, progress=done.append)
    assert len(found) == 2 * 4 * 4
    assert sum(done) == 2
    assert all((one.distance, one.other) == (0, one.expert) for one in found)
    assert all(one.cosine == pytest.approx(1, abs=1e-9) for one in found)
    assert [(one.layer, one.expert, one.what) for one in found] == sorted(
        (layer, expert, what) for layer in range(2) for expert in range(4) for what in ("router", "w1", "w2", "w3")
    )


def test_changes_by_hand_largest_first(tmp_path: Path) -> None:
    routers, experts, a = pair(tmp_path)
    w1, w2, w3 = experts[1][2]
    experts[1][2] = (1.25 * w1, -w2, w3 * 1.0)
    routers[0][3] *= 0.5
    experts[0][1][2][0, 0] += experts[0][1][2].norm()
    found = compared(a, write_moe(tmp_path / "b", routers, experts))
    first = [(one.layer, one.expert, one.what) for one in found[:4]]
    assert first == [(1, 2, "w2"), (0, 1, "w3"), (0, 3, "router"), (1, 2, "w1")]
    assert [one.distance for one in found[:4]] == pytest.approx([2, 1, 0.5, 0.25], rel=1e-6)
    assert [found[i].cosine for i in (0, 2, 3)] == pytest.approx([-1, 1, 1])
    assert all(one.distance == 0 for one in found[4:])
    assert [one.layer for one in compared(a, tmp_path / "b", [1])] == [1] * 16


@given(st.permutations(range(4)), st.integers(0, 100))
@settings(max_examples=6, deadline=None)
def test_experts_that_changed_places_are_found(tmp_path_factory: Any, order: list[int], seed: int) -> None:
    """And compared with what they became, for all that they are tuned, too."""
    tmp_path = tmp_path_factory.mktemp("moved")
    routers, experts, a = pair(tmp_path, seed, layers=1)
    moved = [[noisy(experts[0][old], 0.1, old) for old in order]]
    b = write_moe(tmp_path / "b", [routers[0][list(order)]], moved)
    for routers_only in (False, True):
        found = compared(a, b, routers_only=routers_only)
        assert {one.expert: one.other for one in found} == {old: new for new, old in enumerate(order)}
        assert all(one.distance == 0 for one in found if one.what == "router")
        assert all(one.distance == pytest.approx(0.1, abs=0.02) for one in found if one.what != "router")
        assert {one.what for one in found} == {"router"} | (set() if routers_only else {"w1", "w2", "w3"})


def test_unrelated_experts_stay_where_they_are(tmp_path: Path) -> None:
    *_, a = pair(tmp_path)
    b = write_moe(tmp_path / "b", *random_layers(31, 2, 4, 24, 16))
    found = [one for one in compared(a, b) if one.what != "router"]
    assert all(one.other == one.expert for one in found)
    assert all(one.distance == pytest.approx(2**0.5, abs=0.2) for one in found)


def test_zeros_and_nan_are_figures_too(tmp_path: Path) -> None:
    routers, experts, a = pair(tmp_path)
    routers[1][0, 0] = math.nan
    experts[0][1] = tuple(torch.zeros_like(w) for w in experts[0][1])  # type: ignore[assignment]
    b = write_moe(tmp_path / "b", routers, experts)
    found = compared(a, b)
    assert (found[0].layer, found[0].expert, found[0].what) == (1, 0, "router")
    assert math.isnan(found[0].distance)
    assert [one.distance for one in found[1:4]] == pytest.approx([1] * 3)
    assert all(math.isnan(one.cosine) for one in found[1:4])
    back = compared(b, a)
    assert [one.distance for one in back[1:4]] == [math.inf] * 3
    assert [one.distance for one in compared(b, b) if (one.layer, one.expert) == (0, 1)] == [0] * 4
    listed = json.loads(run("routing", "diff", b, a, "--json").out)
    assert [one["distance"] for one in listed[:4]] == [None] * 4


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((3, 4, 24, 16), "2 and 3 layers"),
        ((2, 5, 24, 16), "4 and 5 experts a layer"),
        ((2, 4, 20, 16), r"shapes \[20, 16\] and \[24, 16\] in layer 0"),
        ((2, 4, 24, 12), r"shapes \[24, 12\] and \[24, 16\] in layer 0"),
    ],
)
def test_models_of_different_shapes_are_refused(shape: tuple[int, ...], says: str, tmp_path: Path) -> None:
    *_, a = pair(tmp_path)
    layers, experts, width, dim = shape
    b = write_moe(tmp_path / "b", *random_layers(32, layers, experts, width, dim))
    with pytest.raises(OptionError, match=f"cannot be compared: they have .*{says}"):
        compared(a, b)
    if shape[3] == 12:
        with pytest.raises(OptionError, match=r"shapes \[1, 12\] and \[1, 16\] in layer 0"):
            compared(a, b, routers_only=True)


def test_other_dtypes_are_compared_by_value(tmp_path: Path) -> None:
    routers, experts, a = pair(tmp_path)
    rounded = [[tuple(w.bfloat16() for w in one) for one in layer] for layer in experts]
    b = write_moe(tmp_path / "b", [router.bfloat16() for router in routers], rounded)  # type: ignore[arg-type]
    found = compared(a, b)
    assert all(1e-4 < one.distance < 4e-3 for one in found)
    assert all(one.cosine >= compare.COPY for one in found)


# ---------------------------------------- the command


def test_the_command_says_what_changed(tmp_path: Path) -> None:
    routers, experts, a = pair(tmp_path)
    experts[0][0], experts[0][2] = experts[0][2], experts[0][0]
    experts[1][1] = tuple(1.5 * w for w in experts[1][1])  # type: ignore[assignment]
    b = write_moe(tmp_path / "b", routers, experts)
    done = run("routing", "diff", a, b, "--top", 4)
    assert (done.code, done.err) == (0, "")
    head, _, *lines = done.out.splitlines()
    assert head == "11 of 32 router rows and matrices differ; the 4 that changed most:"
    assert len(lines) == 4
    # The router rows of the two that changed places belong to others now; their matrices are the same.
    assert [line.split()[:3] for line in lines if line.endswith(" in B")] == [["0", str(e), "router"] for e in MOVED]
    assert {line.split()[2] for line in lines if not line.endswith(" in B")} < {"w1", "w2", "w3"}
    listed = json.loads(run("routing", "diff", a, b, "--json", "--layers", 1).out)
    assert len(listed) == 16
    (w1,) = [one for one in listed if (one["expert"], one["what"]) == (1, "w1")]
    assert w1 == {
        "layer": 1, "expert": 1, "what": "w1", "other": 1, "distance": pytest.approx(0.5), "cosine": pytest.approx(1),
    }  # fmt: skip
    assert run("routing", "diff", a, a).out == "0 of 32 router rows and matrices differ\n"
    assert run("routing", "diff", a, b, "--routers").out == "0 of 8 router rows and matrices differ\n"
    refused(run("routing", "diff", a, b, "--top", 0), "--top is 0")
    refused(run("routing", "diff", a, b, "--layers", 2), "has no layer 2")
    refused(run("routing", "diff", a, b, "--revision-b", "main"), "is no Hub id")
    refused(run("routing", "diff", a, "menny"), "cannot be compared: they have 2 and 5 layers")


def test_two_revisions_of_a_distant_model(tmp_path: Path) -> None:
    routers, experts, a = pair(tmp_path)
    code = """
import contextlib, io, json
from octavo.cli import main
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
        main(["routing", "diff", "org/tiny", "org/tiny", "--revision-a", REVISION, "--json"])
    except SystemExit as end:
        assert end.code == 0, err.getvalue()
print(json.dumps([json.loads(out.getvalue()), err.getvalue().splitlines()]))
"""
    with HubServer({"org/tiny": {path.name: path.read_bytes() for path in a.iterdir()}}) as hub:
        before = hub.commit("org/tiny")
        routers[1][2] *= 2
        after = hub.push("org/tiny", write_moe(tmp_path / "b", routers, experts))
        found, notes = json.loads(
            run_python(code.replace("REVISION", repr(before)), hub.environment(tmp_path / "home"))
        )
    assert len(found) == 8
    assert [one["distance"] for one in found] == pytest.approx([1, *[0] * 7])
    assert (found[0]["layer"], found[0]["expert"]) == (1, 2)
    assert notes[0].startswith("org/tiny: routers only; the experts are 37 kB to fetch")
    assert [note.split(":")[0] for note in notes[1:]] == [f"org/tiny@{before[:8]}", f"org/tiny@{after[:8]}"]
