"""Where training computes: which device, in which dtype, how fast, and what has come back from it.

A card is given work and goes on by itself. Whoever reads a number from it waits until all of it is done, and then the
card waits for the next order. So numbers are sent for and read later (`HostCopy`), and time is taken on the card
itself (`Moment`). On a CPU the same calls are done when they return.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from octavo.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The device a config names; "auto" is CUDA if there is one.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"[run] device: {name!r} is no device", hint="auto, cpu or cuda") from None
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= cards):
        raise ConfigError(f"[run] device: {name!r} is not available here", hint="auto takes what there is")
    return device


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matrix products and the reason for it."""
    if name != "auto":
        return (torch.bfloat16 if name == "bfloat16" else torch.float32), "as configured"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "the GPU computes in it"
        return torch.float32, "the GPU has no bfloat16"
    if torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "found avx512_bf16"
    return torch.float32, "the CPU has no bfloat16 instructions"


class Moment:
    """When the device has done all that it was asked so far."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._time = time.perf_counter()

    def wait(self) -> None:
        """Return once it has come."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: Moment) -> float:
        """Seconds from an earlier moment of the same device to this one; both must have come."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1000


class HostCopy:
    """Tensors on their way from the device to the host.

    Attributes:
        moment: when they are there.
    """

    def __init__(self, device: torch.device, *tensors: Tensor) -> None:
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self.moment = Moment(device)

    def read(self) -> list[Tensor]:
        """Wait for them."""
        self.moment.wait()
        return self._tensors


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that the device reaches in a large square matrix product.

    The median of products over some tenths of a second (on a CPU, over some hundredths), of random numbers: zeros
    would let a card clock higher. It draws them from a generator of its own.
    """
    n, seconds = (8192, 0.3) if device.type == "cuda" else (512, 0.03)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.mm(a, b)  # the first one chooses a kernel
    times: list[float] = []
    while sum(times) < seconds:
        start = Moment(device)
        torch.mm(a, b, out=out)
        end = Moment(device)
        end.wait()
        times.append(end.since(start))
    return 2 * n**3 / statistics.median(times)
