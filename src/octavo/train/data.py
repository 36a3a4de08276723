"""Documents in, rows of tokens out: what a training step reads.

A document is one JSON object a line: {"messages": [{"role": ..., "content": ...}, ...]} or {"text": "..."}.
Whole documents are packed into rows of `seq_len + 1` tokens, so that a row gives `seq_len` inputs and as many
targets; what is left over is padded on the right. Documents in a row do not see each other (see `positions`).

Shapes: N rows, B rows of a batch, S seq_len + 1 stored tokens, T = S - 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from octavo.chat import ChatTemplate, template_for
from octavo.errors import ConfigError, UserError
from octavo.tokenizer import Tokenizer

# What a stored token is to the loss: a pad; a document's first token (never a target: nothing foretells it); a
# token of a system or user turn; a token the model speaks (an assistant turn, or plain text).
PAD, START, READ, SPOKEN = 0, 1, 2, 3

_LAYOUT = "rows-1"  # part of the cache's key: raise it when the rows' meaning changes
_OPEN_ROWS = 64  # rows a document may still be fitted into; more fill better and pack slower

Kinds = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.int32]


class Document(NamedTuple):
    """A tokenised document: its ids and, token by token, START, READ or SPOKEN."""

    ids: Sequence[int]
    kinds: bytes


class Batch(NamedTuple):
    """One forward pass of training: all [B, T].

    Attributes:
        ids: int64 tokens the model reads.
        positions: int64; -1 for a pad.
        targets: int64 tokens it should say next (0 where the weight is 0).
        weights: float32 loss weights; 0 for pads and for the first token of a document.
        spoken: bool; the target is a token the model would speak.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    spoken: Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens that the model reads; the batch must be on the host."""
        return int((self.positions >= 0).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device, on its way there: a card copies from pinned memory by itself."""
        pinned = (tensor.pin_memory() if device.type == "cuda" else tensor for tensor in self)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in pinned))


def tokenize_document(record: Any, tokenizer: Tokenizer, template: ChatTemplate) -> Document:
    """Turn one parsed line into tokens.

    Args:
        template: the chat template of `tokenizer`, from `octavo.chat.template_for`.

    Raises:
        ConfigError: the record has neither messages nor text.
        PromptError: the messages are no conversation that ends with the assistant.
    """
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        ids, spoken = template.render_training(record["messages"])
        kinds = bytearray(SPOKEN if s else READ for s in spoken)
    elif isinstance(record, dict) and isinstance(record.get("text"), str):
        ids = tokenizer.encode(record["text"], bos=True)
        if tokenizer.eos_id is not None:
            ids = [*ids, tokenizer.eos_id]
        kinds = bytearray([SPOKEN]) * len(ids)
    else:
        raise ConfigError("a document needs 'messages' (a list) or 'text' (a string)")
    if kinds:
        kinds[0] = START
    return Document(ids, bytes(kinds))


def read_documents(path: Path, tokenizer: Tokenizer, *, progress: bool = False) -> Iterator[Document]:
    """Tokenise a JSONL file, document by document.

    Raises:
        ConfigError: no such file, or a line that is not a document; the message names the line.
    """
    template = template_for(tokenizer)
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint="check [data] in the config") from None
    with file:
        bar = tqdm(file, desc=f"tokenising {path.name}", unit=" docs", disable=not progress, leave=False)
        for number, line in enumerate(_lines(bar, path), start=1):
            if not line.strip():
                continue
            try:
                yield tokenize_document(json.loads(line), tokenizer, template)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}:{number}: not JSON: {error}") from None
            except UserError as error:
                raise ConfigError(f"{path}:{number}: {error.message}", hint=error.hint) from None


def _lines(file: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8: {error.reason}") from None


class _Row:
    """A row being filled."""

    def __init__(self) -> None:
        self.ids = array("i")
        self.kinds = bytearray()


def pack(documents: Iterable[Document], row_len: int) -> Rows:
    """Fit whole documents into rows of `row_len` tokens, first fit among the rows still open.

    A document longer than a row is cut, and a later piece's first token becomes a START, since what foretells it
    stays behind. Nothing is dropped: every token of every document lies in exactly one row.
    """
    closed: list[_Row] = []
    open_rows: list[_Row] = []
    for document in documents:
        for begin in range(0, len(document.ids), row_len):
            ids, kinds = document.ids[begin : begin + row_len], document.kinds[begin : begin + row_len]
            room = row_len - len(ids)
            row = next((r for r in open_rows if len(r.ids) <= room), None)
            if row is None:
                row = _Row()
                open_rows.append(row)
            row.ids.extend(ids)
            row.kinds += bytes([START]) + kinds[1:]
            if len(row.ids) == row_len or len(open_rows) > _OPEN_ROWS:
                fullest = max(open_rows, key=lambda r: len(r.ids))
                open_rows.remove(fullest)
                closed.append(fullest)
    closed += open_rows
    tokens = np.zeros((len(closed), row_len), dtype=np.int32)
    kinds_NS = np.zeros((len(closed), row_len), dtype=np.uint8)
    for n, row in enumerate(closed):
        tokens[n, : len(row.ids)] = row.ids
        kinds_NS[n, : len(row.kinds)] = np.frombuffer(row.kinds, dtype=np.uint8)
    return Rows(tokens, kinds_NS)


def positions(kinds: Kinds) -> npt.NDArray[np.int64]:
    """Positions [N, S] that keep the documents of a row apart, -1 for pads.

    A document that begins at column i and is the d-th of its row lies at i + d*S, i + d*S + 1, ...: further
    than S from the one before. Under a sliding window of at most S nobody sees another document, and since
    rotary embeddings know differences of positions alone, each is read as if it stood by itself at position 0.
    """
    row_len = kinds.shape[1]
    nth_document = np.cumsum(kinds == START, axis=1, dtype=np.int64) - 1
    apart = np.arange(row_len, dtype=np.int64) + nth_document * row_len
    return np.where(kinds == PAD, -1, apart)


@dataclass(frozen=True)
class Rows:
    """Packed rows: `tokens` int32 [N, S] and `kinds` uint8 [N, S] (PAD, START, READ, SPOKEN)."""

    tokens: Tokens
    kinds: Kinds

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_targets(self) -> int:
        """Tokens that are a target: neither pads nor first of their document."""
        return int((self.kinds >= READ).sum())

    def mean_visible(self, window: int | None = None) -> float:
        """How many tokens a token that the model reads attends to on average, itself included.

        Args:
            window: the model's sliding window; a document's own tokens are all there is to see besides.
        """
        total = tokens = 0
        for start in range(0, len(self), 4096):  # a part at a time: the numbers are larger than the rows
            kinds = self.kinds[start : start + 4096, :-1]
            column = np.arange(kinds.shape[1])
            first = np.maximum.accumulate(np.where(kinds == START, column, 0), axis=1)
            visible = np.minimum(column - first + 1, window or kinds.shape[1])[kinds != PAD]
            total, tokens = total + int(visible.sum()), tokens + len(visible)
        return total / max(1, tokens)

    def batch(self, indices: npt.NDArray[np.int64] | slice, user_loss_weight: float = 1.0) -> Batch:
        """The rows of these indices as tensors; `user_loss_weight` is the weight of READ targets."""
        tokens, kinds = self.tokens[indices].astype(np.int64), self.kinds[indices]
        weight_of = np.array([0.0, 0.0, user_loss_weight, 1.0], dtype=np.float32)
        targets = kinds[:, 1:]
        return Batch(
            ids=torch.from_numpy(tokens[:, :-1].copy()),
            positions=torch.from_numpy(positions(kinds)[:, :-1].copy()),
            targets=torch.from_numpy(tokens[:, 1:].copy()),
            weights=torch.from_numpy(weight_of[targets]),
            spoken=torch.from_numpy(targets == SPOKEN),
        )


class Order:
    """Which rows a step reads: a fresh permutation every epoch, and a pure function of (seed, step)."""

    def __init__(self, n_rows: int, rows_per_step: int, seed: int) -> None:
        self.n_rows, self.rows_per_step, self.seed = n_rows, rows_per_step, seed
        self._epoch, self._permutation = -1, np.zeros(0, dtype=np.int64)

    def rows_of(self, step: int) -> npt.NDArray[np.int64]:
        """Indices of the rows of step 0, 1, ...; a step may straddle two epochs."""
        first = step * self.rows_per_step
        return np.array([self._row(n) for n in range(first, first + self.rows_per_step)], dtype=np.int64)

    def _row(self, n: int) -> int:
        epoch, place = divmod(n, self.n_rows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
        return int(self._permutation[place])


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a folder, or the one a tokenizer file lies beside.

    Raises:
        ConfigError: there is none.
        TokenizerError: it cannot be read.
    """
    tokenizer = Tokenizer.from_folder(path) if path.is_dir() else None
    if path.is_file():
        tokenizer = Tokenizer.from_file(path)
    if tokenizer is None:
        raise ConfigError(f"{path}: no tokenizer here", hint="[data] tokenizer names a tokenizer.model or its folder")
    return tokenizer


def load_rows(path: Path, tokenizer: Tokenizer, seq_len: int, cache: Path, *, progress: bool = False) -> Rows:
    """The packed rows of a JSONL file, from `cache` if they were made from the same text in the same way.

    The key is the text, the tokenizer's pieces, what the template makes of a probe, and the row length: a change
    of any makes new rows. A cache that cannot be written or read is no error; the rows are simply made again.

    Raises:
        ConfigError: the file is missing, holds a line that is no document, or no document at all.
    """
    key = _key(path, tokenizer, seq_len)
    file = cache / f"{path.stem}-{key}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        arrays = load_file(file)
        return Rows(arrays["tokens"], arrays["kinds"])
    rows = pack(read_documents(path, tokenizer, progress=progress), seq_len + 1)
    if not rows.n_targets:
        raise ConfigError(f"{path}: holds no text to learn from", hint="one JSON object a line")
    with contextlib.suppress(OSError, SafetensorError):
        cache.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}.tmp")
        save_file({"tokens": rows.tokens, "kinds": rows.kinds}, beside)
        beside.replace(file)
    return rows


_PROBE = "Octavo: 12 + 30 = 42, déjà vu, für Elise, ¿qué?\n    return x[0]  # 😀"


def _key(path: Path, tokenizer: Tokenizer, seq_len: int) -> str:
    """A short hash of everything the rows depend on."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint="check [data] in the config") from None
    turns = [{"role": role, "content": _PROBE} for role in ("system", "user", "assistant")]
    template = template_for(tokenizer)
    probe = [tokenize_document(record, tokenizer, template) for record in ({"messages": turns}, {"text": _PROBE})]
    seen = [tokenizer.n_vocab, tokenizer.bos_id, tokenizer.eos_id, seq_len, _LAYOUT]
    pieces = [tokenizer.decode([i]) for i in range(min(tokenizer.n_vocab, 65536))]
    digest.update(repr([seen, [(list(ids), kinds) for ids, kinds in probe], pieces]).encode())
    return digest.hexdigest()[:16]
