"""Decode steps of static shape, for a device that the host must not keep waiting: a GPU.

A step's tensors have the shape of a bucket, of rows and of slots; what differs from one step to the next lies in
tensors that are written to. So a step is captured as a CUDA graph the second time its bucket comes up, and replayed
from then on: launching hundreds of kernels one by one takes longer than computing them. Where some experts are not on
the card, there is a graph for each layer, and between two of them the host decides what to copy.

On a CPU everything happens in the same way, but for graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.cache import KVCache, StaticStep
from octavo.card import CardBlock, hooks_of
from octavo.experts.card import CachedExperts
from octavo.kernels.card import Activations, Chosen
from octavo.kernels.memory import taking
from octavo.model import Mixtral, rotary_embedding
from octavo.sampling_batch import BatchParams, sample_batch

SLOTS = 256  # of the smallest bucket


class _Wanted(NamedTuple):
    """A layer's tokens and their experts, which the host makes ready."""

    experts: CachedExperts
    a: Activations
    chosen: Chosen
    parts_TKD: Tensor


Run = Callable[[], Tensor]


class Decoder:
    """Next-token logits of one token for each of the first rows of a cache.

    Args:
        model: on one device.
        cache: made at its full size: its tensors never change their place.
    """

    def __init__(self, model: Mixtral, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._device, rows = model.device, len(cache.lengths)
        self._ids_B = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._lengths_B = torch.zeros(rows, dtype=torch.int64, device=self._device)
        self._live_B = torch.zeros(rows, dtype=torch.bool, device=self._device)
        caches = [module.cache for module in model.modules() if isinstance(module, CachedExperts)]
        self._cached = bool(caches)
        # So many rows' experts have a slot each, whichever they choose; of more, layers compute in groups.
        moe = model.args.moe
        self._most = caches[0].n_slots // moe.num_experts_per_tok if caches and moe else rows
        if moe and caches and caches[0].n_slots >= moe.num_experts:
            self._most = rows
        self._hooks = [found for module in model.modules() for found in hooks_of(module)]
        self._runs: dict[tuple[int, int], Run | None] = {}  # None: came up once
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

    def is_usable(self) -> bool:
        """Whether nobody has hooks on a module: a graph would pass them over."""
        return not any(self._hooks)

    def step(self, ids_B: Tensor) -> Tensor:
        """Feed a token to each of the first rows.

        Args:
            ids_B: int64, on the device.

        Returns:
            float32 logits [B, V] on the device, which the next step overwrites.

        Raises:
            ResourceError: the card has too little memory for a graph.
        """
        n, lengths = len(ids_B), self._cache.lengths
        rows = self._n_rows(n)
        bucket = (rows, self._n_slots(max(lengths[:rows]) + 1))
        sent = send([lengths[:rows], [row < n for row in range(rows)]], torch.int64, self._device)
        self._ids_B[:n] = ids_B
        self._ids_B[n:rows] = 0
        self._lengths_B[:rows] = sent[0]
        self._live_B[:rows] = sent[1]
        logits_BV = self._run(bucket)
        for row in range(n):
            lengths[row] += 1
        return logits_BV[:n]

    def _run(self, bucket: tuple[int, int]) -> Tensor:
        """Capture a step the second time: the first one has compiled its kernels, and is as good as any."""
        if self._device.type != "cuda" or bucket not in self._runs or bucket[0] > self._most:
            self._runs[bucket] = None
            return self._eager(bucket)
        run = self._runs[bucket]
        if run is None:
            with taking("workspace", 0, self._device):
                run = self._runs[bucket] = self._captured(bucket)
        return run()

    def _eager(self, bucket: tuple[int, int]) -> Tensor:
        forward = self._forward(bucket)
        while True:
            try:
                _make_ready(next(forward))
            except StopIteration as end:
                logits: Tensor = end.value
                return logits

    def _captured(self, bucket: tuple[int, int]) -> Run:
        """The step as graphs, and what the host has to do between them."""
        forward, graphs, wanted = self._forward(bucket), list[torch.cuda.CUDAGraph](), list[_Wanted]()
        logits: Tensor | None = None
        torch.cuda.synchronize(self._device)
        while logits is None:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=self._pool, capture_error_mode="thread_local"):
                try:
                    wanted.append(next(forward))
                except StopIteration as end:
                    logits = end.value
        found: Tensor = logits

        def run() -> Tensor:
            for graph, one in zip(graphs, wanted, strict=False):  # one graph more than there are pauses
                graph.replay()
                _make_ready(one)
            graphs[-1].replay()
            return found

        return run

    def _forward(self, bucket: tuple[int, int]) -> Generator[_Wanted, None, Tensor]:
        """The model's forward, with pauses where the host is wanted; returns logits [B, V]."""
        rows, slots = bucket
        step = StaticStep(self._cache, slots, self._lengths_B[:rows], self._live_B[:rows])
        ids_B1 = self._ids_B[:rows, None]
        if not self._cached or rows > self._most:
            logits_B1V: Tensor = self._model(ids_B1, cache=_Begun(step))
            return logits_B1V[:, -1]
        model, args = self._model, self._model.args
        rotation = rotary_embedding(step.positions_BT, args.head_dim, args.rope_theta)
        x_TD = model.tok_embeddings(ids_B1).flatten(0, 1)
        for layer, block in enumerate(_blocks(model)):
            x_TD, a, chosen = block.route(x_TD, block.attend(x_TD, rotation, step.memory, layer))
            parts_TKD = x_TD.new_zeros(*chosen.topk_ids_TK.shape, x_TD.shape[1], dtype=torch.float32)
            yield _Wanted(block.feed_forward.experts, a, chosen, parts_TKD)  # type: ignore[arg-type]
            x_TD = block.add_up(x_TD, a, chosen, parts_TKD)
        logits: Tensor = model.output(model.norm(x_TD)).float()
        return logits

    def _n_rows(self, n: int) -> int:
        """Rows of a bucket: 1, 2, 3, 4, 6, 8, 12...; as many as there are, where each would want experts copied."""
        if self._cached:
            return n
        power = 1 << max(0, n - 1).bit_length()
        return min(power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power, len(self._cache.lengths))

    def _n_slots(self, n: int) -> int:
        """Slots of a bucket; all of a ring that begins anew."""
        capacity = self._cache.capacity
        return min(max(SLOTS, 1 << (n - 1).bit_length()), capacity)


class Launched(NamedTuple):
    """A step that is under way.

    Attributes:
        sequences: whose tokens it chooses, row after row.
        ids_B: the tokens, on the device.
        found: tokens, and 1 where there was one to choose (else 0), int64 [2, B] on the CPU, once it is over.
        over: the step's end; None where it is over.
    """

    sequences: Sequence[Any]
    ids_B: Tensor
    found: Tensor
    over: torch.cuda.Event | None

    def tokens(self) -> list[tuple[int, bool]]:
        """Wait for the step; each row's token, and whether there was one to choose."""
        if self.over is not None:
            self.over.synchronize()
        return [(token, ok != 0) for token, ok in zip(*self.found.tolist(), strict=True)]


def launch(
    decoder: Decoder,
    sequences: Sequence[Any],
    ids_B: Tensor,
    params: BatchParams,
    uniforms_B: Tensor,
) -> Launched:
    """Begin a step that also chooses tokens, on the device, and wait for nothing.

    Args:
        decoder: for the first rows.
        sequences: that these belong to.
        ids_B: int64, on the device, the tokens to feed.
        params: how to choose.
        uniforms_B: float64, a random number for each.
    """
    device = ids_B.device
    chosen_B, ok_B = sample_batch(decoder.step(ids_B), params, uniforms_B.to(device, non_blocking=True))
    found = torch.stack((chosen_B, ok_B.to(torch.int64)))
    if device.type != "cuda":
        return Launched(sequences, chosen_B, found, None)
    on_host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    on_host.copy_(found, non_blocking=True)
    over = torch.cuda.Event()  # type: ignore[no-untyped-call]
    over.record()
    return Launched(sequences, chosen_B, on_host, over)


class _Begun:
    """In the place of a cache, for the forward of a step that has begun."""

    def __init__(self, step: StaticStep) -> None:
        self._step = step

    def begin(self, tokens: int, positions_BT: Tensor | None = None) -> StaticStep:
        return self._step


def _blocks(model: Mixtral) -> Iterator[CardBlock]:
    for block in model.layers:
        if not isinstance(block, CardBlock):
            raise TypeError("experts are cached on a card for blocks of the card alone")
        yield block


def _make_ready(wanted: _Wanted) -> None:
    experts, a, chosen, parts_TKD = wanted
    experts.begin(chosen.topk_ids_TK.cpu(), a.x.cpu, chosen.topk_weights_TK.cpu(), parts_TKD)


def send(values: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor on the device, without waiting for what it computes."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
