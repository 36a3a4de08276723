"""A budget for a checkpoint: how it runs within one, and whether it can be held here and now."""

from __future__ import annotations

import math
import shlex

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
