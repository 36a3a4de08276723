"""The composition root: files in, a model and its tokenizer out. Strict both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from octavo.args import ModelArgs
from octavo.checkpoint.names import HF_FUSED, IGNORED, Layout, find, recognise
from octavo.checkpoint.source import TensorSource, open_checkpoint, read_json
from octavo.errors import CheckpointError, OptionError
from octavo.model import Mixtral
from octavo.tokenizer import Tokenizer

FLOATS = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[Mixtral, Tokenizer | None]:
    """Load a model folder in Hugging Face layout.

    On a CPU and in the checkpoint's own dtype the weights stay memory-mapped; only wq and wk, whose rows are stored
    in another order, are copied.

    Args:
        folder: holds config.json, weights and perhaps a tokenizer.
        dtype: of weights and computation, a torch dtype or its name; by default the checkpoint's.
        device: "cpu", "cuda", ...; by default a GPU if there is one.

    Returns:
        The model in evaluation mode, and its tokenizer or None. ``model(ids_BT)`` gives float32 logits [B, T, V].

    Raises:
        CheckpointError: the folder or a file is absent or damaged, or tensors are unknown, missing or misshapen.
        ConfigError: config.json lacks a key, or one makes no sense.
        TokenizerError: the tokenizer files are damaged.
        OptionError: an unknown dtype or device.
    """
    folder = Path(folder)
    wanted, place = _dtype(dtype), _device(device)
    source = open_checkpoint(folder)
    config = folder / "config.json"
    args = ModelArgs.from_hf(read_json(config), where=str(config))
    _check_counts(source, args, config)
    with torch.device("meta"), _NoInit():
        model = Mixtral(args)
    _fill(model, source, folder, wanted, place)
    return model.eval().requires_grad_(False), Tokenizer.from_folder(folder)


class _NoInit(TorchFunctionMode):
    """Skips `nn.init`: a placeholder holds nothing to fill, and filling it would import torch._dynamo, for seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _fill(model: Mixtral, source: TensorSource, folder: Path, dtype: torch.dtype | None, device: torch.device) -> None:
    """Replace the model's placeholders by the stored tensors, after checking every name and shape."""
    args, names = model.args, source.names()
    layout = recognise(names, args)
    parameters = dict(model.named_parameters())  # tied parameters appear once
    _check(source, parameters, layout, args, folder)
    dtype = dtype or _stored_dtype(source, layout)
    with torch.no_grad():
        for name in parameters:
            place = find(layout, name)
            tensor = place.transform.read(source.read(place.name), args, place.expert)
            _assign(model, name, tensor.to(device=device, dtype=dtype))
        model.tie()


def _stored_dtype(source: TensorSource, layout: Layout) -> torch.dtype:
    """The checkpoint's dtype is its embedding's; tensors stored otherwise are converted to it."""
    return source.info(find(layout, "tok_embeddings.weight").name).dtype


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, nn.Parameter(tensor, requires_grad=False))


def _check_counts(source: TensorSource, args: ModelArgs, config: Path) -> None:
    """Refuse to build more layers and experts than the tensors could be of: billions would take for ever."""
    names = source.names()
    most = len(names)  # each expert has a tensor of its own, or all of a layer's lie stacked in one
    if recognise(names, args) is HF_FUSED:
        most *= max(shape[0] for shape in (source.info(name).shape for name in names) if shape)
    experts = args.moe.num_experts if args.moe else 1
    if args.n_layers * experts > most:
        kind = f" of {experts} experts" if args.moe else ""
        raise CheckpointError(
            f"{config}: describes {args.n_layers} layers{kind}, which the {len(names)} tensors beside it cannot be",
            hint="is this the config.json that came with these weights?",
        )


def _check(
    source: TensorSource, parameters: dict[str, nn.Parameter], layout: Layout, args: ModelArgs, folder: Path
) -> None:
    """Name every tensor that is missing, misshapen or unknown, before anything is read."""
    stored = set(source.names())
    problems: list[str] = []
    expected: set[str] = set()
    for name, parameter in parameters.items():
        place = find(layout, name)
        shape = place.transform.stored_shape(tuple(parameter.shape), args)
        if place.name in expected:
            continue
        expected.add(place.name)
        if place.name not in stored:
            problems.append(f"{place.name} is missing")
            continue
        info = source.info(place.name)
        if info.shape != shape:
            problems.append(f"{place.name} has shape {list(info.shape)}, expected {list(shape)}")
        elif not info.dtype.is_floating_point:
            problems.append(f"{place.name} has dtype {info.dtype}, expected a floating-point one")
    if args.tie_embeddings:
        expected.add(find(layout, "output.weight").name)  # some writers store the tied tensor twice
    unknown = sorted(name for name in stored - expected if not IGNORED.fullmatch(name))
    problems += [f"{name} is not part of this model" for name in unknown]
    if problems:
        raise CheckpointError(
            f"{folder}: weights and config.json do not fit each other: " + "; ".join(problems),
            hint="is this the config.json that came with these weights?",
        )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in FLOATS:
            raise OptionError(
                f"dtype is {dtype!r}; expected one of {', '.join(FLOATS)}",
                hint="leave the option out for the weights' own",
            )
        return FLOATS[dtype]
    return dtype


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(
            f"device is {str(device)!r}, which cannot be used here ({str(error).splitlines()[0]})",
            hint="leave the option out, or use cpu",
        ) from None
    return found
