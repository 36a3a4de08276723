"""Quantised weights, undone as their own code undoes them (mlx) or as it is published (AWQ, GPTQ, gpt-fast)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.errors import CheckpointError, ConfigError, OptionError, UserError
from octavo.storage import packing
from octavo.storage.packed import mlx_quantize, undo_packing
from octavo.storage.safetensors import DTYPE_NAMES
from octavo.storage.source import Rows, TensorInfo, TensorSource, matrix_shape, row_range

MLX_DTYPES = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}
MLX_BITS = (2, 3, 4, 5, 6, 8)


class Memory(TensorSource):
    """Tensors in memory."""

    location = "memory"

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = {name.replace("__", "."): tensor for name, tensor in tensors.items()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise self.unknown(name)
        tensor = self.tensors[name]
        return TensorInfo(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes, "file", DTYPE_NAMES[tensor.dtype])

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        info = self.info(name)
        first, last = row_range(rows, info.shape, name)
        tensor = self.tensors[name]
        return tensor if rows is None else tensor.view(matrix_shape(info.shape))[first:last]


def only(source: TensorSource, config: Mapping[str, Any], name: str) -> TensorSource:
    """Undo the packing, and check that nothing but one weight is left, read alike whole and in part."""
    undone = undo_packing(source, config)
    assert undone.names() == [name]
    assert name in undone
    info, whole = undone.info(name), undone.read(name)
    assert (whole.dtype, tuple(whole.shape)) == (info.dtype, info.shape)
    assert info.nbytes == sum(source.info(part).nbytes for part in source)
    matrix = whole.view(matrix_shape(info.shape))
    for first, last in ((0, 1), (1, len(matrix) - 1), (len(matrix) // 2, len(matrix)), (2, 2)):
        assert torch.equal(undone.read(name, (first, last)), matrix[first:last])
    with pytest.raises(OptionError, match="are asked for"):
        undone.read(name, (0, len(matrix) + 1))
    return undone


# MLX


def to_mlx(tensor: Tensor) -> mx.array:
    return mx.array(tensor.float().numpy()).astype(MLX_DTYPES[tensor.dtype])


def from_mlx(array: mx.array) -> Tensor:
    if array.dtype == mx.uint32:
        return torch.from_numpy(np.array(array))
    dtype = next(ours for ours, theirs in MLX_DTYPES.items() if theirs == array.dtype)
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(dtype)


def mlx_packed(bits: int, group: int, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Memory, Tensor]:
    torch.manual_seed(bits * group)
    packed = mx.quantize(to_mlx(torch.randn(shape).to(dtype)), group, bits)
    weight, scales, biases = (from_mlx(part) for part in packed)
    return Memory(x__weight=weight, x__scales=scales, x__biases=biases), from_mlx(mx.dequantize(*packed, group, bits))


@pytest.mark.parametrize("dtype", MLX_DTYPES)
@pytest.mark.parametrize("bits", MLX_BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_mlx_is_undone_as_mlx_does(bits: int, group: int, dtype: torch.dtype) -> None:
    source, expected = mlx_packed(bits, group, dtype, (6, 256))
    undone = only(source, {"quantization": {"bits": bits, "group_size": group}}, "x.weight")
    assert undone.info("x.weight").dtype == dtype
    assert undone.info("x.weight").encoding == f"mlx {bits}-bit g{group}"
    assert torch.equal(undone.read("x.weight"), expected)


def test_mlx_experts_may_be_stacked_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    source, expected = mlx_packed(4, 32, torch.bfloat16, (3, 5, 64))
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", 128)
    undone = only(source, {"quantization": {"bits": 4, "group_size": 32}}, "x.weight")
    assert undone.info("x.weight").shape == (3, 5, 64)
    assert torch.equal(undone.read("x.weight"), expected)


def test_mlx_settings_come_from_the_module_the_model_or_the_shapes() -> None:
    source, expected = mlx_packed(8, 32, torch.float16, (4, 64))
    for config in (
        {"quantization": {"bits": 8, "group_size": 32, "mode": "affine"}},
        {"quantization_config": {"bits": 8, "group_size": 32}},
        {"quantization": {"bits": 4, "group_size": 64, "x": {"bits": 8, "group_size": 32}, "y": False}},
        {"quantization": {"bits": 8}},
        {"quantization": {"group_size": 32}},
    ):
        assert torch.equal(undo_packing(source, config).read("x.weight"), expected)
    with pytest.raises(CheckpointError, match=r"2 bits in groups of 128 or 4 bits in groups of 64 or 8 bits"):
        undo_packing(source, {}).info("x.weight")
    with pytest.raises(CheckpointError, match=r"config\.json says bits 4, group_size 32") as raised:
        undo_packing(source, {"quantization": {"bits": 4, "group_size": 32}}).info("x.weight")
    assert '"quantization"' in str(raised.value.hint)
    unmistakable, expected = mlx_packed(5, 64, torch.float16, (4, 64))
    assert torch.equal(undo_packing(unmistakable, {}).read("x.weight"), expected)
    with pytest.raises(ConfigError, match="quantization 4; expected an object"):
        undo_packing(source, {"quantization": 4})


def test_other_tensors_are_left_as_they_are() -> None:
    source, _ = mlx_packed(4, 64, torch.float16, (4, 64))
    source.tensors = {"norm": torch.ones(3), **source.tensors, "x.bias": torch.ones(4), "y.weight": torch.ones(2, 2)}
    undone = undo_packing(source, {"quantization": {"bits": 4, "group_size": 64}})
    assert undone.names() == ["norm", "x.weight", "x.bias", "y.weight"]
    assert undone.info("y.weight") == source.info("y.weight")
    assert torch.equal(undone.read("y.weight", (1, 2)), torch.ones(1, 2))
    assert "x.scales" not in undone
    with pytest.raises(CheckpointError, match=r"holds no tensor called 'x\.scales'"):
        undone.read("x.scales")
    plain = Memory(a=torch.ones(2), b__weight=torch.ones(2, 2), c__scales=torch.ones(2))
    assert undo_packing(plain, {"quantization": {"bits": 4}}) is plain


def test_mlx_modes_without_biases_are_refused() -> None:
    weight, scales = (mx.quantize(mx.ones((4, 64)), mode="mxfp4"))[:2]
    source = Memory(x__weight=from_mlx(weight), x__scales=torch.from_numpy(np.array(scales)))
    with pytest.raises(CheckpointError, match=r"without biases \(mode 'mxfp4'\)") as raised:
        undo_packing(source, {"quantization": {"mode": "mxfp4", "bits": 4, "group_size": 32}}).info("x.weight")
    assert "affine" in str(raised.value.hint)


QUANTIZE_CASES = {
    "random": torch.randn(8, 256, generator=torch.Generator().manual_seed(1)),
    "positive": torch.rand(4, 128, generator=torch.Generator().manual_seed(2)) + 3,
    "negative": -torch.rand(4, 128, generator=torch.Generator().manual_seed(3)) - 3,
    "zero": torch.zeros(2, 128),
    "minus zero": -torch.zeros(2, 128),
    "constant": torch.full((3, 128), -0.37),
    "tiny": torch.randn(4, 128, generator=torch.Generator().manual_seed(4)) * 1e-8,
    "huge": torch.randn(4, 128, generator=torch.Generator().manual_seed(5)) * 1e4,
    "balanced": torch.linspace(-1, 1, 128).repeat(2, 1),
    "outlier": torch.cat([torch.tensor([100.0]), torch.full((127,), 1e-3)]).repeat(2, 1),
    "grid": torch.randint(-8, 8, (4, 128), generator=torch.Generator().manual_seed(6)).float(),
}


@pytest.mark.parametrize("dtype", MLX_DTYPES)
@pytest.mark.parametrize("bits", MLX_BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantize_is_what_mlx_gives(bits: int, group: int, dtype: torch.dtype) -> None:
    for case, weight in QUANTIZE_CASES.items():
        ours = mlx_quantize(weight.to(dtype), bits, group)
        theirs = [from_mlx(part) for part in mx.quantize(to_mlx(weight.to(dtype)), group, bits)]
        for mine, its in zip(ours, theirs, strict=True):
            assert mine.dtype == its.dtype
            assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8)), case


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.sampled_from([4, 8]),
    st.sampled_from(list(MLX_DTYPES)),
)
def test_quantize_any_values_as_mlx_does(values: list[float], bits: int, dtype: torch.dtype) -> None:
    weight = torch.tensor((values * 64)[:64]).view(2, 32).to(dtype)
    ours = mlx_quantize(weight, bits, 32)
    theirs = [from_mlx(part) for part in mx.quantize(to_mlx(weight), 32, bits)]
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8))


def test_quantize_in_chunks_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 64).bfloat16()
    whole = mlx_quantize(weight, 8, 64)
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", 128)
    pieces = mlx_quantize(weight, 8, 64)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(whole, pieces, strict=True))
    source = Memory(x__weight=pieces[0], x__scales=pieces[1], x__biases=pieces[2])
    back = undo_packing(source, {"quantization": {"bits": 8, "group_size": 64}}).read("x.weight")
    assert float((back - weight).abs().max()) < 0.04


def test_quantize_refuses_what_mlx_would() -> None:
    for weight, bits, group in (
        (torch.ones(2, 64), 7, 64),
        (torch.ones(2, 64), 4, 16),
        (torch.ones(2, 48), 4, 32),
        (torch.ones(64), 4, 64),
        (torch.ones(2, 64, dtype=torch.float64), 4, 64),
    ):
        with pytest.raises(OptionError):
            mlx_quantize(weight, bits, group)


# AWQ and GPTQ: packed and undone number by number, with Python integers


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that lies in nibble 0, 1, ... of a word


def word(numbers: list[int], bits: int) -> int:
    value = sum(number << (bits * place) for place, number in enumerate(numbers))
    return value - (1 << 32) if value >= 1 << 31 else value


def pack_awq(numbers: Tensor) -> Tensor:
    rows = [
        [word([row[column + k] for k in AWQ_ORDER], 4) for column in range(0, len(row), 8)] for row in numbers.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


def pack_across(numbers: Tensor, bits: int) -> Tensor:
    per = 32 // bits
    rows = [[word(row[c : c + per], bits) for c in range(0, len(row), per)] for row in numbers.tolist()]
    return torch.tensor(rows, dtype=torch.int32)


def grouped(inputs: int, outputs: int, groups: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(inputs + outputs + bits)
    numbers = torch.randint(0, 1 << bits, (inputs, outputs))
    zeros = torch.randint(0, 1 << bits, (groups, outputs))
    zeros[0, :2] = torch.tensor([0, (1 << bits) - 1])
    return numbers, zeros, (torch.rand(groups, outputs) / 50).half()


def undone_slowly(numbers: Tensor, zeros: Tensor, scales: Tensor, group: list[int]) -> Tensor:
    inputs, outputs = numbers.shape
    weight = np.zeros((outputs, inputs), dtype=np.float16)
    for i in range(inputs):
        for o in range(outputs):
            weight[o, i] = np.float16(int(numbers[i, o]) - int(zeros[group[i], o])) * scales[group[i], o].numpy()
    return torch.from_numpy(weight)


def awq_source() -> tuple[Memory, Tensor]:
    numbers, zeros, scales = grouped(64, 24, 2, 4)
    expected = undone_slowly(numbers, zeros, scales, [i // 32 for i in range(64)])
    return Memory(x__qweight=pack_awq(numbers), x__qzeros=pack_awq(zeros), x__scales=scales), expected


AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}}


def test_awq(monkeypatch: pytest.MonkeyPatch) -> None:
    source, expected = awq_source()
    undone = only(source, AWQ, "x.weight")
    assert undone.info("x.weight").encoding == "awq 4-bit g32"
    assert torch.equal(undone.read("x.weight"), expected)
    assert torch.equal(undo_packing(source, {}).read("x.weight"), expected)
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", 64)
    assert torch.equal(only(source, AWQ, "x.weight").read("x.weight"), expected)


def gptq_source(bits: int, ordered: bool, version: int, shuffled: bool = False) -> tuple[Memory, Tensor]:
    numbers, zeros, scales = grouped(64, 32, 4, bits)
    group = [i // 16 for i in range(64)]
    if shuffled:
        group = torch.randint(0, 4, (64,)).tolist()
    stored = zeros if version == 2 else (zeros - 1) % (1 << bits)
    expected = undone_slowly(numbers, zeros, scales, group)
    source = Memory(
        x__qweight=pack_across(numbers.T, bits).T.contiguous(), x__qzeros=pack_across(stored, bits), x__scales=scales
    )
    if ordered:
        source.tensors["x.g_idx"] = torch.tensor(group, dtype=torch.int32)
    return source, expected


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(bits: int, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "gptq" if version == 1 else "gptq_v2"
    config = {"quantization_config": {"quant_method": "gptq", "bits": bits, "checkpoint_format": name}}
    for ordered, shuffled in ((False, False), (True, False), (True, True)):
        source, expected = gptq_source(bits, ordered, version, shuffled)
        undone = only(source, config, "x.weight")
        assert undone.info("x.weight").encoding == f"gptq {bits}-bit g16"
        assert torch.equal(undone.read("x.weight"), expected)
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", 64)
    assert torch.equal(only(source, config, "x.weight").read("x.weight"), expected)
    if version == 1:
        assert torch.equal(undo_packing(source, {}).read("x.weight"), expected)


@pytest.mark.parametrize(
    "settings_",
    [
        {"quant_method": "gptq"},
        {"quant_method": "awq", "version": "gemv"},
        {"quant_method": "awq", "version": "GEMV_FAST"},
        {"quant_method": "awq", "zero_point": False},
    ],
    ids=str,
)
def test_awq_variants_are_refused(settings_: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"packed as awq, config\.json says"):
        undo_packing(awq_source()[0], {"quantization_config": settings_}).info("x.weight")


def test_gptq_variants_are_refused() -> None:
    source, _ = gptq_source(4, True, 1)
    for config in ({"checkpoint_format": "marlin"}, {"quant_method": "awq"}):
        with pytest.raises(CheckpointError, match=r"packed as gptq, config\.json says"):
            undo_packing(source, {"quantization_config": config}).info("x.weight")
    three = Memory(
        x__qweight=torch.zeros(6, 32, dtype=torch.int32),
        x__qzeros=torch.zeros(2, 3, dtype=torch.int32),
        x__scales=torch.ones(2, 32).half(),
    )
    with pytest.raises(CheckpointError, match="packed with 3 bits; Octavo reads 2, 4 and 8"):
        undo_packing(three, {}).info("x.weight")
    source.tensors["x.g_idx"][5] = 4
    with pytest.raises(CheckpointError, match=r"'x\.g_idx' names groups outside 0 to 3"):
        undo_packing(source, {}).read("x.weight")


def test_incomplete_groups_are_refused() -> None:
    for missing in ("qzeros", "scales"):
        source, _ = awq_source()
        del source.tensors[f"x.{missing}"]
        with pytest.raises(CheckpointError, match=rf"holds 'x\.qweight', but holds no 'x\.{missing}'"):
            undo_packing(source, AWQ)
    source, _ = awq_source()
    source.tensors["x.weight"] = torch.ones(2, 2)
    with pytest.raises(CheckpointError, match=r"but holds 'x\.weight' too"):
        undo_packing(source, AWQ)


# gpt-fast


def test_gpt_fast_int8() -> None:
    torch.manual_seed(0)
    weight = torch.randint(-128, 128, (6, 10), dtype=torch.int8)
    scales = torch.rand(6).bfloat16()
    undone = only(Memory(wo__weight=weight, wo__scales=scales), {}, "wo.weight")
    assert undone.info("wo.weight").encoding == "int8"
    # what gpt-fast computes for a one-hot input: linear(x, weight.to(x.dtype)) * scales
    forward = torch.nn.functional.linear(torch.eye(10).bfloat16(), weight.bfloat16()) * scales
    assert torch.equal(undone.read("wo.weight"), forward.T)


def test_gpt_fast_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scales are float32 in the file and bfloat16 when it runs; old files have w2 the other way round."""
    torch.manual_seed(0)
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", 20)
    name = "layers.0.block_sparse_moe.cond_ffn.w2"
    weight = torch.randint(-128, 128, (3, 6, 10), dtype=torch.int8)
    scales = torch.rand(3, 6)
    expected = weight.bfloat16() * scales.bfloat16()[..., None]
    new, old = Memory(), Memory()
    new.tensors = {name: weight, name.replace("w2", "scales2"): scales}
    old.tensors = {name: weight.transpose(1, 2).contiguous(), name.replace("w2", "scales2"): scales}
    assert torch.equal(only(new, {}, name).read(name), expected)
    assert torch.equal(only(old, {}, name).read(name), expected.transpose(1, 2))


# Parts that do not fit


@cache
def whole_parts(which: int) -> dict[str, Tensor]:
    int8 = Memory(x__weight=torch.zeros(6, 64, dtype=torch.int8), x__scales=torch.ones(6))
    mlx = mlx_packed(4, 64, torch.float16, (6, 128))[0]
    return (mlx, awq_source()[0], gptq_source(4, True, 1)[0], int8)[which].tensors


DTYPES = [torch.float16, torch.float32, torch.float64, torch.int8, torch.int32, torch.uint32, torch.uint8, torch.bool]


@settings(max_examples=400, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(0, 3),
    st.one_of(st.none(), st.lists(st.integers(0, 40), max_size=3)),
    st.sampled_from([None, *DTYPES]),
    st.sampled_from([{}, {"bits": 4, "group_size": 64}, {"bits": "4"}, {"bits": [4], "x": {"bits": 8}}]),
)
def test_parts_that_do_not_fit(
    which: int, part: int, shape: list[int] | None, dtype: torch.dtype | None, config: dict[str, Any]
) -> None:
    """One part of another shape or dtype, or taken away: a tensor of the promised shape, or an error that names it."""
    source = Memory()
    source.tensors = dict(whole_parts(which))
    name = source.names()[part % len(source.names())]
    if shape is None and dtype is None:
        del source.tensors[name]
    else:
        old = source.tensors[name]
        source.tensors[name] = torch.zeros(old.shape if shape is None else shape, dtype=dtype or old.dtype)
    try:
        undone = undo_packing(source, {"quantization": config})
        for weight in undone:
            info = undone.info(weight)
            assert undone.read(weight).shape == info.shape
            assert undone.read(weight).dtype == info.dtype
    except UserError as error:
        assert "memory" in error.message  # noqa: PT017
        assert error.hint  # noqa: PT017
