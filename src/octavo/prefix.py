"""Keys and values of sequences that are over, for prompts that begin alike: a next turn, a shared system prompt.

What a token's keys and values are depends on the tokens before it alone, so those of a common beginning can be copied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from octavo.cache import SavedRow

LEAST = 16  # tokens that are worth the copy
MOST = 256  # sequences, all of which a prompt is compared with


class Match(NamedTuple):
    """A saved sequence, of which the first `length` tokens are a prompt's too."""

    saved: SavedRow
    length: int


class PrefixCache:
    """Saved sequences within a budget; the one that was used longest ago makes room.

    Args:
        budget: bytes of keys and values.

    Attributes:
        nbytes: that are in use.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.nbytes = budget, 0
        self._entries: OrderedDict[int, tuple[np.ndarray, SavedRow]] = OrderedDict()  # used longest ago first
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, prompt: Sequence[int]) -> Match | None:
        """Return the sequence that has most in common with the beginning of a prompt, all of which but the last token
        may be taken over; None where that is too little.
        """
        ids, best, length = np.asarray(prompt, dtype=np.int64), -1, LEAST - 1
        for key, (entry, _) in self._entries.items():
            common = common_length(ids, entry)
            if common > length:
                best, length = key, common
        length = min(length, len(ids) - 1)
        if best < 0 or length < LEAST:
            return None
        self._entries.move_to_end(best)
        return Match(self._entries[best][1], length)

    def wants(self, ids: Sequence[int], nbytes: int) -> bool:
        """Whether to save a sequence: it fits, and is not the beginning of a saved one, which then counts as used."""
        if len(ids) < LEAST or nbytes > self.budget:
            return False
        found = np.asarray(ids, dtype=np.int64)
        for key, (entry, _) in self._entries.items():
            if common_length(found, entry) == len(found):
                self._entries.move_to_end(key)
                return False
        return True

    def add(self, ids: Sequence[int], saved: SavedRow) -> None:
        """Keep a sequence that `wants` agreed to; those that are its beginnings go, and older ones as needed."""
        new = np.asarray(ids, dtype=np.int64)
        for key in [key for key, (entry, _) in self._entries.items() if common_length(new, entry) == len(entry)]:
            self._drop(key)
        while self._entries and (self.nbytes + saved.nbytes > self.budget or len(self) >= MOST):
            self._drop(next(iter(self._entries)))
        self._entries[self._next] = (new, saved)
        self._next += 1
        self.nbytes += saved.nbytes

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()
        self.nbytes = 0

    def _drop(self, key: int) -> None:
        _, saved = self._entries.pop(key)
        self.nbytes -= saved.nbytes


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids two sequences have in common from the beginning on."""
    n = min(len(a), len(b))
    if n == 0 or a[0] != b[0]:
        return 0
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
