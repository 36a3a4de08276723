"""Which tensor gets which format."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from conftest import tiny_args
from octavo.checkpoint.names import canonical_shapes
from octavo.errors import OptionError
from octavo.quant.formats import FORMATS
from octavo.quant.presets import KEPT, PRESETS, preset

SPARSE = list(canonical_shapes(tiny_args()))
DENSE = list(canonical_shapes(tiny_args(moe=None)))


def test_two_bits_tensor_by_tensor() -> None:
    expected = {"output.weight": "q4"}
    for layer in range(2):
        expected |= {f"layers.{layer}.attention.{w}.weight": "q4" for w in ("wq", "wk", "wv", "wo")}
        expected |= {
            f"layers.{layer}.feed_forward.experts.{e}.{w}.weight": "q2" for e in range(8) for w in ("w1", "w2", "w3")
        }
    assert preset(2, SPARSE) == expected
    assert preset("2", canonical_shapes(tiny_args())) == expected


@pytest.mark.parametrize(
    ("bits", "experts", "others"), [(8, "q8", "q8"), (4, "q4", "q4"), (3, "q3", "q4"), (2, "q2", "q4")]
)
@pytest.mark.parametrize("names", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_presets(bits: int, experts: str, others: str, names: list[str]) -> None:
    chosen = preset(bits, names)
    for name in names:
        if "norm" in name or name.endswith("feed_forward.gate.weight") or name == "tok_embeddings.weight":
            assert name not in chosen
        else:
            assert chosen[name] == (experts if ".feed_forward." in name else others)
    assert list(chosen) == [name for name in names if name in chosen]


def test_presets_are_those_of_the_formats() -> None:
    assert set(PRESETS) == {format.removeprefix("q") for format in FORMATS}


def test_every_matrix_but_router_and_embeddings_is_quantised() -> None:
    for args in (tiny_args(), tiny_args(moe=None), tiny_args(tie_embeddings=True)):
        shapes = canonical_shapes(args)
        stays = ("tok_embeddings.weight", "layers.*.feed_forward.gate.weight")
        matrices = {
            name for name, shape in shapes.items() if len(shape) == 2 and not any(fnmatchcase(name, s) for s in stays)
        }
        assert set(preset(4, shapes)) == matrices


def test_a_tied_output_is_not_a_tensor_of_its_own() -> None:
    names = list(canonical_shapes(tiny_args(tie_embeddings=True)))
    assert "output.weight" not in preset(4, names)
    with pytest.raises(OptionError, match=r"^output.weight=q8: no tensor of this model has such a name"):
        preset(4, names, {"output.weight": "q8"})


def test_overrides() -> None:
    plain = preset(3, SPARSE)
    chosen = preset(3, SPARSE, {"layers.*.attention.*.weight": "q8", "output.weight": KEPT, "*.experts.7.w2.*": "q4"})
    for name in SPARSE:
        if ".attention." in name:
            assert chosen[name] == "q8"
        elif name == "output.weight":
            assert name not in chosen
        elif ".experts.7.w2." in name:
            assert chosen[name] == "q4"
        else:
            assert chosen.get(name) == plain.get(name)


def test_the_last_override_counts() -> None:
    name = "layers.0.attention.wq.weight"
    assert preset(4, SPARSE, {"*.wq.weight": "q8", name: "q2"})[name] == "q2"
    assert preset(4, SPARSE, {name: "q2", "*.wq.weight": "q8"})[name] == "q8"
    assert name not in preset(4, SPARSE, {name: "q2", "*.wq.weight": KEPT})
    assert preset(4, SPARSE, {name: KEPT, "*.wq.weight": "q8"})[name] == "q8"


def test_a_pattern_passes_over_what_stays() -> None:
    chosen = preset(4, SPARSE, {"layers.0.*": "q2"})
    assert {chosen.get(name) for name in SPARSE if name.startswith("layers.0.")} == {"q2", None}
    assert set(chosen) == set(preset(4, SPARSE))
    assert preset(4, SPARSE, {"*norm.weight": KEPT, "tok_embeddings.weight": KEPT}) == preset(4, SPARSE)


@pytest.mark.parametrize(
    "pattern", ["tok_embeddings.weight", "norm.weight", "*norm.weight", "layers.1.feed_forward.gate.weight", "*.gate.*"]
)
def test_what_stays_is_not_quantised(pattern: str) -> None:
    with pytest.raises(OptionError, match=r"=q8: .* stays as it is stored") as caught:
        preset(4, SPARSE, {pattern: "q8"})
    assert pattern in caught.value.message
    assert caught.value.hint == "routers, norms and embeddings are not quantised"


def test_what_is_unknown_is_refused() -> None:
    for bits in (5, "q4", "", 16):
        with pytest.raises(OptionError, match=r"expected one of 8, 4, 3, 2$"):
            preset(bits, SPARSE)
    with pytest.raises(OptionError, match=r"^\*=q5: the format 'q5' is unknown; expected one of q8, q4, q3, q2, 16$"):
        preset(4, SPARSE, {"*": "q5"})
    with pytest.raises(OptionError, match="no tensor of this model has such a name") as caught:
        preset(4, SPARSE, {"layers.0.attention.wx.weight": "q8"})
    assert "layers.0.attention.w" in (caught.value.hint or "")
    with pytest.raises(OptionError, match="no tensor of this model has such a name") as caught:
        preset(4, SPARSE, {"*.zz": KEPT})
    assert caught.value.hint == "names are such as layers.0.attention.wq.weight"
