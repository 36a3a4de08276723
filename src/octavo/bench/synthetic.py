"""Models of a given shape with random weights: as large and as slow as real ones, and made in seconds.

Every tensor's random numbers are its own, so that a store is the same however often its making was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octavo.args import ModelArgs
from octavo.checkpoint import Checkpoint, open_checkpoint
from octavo.checkpoint.names import canonical_shapes
from octavo.checkpoint.output import SHARD_BYTES, as_bytes, index_of
from octavo.checkpoint.store import store_files
from octavo.convert import Conversion
from octavo.errors import CheckpointError, UserError
from octavo.kernels.ops import Weight
from octavo.load import assemble, assemble_on_card
from octavo.model import Mixtral
from octavo.plan_card import CardPlacement
from octavo.quant.formats import FORMATS, Format, Packed
from octavo.quant.presets import preset
from octavo.storage.folder import LocalFolder
from octavo.storage.packed_octavo import KEY, VERSION
from octavo.storage.safetensors import INDEX
from octavo.storage.source import ListedSource, Rows

METHOD = "synthetic"


def synthetic_model(args: ModelArgs, bits: int, seed: int = 0) -> Mixtral:
    """Make a bfloat16 model with random weights, which are low-bit (``bits`` 8, 4, 3 or 2) or bfloat16 (16).

    Every matrix has a variance of about 1 / cols, so that activations keep their size from layer to layer; routers are
    random too, and spread tokens over all experts.
    """
    shapes = canonical_shapes(args)
    formats = {} if bits == 16 else preset(bits, shapes)

    def plain(name: str) -> Tensor:
        return _plain(_random(name, seed), name, shapes[name])

    def weight(name: str) -> Weight:
        chosen = formats.get(name)
        return plain(name) if chosen is None else _packed(_random(name, seed), FORMATS[chosen], shapes[name])

    return assemble(args, plain, weight)


def card_model(
    args: ModelArgs, bits: int, device: torch.device, seed: int = 0, placement: CardPlacement | None = None
) -> Mixtral:
    """Make a model on a card with random weights, by the card's own generator: 93 GB in seconds.

    They are spread as those of `synthetic_model`, and not the same. Of experts that do not all stay on the card one
    at a time is made there and copied to the host.

    Args:
        args: the model's shape.
        bits: 16, 8 or 4.
        device: the card, or a CPU in its place.
        seed: of all.
        placement: of the experts; None for all on the card.

    Raises:
        OptionError: the card does not compute with so few bits.
    """
    shapes = canonical_shapes(args)
    formats = {} if bits == 16 else preset(bits, shapes)

    def generator(name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest))

    def plain(name: str) -> Tensor:
        shape = shapes[name]
        made = torch.empty(shape, dtype=torch.bfloat16, device=device)
        if len(shape) == 1:
            return made.fill_(1)
        most = 3**0.5 * _scale(name, shape)
        return made.uniform_(-most, most, generator=generator(name))

    def weight(name: str) -> Weight:
        if name not in formats:
            return plain(name)
        chosen, shape = FORMATS[formats[name]], shapes[name]
        data = torch.empty(chosen.nbytes(*shape), dtype=torch.uint8, device=device)
        return random_packed(data.random_(generator=generator(name)), chosen, shape)

    return assemble_on_card(args, plain, weight, device, placement)


def plan_synthetic(args: ModelArgs, bits: int, folder: Path) -> Conversion | None:
    """Plan to write the store of `synthetic_model`; nothing is written yet.

    What is planned goes on where it was interrupted, and is refused where the disk has too little room; see
    `octavo.convert.Conversion.run`.

    Args:
        args: the model's shape.
        bits: 8, 4, 3 or 2.
        folder: where to; it does not exist yet, is empty, or holds this very store.

    Returns:
        None if the folder holds it already.

    Raises:
        CheckpointError: the folder holds something else.
    """
    folder, shapes = Path(os.path.expanduser(folder)), canonical_shapes(args)
    formats = {name: FORMATS[chosen] for name, chosen in preset(bits, shapes).items()}

    def encode(name: str, _: Tensor) -> list[Tensor]:
        random = _random(name, seed=0)
        return [_packed(random, formats[name], shapes[name]).data if name in formats else _kept(random, name)]

    def _kept(random: np.random.Generator, name: str) -> Tensor:
        return as_bytes(_plain(random, name, shapes[name]))

    files = [
        replace(file, pieces=tuple(replace(piece, encode=partial(encode, piece.canonical)) for piece in file.pieces))
        for file in store_files(args, formats, lambda name: torch.bfloat16, METHOD, SHARD_BYTES)
    ]
    settings = {"quant_method": KEY, "version": VERSION, "bits": bits, "method": METHOD}
    companions = {"config.json": _json(args.to_hf() | {"dtype": "bfloat16", "quantization_config": settings})}
    if len(files) > 1:
        companions[INDEX] = _json(dict(index_of(files)))
    conversion = Conversion(_NoSource(), folder, tuple(files), companions)
    if _is_free(folder):
        return conversion
    _check_same(folder, args, bits)
    return None


def synthetic_store(args: ModelArgs, bits: int, folder: Path, progress: Callable[[int], None] | None = None) -> None:
    """Write a store as `synthetic_model` would have it, unless it is there: as large and as slow to load as a real one.

    Args:
        args: the model's shape.
        bits: 8, 4, 3 or 2.
        folder: where to.
        progress: called with a number of bytes that are written, from time to time.

    Raises:
        CheckpointError: the folder holds something else, or cannot be written, or the disk has too little room.
    """
    conversion = plan_synthetic(args, bits, folder)
    if conversion is not None:
        conversion.run(progress)


class _Nothing(ListedSource):
    """Holds no tensor."""

    location = "random weights"
    infos = {}  # noqa: RUF012

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        raise self.unknown(name)


class _NoSource(Checkpoint):
    """In the place of what is converted: each piece makes its own bytes of nothing."""

    def __init__(self) -> None:
        super().__init__(LocalFolder(Path()), _Nothing(), {}, {})
        self.location = _Nothing.location

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        return torch.empty(0)


def _is_free(folder: Path) -> bool:
    """Whether there is nothing yet; an empty folder is as good as none."""
    try:
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written to ({error.strerror})", hint="choose another folder for --store"
        ) from None
    return not os.path.lexists(folder)


def _check_same(folder: Path, args: ModelArgs, bits: int) -> None:
    """Compare what a folder says it is; its tensors are compared with their checksums when they are loaded."""
    wanted = f"random weights of this shape, {args.n_layers} layers, {bits} bits"
    try:
        checkpoint = open_checkpoint(folder)
        settings = checkpoint.config.get("quantization_config", {})
        found = (checkpoint.is_store, settings.get("method"), settings.get("bits"), checkpoint.args)
    except UserError as error:
        raise CheckpointError(
            f"{folder}: is no store of {wanted} ({error.message})", hint="choose another folder for --store"
        ) from None
    if found != (True, METHOD, bits, args):
        what = f"{checkpoint.args.n_layers} layers, {settings.get('bits')} bits" if found[1] == METHOD else "a model"
        raise CheckpointError(
            f"{folder}: holds something else ({what}) than {wanted}", hint="choose another folder for --store"
        )


def _json(value: dict[str, object]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _random(name: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, *name.encode()])))


def _plain(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return _uniform(random, shape, _scale(name, shape))


def _scale(name: str, shape: tuple[int, ...]) -> float:
    """The standard deviation of a matrix."""
    return 1.0 if name == "tok_embeddings.weight" else shape[-1] ** -0.5


def _uniform(random: np.random.Generator, shape: tuple[int, ...], scale: float) -> Tensor:
    out = torch.empty(shape, dtype=torch.bfloat16)
    for part in torch.split(out.view(-1), 1 << 20):
        numbers = torch.from_numpy(_raw(random, 2 * len(part)).view(np.int16))
        part.copy_(numbers.float().mul_(12**0.5 * scale / (1 << 16)))
    return out


def _raw(random: np.random.Generator, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Random bytes, four times as quickly as `integers` makes them."""
    found: np.ndarray[Any, np.dtype[np.uint8]] = random.bit_generator.random_raw(-(-nbytes // 8)).view(np.uint8)
    return found[:nbytes]


def _packed(random: np.random.Generator, chosen: Format, shape: tuple[int, ...]) -> Packed:
    """Random codes, and scales of either sign where the format has them."""
    return random_packed(torch.from_numpy(_raw(random, chosen.nbytes(*shape))), chosen, shape)


def random_packed(data: Tensor, chosen: Format, shape: tuple[int, ...]) -> Packed:
    """Make a matrix with a variance of about 1 / cols of random bytes, in place: codes as they are, one magnitude of
    scales, of either sign where the format has them.
    """
    rows, cols = shape
    blocks = data.view(-1, chosen.block_nbytes)
    codes = np.concatenate(chosen.books) if chosen.books else np.arange(-128, 128)
    scale = (cols * float(np.mean(np.square(codes, dtype=np.float64)))) ** -0.5
    bits = int(torch.tensor(scale, dtype=torch.bfloat16).view(torch.int16))
    scales = blocks[:, :64].clone().view(torch.int16)  # random signs and selectors, one magnitude
    signs = 0x8000 - 0x10000 if chosen.books else 0
    selectors = 0x000F if chosen.bits in (2, 3) else 0
    blocks[:, :64] = (scales & (signs | selectors) | (bits & ~selectors)).view(torch.uint8)
    return Packed(data, chosen, (rows, cols))
