"""The layouts that are written: for each, the names, the encoding of every tensor, and the small files beside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from octavo.checkpoint.checkpoint import GGUF_ENDS, Checkpoint
from octavo.checkpoint.config import CONFIG, GENERATION, PARAMS
from octavo.checkpoint.names import GGUF, GGUF_DENSE, HF, HF_DENSE, MISTRAL, MISTRAL_DENSE, MLX, Stored
from octavo.checkpoint.output import (
    Choice,
    Encoding,
    GGUFEncoded,
    MLXQuantized,
    OutFile,
    Plain,
    gguf_file,
    index_of,
    safetensors_files,
)
from octavo.checkpoint.store import store_files
from octavo.errors import OptionError, TokenizerError
from octavo.quant.formats import Format
from octavo.storage.packed_octavo import KEY, VERSION
from octavo.storage.safetensors import INDEX
from octavo.tokenizer import Tokenizer

TOKENIZER_JSON = "tokenizer.json"
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GGUF_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
MLX_BITS = {"q8": 8, "q4": 4}
MLX_GROUP_SIZE = 64
SMALL = 1_000_000  # elements: a norm or a router
TARGETS = {
    "hf": tuple(FLOATS),
    "mistral": tuple(FLOATS),
    "mlx": (*FLOATS, *MLX_BITS),
    "gguf": tuple(GGUF_TYPES),
}
"""Each layout that is written, and the dtypes it can be written in."""
# What the source's own config.json says of its encoding does not hold for the copy.
_NOT_COPIED = ("quantization", "quantization_config", "torch_dtype", "dtype")


def plan_files(checkpoint: Checkpoint, to: str, dtype: str | None, shard_bytes: int) -> list[OutFile]:
    """Plan the files of weights.

    Args:
        checkpoint: what is read.
        to: a key of `TARGETS`.
        dtype: one of its dtypes; None keeps every tensor's own.
        shard_bytes: tensors beyond this go into a further file, where the layout allows that.

    Raises:
        OptionError: no such layout, or it cannot hold the dtype.
    """
    if to not in TARGETS:
        hint = "`octavo quantize SRC DST --bits 4` writes a store" if to == KEY else None
        raise OptionError(f"to is {to!r}; expected one of {', '.join(TARGETS)}", hint)
    if dtype is not None and dtype not in TARGETS[to]:
        raise OptionError(
            f"dtype is {dtype!r}; {to} is written as one of {', '.join(TARGETS[to])}",
            hint="leave the option out to keep every tensor's own",
        )
    args = checkpoint.args
    if to == "gguf":
        layout, metadata = GGUF if args.moe else GGUF_DENSE, _gguf_metadata(checkpoint, dtype)
        return [gguf_file("model.gguf", layout, args, _gguf_choice(checkpoint, dtype), metadata)]
    if to == "mlx":
        layout, choose = MLX if args.moe else HF_DENSE, _mlx_choice(checkpoint, dtype)
        return safetensors_files(layout, args, choose, shard_bytes=shard_bytes)
    choose = _plain_choice(checkpoint, dtype)
    if to == "mistral":  # its reader takes one file
        layout = MISTRAL if args.moe else MISTRAL_DENSE
        return safetensors_files(layout, args, choose, stem="consolidated", shard_bytes=2**63)
    return safetensors_files(HF if args.moe else HF_DENSE, args, choose, shard_bytes=shard_bytes)


def plan_store(checkpoint: Checkpoint, formats: Mapping[str, Format], method: str, shard_bytes: int) -> list[OutFile]:
    """Plan the files of a store.

    Args:
        checkpoint: what is read.
        formats: of each quantised tensor, by canonical name; others are kept in their dtype.
        method: of quantising, one of `octavo.quant.encode.METHODS`.
        shard_bytes: tensors beyond this go into a further file.

    Raises:
        OptionError: weights to be quantised are of a dtype that Octavo does not compute in.
    """
    for name in formats:
        if checkpoint.info(name).dtype not in FLOATS.values():
            raise OptionError(
                f"{checkpoint.location}: {name} is {checkpoint.info(name).dtype}; expected one of {', '.join(FLOATS)}",
                hint="convert the weights first: octavo convert SRC DST --to hf --dtype bfloat16",
            )
    return store_files(checkpoint.args, formats, lambda name: _own_dtype(checkpoint, name), method, shard_bytes)


def main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most tensors: the embedding's."""
    return checkpoint.info("tok_embeddings.weight").dtype


def _main_name(checkpoint: Checkpoint) -> str:
    """The main dtype's name, where the target cannot hold every dtype that a checkpoint may have."""
    name = str(main_dtype(checkpoint)).removeprefix("torch.")
    if name not in FLOATS:
        raise OptionError(
            f"{checkpoint.location}: the weights are {name}; expected one of {', '.join(FLOATS)}",
            hint="give --dtype bfloat16, or convert them to it first",
        )
    return name


def _plain_choice(checkpoint: Checkpoint, dtype: str | None) -> Choice:
    return lambda stored: Plain(FLOATS[dtype] if dtype else _own_dtype(checkpoint, stored.parts[0].canonical))


def _own_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """A tensor's dtype; GGUF widens norms and routers to float32, which is undone where nothing is lost by it."""
    info, main = checkpoint.info(name), main_dtype(checkpoint)
    if not checkpoint.metadata or info.dtype == main or info.nbytes > SMALL * info.dtype.itemsize:
        return info.dtype
    tensor = checkpoint.read(name)
    return main if torch.equal(tensor.to(main).to(info.dtype), tensor) else info.dtype


def _mlx_choice(checkpoint: Checkpoint, dtype: str | None) -> Choice:
    """Quantised: every matrix but routers, whose rows consist of whole groups."""
    plain = _plain_choice(checkpoint, dtype if dtype in FLOATS else None)
    if dtype not in MLX_BITS:
        return plain
    quantised = MLXQuantized(MLX_BITS[dtype], MLX_GROUP_SIZE, FLOATS[_main_name(checkpoint)])

    def choose(stored: Stored) -> Encoding:
        fits = len(stored.shape) > 1 and stored.shape[-1] % MLX_GROUP_SIZE == 0
        return quantised if fits and not stored.name.endswith(".gate.weight") else plain(stored)

    return choose


def _gguf_type(checkpoint: Checkpoint, dtype: str | None) -> str:
    return GGUF_TYPES[dtype or _main_name(checkpoint)]


def _gguf_choice(checkpoint: Checkpoint, dtype: str | None) -> Choice:
    from octavo.storage.gguf_write import encoding_for

    wanted = _gguf_type(checkpoint, dtype)
    return lambda stored: GGUFEncoded(encoding_for(stored.name, stored.shape, wanted))


def _gguf_metadata(checkpoint: Checkpoint, dtype: str | None) -> Mapping[str, Any]:
    from octavo.storage.gguf_args import gguf_metadata
    from octavo.tokenizer.gguf import gguf_tokenizer

    own = {key: value for key, value in checkpoint.metadata.items() if key.startswith("tokenizer.")}
    if not own and checkpoint.tokenizer() is not None:
        own = gguf_tokenizer(checkpoint.local_folder(), checkpoint.args.vocab_size)
        further = [i for i in checkpoint.eos_ids if i != own.get(GGUF_ENDS[0])]
        own |= dict(zip(GGUF_ENDS[1:], further, strict=False))
    name = str(checkpoint.metadata.get("general.name", Path(checkpoint.location).stem))
    return gguf_metadata(checkpoint.args, name, _gguf_type(checkpoint, dtype)) | own


# ---------------------------------------- small files


def plan_companions(
    checkpoint: Checkpoint,
    to: str,
    files: Sequence[OutFile],
    dtype: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Return the small files beside the weights, by name: configuration, index, tokenizer.

    Args:
        checkpoint: what is read.
        to: a key of `TARGETS`, or "octavo" for a store.
        files: the weights.
        dtype: see `plan_files`.
        settings: how a store is quantised, for config.json.

    Raises:
        UserError: the source's are damaged.
    """
    if to == "gguf":  # all of it is in the file
        return {}
    tokenizer = checkpoint.tokenizer()
    found = _tokenizer_files(checkpoint, tokenizer)
    if to == "mistral":
        found[PARAMS] = _json(checkpoint.args.to_params())
    else:
        found |= _tokenizer_json(checkpoint, found, tokenizer)
        config = _hf_config(checkpoint, to, dtype, tokenizer)
        if settings is not None:
            config["quantization_config"] = {"quant_method": KEY, "version": VERSION, **settings}
        found[CONFIG] = _json(config)
        if len(files) > 1:
            found[INDEX] = _json(index_of(files))
    ends: dict[str, Any] = {}
    if tokenizer is not None:
        several = list(checkpoint.eos_ids) if len(checkpoint.eos_ids) > 1 else tokenizer.eos_id
        ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": several}
    generation = checkpoint.folder.json(GENERATION) if _has(checkpoint, GENERATION) else _known(ends)
    if generation:
        found[GENERATION] = _json(generation)
    return found


def _hf_config(checkpoint: Checkpoint, to: str, dtype: str | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    config = dict(checkpoint.config) if "hidden_size" in checkpoint.config else {}
    if tokenizer is not None:
        config = _known({"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}) | config
    config = {key: value for key, value in config.items() if key not in _NOT_COPIED} | checkpoint.args.to_hf()
    config["dtype"] = dtype if dtype in FLOATS else str(main_dtype(checkpoint)).removeprefix("torch.")
    if to == "mlx" and dtype in MLX_BITS:
        config["quantization"] = {"group_size": MLX_GROUP_SIZE, "bits": MLX_BITS[dtype], "mode": "affine"}
    return config


def _tokenizer_files(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """The source's own, and what a reader of `tokenizer.model` alone would miss."""
    if tokenizer is None:
        return {}
    if checkpoint.metadata:
        from octavo.tokenizer.gguf import tokenizer_files

        return tokenizer_files(checkpoint.metadata, checkpoint.location)
    folder = checkpoint.local_folder()
    found = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if _is_tokenizer(p.name)}
    if "tokenizer_config.json" not in found and TOKENIZER_JSON not in found:
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        ends = {key: tokenizer.token_name(i) for key, i in ids.items() if i is not None}
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": tokenizer.adds_bos, "add_eos_token": False}
        found["tokenizer_config.json"] = _json(settings | ends)
    return found


def _tokenizer_json(
    checkpoint: Checkpoint, found: Mapping[str, bytes], tokenizer: Tokenizer | None
) -> dict[str, bytes]:
    """For transformers and mlx-lm, which `tokenizer.model` alone does not tell enough."""
    if tokenizer is None or TOKENIZER_JSON in found:
        return {}
    from octavo.tokenizer.files import Settings
    from octavo.tokenizer.hf_write import tokenizer_json
    from octavo.tokenizer.spm_proto import SpmModel

    try:
        model = SpmModel.from_bytes(found.get(tokenizer.path.name) or found["tokenizer.model"], str(tokenizer.path))
    except TokenizerError:  # of another kind, such as Unigram
        return {}
    added = () if checkpoint.metadata else Settings.read(checkpoint.local_folder()).added  # GGUF has them among all
    data = tokenizer_json(model, added, tokenizer.bos_id if tokenizer.adds_bos else None)
    return {} if data is None else {TOKENIZER_JSON: data}


def _is_tokenizer(name: str) -> bool:
    """The files that `octavo.tokenizer` reads, and those that others read beside them."""
    starts = ("tokenizer", "special_tokens_map.json", "added_tokens.json", "chat_template")
    return name.startswith(starts) or ".model.v" in name


def _has(checkpoint: Checkpoint, name: str) -> bool:
    return not checkpoint.metadata and name in checkpoint.folder.files()


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
