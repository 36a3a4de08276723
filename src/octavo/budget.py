"""A budget for a checkpoint: how it runs within one, and whether it can be held here and now."""

from __future__ import annotations

import math
import shlex
from contextlib import suppress

import torch

from octavo.checkpoint import Checkpoint
from octavo.engine import with_context
from octavo.errors import OptionError, ResourceError
from octavo.experts.disk import EMBEDDING
from octavo.kernels import backend
from octavo.load import parse_dtype
from octavo.machine import resident_memory, room
from octavo.plan import (
    BASE,
    DEFAULT_CONTEXT,
    MemoryPlan,
    Weights,
    footprint_of,
    make_plan,
    parse_size,
    show_size,
    weights_of_store,
)
from octavo.plan_card import CARD_PRECISIONS, HOST_BASE, CardPlan, make_card_plan, not_on_a_card
from octavo.quant.formats import FORMATS
from octavo.quant.presets import preset
from octavo.storage.files import place_of
from octavo.storage.packed_octavo import KEY


def store_weights(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Weights:
    """Count the weights of a store.

    Args:
        checkpoint: the store.
        dtype: of what is not quantised, once it is in memory; by default its own.
    """
    dtype = dtype or checkpoint.info(EMBEDDING).dtype
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    low_bit = {f"{KEY} {name}" for name in FORMATS}
    sizes = {
        info.name: info.nbytes if info.encoding in low_bit else math.prod(info.shape) * dtype.itemsize for info in infos
    }
    return weights_of_store(checkpoint.args, sizes, dtype.itemsize)


def formats_of(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the low-bit formats of a store's matrices, by name; none of what is no store."""
    encodings = {checkpoint.info(name).encoding for name in checkpoint.names()} if checkpoint.is_store else set()
    return frozenset(name for name in FORMATS if f"{KEY} {name}" in encodings)


def plan_checkpoint(
    checkpoint: Checkpoint,
    memory: str | int,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    bits: int | str | None = None,
    context: int | None = None,
    batch: int = 1,
) -> MemoryPlan:
    """Say how a checkpoint runs within a budget, in the precision that it would have without one.

    Args:
        checkpoint: any.
        memory: the budget, such as "12GiB" or a number of bytes.
        dtype: see `octavo.load.load_model`, as for `device` and `bits`.
        device: see there.
        bits: see there.
        context: tokens of a sequence; by default the model's, and at most DEFAULT_CONTEXT.
        batch: sequences side by side.

    Raises:
        OptionError: the budget is too small (the hint is the smallest that works), what does not fit cannot be read
            when it is needed, or the options do not go together.
        ResourceError: so much memory is not free.
        UserError: the checkpoint is damaged.
    """
    budget = parse_size(str(memory))
    if device is not None and str(device).partition(":")[0] != "cpu":
        raise OptionError(
            f"memory bounds what the CPU computes with, and device is {str(device)!r}", "leave one of them out"
        )
    checkpoint.check()
    args = checkpoint.args
    context = min(DEFAULT_CONTEXT, args.max_seq_len) if context is None else context
    with_context(args, context)
    wanted = parse_dtype(dtype) or checkpoint.info(EMBEDDING).dtype
    store = store_weights(checkpoint, wanted) if checkpoint.is_store else None
    plan = make_plan(args, budget, _precision(checkpoint, wanted, bits), context, batch, store)
    whole = footprint_of(args, plan.weights, context, batch)
    if plan.placement is not None and not backend().compiled:
        raise OptionError(
            f"experts are read from the disk for compiled kernels, which are not here: {backend().reason}",
            f"build them (a C++ compiler is all it takes), or have every expert in memory: --memory {whole.total}",
        )
    if plan.placement is not None and (why := _cannot_stream(checkpoint, wanted, bits)):
        raise OptionError(
            f"{checkpoint.location}: with every expert in memory the model takes {show_size(whole.total)}, of which "
            f"{show_size(budget)} may be taken, and {why} cannot be read from the disk when they are needed",
            f"make a store of it once: octavo quantize {shlex.quote(checkpoint.location)} DST --bits {bits or 4}",
        )
    _check_free(plan)
    return plan


def left_for_model(name: str, size: str | int, prefixes: int) -> int:
    """Return what of a budget is left for the model beside the keys and values of sequences that are over.

    Args:
        name: of the option.
        size: of the budget, as people write it or in bytes.
        prefixes: bytes for those keys and values.

    Raises:
        OptionError: nothing is left, or it is no size.
    """
    budget = parse_size(str(size)) - prefixes
    if budget <= 0:
        raise OptionError(f"{name} is {size}, of which prefix_bytes leave nothing", hint="give more memory")
    return budget


def nothing_to_read(name: str, on_card: bool) -> OptionError:
    """The refusal of an option for experts that are read from the disk, where none are."""
    if on_card:
        return OptionError(
            f"{name} is for experts that the CPU reads from the disk; a card's cache goes by what was used last",
            "leave it out, or give --device cpu",
        )
    return OptionError(
        f"{name} needs memory: without a bound every expert stays there", "give one, such as --memory 12GiB"
    )


def _precision(checkpoint: Checkpoint, wanted: torch.dtype, bits: int | str | None) -> int | None:
    """The bits of a weight, as `make_plan` counts them; None for a store, unless they are asked for."""
    if bits is None:
        return None if checkpoint.is_store else 8 * wanted.itemsize
    preset(bits, ())  # whether there is one
    if wanted.itemsize != 2:
        raise OptionError(
            f"dtype is {_name(wanted)}; what is not low-bit is counted as bfloat16 within a budget", "--dtype bfloat16"
        )
    return int(bits)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cannot_stream(checkpoint: Checkpoint, wanted: torch.dtype, bits: int | str | None) -> str | None:
    """What it is about the experts that keeps them in memory, if anything does."""
    if bits is not None:
        return "experts that are quantised while loading"
    first = "layers.0.feed_forward.experts.0.w1.weight"
    packed = checkpoint.packed(first)
    if packed is None and (wanted != torch.bfloat16 or checkpoint.info(first).dtype != wanted):
        return f"experts computed with as {_name(wanted)}"
    data = checkpoint.read(first) if packed is None else packed.data
    if place_of(data) is None:
        return "experts that lie there in another form"
    if not checkpoint.args.tie_embeddings and place_of(checkpoint.read(EMBEDDING)) is None:
        return "embeddings that lie there in another form"
    return None


def _check_free(plan: MemoryPlan) -> None:
    """Refuse a plan for more memory than is free; of the process's own base a part is there already."""
    found, total = room(), plan.footprint.total
    if found is None:
        return
    free = found.nbytes + min(BASE, resident_memory())
    if total > free:
        raise ResourceError(
            f"the plan for {show_size(plan.budget)} of memory takes {show_size(total)}, and {show_size(max(0, free))} "
            f"can be had {found.limit}",
            f"free some, or give less: --memory {max(0, free) // 10**6}MB",
        )


# ---------------------------------------- a card


def goes_on_card(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    bits: int | str | None = None,
    memory: str | int | None = None,
    gpu_memory: str | int | None = None,
    n_cards: int | None = None,
) -> bool:
    """Whether a checkpoint is computed with by a card's own kernels, for which a plan of the card is made.

    So are bfloat16 and 8- or 4-bit weights on a CUDA device: one that is asked for, by name or by ``gpu_memory``, or
    one that is there while nothing else is asked for. Other floating-point weights go there without a plan.

    Args:
        checkpoint: any.
        dtype: see `octavo.load.load_model`, as for `device` and `bits`.
        device: see there.
        bits: see there.
        memory: a budget of the host's memory; without a card asked for, it is the CPU that computes within it.
        gpu_memory: a budget of the card's.
        n_cards: CUDA devices of this machine; by default as many as torch finds.

    Raises:
        OptionError: a card is asked for and there is none, or it does not compute with such weights.
    """
    n_cards = torch.cuda.device_count() if n_cards is None else n_cards
    kind, _, index = ("", "", "") if device is None else str(device).partition(":")
    if gpu_memory is not None and kind not in ("", "cuda"):
        raise OptionError(f"gpu_memory bounds what a card holds, and device is {str(device)!r}", "--device cuda")
    if not (kind == "cuda" or gpu_memory is not None or (device is None and memory is None and n_cards)):
        return False
    if n_cards <= int(index if index.isdecimal() else 0):
        what = f"device is {str(device)!r}" if kind else "gpu_memory bounds what a card holds"
        raise OptionError(f"{what}, and no such CUDA device is found here", "leave it out, or use cpu")
    wanted = parse_dtype(dtype) or checkpoint.info(EMBEDDING).dtype
    obstacle = _not_for_card(checkpoint, wanted, bits)
    if obstacle is not None and (kind or gpu_memory is not None):
        if gpu_memory is None and bits is None and not checkpoint.is_store:
            return False
        raise obstacle
    return obstacle is None


def _not_for_card(checkpoint: Checkpoint, wanted: torch.dtype, bits: int | str | None) -> OptionError | None:
    """What is in the way of the card's kernels, if anything is."""
    if bits is not None:
        preset(bits, ())  # whether there is one
        if int(bits) not in CARD_PRECISIONS:
            return not_on_a_card(f"bits is {bits}")
    for name in sorted(formats_of(checkpoint)):
        if FORMATS[name].bits not in CARD_PRECISIONS:
            return not_on_a_card(f"{checkpoint.location} has weights of {FORMATS[name].bits} bits")
    if wanted != torch.bfloat16:
        return OptionError(
            f"dtype is {_name(wanted)}; on a card what is not low-bit is computed with as bfloat16", "--dtype bfloat16"
        )
    return None


def plan_checkpoint_on_card(
    checkpoint: Checkpoint,
    gpu_memory: str | int | None,
    memory: str | int | None = None,
    *,
    free: int,
    dtype: torch.dtype | str | None = None,
    bits: int | str | None = None,
    context: int | None = None,
    batch: int | None = None,
    most: int = 1,
) -> CardPlan:
    """Say how a checkpoint for which `goes_on_card` runs within a card's memory and the host's.

    Args:
        checkpoint: any.
        gpu_memory: the budget of the card, such as "24GiB" or a number of bytes; by default what is free there.
        memory: the budget of the host; by default what is free here, where the system tells.
        free: bytes that are free on the card.
        dtype: see `octavo.load.load_model`, as for `bits`.
        bits: see there.
        context: tokens of a sequence; by default the model's, and at most DEFAULT_CONTEXT.
        batch: sequences side by side; by default `most` if every expert is on the card with them, else 1.
        most: see `batch`.

    Raises:
        OptionError: a budget is too small; the hint is the smallest that works.
        ResourceError: so much memory is not free, on the card or the host.
        UserError: the checkpoint is damaged.
    """
    budget = max(0, free) if gpu_memory is None else parse_size(str(gpu_memory))
    found = room()
    host_free = None if found is None else found.nbytes + min(HOST_BASE, resident_memory())
    host = host_free if memory is None else parse_size(str(memory))
    checkpoint.check()
    args = checkpoint.args
    context = min(DEFAULT_CONTEXT, args.max_seq_len) if context is None else context
    with_context(args, context)
    wanted = parse_dtype(dtype) or checkpoint.info(EMBEDDING).dtype
    store = store_weights(checkpoint, wanted) if checkpoint.is_store else None
    precision = _precision(checkpoint, wanted, bits)
    plan = make_card_plan(args, budget, host, precision, context, batch or 1, store)
    if batch is None and plan.placement is None:
        with suppress(OptionError):
            more = make_card_plan(args, budget, host, precision, context, most, store)
            plan = more if more.placement is None else plan
    if plan.card.total > free:
        raise ResourceError(
            f"the plan for {show_size(budget)} of the card's memory takes {show_size(plan.card.total)}, and "
            f"{show_size(max(0, free))} are free on it",
            f"end what else uses the card, or give less: --gpu-memory {max(0, free) // 10**6}MB",
        )
    if found is not None and host_free is not None and plan.host.total > host_free:
        raise ResourceError(
            f"the plan takes {show_size(plan.host.total)} of the host's memory, and {show_size(max(0, host_free))} can "
            f"be had {found.limit}",
            f"free some, or give less: --memory {max(0, host_free) // 10**6}MB",
        )
    return plan
