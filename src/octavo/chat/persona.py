"""Personas: who a model is asked to be, and how it should choose its words. One TOML file each."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.errors import OptionError, PersonaError

SHIPPED = Path(__file__).parents[1] / "personas"
_KEYS = ("name", "description", "system", "sampling")
_FORM = 'a persona file has name = "...", system = "...", and maybe description = "..." and a [sampling] table'


@dataclass(frozen=True)
class Persona:
    """A system prompt, and defaults for the options of `SamplingParams`.

    Attributes:
        sampling: option to value; checked, but kept as it was written so that only these options are set.
    """

    name: str
    system: str
    sampling: dict[str, Any] = field(default_factory=dict, hash=False)
    description: str = ""

    @classmethod
    def load(cls, source: str | Path) -> Persona:
        """Reads a persona: one that ships with Octavo, by name, or a TOML file.

        A source that ends in .toml or names a folder is a file; any other is a shipped persona's name.

        Raises:
            PersonaError: no such persona or file; not TOML; a key missing, unknown or of the wrong type; a
                sampling option that `SamplingParams` does not take.
        """
        text = str(source)
        if isinstance(source, Path) or text.endswith(".toml") or "/" in text or "\\" in text:
            return cls._read(Path(source).expanduser())
        names = cls.shipped()
        if text.lower() not in names:
            raise PersonaError(
                f"no persona named {text!r}; these ship with Octavo: {', '.join(names)}",
                _nearest(text.lower(), names) or "for one of your own give its file, such as ./mine.toml",
            )
        return cls._read(SHIPPED / f"{text.lower()}.toml")

    @staticmethod
    def shipped() -> list[str]:
        """The names of the personas that ship with Octavo."""
        return sorted(path.stem for path in SHIPPED.glob("*.toml"))

    @classmethod
    def _read(cls, path: Path) -> Persona:
        table = _read_toml(path)
        for key in table:
            if key not in _KEYS:
                raise PersonaError(
                    f"{path}: unknown key {key!r}; the keys are {', '.join(_KEYS)}",
                    _nearest(key, _KEYS) or _FORM,
                )
        for key in ("name", "system"):
            if key not in table:
                raise PersonaError(f"{path}: the key {key!r} is missing", _FORM)
        for key in ("name", "system", "description"):
            if not isinstance(table.get(key, ""), str):
                raise PersonaError(f"{path}: {key} must be a string, found {table[key]!r}", _FORM)
        sampling = table.get("sampling", {})
        if not isinstance(sampling, dict):
            raise PersonaError(f"{path}: sampling must be a table, found {sampling!r}", "write it as [sampling]")
        _check_sampling(sampling, path)
        return cls(table["name"], table["system"], sampling, table.get("description", ""))


def _read_toml(path: Path) -> dict[str, Any]:
    text = ""
    try:
        text = path.read_bytes().decode()
        return tomllib.loads(text)
    except FileNotFoundError:
        raise PersonaError(f"{path}: no such persona file", "give a TOML file, or a shipped persona's name") from None
    except OSError as error:
        raise PersonaError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PersonaError(f"{path}: not UTF-8 text (byte {error.start})", "save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        # Of a string that is never closed tomllib only says that the document ended.
        reason = str(error).replace("at end of document", f"at the end, line {len(text.splitlines())}")
        raise PersonaError(f"{path}: not valid TOML: {reason}", _FORM) from None


def _check_sampling(options: Mapping[str, Any], path: Path) -> None:
    # It needs torch, which reading a persona's name should not wait for.
    from octavo.sampling import SamplingParams

    try:
        SamplingParams.from_options(options)
    except OptionError as error:
        raise PersonaError(f"{path}: [sampling] {error.message}", error.hint) from None


def _nearest(word: str, words: list[str] | tuple[str, ...]) -> str | None:
    close = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {close[0]!r}?" if close else None
