"""The composition root: files in, a model and its tokenizer out. Strict both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from octavo.checkpoint import Checkpoint, open_checkpoint
from octavo.errors import OptionError
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
MAX_COPIED = 1 << 20  # bytes


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[Mixtral, Tokenizer | None]:
    """Load a model folder or file in any layout that `octavo.checkpoint.open_checkpoint` reads.

    On a CPU and in the checkpoint's own dtype the weights stay memory-mapped where they lie as the model has them.
    Hugging Face's wq and wk, whose rows are stored in another order, are copied; quantised weights are dequantised.

    Args:
        source: a folder with weights, their configuration and perhaps a tokenizer; a GGUF file; a Hub id.
        dtype: of weights and computation, a torch dtype or its name; by default the checkpoint's.
        device: "cpu", "cuda", ...; by default a GPU if there is one.

    Returns:
        The model in evaluation mode, and its tokenizer or None. ``model(ids_BT)`` gives float32 logits [B, T, V].

    Raises:
        CheckpointError: the folder or a file is absent or damaged, or tensors are unknown, missing or misshapen.
        ConfigError: the configuration lacks a key, or one makes no sense.
        TokenizerError: the tokenizer files are damaged.
        OptionError: an unknown dtype or device.
        HubError: no such repository, or the Hub cannot be reached.
    """
    checkpoint = open_checkpoint(source)
    return build_model(checkpoint, dtype=dtype, device=device), checkpoint.tokenizer()


def build_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> Mixtral:
    """Make a model of a checkpoint's tensors; see `load_model`."""
    wanted, place = parse_dtype(dtype), _device(device)
    checkpoint.check()
    with torch.device("meta"), _NoInit():
        model = Mixtral(checkpoint.args)
    # The checkpoint's dtype is its embedding's; tensors stored otherwise are converted to it.
    wanted = wanted or checkpoint.info("tok_embeddings.weight").dtype
    with torch.no_grad():
        for name in dict(model.named_parameters()):  # tied parameters appear once
            _assign(model, name, _aligned(checkpoint.read(name).to(device=place, dtype=wanted).contiguous()))
        model.tie()
    return model.eval().requires_grad_(False)


class _NoInit(TorchFunctionMode):
    """Skips `nn.init`: a placeholder holds nothing to fill, and filling it would import torch._dynamo, for seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _aligned(tensor: Tensor) -> Tensor:
    """A copy of a small tensor that no 64-byte boundary begins: there, matrix products round in another order.

    Files put tensors anywhere, so without this a model's last bits would depend on the file it came from. Large ones
    stay mapped: copying them could take all the memory there is.
    """
    return tensor.clone() if tensor.data_ptr() % 64 and tensor.nbytes <= MAX_COPIED else tensor


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, nn.Parameter(tensor, requires_grad=False))


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its name, such as "bfloat16" or "bf16".

    Raises:
        OptionError: there is no floating-point dtype of that name.
    """
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
