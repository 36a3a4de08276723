"""The composition root: files in, a model and its tokenizer out. Strict both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from octavo.args import ModelArgs
from octavo.checkpoint import Checkpoint, open_checkpoint
from octavo.compiled import IN_PLACE_OF, in_place_of
from octavo.errors import OptionError
from octavo.experts import ExpertCache, StreamedExperts
from octavo.kernels import backend
from octavo.kernels.modules import KernelExperts, KernelLinear
from octavo.kernels.ops import Weight
from octavo.model import Mixtral, MoEFeedForward
from octavo.quant.formats import FORMATS, Packed
from octavo.quant.presets import preset
from octavo.quant.quantize import quantize
from octavo.storage.files import Place, place_of
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
Expert = tuple[Weight, Weight, Weight]
"""w1, w3 and w2."""


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    bits: int | str | None = None,
) -> tuple[Mixtral, Tokenizer | None]:
    """Load a model folder or file in any layout that `octavo.checkpoint.open_checkpoint` reads.

    On a CPU and in the checkpoint's own dtype the weights stay memory-mapped where they lie as the model has them.
    Hugging Face's wq and wk, whose rows are stored in another order, are copied. Weights of a store (`octavo quantize`)
    are used as they lie there; those that others quantised are dequantised.

    Args:
        source: a folder with weights, their configuration and perhaps a tokenizer; a GGUF file; a Hub id.
        dtype: of computation and of the weights that are not low-bit, a torch dtype or its name; by default the
            checkpoint's.
        device: "cpu", "cuda", ...; by default a GPU if there is one, the CPU for low-bit weights.
        bits: 8, 4, 3 or 2 to quantise while loading, by `octavo.quant.presets`.

    Returns:
        The model in evaluation mode, and its tokenizer or None. ``model(ids_BT)`` gives float32 logits [B, T, V].

    Raises:
        CheckpointError: the folder or a file is absent or damaged, or tensors are unknown, missing or misshapen.
        ConfigError: the configuration lacks a key, or one makes no sense.
        TokenizerError: the tokenizer files are damaged.
        OptionError: an unknown dtype, device or number of bits, or they do not go together.
        HubError: no such repository, or the Hub cannot be reached.
    """
    checkpoint = open_checkpoint(source)
    return build_model(checkpoint, dtype=dtype, device=device, bits=bits), checkpoint.tokenizer()


def build_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    bits: int | str | None = None,
    kernels: bool = False,
    expert_memory: int | None = None,
) -> Mixtral:
    """Make a model of a checkpoint's tensors; see `load_model`.

    Args:
        checkpoint: any.
        dtype: see `load_model`.
        device: see `load_model`.
        bits: see `load_model`.
        kernels: on a CPU, compute with bfloat16 weights by Octavo's kernels too. The model then has no parameters
            for them, and cannot be trained or moved.
        expert_memory: bytes for experts, which are read from the disk when tokens choose them; the same bits as with
            all of them in memory, which is the default. For stores, and for bfloat16 weights on a CPU.

    Raises:
        OptionError: experts are not kept on the disk as they are computed with, or so many bytes hold too few.
        UserError: what `load_model` raises.
    """
    wanted = parse_dtype(dtype)
    checkpoint.check()
    weights = _Weights(checkpoint, bits)
    place = _device("cpu" if weights.low_bit and device is None else device)
    if weights.low_bit and place.type != "cpu":
        raise OptionError(f"device is {str(device)!r}; low-bit weights are computed with on the CPU", hint="use cpu")
    # The checkpoint's dtype is its embedding's; tensors stored otherwise are converted to it.
    wanted = wanted or checkpoint.info("tok_embeddings.weight").dtype

    def plain(name: str) -> Tensor:
        tensor = _aligned(checkpoint.read(name).to(device=place, dtype=wanted).contiguous())
        # What is not read when it is needed must not go away with the file.
        return tensor if expert_memory is None or ".experts." in name else tensor.clone()

    def weight(name: str) -> Weight:
        packed = weights.packed(name)
        if packed is None:
            return plain(name)
        return packed if expert_memory is None or ".experts." in name else packed._replace(data=packed.data.clone())

    kernels = (
        (kernels or expert_memory is not None)
        and place.type == "cpu"
        and wanted == torch.bfloat16
        and backend().compiled
    )
    if expert_memory is not None and not (kernels or weights.low_bit):
        raise OptionError("experts are read from the disk for the CPU's kernels, which compute with bfloat16 or less")
    return assemble(checkpoint.args, plain, weight if kernels or weights.low_bit else None, expert_memory)


def assemble(
    args: ModelArgs,
    plain: Callable[[str], Tensor],
    weight: Callable[[str], Weight] | None = None,
    expert_memory: int | None = None,
) -> Mixtral:
    """Put a model together.

    Args:
        args: its shape.
        plain: gives a parameter by its canonical name.
        weight: gives a matrix for `octavo.kernels` by its canonical name: of attention, experts and output. By default
            they are parameters like the others.
        expert_memory: see `build_model`; what ``weight`` gives for experts then lies in mapped files.

    Returns:
        The model in evaluation mode.
    """
    with torch.device("meta"), _NoInit():
        model = Mixtral(args)
    if weight is not None:
        _use_kernels(model, weight, expert_memory)
    with torch.no_grad():
        for name in dict(model.named_parameters()):  # tied parameters appear once
            _assign(model, name, plain(name))
        model.tie()
    return model.eval().requires_grad_(False)


class _Weights:
    """The low-bit matrices: a store's own, or those of a preset, made when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, bits: int | str | None) -> None:
        self._checkpoint = checkpoint
        self._store = checkpoint.is_store
        if self._store:
            if bits is not None:
                raise OptionError(
                    f"bits is {bits}; {checkpoint.location} is a store, which has its own precision",
                    hint="leave the option out, or quantise the original weights again",
                )
            checkpoint.verify()
        self._formats = {} if bits is None else preset(bits, checkpoint.names())
        self.low_bit = self._store or bits is not None

    def packed(self, name: str) -> Packed | None:
        """One matrix, or None if it is kept as it is."""
        if self._store:
            return self._checkpoint.packed(name)
        chosen = self._formats.get(name)
        return None if chosen is None else quantize(self._checkpoint.read(name), FORMATS[chosen], name=name)


def _use_kernels(model: Mixtral, weight: Callable[[str], Weight], expert_memory: int | None) -> None:
    """Put modules of kernels in the places of all but the embedding."""
    mixtures: list[tuple[MoEFeedForward, list[Expert]]] = []
    for path, module in list(model.named_modules()):
        if isinstance(module, MoEFeedForward):
            names = [f"{path}.experts.{e}" for e in range(module.gate.weight.shape[0])]
            w1, w3, w2 = ([weight(f"{name}.{w}.weight") for name in names] for w in ("w1", "w3", "w2"))
            mixtures.append((module, list(zip(w1, w3, w2, strict=True))))
        elif (
            isinstance(module, nn.Linear)
            and ".experts." not in path
            and not (path == "output" and model.args.tie_embeddings)
        ):
            model.set_submodule(path, KernelLinear(weight(f"{path}.weight")))
    if expert_memory is not None and not mixtures:
        raise OptionError("the model has no experts that could be read from the disk", hint="leave expert_memory out")
    cache = None if expert_memory is None else _expert_cache([experts for _, experts in mixtures], expert_memory)
    for layer, (module, experts) in enumerate(mixtures):
        module.experts = KernelExperts(experts) if cache is None else StreamedExperts(layer, experts, cache)
    for path, module in list(model.named_modules()):
        for kind, faster in IN_PLACE_OF.items():
            if type(module) is kind:
                model.set_submodule(path, in_place_of(module, faster))


def _expert_cache(layers: list[list[Expert]], budget: int) -> ExpertCache:
    places: dict[tuple[int, int], list[Place]] = {}
    for layer, experts in enumerate(layers):
        for number, expert in enumerate(experts):
            found = [place_of(weight.data) for weight in expert]
            places[layer, number] = [place for place in found if place is not None]
            if None in found:
                raise OptionError(
                    f"expert {number} of layer {layer} is not kept on the disk as it is computed with, "
                    "and cannot be read when it is needed",
                    hint="make a store of the checkpoint: octavo quantize SRC DST --bits 4",
                )
    return ExpertCache(places, budget)


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
