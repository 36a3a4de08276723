"""Attention by torch: which of its ways is the fastest for a decode step, and for a prompt with a sliding window.

    python benchmarks/gpu/attention.py

Heads are Mixtral's: 32 queries share 8 keys of 128. Every way is compared with the plain formula before it is timed;
one that fails says so. A decode step's time is that of replaying its graph; bytes are those of the keys and values that
are visible, operations those of the visible pairs.

Ways:
    rows-*      queries that share keys are rows of one head, with a mask: what `octavo.model` does for one token
    gqa-*       torch's own grouped queries, with a mask (with a causal flag where a prompt has no window)
    flex        FlexAttention, compiled, with grouped queries and a block mask
behind the dash is the kernel that is asked of torch: any, flash, efficient, cudnn, math.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import Setting, error, median_seconds, options, replayed, setting
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

BACKENDS = {
    "any": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
NEAR = 1e-2


class Case(NamedTuple):
    """Queries [B, H, T, K], and keys and values [B, G, S, K], of which the last T are the queries' own."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor  # bool [T, S]

    @property
    def plain(self) -> Tensor:
        """By the formula, in float32."""
        repeat = self.q.shape[1] // self.k.shape[1]
        k, v = (x.float().repeat_interleave(repeat, 1) for x in (self.k, self.v))
        scores = self.q.float() @ k.transpose(2, 3) * self.q.shape[-1] ** -0.5
        return scores.masked_fill(~self.mask, -torch.inf).softmax(-1) @ v


def case(where: Setting, batch: int, tokens: int, slots: int, window: int | None) -> Case:
    """Random queries, keys and values."""
    args, dtype = where.args, torch.bfloat16 if where.has_graphs else torch.float32
    made = partial(torch.randn, device=where.device, dtype=dtype)
    kv = (batch, args.n_kv_heads, slots, args.head_dim)
    query = torch.arange(slots - tokens, slots, device=where.device)[:, None]
    key = torch.arange(slots, device=where.device)[None]
    mask = key <= query
    if window is not None:
        mask = mask & (query - key < window)
    return Case(made(batch, args.n_heads, tokens, args.head_dim), made(kv), made(kv), mask)


def rows(backend: SDPBackend | None, c: Case) -> Tensor:
    """One token's queries as rows of the heads they share."""
    q = c.q.view(c.q.shape[0], c.k.shape[1], -1, c.q.shape[-1])
    with sdpa_kernel(backend) if backend is not None else nullcontext():
        return F.scaled_dot_product_attention(q, c.k, c.v, attn_mask=c.mask).view(c.q.shape)


def grouped(backend: SDPBackend | None, causal: bool, c: Case) -> Tensor:
    """Torch's grouped queries."""
    mask = None if causal else c.mask
    with sdpa_kernel(backend) if backend is not None else nullcontext():
        return F.scaled_dot_product_attention(c.q, c.k, c.v, attn_mask=mask, is_causal=causal, enable_gqa=True)


def flex(where: Setting, window: int | None, c: Case) -> Callable[[], Tensor]:
    """FlexAttention; its block mask is made beforehand, as a step would have it for all layers."""
    tokens, slots = c.q.shape[2], c.k.shape[2]

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = query + slots - tokens
        return (key <= at) if window is None else (key <= at) & (at - key < window)

    block_mask = create_block_mask(seen, None, None, tokens, slots, device=str(where.device))
    attend = torch.compile(flex_attention, dynamic=False) if where.has_graphs else flex_attention
    return lambda: attend(c.q, c.k, c.v, block_mask=block_mask, enable_gqa=True)


def ways(where: Setting, c: Case, window: int | None) -> Iterator[tuple[str, Callable[[], Callable[[], Tensor]]]]:
    """All that make sense for a case, and what makes them ready."""
    tokens, slots = c.q.shape[2], c.k.shape[2]
    for name, backend in BACKENDS.items():
        if tokens == 1:
            yield f"rows-{name}", partial(partial, rows, backend, c)
        yield f"gqa-{name}", partial(partial, grouped, backend, window is None and tokens == slots, c)
    yield "flex", partial(flex, where, window, c)


def measure(where: Setting, name: str, c: Case, window: int | None) -> None:
    """Check and time every way of a case."""
    expected, pairs = c.plain, int(c.mask.sum()) * c.q.shape[0]
    nbytes = 2 * pairs * c.k.shape[1] * c.k.shape[3] * c.k.element_size() // c.q.shape[2]
    operations = 4 * pairs * c.q.shape[1] * c.q.shape[3]
    for way, ready in ways(where, c, window):
        step = f"attention-{name}-{way}"
        try:
            work = ready()
            off = error(work(), expected)
            work = replayed(work, where) if c.q.shape[2] == 1 else work
            seconds = median_seconds(work, where)
        except Exception as problem:  # not every kernel takes every case
            where.tell(step, {"failed": f"{type(problem).__name__}: {str(problem).splitlines()[:1]}"})
            continue
        figures = {"microseconds": seconds * 1e6, "gb_s": nbytes / seconds / 1e9, "tflops": operations / seconds / 1e12}
        where.tell(step, {"case": f"attention-{name}", "right": off < NEAR, "error": off} | figures)


def main() -> None:
    """Measure case after case."""
    where = setting(options(__doc__).parse_args())
    decoding = [(1, 512), (1, 4096), (1, 32768), (8, 4096), (64, 512), (64, 4096)]
    prompts = [(2048, 2048, None), (512, 4096, None), (8192, 8192, 4096), (512, 8192, 4096)]
    if where.tiny:
        decoding, prompts = [(2, 16)], [(4, 8, 5)]
    with torch.inference_mode():
        for batch, slots in decoding:
            measure(where, f"decode-{batch}x{slots}", case(where, batch, 1, slots, None), None)
        for tokens, slots, window in prompts:
            measure(where, f"prompt-{tokens}of{slots}-{window}", case(where, 1, tokens, slots, window), window)


if __name__ == "__main__":
    main()
