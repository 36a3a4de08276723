"""Anonymous memory that is taken beside other work, before it is needed.

The first use of a page makes the system find and clear it. In a virtual machine that can be slower than the disk
(docs/log.md), so it happens on a thread of its own, from the first byte to the last.
"""

from __future__ import annotations

import mmap
import threading
import weakref

import torch

from octavo.errors import ResourceError
from octavo.kernels.ops import compiled
from octavo.machine import check_room

STEP = 16 << 20  # bytes that are taken at a time


class Memory:
    """Whole pages, which belong to the process sooner or later.

    Args:
        nbytes: of address space.

    Attributes:
        address: of the first byte, at a page.
    """

    def __init__(self, nbytes: int) -> None:
        self._module = compiled()
        self._mapping = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
        if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer entries of page tables for direct reads to look up
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self._whole = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self.address = self._there = self._whole.data_ptr()
        self._end = self.address + len(self._mapping)
        self._closed = False
        self._thread = threading.Thread(target=_take_all, args=(weakref.ref(self),), name="octavo-memory", daemon=True)
        self._thread.start()

    def take(self, address: int, nbytes: int) -> None:
        """Make sure that some of it is there, and nothing in it yet; by the kernels' threads, where it is not.

        Raises:
            ResourceError: others have taken the memory that the budget promised.
        """
        if address + nbytes > self._there:
            check_room(nbytes)
            self._module.touch(address, nbytes)

    def close(self) -> None:
        """Take no more; what was taken goes with the object."""
        self._closed = True
        self._thread.join()

    def take_step(self) -> bool:
        """Take the next few pages; False at the end, where there is no room, and where the system cannot."""
        nbytes = min(STEP, self._end - self._there)
        if self._closed or not nbytes:
            return False
        try:
            check_room(nbytes)
        except ResourceError:  # what then is missing, `take` will be asked for
            return False
        there = bool(self._module.populate(self._there, nbytes))
        self._there += nbytes * there
        return there


def _take_all(memory: weakref.ref[Memory]) -> None:
    """Step by step, for as long as somebody has it."""
    while (there := memory()) is not None and there.take_step():
        del there
