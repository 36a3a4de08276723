"""Devices that plans are made for: their memory, and how fast they read it, by their makers' data sheets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Device:
    """A machine, or the part of one that computes.

    Attributes:
        name: as people call it.
        kind: "cpu", "cuda" or "unified" (memory that CPU and GPU share).
        memory: its bytes, or those that are free.
        read: bytes a second from memory; None where nobody knows.
        disk: bytes a second from disk.
        source: where ``memory`` and ``read`` come from.
        disk_source: where ``disk`` comes from.
        link: bytes a second from the host's memory to a card, one way: its PCIe generation's, by the specification.
    """

    name: str
    kind: str
    memory: int
    read: float | None
    disk: float
    source: str
    disk_source: str
    link: float | None = None

    @property
    def usable(self) -> int:
        """What a model may take. macOS lets a GPU have about three quarters of a memory that is shared."""
        return self.memory * 3 // 4 if self.kind == "unified" else self.memory


_NVME, _NVME_SOURCE = 7.45e9, "a PCIe 4 NVMe disk, as by Samsung's 990 PRO data sheet"


def _gpu(name: str, gigabytes: int, read: float, link: float, source: str) -> Device:
    # Gigabytes of 10**9, as data sheets count: the driver shows up to 7 % more, and takes some of that itself.
    return Device(name, "cuda", gigabytes * 10**9, read, _NVME, source, _NVME_SOURCE, link)


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "this machine": Device(
            "this machine", "cpu", 0, 51.2e9, _NVME, "two channels of DDR4-3200, JEDEC's 25.6 GB/s each", _NVME_SOURCE
        ),
        "rtx-4060": _gpu("RTX 4060 8 GB", 8, 272e9, 16e9, "NVIDIA's GeForce RTX 4060 specifications"),
        "rtx-4090": _gpu("RTX 4090 24 GB", 24, 1008e9, 32e9, "NVIDIA's Ada GPU architecture white paper"),
        "a100": _gpu("A100 80 GB", 80, 2039e9, 32e9, "NVIDIA's A100 data sheet, SXM"),
        "h100": _gpu("H100 80 GB", 80, 3350e9, 64e9, "NVIDIA's H100 data sheet, SXM"),
        "h200": _gpu("H200 141 GB", 141, 4800e9, 64e9, "NVIDIA's H200 data sheet"),
        "m2-ultra": Device(
            "M2 Ultra 192 GB", "unified", 192 * 10**9, 800e9, 7.4e9,
            "Apple's Mac Studio (2023) specifications", "Apple's Mac Studio (2023) press release",
        ),
    }
)  # fmt: skip
"""Known devices; what the first one has is a guess until it is measured."""

_CALLED = {  # without spaces, dashes and makers; as people write them, and as nvidia-smi does
    "rtx-4060": r"(rtx)?4060(8gb)?",
    "rtx-4090": r"(rtx)?4090(24gb)?",
    "a100": r"a100(sxm4?)?(80gb)?",
    "h100": r"h100(sxm5?)?(80gb(hbm3)?)?",
    "h200": r"h200(sxm5?|nvl)?(141gb)?",
    "m2-ultra": r"m2ultra(192gb)?",
}


def known_device(name: str) -> Device | None:
    """Return the device of `DEVICES` that is called so: "RTX 4090", "a100", "NVIDIA H200", "m2-ultra".

    Other versions, such as an RTX 4060 Ti, are other devices.
    """
    called = re.sub(r"[\s_-]|nvidia|geforce|apple", "", name.lower())
    return next((DEVICES[key] for key, pattern in _CALLED.items() if re.fullmatch(pattern, called)), None)
