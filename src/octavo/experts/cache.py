"""One pool of memory for the experts of all layers, with a budget in bytes.

Of every expert the head, its first bytes, stays in memory once it was read, and the tail is read into a slot when it is
needed; the tail that was used longest ago makes room. So a token reads as much in one layer as in the next, and the
disk works while the heads are computed with: experts that are there or not there as a whole would leave it idle
through the layers that miss none. Pinned experts are all head. Nothing in here knows what an expert computes.
"""

from __future__ import annotations

import ctypes
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from octavo.errors import CheckpointError, OptionError
from octavo.experts.memory import Memory
from octavo.experts.reader import Layout, Read, Reader, pages
from octavo.experts.slots import CacheCounters, Key, LayerCounters, Slot, Slots
from octavo.plan import PASSING, Placement
from octavo.storage.files import Place

__all__ = ["CacheCounters", "DiskCache", "ExpertCache", "Held", "Key", "LayerCounters", "Piece", "Stored"]

PIECE = 16 << 20  # bytes, to measure the disk by where nothing is left to be streamed


class Stored(NamedTuple):
    """A matrix of an expert on the disk.

    Attributes:
        place: of its bytes.
        step: so many of them stay together: a panel of a low-bit matrix, 16 rows of another.
    """

    place: Place
    step: int


class _Part:
    """The head or the tail of an expert: pieces of its matrices, of which the file has them one behind the other."""

    def __init__(self, pieces: Sequence[Place]) -> None:
        self.layout = Layout([piece for piece in pieces if piece.begin < piece.end])
        begins = iter(self.layout.begins)
        self.begins = [next(begins) if piece.begin < piece.end else 0 for piece in pieces]
        self.sizes = [piece.end - piece.begin for piece in pieces]
        self.nbytes = sum(self.sizes)


@dataclass(eq=False, kw_only=True)
class _Slot(Slot):
    """Memory for a tail, and what is being read there."""

    address: int
    read: Read | None = None


class Piece(NamedTuple):
    """Bytes of a matrix in memory: where, how many, and what to wait for if they are still being read."""

    address: int
    nbytes: int
    read: Read | None


@dataclass(eq=False)
class Held:
    """An expert that was taken, and stays until it is given back.

    Attributes:
        matrices: head and tail of each; either may be empty.
    """

    key: Key
    matrices: list[tuple[Piece, Piece]]
    slot: _Slot | None


class ExpertCache(ABC):
    """Experts in memory, as far as a budget holds them; the others come from elsewhere when they are needed.

    `ExpertCache(experts, placement, verify)` is a `DiskCache`, as a `pathlib.Path` is one of the system's kind;
    `octavo.experts.card.CardCache` is another.

    Attributes:
        n_slots: for experts, or tails of them, that there is room for at a time.
        nbytes: of memory for experts.
    """

    n_slots: int
    nbytes: int
    _layers: dict[int, LayerCounters]

    def __new__(cls, *args: Any, **options: Any) -> ExpertCache:
        """Read from the disk, where nothing else is said."""
        return super().__new__(DiskCache if cls is ExpertCache else cls)

    @property
    def counters(self) -> CacheCounters:
        """What happened so far; a view that goes on counting."""
        return CacheCounters(self._layers)

    def has_layer(self, layer: int) -> bool:
        """Whether a layer of this number has experts here."""
        return layer in self._layers

    @abstractmethod
    def holds(self, key: Key) -> bool:
        """Whether all of an expert is there, or on its way."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what is on its way; nothing can be asked for afterwards."""


class DiskCache(ExpertCache):
    """Experts that are read from the disk, as far as they are not in memory.

    Args:
        experts: the matrices of each.
        placement: how much memory there is, and for what.
        verify: is given an expert and the bytes of each matrix, in two parts, once they were read for the first time;
            raises if they are not as they should be.

    Attributes:
        n_slots: tails that there is room for at a time.
        tail_nbytes: of the largest tail, in whole pages.
        nbytes: of memory; no more than the placement's, but for pages that are half filled.

    Raises:
        OptionError: there is less room than PASSING experts and the pinned ones take.

    Not thread-safe: one thread asks; reads run on threads of their own.
    """

    def __init__(
        self,
        experts: Mapping[Key, Sequence[Stored]],
        placement: Placement,
        verify: Callable[[Key, list[tuple[memoryview, memoryview]]], None] | None = None,
    ) -> None:
        self.placement, self._verify = placement, verify
        self._heads, self._tails, self.n_slots = _share_out(experts, placement)
        self.tail_nbytes = max((tail.layout.nbytes for tail in self._tails.values()), default=0)
        self.nbytes = sum(head.layout.nbytes for head in self._heads.values()) + self.n_slots * self.tail_nbytes
        self._memory = Memory(self.nbytes)
        address = self._memory.address
        self._head_at: dict[Key, int] = {}
        for key, head in self._heads.items():
            self._head_at[key] = address
            address += head.layout.nbytes
        self._head_reads: dict[Key, Read | None] = {}  # None: read, and as it should be
        self._verified: set[Key] = set()
        self._reader = Reader()
        slots = [_Slot(address=address + i * self.tail_nbytes) for i in range(self.n_slots)]
        self._slots = Slots(slots, partial(_stop, self._reader))
        self._process = os.getpid()
        self._layers = {layer: LayerCounters() for layer, _ in sorted(experts)}

    def holds(self, key: Key) -> bool:
        """Whether all of an expert is there, or being read."""
        return key in self._head_reads and (key in self._slots or not self._tails[key].nbytes)

    def take(self, key: Key) -> Held | None:
        """Ask for an expert, which is then being read as far as it is not there; None where every slot is in use.

        What is taken stays until `give_back`.

        Raises:
            CheckpointError: a file is gone, or not as it was.
            ResourceError: others have taken the memory that the budget promised.
        """
        self._check_process()
        self._forget_failed(key)
        head, tail, slot = self._heads[key], self._tails[key], self._slots.get(key)
        counters = self._layers[key[0]]
        found = (key in self._head_reads) * head.nbytes + (slot is not None and not slot.ahead) * tail.nbytes
        if tail.nbytes and slot is None:
            slot = self._slots.make_room(counters, ahead=False)
            if slot is None:
                return None
            self._read_tail(slot, key, ahead=False)
        if slot is not None:
            if slot.ahead and slot.read is not None:
                self._reader.hurry(slot.read)
            self._slots.use(slot)
        try:
            self._read_head(key)
        except BaseException:
            if slot is not None:
                slot.users -= 1
            raise
        counters.ask(head.nbytes + tail.nbytes, found)
        return Held(key, self._matrices(key, slot), slot)

    def prefetch(self, key: Key) -> bool:
        """Begin to read what an expert lacks, behind all that is waited for; False where there is no room for it."""
        self._forget_failed(key)
        if self._tails[key].nbytes and key not in self._slots:
            slot = self._slots.make_room(self._layers[key[0]], ahead=True)
            if slot is None:
                return False
            self._read_tail(slot, key, ahead=True)
        self._read_head(key)
        return True

    def end_layer(self, layer: int) -> None:
        """Say that nothing more is asked for in a layer: what was read ahead for it in vain is like all else now."""
        self._slots.end_layer(layer)

    def check(self, held: Held) -> None:
        """Wait for what an expert lacks; after what was computed with it: whether that is valid.

        Raises:
            CheckpointError: it cannot be read, or is not what was written. It is forgotten, so that the next to ask
                tries again.
        """
        try:
            for read in self._reads(held.key):
                read.check()
            if held.key not in self._verified:
                if self._verify is not None:
                    self._verify(held.key, [(_view(head), _view(tail)) for head, tail in held.matrices])
                self._verified.add(held.key)
        except BaseException:
            self._forget(held.key)
            raise
        self._head_reads[held.key] = None
        if held.slot is not None:
            held.slot.read = None

    def is_verified(self, held: Held) -> bool:
        """Whether it was found to be as written before, so that a kernel may begin while it is being read again."""
        return held.key in self._verified

    def give_back(self, held: Held) -> None:
        """Say that an expert is not in use any more."""
        if held.slot is not None and held.slot.users:  # none, if it could not be read
            held.slot.users -= 1

    def disk_bandwidth(self, nbytes: int) -> float:
        """Read again, all at once, what is in memory already, and return bytes a second: what the disk can do.

        Args:
            nbytes: about so many, in pieces as large as tails, of experts chosen at random; fewer if there is less.

        Raises:
            CheckpointError: it cannot be read.
        """
        heads = [key for key, read in self._head_reads.items() if read is None]
        there = [(self._heads[key].layout, self._head_at[key]) for key in heads]
        there += [(self._tails[key].layout, slot.address) for key, slot in self._slots.items() if slot.read is None]
        most = self.tail_nbytes or PIECE
        there = [one for one in there if 2 * one[0].nbytes >= most] or there
        random.shuffle(there)
        reads, done, started = [], 0, time.perf_counter()
        for layout, address in there:
            if layout.reads and done < nbytes:
                place, at = layout.reads[0]
                first = random.randrange(place.begin, max(place.begin, place.end - most) + 1)
                piece = Layout([Place(place.file, first, min(place.end, first + most))])
                reads.append(self._reader.start(piece, address + at + pages(piece.reads[0][0])[0] - pages(place)[0]))
                done += piece.nbytes
        for read in reads:
            read.check()
        return done / (time.perf_counter() - started)

    def close(self) -> None:
        """Wait for running reads; nothing can be asked for afterwards."""
        self._reader.close()
        self._memory.close()

    # ---------------------------------------- reading

    def _read_head(self, key: Key) -> None:
        if key not in self._head_reads:
            head = self._heads[key]
            self._memory.take(self._head_at[key], head.layout.nbytes)
            read = self._reader.start(head.layout, self._head_at[key]) if head.nbytes else None
            self._head_reads[key] = read
            self._layers[key[0]].nbytes += head.layout.nbytes

    def _read_tail(self, slot: _Slot, key: Key, *, ahead: bool) -> None:
        tail = self._tails[key]
        try:
            slot.read = self._reader.start(tail.layout, slot.address, later=ahead)
        except BaseException:
            self._slots.free(slot)
            raise
        self._slots.put(slot, key, ahead=ahead)
        self._layers[key[0]].nbytes += tail.layout.nbytes

    def _matrices(self, key: Key, slot: _Slot | None) -> list[tuple[Piece, Piece]]:
        head, tail = self._heads[key], self._tails[key]
        head_read, head_at = self._head_reads[key], self._head_at[key]
        tail_read, tail_at = (slot.read, slot.address) if slot is not None else (None, 0)
        return [
            (
                Piece(head_at + head.begins[i], head.sizes[i], head_read),
                Piece(tail_at + tail.begins[i], tail.sizes[i], tail_read),
            )
            for i in range(len(head.sizes))
        ]

    def _reads(self, key: Key) -> list[Read]:
        slot = self._slots.get(key)
        reads = (self._head_reads.get(key), None if slot is None else slot.read)
        return [read for read in reads if read is not None]

    # ---------------------------------------- forgetting

    def _forget_failed(self, key: Key) -> None:
        """What was read ahead, and failed while nobody waited for it."""
        slot = self._slots.get(key)
        if slot is not None and slot.users:
            return
        for read in self._reads(key):
            if read.done:
                try:
                    read.check()
                except CheckpointError:
                    self._forget(key)
                    return

    def _forget(self, key: Key) -> None:
        head = self._head_reads.get(key)
        if head is not None:
            self._reader.cancel(head)
        self._head_reads.pop(key, None)
        self._verified.discard(key)
        if (slot := self._slots.get(key)) is not None:
            self._slots.empty(slot)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise OptionError(
                "this process was forked from the one that loaded the model, whose threads read the experts",
                hint="load the model in the process that uses it",
            )


def _stop(reader: Reader, slot: _Slot) -> None:
    """See that nothing more is written to a slot's memory."""
    if slot.read is not None:
        reader.cancel(slot.read)
        slot.read = None


def _share_out(
    experts: Mapping[Key, Sequence[Stored]], placement: Placement
) -> tuple[dict[Key, _Part], dict[Key, _Part], int]:
    """Cut every expert into head and tail, so that all heads and some tails fit into the placement's bytes."""
    sizes = {key: sum(m.place.end - m.place.begin for m in matrices) for key, matrices in experts.items()}
    largest, pinned = max(sizes.values()), placement.pinned & experts.keys()
    share = placement.head_share(len(experts), largest)
    while True:
        heads, tails = {}, {}
        for key, matrices in experts.items():
            head = _cut(matrices, sizes[key] if key in pinned else int(share * sizes[key]))
            heads[key] = _Part([Place(m.place.file, m.place.begin, at) for m, at in zip(matrices, head, strict=True)])
            tails[key] = _Part([Place(m.place.file, at, m.place.end) for m, at in zip(matrices, head, strict=True)])
        slots = min(placement.slots, sum(tail.nbytes > 0 for tail in tails.values()))
        nbytes = sum(head.layout.nbytes for head in heads.values())
        nbytes += slots * max(tail.layout.nbytes for tail in tails.values())
        if nbytes <= placement.nbytes:
            return heads, tails, slots
        if share <= 0:
            least = (len(pinned) + slots) * largest  # but for a few kilobytes, of pages that are half filled
            if least <= placement.nbytes:
                return heads, tails, slots
            raise _too_few(placement, largest, len(pinned), least)
        # Whole pages, and experts of different sizes, take more than the share says.
        share = max(0.0, share - (nbytes - placement.nbytes) / sum(sizes.values()) - 1e-4)


def _cut(matrices: Sequence[Stored], nbytes: int) -> list[int]:
    """Where each matrix's head ends in its file: in all at most so many bytes, and whole steps."""
    ends = []
    for matrix in matrices:
        begin, end = matrix.place.begin, matrix.place.end
        at = end if end - begin <= nbytes else begin + nbytes // matrix.step * matrix.step
        ends.append(at)
        nbytes = nbytes - (end - begin) if at == end else 0
    return ends


def _too_few(placement: Placement, largest: int, n_pinned: int, nbytes: int) -> OptionError:
    return OptionError(
        f"{placement.nbytes} bytes hold less than {PASSING} experts of {largest} bytes"
        + (f" and {n_pinned} pinned ones" if n_pinned else ""),
        hint=f"give {nbytes} bytes or more",
    )


def _view(piece: Piece) -> memoryview:
    return memoryview((ctypes.c_char * piece.nbytes).from_address(piece.address)) if piece.nbytes else memoryview(b"")
