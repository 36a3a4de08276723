"""The card's kernels between products: norms and routers, activations made ready, rotation, sums over experts.

Shapes: T tokens, D dim, E experts, K experts a token, H query heads, KV key-value heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton import COLS, quantized, rounded


@triton.jit
def quantize_kernel(
    x, q, scales, n_cols, N_GROUPS: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, ASM: tl.constexpr
):
    """int8 activations of G groups of a token, and their scales; what lies behind the end is zeros."""
    token = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * G + tl.arange(0, G)
    at = group[:, None] * COLS + tl.arange(0, COLS)[None, :]
    values = tl.load(x + token * n_cols + at, mask=at < n_cols, other=0.0).to(tl.float32)
    codes, scale = quantized(values[None, :, :], BITS, ASM)
    there = group < N_GROUPS
    tl.store(q + token * (N_GROUPS * COLS) + at, tl.reshape(codes, [G, COLS]), mask=there[:, None])
    tl.store(scales + token * N_GROUPS + group, tl.reshape(scale, [G]), mask=there)


@triton.jit
def norm_kernel(
    x,
    added,
    total,
    weight,
    normed,
    q,
    scales,
    gate,
    ids,
    weights,
    logits,
    eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    N_GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    E: tl.constexpr,
    WIDE_E: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    ASM: tl.constexpr,
):
    """total = x + added; normed = x / rms(x) * weight, as int8 too where N_GROUPS; by a gate [E, D] K experts."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    there = at < D
    value = tl.load(x + token * D + at, mask=there, other=0.0)
    if ADD:
        more = tl.load(added + token * D + at, mask=there, other=0.0)
        value = rounded(value.to(tl.float32) + more.to(tl.float32), x.dtype.element_ty, ASM)
        tl.store(total + token * D + at, value, mask=there)
    value = value.to(tl.float32)
    rms = tl.sqrt(tl.sum(value * value) / D + eps)
    out = rounded(value / rms, x.dtype.element_ty, ASM).to(tl.float32)
    out *= tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    out = rounded(out, x.dtype.element_ty, ASM)
    tl.store(normed + token * D + at, out, mask=there)
    if N_GROUPS > 0:
        codes, scale = quantized(tl.reshape(out.to(tl.float32), [1, WIDTH // COLS, COLS]), BITS, ASM)
        tl.store(q + token * (N_GROUPS * COLS) + at, tl.reshape(codes, [WIDTH]), mask=at < N_GROUPS * COLS)
        group = tl.arange(0, WIDTH // COLS)
        tl.store(scales + token * N_GROUPS + group, tl.reshape(scale, [WIDTH // COLS]), mask=group < N_GROUPS)
    if E > 0:
        tl.debug_barrier()  # what was stored is read again, by other threads
        expert = tl.arange(0, WIDE_E)
        sums = tl.zeros([WIDE_E, N], tl.float32)
        for first in range(0, D, N):
            n = first + tl.arange(0, N)
            inside = (expert < E)[:, None] & (n < D)[None, :]
            g = tl.load(gate + expert[:, None] * D + n[None, :], mask=inside, other=0.0).to(tl.float32)
            sums += g * tl.load(normed + token * D + n, mask=n < D, other=0.0).to(tl.float32)[None, :]
        found = tl.sum(sums, axis=1)
        tl.store(logits + token * E + expert, found, mask=expert < E)
        # NaN is above all, as torch sorts; of equals the first is chosen.
        left = tl.where(found != found, float("inf"), found)
        left = tl.where(expert < E, tl.maximum(left, -3.0e38), float("-inf"))
        whole = 0.0
        best = tl.max(left)
        for k in tl.static_range(K):
            chosen = tl.argmax(left, axis=0, tie_break_left=True)
            of_it = tl.exp(tl.max(left) - best)
            whole += of_it
            tl.store(ids + token * K + k, chosen.to(tl.int64))
            tl.store(weights + token * K + k, of_it)
            left = tl.where(expert == chosen, float("-inf"), left)
        tl.debug_barrier()
        for k in tl.static_range(K):
            tl.store(weights + token * K + k, tl.load(weights + token * K + k) / whole)


@triton.jit
def combine_kernel(
    parts, x, y, D: tl.constexpr, K: tl.constexpr, N: tl.constexpr, ADD: tl.constexpr, ASM: tl.constexpr
):
    """y = the sum of a token's K parts [K, D] in their order, in y's dtype; on top of x where ADD."""
    token = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * N + tl.arange(0, N)
    there = at < D
    total = tl.zeros([N], tl.float32)
    for k in tl.static_range(K):
        total += tl.load(parts + (token * K + k) * D + at, mask=there, other=0.0)
    out = rounded(total, y.dtype.element_ty, ASM)
    if ADD:
        before = tl.load(x + token * D + at, mask=there, other=0.0).to(tl.float32)
        out = rounded(before + out.to(tl.float32), y.dtype.element_ty, ASM)
    tl.store(y + token * D + at, out, mask=there)


@triton.jit
def rotate_kernel(
    qkv,
    rotation,
    queries,
    keys,
    values,
    slots,
    row_stride,
    head_stride,
    slot_stride,
    n_tokens,
    H: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    WIDE: tl.constexpr,
    ASM: tl.constexpr,
):
    """Turn neighbouring pairs of queries and keys by their position, and put keys and values into their slots."""
    token = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0)
    pair = tl.arange(0, WIDE)
    there = pair < HALF
    source = qkv + (token * (H + 2 * KV) + head) * (2 * HALF) + 2 * pair
    a = tl.load(source, mask=there, other=0.0)
    b = tl.load(source + 1, mask=there, other=0.0)
    if head < H + KV:
        turn = rotation + (token * HALF + pair) * 2
        cos = tl.load(turn, mask=there, other=0.0)
        sin = tl.load(turn + 1, mask=there, other=0.0)
        real, imaginary = a.to(tl.float32), b.to(tl.float32)
        a = rounded(real * cos - imaginary * sin, qkv.dtype.element_ty, ASM)
        b = rounded(real * sin + imaginary * cos, qkv.dtype.element_ty, ASM)
    if head < H:
        to = queries + (token * H + head) * (2 * HALF)
    else:
        place = token // n_tokens * row_stride + tl.load(slots + token) * slot_stride
        if head < H + KV:
            to = keys + place + (head - H) * head_stride
        else:
            to = values + place + (head - H - KV) * head_stride
    tl.store(to + 2 * pair, a, mask=there)
    tl.store(to + 2 * pair + 1, b, mask=there)
