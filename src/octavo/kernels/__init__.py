"""Products with low-bit and bfloat16 weights on the CPU: compiled kernels, or the same arithmetic in torch.

The kernels multiply int8 activations (a scale for every 64 columns of a token) with codes of the formats of
`octavo.quant`, exactly in int32, and add the groups up in float32 in a fixed order: results do not depend on the number
of threads, nor on how many tokens are multiplied at a time. `docs/formats.md` specifies both.
"""

from octavo.kernels.backend import Backend, available, backend, set_threads, threads, torch_on_one_thread, use
from octavo.kernels.ops import ExpertSet, dot_peak, linear, moe, read_bandwidth

__all__ = [
    "Backend",
    "ExpertSet",
    "available",
    "backend",
    "dot_peak",
    "linear",
    "moe",
    "read_bandwidth",
    "set_threads",
    "threads",
    "torch_on_one_thread",
    "use",
]
