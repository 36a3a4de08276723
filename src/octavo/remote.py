"""A model behind an address: an OpenAI-compatible server, or one on the Hugging Face Inference API.

`RemoteModel.stream` gives the chunks that `LLM.stream` gives, but for what the API does not tell: token ids, and with
them log-probabilities. Whatever goes wrong becomes one line that names the address and what it said.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import SplitResult, urlsplit

from octavo.chat import Message, Persona
from octavo.chat.messages import read_conversation
from octavo.completion import Choice, Chunk, Completion, FinishReason, Timings, Usage, read_asked
from octavo.errors import HubError, OptionError, PromptError, UserError
from octavo.hub import REPO_ID
from octavo.sampling import SamplingParams

__all__ = ["RemoteModel", "RemoteStream", "TooLongError"]

KEY = "OCTAVO_API_KEY"
ROUTER = "https://router.huggingface.co/v1"
CONNECT_SECONDS = 10.0
SILENT_SECONDS = 300.0  # a long prompt on a slow machine takes minutes before its first word
SHOWN = 300  # characters of what a server says that a message repeats

_PROVIDER = re.compile(r":[\w-]+", re.ASCII)  # owner/name:provider chooses who runs it
_FINISHED: dict[str, FinishReason] = {"length": "length", "max_tokens": "length"}  # all else is "stop"
_TOO_LONG = re.compile(
    r"context[ _](length|window|size)|maximum context|(prompt|input|request|conversation)s? (is|are) too long"
    r"|too many tokens|reduce the length|tokens.* must be <=|prompt has \d+ tokens",
    re.IGNORECASE | re.DOTALL,
)
# What chat completions have no field for, and why it cannot be done without.
_NO_FIELD = {
    "stop_ids": ((), "give the text instead, as stop"),
    "logprobs": (None, "a server tells tokens' texts, not their ids: ask it without octavo"),
    "n": (1, "a stream gives one reply"),
}
# Fields that OpenAI-compatible servers of open models know, Octavo's own among them, but the API itself does not.
_EXTENSIONS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
# The API's own fields, each with the value that does nothing and is left out.
_FIELDS = {"top_p": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "seed": None, "max_tokens": None}


class TooLongError(PromptError):
    """The server says that the conversation does not fit its model's context."""


class RemoteStream(Iterator[Chunk]):
    """A reply as it comes. Iterate for chunks; close it, or leave its `with` block, to hang up, which stops the model.

    Chunks hold text alone; the last one, without text, brings the finish reason, usage and timings. Usage is what the
    server tells; where it tells none, each piece that came counts as a token, and the prompt's tokens as 0. Another
    thread may close it: the chunks then end.
    """

    def __init__(self, model: RemoteModel, fields: dict[str, Any]) -> None:
        self._model = model
        self._max_tokens = fields.get("max_tokens")
        self._client = model._client()
        self._started_at = time.perf_counter()
        self._first_at = self._last_at = self._started_at
        self._text = ""
        self._pieces = 0
        self._finish_reason: FinishReason | None = None
        self._usage: Usage | None = None
        self._open, self._reading = True, False
        try:
            self._events = model._post(self._client, fields)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Chunk:
        if not self._open:
            raise StopIteration
        self._reading = True
        try:
            text = self._next_text()
        except BaseException as error:
            if not self._open and isinstance(error, Exception):  # another thread hung up, and that is what broke
                raise StopIteration from None
            self._open = False
            raise
        finally:
            self._reading = False
            if not self._open:
                self._client.close()
        if text:
            return Chunk(text, ())
        self._open = False
        self._client.close()
        usage = self._count()
        if self._finish_reason == "length" and self._usage and usage.completion_tokens < (self._max_tokens or 0):
            self._model.context = usage.total_tokens
        return Chunk("", (), None, self._finish_reason, usage, self._clock())

    def _next_text(self) -> str:
        """The next piece of text; "" at the reply's end."""
        while True:
            try:
                event = next(self._events, None)
                if event is None:
                    break
                text = self._take(event)
            except _failures() as error:
                raise self._model._explain(error, begun=self._pieces > 0) from error
            if text:
                now = time.perf_counter()
                self._first_at, self._last_at = (self._first_at if self._pieces else now), now
                self._pieces += 1
                self._text += text
                return text
        if self._finish_reason is None:
            raise self._model._broken(begun=self._pieces > 0)
        return ""

    def _take(self, event: Any) -> str:
        """Take in one event; return its text."""
        if event.usage:
            details = event.usage.get("prompt_tokens_details") or {}
            cached = details.get("cached_tokens") or 0
            self._usage = Usage(int(event.usage.prompt_tokens), int(event.usage.completion_tokens), int(cached))
        if not event.choices:
            return ""
        choice = event.choices[0]
        if choice.finish_reason == "content_filter":
            raise HubError(f"{self._model.address}: its content filter ended the reply", hint="ask in other words")
        if choice.finish_reason == "error":
            raise HubError(f"{self._model.address}: failed in the middle of the reply", hint="its log says more")
        if choice.finish_reason is not None:
            self._finish_reason = _FINISHED.get(choice.finish_reason, "stop")
        text = choice.delta.content if choice.delta else ""
        if not isinstance(text, str | None):
            raise TypeError(f"content is {type(text).__name__}")
        return text or ""

    def _count(self) -> Usage:
        return self._usage or Usage(0, self._pieces)

    def _clock(self) -> Timings:
        if not self._pieces:
            return Timings(0.0, 0.0, 0.0, 0.0)
        seconds, after_first = self._last_at - self._first_at, max(self._count().completion_tokens - 1, 0)
        return Timings(
            time_to_first_token=self._first_at - self._started_at,
            prefill_seconds=0.0,  # only the server knows
            decode_seconds=seconds,
            tokens_per_second=after_first / seconds if seconds > 0 else 0.0,
        )

    def close(self) -> None:
        """Hang up. Nothing happens if the reply is finished or closed already."""
        if self._open:
            self._open = False
            self._client.exit_stack.hang_up()
            if not self._reading:  # whoever reads cleans up, awake now
                self._client.close()

    @property
    def result(self) -> Completion:
        """The whole reply, once the stream is read to its end; after an earlier close, what came before.

        Raises:
            RuntimeError: the stream is still open.
        """
        if self._open:
            raise RuntimeError("the reply is not finished: read the stream to its end, or close it")
        choice = Choice(0, self._text, (), self._finish_reason or "cancelled")
        return Completion((choice,), self._count(), self._clock())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_open", False):  # a stream dropped half-read must not keep the server busy
            self.close()


class _Connection(ExitStack):
    """What the client keeps its response in, so that another thread can hang up on a server that says nothing."""

    _response: Any = None

    def enter_context(self, cm: AbstractContextManager[Any, Any]) -> Any:
        self._response = super().enter_context(cm)
        return self._response

    def hang_up(self) -> None:
        """End the connection, and any wait for it: closing it would leave the waiting thread where it is."""
        stream = None if self._response is None else self._response.extensions.get("network_stream")
        connection = None if stream is None else stream.get_extra_info("socket")
        if connection is not None:
            with suppress(OSError):  # it has ended
                connection.shutdown(socket.SHUT_RDWR)


class RemoteModel:
    """A model to talk to that runs elsewhere. Threads may share one.

    A key is sent to whom it belongs, and nobody else: a server at an address of one's own gets OCTAVO_API_KEY; Hugging
    Face gets the token that `huggingface_hub` finds (HF_TOKEN, or that of `hf auth login`).

    Args:
        address: the base address of an OpenAI-compatible API, such as "http://127.0.0.1:8000/v1" ("/v1" is added
            where it is missing), or a model's Hub id, "owner/name", maybe with ":provider", for the Inference API.
        model: which of an address's models; by default the first that it lists.
        api_key: in the place of the one found as above.
        timeout: seconds without a word until a reply is given up.

    Attributes:
        address: as given.
        context: tokens of a sequence, prompt and reply together; None until a reply is cut short there, as no field of
            the API tells.

    Raises:
        OptionError: the address is neither, holds a password, or names a model already.
    """

    def __init__(
        self, address: str, *, model: str | None = None, api_key: str | None = None, timeout: float = SILENT_SECONDS
    ) -> None:
        self.address = address
        self.context: int | None = None
        self._url = _parse_address(address)
        if self._url is None and model is not None:
            raise OptionError(f"{address} names a model already; {model!r} has no place", hint="give one of the two")
        self._name = address if self._url is None else model
        self._key = api_key or self._find_key()
        self._timeout = timeout

    def _find_key(self) -> str | None:
        host = "" if self._url is None else self._url.hostname or ""
        if self._url is not None and os.environ.get(KEY):
            return os.environ[KEY]
        if self._url is None or (self._url.scheme == "https" and f".{host}".endswith(".huggingface.co")):
            from huggingface_hub import get_token

            return get_token()
        return None

    @functools.cached_property
    def model(self) -> str:
        """The model's name, as the server calls it; it is asked where none was given.

        Raises:
            HubError: it cannot be asked, or lists none.
        """
        if self._name is not None:
            return self._name
        names = self.models()
        if not names:
            raise HubError(f"{self.address}: lists no model", hint="name one: --model NAME")
        return names[0]

    def models(self) -> list[str]:
        """The names of the models that are served at the address.

        Raises:
            HubError: it cannot be reached, refuses, or answers something else.
        """
        from huggingface_hub import get_session, hf_raise_for_status

        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            response = get_session().get(self._models_url(), headers=headers, timeout=self._timeouts())
            hf_raise_for_status(response)
            return [str(one["id"]) for one in response.json()["data"]]
        except _failures() as error:
            raise self._explain(error, begun=False, listing=True) from error

    def stream(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        params: SamplingParams | None = None,
        *,
        persona: Persona | str | Path | None = None,
        **options: Any,
    ) -> RemoteStream:
        """Ask for the reply to a conversation; it comes in chunks. Returns once the server begins to answer.

        Args:
            messages: `Message`s or `{"role": ..., "content": ...}`, the user's last.
            params: how to sample and when to stop; by default the persona's defaults, then `SamplingParams()`'s.
            persona: one by name or file; its system prompt is used unless the messages bring one.
            options: fields of `SamplingParams`, over all of these.

        Raises:
            PromptError: the conversation is empty or out of turn.
            TooLongError: the server finds it too long.
            OptionError: an option is unknown, out of range, or nothing the API has a field for.
            PersonaError: no such persona, or a file that cannot be used.
            HubError: the server cannot be reached, refuses, or answers something that is not the API.
        """
        turns, params = read_asked(messages, params, persona, options)
        read_conversation(turns, last="user")
        fields = self.fields(params)
        fields["messages"] = [{"role": turn.role, "content": turn.content} for turn in turns]
        return RemoteStream(self, fields | {"model": self.model})

    def fields(self, params: SamplingParams) -> dict[str, Any]:
        """The request's fields for these parameters: the temperature, and what is not off.

        Raises:
            OptionError: one of them is nothing that can be asked for here.
        """
        for name, (off, hint) in _NO_FIELD.items():
            if getattr(params, name) != off:
                shown = f"{name} is {getattr(params, name)!r}"
                raise OptionError(f"{shown}; {self.address} cannot be asked for that", hint=hint)
        fields: dict[str, Any] = {"temperature": params.temperature}
        fields |= {name: getattr(params, name) for name, off in _FIELDS.items() if getattr(params, name) != off}
        if params.stop:
            fields["stop"] = list(params.stop)
        if params.logit_bias:
            fields["logit_bias"] = {str(token_id): bias for token_id, bias in params.logit_bias.items()}
        if extra := {name: getattr(params, name) for name, off in _EXTENSIONS.items() if getattr(params, name) != off}:
            if self._url is None:
                name, value = next(iter(extra.items()))
                raise OptionError(f"{name} is {value!r}; the Inference API has no field for it", hint="leave it out")
            fields["extra_body"] = extra
        return fields

    # ---------------------------------------- requests

    def _timeouts(self) -> tuple[float, float, float, float]:
        """Seconds to connect, without a byte read or written, and for a free connection."""
        return min(CONNECT_SECONDS, self._timeout), self._timeout, self._timeout, self._timeout

    def _client(self) -> Any:
        """A client for one reply, so that closing it hangs up that reply alone."""
        from huggingface_hub import InferenceClient

        if self._url is not None:
            # Without a key of its own the client would send the Hub's token to whatever address this is.
            headers: dict[str, Any] = {} if self._key else {"authorization": None}
            client = InferenceClient(base_url=self._url.geturl(), api_key=self._key, headers=headers)
        elif self._key is None:
            raise HubError(
                f"{self.address}: the Inference API needs a token of your Hugging Face account",
                hint="set HF_TOKEN to one that may call Inference Providers",
            )
        elif not self._key.startswith("hf_"):
            raise HubError(f"{self.address}: the token is none of Hugging Face's", hint="theirs begin with hf_")
        else:
            client = InferenceClient(model=self.address, token=self._key)
        client.exit_stack = _Connection()
        client.timeout = self._timeouts()  # type: ignore[assignment]  # its HTTP library takes the four apart
        return client

    def _post(self, client: Any, fields: dict[str, Any]) -> Iterator[Any]:
        """Post the request; the reply's events, once the server answers."""
        for options in ({"include_usage": True}, None):
            try:
                return iter(client.chat_completion(stream=True, stream_options=options, **fields))
            except _failures() as error:
                # Some servers refuse fields that they do not know; then tokens are counted by the piece.
                if options and "stream_options" in _said(error)[0]:
                    client.close()
                    continue
                raise self._explain(error, begun=False) from error
        raise AssertionError("the second try returns or raises")

    def _models_url(self) -> str:
        if self._url is None:
            return f"{ROUTER}/models"
        path = self._url.path.removesuffix("/chat/completions")
        return self._url._replace(path=f"{path}/models").geturl()

    # ---------------------------------------- what went wrong, in a line

    def _explain(self, error: Exception, *, begun: bool, listing: bool = False) -> UserError:
        """What to raise for what the client raised.

        Args:
            begun: whether a part of the reply came before it.
            listing: whether it was the models that were asked for.
        """
        from huggingface_hub import errors

        http, where = _http_library(), self.address
        if isinstance(error, errors.InferenceTimeoutError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # which tells connecting from waiting
        if isinstance(error, errors.OfflineModeIsEnabled):
            return HubError(f"{where}: HF_HUB_OFFLINE forbids to ask", hint="unset HF_HUB_OFFLINE")
        said, code = _said(error)
        said = self._clean(said)
        if isinstance(error, errors.HfHubHTTPError):
            return self._refusal(error.response, said, code, listing=listing)
        if isinstance(error, errors.TextGenerationError):  # an error among the events
            if _is_too_long(said, code):
                return self._too_long(said)
            return HubError(f"{where}: failed in the middle of the reply: {said}", hint="ask again; its log says more")
        if isinstance(error, (http.ConnectError, http.ConnectTimeout, http.InvalidURL, http.ProxyError)):
            reason = self._clean(str(error)) or f"no answer within {CONNECT_SECONDS:.0f} s"
            return HubError(f"{where}: cannot be reached ({reason})", hint="is it running, and the address right?")
        if isinstance(error, (http.TimeoutException, TimeoutError)):
            silent = f"{where}: said nothing for {self._timeout:g} s"
            return HubError(silent, hint="is it busy, or loading the model? ask again later")
        if isinstance(error, http.TransportError) and begun:
            return self._broken(begun=True)
        if isinstance(error, http.TransportError):
            return HubError(f"{where}: the connection broke ({said or type(error).__name__})", hint="ask again")
        return self._not_the_api(said)

    def _refusal(self, response: Any, said: str, code: str, *, listing: bool) -> UserError:
        """What to raise for a status that means no."""
        status, words = response.status_code, f": {said}" if said else ""
        where = f"{self.address}:"
        if status in (400, 413, 422) and (status == 413 or _is_too_long(said, code)):
            return self._too_long(said)
        if status in (401, 403):
            wants = "refuses the key" if self._key else "wants a key"
            variable = "HF_TOKEN" if self._url is None else KEY
            return HubError(f"{where} {wants} ({status}){words}", hint=f"set {variable} to a key that it accepts")
        if listing and status in (404, 405):
            return HubError(f"{where} does not list its models ({status})", hint=f"name one, --model NAME; or {_V1}")
        if status == 404 or code in ("model_not_found", "model_not_supported"):
            return HubError(f"{where} has no model {self.model!r} ({status}){words}", hint=self._offer())
        if status == 429 or status >= 500:
            trouble = "too many requests" if status == 429 else "the server is in trouble"
            after = self._clean(response.headers.get("retry-after", ""))
            later = f"in {after} s" if after.isdecimal() else f"after {after}" if after else "later"
            return HubError(f"{where} {trouble} ({status}){words}", hint=f"ask again {later}")
        return HubError(f"{where} refuses the request ({status}){words}", hint="leave out the option it names")

    def _offer(self) -> str:
        """A hint at the models that there are."""
        try:
            names = [] if self._url is None else self.models()
        except UserError:
            names = []
        if self.model in names:
            names = []  # it is not the name that is wrong
        return f"it has {', '.join(map(self._clean, names[:8]))}" if names else f"is the name right? and {_V1}"

    def _too_long(self, said: str) -> TooLongError:
        words = f": {said}" if said else ""
        return TooLongError(
            f"{self.address}: the conversation is too long for the context{words}", "say less, or lower max_tokens"
        )

    def _broken(self, *, begun: bool) -> HubError:
        """What to raise for a reply that ends without saying so."""
        if begun:
            return HubError(f"{self.address}: broke off in the middle of the reply", hint="ask again")
        return self._not_the_api("no reply came")

    def _not_the_api(self, said: str) -> HubError:
        return HubError(f"{self.address}: does not answer as an OpenAI-compatible API does ({said})", hint=_V1)

    def _clean(self, text: str) -> str:
        """A server's words in a line: no key that they repeat, nothing a terminal would obey, not too many."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join("".join(one if one.isprintable() else " " for one in text).split())
        return text if len(text) <= SHOWN else text[:SHOWN] + "..."


_V1 = "the address must be the API's base, which mostly ends in /v1"


def _parse_address(address: str) -> SplitResult | None:
    """The API's base address, with its /v1; None for a model's name."""
    if "://" not in address:
        name = _PROVIDER.sub("", address, count=1) if "/" in address else address
        if REPO_ID.fullmatch(name) and not name.startswith(("localhost", "127.")):
            return None
        raise OptionError(
            f"{address!r} is neither an address nor a model's name",
            hint="expected http://HOST:PORT/v1, or owner/name for the Hugging Face Inference API",
        )
    try:
        url = urlsplit(address)
        proper = url.scheme in ("http", "https") and url.hostname and (url.port is None or url.port > 0)
    except ValueError:
        proper = False
    if not proper:
        raise OptionError(f"{address!r} is no address of a server", hint="expected http://HOST:PORT/v1")
    if url.username is not None or url.password is not None or url.query or url.fragment:
        bare = f"{url.scheme}://{url.hostname}"
        raise OptionError(
            f"the address at {bare} holds a user, a query or a fragment; expected scheme, host, port and path alone",
            hint=f"a key goes into {KEY}",
        )
    path = url.path.rstrip("/")
    return url._replace(path=path if path.endswith(("/v1", "/chat/completions")) else f"{path}/v1")


def _http_library() -> Any:
    """The HTTP library of the Hub's client: httpx, or a successor."""
    from huggingface_hub.errors import HfHubHTTPError

    return sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]


def _failures() -> tuple[type[Exception], ...]:
    """What the client raises, and what it trips over where an answer is not shaped as the API's."""
    from huggingface_hub.errors import TextGenerationError

    http = _http_library()
    shapes = (ValueError, TypeError, AttributeError, KeyError, IndexError)
    return (http.HTTPError, http.InvalidURL, http.StreamError, TextGenerationError, OSError, *shapes)


def _said(error: Exception) -> tuple[str, str]:
    """What the server said, and its code for it; "" for none."""
    from huggingface_hub.errors import HfHubHTTPError, TextGenerationError

    body: Any = None
    if isinstance(error, HfHubHTTPError):
        try:
            body = error.response.json()
        except Exception:  # not JSON, or never read to its end
            body = None if "html" in error.response.headers.get("content-type", "") else error.server_message
    elif isinstance(error, TextGenerationError):
        body = error.args[0] if error.args else None
    else:
        body = str(error).strip() or type(error).__name__
    for _ in range(2):  # {"error": {"message": ...}}, {"detail": ...} and their like
        if isinstance(body, Mapping):
            inner = body.get("error") or body.get("message") or body.get("detail")
            if not isinstance(inner, Mapping):
                return ("" if inner is None else str(inner)), str(body.get("code") or "")
            body = inner
    return ("" if body is None else str(body)), ""


def _is_too_long(said: str, code: str) -> bool:
    return code == "context_length_exceeded" or _TOO_LONG.search(said) is not None
