"""What configuration and headers tell of a model, without loading it; mostly without torch."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import octavo
from octavo.args import ModelArgs
from octavo.errors import OptionError, UserError
from octavo.plan import Weights, weights_of_store
from octavo.shapes import SHAPES

PUBLISHED = {
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-Instruct-v0.1",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.1",
}
"""Where weights of the shapes are on the Hub, in bfloat16."""
FLOATS = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}
MAX_HEADER_BYTES = 100_000_000  # as `octavo.storage.safetensors` has it


@dataclasses.dataclass(frozen=True)
class Model:
    """What configuration and headers tell of a model.

    Attributes:
        title: as it was asked for.
        source: what `octavo chat --model` takes.
        args: its shape.
        dtype: of its weights.
        store: the weights as they lie there, if it is a store.
        folder: on this machine.
        formats: of a store's matrices, by name.
    """

    title: str
    source: str
    args: ModelArgs
    dtype: str
    store: Weights | None = None
    folder: Path | None = None
    formats: frozenset[str] = frozenset()


def read_model(name: str) -> Model:
    """Read what configuration and headers tell of a model, and nothing else.

    Args:
        name: a folder, a weights file, menny, a shape, or a Hub id. A folder that exists goes before a shape of its
            name, as before a Hub id; menny always ships.

    Raises:
        OptionError: it is none of these.
        UserError: what is there is damaged, or the Hub cannot be reached.
    """
    shipped = Path(octavo.__file__).parent / "models" / name
    if name == "menny" and shipped.is_dir():
        found = _read_folder(name, shipped) or _open(name, str(shipped))
        return dataclasses.replace(found, dtype="float32")  # which `LLM.load` computes with, unless told otherwise
    path = Path(os.path.expanduser(name))
    if path.exists():
        return _read_folder(name, path) or _open(name, name)
    if name in SHAPES:
        return Model(name, PUBLISHED.get(name, name), SHAPES[name], "bfloat16")
    if "/" not in name:
        raise OptionError(
            f"{name!r} is neither a folder or file here, nor a Hub id, nor a known shape",
            hint=f"shapes are {', '.join(SHAPES)}",
        )
    return _open(name, name)


def _read_folder(name: str, folder: Path) -> Model | None:
    """Read a healthy Hugging Face folder or store without torch; None for all others, of which `_open` knows more."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        if "hidden_size" not in config or (folder / "params.json").exists():
            return None
        args = ModelArgs.from_hf(config)
        tensors = dict(_tensors(folder))
        kinds = {tensor.in_store for tensor in tensors.values()}
        in_store = (config.get("quantization_config") or {}).get("quant_method") == "octavo"
        if kinds != {in_store} or sum(tensor.elements for tensor in tensors.values()) != args.n_params:
            return None
        embedding = tensors.get("tok_embeddings.weight") or tensors["model.embed_tokens.weight"]
        dtype, number = FLOATS[embedding.dtype]
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        store = weights_of_store(args, sizes, number) if in_store else None
        formats = frozenset(tensor.format for tensor in tensors.values() if tensor.format is not None)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, UserError):
        return None
    return Model(name, name, args, dtype, store, folder, formats)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    dtype: str
    elements: int
    nbytes: int
    in_store: bool
    format: str | None


def _tensors(folder: Path) -> Iterator[tuple[str, _Tensor]]:
    """What the headers of safetensors files say; any of many exceptions where a file is not as it should be."""
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    for name in sorted(files):
        with (folder / os.path.basename(name)).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError
            header = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size - 8 - length
        notes = json.loads(header.pop("__metadata__", {}).get("octavo", "null"))
        if max(entry["data_offsets"][1] for entry in header.values()) != size or (notes and notes["version"] != 1):
            raise ValueError
        for tensor, entry in header.items():
            begin, end = entry["data_offsets"]
            note = notes["tensors"][tensor] if notes else {}
            elements = math.prod(note.get("shape", entry["shape"]))
            yield tensor, _Tensor(entry["dtype"], elements, end - begin, notes is not None, note.get("format"))


def _open(name: str, source: str) -> Model:
    """Any layout, here or on the Hub; this imports torch, which takes a second."""
    from octavo.budget import formats_of, store_weights
    from octavo.checkpoint import open_checkpoint
    from octavo.storage.folder import LocalFolder

    checkpoint = open_checkpoint(source)
    args, folder = checkpoint.args, None
    if isinstance(checkpoint.folder, LocalFolder):
        checkpoint.check()
        folder = checkpoint.folder.path
    dtype = checkpoint.info("tok_embeddings.weight").dtype
    store = store_weights(checkpoint) if checkpoint.is_store else None
    return Model(name, name, args, str(dtype).removeprefix("torch."), store, folder, formats_of(checkpoint))
