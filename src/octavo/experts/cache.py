"""One pool of slots for the experts of all layers, with a budget in bytes.

Some experts may be pinned; of the others, the one that was used longest ago makes room. Nothing in here knows what
an expert computes.
"""

from __future__ import annotations

import mmap
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.errors import OptionError
from octavo.experts.reader import Reader, joined, pages
from octavo.plan import PASSING
from octavo.storage.files import Place

Key = tuple[int, int]
"""Layer and number of an expert."""


@dataclass
class LayerCounters:
    """What happened in one layer.

    Attributes:
        hits, misses: experts that were there when they were asked for, and that were not.
        evictions: experts that made room for one of this layer.
        nbytes: read.
        wait_seconds: spent waiting for reads.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    nbytes: int = 0
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class CacheCounters:
    """What happened, by layer, since the cache was made.

    Attributes:
        layers: by number.
    """

    layers: Mapping[int, LayerCounters]

    @property
    def total(self) -> LayerCounters:
        """All layers together."""
        sums = LayerCounters()
        for one in self.layers.values():
            for name, value in vars(one).items():
                setattr(sums, name, getattr(sums, name) + value)
        return sums

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were there; 0 where none were."""
        total = self.total
        return total.hits / max(1, total.hits + total.misses)


@dataclass(eq=False)
class Slot:
    """A place in memory, and the expert that is or will be there.

    Attributes:
        key: whose.
        tensors: uint8, the bytes of each matrix.
    """

    memory: memoryview
    key: Key | None = None
    tensors: list[Tensor] = field(default_factory=list)
    reads: list[Future[None]] = field(default_factory=list)
    users: int = 0


class ExpertCache:
    """Experts in memory, as many as a budget holds.

    Args:
        places: where each expert's matrices lie.
        budget: bytes for all slots.
        pinned: experts that stay once they are there.

    Raises:
        OptionError: the budget holds less than two experts, or no more than the pinned ones and one.

    Not thread-safe: one thread asks; reads run on threads of their own.
    """

    def __init__(self, places: Mapping[Key, Sequence[Place]], budget: int, pinned: Collection[Key] = ()) -> None:
        self._places = {key: tuple(of_expert) for key, of_expert in places.items()}
        self.slot_nbytes = max(map(_slot_nbytes, self._places.values()))
        self.n_slots = min(budget // self.slot_nbytes, len(self._places))
        self.pinned = frozenset(pinned)
        if self.n_slots < min(PASSING, len(self._places)):
            raise OptionError(
                f"{budget} bytes hold {self.n_slots} experts of {self.slot_nbytes}; at least {PASSING} are needed",
                hint=f"give {PASSING * self.slot_nbytes} bytes or more",
            )
        if len(self.pinned) >= self.n_slots and len(self._places) > self.n_slots:
            raise OptionError(
                f"{len(self.pinned)} experts are pinned, and there are {self.n_slots} slots",
                hint="leave one slot at least to the others",
            )
        self._mapping = mmap.mmap(-1, self.n_slots * self.slot_nbytes)  # takes memory as it is written to
        whole, step = memoryview(self._mapping), self.slot_nbytes
        self._free = [Slot(whole[i * step : (i + 1) * step]) for i in reversed(range(self.n_slots))]
        self._used: OrderedDict[Key, Slot] = OrderedDict()  # longest ago first
        self._reader = Reader()
        self._layers = {layer: LayerCounters() for layer, _ in sorted(self._places)}

    @property
    def counters(self) -> CacheCounters:
        """What happened so far; a view that goes on counting."""
        return CacheCounters(self._layers)

    def holds(self, key: Key) -> bool:
        """Whether an expert is there, or being read."""
        return key in self._used

    def take(self, key: Key) -> Slot | None:
        """Ask for an expert, which is then being read if it was not there; None where every slot is in use.

        What is taken stays until `give_back`.
        """
        counters, slot = self._layers[key[0]], self._used.get(key)
        if slot is not None and not slot.users and any(read.done() and read.exception() for read in slot.reads):
            self._forget(slot)  # nobody waited for it, so nobody was told
            slot = None
        if slot is not None:
            counters.hits += 1
        else:
            slot = self._make_room(counters)
            if slot is None:
                return None
            counters.misses += 1
            self._read(slot, key, counters)
        self._used.move_to_end(key)
        slot.users += 1
        return slot

    def wait(self, slot: Slot) -> list[Tensor]:
        """The bytes of each matrix of a slot's expert, once they are there.

        Raises:
            CheckpointError: they cannot be read; the expert is forgotten, so that the next to ask tries again.
        """
        if slot.reads and slot.key is not None:
            counters, started = self._layers[slot.key[0]], time.perf_counter()
            try:
                for read in slot.reads:
                    read.result()
            except BaseException:
                self._forget(slot)
                raise
            finally:
                slot.reads = []
                counters.wait_seconds += time.perf_counter() - started
        return slot.tensors

    def give_back(self, slot: Slot) -> None:
        """Say that a slot is not in use any more."""
        slot.users = max(0, slot.users - 1)  # 0 already, if its expert could not be read

    def close(self) -> None:
        """Wait for running reads; nothing can be asked for afterwards."""
        self._reader.close()

    def _make_room(self, counters: LayerCounters) -> Slot | None:
        if self._free:
            return self._free.pop()
        for key, slot in self._used.items():
            if not slot.users and key not in self.pinned:
                self._forget(slot)
                counters.evictions += 1
                return self._free.pop()
        return None

    def _read(self, slot: Slot, key: Key, counters: LayerCounters) -> None:
        slot.key, slot.tensors, slot.reads, at = key, [], [], 0
        self._used[key] = slot
        try:
            for place in joined(self._places[key]):
                first, last = pages(place)
                slot.reads += self._reader.start(place, slot.memory[at : at + last - first])
                counters.nbytes += last - first
                begin = at + place.begin - first
                slot.tensors += _split(slot.memory[begin : begin + place.end - place.begin], self._places[key], place)
                at += last - first
        except BaseException:
            self._forget(slot)
            raise

    def _forget(self, slot: Slot) -> None:
        for read in slot.reads:
            if not read.cancel():
                read.exception()  # until then the memory may be written to
        if slot.key is not None:
            self._used.pop(slot.key, None)
        slot.key, slot.reads, slot.tensors, slot.users = None, [], [], 0
        self._free.append(slot)


def _slot_nbytes(places: Sequence[Place]) -> int:
    return sum(last - first for first, last in map(pages, joined(places)))


def _split(memory: memoryview, places: Sequence[Place], whole: Place) -> list[Tensor]:
    """The parts of joined places as tensors, in their order."""
    inside = [p for p in places if p.file is whole.file and whole.begin <= p.begin and p.end <= whole.end]
    data = torch.frombuffer(memory, dtype=torch.uint8)
    return [data[p.begin - whole.begin : p.end - whole.begin] for p in inside]
