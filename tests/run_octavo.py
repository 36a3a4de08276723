"""The command line as a person runs it: in this process (quick), as a process of its own, or on a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

from octavo.cli import main


@dataclass(frozen=True)
class Done:
    """How a run ended, and what it wrote."""

    code: int
    out: str
    err: str


def run(*args: object, stdin: bytes = b"") -> Done:
    """`octavo args` in this process, with pipes for streams."""
    out, err = _pipe(), _pipe()
    with (
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return Done(code, _text(out), _text(err))


def _pipe() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n")


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()


def refused(done: Done, *words: str, hint: str | None = None) -> None:
    """Assert bad input as it must look: code 1, one `error:` line with these words, one `hint:` line, no traceback."""
    assert done.code == 1, done
    assert done.out.strip() == "", done
    lines = done.err.splitlines()
    assert len(lines) == 2, done.err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    for word in words:
        assert word in lines[0]
    if hint is not None:
        assert hint in lines[1]


def command(*args: object) -> list[str]:
    """The same as a command line for a new process."""
    return [sys.executable, "-c", "from octavo.cli import main; main()", *map(str, args)]


class Terminal:
    """A process on a pseudo-terminal: stdin, stdout and stderr, as a person has them."""

    def __init__(self, *args: object) -> None:
        self._master, slave = os.openpty()
        self.process = subprocess.Popen(
            command(*args),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.seen = ""

    def resize(self, columns: int) -> None:
        """Give it a width; it has none at first, and progress bars then show nothing."""
        import fcntl
        import termios

        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))

    def type(self, text: str) -> None:
        """As typed; "\\x03" is Ctrl-C, "\\x04" Ctrl-D."""
        os.write(self._master, text.encode())

    def interrupt(self, until: str) -> str:
        """Type Ctrl-C and wait for the text that follows from it.

        Once more where nothing comes: Python's line editor notices a signal only after it has begun to wait for a
        key, and a test is quicker at its Ctrl-C than a person would be.
        """
        for _ in range(30):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.wait_for(until, seconds=4)
        return self.wait_for(until)

    def wait_for(self, text: str, *, seconds: float = 120) -> str:
        """Read until this text has come; return what came up to its end, and forget it."""
        give_up = time.monotonic() + seconds
        while text not in self.seen:
            left = give_up - time.monotonic()
            assert left > 0, f"{text!r} did not come: {self.seen[-2000:]!r}"
            if select.select([self._master], [], [], left)[0]:
                self.seen += os.read(self._master, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def wait_for_characters(self, count: int, *, seconds: float = 120) -> None:
        """Read until this many more have come than were seen."""
        give_up = time.monotonic() + seconds
        while len(self.seen) < count:
            left = give_up - time.monotonic()
            assert left > 0, f"no {count} characters came: {self.seen!r}"
            if select.select([self._master], [], [], left)[0]:
                self.seen += os.read(self._master, 65536).decode(errors="replace")

    def wait(self, *, seconds: float = 60) -> int:
        """Wait for the end, reading along; return the exit code."""
        with contextlib.suppress(OSError):  # the terminal is gone with its last process
            while select.select([self._master], [], [], seconds)[0]:
                data = os.read(self._master, 65536)
                if not data:
                    break
                self.seen += data.decode(errors="replace")
        return self.process.wait(seconds)

    def close(self) -> None:
        """End the process, should it be there still."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)


def _take_terminal() -> None:
    """Make stdin the controlling terminal, so that Ctrl-C typed there becomes SIGINT."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextlib.contextmanager
def terminal(*args: object) -> Iterator[Terminal]:
    """A `Terminal`, closed in the end."""
    one = Terminal(*args)
    try:
        yield one
    finally:
        one.close()
