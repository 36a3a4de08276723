"""The way from host memory to the card: copies beside what is computed, and who waits for whom.

All that knows of streams and events is here. Where the "card" is the CPU there are none: a copy is made at once, and
nobody waits. "The current stream" is torch's, on which the caller computes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.experts.slots import LayerCounters

TURNS = 4  # buffers of a `Staging`

Mark = torch.cuda.Event | None
"""A point in what a stream does; None: it is past."""


class Link:
    """Copies to one device, one after another.

    Args:
        device: the card, or a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._waits: deque[tuple[LayerCounters, torch.cuda.Event, torch.cuda.Event]] = deque()

    def copy(self, target: Tensor, source: Tensor, after: Mark) -> Mark:
        """Begin a copy, behind those that were begun before.

        Args:
            target: on the card.
            source: in page-locked memory, which stays as it is until the mark is past.
            after: when the target may be written to.

        Returns:
            The end of the copy.
        """
        if self._stream is None:
            target.copy_(source)
            return None
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return _end_of(self._stream)

    def mark(self) -> Mark:
        """The end of what the current stream was given to do so far."""
        return None if self._stream is None else _end_of(torch.cuda.current_stream(self.device))

    def wait(self, mark: Mark) -> None:
        """Let the current stream wait for a mark; the caller does not."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def is_past(self, mark: Mark) -> bool:
        """Whether nobody has to wait for a mark."""
        return mark is None or bool(mark.query())  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()

    @contextmanager
    def waiting(self, counters: LayerCounters) -> Iterator[None]:
        """Count the time of what is within as time in which the computation waits.

        On a card that is how long the current stream has nothing else to do; it is added by `count_waits`.
        """
        if self._stream is None:
            began = time.perf_counter()
            yield
            counters.wait_seconds += time.perf_counter() - began
            return
        first, last = _timer(), _timer()
        stream = torch.cuda.current_stream(self.device)
        first.record(stream)
        yield
        last.record(stream)
        self._waits.append((counters, first, last))

    def count_waits(self) -> None:
        """Add up the waits that are over."""
        while self._waits and self.is_past(self._waits[0][2]):
            counters, first, last = self._waits.popleft()
            counters.wait_seconds += first.elapsed_time(last) / 1e3


def _end_of(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """The end of what a stream was given so far."""
    event: torch.cuda.Event = stream.record_event()
    return event


def _timer() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class _Turn:
    """A buffer, and the end of its last copy."""

    buffer: Tensor
    sent: Mark = None


class Staging:
    """Small things on their way to the card, on the current stream.

    They leave from page-locked buffers that take turns, so that none is written to before its last copy is over.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._turns = deque(_Turn(torch.empty(0, dtype=torch.uint8)) for _ in range(TURNS))

    def send(self, values: Tensor, target: Tensor) -> None:
        """Copy values in host memory, which the caller may change afterwards, to a tensor on the card."""
        if self._link.device.type != "cuda":
            target.copy_(values)
            return
        self._turns.rotate()
        turn = self._turns[0]
        if turn.sent is not None:
            turn.sent.synchronize()
        if turn.buffer.nbytes < values.nbytes:
            turn.buffer = torch.empty(values.nbytes, dtype=torch.uint8, pin_memory=True)
        staged = turn.buffer[: values.nbytes].view(values.dtype).view(values.shape)
        staged.copy_(values)
        target.copy_(staged, non_blocking=True)
        turn.sent = self._link.mark()

    def to_card(self, values: Tensor) -> Tensor:
        """Return a copy of values on the card."""
        if self._link.device.type != "cuda":
            return values
        target = torch.empty(values.shape, dtype=values.dtype, device=self._link.device)
        self.send(values, target)
        return target
