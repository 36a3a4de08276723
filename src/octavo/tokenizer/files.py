"""Which tokenizer file a folder holds, and what the files beside it say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from octavo.errors import TokenizerError


class AddedToken(NamedTuple):
    """A token that a checkpoint declares beside its vocabulary."""

    name: str
    id: int
    special: bool


@dataclass(frozen=True)
class Settings:
    """What a checkpoint says about its tokenizer outside the tokenizer's own file."""

    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    adds_bos: bool = True
    added: tuple[AddedToken, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Reads tokenizer_config.json, added_tokens.json and chat_template.jinja, each if it is there.

        Raises:
            TokenizerError: one of them is damaged, or holds something of another type.
        """
        path = folder / "tokenizer_config.json"
        config = read_json_object(path) if path.is_file() else {}
        return cls(
            chat_template=_chat_template(folder, config, path),
            bos_token=_token_text(config.get("bos_token"), "bos_token", path),
            eos_token=_token_text(config.get("eos_token"), "eos_token", path),
            adds_bos=config.get("add_bos_token", True) is not False,
            added=_added_tokens(folder, config, path),
        )

    @property
    def ends(self) -> tuple[str, ...]:
        """The names that the checkpoint gives to BOS and EOS."""
        return tuple(name for name in (self.bos_token, self.eos_token) if name)

    def speaks(self, name: str) -> bool:
        """Whether the checkpoint punctuates conversations with a token, whatever the token's own entry says.

        Some checkpoints mark `<|im_end|>` special and `<|im_start|>` not; typed by a person, both are text.
        """
        in_template = self.chat_template is not None and bool(name.strip()) and name in self.chat_template
        return in_template or name in self.ends


def find_tokenizer_file(folder: Path) -> Path | None:
    """The tokenizer file to read: SentencePiece before tokenizer.json, the plain name before a versioned one.

    Raises:
        TokenizerError: the folder has only a Tekken tokenizer.
    """
    if (folder / "tokenizer.model").is_file():
        return folder / "tokenizer.model"
    versioned = [path for path in folder.glob("*tokenizer*.model.v*") if path.is_file()]
    if versioned:
        return max(versioned, key=_version)
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    tekken = min(folder.glob("tekken*.json"), default=None)
    if tekken is not None:
        raise TokenizerError(
            f"{tekken}: Tekken tokenizers are not read here",
            "put the checkpoint's tokenizer.json or tokenizer.model beside it",
        )
    return None


def _version(path: Path) -> tuple[list[int], str]:
    """Sorts tokenizer.model.v3 below tokenizer.model.v11."""
    return [int(number) for number in re.findall(r"\d+", path.name.rpartition(".v")[2])], path.name


def _chat_template(folder: Path, config: Mapping[str, Any], path: Path) -> str | None:
    """The template of chat_template.jinja, else tokenizer_config.json's: text, or several by name."""
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return read_text(beside)
    template = config.get("chat_template")
    if isinstance(template, list):
        if not all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in template):
            raise TokenizerError(f"{path}: every entry of chat_template must have a name and a template")
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        if "default" not in template and len(template) != 1:
            names = ", ".join(map(str, template)) or "none"
            raise TokenizerError(
                f"{path}: chat_template has no template named 'default' (found: {names})",
                "name one of them 'default'",
            )
        template = template.get("default", next(iter(template.values())))
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{path}: chat_template must be a string, found {type(template).__name__}")
    return template


def _token_text(entry: object, key: str, path: Path) -> str | None:
    """A special token as tokenizer_config.json writes it: a string, or an object with `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if text is None or isinstance(text, str):
        return text or None
    raise TokenizerError(f"{path}: {key} must be a string or an object with 'content', found {entry!r}")


def _added_tokens(folder: Path, config: Mapping[str, Any], path: Path) -> tuple[AddedToken, ...]:
    """The tokens of added_tokens_decoder, else those of added_tokens.json, all of them taken as special."""
    decoder = config.get("added_tokens_decoder")
    try:
        if decoder:
            return tuple(AddedToken(str(t["content"]), int(i), bool(t.get("special"))) for i, t in decoder.items())
        path = folder / "added_tokens.json"
        if path.is_file():
            return tuple(AddedToken(name, int(i), True) for name, i in read_json_object(path).items())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: the added tokens cannot be read ({error!r})") from None
    return ()


def read_bytes(path: Path) -> bytes:
    """A file's bytes. Raises TokenizerError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None


def read_text(path: Path) -> str:
    """A file's text. Raises TokenizerError where it cannot be read, or is not UTF-8."""
    data = read_bytes(path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 text (byte {error.start})", damage_hint(data)) from None


def read_json_object(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises TokenizerError where it is none."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON ({error})", damage_hint(text.encode())) from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: must hold a JSON object, found {type(value).__name__}")
    return value


def damage_hint(data: bytes) -> str:
    """What to do about a file whose bytes make no sense."""
    if data.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
    return "the file is damaged or of another kind: download it again"
