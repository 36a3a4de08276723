"""The card in tests: a GPU where there is one, or this CPU, where Triton interprets the card's kernels.

Two things that the interpreter leaves out are here too: PTX, of which `emulate` runs a handful of instructions, and the
compiler. Run as a program, this file compiles the kernels that a layer of Mixtral's size launches, for cards that need
not be here, and prints a line of JSON for each.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import quick_triton  # noqa: F401

CARD = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Words = NDArray[np.uint32]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is full of NaN and of huge integers, so that it is seen what a kernel forgot to write."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# ---------------------------------------- PTX


def emulate(ptx: str, n_outputs: int, *inputs: Any) -> list[Words]:
    """Run a block of PTX, as the manual of the PTX ISA defines its instructions, for many threads at once.

    Args:
        ptx: in braces; $0 and so on are the outputs, then the inputs.
        n_outputs: how many.
        inputs: what each thread has in a register: 32 bits, signed or not.

    Returns:
        The outputs.
    """
    threads = np.broadcast_arrays(*[np.asarray(one).astype(np.int64) & 0xFFFFFFFF for one in inputs])
    known: dict[str, Any] = {f"${n_outputs + i}": one.astype(np.uint32) for i, one in enumerate(threads)}
    writable = {f"${i}" for i in range(n_outputs)}

    def value(operand: str) -> Words:
        if re.fullmatch(r"0x[0-9a-f]+|[0-9]+", operand):
            return np.full(threads[0].shape, int(operand, 0), np.uint32)
        return known[operand]  # KeyError: it was read before it was written

    body = re.fullmatch(r"\s*\{(.*)\}\s*", ptx, re.DOTALL)
    assert body, f"no block: {ptx}"
    *statements, rest = body[1].split(";")
    assert not rest.strip(), f"no semicolon behind {rest}"
    for statement in statements:
        name, operands = re.split(r"\s+(?=[^.])", statement.strip(), maxsplit=1)
        to, *sources = [one.strip() for one in operands.split(",")]
        if name == ".reg .b32":
            writable |= {to, *sources}
        else:
            assert to in writable, f"{statement}: {to} is not declared, or an input"
            known[to] = INSTRUCTIONS[name](*map(value, sources))
    return [known[f"${i}"] for i in range(n_outputs)]


def prmt(a: Words, b: Words, selectors: Words) -> Words:
    """Four of the eight bytes of a, which come first, and b. 3 bits choose each; a fourth asks for its sign alone."""
    out = np.zeros_like(a)
    for i in range(4):
        selector = selectors >> np.uint32(4 * i)
        at = selector & np.uint32(7)
        byte = np.where(at < 4, a >> (8 * (at & np.uint32(3))), b >> (8 * (at & np.uint32(3)))) & np.uint32(0xFF)
        sign = np.where(byte >= 0x80, np.uint32(0xFF), np.uint32(0))
        out |= np.where(selector & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return out


def dp4a(a: Words, b: Words, c: Words) -> Words:
    """C plus the products of the four signed bytes of a and b; what does not fit is lost."""
    products = as_bytes(a).astype(np.int64) * as_bytes(b).astype(np.int64)
    return ((c.astype(np.int64) + products.sum(-1)) & 0xFFFFFFFF).astype(np.uint32)


def as_bytes(words: Words) -> NDArray[np.int8]:
    """[..., 4], lowest first."""
    return np.ascontiguousarray(words)[..., None].view(np.int8)


INSTRUCTIONS = {
    "prmt.b32": prmt,
    "dp4a.s32.s32": dp4a,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "add.u32": lambda a, b: a + b,
    "shr.u32": lambda a, b: np.where(b < 32, a >> (b & np.uint32(31)), np.uint32(0)),
}


# ---------------------------------------- the compiler

TOOLS = ("ptxas", "cuobjdump")
LAUNCHES = (  # compute capability, bits of a weight, tokens, and what is launched
    (90, 4, 1, "layer"),
    (90, 16, 1, "experts"),
    (90, 16, 256, "experts"),
    (89, 16, 256, "experts"),
    (89, 8, 32, "experts"),
    (89, 4, 8, "linear"),
    (80, 8, 1, "linear"),
    (80, 4, 32, "experts"),
)
DIM, HIDDEN, EXPERTS, TOP_K, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 8, 2, 32, 8, 128


def tools() -> list[Path]:
    """What Triton brings along to compile and to take apart."""
    import triton

    return [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name for name in TOOLS]


def compile_launches() -> None:
    """Compile instead of launching; print what came out."""
    import triton
    from triton.backends.compiler import GPUTarget

    from octavo.kernels import card

    class NoCard:
        """Says which card to compile for; each is a device of its own, for Triton keeps what it compiled by device."""

        capability = 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.capability, 32)

        def get_current_device(self) -> int:
            return self.capability

        def get_current_stream(self, device: int) -> int:
            return 0

    here, case, told = NoCard(), (0, 0, 0, ""), set[int]()

    def instead(kernel: Any, grid: Any) -> Any:
        def compile(*args: Any, **options: Any) -> None:
            made = kernel.warmup(*args, grid=grid, **options)
            if id(made) not in told:  # launched twice
                told.add(id(made))
                sys.stdout.write(json.dumps({"case": case, "kernel": kernel.__name__, **facts(made)}) + "\n")

        return compile

    triton.runtime.driver.set_active(here)
    triton.JITFunction.__getitem__ = instead
    card.usable = lambda device: True  # "meta": tensors without numbers
    for case in LAUNCHES:
        here.capability = case[0]
        launch(*case[1:])


def launch(bits: int, tokens: int, what: str) -> None:
    """What a layer of Mixtral launches, or some of it; all that numbers take part in is left out."""
    from octavo.kernels import card
    from octavo.quant.formats import FORMATS

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def matrix(rows: int, cols: int) -> card.CardMatrix:
        kind = card.Kind(FORMATS[f"q{bits}"] if bits < 16 else None, rows, cols)
        data = empty(rows, cols) if bits == 16 else empty(kind.nbytes, dtype=torch.uint8)
        return card.CardMatrix(kind, data)

    x, norm, wo = empty(tokens, DIM), empty(DIM), matrix(DIM, DIM)
    if what == "linear":
        card.linear(x, wo)
        return
    up, down = matrix(HIDDEN, DIM).kind, matrix(DIM, HIDDEN).kind
    ids, weights = empty(tokens, TOP_K, dtype=torch.int64), empty(tokens, TOP_K, dtype=torch.float32)
    a = x
    if what == "layer":
        a = card.normalize(x, norm, 1e-5, wo.kind)
        qkv = card.linear_of(a, matrix((HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM))
        k, v = empty(2, 1, KV_HEADS, 256, HEAD_DIM)
        rotation = empty(1, tokens, 1, HEAD_DIM // 2, dtype=torch.complex64)
        card.rotate_and_store(qkv, rotation, HEADS, k, v, empty(1, tokens, dtype=torch.int64))
        x, a, (ids, weights, _) = card.add_normalize_route(
            x, card.linear(x, wo), norm, 1e-5, empty(EXPERTS, DIM), TOP_K, up, up
        )
    parts = empty(tokens, TOP_K, DIM, dtype=torch.float32)
    table = card.ExpertTable((up, up, down), empty(EXPERTS, 3, dtype=torch.int64))
    card.moe_into(parts, a, ids, weights, table)
    if what == "layer":
        card.combine(parts, x, onto=True)


def facts(kernel: Any) -> dict[str, Any]:
    """Of a compiled kernel: bytes of shared memory and of a thread's stack; arithmetic and loads that PTX asks for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tools()[1], "-res-usage", file.name], capture_output=True, text=True, check=True)
    (stack,) = re.findall(r"STACK:(\d+)", done.stdout)
    arithmetic = re.findall(r"\b((?:add|sub|mul|fma|mad|div|rcp|sqrt|ex2)\.\S*f32\S*)\s", kernel.asm["ptx"])
    loads = collections.Counter(re.findall(r"\b(ld\.global\S*)\s", kernel.asm["ptx"]))
    return {
        "shared": kernel.metadata.shared,
        "stack": int(stack),
        "arithmetic": sorted(set(arithmetic)),
        "loads": loads,
    }


if __name__ == "__main__":
    compile_launches()
