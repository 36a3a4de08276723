"""What every pool of experts has: counters by layer, and slots of which the one used longest ago makes room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

Key = tuple[int, int]
"""Layer and number of an expert."""


@dataclass
class LayerCounters:
    """What happened in one layer.

    Attributes:
        hits, misses: experts all of which was there when they were asked for, and of which something was not.
        evictions: tails, or on a card whole experts, that made room for one of this layer.
        asked_nbytes, found_nbytes: of the experts that were asked for, and of what was there of them.
        nbytes: read, or copied to the card.
        wait_seconds: in which the computation waited for what it lacked.
        computed: misses that the CPU computed, so that nothing was copied.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    asked_nbytes: int = 0
    found_nbytes: int = 0
    nbytes: int = 0
    wait_seconds: float = 0.0
    computed: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the bytes asked for that were there; 0 where none were."""
        return self.found_nbytes / max(1, self.asked_nbytes)

    def ask(self, nbytes: int, found: int) -> None:
        """Count an expert of so many bytes, so many of which were there."""
        self.asked_nbytes += nbytes
        self.found_nbytes += found
        self.hits += found == nbytes
        self.misses += found < nbytes

    def since(self, earlier: LayerCounters) -> LayerCounters:
        """What happened since a copy was made."""
        return LayerCounters(**{name: now - getattr(earlier, name) for name, now in vars(self).items()})


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
            for field in fields(one):
                setattr(sums, field.name, getattr(sums, field.name) + getattr(one, field.name))
        return sums

    @property
    def hit_rate(self) -> float:
        """Share of the bytes asked for that were there; 0 where none were."""
        return self.total.hit_rate

    def copy(self) -> CacheCounters:
        """As they are now."""
        return CacheCounters({layer: LayerCounters(**vars(one)) for layer, one in self.layers.items()})

    def since(self, earlier: CacheCounters) -> CacheCounters:
        """What happened since a copy was made."""
        return CacheCounters({layer: one.since(earlier.layers[layer]) for layer, one in self.layers.items()})


@dataclass(eq=False, kw_only=True)
class Slot:
    """Memory for one expert, or for the tail of one.

    Attributes:
        key: the expert that is or will be there.
        users: how many compute with it, and need it to stay.
        ahead: it was brought before anybody asked for it, and nobody has yet.
    """

    key: Key | None = None
    users: int = 0
    ahead: bool = False


S = TypeVar("S", bound=Slot)


class Slots(Generic[S]):
    """Slots, and the order in which they were used.

    Args:
        slots: free ones; the first is taken first.
        stop: is given a slot before it is emptied; afterwards nothing is written there for who had it.
    """

    def __init__(self, slots: Iterable[S], stop: Callable[[S], None] | None = None) -> None:
        self._free = list(slots)[::-1]
        self._used: OrderedDict[Key, S] = OrderedDict()  # longest ago first
        self._stop = stop

    def get(self, key: Key) -> S | None:
        """The slot of an expert, or None."""
        return self._used.get(key)

    def __contains__(self, key: Key) -> bool:
        return key in self._used

    def items(self) -> list[tuple[Key, S]]:
        """Those in use; longest ago first."""
        return list(self._used.items())

    def make_room(self, counters: LayerCounters, *, ahead: bool) -> S | None:
        """A slot that is no longer anybody's; None where all are needed.

        What was brought ahead makes room last, and not for more of it. Follow up with `put` or `free`.
        """
        if not self._free:
            unused = [slot for slot in self._used.values() if not slot.users and not (ahead and slot.ahead)]
            if not unused:
                return None
            self.empty(next((slot for slot in unused if not slot.ahead), unused[0]))
            counters.evictions += 1
        return self._free.pop()

    def put(self, slot: S, key: Key, *, ahead: bool) -> None:
        """Say whose a slot is from now on."""
        slot.key, slot.ahead = key, ahead
        self._used[key] = slot

    def use(self, slot: S) -> None:
        """Keep a slot for somebody who computes with it, as the one used last."""
        assert slot.key is not None
        slot.ahead = False
        slot.users += 1
        self._used.move_to_end(slot.key)

    def empty(self, slot: S) -> None:
        """Forget whose a slot was, and set it free."""
        if self._stop is not None:
            self._stop(slot)
        if slot.key is not None:
            self._used.pop(slot.key, None)
        self.free(slot)

    def free(self, slot: S) -> None:
        """Give a slot back that nothing was put into."""
        slot.key, slot.users, slot.ahead = None, 0, False
        self._free.append(slot)

    def end_layer(self, layer: int) -> None:
        """What was brought ahead for a layer in vain is like all else now."""
        for key, slot in self._used.items():
            if key[0] == layer:
                slot.ahead = False
