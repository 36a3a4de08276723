"""What these verbs have in common: which texts and layers, and how far the work is."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from octavo.errors import OptionError

if TYPE_CHECKING:
    from octavo.routing.texts import Document

F = TypeVar("F", bound=Callable[..., Any])


def text_options(command: F) -> F:
    """--text and --label, and files behind the first argument, as a shell's `*.txt` puts them there."""
    for decorate in (
        click.option(
            "--label", "-l", "labels", multiple=True, metavar="NAME",
            help="What it is an example of: one for each file, or one for all; by default their names.",
        ),
        click.option("--text", "-t", "texts", multiple=True, metavar="FILE", help="A text, or .jsonl of messages."),
        click.argument("files", nargs=-1),
    ):  # fmt: skip
        command = decorate(command)
    return command


def documents_of(texts: Sequence[str], files: Sequence[str], labels: Sequence[str]) -> list[Document]:
    """The texts that are asked for, or the built-in ones.

    Raises:
        UserError: see `octavo.routing.texts.read_documents`; a label without a file.
    """
    from octavo.routing.texts import built_in_documents, read_documents

    paths = [*texts, *files]
    if labels and not paths:
        raise OptionError("--label belongs to a --text", hint="give the file too")
    return read_documents(paths, labels) if paths else built_in_documents()


def check_place(path: str, example: str) -> None:
    """See whether a file could be written there, before what it is to hold is made.

    Raises:
        OptionError: it is a folder, or in a folder that is not there.
    """
    place = Path(path)
    what = f"there is no folder {place.parent}"
    if place.is_dir():
        what = "it is a folder"
    elif place.parent.is_dir():
        return
    raise OptionError(f"{path}: cannot be written, {what}", hint=f"give the name of a file, such as {example}")


def parse_layers(text: str | None) -> list[int] | None:
    """ "0,15" or "0-3" as numbers.

    Raises:
        OptionError: it is something else.
    """
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise OptionError(f"--layers is {text!r}; expected numbers", hint="such as --layers 0,15 or --layers 0-3")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(found))


class Bar:
    """A bar on stderr, if that is a terminal; call it with how much is done, and how much there will be."""

    def __init__(self, what: str, total: int | None = None, *, unit: str = " tokens") -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            desc=what, total=total, unit=unit, file=sys.stderr, mininterval=0.2, leave=False, dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def add(self, done: int) -> None:
        """So much more is done."""
        self._bar.update(done)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
