"""`tokenizer.json`, read by the tokenizers library; decoding is our own, token by token."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import TokenizerError
from octavo.tokenizer.files import AddedToken, Settings, damage_hint, read_json_object
from octavo.tokenizer.pieces import SPACE, DecodeRules, Piece

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_Step = Callable[["str | bytes", bool], "str | bytes"]


class TokenizerJson:
    """A tokenizer.json. Added tokens marked special are its control tokens, and those the template speaks."""

    def __init__(self, path: Path, settings: Settings) -> None:
        spec = read_json_object(path)
        added = _added_tokens(spec, path)
        self._controls = {t.name: t.id for t in added if t.special or settings.speaks(t.name)}
        for entry in spec.get("added_tokens") or ():
            entry["special"] = entry["content"] in self._controls
        self._spec, self._path = json.dumps(spec), path
        self._tokens = _open(self._spec, path)
        # Without this switch the library parses special tokens out of whatever text it is given.
        self._tokens.encode_special_tokens = True
        self._parsing: tokenizers.Tokenizer | None = None  # the same, switch off; made when a template needs it
        vocab = self._tokens.get_vocab(with_added_tokens=True)
        if not vocab:
            raise TokenizerError(f"{path}: an empty vocabulary")
        self.n_vocab = max(vocab.values()) + 1
        self._controls |= {name: vocab[name] for name in settings.ends if name in vocab}
        self.bos_id = self._controls.get("<s>")
        self.eos_id = self._controls.get("</s>")
        self._hidden = {t.id for t in added if t.special} | {vocab[n] for n in settings.ends if n in vocab}
        unknown = _unknown_id(spec["model"], vocab)  # unknown characters encode to it, and rightly
        self.guarded = frozenset(self._controls.values()) - {unknown}
        self._write, self.rules = compile_decoder(spec.get("decoder"), path)

    def encode(self, text: str) -> list[int]:
        return self._encode(self._tokens, text)

    def encode_controls(self, text: str) -> list[int] | None:
        if self._parsing is None:
            self._parsing = _open(self._spec, self._path)
        return self._encode(self._parsing, text)

    def _encode(self, tokens: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            return tokens.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(
                f"{self._path}: cannot encode the text ({error})", "the file lacks what its own model needs"
            ) from None

    def piece(self, token_id: int) -> Piece | None:
        name = self._tokens.id_to_token(token_id)
        return None if name is None or token_id in self._hidden else self._write(name)

    def name(self, token_id: int) -> str:
        return self._tokens.id_to_token(token_id) or ""

    def controls(self) -> Mapping[str, int]:
        return self._controls

    def control_id(self, name: str) -> int | None:
        return self._controls.get(name)


def _added_tokens(spec: Mapping[str, Any], path: Path) -> list[AddedToken]:
    try:
        entries = spec.get("added_tokens") or ()
        tokens = [AddedToken(t["content"], int(t["id"]), bool(t["special"])) for t in entries]
        if not all(isinstance(token.name, str) for token in tokens):
            raise TypeError("a token's content must be a string")
        return tokens
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: added_tokens cannot be read ({error!r})") from None


def _unknown_id(model: Mapping[str, Any], vocab: Mapping[str, int]) -> int | None:
    """The id of what the model does not know: Unigram models give its number, the others its name."""
    number: int | None = model.get("unk_id")
    return number if number is not None else vocab.get(model.get("unk_token") or "")


def _open(spec: str, path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokens = Tokenizer.from_str(spec)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path}: not a tokenizer ({error})", damage_hint(spec.encode())) from None
    # The file may carry the truncation of whoever saved it, which would cut prompts without a word.
    tokens.no_truncation()
    tokens.no_padding()
    return tokens


def compile_decoder(spec: Mapping[str, Any] | None, path: Path) -> tuple[Callable[[str], Piece], DecodeRules]:
    """The decoder section of a tokenizer.json as a function of one token.

    The library decodes lists of tokens. Here each step is applied to one token, which for the kinds that
    Mixtral and its relatives use is the same; a kind that must see a whole text is refused, not approximated.

    Raises:
        TokenizerError: a decoder of another kind.
    """
    if spec is None:  # the library then puts a space between tokens
        rules = DecodeRules(per_byte=True, control_breaks=False, strips_on=False)
        return (lambda name: Piece(f" {name}".encode(), name.encode())), rules
    entries = _flatten(spec)
    steps: list[_Step] = []
    fused = False
    for entry in entries:
        step = _step(entry, fused)
        if step is None:
            raise TokenizerError(
                f"{path}: decoder {json.dumps(entry)} is not supported",
                "put the checkpoint's tokenizer.model beside it, if it has one",
            )
        fused = fused or entry["type"] == "Fuse"
        steps.append(step)

    def write(name: str) -> Piece:
        return Piece(_run(steps, name, first=False), _run(steps, name, first=True))

    byte_level = any(entry["type"] == "ByteLevel" for entry in entries)
    return write, DecodeRules(per_byte=not byte_level, control_breaks=False, strips_on=False)


def _flatten(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if spec.get("type") != "Sequence":
        return [spec]
    return [step for inner in spec.get("decoders", ()) for step in _flatten(inner)]


def _run(steps: list[_Step], name: str, *, first: bool) -> bytes:
    value: str | bytes = name
    for step in steps:
        value = step(value, first)
    return value.encode() if isinstance(value, str) else value


def _step(spec: Mapping[str, Any], fused: bool) -> _Step | None:
    """One decoder as a function (a token's text, is it the first) -> text; None if it is not supported.

    `fused`: a Fuse came before, so that the library would hand this decoder the whole text.
    """
    match spec.get("type"):
        case "Replace" if not fused and "String" in spec["pattern"]:
            return _on_text(lambda text, first: text.replace(spec["pattern"]["String"], spec["content"]))
        case "ByteFallback" if not fused:
            return _on_text(lambda text, first: _fallback_byte(text))
        case "Fuse":
            return _on_text(lambda text, first: text.encode())
        case "Strip" if fused:
            return _strip_whole(spec["content"].encode(), spec["start"], spec["stop"])
        case "Strip":
            return _on_text(lambda text, first: _strip(text, spec["content"], spec["start"], spec["stop"]))
        case "Metaspace" if not fused:
            mark = spec.get("replacement", SPACE)
            keeps = spec.get("prepend_scheme") == "never" or spec.get("add_prefix_space") is False
            return _on_text(lambda text, first: text.replace(mark, "" if first and not keeps else " "))
        case "ByteLevel" if not fused:
            return _on_text(lambda text, first: _byte_level(text))
    return None


def _on_text(step: Callable[[str, bool], str | bytes]) -> _Step:
    """A step that leaves alone what is bytes already."""
    return lambda value, first: step(value, first) if isinstance(value, str) else value


def _strip(text: str, mark: str, start: int, stop: int) -> str:
    for _ in range(start):
        text = text.removeprefix(mark)
    for _ in range(stop):
        text = text.removesuffix(mark)
    return text


def _strip_whole(mark: bytes, start: int, stop: int) -> _Step | None:
    """Strip on a whole text: on its first token, if no more than one character goes."""
    if start > 1 or stop:
        return None
    lead = mark if start else b""
    return lambda value, first: value.removeprefix(lead) if first and isinstance(value, bytes) else value


def _fallback_byte(text: str) -> str | bytes:
    match = _BYTE_TOKEN.match(text)
    return bytes([int(match[1], 16)]) if match else text


def _byte_level(text: str) -> bytes:
    """A byte-level token's bytes; one spelt with other characters (an added token) stands for itself."""
    alphabet = _byte_alphabet()
    try:
        return bytes([alphabet[char] for char in text])
    except KeyError:
        return text.encode()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
