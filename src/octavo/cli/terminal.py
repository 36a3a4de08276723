"""What every verb does with the terminal: notes and errors to stderr, text to stdout, text from stdin."""

from __future__ import annotations

import os
import sys

import click

from octavo.errors import PromptError, UserError

INTERRUPTED = 130  # exit code: 128 + SIGINT, as a shell reports it

# A model may say anything, but on a terminal it must not move the cursor or retitle the window.
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def tell_error(error: UserError) -> None:
    """`error: ...` and, where there is one, `hint: ...`, a line each, to stderr."""
    _say(click.style("error: ", fg="red", bold=True) + _one_line(error.message))
    if error.hint:
        _say(click.style("hint: ", fg="cyan") + _one_line(error.hint))


def note(text: str) -> None:
    """A remark, to stderr."""
    _say(click.style(text, dim=True))


def _say(text: str) -> None:
    """A line to stderr, coloured on a terminal (see no-color.org)."""
    click.echo(text, err=True, color=False if os.environ.get("NO_COLOR") else None)


def show(text: str) -> None:
    """Text of the model to stdout, at once; as it is, but on a terminal without control characters."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def stdin_is_terminal() -> bool:
    """Whether a person may be typing; False where stdin is closed."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_stdin() -> str:
    """All of stdin.

    Raises:
        PromptError: it is not UTF-8.
    """
    return "" if sys.stdin is None else decode(sys.stdin.buffer.read(), "stdin")


def decode(data: bytes, where: str) -> str:
    """Bytes from outside as text.

    Args:
        where: what to call them, should they not be UTF-8.

    Raises:
        PromptError: they are not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{where} is not valid UTF-8 (byte {error.start} is 0x{data[error.start]:02x})",
            hint="convert it first, such as with iconv -f latin1 -t utf-8",
        ) from None


def _one_line(text: str) -> str:
    return " ".join(text.split())
