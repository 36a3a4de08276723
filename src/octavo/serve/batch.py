"""How many sequences are generated at a time: as many as have room for their whole contexts, within reason."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from octavo.args import ModelArgs
from octavo.budget import goes_on_card, left_for_model, plan_checkpoint, plan_checkpoint_on_card, store_weights
from octavo.checkpoint import Checkpoint
from octavo.engine import with_context
from octavo.errors import OptionError
from octavo.kernels.memory import free_on_card
from octavo.load import parse_dtype
from octavo.machine import SPARE, room
from octavo.plan import kv_cache_bytes, show_size, weights_at, workspace_bytes
from octavo.plan_card import NUMBER, CardPlan, card_footprint

MOST = 16
STREAMED_SHARE = 10  # of a budget within which experts are streamed, keys and values get a tenth at most


class Batch(NamedTuple):
    """How many sequences at a time, and why."""

    size: int
    reason: str


def choose_batch(
    args: ModelArgs, *, context: int, number: int, available: float, wanted: int | None = None, least: int = 0
) -> Batch:
    """Choose so that every sequence may grow to its whole context.

    Args:
        args: the model's shape.
        context: tokens of a sequence.
        number: bytes of a number in the key-value cache.
        available: bytes for the cache; infinite where nobody knows.
        wanted: take so many; by default MOST at most.
        least: so many are there in any case, whatever is available.

    Raises:
        OptionError: not even one has room, or not so many as are wanted.
    """
    if wanted is not None and wanted < 1:
        raise OptionError(f"batch is {wanted}; expected an integer of at least 1", "such as -o batch=8")
    each = kv_cache_bytes(args, context, 1, number)
    fitting = max(least, int(min(available, 2**62) // each))
    size = wanted or min(MOST, fitting)
    sizes = f"{show_size(each)} each for {context:,} tokens"
    left = "" if available == float("inf") else f", and {show_size(max(0.0, available))} are there for them"
    if size > fitting or size < 1:
        tokens = int(max(0.0, available) // (max(1, size) * kv_cache_bytes(args, 1, 1, number)))
        mend = f"-o context={tokens}" if tokens > 16 else "more memory"
        what = "a sequence" if size <= 1 else f"{size} sequences"
        raise OptionError(
            f"{what} at a time would take {sizes}{left}",
            f"give {mend}" + (f", or -o batch={fitting}" if fitting else ""),
        )
    why = "as asked" if wanted is not None else "the most by default" if size == MOST else "what has room"
    return Batch(size, f"{size} sequences at a time, {why}: {sizes}{left}")


def batch_for(
    checkpoint: Checkpoint,
    *,
    dtype: str | torch.dtype | None,
    device: str | None,
    bits: str | None,
    memory: str | None,
    context: int | None,
    prefix_bytes: int,
    wanted: int | None,
    gpu_memory: str | None = None,
) -> Batch:
    """Choose for a checkpoint that is to be loaded here; the arguments are `LLM.load`'s.

    Raises:
        UserError: as `choose_batch` and `octavo.budget.plan_checkpoint`.
    """
    args = checkpoint.args
    if goes_on_card(checkpoint, dtype=dtype, device=device, bits=bits, memory=memory, gpu_memory=gpu_memory):
        plan_on_card = plan_checkpoint_on_card(
            checkpoint,
            None if gpu_memory is None else left_for_model("gpu_memory", gpu_memory, prefix_bytes),
            memory,
            free=free_on_card(device or "cuda") - prefix_bytes,
            dtype=dtype,
            bits=bits,
            context=context,
        )
        return batch_on_card(plan_on_card, wanted)
    number = (parse_dtype(dtype) or checkpoint.info("tok_embeddings.weight").dtype).itemsize
    if memory is not None:
        budget = left_for_model("memory", memory, prefix_bytes)
        options: dict[str, Any] = {"dtype": dtype, "device": device, "bits": bits, "context": context}
        plan = plan_checkpoint(checkpoint, budget, **options)
        one = plan.footprint.kv_cache
        left = budget - plan.footprint.total + one
        if plan.placement is not None:
            left = budget // STREAMED_SHARE
        number = plan.weights.number
        least = 1  # the plan has room for it
        return choose_batch(args, context=plan.context, number=number, available=left, wanted=wanted, least=least)
    tokens = args.max_seq_len if context is None else with_context(args, context).max_seq_len
    kept = checkpoint.is_store and bits is None
    weights = store_weights(checkpoint) if kept else weights_at(args, int(bits) if bits else 8 * number)
    taken = weights.total + workspace_bytes(args, weights, tokens, MOST) + prefix_bytes
    return choose_batch(args, context=tokens, number=number, available=_free(device) - taken, wanted=wanted)


def batch_on_card(plan: CardPlan, wanted: int | None) -> Batch:
    """Choose for a card.

    Args:
        plan: of one sequence there.
        wanted: as for `choose_batch`.

    Raises:
        OptionError: not so many as are wanted have room.
    """
    most = max(MOST, wanted or 0)  # sequences take workspace too; so much of it is left out of what keys may take
    whole = card_footprint(plan.args, plan.weights, plan.context, most)
    left = plan.gpu_budget - whole.total + whole.kv_cache
    if plan.placement is not None:
        left = plan.gpu_budget // STREAMED_SHARE
    return choose_batch(plan.args, context=plan.context, number=NUMBER, available=left, wanted=wanted, least=1)


def _free(device: str | None) -> float:
    """Bytes where the model will be, before it is there."""
    kind = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind.type == "cuda":
        return float(torch.cuda.mem_get_info(kind)[0])
    found = room() if kind.type == "cpu" else None
    return float("inf") if found is None else float(found.nbytes - SPARE)
