"""Replies that obey a grammar: JSON, JSON of a schema, or a Lark grammar, by the library llguidance.

A `Constraint` says before each token which ones may come next. It goes by the bytes of tokens, so that every way
of cutting a text into tokens is open to the model, and by a parser, so that any depth of nesting is kept track of.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from octavo.errors import OptionError
from octavo.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA_CHARS = 100_000  # written as JSON
CACHED = 32  # compiled grammars of one model; each holds up to a few MB

# Between JSON's words: one blank, or a new line and its indent. Without a bound a small model pads for ever.
_BLANKS = r"( |\n {0,32})"
# JSON Schema lets an unknown format pass as a remark; llguidance, which knows these, would refuse it.
_FORMATS = frozenset(
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"]
)
_VALUES = frozenset(["const", "enum", "default", "examples"])  # keywords that hold values, not schemas


class Grammar:
    """What replies of one model may be asked to consist of. Thread-safe; its constraints are not.

    Args:
        tokenizer: the model's.
        vocab_size: how many logits the model has; those beyond the tokenizer's ids are never allowed.
        stop_ids: that end a reply; allowed where the grammar is complete, and nowhere else.

    Raises:
        OptionError: llguidance is not installed; there is no stop id.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Iterable[int]) -> None:
        _import_llguidance()
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = sorted({i for i in stop_ids if 0 <= i < vocab_size})
        if not self._stop_ids:
            raise OptionError(
                "response_format needs a model that can end its reply, and this one has no end-of-text token",
                "name it as eos_token in tokenizer_config.json",
            )
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def json_object(self) -> Callable[[], GrammarConstraint]:
        """A JSON object, whatever it holds."""
        return self.json_schema({"type": "object"})

    def json_schema(
        self, schema: Mapping[str, Any], *, where: str = "response_format"
    ) -> Callable[[], GrammarConstraint]:
        """JSON that is valid against a schema; properties come in the schema's order.

        Args:
            schema: JSON Schema, without references to other documents; a `format` that is not known is not heeded.
            where: what the schema was given as, for messages.

        Returns:
            A function that makes a constraint for one reply.

        Raises:
            OptionError: the schema is malformed, too large or too deep, uses what cannot be enforced, or nothing
                satisfies it.
        """
        # A reply's first token often opens with a blank, of which the detokenizer shows nothing.
        return self._maker(f'start: " "? body\nbody: {_json_rule(schema, where)}\n', where)

    def json_rule(self, schema: Mapping[str, Any], *, where: str = "response_format") -> str:
        """The right-hand side of a rule for `lark`: JSON that is valid against a schema.

        Raises:
            OptionError: as `json_schema`.
        """
        self.json_schema(schema, where=where)
        return _json_rule(schema, where)

    def lark(self, source: str, *, where: str = "response_format") -> Callable[[], GrammarConstraint]:
        """Text that llguidance's dialect of Lark describes; `<[7]>` is the token of id 7, control or not.

        Raises:
            OptionError: the grammar is malformed, too large, or nothing satisfies it.
        """
        return self._maker(source, where)

    def _maker(self, source: str, where: str) -> Callable[[], GrammarConstraint]:
        matcher = self._matcher(source, where)
        return lambda: GrammarConstraint(matcher.deep_copy(), self._vocab_size, where)

    def _matcher(self, source: str, where: str) -> LLMatcher:
        """The compiled grammar, from the cache if it is there."""
        with self._lock:
            if source in self._compiled:
                self._compiled.move_to_end(source)
                return self._compiled[source]
            if self._tokens is None:
                self._tokens = _read_tokens(self._tokenizer, self._vocab_size, self._stop_ids)
            tokens = self._tokens
        matcher = self._compile(source, tokens, where)
        with self._lock:
            self._compiled[source] = matcher
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
        return matcher

    def _compile(self, source: str, tokens: LLTokenizer, where: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        # no_forcing: where only one text can follow, llguidance would insist on one way of cutting it into tokens.
        matcher = LLMatcher(
            tokens,
            f'%llguidance {{"no_forcing": true}}\n{source}',
            log_level=0,
            limits=LLParserLimits(max_items_in_row=20_000, verbose_errors=False),
        )
        if matcher.is_error():
            raise _refusal(matcher, where)
        # An impossible grammar is only found out by its first steps.
        first_V = GrammarConstraint(matcher.deep_copy(), self._vocab_size, where).allowed()
        if not any(self._opens(int(i)) for i in first_V.nonzero()):
            raise OptionError(f"{where}: nothing satisfies it", "a schema must not refer to itself only, for one")
        return matcher

    def _opens(self, token_id: int) -> bool:
        """Whether a reply that begins with this token has begun with more than a blank."""
        piece = self._tokenizer.piece(token_id)
        return piece is None or bool(piece.text.strip())


class GrammarConstraint:
    """What one reply may consist of; has the methods of `octavo.engine.Constraint`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, where: str) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._where = where

    def allowed(self) -> Tensor:
        """Return bool [V] on the CPU: the tokens that may come next, stop ids where the grammar is complete.

        Raises:
            OptionError: the reply came to a place where the grammar is too complex to go on.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed_V = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        if self._matcher.is_error() or not allowed_V.any():
            raise _refusal(self._matcher, self._where)
        return torch.from_numpy(allowed_V)

    def accept(self, token_id: int) -> None:
        """Go on with a token that was allowed.

        Raises:
            OptionError: it was not, or the grammar is too complex to go on.
        """
        if not self._matcher.consume_token(token_id):
            raise _refusal(self._matcher, self._where)


class _Tokens:
    """A vocabulary as llguidance wants it: each token's bytes, and which tokens are no text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: list[int]) -> None:
        self.eos_token_id = stop_ids[0]
        self.bos_token_id = tokenizer.bos_id
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        self._tokenizer = tokenizer
        for token_id in range(vocab_size):
            name = tokenizer.token_name(token_id)
            piece = tokenizer.piece(token_id)
            # A stop id ends the reply even where it has a text, and so may not stand within a string.
            control = piece is None or token_id in stop_ids or tokenizer.control_id(name) == token_id
            if control and name:
                self.special_token_ids.append(token_id)
            self.tokens.append(name.encode() if control or piece is None else piece.text)

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode(errors="replace"))


def _read_tokens(tokenizer: Tokenizer, vocab_size: int, stop_ids: list[int]) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapper = TokenizerWrapper(_Tokens(tokenizer, vocab_size, stop_ids))
    return LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=stop_ids)


def _json_rule(schema: Mapping[str, Any], where: str) -> str:
    """A schema as llguidance's Lark takes it."""
    if not isinstance(schema, Mapping):
        raise OptionError(f"{where}: a schema must be a JSON object, found {type(schema).__name__}")
    try:
        text = json.dumps({**_known(schema), "x-guidance": {"whitespace_pattern": _BLANKS}}, allow_nan=False)
    except RecursionError:
        raise OptionError(f"{where}: the schema is nested too deeply", "use $defs and $ref") from None
    except (TypeError, ValueError) as error:
        raise OptionError(f"{where}: the schema is not JSON: {error}") from None
    if len(text) > MAX_SCHEMA_CHARS:
        raise OptionError(f"{where}: the schema has {len(text):,} characters; {MAX_SCHEMA_CHARS:,} are the limit")
    return f"%json {text}"


def _known(schema: Any) -> Any:
    """A schema without the formats that are unknown."""
    if isinstance(schema, Mapping):
        return {
            key: value if key in _VALUES else _known(value)
            for key, value in schema.items()
            if not (key == "format" and isinstance(value, str) and value not in _FORMATS)
        }
    return [_known(one) for one in schema] if isinstance(schema, list | tuple) else schema


def _refusal(matcher: LLMatcher, where: str) -> OptionError:
    """llguidance's error in one line, without the grammar that it quotes."""
    text = matcher.get_error() or "nothing satisfies it"
    if text.startswith(("panic", "NoExtension")):
        return OptionError(f"{where}: it cannot be satisfied", "say less in the schema")
    reason = re.sub(r"^at \d+\(\d+\): |^failed to compile JSON schema: |^failed to parse \"%json\": ", "", text)
    reason = reason.removeprefix("failed to compile JSON schema: ")
    lines = [line.strip() for line in re.split(r"\n\s*1 \| %llguidance|\n<", reason)[0].splitlines()]
    return OptionError(f"{where}: {' '.join(filter(None, lines))}", "not all of JSON Schema can be enforced")


def _import_llguidance() -> None:
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise OptionError(
            "response_format and tools need the package llguidance", "pip install 'octavo[serve]'"
        ) from None
