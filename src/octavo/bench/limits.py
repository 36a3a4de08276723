"""What a card can do at most: its memory's bandwidth, its matrix units' rate, its link to the host.

Everything runs on a CPU as well, where there is nothing to wait for, so that it can be tested there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """How much is moved and multiplied to find the limits; the least that fills a large card.

    Attributes:
        copy: bytes of a buffer that is copied on the card: many times its cache.
        matrix: rows and columns of the square matrices.
        link: bytes of a buffer that is copied from the host.
        repeats: of each, one behind the other, of which the mean is one measurement.
    """

    copy: int = 1 << 29
    matrix: int = 8192
    link: int = 1 << 28
    repeats: int = 10


def synchronize(device: torch.device) -> None:
    """Wait for everything that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds that some work takes, on average of so many times one behind the other; it is done once before."""
    work()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def copy_bandwidth(device: torch.device, sizes: Sizes) -> float:
    """Bytes a second, read and written, of a copy within the card's memory."""
    source = torch.empty(sizes.copy, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * sizes.copy / seconds_of(lambda: target.copy_(source), device, sizes.repeats)


def matrix_rate(device: torch.device, sizes: Sizes) -> float:
    """Operations a second, two a product, of one large product of random bfloat16 matrices."""
    n = sizes.matrix
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / seconds_of(lambda: torch.mm(a, b, out=out), device, sizes.repeats)


def link_bandwidth(device: torch.device, sizes: Sizes) -> float:
    """Bytes a second that are copied to the card from host memory that the card reads by itself (pinned)."""
    source = torch.empty(sizes.link, dtype=torch.uint8, pin_memory=device.type == "cuda").random_()
    target = torch.empty_like(source, device=device)
    return sizes.link / seconds_of(lambda: target.copy_(source, non_blocking=True), device, sizes.repeats)


class MemoryWatch:
    """The most memory on a card that was taken, but for what is measured aside.

    Attributes:
        allocated: bytes of tensors, at the most.
        used: of the whole card, the driver's part and other processes' included, the most that was seen.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.allocated, self.used = device, 0, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def note(self) -> None:
        """Look; nothing is seen on a CPU."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            self.allocated = max(self.allocated, torch.cuda.max_memory_allocated(self.device))
            self.used = max(self.used, total - free)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is allocated meanwhile, and freed in the end, does not count."""
        self.note()
        yield
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
