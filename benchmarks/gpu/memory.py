"""What a process takes of the card's memory before a tensor of a model's lies there: the base that a plan counts with.

    python benchmarks/gpu/memory.py

The driver's context, then what the first product of cuBLAS reserves, then a kernel of ours, then the first graph. What
models take beside their plans, model.py and offload.py tell with every run. Figures are of the whole card, as
nvidia-smi has them: nothing else should run there.
"""

from __future__ import annotations

import subprocess

import torch
from common import Setting, options, replayed, setting

from octavo.kernels.card import linear, to_card


def used() -> int:
    """Bytes of the first card that are taken, by whomever; asked from outside, where this process may have none."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.check_output(command, text=True)) << 20


def measure(where: Setting) -> dict[str, int]:
    """Bytes of the card, step after step; reserved: what torch keeps for tensors, to be taken off."""
    found = {"before": used()}
    torch.empty(1, device=where.device)
    found["context"] = used()
    a = torch.randn(512, 512, device=where.device, dtype=torch.bfloat16)
    (a @ a).sum().item()
    found["cublas"] = used()
    matrix = to_card(a, where.device)
    linear(a, matrix)
    linear(a[:1], matrix)
    torch.cuda.synchronize()
    found["kernels"] = used()
    replayed(lambda: linear(a[:1], matrix), where)()
    torch.cuda.synchronize()
    found["graph"] = used()
    found["reserved"] = torch.cuda.memory_reserved()
    free, total = torch.cuda.mem_get_info()
    return found | {"total": total, "mem_get_info_used": total - free}


def main() -> None:
    """Measure where there is a card."""
    where = setting(options(__doc__).parse_args())
    if where.device.type != "cuda":
        where.skip("memory-base", "a CPU has no context of a card")
        return
    where.tell("memory-base", measure(where))


if __name__ == "__main__":
    main()
