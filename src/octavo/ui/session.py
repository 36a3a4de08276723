"""One visitor's conversation: what was said, the reply under way, and what the page shows of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from octavo.chat import Message
from octavo.completion import Completion
from octavo.errors import OctavoError, UserError
from octavo.sampling import SamplingParams
from octavo.ui.backend import Backend, Stream
from octavo.ui.local import LocalStream
from octavo.ui.routing import routing_view

TEXT_SECONDS = 0.05  # between two looks at a reply under way
VIEW_SECONDS = 0.3  # and at its routing
VIEW_TOKENS_PER_SECOND = 4000  # a long reply's view is drawn less often, so that the browser keeps up

_log = logging.getLogger("octavo.ui")


@dataclass(frozen=True, slots=True)
class Shown:
    """What the page is to show; None leaves a part as it is."""

    turns: list[Message]
    status: str
    question: str | None = None
    routing: str | None = None


@dataclass
class Session:
    """A visitor's. Gradio's threads share it: a reply reads what other events set meanwhile.

    Attributes:
        turns: the user's and the assistant's messages in turn.
        layer: that the routing view shows, from 0.
        view_open: whether somebody looks at it.
    """

    turns: list[Message] = field(default_factory=list)
    layer: int = 0
    view_open: bool = False
    _stream: Stream | None = None
    _busy: bool = False
    _stopping: bool = False

    def reply(self, backend: Backend, question: str, system: str, params: SamplingParams) -> Iterator[Shown]:
        """Ask, and show the reply as it comes. A question that cannot be asked is given back."""
        turns, question = self.turns, question.strip()
        if self._busy:
            yield Shown(turns, "A reply is under way; Stop ends it.")
            return
        if not question:
            yield Shown(turns, "Write something first.")
            return
        self._busy, self._stopping = True, False
        asked = [*turns, Message("user", question)]
        stream: Stream | None = None
        trouble, said, mine, cut_off = "", "", True, False
        try:
            yield Shown(asked, "…", "")
            self._stream = None
            stream = self._stream = backend.stream(_with_system(asked, system), params)
            if self._stopping:
                stream.close()
            for shown in self._show(stream, asked):
                if self.turns is not turns:  # cleared meanwhile
                    break
                yield shown
        except Exception as error:
            if self._stopping and stream is not None:  # a connection that is hung up may say so
                cut_off = True
            elif isinstance(error, OctavoError):
                trouble = _told(error)
            else:
                _log.exception("a reply failed")
                trouble = "The reply failed; the server's log says why."
        finally:
            if stream is not None:
                stream.close()
            said, mine = _said(stream), self.turns is turns
            if mine and said:
                self.turns = _with_reply(asked, said)
            self._busy = False
        if not mine:
            yield Shown(self.turns, "", None, "")
        elif trouble or not said:
            yield Shown(self.turns, trouble or "Nothing was said.", None if said else question)
        elif cut_off and stream is not None:
            yield Shown(self.turns, _how_it_went(stream.result, ""))

    def regenerate(self, backend: Backend, system: str, params: SamplingParams) -> Iterator[Shown]:
        """Ask the last question once more, in the place of its reply."""
        if self._busy or len(self.turns) < 2:
            yield Shown(self.turns, "There is no reply to give again." if not self._busy else "Stop the reply first.")
            return
        before = self.turns
        self.turns = kept = before[:-2]
        said = ""
        for shown in self.reply(backend, before[-2].content, system, params):
            said = shown.status
            yield shown if shown.question is None else Shown(shown.turns, shown.status, None, shown.routing)
        if self.turns is kept:  # no reply came: the old one stays
            self.turns = before
            yield Shown(before, f"{said} This is the reply before.")

    def stop(self) -> None:
        """End the reply under way, if there is one; what was said stays."""
        self._stopping = True
        if self._busy and self._stream is not None:
            self._stream.close()

    def clear(self) -> None:
        """Forget everything."""
        self.turns = []
        self.stop()
        self._stream = None

    def view(self) -> str:
        """The routing view of the last reply, for the layer that was chosen."""
        stream = self._stream
        if not isinstance(stream, LocalStream):
            return ""
        return routing_view(stream.routed(), self.layer)

    def _show(self, stream: Stream, asked: list[Message]) -> Iterator[Shown]:
        """The reply so far, again and again, and how it went."""
        text, n_tokens, next_text, next_view = "", 0, 0.0, 0.0
        for chunk in stream:
            text += chunk.text
            n_tokens += len(chunk.token_ids) or bool(chunk.text)
            now = time.perf_counter()
            if now < next_text or self._stopping:
                continue
            view = None
            if self.view_open and now >= next_view:
                view = self.view()
                next_view = now + VIEW_SECONDS + n_tokens / VIEW_TOKENS_PER_SECOND
            yield Shown(_with_reply(asked, text), f"{n_tokens} tokens …", None, view)
            next_text = time.perf_counter() + TEXT_SECONDS
        result = stream.result
        note = stream.note if isinstance(stream, LocalStream) else ""
        if result.text:
            yield Shown(_with_reply(asked, result.text), _how_it_went(result, note), None, self.view())


def _said(stream: Stream | None) -> str:
    """A reply's text, as far as it came; "" where there is none."""
    try:
        return "" if stream is None else stream.result.text
    except Exception:  # what ended it was told already; or it is left in the middle, and nobody reads on
        return ""


def _with_system(turns: list[Message], system: str) -> list[Message]:
    return [Message("system", system.strip()), *turns] if system.strip() else turns


def _with_reply(asked: list[Message], text: str) -> list[Message]:
    return [*asked, Message("assistant", text)]


def _how_it_went(result: Completion, note: str) -> str:
    """Counts and speed, in a line."""
    usage, timings = result.usage, result.timings
    parts = [f"{usage.completion_tokens} tokens", f"{timings.tokens_per_second:.0f} tok/s"]
    if usage.prompt_tokens:
        reused = f" ({usage.cached_tokens} of them known)" if usage.cached_tokens else ""
        parts.append(f"prompt {usage.prompt_tokens}{reused}")
    if timings.time_to_first_token:
        parts.append(f"first after {timings.time_to_first_token:.2f} s")
    if result.finish_reason == "cancelled":
        parts.append("stopped")
    elif result.finish_reason == "length":
        parts.append("cut short: Max new tokens, or the context, is used up")
    return " · ".join([*parts, *([note] if note else [])])


def _told(error: OctavoError) -> str:
    hint = f" ({error.hint})" if isinstance(error, UserError) and error.hint else ""
    return f"Not possible: {error}{hint}"
