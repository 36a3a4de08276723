"""Which kernels compute, why, and on how many threads. Chosen when first asked for."""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from octavo.errors import OptionError

REFERENCE = "reference"


@dataclass(frozen=True)
class Backend:
    """What computes.

    Attributes:
        name: an instruction set, or "reference" for torch.
        reason: why this one.
        compiled: whether it is compiled code.
    """

    name: str
    reason: str
    compiled: bool

    def __str__(self) -> str:
        return f"cpu backend: {self.name} ({self.reason})"


@functools.cache
def _import_native() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("octavo.kernels._native")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return None, "built without a C++ compiler" if missing else f"the compiled module cannot be loaded: {error}"
    module.set_threads(_default_threads())
    return module, ""


_forced_reference = False


def native() -> ModuleType | None:
    """The compiled module in use; None where torch computes."""
    return None if _forced_reference else _import_native()[0]


def backend() -> Backend:
    """Return what computes, and why."""
    module = native()
    if module is not None:
        return Backend(module.name(), module.reason(), True)
    return Backend(REFERENCE, "asked for" if _forced_reference else _import_native()[1], False)


def available() -> list[str]:
    """The names that `use` takes on this machine, best first."""
    module = _import_native()[0]
    return [*(module.available() if module else ()), REFERENCE]


def use(name: str | None) -> Backend:
    """Choose an instruction set by name, or "reference"; None for the best there is.

    Raises:
        OptionError: this machine lacks it.
    """
    global _forced_reference
    module = _import_native()[0]
    if name is not None and name not in available():
        raise OptionError(
            f"kernels {name!r} do not run here; expected one of {', '.join(available())}",
            hint="this CPU lacks the instructions, or the compiler that built Octavo did not know them",
        )
    _forced_reference = name == REFERENCE
    if module is not None:
        module.choose("" if name in (None, REFERENCE) else name)
    return backend()


def set_threads(n: int) -> None:
    """Compute on n threads, the caller's among them.

    Raises:
        OptionError: n is no positive number.
    """
    if n < 1:
        raise OptionError(f"threads is {n}; expected an integer of at least 1")
    if module := _import_native()[0]:
        module.set_threads(n)


def threads() -> int:
    """How many threads compute: by default OMP_NUM_THREADS, or as many cores as this process may use."""
    module = _import_native()[0]
    return module.threads() if module else 1


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Keep torch to the calling thread for a while.

    Its other threads spin for milliseconds after every operation they share, on the cores that the kernels' need.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _default_threads() -> int:
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _container_cores()))


def _container_cores() -> int:
    """What a container may use of the machine's cores: the quota of its cgroup, rounded up."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup, or "max"
        return os.cpu_count() or 1
