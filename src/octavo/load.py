"""The composition root: files in, a model and its tokenizer out. Strict both ways."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from octavo.args import ModelArgs
from octavo.card import CardBlock
from octavo.checkpoint import Checkpoint, open_checkpoint
from octavo.compiled import IN_PLACE_OF, in_place_of
from octavo.errors import OptionError
from octavo.experts import DiskCache, StreamedExperts
from octavo.experts.card import CachedExperts, CardCache, HostExperts
from octavo.experts.disk import MATRICES, OnDisk, not_streamable
from octavo.experts.prefetch import Ahead, Prefetch
from octavo.experts.slots import Key
from octavo.kernels import backend
from octavo.kernels.card import ALIGNMENT, CardExperts, CardLinear, copy_into, kind_of, to_card
from octavo.kernels.memory import taking
from octavo.kernels.modules import KernelExperts, KernelLinear
from octavo.kernels.ops import Weight
from octavo.model import Mixtral, MoEFeedForward, TransformerBlock
from octavo.plan import Placement
from octavo.plan_card import CardPlacement
from octavo.quant.formats import FORMATS, Packed
from octavo.quant.presets import preset
from octavo.quant.quantize import quantize
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
    placement: Placement | CardPlacement | None = None,
) -> Mixtral:
    """Make a model of a checkpoint's tensors; see `load_model`.

    Args:
        checkpoint: any.
        dtype: see `load_model`.
        device: see `load_model`.
        bits: see `load_model`.
        kernels: compute with bfloat16 weights by Octavo's kernels too. The model then has no parameters for them, and
            cannot be trained or moved.
        placement: of experts that do not all stay in memory, and are read from the disk when tokens choose them; the
            same bits as with all of them in memory, which is the default. For stores, and for bfloat16 weights on a
            CPU. Or of those that do not all fit on a GPU, and lie in the host's memory.

    Raises:
        OptionError: experts are not kept on the disk as they are computed with, or the placement has too few bytes.
        UserError: what `load_model` raises.
    """
    wanted = parse_dtype(dtype)
    checkpoint.check()
    low_bit = checkpoint.is_store or bits is not None
    place = parse_device(device)
    if low_bit and place.type not in ("cpu", "cuda"):
        raise OptionError(f"device is {str(device)!r}; low-bit weights are for the CPU or a CUDA GPU", hint="use cpu")
    # The checkpoint's dtype is its embedding's; tensors stored otherwise are converted to it.
    wanted = wanted or checkpoint.info("tok_embeddings.weight").dtype
    if low_bit and wanted == torch.float16:
        raise OptionError(
            "dtype is float16; beside low-bit weights activations are bfloat16 or float32",
            hint="--dtype bfloat16, or float32, which loses nothing and takes more memory",
        )
    if place.type == "cuda" and (low_bit or (kernels and wanted == torch.bfloat16)):
        if isinstance(placement, Placement):
            raise OptionError("experts are read from the disk for the CPU alone", hint="--device cpu")
        return build_on_card(checkpoint, place, wanted, bits, placement)
    if isinstance(placement, CardPlacement):
        raise OptionError(
            "a GPU's own kernels compute with bfloat16 or low-bit weights",
            hint="--device cuda, and leave dtype out",
        )
    if placement is not None:
        if place.type != "cpu" or not backend().compiled or (wanted != torch.bfloat16 and not low_bit):
            raise OptionError(
                "experts are read from the disk for the CPU's compiled kernels, which compute with bfloat16 or less",
                hint="leave dtype and device out",
            )
        return _streamed(checkpoint, wanted, bits, placement)
    weights = _Weights(checkpoint, bits)

    def plain(name: str) -> Tensor:
        return _aligned(checkpoint.read(name).to(device=place, dtype=wanted).contiguous())

    def weight(name: str) -> Weight:
        packed = weights.packed(name)
        return plain(name) if packed is None else packed

    kernels = kernels and place.type == "cpu" and wanted == torch.bfloat16 and backend().compiled
    return assemble(checkpoint.args, plain, weight if kernels or low_bit else None)


def assemble(
    args: ModelArgs,
    plain: Callable[[str], Tensor],
    weight: Callable[[str], Weight] | None = None,
    experts: Callable[[int, Sequence[str]], nn.Module] | None = None,
    embedding: nn.Module | None = None,
) -> Mixtral:
    """Put a model together.

    Args:
        args: its shape.
        plain: gives a parameter by its canonical name.
        weight: gives a matrix for `octavo.kernels` by its canonical name: of attention, experts and output. By default
            they are parameters like the others.
        experts: gives a layer's experts, by its number among those that have some and their names; by default they
            are made of what ``weight`` gives.
        embedding: of tokens, where it is no parameter.

    Returns:
        The model in evaluation mode.
    """
    with torch.device("meta"), _NoInit():
        model = Mixtral(args)
    if weight is not None:
        _replace_linears(model, lambda name: KernelLinear(weight(name)), experts or partial(_resident, weight))
        _replace_kinds(model, IN_PLACE_OF)
    if embedding is not None:
        model.set_submodule("tok_embeddings", embedding)
    return _with_parameters(model, plain)


def assemble_on_card(
    args: ModelArgs,
    plain: Callable[[str], Tensor],
    weight: Callable[[str], Weight],
    device: torch.device,
    placement: CardPlacement | None = None,
) -> Mixtral:
    """Put a model together whose matrices lie on a GPU, where `octavo.kernels.card` computes with them.

    Args:
        args: its shape.
        plain: gives a parameter by its canonical name, on the device.
        weight: gives a matrix by its canonical name, wherever it lies.
        device: the GPU; a CPU where Triton interprets its kernels.
        placement: where not all experts are on the card.

    Returns:
        The model in evaluation mode.

    Raises:
        OptionError: a format that is not computed with there, or a placement of a dense model's experts.
        ResourceError: the card has too little memory for a part of it.
    """
    if placement is not None and args.moe is None:
        raise OptionError("the model has no experts that could lie elsewhere", hint="leave the placement out")
    with torch.device("meta"), _NoInit():
        model = Mixtral(args)

    def linear(name: str) -> nn.Module:
        return CardLinear(to_card(weight(name), device))

    experts = partial(_on_card, weight, device)
    _replace_linears(model, linear, experts if placement is None else _cached(args, weight, placement, device))
    _replace_kinds(model, {TransformerBlock: CardBlock})
    return _with_parameters(model, plain)


def _streamed(checkpoint: Checkpoint, dtype: torch.dtype, bits: int | str | None, placement: Placement) -> Mixtral:
    """Make a model whose experts stay on the disk, as far as the placement has no memory for them.

    All other weights are read into memory of their own. What has a checksum is compared with it when it is read first.
    """
    args = checkpoint.args
    if bits is not None:
        raise _is_store(checkpoint, bits) if checkpoint.is_store else not_streamable("what is quantised while loading")
    if args.moe is None:
        raise OptionError("the model has no experts that could be read from the disk", hint="leave the placement out")
    with OnDisk(checkpoint, dtype) as disk:
        kinds, stored = {}, {}
        for key, name in _expert_names(args).items():
            kinds[key], stored[key] = disk.expert(key, name)
        cache = DiskCache(stored, placement, disk.verify)
        model = assemble(
            args,
            lambda name: _aligned(disk.plain(name)),
            disk.weight,
            lambda layer, names: StreamedExperts(layer, [kinds[layer, e] for e in range(len(names))], cache),
            None if args.tie_embeddings else disk.embedding(),
        )
    if placement.prefetch:
        prefetch = Prefetch(_routers_ahead(model))
        for module in model.modules():
            if isinstance(module, StreamedExperts):
                module.prefetch = prefetch
    return model


def build_on_card(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    bits: int | str | None = None,
    placement: CardPlacement | None = None,
) -> Mixtral:
    """Make a model for a GPU's own kernels; see `build_model`.

    Args:
        checkpoint: any that `Checkpoint.check` has passed.
        device: the GPU; a CPU where Triton interprets its kernels.
        dtype: of weights that are not low-bit.
        bits: 8 or 4 to quantise while loading.
        placement: where not all experts are on the card.

    Raises:
        UserError: see `build_model`, and `assemble_on_card`.
    """
    weights = _Weights(checkpoint, bits)

    def plain(name: str) -> Tensor:
        with taking("other weights", 0, device):
            return checkpoint.read(name).to(device=device, dtype=dtype).contiguous()

    def weight(name: str) -> Weight:
        packed = weights.packed(name)
        return checkpoint.read(name).to(dtype) if packed is None else packed

    return assemble_on_card(checkpoint.args, plain, weight, device, placement)


def _routers_ahead(model: Mixtral) -> list[Ahead]:
    """Of every layer but the last the next one's router."""
    norms = [model.get_parameter(f"layers.{layer}.ffn_norm.weight").float() for layer in range(model.args.n_layers)]
    ratios = [(following / this).nan_to_num(0.0, 0.0, 0.0) for this, following in itertools.pairwise(norms)]
    return [Ahead(ratio_D, gate.weight, gate.top_k) for ratio_D, gate in zip(ratios, model.routers()[1:], strict=True)]


class _Weights:
    """The low-bit matrices: a store's own, or those of a preset, made when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, bits: int | str | None) -> None:
        self._checkpoint = checkpoint
        if checkpoint.is_store:
            if bits is not None:
                raise _is_store(checkpoint, bits)
            checkpoint.verify()
        self._formats = {} if bits is None else preset(bits, checkpoint.names())

    def packed(self, name: str) -> Packed | None:
        """One matrix, or None if it is kept as it is."""
        if self._checkpoint.is_store:
            return self._checkpoint.packed(name)
        chosen = self._formats.get(name)
        return None if chosen is None else quantize(self._checkpoint.read(name), FORMATS[chosen], name=name)


def _is_store(checkpoint: Checkpoint, bits: int | str) -> OptionError:
    return OptionError(
        f"bits is {bits}; {checkpoint.location} is a store, which has its own precision",
        hint="leave the option out, or quantise the original weights again",
    )


def _with_parameters(model: Mixtral, plain: Callable[[str], Tensor]) -> Mixtral:
    """The model in evaluation mode, with all parameters that modules still want."""
    with torch.no_grad():
        for name, parameter in dict(model.named_parameters()).items():  # tied parameters appear once
            if parameter.is_meta:
                _assign(model, name, plain(name))
        model.tie()
    return model.eval().requires_grad_(False)


def _replace_linears(
    model: Mixtral, linear: Callable[[str], nn.Module], experts: Callable[[int, Sequence[str]], nn.Module]
) -> None:
    """Put modules in the places of experts and of all matrices but the embedding, by the names of their weights."""
    n_mixtures = 0
    for path, module in list(model.named_modules()):
        if isinstance(module, MoEFeedForward):
            names = [f"{path}.experts.{e}" for e in range(module.gate.weight.shape[0])]
            module.experts = experts(n_mixtures, names)
            n_mixtures += 1
        elif (
            isinstance(module, nn.Linear)
            and ".experts." not in path
            and not (path == "output" and model.args.tie_embeddings)
        ):
            model.set_submodule(path, linear(f"{path}.weight"))


def _replace_kinds(model: Mixtral, kinds: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    for path, module in list(model.named_modules()):
        for kind, other in kinds.items():
            if type(module) is kind:
                model.set_submodule(path, in_place_of(module, other))


def _expert_names(args: ModelArgs) -> dict[Key, str]:
    """What the names of each expert's matrices begin with, by layer and number."""
    n_experts = args.moe.num_experts if args.moe else 0
    keys = itertools.product(range(args.n_layers), range(n_experts))
    return {(layer, e): f"layers.{layer}.feed_forward.experts.{e}" for layer, e in keys}


def _on_card(weight: Callable[[str], Weight], device: torch.device, layer: int, names: Sequence[str]) -> CardExperts:
    """A layer's experts on the card, one matrix behind the other: torch rounds up what is allocated alone."""
    wanted = [[f"{name}.{w}.weight" for w in MATRICES] for name in names]
    first = [weight(name) for name in wanted[0]]  # may have been quantised just now, which takes its time
    kinds = [kind_of(one) for one in first]
    nbytes = [-(-kind.nbytes // ALIGNMENT) * ALIGNMENT for kind in kinds]
    with taking("experts", len(names) * sum(nbytes), device):
        room = torch.empty(len(names) * sum(nbytes), dtype=torch.uint8, device=device)
    places = iter(torch.split(room, nbytes * len(names)))
    experts = [[copy_into(next(places), one) for one in first]]
    experts += [[copy_into(next(places), weight(name)) for name in of_one] for of_one in wanted[1:]]
    return CardExperts(experts)


def _cached(
    args: ModelArgs, weight: Callable[[str], Weight], placement: CardPlacement, device: torch.device
) -> Callable[[int, Sequence[str]], nn.Module]:
    """A layer's experts, of which a card holds some."""
    names = _expert_names(args)
    k1, k3, k2 = (kind_of(weight(f"{names[0, 0]}.{w}.weight")) for w in MATRICES)
    cache = CardCache(HostExperts(names, weight), (k1, k3, k2), placement, device)
    return lambda layer, of_layer: CachedExperts(layer, len(of_layer), cache)


def _resident(weight: Callable[[str], Weight], layer: int, names: Sequence[str]) -> KernelExperts:
    w1, w3, w2 = ([weight(f"{name}.{w}.weight") for name in names] for w in MATRICES)
    return KernelExperts(list(zip(w1, w3, w2, strict=True)))


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


def parse_device(device: torch.device | str | None) -> torch.device:
    """A device by its name; None is a GPU if there is one, else the CPU.

    Raises:
        OptionError: it cannot be used here.
    """
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
