"""Experts of which a card holds some: a pool of whole experts there, and all others in page-locked host memory.

A miss is copied into a slot of the pool while the card computes, or computed by the CPU from the same bytes: with
low-bit weights both give the same bits, so that neither what is in the pool nor the choice changes a token. Sums of
bfloat16 weights depend on who adds them up; these are always copied.
"""

from __future__ import annotations

import os
import statistics
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from octavo.errors import OptionError
from octavo.experts.cache import ExpertCache
from octavo.experts.cost import CostModel, choose
from octavo.experts.host import HostExpert, HostExperts, Kinds, host_expert, lock_pages, parts_on_cpu, unlock_pages
from octavo.experts.link import Link, Mark, Staging
from octavo.experts.slots import CacheCounters, Key, LayerCounters, Slot, Slots
from octavo.kernels.backend import native
from octavo.kernels.card import ExpertTable, activations, combine, described, moe_into
from octavo.kernels.memory import taking
from octavo.plan import show_size
from octavo.plan_card import CardPlacement

__all__ = [
    "CachedExperts",
    "CardCache",
    "CardSlot",
    "CostModel",
    "HostExpert",
    "HostExperts",
    "choose",
    "host_expert",
    "measure",
]

ALIGNMENT = 256  # bytes, of a slot's address
MEASURED = (1, 16)  # tokens that the CPU computes an expert for, to measure what one costs it
SAMPLES = 5  # experts that are copied, and computed with, to measure either

Addresses = list[list[int]]
"""Of w1, w3 and w2 of each expert of a layer."""
NOWHERE = [0, 0, 0]


# ---------------------------------------- the pool


@dataclass(eq=False, kw_only=True)
class CardSlot(Slot):
    """Memory on the card for one expert.

    Attributes:
        data: uint8.
        addresses: of the three matrices.
        arrived: the end of the copy, until somebody has waited for it.
        over: the end of the last computation with it.
    """

    data: Tensor
    addresses: list[int]
    arrived: Mark = None
    over: Mark = None


class CardCache(ExpertCache):
    """Experts on a card, as far as there is room; all but the pinned ones lie in page-locked host memory.

    Args:
        experts: all of them. Each is asked for once; pinned ones are not kept.
        kinds: of each expert's matrices.
        placement: how many there is room for, and which stay.
        device: the card, or a CPU, where all of it works too.
        misses: "copy" or "cpu" to do nothing else with experts that are missing.
        cost: what either costs; by default measured now.

    Attributes:
        nbytes: of the card's memory.
        host_nbytes: of host memory.
        expert_nbytes: of one.

    Raises:
        OptionError: experts are of other kinds; there is no slot; or the CPU cannot compute them to the same bits.
        ResourceError: there is not as much memory.

    Not thread-safe: one thread asks, and computes on one stream.
    """

    def __init__(
        self,
        experts: Mapping[Key, HostExpert],
        kinds: Kinds,
        placement: CardPlacement,
        device: torch.device | str,
        *,
        misses: Literal["choose", "copy", "cpu"] = "choose",
        cost: CostModel | None = None,
    ) -> None:
        self.placement, self.kinds, self.device = placement, kinds, torch.device(device)
        self.expert_nbytes = sum(kind.nbytes for kind in kinds)
        self._low_bit = all(kind.format is not None for kind in kinds)
        if misses == "cpu" and not self.computes_on_cpu:
            raise OptionError(
                'misses is "cpu"; the CPU computes low-bit experts alone to the same bits, by its compiled kernels',
                hint='misses="copy"',
            )
        self.misses, self.cost = misses, cost
        self._layers = {layer: LayerCounters() for layer, _ in sorted(experts)}
        pinned = [key for key in experts if key in placement.pinned]
        self.n_slots = min(placement.slots, len(experts) - len(pinned))
        if self.n_slots < 1 and len(pinned) < len(experts):
            raise OptionError("the card has no slot for experts that are not pinned", hint="give 1 slot or more")
        self.link = Link(self.device)
        self.staging = Staging(self.link)
        slots = list(self._make_slots(self.n_slots + len(pinned)))
        self._pinned = dict(zip(pinned, slots[self.n_slots :], strict=True))
        self._slots = Slots(slots[: self.n_slots])
        self._host: dict[Key, HostExpert] = {}
        self._locked: list[Tensor] = []
        self._finalizer = weakref.finalize(self, _let_go, self.link, self._locked)
        self._finalizer.atexit = False
        self._fill(experts)
        self._held: list[CardSlot] = []
        self._worker = ThreadPoolExecutor(1, "octavo-experts")
        self._process = os.getpid()
        if misses == "choose" and cost is None and self.computes_on_cpu and self._host:
            self.cost = measure(self)

    def _make_slots(self, n: int) -> Iterator[CardSlot]:
        """Memory for so many experts."""
        step = -(-self.expert_nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = n * step
        with taking("experts", self.nbytes, self.device):
            memory = torch.empty(self.nbytes + ALIGNMENT, dtype=torch.uint8, device=self.device)
        first = -memory.data_ptr() % ALIGNMENT
        _, w3, w2 = (sum(kind.nbytes for kind in self.kinds[:i]) for i in range(3))
        for at in range(first, first + self.nbytes, step):
            data = memory[at : at + self.expert_nbytes]
            begin = data.data_ptr()
            yield CardSlot(data=data, addresses=[begin, begin + w3, begin + w2])

    def _fill(self, experts: Mapping[Key, HostExpert]) -> None:
        for key in experts:
            expert = experts[key]
            if expert.kinds != self.kinds:
                raise OptionError(
                    f"expert {key[1]} of layer {key[0]} is {', '.join(map(described, expert.kinds))}; expected "
                    f"{', '.join(map(described, self.kinds))}, as others are",
                    hint="quantise all experts alike, or give the card room for all of them",
                )
            if key in self._pinned:
                self._pinned[key].data.copy_(expert.data)
            else:
                lock_pages(expert.data, self.device)
                self._locked.append(expert.data)
                self._host[key] = expert
        self.host_nbytes = len(self._host) * self.expert_nbytes

    @property
    def computes_on_cpu(self) -> bool:
        """Whether the CPU computes these experts to the same bits."""
        return self._low_bit and native() is not None

    @property
    def counters(self) -> CacheCounters:
        """What happened so far; a view that goes on counting."""
        self.link.count_waits()
        return super().counters

    def holds(self, key: Key) -> bool:
        """Whether an expert is on the card, or on its way there."""
        return key in self._pinned or key in self._slots

    def has_arrived(self, key: Key) -> bool:
        """Whether an expert is on the card, and nobody needs to wait for it."""
        slot = self._pinned.get(key) or self._slots.get(key)
        return slot is not None and self.link.is_past(slot.arrived)

    def addresses(self, layer: int, numbers: Iterable[int], but: Sequence[int] = ()) -> Addresses:
        """Where the matrices of experts lie, or will soon; NOWHERE for those of ``but`` and those not on the card."""
        slots = (
            None if number in but else self._pinned.get((layer, number)) or self._slots.get((layer, number))
            for number in numbers
        )
        return [NOWHERE if slot is None else slot.addresses for slot in slots]

    def take(self, key: Key) -> CardSlot | None:
        """Ask for an expert, which is then being copied if it is missing; None where every slot is in use.

        What is taken stays until it is given back. Wait for its ``arrived`` before computing with it.
        """
        counters = self._layers[key[0]]
        slot = self._pinned.get(key)
        if slot is not None:
            counters.ask(self.expert_nbytes, self.expert_nbytes)
            return slot
        slot = self._slots.get(key)
        found = slot is not None and not slot.ahead
        if slot is None:
            slot = self._slots.make_room(counters, ahead=False)
            if slot is None:
                return None
            self._copy(slot, key, ahead=False)
        self._slots.use(slot)
        counters.ask(self.expert_nbytes, self.expert_nbytes * found)
        return slot

    def prefetch(self, key: Key) -> bool:
        """Begin to copy an expert that will be asked for soon; False where there is no room for it."""
        if self.holds(key):
            return True
        slot = self._slots.make_room(self._layers[key[0]], ahead=True)
        if slot is None:
            return False
        self._copy(slot, key, ahead=True)
        return True

    def prefetch_all(self, keys: Sequence[Key]) -> None:
        """Begin to copy experts that will be asked for soon, as far as there is room that none of them has."""
        there = [slot for key in keys if (slot := self._slots.get(key)) is not None]
        for slot in there:
            slot.users += 1
        try:
            all(self.prefetch(key) for key in keys)  # up to the first for which there is no room
        finally:
            for slot in there:
                slot.users -= 1

    def end_layer(self, layer: int) -> None:
        """Say that nothing more is asked for in a layer: what was copied ahead for it in vain is like all else now."""
        self._slots.end_layer(layer)

    def wait(self, slots: Iterable[CardSlot]) -> None:
        """Let the current stream wait until experts have arrived."""
        for slot in slots:
            self.link.wait(slot.arrived)
            slot.arrived = None

    def give_back(self, slots: Sequence[CardSlot]) -> None:
        """Say that all that uses these experts was given to the current stream."""
        over = self.link.mark() if slots else None
        for slot in slots:
            if slot.key is not None:  # pinned ones need no keeping
                slot.users -= 1
                slot.over = over

    def hold(self, slots: Sequence[CardSlot]) -> None:
        """Keep experts for what the current stream is about to be given, until `settle`."""
        self._held += slots

    def settle(self) -> None:
        """Give back what was held: the current stream has been given all that uses it."""
        held, self._held = self._held, []
        self.give_back(held)

    def for_cpu(self, missing: Sequence[tuple[int, int]]) -> set[int]:
        """Which of a layer's missing experts the CPU should compute.

        Args:
            missing: numbers of experts, and of the tokens that chose each.
        """
        if self.misses == "cpu":
            return {number for number, _ in missing}
        if self.misses == "copy" or self.cost is None or not self.computes_on_cpu:
            return set()
        return choose(missing, self.expert_nbytes, self.cost)

    def compute(
        self, layer: int, numbers: Iterable[int], x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor
    ) -> Future[tuple[Tensor, Tensor]]:
        """Begin to compute some of a layer's experts on the CPU; all tensors are there.

        Returns:
            Of the choices that name them, numbered t * K + k: the numbers N, and what they add to their tokens, float32
            [N, D].
        """
        counters, experts = self._layers[layer], {number: self._host[layer, number] for number in numbers}
        for _ in experts:
            counters.ask(self.expert_nbytes, 0)
            counters.computed += 1
        return self._worker.submit(parts_on_cpu, experts, x_TD, topk_ids_TK, topk_weights_TK)

    def check_process(self) -> None:
        """Raise OptionError in a process that was forked from the one that made the cache."""
        if os.getpid() != self._process:
            raise OptionError(
                "this process was forked from the one that loaded the model, whose threads and card hold the experts",
                hint="load the model in the process that uses it",
            )

    def close(self) -> None:
        """Wait for copies and for the CPU; nothing can be asked for afterwards."""
        self._worker.shutdown()
        self._finalizer()

    def _copy(self, slot: CardSlot, key: Key, *, ahead: bool) -> None:
        try:
            slot.arrived = self.link.copy(slot.data, self._host[key].data, slot.over)
        except BaseException:
            self._slots.free(slot)
            raise
        self._slots.put(slot, key, ahead=ahead)
        self._layers[key[0]].nbytes += self.expert_nbytes

    def _measured_copy(self, key: Key) -> float:
        """Seconds of a copy of one expert to a free slot."""
        slot = self._slots.make_room(LayerCounters(), ahead=False)
        if slot is None:
            raise OptionError("every slot is in use; nothing can be measured", hint="measure between two steps")
        try:
            began = time.perf_counter()
            self.link.copy(slot.data, self._host[key].data, slot.over)
            self.link.finish()
            return time.perf_counter() - began
        finally:
            self._slots.free(slot)

    def _measured_cpu(self, key: Key, tokens: int) -> float:
        """Seconds in which the CPU computes one expert for some tokens."""
        x_TD = torch.randn(tokens, self.kinds[0].cols).to(torch.bfloat16)
        ids, weights, experts = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1), {0: self._host[key]}
        began = time.perf_counter()
        parts_on_cpu(experts, x_TD, ids, weights)
        return time.perf_counter() - began


def _let_go(link: Link, locked: Sequence[Tensor]) -> None:
    link.finish()
    unlock_pages(locked, link.device)


def measure(cache: CardCache) -> CostModel:
    """Measure what a missing expert costs, on the real link and with real experts: some milliseconds.

    Args:
        cache: between two steps. A slot is needed for copies; where none is free, the one used longest ago is.

    Raises:
        OptionError: every slot is in use, or no expert is in host memory.
    """
    keys = list(cache._host)[: SAMPLES + 1]
    if not keys:
        raise OptionError("every expert is on the card; there is nothing to measure")
    keys = (keys * (SAMPLES + 1))[: SAMPLES + 1]
    link = cache.expert_nbytes / max(1e-9, statistics.median([cache._measured_copy(key) for key in keys][1:]))
    if not cache.computes_on_cpu:
        return CostModel(link, float("inf"), 0.0)
    few, many = (statistics.median([cache._measured_cpu(key, tokens) for key in keys][1:]) for tokens in MEASURED)
    token = max(0.0, (many - few) / (MEASURED[1] - MEASURED[0]))
    return CostModel(link, max(0.0, few - token * MEASURED[0]), token)


# ---------------------------------------- the model's seam


class _Demand(NamedTuple):
    """What tokens ask of a layer, by numbers of experts.

    Attributes:
        there: on the card.
        lacking: on their way, or to be copied.
        on_cpu: to be computed by the CPU.
    """

    there: list[int]
    lacking: list[int]
    on_cpu: set[int]


class CachedExperts(nn.Module):
    """All experts of a layer, copied to the card or computed by the CPU when tokens choose them.

    Answers the call of `octavo.model.Experts`.

    Args:
        layer: its number.
        n_experts: how many it has.
        cache: of all layers.

    Attributes:
        table: where experts lie now; its addresses stay in the same tensor.
    """

    def __init__(self, layer: int, n_experts: int, cache: CardCache) -> None:
        super().__init__()
        self.layer, self.n_experts, self.cache = layer, n_experts, cache
        self._written = [NOWHERE] * n_experts
        self.table = ExpertTable(cache.kinds, torch.zeros(n_experts, 3, dtype=torch.int64, device=cache.device))

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Return y_TD: the weighted sum of the chosen experts, the same bits as with all of them on the card.

        Raises:
            OptionError: this process was forked from the one that loaded the model.
        """
        cache, ids_TK = self.cache, topk_ids_TK.cpu()
        wanted, counters = self._demand(ids_TK), cache.counters.layers[self.layer]
        if wanted.on_cpu:
            computing = cache.compute(self.layer, wanted.on_cpu, x_TD.cpu(), ids_TK, topk_weights_TK.cpu())
        parts_TKD = torch.zeros(*ids_TK.shape, x_TD.shape[1], device=x_TD.device)
        ready = activations(x_TD, *cache.kinds[:2])
        with closing(self._groups(wanted, len(x_TD))) as groups:
            for group, addresses in groups:
                self._write(addresses)
                with cache.link.waiting(counters) if any(slot.arrived for slot in group) else nullcontext():
                    cache.wait(group)
                moe_into(parts_TKD, ready, topk_ids_TK, topk_weights_TK, self.table)
        if wanted.on_cpu:
            with cache.link.waiting(counters):
                self._put(parts_TKD, *computing.result())
        cache.end_layer(self.layer)
        return combine(parts_TKD, x_TD)

    def begin(
        self, topk_ids_TK: Tensor, x_TD: Callable[[], Tensor], topk_weights_TK: Tensor, parts_TKD: Tensor
    ) -> None:
        """Make one step ready: afterwards the current stream may compute with all that is in ``table``.

        What `moe_into` then does not compute is in ``parts_TKD``. Experts stay until the next call to any layer.

        Args:
            topk_ids_TK: int64, on the CPU.
            x_TD: gives the tokens, on the CPU; called where some experts are computed there.
            topk_weights_TK: float32, on the CPU.
            parts_TKD: float32, contiguous, on the card.

        Raises:
            OptionError: the tokens chose more experts than there are slots, which `forward` can do; or this process
                was forked from the one that loaded the model.
        """
        cache, wanted, slots = self.cache, self._demand(topk_ids_TK), list[CardSlot]()
        counters, lacking = cache.counters.layers[self.layer], wanted.lacking or wanted.on_cpu
        try:
            with cache.link.waiting(counters) if lacking else nullcontext():
                for number in wanted.there + wanted.lacking:
                    slots.append(self._take(number))
                if wanted.on_cpu:
                    computing = cache.compute(self.layer, wanted.on_cpu, x_TD(), topk_ids_TK, topk_weights_TK)
                self._write(cache.addresses(self.layer, range(self.n_experts)))
                cache.wait(slots)
                if wanted.on_cpu:
                    self._put(parts_TKD, *computing.result())
        except BaseException:
            cache.give_back(slots)
            raise
        cache.hold(slots)
        cache.end_layer(self.layer)

    def _demand(self, ids_TK: Tensor) -> _Demand:
        cache = self.cache
        cache.check_process()
        cache.settle()
        tokens = Counter(ids_TK.flatten().tolist())
        numbers = [number for number in sorted(tokens) if 0 <= number < self.n_experts]
        there = [number for number in numbers if cache.has_arrived((self.layer, number))]
        coming = [number for number in numbers if number not in there and cache.holds((self.layer, number))]
        missing = [number for number in numbers if number not in there and number not in coming]
        on_cpu = cache.for_cpu([(number, tokens[number]) for number in missing]) if missing else set()
        return _Demand(there, coming + [number for number in missing if number not in on_cpu], on_cpu)

    def _groups(self, wanted: _Demand, n_tokens: int) -> Generator[tuple[list[CardSlot], Addresses]]:
        """Experts to compute with at once, and a table of them: those that are there, then each as it arrives.

        Meanwhile others are copied, as far as there are slots.
        """
        cache, numbers = self.cache, range(self.n_experts)
        taken, todo = deque[CardSlot](), deque(wanted.lacking)
        n_chosen = len(wanted.there) + len(wanted.lacking) + len(wanted.on_cpu)
        is_prompt = n_chosen == self.n_experts < n_tokens
        group = [self._take(number) for number in wanted.there]
        addresses = cache.addresses(self.layer, numbers, but=wanted.lacking)
        try:
            while group or taken or todo:
                if not group:
                    group = [taken.popleft() if taken else self._take(todo.popleft())]
                    addresses = [group[0].addresses if group[0].key == (self.layer, n) else NOWHERE for n in numbers]
                while todo and (slot := cache.take((self.layer, todo[0]))) is not None:
                    taken.append(slot)
                    todo.popleft()
                if not todo and is_prompt:
                    self._read_ahead()
                yield group, addresses
                cache.give_back(group)
                group = []
            if is_prompt:  # there are slots for more of it now
                self._read_ahead()
        finally:
            cache.give_back([*group, *taken])

    def _read_ahead(self) -> None:
        """Of a prompt that chose every expert here, surely nearly every one of the next layer is needed."""
        if self.cache.misses != "cpu" and self.cache.has_layer(self.layer + 1):
            self.cache.prefetch_all([(self.layer + 1, number) for number in range(self.n_experts)])

    def _take(self, number: int) -> CardSlot:
        slot = self.cache.take((self.layer, number))
        if slot is None:
            raise OptionError(
                f"the tokens chose more experts at once than the {self.cache.n_slots} slots on the card hold",
                hint="fewer sequences side by side, or more of the card's memory for experts",
            )
        return slot

    def _write(self, addresses: Addresses) -> None:
        """Change the table, on the current stream."""
        if addresses != self._written:
            self.cache.staging.send(torch.tensor(addresses), self.table.addresses_E3)
            self._written = addresses

    def _put(self, parts_TKD: Tensor, choices: Tensor, values: Tensor) -> None:
        """Put what the CPU computed in its place, on the current stream."""
        staging = self.cache.staging
        parts_TKD.view(-1, parts_TKD.shape[-1]).index_copy_(0, staging.to_card(choices), staging.to_card(values))

    def extra_repr(self) -> str:
        """Number, shape and format, and the share of the card, for print(model)."""
        return (
            f"{self.n_experts} x {described(self.cache.kinds[0])}; {show_size(self.cache.nbytes)} on the card for all "
            f"layers"
        )
