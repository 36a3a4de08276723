"""Replies in the shapes of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import octavo
from octavo.completion import Completion, Usage
from octavo.sampling import TokenLogprobs
from octavo.tokenizer import Tokenizer

FINGERPRINT = f"octavo-{octavo.__version__}"


class Head:
    """What every piece of one reply begins with.

    Args:
        kind: "chat.completion", "chat.completion.chunk" or "text_completion".
        model: as the client called it.
    """

    def __init__(self, kind: str, model: str) -> None:
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        self._fields = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    def __call__(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A reply, or a chunk of one."""
        return {**self._fields, "choices": choices, **more}


def usage(found: Iterable[Usage], *, untold: int = 0) -> dict[str, Any]:
    """Tokens over several prompts.

    Args:
        found: of each prompt.
        untold: tokens that were made and are not given, of replies that had to have none.
    """
    found = tuple(found)
    prompt = sum(one.prompt_tokens for one in found)
    completion = sum(one.completion_tokens for one in found) - untold
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in found)},
    }


def extras(completions: Sequence[Completion]) -> dict[str, Any]:
    """Octavo's own fields: how the experts fared where they are streamed, else nothing."""
    experts = completions[-1].to_dict()["experts"]  # counted over all sequences, so the last one saw the most
    return {} if experts is None else {"octavo": {"experts": experts}}


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What a token writes, which may be a part of a character; of a control token its name."""
    piece = tokenizer.piece(token_id)
    return tokenizer.token_name(token_id).encode() if piece is None else piece.text


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The same as text, with U+FFFD for what is none."""
    return token_bytes(tokenizer, token_id).decode(errors="replace")


# ---------------------------------------- chat


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
    """Log-probabilities as chat completions have them."""
    if logprobs is None:
        return None

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(tokenizer, token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    content = [
        one(each.token_id, each.logprob) | {"top_logprobs": [one(*pair) for pair in each.top]} for each in logprobs
    ]
    return {"content": content, "refusal": None}


# ---------------------------------------- completions


class TextLogprobs:
    """Log-probabilities as completions have them, token after token.

    Args:
        tokenizer: the model's.
        prompt_ids: of the prompt.
        echo: whether the prompt is a part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, echo: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.detokenizer(mid_text=not echo)
        self._offset = 0 if echo else len(tokenizer.decode(prompt_ids))

    def prompt(self, ids: Sequence[int], found: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Those of the prompt; its first token has none."""
        return self._columns([(token_id, one) for token_id, one in zip(ids, found, strict=True)])

    def reply(self, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Those of the next tokens of the reply."""
        return self._columns([(one.token_id, one) for one in found])

    def _columns(self, rows: Sequence[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        tokens, offsets = [], []
        for token_id, _ in rows:
            tokens.append(token_text(self._tokenizer, token_id))
            offsets.append(self._offset)
            self._offset += len(self._decoder.push(token_id))
        return {
            "tokens": tokens,
            "token_logprobs": [None if one is None else one.logprob for _, one in rows],
            "top_logprobs": [None if one is None else self._top(one) for _, one in rows],
            "text_offset": offsets,
        }

    def _top(self, one: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens by their text, and the chosen one; of two with the same text the likelier."""
        top: dict[str, float] = {}
        for token_id, logprob in (*one.top, (one.token_id, one.logprob)):
            top.setdefault(token_text(self._tokenizer, token_id), logprob)
        return top


def join_columns(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    """The prompt's log-probabilities, then the reply's."""
    if first is None or second is None:
        return first or second
    return {name: first[name] + second[name] for name in first}


def text_choice(
    index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    """A reply to one of several prompts, whole or a piece of it."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
