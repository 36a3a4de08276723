"""Text to token ids and back: SentencePiece (`tokenizer.model`) or `tokenizer.json`, behind one class.

Three promises hold for both kinds of file:

* `Tokenizer.encode` takes all it is given as text. A control token (`<s>`, `[INST]`, `<|im_end|>`) is never
  parsed out of it: whoever types one gets its letters. Only `encode_template` makes control tokens, and only
  out of the parts that a chat template wrote itself.
* `Detokenizer` shows whole characters only, costs the same for every token, and what it gives, put together,
  is exactly what `Tokenizer.decode` gives.
* Bytes that are not UTF-8 become U+FFFD in the way of the file's own kind: one for each byte of byte-fallback
  pieces (SentencePiece's rule), one for each maximal ill-formed part of byte-level tokens (Unicode 15, 3.9).
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from octavo.errors import PromptError, TokenizerError
from octavo.tokenizer.files import Settings, find_tokenizer_file, read_bytes
from octavo.tokenizer.pieces import Backend, Piece

__all__ = ["Detokenizer", "TemplatePart", "Tokenizer"]

REPLACEMENT = "\ufffd"


class TemplatePart(NamedTuple):
    """A stretch of a rendered chat template: the template's own words (literal), or a person's."""

    text: str
    literal: bool


class Tokenizer:
    """Turns text into token ids and back.

    Attributes:
        path: the file it was read from: a GGUF file where the tokenizer travelled in one.
        n_vocab: how many ids there are; they run from 0 to n_vocab - 1.
        bos_id, eos_id: the tokens that open and close a text; None where the checkpoint has none.
        chat_template: the checkpoint's own jinja2 template, if it carries one.
        adds_bos: False where tokenizer_config.json says that BOS does not open a text.
    """

    def __init__(self, backend: Backend, path: Path, settings: Settings) -> None:
        self._backend = backend
        self.path = path
        self.n_vocab = backend.n_vocab
        self.bos_id = _named_id(backend, "bos_token", settings.bos_token, backend.bos_id)
        self.eos_id = _named_id(backend, "eos_token", settings.eos_token, backend.eos_id)
        self.chat_template = settings.chat_template
        self.adds_bos = settings.adds_bos
        self._pieces: dict[int, Piece | None] = {}
        self._control_pattern: re.Pattern[str] | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """Reads a checkpoint folder's tokenizer: `tokenizer.model` if it is there, else `tokenizer.json`.

        `tokenizer.model.v3` and the like are read too; tokenizer_config.json, added_tokens.json and
        chat_template.jinja are heeded where they stand beside it. None if the folder holds no tokenizer.

        Raises:
            TokenizerError: no such folder; a damaged file; a kind that is not read here (tekken.json).
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise TokenizerError(f"{folder}: no such folder", "give the folder that holds the tokenizer's files")
        path = find_tokenizer_file(folder)
        return None if path is None else cls.from_file(path)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads one tokenizer file, and the settings beside it.

        Raises:
            TokenizerError: the file is absent, damaged or of an unknown kind.
        """
        path = Path(path)
        settings = Settings.read(path.parent)
        if path.suffix == ".json":
            from octavo.tokenizer.hf_json import TokenizerJson

            return cls(TokenizerJson(path, settings), path, settings)
        from octavo.tokenizer.spm import SentencePiece

        return cls(SentencePiece(read_bytes(path), path, settings), path, settings)

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Token ids of plain text. Control tokens are never parsed out of it.

        Args:
            text: any text; "" gives no token (but BOS, if asked).
            bos: put the BOS token first, where the tokenizer has one.

        Raises:
            PromptError: the text holds half a surrogate pair, which is not valid Unicode.
        """
        ids = self._encode_text(text)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def encode_template(self, parts: Sequence[TemplatePart]) -> list[int]:
        """Token ids of a rendered chat template: only its own words may become control tokens.

        Words are merged across the parts as if the whole had been encoded at once. BOS is added nowhere.

        Raises:
            PromptError: as `encode`.
        """
        full = "".join(part.text for part in parts)
        _check_unicode(full)
        if self._controls_are_literal(full, parts):
            ids = self._backend.encode_controls(full)
            if ids is not None:
                return ids
        runs = self._runs(parts)
        return [i for run in runs for i in ([run] if isinstance(run, int) else self._encode_text(run))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Control tokens, and ids from n_vocab on (a model's padding), have none."""
        detokenizer = self.detokenizer()
        return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()

    def detokenizer(self, *, mid_text: bool = False) -> Detokenizer:
        """A decoder that takes one token at a time.

        Args:
            mid_text: the tokens go on from text that stands already: a space before the first word is kept.
        """
        return Detokenizer(self, mid_text=mid_text)

    def control_id(self, name: str) -> int | None:
        """The id of the control token of that name, such as "[INST]"; None if there is none."""
        return self._backend.control_id(name)

    def find_control(self, text: str) -> str | None:
        """The first control token that a text spells, or None. `encode` would keep it as text."""
        match = next(iter(self._controls_in(text)), None)
        return match.group() if match else None

    def token_name(self, token_id: int) -> str:
        """The token as the vocabulary spells it, control tokens included; "" for an id from n_vocab on."""
        return self._backend.name(token_id) if 0 <= token_id < self.n_vocab else ""

    def piece(self, token_id: int) -> Piece | None:
        """What a token writes; None for one that has no text, such as a control token."""
        try:
            return self._pieces[token_id]
        except KeyError:
            piece = self._backend.piece(token_id) if 0 <= token_id < self.n_vocab else None
            self._pieces[token_id] = piece
            return piece

    def _encode_text(self, text: str) -> list[int]:
        _check_unicode(text)
        ids = self._backend.encode(text)
        if self._backend.guarded.isdisjoint(ids):
            return ids
        # The file's encoder knows a control token as a plain word too: cut each spelling of it in two.
        cuts = [match.start() + 1 for match in self._controls_in(text) if match.end() - match.start() > 1]
        if not cuts:
            name = self.token_name(next(i for i in ids if i in self._backend.guarded))
            raise PromptError(f"the text turns into the control token {name}", "take that spelling out of the text")
        bounds = [0, *cuts, len(text)]
        return [i for start, stop in itertools.pairwise(bounds) for i in self._encode_text(text[start:stop])]

    def _controls_in(self, text: str) -> Iterable[re.Match[str]]:
        """Every spelling of a control token in a text, the longest one at each place."""
        if self._control_pattern is None:
            names = sorted(filter(None, self._backend.controls()), key=len, reverse=True)
            # (?!) matches nowhere, for a tokenizer without control tokens.
            self._control_pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        return self._control_pattern.finditer(text)

    def _controls_are_literal(self, full: str, parts: Sequence[TemplatePart]) -> bool:
        """Whether every control token spelt in the whole was spelt by the template alone."""
        owners = [part.literal for part in parts for _ in part.text]
        return all(all(owners[match.start() : match.end()]) for match in self._controls_in(full))

    def _runs(self, parts: Sequence[TemplatePart]) -> list[str | int]:
        """The literal parts' control ids, and between them the text of any part, unbroken."""
        runs: list[str | int] = []

        def write(text: str) -> None:
            last = runs.pop() if runs and isinstance(runs[-1], str) else ""
            runs.append(f"{last}{text}")

        for text, literal in parts:
            end = 0
            for match in self._controls_in(text) if literal else ():
                write(text[end : match.start()])
                runs.append(self._backend.controls()[match.group()])
                end = match.end()
            write(text[end:])
        return runs


class Detokenizer:
    """Token ids in, text out, one at a time: whole characters only, at the same cost for every token.

    What `push` returns, followed by what `flush` returns, is together exactly `Tokenizer.decode` of the ids.
    """

    __slots__ = ("_at_start", "_pending", "_rules", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, mid_text: bool = False) -> None:
        self._tokenizer = tokenizer
        self._rules = tokenizer._backend.rules
        self._pending = b""  # the beginning of a character: 3 bytes at most
        self._at_start = not mid_text

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        piece = self._tokenizer.piece(token_id)
        if piece is None:
            return self.flush() if self._rules.control_breaks else ""
        data = piece.text
        if self._at_start:
            data = piece.at_start
            self._at_start = not (data if self._rules.strips_on else piece.text)
        text, self._pending = _decode_utf8(self._pending + data, self._rules.per_byte, final=False)
        return text

    def flush(self) -> str:
        """What is still held back: U+FFFD for a character that will never be finished, or ""."""
        text, self._pending = _decode_utf8(self._pending, self._rules.per_byte, final=True)
        return text


def _decode_utf8(data: bytes, per_byte: bool, *, final: bool) -> tuple[str, bytes]:
    """Decodes what is certain; returns the text, and the bytes of a character that may yet be finished."""
    out = ""
    while data:
        try:
            text, used = codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError as error:
            marks = error.end - error.start if per_byte else 1
            out += data[: error.start].decode() + REPLACEMENT * marks
            data = data[error.end :]
        else:
            return out + text, data[used:]
    return out, b""


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise PromptError(
            f"the text holds {half} at character {error.start}, half of a surrogate pair: not valid Unicode",
            "read the text as UTF-8",
        ) from None


def _named_id(backend: Backend, key: str, name: str | None, default: int | None) -> int | None:
    """The id of the BOS or EOS token: the one tokenizer_config.json names, else the tokenizer file's own."""
    if name is None:
        return default
    found = backend.control_id(name)
    if found is None:
        raise TokenizerError(
            f"tokenizer_config.json: {key} is {name!r}, a token this tokenizer does not have",
            "name a token of this checkpoint, or take the key out",
        )
    return found
