"""The choice that `octavo.sampling.sample` makes, for a whole batch on the device where its logits lie.

The host never waits: no operation's shape depends on a tensor's values, and nothing is read back. So it may run behind
a decode step, or be part of its CUDA graph. The random numbers are `sample`'s own, drawn on the CPU beforehand.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.sampling import FEW, MAX_DIVISOR, SamplingParams, uniform, weights

# More than any vocabulary has, and exact in float64.
MAX_TOP_K = 2**31


def samples_on_device(params: SamplingParams) -> bool:
    """Whether `sample_batch` can choose these tokens; otherwise the row goes to the host, to `sample`.

    Penalties need the `History`, which the host keeps and which grows by the token that was just chosen. A bias
    is a dict of any size, one for each sequence. Log-probabilities are reported, so the host needs the row anyway.
    """
    return not params.penalizes and not params.logit_bias and params.logprobs is None


class BatchParams(NamedTuple):
    """The parameters of B sequences, as `sample_batch` reads them; made by `batch_params`.

    The tensors are `[B]` and lie on the logits' device. The plain values say what the batch needs at all: they
    choose the operations and their shapes, as a CUDA graph's key would.

    Attributes:
        greedy_B: bool, takes the likeliest token.
        temperature_B: float32, what the logits are divided by; 1 where greedy.
        top_k_B: int64; 0 is off.
        top_p_B: float64; 1 is off.
        log_min_p_B: float32, the logarithm of min_p; -inf is off.
        draws: anybody is not greedy.
        largest: how many of the largest logits top_k looks at; 0 where nobody uses it.
        top_p: anybody uses top_p.
        min_p: anybody uses min_p.
    """

    greedy_B: Tensor
    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    log_min_p_B: Tensor
    draws: bool
    largest: int
    top_p: bool
    min_p: bool


def batch_params(params: Sequence[SamplingParams], device: torch.device | str) -> BatchParams:
    """The parameters of a batch, in one transfer to `device` that the host does not wait for.

    Raises:
        ValueError: one of them needs the host; see `samples_on_device`.
    """
    if not all(map(samples_on_device, params)):
        raise ValueError("penalties, logit_bias and logprobs need the host")
    off = SamplingParams(temperature=1.0)
    rows = [off if one.greedy else one for one in params]  # greedy rows ask for nothing
    top_k = min(max((one.top_k for one in rows), default=0), MAX_TOP_K)
    table = torch.tensor(
        [
            [float(one.greedy) for one in params],
            [min(one.temperature, MAX_DIVISOR) for one in rows],
            [min(one.top_k, MAX_TOP_K) for one in rows],
            [one.top_p for one in rows],
            [math.log(one.min_p) if one.min_p > 0.0 else -math.inf for one in rows],
        ],
        dtype=torch.float64,
    )
    greedy_B, temperature_B, top_k_B, top_p_B, log_min_p_B = _send(table, torch.device(device))
    return BatchParams(
        greedy_B.bool(),
        temperature_B.float(),
        top_k_B.long(),
        top_p_B,
        log_min_p_B.float(),
        draws=not all(one.greedy for one in params),
        largest=next(size for size in (0, *FEW, MAX_TOP_K) if top_k <= size),
        top_p=any(one.top_p < 1.0 for one in rows),
        min_p=any(one.min_p > 0.0 for one in rows),
    )


def uniforms(
    params: Sequence[SamplingParams], generators: Sequence[torch.Generator], *, pinned: bool = False
) -> Tensor:
    """One random number for each sequence, float64 `[B]` on the CPU: what `sample` would draw from its generator.

    A greedy sequence's generator is left as it is, and its number means nothing. `pinned` memory (needs CUDA) can be
    copied to a card while the host goes on.
    """
    u_B = torch.full((len(params),), 0.5, dtype=torch.float64, pin_memory=pinned)
    for row, (one, generator) in enumerate(zip(params, generators, strict=True)):
        if not one.greedy:
            u_B[row : row + 1] = uniform(generator)
    return u_B


def sample_batch(logits_BV: Tensor, how: BatchParams, u_B: Tensor) -> tuple[Tensor, Tensor]:
    """One token id for each row of logits, on their device; the host never waits for it.

    A row's id is the one `sample` gives with the same parameters and random number, whatever rows stand beside it:
    bit for bit on a CPU. A card adds in another order and has an exponential of its own, so there the edges of a
    nucleus and of a draw may move by a rounding of float64. Equal logits still count as equal.

    No operation's shape depends on a tensor's values. `how`'s plain values choose the operations.

    Args:
        logits_BV: float `[B, V]`; left as they are.
        how: from `batch_params`.
        u_B: float64 `[B]` in [0, 1), from `uniforms`; on the logits' device, or pinned.

    Returns:
        ids_B: int64.
        ok_B: bool; false where `sample` would raise an error. The id is then any of the vocabulary.
    """
    logits_BV = logits_BV.float()
    best_B = logits_BV.argmax(-1)  # the first of equals
    max_B1 = logits_BV.amax(-1, keepdim=True)
    ok_B = max_B1.squeeze(1).isfinite()  # NaN and +inf both show in the maximum
    if not how.draws:
        return best_B, ok_B
    sorted_BV = _largest(logits_BV, how)
    if how.largest:
        kth_B1 = _kth(sorted_BV, how.top_k_B[:, None], logits_BV.shape[-1])
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    scaled_BV, sorted_BV = ((some - max_B1) / how.temperature_B[:, None] for some in (logits_BV, sorted_BV))
    if how.top_p:
        scaled_BV = _keep_nuclei(scaled_BV, sorted_BV, how.top_p_B[:, None])
    if how.min_p:  # the largest is 0
        scaled_BV = scaled_BV.masked_fill(scaled_BV < how.log_min_p_B[:, None], -torch.inf)
    drawn_B = _draw_batch(scaled_BV, u_B.to(scaled_BV.device, non_blocking=True)[:, None], best_B)
    return torch.where(how.greedy_B, best_B, drawn_B), ok_B


def _send(table: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; a card's copy runs from pinned memory while the host goes on."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def _largest(logits_BV: Tensor, how: BatchParams) -> Tensor:
    """The largest logits of each row in falling order: all for top_p, some for top_k, none for neither."""
    if how.top_p:
        return logits_BV.sort(-1, descending=True).values
    if not how.largest:
        return logits_BV[:, :0]
    return logits_BV.topk(min(how.largest, logits_BV.shape[-1])).values


def _kth(sorted_BV: Tensor, k_B1: Tensor, n_vocab: int) -> Tensor:
    """The k-th largest logit of each row; -inf where `filter_top_k` would drop nothing."""
    kth_B1 = sorted_BV.gather(-1, (k_B1 - 1).clamp(0, sorted_BV.shape[-1] - 1))
    return kth_B1.where((k_B1 > 0) & (k_B1 < n_vocab), -torch.inf)


def _keep_nuclei(scaled_BV: Tensor, sorted_BV: Tensor, p_B1: Tensor) -> Tensor:
    """`filter_top_p` for each row; `sorted_BV` holds the row in falling order, with what top_k dropped at its end."""
    total_B1 = weights(scaled_BV).cumsum(-1)[:, -1:]
    short_BV = weights(sorted_BV).cumsum(-1) / total_B1 < p_B1
    last_B1 = short_BV.sum(-1, keepdim=True).clamp(max=sorted_BV.shape[-1] - 1)  # of the nucleus, its place
    edge_B1 = sorted_BV.gather(-1, last_B1)
    above_BV, at_edge_BV = scaled_BV > edge_B1, scaled_BV == edge_B1
    n_at_edge_B1 = last_B1 + 1 - above_BV.sum(-1, keepdim=True)
    keep_BV = above_BV | (at_edge_BV & (at_edge_BV.cumsum(-1) <= n_at_edge_B1)) | (p_B1 >= 1.0)
    return scaled_BV.masked_fill(~keep_BV, -torch.inf)


def _draw_batch(scaled_BV: Tensor, u_B1: Tensor, best_B: Tensor) -> Tensor:
    """`_draw` for each row; `best_B` where nothing can be drawn, as the row is NaN throughout."""
    weights_BV = weights(scaled_BV)
    cumulative_BV = weights_BV.cumsum(-1)
    # A card adds in pieces: its sum may waver by a rounding where weights are 0, and these must not be drawn.
    beyond_BV = (cumulative_BV > u_B1 * cumulative_BV[:, -1:]) & (weights_BV > 0.0)
    return beyond_BV.byte().argmax(-1).where(beyond_BV.any(-1), best_B)
