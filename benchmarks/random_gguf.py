"""GGUF files of a model's shape with random weights, made about as fast as the disk writes: for cpu_peers.py.

Codes and the small scales within a block are random bytes; a block's own float16 factors are set, so that weights have
the spread that is wanted, and no activation grows out of bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from octavo.args import ModelArgs


def weight_scale(name: str, shape: Sequence[int]) -> float:
    """The standard deviation of random weights, as `octavo.bench.synthetic` has it: activations keep their size."""
    return 1.0 if "embd" in name or "embed" in name else shape[-1] ** -0.5


@dataclass(frozen=True)
class Blocks:
    """Random blocks of one of GGUF's encodings.

    Attributes:
        encoding: its name.
        at: where a block's float16 factors begin: of the scales, then, where there is one, of the minima.
    """

    encoding: str
    at: tuple[int, ...]

    def fill(self, rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray[Any, Any]:
        """A tensor's bytes: random codes and scales, and factors for a mean of 0 and a standard deviation of ``scale``.

        Factors are of either sign: were all rows to lean to one side, every token would soon choose the same experts.
        """
        factors = np.array(self.factors()) * scale
        return self._random(rng, int(np.prod(shape)) // self.sizes[0], factors).reshape(*shape[:-1], -1)

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements and bytes of a block."""
        import gguf

        elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.encoding]]
        return elements, nbytes

    def factors(self) -> list[float]:
        """What gives weights a mean of 0 and a variance of 1: a weight is the scale's part less the minimum's."""
        parts = []
        for which in range(len(self.at)):
            only = np.eye(len(self.at))[which]
            parts.append(self._dequantized(self._random(np.random.default_rng(0), 4096, only)))
        whole, factors = parts[0], [1.0]
        if len(parts) > 1:
            factors.append(float(np.abs(parts[0]).mean() / np.abs(parts[1]).mean()))
            whole = parts[0] + factors[1] * parts[1]
        return [factor / float(whole.std()) for factor in factors]

    def _random(self, rng: np.random.Generator, count: int, factors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        nbytes = self.sizes[1]
        words = rng.integers(0, 2**64, -(-count * nbytes // 8), dtype=np.uint64)
        blocks = words.view(np.uint8)[: count * nbytes].reshape(count, nbytes)
        signs = np.where(blocks[:, :1] & 1, np.float16(1), np.float16(-1))
        for at, factor in zip(self.at, factors, strict=True):
            blocks[:, at : at + 2] = (signs * np.float16(factor)).view(np.uint8)
        return blocks

    def _dequantized(self, blocks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        import gguf

        return np.asarray(gguf.dequantize(blocks, gguf.GGMLQuantizationType[self.encoding]), dtype=np.float64)


BLOCKS = {
    blocks.encoding.lower(): blocks
    for blocks in (
        Blocks("Q4_0", (0,)),
        Blocks("Q8_0", (0,)),
        Blocks("Q2_K", (80, 82)),
        Blocks("Q3_K", (108,)),
        Blocks("Q4_K", (0, 2)),
        Blocks("Q5_K", (0, 2)),
        Blocks("Q6_K", (208,)),
        Blocks("IQ4_XS", (0,)),
    )
}
"""By the name behind llama-."""


def gguf_nbytes(args: ModelArgs, encoding: str) -> int:
    """About the size of a file."""
    elements, nbytes = BLOCKS[encoding].sizes
    return args.n_params // elements * nbytes


def write_gguf(file: Path, args: ModelArgs, encoding: str, name: str) -> None:
    """Write a model with random weights and without a tokenizer; norms and routers are in F32, as they always are."""
    import gguf

    from octavo.checkpoint.names import GGUF, stored_tensors
    from octavo.storage.gguf_args import ARCHITECTURE, gguf_metadata

    blocks = BLOCKS[encoding]
    rng = np.random.Generator(np.random.SFC64(0))
    writer = gguf.GGUFWriter(file, ARCHITECTURE)
    for key, value in gguf_metadata(args, name, "Q4_0").items():
        if key not in ("general.architecture", "general.file_type"):  # the writer's own; and of no use
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            add(key, value)
    writer.add_string("tokenizer.ggml.model", "none")
    tensors = list(stored_tensors(GGUF, args))
    plain = {t.name for t in tensors if len(t.shape) == 1 or t.name.endswith("ffn_gate_inp.weight")}
    kinds = gguf.GGMLQuantizationType
    for t in tensors:
        kind = kinds.F32 if t.name in plain else kinds[blocks.encoding]
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        size = int(np.prod(t.shape)) // elements * nbytes
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tensors:
        if t.name in plain:
            router = rng.standard_normal(t.shape, dtype=np.float32) * weight_scale(t.name, t.shape)
            writer.write_tensor_data(router if len(t.shape) > 1 else np.ones(t.shape, dtype=np.float32))
        else:
            writer.write_tensor_data(blocks.fill(rng, t.shape, weight_scale(t.name, t.shape)))
    writer.close()
