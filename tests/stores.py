"""Stores to test with, and what to hold them to."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.checkpoint import Checkpoint, open_checkpoint
from octavo.convert import plan_conversion, plan_quantization
from octavo.quant.formats import Packed
from tiny_folder import make_tiny_folder

INDEX = "model.safetensors.index.json"
FORMATS_OF = {"8": ("q8", "q8"), "4": ("q4", "q4"), "3": ("q3", "q4"), "2": ("q2", "q4")}
"""Of each preset: the experts', that of attention and output."""
KEPT = re.compile(r".*norm\.weight|.*\.gate\.weight|tok_embeddings\.weight")
SIZES = {  # rows and columns that are no whole panels and blocks, too
    "even": {"dim": 64, "head_dim": 16, "hidden_dim": 128},
    "odd": {"dim": 40, "head_dim": 10, "hidden_dim": 70},
}


def make_source(folder: Path, **changes: object) -> Path:
    plain = make_tiny_folder(folder / "float32", **(SIZES["even"] | changes))
    plan_conversion(plain, folder / "model", to="hf", dtype="bfloat16").run()
    return folder / "model"


def quantise(source: Path, target: Path, bits: int | str = 4, **options: Any) -> Checkpoint:
    plan_quantization(source, target, bits=bits, **options).run()
    return open_checkpoint(target)


def expected_format(name: str, bits: str) -> str | None:
    return None if KEPT.fullmatch(name) else FORMATS_OF[bits]["experts" not in name and "feed_forward" not in name]


def header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header, and where its data begin."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), 8 + length


def write_header(path: Path, value: dict[str, Any]) -> None:
    """Put another header in the place of a file's own."""
    data, begin = path.read_bytes(), header(path)[1]
    text = json.dumps(value).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[begin:])


def same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)


def same_packed(ours: Packed | None, theirs: Packed) -> bool:
    assert ours is not None
    return (ours.format, ours.shape) == (theirs.format, theirs.shape) and torch.equal(ours.data, theirs.data)


def mapped_file(address: int) -> str:
    """The file whose mapping holds an address, or nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split(maxsplit=5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end:
            return rest[4] if len(rest) == 5 else ""
    return ""
