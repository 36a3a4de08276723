"""The card's memory: how much is free, and what to say where it does not do. "The card" is the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from octavo.errors import ResourceError
from octavo.plan import show_size


def free_on_card(device: torch.device | str) -> int:
    """Return the bytes that are free on a CUDA device. This makes the process's context there, which then is not."""
    return int(torch.cuda.mem_get_info(device)[0])


@contextmanager
def taking(part: str, nbytes: int, device: torch.device | str, free: int | None = None) -> Iterator[None]:
    """Within, memory of the card is taken for one part of the plan; where it is not there, the error says which.

    Args:
        part: what it is for, as the plan calls it: "experts", "other weights", "KV cache" or "workspace".
        nbytes: that the plan counts for it; 0 where nobody knows here.
        device: the card.
        free: bytes that are free on it; by default as many as CUDA says once the allocation has failed.

    Raises:
        ResourceError: in the place of torch's `OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        left = free_on_card(device) if free is None else free
        what = f"take {show_size(nbytes)} of the card's memory" if nbytes else "do not fit into the card's memory"
        raise ResourceError(
            f"the {part} of the plan {what}, and {show_size(left)} are free on {device}",
            f"end what else uses the card, or take less: {_MENDS.get(part, _OTHERWISE)}",
        ) from None


_OTHERWISE = "a smaller --gpu-memory leaves more experts to the host, --bits 4 makes weights smaller"
_MENDS = {
    "KV cache": "a shorter context (-o context=N), fewer sequences at a time, or a smaller --gpu-memory, which leaves "
    "more experts to the host",
    "workspace": "a smaller --gpu-memory leaves more experts to the host, a shorter context (-o context=N) takes less",
}
