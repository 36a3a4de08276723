"""Every kernel alone, beside the card's limits, for a small table of tilings: where there is speed to be had.

    python benchmarks/gpu/tilings.py [--bits 4 16 8] [--tokens 1 8 64 2048]

Weights take turns, so that none is in the card's cache; a pass over them is one graph. What a tiling computes is
compared with what the default one does, before it is timed. Bytes are those of the weights that are read, each expert's
once, and fractions those of a copy's bandwidth and of a large bfloat16 product's rate. Compiling takes seconds a tiling
and leaves its results on the disk: --compile I/N compiles every Nth tiling from the Ith on and times nothing, so that N
processes can do it beforehand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from check import made_experts, random_routing, random_weight
from common import Setting, error, forget, median_seconds, options, replayed, setting
from torch import Tensor

from octavo.kernels import card
from octavo.kernels.card import CardExperts, CardMatrix, Tiling, linear, moe, to_card

COPIES = 1 << 30
"""Bytes of weights that take turns, about."""
SHARE: tuple[int, int] | None = None
"""What --compile says."""


def variants(base: Tiling, bits: int) -> Iterator[Tiling]:
    """What is tried in the place of a default; every one takes seconds to be compiled."""
    if base.tile:
        for M, R, num_warps, num_stages in itertools.product((16, 64, 128), (64, 128), (4, 8), (3, 4)):
            if max(base.M, 16) >= M:
                yield base._replace(M=M, R=R, num_warps=num_warps, num_stages=num_stages)
    elif bits == 16:
        for R, N, num_warps in itertools.product((4, 8, 16), (256, 512, 1024), (2, 4, 8)):
            yield base._replace(R=R, N=N, num_warps=num_warps)
    else:
        for R, num_warps in itertools.product((16, 32, 64, 128), (1, 2, 4, 8)):
            yield base._replace(R=R, num_warps=num_warps)


@contextmanager
def tiled(which: int, how: Tiling | None) -> Iterator[None]:
    """Launch one of the products that follow one another with another tiling; None leaves all as they are."""
    default = card.tiling

    def other(tokens: int, bits: Sequence[int], rows_together: int = 16) -> list[Tiling]:
        assert how is not None
        least = rows_together if which == 0 and bits[which] < 16 else how.R
        found = [one._replace(M=how.M) for one in default(tokens, bits, rows_together)]
        found[which] = how._replace(R=max(how.R, least))
        return found

    if how is not None:
        card.tiling = other
    try:
        yield
    finally:
        card.tiling = default


def sweep(
    where: Setting, step: str, bits: int, defaults: list[Tiling], nbytes: float, operations: float, work: Work
) -> None:
    """Check and time some work, whose products follow one another, by every tiling of each of them.

    Args:
        where: it is measured.
        step: its name.
        bits: of a weight.
        defaults: tilings of its products; none where it is not cut by us.
        nbytes: of weights that a pass reads.
        operations: of a pass.
        work: to be measured.
    """
    limits = where.limits() if SHARE is None else {}
    expected = work(0).clone()
    tried = [("default", 0, None)]
    for which, base in enumerate(defaults):
        some = itertools.islice(variants(base, bits), 2 if where.tiny else None)
        tried += [(f"{which}: {how}", which, how) for how in some]
    first, every = SHARE or (0, 1)
    for name, which, how in tried[first::every]:
        try:
            with tiled(which, how):
                off = error(work(0), expected)
                if SHARE is not None:
                    continue
                seconds = median_seconds(replayed(lambda: work(None), where), where, 3, 3)
        except Exception as problem:  # too much shared memory, say
            where.tell(step, {"tiling": name, "failed": f"{type(problem).__name__}: {str(problem).splitlines()[:1]}"})
            continue
        gb_s, tflops = nbytes / seconds / 1e9, operations / seconds / 1e12
        found = {
            "tiling": name,
            "right": off < 1e-2,
            "microseconds": seconds * 1e6,
            "gb_s": gb_s,
            "tflops": tflops,
            "of_copy": gb_s / limits["copy_limit_gbs"],
            "of_matrix_rate": tflops / limits["matrix_limit_tflops"],
        }
        where.tell(step, found)


Work = Callable[[int | None], Tensor]
"""With a number, the product with the weights of that number; with None a pass over all of them."""


def over(count: int, one: Callable[[int], Tensor]) -> Work:
    """Work of one product for each of some weights."""

    def work(which: int | None) -> Tensor:
        for i in range(count) if which is None else (which,):
            out = one(i)
        return out

    return work


def measure_linear(where: Setting, bits: int, tokens: int) -> None:
    """Attention's output, and the head."""
    args = where.args
    for rows, cols in ((args.dim, args.dim), (args.vocab_size, args.dim)):
        first = to_card(random_weight(rows, cols, bits, where), where.device)
        count = 2 if where.tiny else max(2, COPIES // first.nbytes)
        matrices = [first, *(CardMatrix(first.kind, first.data.clone()) for _ in range(count - 1))]
        x = torch.randn(tokens, cols, device=where.device).to(torch.bfloat16)
        work = over(count, lambda i, x=x, matrices=matrices: linear(x, matrices[i]))
        step = f"kernel-linear-{bits}-{rows}x{cols}-{tokens}"
        by_torch = bits == 16 and tokens > card.FEW[16]
        cuts = [] if by_torch else card.tiling(tokens, [bits])
        sweep(where, step, bits, cuts, count * first.nbytes, 2 * count * tokens * rows * cols, work)
        forget()


def measure_experts(where: Setting, bits: int, tokens: int) -> None:
    """The sparse block of a layer."""
    args = where.args
    assert args.moe is not None
    layers = 2 if where.tiny or bits == 16 else 4
    tables = [
        CardExperts([tuple(to_card(w, where.device) for w in expert) for expert in made_experts(bits, where)])
        for _ in range(layers)
    ]
    x = torch.randn(tokens, args.dim, device=where.device).to(torch.bfloat16)
    routes = [random_routing(tokens, where) for _ in range(layers)]
    nbytes = sum(len(ids.unique()) * one.table.nbytes for (ids, _), one in zip(routes, tables, strict=True))
    operations = 2 * layers * tokens * args.moe.num_experts_per_tok * args.expert_params
    work = over(layers, lambda i: moe(x, *routes[i], tables[i].table))
    together = card._tokens_together(tokens, args.moe.num_experts_per_tok, args.moe.num_experts)
    cuts = card.tiling(together, [bits, bits], rows_together=16 if bits == 16 else 64)
    sweep(where, f"kernel-experts-{bits}-{tokens}", bits, cuts, nbytes, operations, work)
    forget()


def main() -> None:
    """Measure kernel after kernel."""
    parser = options(__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 16, 8], choices=(16, 8, 4))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 2048])
    parser.add_argument("--compile", metavar="I/N", help="compile a share of the tilings, and time nothing")
    chosen = parser.parse_args()
    if chosen.compile is not None:
        global SHARE
        first, every = chosen.compile.split("/")
        SHARE = int(first), int(every)
    where = setting(chosen)
    with torch.inference_mode():
        for bits in chosen.bits:
            for tokens in (1, 20) if where.tiny else chosen.tokens:
                measure_experts(where, bits, tokens)
                measure_linear(where, bits, tokens)


if __name__ == "__main__":
    main()
