"""What the compiler makes of the card's kernels, which it tells without a card: instructions of the loop over columns.

    env -u TRITON_INTERPRET python benchmarks/gpu/compiled.py [--arch 90] [--sass DIR]

Triton compiles for a GPU that is not there, and its package has a disassembler. At Mixtral 8x7B's sizes, for the
tilings that `octavo.kernels.card.tiling` chooses: instructions that a thread issues for a weight, in the loops that
take nearly all of the time, beside as many as a multiprocessor can issue while it gets that weight at full bandwidth.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET"):
    sys.exit("TRITON_INTERPRET is set: kernels are not compiled then; env -u TRITON_INTERPRET")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from octavo.kernels import triton as products
from octavo.kernels.card import Tiling, tiling

DIM, HIDDEN = 4096, 14336
# An H200: bytes a second, multiprocessors, clock; four schedulers issue one instruction for 32 threads each a cycle.
BANDWIDTH, PROCESSORS, CLOCK, LANES = 4.3e12, 132, 1.98e9, 128
POINTERS = {
    "x": "i8", "scales": "fp32", "order": "i32", "blocks": "i32", "table": "i64", "hidden": "i8",
    "hidden_scales": "fp32", "weights": "fp32", "parts": "fp32", "book": "i32", "weight": "u8", "y": "bf16",
}  # fmt: skip


def compiled(kernel: Any, constants: dict[str, Any], how: Tiling, arch: int) -> Any:
    """A kernel for an architecture, such as 90."""
    types = dict(POINTERS)
    if 16 in (constants.get("BITS"), constants.get("BITS_1")):
        types |= {"x": "bf16", "scales": "bf16", "hidden": "bf16", "hidden_scales": "bf16"}
    constants = {**constants, "TILE": how.tile, "M": how.M, "R": how.R, "G": 8, "N": how.N, "ASM": True}
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else f"*{types[name]}" if name in types else "i32" for name in names
    }
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name].startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": how.num_warps, "num_stages": how.num_stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def disassembled(kernel: Any) -> list[str]:
    """Its machine code, a line an instruction or a label."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout.splitlines()


def loops(lines: list[str]) -> list[Counter[str]]:
    """Instructions by name, of each loop: from a label to a jump back to it."""
    labels, found = {}, []
    for at, line in enumerate(lines):
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = at
        jump = re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)
        if jump and jump[1] in labels:
            body = (re.search(r"\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_]*)", one) for one in lines[labels[jump[1]] : at])
            found.append(Counter(one[1] for one in body if one))
    return [loop for loop in found if sum(loop.values()) > 8]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability, such as 80, 89 or 90")
    parser.add_argument("--sass", type=Path, help="write the machine code into this folder")
    args = parser.parse_args()
    print(f"triton {triton.__version__}, sm_{args.arch}; instructions a weight: issued, and issued at full bandwidth")
    for bits in (16, 8, 4):
        up, down = tiling(1, [bits, bits], rows_together=16 if bits == 16 else 64)
        of_block = {"K": 2, "N_COLS": DIM, "BITS_1": bits, "BITS_3": bits, "BITS_2": bits}
        report("gate_and_up", products.gate_and_up_kernel, of_block, up, bits, args)
        report("down", products.down_kernel, {"N_COLS": HIDDEN, "BITS": bits}, down, bits, args)


def report(name: str, kernel: Any, constants: dict[str, Any], how: Tiling, bits: int, args: argparse.Namespace) -> None:
    lines = disassembled(compiled(kernel, constants, how, args.arch))
    found = loops(lines)
    weights = how.R * (how.N or 8 * 64)  # of an iteration
    issued = sum(found[0].values()) * 32 * how.num_warps / weights
    room = LANES * CLOCK * PROCESSORS * (2 if bits == 16 else (bits + 0.25) / 8) / BANDWIDTH
    spills = sum("STL" in line or "LDL" in line for line in lines)
    common = ", ".join(f"{count} {what}" for what, count in found[0].most_common(6))
    print(f"{bits:2} bits {name:12} {issued:5.2f} of {room:5.2f}; {spills} spills; a loop has {common}")
    if args.sass:
        args.sass.mkdir(parents=True, exist_ok=True)
        (args.sass / f"{name}-{bits}.sass").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
