"""What a run says while it goes on: lines and a bar on stderr, metrics.jsonl, its speed; and how it hears Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tqdm import tqdm

from octavo.train.device import Moment
from octavo.train.state import write_whole


def say(message: str) -> None:
    """One line to stderr, above the progress bar if there is one."""
    tqdm.write(message, file=sys.stderr)


class Stop:
    """Turns the first Ctrl-C (or SIGTERM) into a flag, so that a step and a checkpoint are finished first."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("stopping after this step; once more to stop at once")

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        try:
            for number in (int(signal.SIGINT), int(signal.SIGTERM)):
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: signals are somebody else's
            pass
        try:
            yield self
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)


class MetricsFile:
    """metrics.jsonl: one line a logged step or evaluation, appended as it happens."""

    def __init__(self, path: Path, after_step: int) -> None:
        """Open for appending; lines later than `after_step` belong to a future that is not resumed from."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists() and after_step:
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    if json.loads(line)["step"] <= after_step:
                        kept.append(line + "\n")
        write_whole(path, lambda file: file.write("".join(kept).encode()))

    def add(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class Speed(NamedTuple):
    """How fast a run trains.

    Attributes:
        tokens_per_s: tokens read a second, pads left out; NaN before the first step.
        mfu: model FLOP utilisation (PaLM, arXiv 2204.02311, section 4.1): the model FLOPs of these tokens as a share
            of what the device reaches in a large matrix product (`octavo.train.device.matrix_rate`), not of what
            its maker promises.
    """

    tokens_per_s: float
    mfu: float

    def __str__(self) -> str:
        return f"{self.tokens_per_s:,.0f} tok/s, MFU {self.mfu:.1%}"

    @property
    def record(self) -> dict[str, float]:
        """As metrics.jsonl has it."""
        return {"tokens_per_s": round(self.tokens_per_s), "mfu": float(f"{self.mfu:.4g}")}


class Pace:
    """Measures `Speed` over steps alone: what happens between `restart` and the step before it does not count.

    Args:
        utilisation: MFU of one token a second.
    """

    def __init__(self, utilisation: float) -> None:
        self.utilisation = utilisation
        self.tokens, self.seconds = 0, 0.0
        self._lap_tokens, self._lap_seconds = 0, 0.0
        self._since: Moment | None = None

    def restart(self, now: Moment) -> None:
        """The next step begins now."""
        self._since = now

    def add(self, tokens: int, done: Moment) -> None:
        """A step of so many tokens was done at a moment that has come; the next one began then."""
        seconds = 0.0 if self._since is None else done.since(self._since)
        self._since = done
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self._lap_tokens, self._lap_seconds = self._lap_tokens + tokens, self._lap_seconds + seconds

    def lap(self) -> Speed:
        """Since the last lap."""
        speed = self._speed(self._lap_tokens, self._lap_seconds)
        self._lap_tokens, self._lap_seconds = 0, 0.0
        return speed

    def whole(self) -> Speed:
        """Of all steps."""
        return self._speed(self.tokens, self.seconds)

    def _speed(self, tokens: int, seconds: float) -> Speed:
        tokens_per_s = tokens / seconds if seconds else math.nan
        return Speed(tokens_per_s, tokens_per_s * self.utilisation)


def make_bar(step: int, steps: int) -> Any:
    """A live bar on a terminal; in a file, a line now and then."""
    seldom = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(total=steps, initial=step, unit=" steps", file=sys.stderr, dynamic_ncols=True, mininterval=seldom)
