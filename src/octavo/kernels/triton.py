"""The card's kernels, in Triton: products with weights, and the experts around them.

Weights lie on the card as in a store: panels of 16 rows, blocks of two groups of 64 columns (docs/formats.md), of which
a word of 32 bits holds 8 or 4 codes of one row; bfloat16 matrices lie row by row. Low-bit products are those of
`csrc`, bit for bit: activations are int8 with a scale for every 64 columns, the sums of a group are exact integers, and
the float32 steps around them are the same ones in the same order. So it does not matter how many tokens are computed
at a time, nor whether an expert is computed on the card or by the CPU.

A few tokens are multiplied while words stream by (`_low_bit`, `_bfloat16`), many as tiles by the tensor cores
(`_low_bit_tile`, `_bfloat16_tile`). One kernel each, with either product inside, does y = W x (`linear_kernel`), the
first half of an expert (`gate_and_up_kernel`) and its second (`down_kernel`). `octavo.kernels.card` launches them.

Shapes: T tokens, E experts, K experts a token; of a program R rows, M tokens, and at a time G groups of 64 columns, of
which a row has V words, or N columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.quant.formats import FORMATS, PANEL_ROWS

GROUP = 64  # columns that share a scale, of weights and of activations


def _packed_book() -> tuple[int, int, int, int]:
    """q4's code values as bytes of four registers: of codes 0 to 7, which are negative, and of 8 to 15, plus 1."""
    ((*book,),) = FORMATS["q4"].books or ()
    negative, others = book[:8], [value + 1 for value in book[8:]]
    if max(negative) >= 0 or min(others) < 1:
        raise ValueError("q4's book has changed: `_Q4_DOT` needs eight negative values before eight others")
    data = [int.from_bytes(bytes(v & 255 for v in part), "little") for part in (negative, others)]
    return tuple(half >> shift & 0xFFFFFFFF for half in data for shift in (0, 32))  # type: ignore[return-value]


Q4_BOOK = (*(FORMATS["q4"].books or ((),))[0], *_packed_book())
"""What kernels are given as ``book``, int32: the values of codes 0 to 15, then the registers."""

# $0 = $4 + the eight codes of a word ($1) times eight int8 ($2, $3). `prmt` looks four codes up at once. For a code of
# the other half it repeats the sign of what it finds: -1 among the negative values ($5, $6), 0 among the others, which
# are kept plus 1 ($7, $8). So both halves are added, and no bit is masked.
_Q4_DOT = """{
    .reg .b32 v, s, h;
    prmt.b32 v, $5, $6, $1;
    dp4a.s32.s32 $0, v, $2, $4;
    xor.b32 s, $1, 0x88888888;
    prmt.b32 v, $7, $8, s;
    dp4a.s32.s32 $0, v, $2, $0;
    shr.u32 h, $1, 16;
    prmt.b32 v, $5, $6, h;
    dp4a.s32.s32 $0, v, $3, $0;
    shr.u32 h, s, 16;
    prmt.b32 v, $7, $8, h;
    dp4a.s32.s32 $0, v, $3, $0;
}"""

# Four bytes of a q4 group ($2) as the values of their low nibbles ($0) and of their high ones ($1): looked up as above,
# added byte by byte without a carry, and sorted.
_Q4_VALUES = """{{
    .reg .b32 n, p, s, h, first, second;
    xor.b32 s, $2, 0x88888888;
    prmt.b32 n, {0}, {1}, $2;
    prmt.b32 p, {2}, {3}, s;
    and.b32 h, n, 0x7f7f7f7f;
    add.u32 h, h, p;
    and.b32 n, n, 0x80808080;
    xor.b32 first, h, n;
    shr.u32 h, $2, 16;
    prmt.b32 n, {0}, {1}, h;
    shr.u32 h, s, 16;
    prmt.b32 p, {2}, {3}, h;
    and.b32 h, n, 0x7f7f7f7f;
    add.u32 h, h, p;
    and.b32 n, n, 0x80808080;
    xor.b32 second, h, n;
    prmt.b32 $0, first, second, 0x6420;
    prmt.b32 $1, first, second, 0x7531;
}}""".format(*Q4_BOOK[16:])

# A word of q8 ($1): codes less 128, times four int8 ($2).
_Q8_DOT = """{
    .reg .b32 v;
    xor.b32 v, $1, 0x80808080;
    dp4a.s32.s32 $0, v, $2, $3;
}"""

Q4_DOT = tl.constexpr(_Q4_DOT)
Q4_VALUES = tl.constexpr(_Q4_VALUES)
Q8_DOT = tl.constexpr(_Q8_DOT)
PANEL = tl.constexpr(PANEL_ROWS)
COLS = tl.constexpr(GROUP)


# ---------------------------------------- arithmetic


@triton.jit
def _fma(a, b, c, ASM: tl.constexpr):
    """a * b + c, rounded once; numpy, behind the interpreter, would round twice."""
    if ASM:
        out = tl.fma(a, b, c)
    else:
        out = (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return out


@triton.jit
def rounded(x, dtype: tl.constexpr, ASM: tl.constexpr):
    """float32 as another dtype, to the nearest; the interpreter cuts what bfloat16 has no room for."""
    if not (ASM or dtype == tl.float32):
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + (bits >> 16 & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _nearest(x):
    """The nearest integer, ties to even, of floats below 2^22: adding 1.5 * 2^23 leaves no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _all(like, value: tl.constexpr):
    return tl.full(like.shape, value, tl.float32)


@triton.jit
def _exp(x, ASM: tl.constexpr):
    """csrc's exp_vec, step by step."""
    x = tl.maximum(tl.minimum(x, 88.0), -87.0)
    n = _nearest(x * 1.44269504)
    r = _fma(n, _all(x, -0.693359375), x, ASM)
    r = _fma(n, _all(x, 2.12194440e-4), r, ASM)
    p = _fma(_all(x, 1.0 / 5040), r, _all(x, 1.0 / 720), ASM)
    p = _fma(p, r, _all(x, 1.0 / 120), ASM)
    p = _fma(p, r, _all(x, 1.0 / 24), ASM)
    p = _fma(p, r, _all(x, 1.0 / 6), ASM)
    p = _fma(p, r, _all(x, 0.5), ASM)
    p = _fma(p, r, _all(x, 1.0), ASM)
    p = _fma(p, r, _all(x, 1.0), ASM)
    return (p.to(tl.int32, bitcast=True) + (n.to(tl.int32) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def quantized(x, BITS: tl.constexpr, ASM: tl.constexpr):
    """float32 [M, n, 64] to int8, and a scale for every 64 [M, n]; a NaN or an infinity spoils the scale.

    For q4 eight columns come in the order in which a word's nibbles have their codes: 0 4 1 5 2 6 3 7.
    """
    size = tl.abs(x)
    most = tl.max(size, axis=2)
    broken = tl.sum((~(size < float("inf"))).to(tl.int32), axis=2) > 0
    inverse = tl.where(most >= 1e-36, tl.math.div_rn(127.0, tl.where(most >= 1e-36, most, 1.0)), 0.0)
    q = _nearest(x * inverse[:, :, None])
    q = tl.where((q > -127.0) & (q < 127.0), q, tl.where(q >= 127.0, 127.0, -127.0))
    scale = tl.math.div_rn(most, tl.full(most.shape, 127.0, tl.float32))
    if BITS == 4:
        q = tl.reshape(q, [x.shape[0], x.shape[1], 8, 2, 4])
        q = tl.reshape(tl.permute(q, (0, 1, 2, 4, 3)), x.shape)
    return q.to(tl.int8), tl.where(broken, float("nan"), scale)


# ---------------------------------------- a few tokens: words stream by


@triton.jit
def _dot(acc, w, x, book, n0, n1, p0, p1, BITS: tl.constexpr, ASM: tl.constexpr):
    """acc + the codes of the words w times int8 of x, int32; of q4 eight of each, in the order of a word's nibbles."""
    if BITS == 4:
        low, high = x.to(tl.int32), (x >> 32).to(tl.int32)
        if ASM:
            acc = tl.inline_asm_elementwise(
                Q4_DOT, "=&r,r,r,r,r,r,r,r,r", [w, low, high, acc, n0, n1, p0, p1], tl.int32, is_pure=True, pack=1
            )
        else:
            i = tl.arange(0, 8)
            values = tl.load(book + (tl.expand_dims(w, 4) >> 4 * i & 15))
            acc += tl.sum(values * (tl.expand_dims(x, 4) << 56 - 8 * i >> 56).to(tl.int32), axis=4)
    elif ASM:
        acc = tl.inline_asm_elementwise(Q8_DOT, "=&r,r,r,r", [w, x, acc], tl.int32, is_pure=True, pack=1)
    else:
        i = tl.arange(0, 4)
        values = (tl.expand_dims(w, 4) >> 8 * i & 255) - 128
        acc += tl.sum(values * (tl.expand_dims(x, 4) << 24 - 8 * i >> 24), axis=4)
    return acc


@triton.jit
def _add(y, part, scales, group, ASM: tl.constexpr):
    return _fma(part, tl.load(scales + group)[:, None], y, ASM)


@triton.jit
def _fold(y, part, scales, group, ASM: tl.constexpr):
    """y [M, R] and the parts [M, R, G] of G groups, added in their order, each times its activations' scale."""
    M: tl.constexpr = part.shape[0]
    R: tl.constexpr = part.shape[1]
    G: tl.constexpr = part.shape[2]
    # The groups of a row come to one thread; they are parted by the lowest bit of their number, then by the next.
    even, odd = tl.split(tl.reshape(part, [M, R, G // 2, 2]))
    if G == 2:
        y = _add(y, tl.reshape(even, [M, R]), scales, group, ASM)
        y = _add(y, tl.reshape(odd, [M, R]), scales, group + 1, ASM)
    else:
        tl.static_assert(G == 8)
        even_0, even_2 = tl.split(tl.reshape(even, [M, R, 2, 2]))
        odd_1, odd_3 = tl.split(tl.reshape(odd, [M, R, 2, 2]))
        p0, p4 = tl.split(even_0)
        p1, p5 = tl.split(odd_1)
        p2, p6 = tl.split(even_2)
        p3, p7 = tl.split(odd_3)
        y = _add(y, p0, scales, group, ASM)
        y = _add(y, p1, scales, group + 1, ASM)
        y = _add(y, p2, scales, group + 2, ASM)
        y = _add(y, p3, scales, group + 3, ASM)
        y = _add(y, p4, scales, group + 4, ASM)
        y = _add(y, p5, scales, group + 5, ASM)
        y = _add(y, p6, scales, group + 6, ASM)
        y = _add(y, p7, scales, group + 7, ASM)
    return y


@triton.jit
def _low_bit(
    q,
    scales,
    rows_M,
    weight,
    panel,
    n_panels,
    book,
    N_GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    ASM: tl.constexpr,
):
    """R rows of a low-bit matrix, from a panel on, times the int8 activations in some rows of q: float32 [M, R]."""
    M: tl.constexpr = rows_M.shape[0]
    V: tl.constexpr = 2 * BITS
    P: tl.constexpr = R // PANEL
    BLOCK: tl.constexpr = 16 + 2 * V * PANEL  # words: scales, and the codes of two groups
    words = weight.to(tl.pointer_type(tl.int32))
    p = panel + tl.arange(0, P)
    g = tl.arange(0, G)
    r = tl.arange(0, PANEL)
    base = p.to(tl.int64)[:, None, None] * (N_GROUPS // 2 * BLOCK) + r[None, None, :]
    inside = (p < n_panels)[:, None, None]
    word = tl.int64 if BITS == 4 else tl.int32  # of activations, for one of codes
    activations = (q + rows_M.to(tl.int64)[:, None] * (N_GROUPS * COLS)).to(tl.pointer_type(word))
    scales += rows_M * N_GROUPS
    n0, n1 = tl.load(book + 16), tl.load(book + 17)
    p0, p1 = tl.load(book + 18), tl.load(book + 19)
    y = tl.zeros([M, R], tl.float32)
    for first in range(0, N_GROUPS, G):
        group = first + g
        codes = words + base + (group // 2 * BLOCK + 16 + group % 2 * (V * PANEL))[None, :, None]
        sums = tl.zeros([M, P, G, PANEL], tl.int32)
        for v in tl.static_range(V):
            w = tl.load(codes + v * PANEL, mask=inside, other=0)[None, :, :, :]
            x = tl.load(activations + (group * V)[None, :] + v)[:, None, :, None]
            sums = _dot(sums, w, x, book, n0, n1, p0, p1, BITS, ASM)
        scale = weight.to(tl.pointer_type(tl.bfloat16)) + 2 * base - r[None, None, :]
        scale += (group // 2 * (2 * BLOCK) + group % 2 * PANEL)[None, :, None]
        part = sums.to(tl.float32) * tl.load(scale, mask=inside, other=0.0).to(tl.float32)[None, :, :, :]
        y = _fold(y, tl.reshape(tl.permute(part, (0, 1, 3, 2)), [M, R, G]), scales, first, ASM)
    return y


@triton.jit
def _as_bfloat16(x, ASM: tl.constexpr):
    return x if x.dtype == tl.bfloat16 else rounded(x, tl.bfloat16, ASM)


@triton.jit
def _bfloat16(
    x, rows_M, weight, row, n_rows, N_COLS: tl.constexpr, R: tl.constexpr, N: tl.constexpr, ASM: tl.constexpr
):
    """R rows of a bfloat16 matrix times some rows of x, float32 sums: [M, R]."""
    M: tl.constexpr = rows_M.shape[0]
    w = tl.multiple_of(weight.to(tl.pointer_type(tl.bfloat16)), 16)
    r = row + tl.arange(0, R)
    n = tl.arange(0, N)
    sums = tl.zeros([M, R, N] if M > 1 else [R, N], tl.float32)
    for first in range(0, N_COLS, N):
        there = first + n < N_COLS
        at = r.to(tl.int64)[:, None] * N_COLS + (first + n)[None, :]
        w_RN = tl.load(w + at, mask=(r < n_rows)[:, None] & there[None, :], other=0.0).to(tl.float32)
        x_MN = tl.load(x + rows_M.to(tl.int64)[:, None] * N_COLS + (first + n)[None, :], mask=there[None, :], other=0.0)
        x_MN = _as_bfloat16(x_MN, ASM).to(tl.float32)
        if M > 1:
            sums = tl.fma(w_RN[None, :, :], x_MN[:, None, :], sums)
        else:  # in the threads that have loaded the weights
            sums = tl.fma(w_RN, tl.broadcast_to(x_MN, [R, N]), sums)
    return tl.sum(sums, axis=2) if M > 1 else tl.sum(sums, axis=1)[None, :]


# ---------------------------------------- many tokens: tiles for the tensor cores


@triton.jit
def _low_bit_tile(
    q,
    scales,
    rows_M,
    weight,
    panel,
    n_panels,
    book,
    N_GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    R: tl.constexpr,
    ASM: tl.constexpr,
):
    """See `_low_bit`, of which it has the bits."""
    M: tl.constexpr = rows_M.shape[0]
    V: tl.constexpr = 2 * BITS
    BLOCK: tl.constexpr = 16 + 2 * V * PANEL  # words
    words = weight.to(tl.pointer_type(tl.int32))
    r = tl.arange(0, R)
    inside = panel + r // PANEL < n_panels
    base = (panel + r // PANEL).to(tl.int64) * (N_GROUPS // 2 * BLOCK)
    v = tl.arange(0, V)
    shift = 8 * tl.arange(0, 4)
    k = tl.arange(0, 4 * V)
    # A byte of q4 has two codes, which are neighbours among the activations (`quantized`).
    column = k if BITS == 8 else 2 * k
    activations = q + rows_M.to(tl.int64)[:, None] * (N_GROUPS * COLS) + column[None, :]
    scales += rows_M * N_GROUPS
    y = tl.zeros([M, R], tl.float32)
    for group in range(N_GROUPS):
        start = base + group // 2 * BLOCK
        at = start + 16 + group % 2 * (V * PANEL) + r % PANEL
        w = tl.load(words + (at[None, :] + (v * PANEL)[:, None]), mask=inside[None, :], other=0)
        codes = tl.reshape((w[:, None, :] >> shift[None, :, None] & 255).to(tl.uint8), [4 * V, R])
        x = tl.load(activations + group * COLS)
        if BITS == 8:
            sums = tl.dot(x, (codes ^ 128).to(tl.int8, bitcast=True), out_dtype=tl.int32)
        else:
            if ASM:
                low, high = tl.inline_asm_elementwise(
                    Q4_VALUES, "=&r,=&r,r", [codes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
                )
            else:
                low = tl.load(book + (codes & 15)).to(tl.int8)
                high = tl.load(book + (codes >> 4)).to(tl.int8)
            sums = tl.dot(x, low, out_dtype=tl.int32)
            sums = tl.dot(tl.load(activations + group * COLS + 1), high, sums, out_dtype=tl.int32)
        word = weight.to(tl.pointer_type(tl.bfloat16)) + 2 * start + group % 2 * PANEL + r % PANEL
        w_scale = tl.load(word, mask=inside, other=0.0).to(tl.float32)
        y = _add(y, sums.to(tl.float32) * w_scale[None, :], scales, group, ASM)
    return y


@triton.jit
def _bfloat16_tile(
    x, rows_M, weight, row, n_rows, N_COLS: tl.constexpr, R: tl.constexpr, N: tl.constexpr, ASM: tl.constexpr
):
    """See `_bfloat16`; the sums come in another order."""
    M: tl.constexpr = rows_M.shape[0]
    w = tl.multiple_of(weight.to(tl.pointer_type(tl.bfloat16)), 16)
    r = row + tl.arange(0, R)
    n = tl.arange(0, N)
    sums = tl.zeros([M, R], tl.float32)
    for first in range(0, N_COLS, N):
        there = first + n < N_COLS
        at = r.to(tl.int64)[None, :] * N_COLS + (first + n)[:, None]
        w_NR = tl.load(w + at, mask=(r < n_rows)[None, :] & there[:, None], other=0.0)
        x_MN = tl.load(x + rows_M.to(tl.int64)[:, None] * N_COLS + (first + n)[None, :], mask=there[None, :], other=0.0)
        x_MN = _as_bfloat16(x_MN, ASM)
        if not ASM:  # the interpreter takes bfloat16 for integers
            x_MN, w_NR = x_MN.to(tl.float32), w_NR.to(tl.float32)
        sums = tl.dot(x_MN, w_NR, sums)
    return sums


@triton.jit
def _product(
    x,
    scales,
    rows_M,
    weight,
    row,
    n_rows,
    book,
    N_COLS: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    ASM: tl.constexpr,
):
    """Rows row to row + R of W times some rows of x, or of int8 activations where W is low-bit: float32 [M, R]."""
    if BITS == 16:
        if TILE:
            out = _bfloat16_tile(x, rows_M, weight, row, n_rows, N_COLS, R, N, ASM)
        else:
            out = _bfloat16(x, rows_M, weight, row, n_rows, N_COLS, R, N, ASM)
    else:
        groups: tl.constexpr = (N_COLS + 2 * COLS - 1) // (2 * COLS) * 2
        panels = (n_rows + PANEL - 1) // PANEL
        if TILE:
            out = _low_bit_tile(x, scales, rows_M, weight, row // PANEL, panels, book, groups, BITS, R, ASM)
        else:
            out = _low_bit(x, scales, rows_M, weight, row // PANEL, panels, book, groups, BITS, R, G, ASM)
    return out


# ---------------------------------------- kernels: matrices and experts


@triton.jit(do_not_specialize=["weight"])
def linear_kernel(
    x,
    scales,
    weight: tl.int64,
    y,
    book,
    n_tokens,
    n_rows,
    N_COLS: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    ASM: tl.constexpr,
):
    """y [T, n_rows] = x [T, N_COLS] times a matrix; x is int8 with scales where that is low-bit.

    The weight is an address, of which nothing is known: wide loads of codes would have to change hands afterwards.
    """
    row = tl.program_id(0) * R
    tokens = tl.program_id(1) * M + tl.arange(0, M)
    rows_M = tl.minimum(tokens, n_tokens - 1)
    out = _product(x, scales, rows_M, weight, row, n_rows, book, N_COLS, BITS, TILE, R, G, N, ASM)
    r = row + tl.arange(0, R)
    to = y + tokens.to(tl.int64)[:, None] * n_rows + r[None, :]
    tl.store(to, rounded(out, y.dtype.element_ty, ASM), mask=(tokens < n_tokens)[:, None] & (r < n_rows)[None, :])


@triton.jit
def _choices(order, blocks, M: tl.constexpr):
    """Of this program's block: its expert (-1: none), the choices in it (token * K + place), and which are real."""
    block = blocks + 3 * tl.program_id(1)
    at = tl.load(block + 1) + tl.arange(0, M)
    end = tl.load(block + 2)
    return tl.load(block), tl.load(order + tl.minimum(at, tl.maximum(end - 1, 0))), at < end


@triton.jit
def gate_and_up_kernel(
    x,
    scales,
    order,
    blocks,
    table,
    hidden,
    hidden_scales,
    book,
    n_rows,
    K: tl.constexpr,
    N_COLS: tl.constexpr,
    BITS_1: tl.constexpr,
    BITS_3: tl.constexpr,
    BITS_2: tl.constexpr,
    TILE: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    ASM: tl.constexpr,
):
    """silu(w1 x) * (w3 x) of every choice whose expert is here, as w2 wants it: bfloat16, or int8 with scales."""
    expert, choices, live = _choices(order, blocks, M)
    if expert < 0:
        return
    w1 = tl.load(table + 3 * expert)
    w3 = tl.load(table + 3 * expert + 1)
    if w1 == 0:
        return
    row = tl.program_id(0) * R
    token = choices // K
    gate = _product(x, scales, token, w1, row, n_rows, book, N_COLS, BITS_1, TILE, R, G, N, ASM)
    up = _product(x, scales, token, w3, row, n_rows, book, N_COLS, BITS_3, TILE, R, G, N, ASM)
    h = tl.math.div_rn(gate, 1.0 + _exp(0.0 - gate, ASM)) * up
    r = row + tl.arange(0, R)
    h = tl.where((r < n_rows)[None, :], h, 0.0)  # what fills up a panel may be anything
    if BITS_2 == 16:
        to = hidden + choices.to(tl.int64)[:, None] * n_rows + r[None, :]
        tl.store(to, rounded(h, tl.bfloat16, ASM), mask=live[:, None] & (r < n_rows)[None, :])
    else:
        n_groups = (n_rows + 2 * COLS - 1) // (2 * COLS) * 2
        q, scale = quantized(tl.reshape(h, [M, R // COLS, COLS]), BITS_2, ASM)
        to = hidden + choices.to(tl.int64)[:, None] * (n_groups * COLS) + r[None, :]
        tl.store(to, tl.reshape(q, [M, R]), mask=live[:, None] & (r < n_groups * COLS)[None, :])
        group = row // COLS + tl.arange(0, R // COLS)
        to = hidden_scales + choices[:, None] * n_groups + group[None, :]
        tl.store(to, scale, mask=live[:, None] & (group < n_groups)[None, :])


@triton.jit
def down_kernel(
    hidden,
    hidden_scales,
    order,
    blocks,
    table,
    weights,
    parts,
    book,
    n_rows,
    N_COLS: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    ASM: tl.constexpr,
):
    """parts [T * K, n_rows] = the router's weight times w2 of what `gate_and_up_kernel` left."""
    expert, choices, live = _choices(order, blocks, M)
    if expert < 0:
        return
    w2 = tl.load(table + 3 * expert + 2)
    if w2 == 0:
        return
    row = tl.program_id(0) * R
    out = _product(hidden, hidden_scales, choices, w2, row, n_rows, book, N_COLS, BITS, TILE, R, G, N, ASM)
    r = row + tl.arange(0, R)
    to = parts + choices.to(tl.int64)[:, None] * n_rows + r[None, :]
    tl.store(to, out * tl.load(weights + choices)[:, None], mask=live[:, None] & (r < n_rows)[None, :])


@triton.jit
def dispatch_kernel(ids, order, blocks, n_choices, n_blocks, E: tl.constexpr, A: tl.constexpr, M: tl.constexpr):
    """Sort the choices by expert, and cut each expert's into blocks of M: (expert, begin, end), -1 for no more."""
    at = tl.arange(0, A)
    chosen = tl.load(ids + at, mask=at < n_choices, other=-1)
    begin = tl.sum(at) * 0
    block = begin
    for expert in range(E):
        mine = chosen == expert
        rank = tl.cumsum(mine.to(tl.int32), axis=0)
        count = tl.sum(mine.to(tl.int32))
        tl.store(order + begin + rank - 1, at, mask=mine)
        needed = (count + M - 1) // M
        n = block + at
        first = begin + at * M
        new = at < needed
        tl.store(blocks + 3 * n, expert, mask=new)
        tl.store(blocks + 3 * n + 1, first, mask=new)
        tl.store(blocks + 3 * n + 2, tl.minimum(first + M, begin + count), mask=new)
        begin += count
        block += needed
    unused = at >= block
    tl.store(blocks + 3 * at, -1, mask=unused & (at < n_blocks))
    tl.store(blocks + 3 * at + 1, 0, mask=unused & (at < n_blocks))
    tl.store(blocks + 3 * at + 2, 0, mask=unused & (at < n_blocks))
