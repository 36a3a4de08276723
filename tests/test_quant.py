"""The low-bit formats: where every bit lies, how close they come, and what they refuse."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.errors import CheckpointError, OptionError
from octavo.quant.encode import METHODS, decode, encode
from octavo.quant.formats import FORMATS, Format, Packed
from octavo.quant.packing import Codes, pack, unpack
from octavo.quant.quantize import dequantize, quantize

HEADER = Path(__file__).parent.parent / "csrc" / "formats.h"
EVERY = list(FORMATS.values())
WITH_BOOKS = [format for format in EVERY if format.books]
SHAPES = ((1, 1), (15, 63), (16, 64), (17, 65), (33, 127), (16, 128), (48, 129), (3, 300))

every_format = pytest.mark.parametrize("format", EVERY, ids=lambda format: format.name)
formats_with_books = pytest.mark.parametrize("format", WITH_BOOKS, ids=lambda format: format.name)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is what it was, when the test is over."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_codes(format: Format, rows: int, cols: int, seed: int) -> Codes:
    generator = torch.Generator().manual_seed(seed)

    def integers(end: int, *shape: int) -> Tensor:
        return torch.randint(0, end, shape, generator=generator).to(torch.uint8)

    groups = -(-cols // format.group_size)
    drop = 4 if format.book_bits else 0
    words = torch.randint(-(2**15), 2**15, (rows, groups), generator=generator).to(torch.int16)
    words = torch.where(words & 0x7F80 == 0x7F80, 0x3F80, words) >> drop << drop  # nan and inf are no scales
    return Codes(
        integers(1 << format.bits, rows, cols),
        words.to(torch.int16).view(torch.bfloat16).float(),
        integers(1 << format.book_bits, rows, groups, format.selectors),
    )


def weights(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Gaussian, with some weights much larger, some zero."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator)
    kind = torch.rand(rows, cols, generator=generator)
    return torch.where(kind < 0.05, 0.0, torch.where(kind > 0.98, 5 * w, w))


def same(a: Codes, b: Codes) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def squared_error(w: Tensor, found: Tensor) -> float:
    return float((w.double() - found.double()).square().sum())


def relative_error(w: Tensor, found: Tensor) -> float:
    return (squared_error(w, found) / float(w.double().square().sum())) ** 0.5


# The formats


def test_the_kernels_have_the_same_formats() -> None:
    text = HEADER.read_text(encoding="utf-8")
    for format in WITH_BOOKS:
        found = re.search(rf"kBook{format.bits}\[16\] = {{([^}}]*)}}", text)
        assert found
        values = [int(value) for value in found[1].split(",")]
        assert values == [value for book in format.books or () for value in book]
    assert "return f == Format::q3 || f == Format::q2 ? 32 : 64" in text
    assert "return int64_t(kPanelRows) * group_cols(f) * int(f) / 8" in text
    assert "return 64 + 2 * group_bytes(f)" in text
    assert re.search(r"kPanelRows = (\d+)", text)[1] == "16"  # type: ignore[index]


def test_sizes() -> None:
    assert [format.bits_per_weight for format in EVERY] == [8.25, 4.25, 3.5, 2.5]
    assert [format.block_cols for format in EVERY] == [128, 128, 64, 64]
    assert [format.block_nbytes for format in EVERY] == [64 + 2048, 64 + 1024, 64 + 384, 64 + 256]
    assert [format.selectors for format in EVERY] == [1, 1, 4, 2]
    assert [format.mantissa_bits for format in EVERY] == [7, 7, 3, 3]
    for format in EVERY:
        assert format.nbytes(14336, 4096) == 14336 * 4096 * format.bits_per_weight / 8
        assert format.nbytes(17, 65) == 2 * -(-65 // format.block_cols) * format.block_nbytes
        assert format.nbytes(16, 4096) == format.panel_nbytes(4096)
        assert format.nbytes(0, 64) == format.nbytes(64, 0) == 0


# The layout


def place(format: Format, col: int, row: int, code: int) -> Iterator[tuple[int, int]]:
    """Byte within a group's codes, and bits in it, of a code: the specification, word by word."""
    lot, byte = col // 4, 4 * row + col % 4
    if format.name == "q8":
        yield 64 * lot + byte, code
    elif format.name == "q4":
        yield 64 * (lot // 2) + byte, code << (4 if lot % 2 else 0)
    elif format.name == "q2":
        yield 64 * (lot // 4) + byte, code << (2 * (lot % 4))
    elif lot < 6:
        yield 64 * (lot // 2) + byte, code << (4 if lot % 2 else 0)
    else:
        for v in range(3):
            yield 64 * v + byte, (code >> v & 1) << (3 if lot == 6 else 7)


def lay_out(codes: Codes, format: Format) -> Tensor:
    """`pack`, one weight after the other."""
    rows, cols = codes.codes.shape
    group, group_bytes = format.group_size, 16 * format.group_size * format.bits // 8
    block_bytes = 64 + 2 * group_bytes
    panel_bytes = -(-cols // (2 * group)) * block_bytes
    data = [0] * (-(-rows // 16) * panel_bytes)
    for row in range(rows):
        panel = row // 16 * panel_bytes
        for g, scale in enumerate(codes.scales[row]):
            word = int(scale.to(torch.bfloat16).view(torch.int16)) & 0xFFFF
            for i, selector in enumerate(codes.selectors[row, g].tolist()):
                word |= selector << (i if format.name == "q3" else 2 * i)
            at = panel + g // 2 * block_bytes + 32 * (g % 2) + 2 * (row % 16)
            data[at], data[at + 1] = word & 0xFF, word >> 8
        for col, code in enumerate(codes.codes[row].tolist()):
            block, half = divmod(col // group, 2)
            begin = panel + block * block_bytes + 64 + half * group_bytes
            for byte, bits in place(format, col % group, row % 16, code):
                data[begin + byte] |= bits
    return torch.tensor(data, dtype=torch.uint8)


def worth(codes: Codes, format: Format) -> Tensor:
    """`decode`, one weight after the other."""
    rows, cols = codes.codes.shape
    out = torch.empty(rows, cols)
    for row in range(rows):
        for col in range(cols):
            group, within = divmod(col, format.group_size)
            code = int(codes.codes[row, col])
            if format.books is None:
                value = code - 128
            else:
                part = within // {"q4": 64, "q3": 8, "q2": 16}[format.name]
                value = format.books[int(codes.selectors[row, group, part])][code]
            out[row, col] = codes.scales[row, group] * value
    return out


@every_format
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 36), cols=st.integers(1, 270), seed=st.integers(0, 99))
def test_every_bit_lies_where_it_is_specified(format: Format, rows: int, cols: int, seed: int) -> None:
    codes = random_codes(format, rows, cols, seed)
    data = lay_out(codes, format)
    assert data.numel() == format.nbytes(rows, cols)
    assert torch.equal(pack(codes, format), data)
    assert same(unpack(data, format, (rows, cols)), codes)
    assert torch.equal(decode(codes, format), worth(codes, format))


@every_format
def test_the_first_bytes(format: Format) -> None:
    """Rows and columns as they are met in a panel, without the helpers above."""
    codes = random_codes(format, 16, format.block_cols, 3)
    data = pack(codes, format)
    scales = data[:64].view(torch.int16) & (-16 if format.book_bits else -1)
    assert torch.equal(scales.view(torch.bfloat16).float(), codes.scales.T.reshape(-1))
    mask = {8: 255, 4: 15, 3: 7, 2: 3}[format.bits]
    assert torch.equal(data[64:128] & mask, codes.codes[:, :4].reshape(-1))
    second = 64 + 16 * format.group_size * format.bits // 8
    first_of_second = codes.codes[:, format.group_size : format.group_size + 4]
    assert torch.equal(data[second : second + 64] & mask, first_of_second.reshape(-1))


@every_format
def test_padding_is_zero(format: Format) -> None:
    """So a matrix among zero codes and scales has the same bytes as it has alone."""
    rows, cols = 5, format.group_size + 3
    codes = encode(weights(rows, cols), format)
    padded = Codes(
        torch.zeros(16, format.block_cols, dtype=torch.uint8),
        torch.zeros(16, 2),
        torch.zeros(16, 2, format.selectors, dtype=torch.uint8),
    )
    padded.codes[:rows, :cols], padded.scales[:rows], padded.selectors[:rows] = codes
    assert torch.equal(pack(codes, format), pack(padded, format))


# There and back


@every_format
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 200),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_there_and_back(
    format: Format, method: str, rows: int, cols: int, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    w = weights(rows, cols, seed).to(dtype)
    packed = quantize(w, format, method)
    assert (packed.format, packed.shape) == (format, (rows, cols))
    assert packed.data.shape == (format.nbytes(rows, cols),)
    codes = encode(w, format, method)
    if rows and cols:
        assert torch.equal(packed.data, pack(codes, format))
    whole = dequantize(packed)
    assert (whole.dtype, whole.shape) == (torch.float32, w.shape)
    assert torch.equal(whole, decode(codes, format))
    assert torch.equal(dequantize(packed, dtype), whole.to(dtype))
    begin = data.draw(st.integers(0, rows))
    end = data.draw(st.integers(begin, rows))
    assert torch.equal(dequantize(packed, dtype, (begin, end)), whole[begin:end].to(dtype))


def spread(per_group: Tensor, format: Format, cols: int) -> Tensor:
    """What belongs to groups (or to parts of groups, in the last dimension) beside every weight: [rows, cols]."""
    per_group = per_group.reshape(per_group.shape[0], -1)
    size = -(-cols // format.group_size) * format.group_size // per_group.shape[1]
    return per_group.repeat_interleave(size, 1)[:, :cols]


@every_format
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_code_is_the_nearest(format: Format, method: str, shape: tuple[int, int]) -> None:
    w = weights(*shape)
    codes = encode(w, format, method)
    books = torch.tensor(format.books or [range(-127, 128)], dtype=torch.float64)
    values = books[spread(codes.selectors, format, shape[1]).long()]
    scales = spread(codes.scales, format, shape[1]).double()
    best = (values * scales[..., None] - w.double()[..., None]).abs().amin(-1)
    error = (decode(codes, format).double() - w.double()).abs()
    assert torch.all(error <= best + 1e-4 * scales.abs())


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 20), cols=st.integers(1, 200), seed=st.integers(0, 999))
def test_8_bits_are_within_half_a_step(rows: int, cols: int, seed: int) -> None:
    w = weights(rows, cols, seed)
    codes = encode(w, FORMATS["q8"])
    steps = spread(codes.scales, FORMATS["q8"], cols)
    assert torch.all((decode(codes, FORMATS["q8"]) - w).abs() <= 0.50001 * steps)
    most = torch.nn.functional.pad(w, (0, -cols % 64)).view(rows, -1, 64).abs().amax(-1)
    assert torch.all((codes.scales >= most / 127.0001) & (codes.scales <= most / 127 * 1.008))
    assert codes.codes.min() >= 1


@formats_with_books
def test_rtn_takes_the_scale_from_the_largest_weight(format: Format) -> None:
    w = weights(9, 4 * format.group_size)
    groups = w.view(9, 4, -1)
    top = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0]
    codes = encode(w, format, "rtn")
    assert torch.all((codes.scales * -63 / top - 1).abs() <= 2.0 ** -(format.mantissa_bits + 1))
    assert not codes.selectors.any()
    at = groups.abs().argmax(2, keepdim=True)
    assert not codes.codes.view(9, 4, -1).gather(2, at).any()  # code 0 is -63


@formats_with_books
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 200),
    seed=st.integers(0, 999),
    few=st.booleans(),
)
def test_optimal_is_never_worse_than_rtn(format: Format, rows: int, cols: int, seed: int, few: bool) -> None:
    w = weights(rows, cols, seed)
    w = w.sign() * 2.0 ** w.round() if few else w  # some of which rtn meets exactly
    rtn, optimal = (dequantize(quantize(w, format, method)) for method in ("rtn", "optimal"))
    assert squared_error(w, optimal) <= squared_error(w, rtn) * (1 + 1e-5)


def best_possible(w_n: Tensor, format: Format) -> float:
    """The least squared error of one group, by trying every scale there is."""
    top = float(w_n.abs().max())
    words = torch.arange(0, 0x7F80, 16 if format.book_bits else 1).to(torch.int16)
    scales = words.view(torch.bfloat16).double()
    scales = scales[(scales > top / 63 / 8) & (scales < 2 * top)]
    scales = torch.cat((scales, -scales))
    losses = []
    for book in format.books or ():
        values = scales[:, None, None] * torch.tensor(book, dtype=torch.float64)
        losses.append((values - w_n.double()[:, None]).square().amin(-1))  # [scales, columns]
    losses_KNC = torch.stack(losses)
    parts = torch.split(losses_KNC, {"q4": 64, "q3": 8, "q2": 16}[format.name], -1)
    return float(torch.stack([part.sum(-1).amin(0) for part in parts]).sum(0).min())


@formats_with_books
@pytest.mark.parametrize(("cols", "most"), [(64, 1.002), (29, 1.003), (9, 1.02)])
def test_optimal_is_close_to_trying_everything(format: Format, cols: int, most: float) -> None:
    """Of whole groups, and of some whose padding must not count."""
    least = found = 0.0
    for seed in range(40):
        w = weights(1, min(cols, format.group_size), seed) + 0.01
        least += best_possible(w[0], format)
        found += squared_error(w, dequantize(quantize(w, format)))
    assert least * 0.9999 <= found <= least * most


TARGETS = {"q8": (0.0061, 0.0083), "q4": (0.082, 0.0975), "q3": (0.143, 0.152), "q2": (0.293, 0.308)}
"""Root of the relative squared error of optimal on Gaussian weights, and on Student's t with 5 degrees of freedom."""


@every_format
def test_errors_on_random_weights(format: Format) -> None:
    torch.manual_seed(0)
    gauss = torch.randn(64, 4096)
    heavy = torch.distributions.StudentT(5.0).sample((64, 4096))
    for w, target in zip((gauss, heavy), TARGETS[format.name], strict=True):
        error = relative_error(0.02 * w, dequantize(quantize(0.02 * w, format)))
        assert 0.9 * target < error < target, (format.name, error)


@every_format
@pytest.mark.parametrize("method", METHODS)
def test_magnitudes_make_no_difference(format: Format, method: str) -> None:
    w = weights(8, 200)
    w /= w.abs().max() * 1.01
    expected = encode(w, format, method)
    for exponent in (-95, -40, -3, 3, 60, 120, 127):
        found = encode(w * 2.0**exponent, format, method)
        assert torch.equal(found.codes, expected.codes), exponent
        assert torch.equal(found.selectors, expected.selectors)
        assert torch.equal(found.scales, expected.scales * 2.0**exponent)
        assert dequantize(quantize(w * 2.0**exponent, format, method)).isfinite().all()


@every_format
@pytest.mark.parametrize("method", METHODS)
def test_zero_and_next_to_zero(format: Format, method: str) -> None:
    """A group too small for a scale of its own is zero; what is small beside others in its group is not special."""
    size = format.group_size
    w = torch.zeros(3, 3 * size)
    w[1, :size] = 1e-44  # subnormal
    w[1, size : 2 * size] = -1e-34
    w[2, :size] = 1.0
    w[2, 1] = 1e-44
    packed = quantize(w, format, method)
    codes = unpack(packed.data, format, packed.shape)
    zero = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1]]).bool()
    assert torch.equal(codes.scales == 0, zero)
    assert torch.equal(codes.scales.signbit() & zero, torch.zeros(3, 3).bool())
    assert not codes.selectors[zero].any()
    found = dequantize(packed)
    assert not found[:2].any()
    assert not found[2, size:].any()
    assert found.isfinite().all()
    if format.bits >= 4:
        assert torch.allclose(found[2, 2:size], torch.ones(size - 2), rtol=0.01)


# The same bytes from everything


@every_format
def test_dtypes_and_strides_make_no_difference(format: Format) -> None:
    for cols in (128, 130):
        w = weights(70, cols).to(torch.bfloat16).to(torch.float16)  # in both
        expected = quantize(w.float(), format).data
        strided = w.float().T.contiguous().T
        for other in (w, w.to(torch.bfloat16), w.double(), strided, torch.nn.Parameter(w.float())):
            assert torch.equal(quantize(other, format).data, expected)
    assert not quantize(torch.nn.Parameter(w.float()), format).data.requires_grad


@every_format
@pytest.mark.usefixtures("threads")
def test_threads_make_no_difference(format: Format) -> None:
    w = weights(200, 4100).to(torch.bfloat16)
    seen: list[int] = []
    results: list[tuple[Tensor, Tensor]] = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        packed = quantize(w, format)
        results.append((packed.data, dequantize(packed, rows=(5, 190))))
        assert torch.get_num_threads() == count
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
    assert seen == [1, 2, 3]
    for data, rows in results[1:]:
        assert torch.equal(data, results[0][0])
        assert torch.equal(rows, results[0][1])


@every_format
def test_pieces_make_no_difference(format: Format) -> None:
    """Rows one by one, wide and narrow ones."""
    for shape in ((40, 9000), (3000, 3)):
        w = weights(*shape)
        whole = encode(w, format)
        for row in (0, 17, shape[0] - 1):
            alone = encode(w[row : row + 1], format)
            assert same(alone, Codes(*(part[row : row + 1] for part in whole)))
        assert torch.equal(dequantize(quantize(w, format)), decode(whole, format))


def test_data_may_begin_anywhere() -> None:
    for format in EVERY:
        packed = quantize(weights(30, 100), format)
        moved = torch.empty(packed.data.numel() + 3, dtype=torch.uint8)[3:].copy_(packed.data)
        assert torch.equal(dequantize(packed._replace(data=moved)), dequantize(packed))


# Bad input


@every_format
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 2.0**127])
def test_what_is_not_finite_is_refused(format: Format, bad: float) -> None:
    w = weights(40, 4000)
    w[33, 3999] = bad
    with pytest.raises(CheckpointError, match=r"^layers.0.w holds a number that is infinite, not a number, or 2\^127"):
        quantize(w, format, name="layers.0.w")
    torch.set_num_threads(2)
    with pytest.raises(CheckpointError, match=r"^the matrix holds"):
        quantize(w, format, "rtn")


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"norm is torch.float32 \[3\]; expected a matrix"):
        quantize(torch.ones(3), FORMATS["q4"], name="norm")
    with pytest.raises(CheckpointError, match=r"the matrix is torch.int64 \[1, 2\]; expected a matrix"):
        quantize(torch.tensor([[1, 2]]), FORMATS["q4"])
    with pytest.raises(OptionError, match="the method 'best' is unknown; expected one of optimal, rtn"):
        quantize(torch.ones(3, 3), FORMATS["q4"], "best")


def test_what_is_not_there_is_refused() -> None:
    packed = quantize(weights(20, 20), FORMATS["q4"])
    for rows in ((0, 21), (-1, 3), (5, 4)):
        with pytest.raises(
            OptionError, match=f"rows {rows[0]} to {rows[1]} of a quantised matrix are asked for; it has 20"
        ):
            dequantize(packed, rows=rows)
    for data in (packed.data[:-1], packed.data.float(), packed.data[None]):
        with pytest.raises(CheckpointError, match=r"a q4 matrix \[20, 20\] is kept in .*; expected 2176 bytes"):
            dequantize(Packed(data, packed.format, packed.shape))
