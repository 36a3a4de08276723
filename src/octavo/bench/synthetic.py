"""Models of a given shape with random weights: as large and as slow as real ones, and made in seconds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from octavo.args import ModelArgs
from octavo.checkpoint.names import canonical_shapes
from octavo.checkpoint.output import SHARD_BYTES, as_bytes, index_of
from octavo.checkpoint.store import store_files
from octavo.checkpoint.writer import new_folder, write_file, write_json
from octavo.kernels.ops import Weight
from octavo.load import assemble
from octavo.model import Mixtral
from octavo.quant.formats import FORMATS, Format, Packed
from octavo.quant.presets import preset
from octavo.storage.packed_octavo import KEY, VERSION
from octavo.storage.safetensors import INDEX


def synthetic_model(args: ModelArgs, bits: int, seed: int = 0) -> Mixtral:
    """Make a bfloat16 model with random weights, which are low-bit (``bits`` 8, 4, 3 or 2) or bfloat16 (16).

    Every matrix has a variance of about 1 / cols, so that activations keep their size from layer to layer; routers are
    random too, and spread tokens over all experts.
    """
    random = np.random.Generator(np.random.SFC64(seed))
    shapes = canonical_shapes(args)
    formats = {} if bits == 16 else preset(bits, shapes)

    def plain(name: str) -> Tensor:
        return _plain(random, name, shapes[name])

    def weight(name: str) -> Weight:
        chosen = formats.get(name)
        return plain(name) if chosen is None else _packed(random, FORMATS[chosen], shapes[name])

    return assemble(args, plain, weight)


def synthetic_store(args: ModelArgs, bits: int, folder: Path, seed: int = 0) -> None:
    """Write a store as `synthetic_model` would have it: as large and as slow to load as a real one.

    Args:
        args: the model's shape.
        bits: 8, 4, 3 or 2.
        folder: is replaced as a whole.
        seed: of the random weights.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    random, shapes = np.random.Generator(np.random.SFC64(seed)), canonical_shapes(args)
    formats = {name: FORMATS[chosen] for name, chosen in preset(bits, shapes).items()}

    def encode(name: str, _: Tensor) -> list[Tensor]:
        if name in formats:
            return [_packed(random, formats[name], shapes[name]).data]
        return [as_bytes(_plain(random, name, shapes[name]))]

    with new_folder(folder) as new:
        files = store_files(args, formats, lambda name: torch.bfloat16, "synthetic", SHARD_BYTES)
        for file in files:
            pieces = tuple(replace(piece, encode=partial(encode, piece.canonical)) for piece in file.pieces)
            write_file(new / file.name, replace(file, pieces=pieces), lambda name: torch.empty(0))
        settings = {"quant_method": KEY, "version": VERSION, "bits": bits, "method": "synthetic"}
        write_json(new / "config.json", args.to_hf() | {"dtype": "bfloat16", "quantization_config": settings})
        if len(files) > 1:
            write_json(new / INDEX, index_of(files))


def _plain(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return _uniform(random, shape, 1.0 if name == "tok_embeddings.weight" else shape[-1] ** -0.5)


def _uniform(random: np.random.Generator, shape: tuple[int, ...], scale: float) -> Tensor:
    out = torch.empty(shape, dtype=torch.bfloat16)
    for row in torch.split(out.view(-1, shape[-1]), max(1, (1 << 20) // shape[-1])):
        row.copy_(torch.from_numpy(random.random(tuple(row.shape), dtype=np.float32)).sub_(0.5).mul_(12**0.5 * scale))
    return out


def _packed(random: np.random.Generator, chosen: Format, shape: tuple[int, ...]) -> Packed:
    """Random codes, and scales of either sign where the format has them."""
    rows, cols = shape
    words = -(-chosen.nbytes(rows, cols) // 8)
    data = torch.from_numpy(random.integers(0, 2**64, words, dtype=np.uint64).view(np.uint8))
    data = data[: chosen.nbytes(rows, cols)]
    blocks = data.view(-1, chosen.block_nbytes)
    codes = np.concatenate(chosen.books) if chosen.books else np.arange(-128, 128)
    scale = (cols * float(np.mean(np.square(codes, dtype=np.float64)))) ** -0.5
    bits = int(torch.tensor(scale, dtype=torch.bfloat16).view(torch.int16))
    scales = blocks[:, :64].clone().view(torch.int16)  # random signs and selectors, one magnitude
    signs = 0x8000 - 0x10000 if chosen.books else 0
    selectors = 0x000F if chosen.bits in (2, 3) else 0
    blocks[:, :64] = (scales & (signs | selectors) | (bits & ~selectors)).view(torch.uint8)
    return Packed(data, chosen, (rows, cols))
