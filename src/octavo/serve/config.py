"""How a server is set up: what `octavo serve` says, checked before the model is loaded."""

from __future__ import annotations

import difflib
import hmac
import ipaddress
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from octavo.errors import OptionError
from octavo.plan import parse_size

MAX_CHOICES = 128  # sequences of a request, over all of its prompts
ENV_KEY = "OCTAVO_API_KEY"
_LOCAL = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True)
class ServeConfig:
    """A server's settings.

    Attributes:
        model_id: what clients call the model.
        keys: any of which opens the server; none lets everybody in.
        hosts: the names a request may call the server by; None for any. Where there is no key, this keeps pages of
            other sites from reaching a server on the same machine by a name of theirs.
        body_limit: bytes of a request's body at most.
        header_timeout: seconds in which a request's head must have arrived.
        read_timeout: seconds in which its body must have.
        write_timeout: seconds in which a client must take something off a reply that is sent.
        keep_alive: seconds that an idle connection stays open.
        drain: seconds that running replies have to finish once the server is told to end.
        max_queue: requests that may wait.
        max_per_key: requests of one key at a time; None for any number.
        cors: origins whose pages may call the server from a browser.
        log_prompts: write what was asked to the log.
    """

    model_id: str
    keys: tuple[str, ...] = ()
    hosts: frozenset[str] | None = None
    body_limit: int = 4 << 20
    header_timeout: float = 10.0
    read_timeout: float = 30.0
    write_timeout: float = 60.0
    keep_alive: float = 15.0
    drain: float = 30.0
    max_queue: int = 128
    max_per_key: int | None = None
    cors: tuple[str, ...] = ()
    log_prompts: bool = False

    def key_of(self, given: str) -> str | None:
        """The name of a key ("key0", ...) for the worker's counts; None if it is none of them.

        Every key is compared, in a time that does not tell how much of one was right.
        """
        said, found = given.encode(), None
        for index, key in enumerate(self.keys):
            if hmac.compare_digest(said, key.encode()):
                found = f"key{index}"
        return found


OPTIONS = tuple(
    one.name for one in fields(ServeConfig) if one.name not in ("model_id", "keys", "hosts")
)  # what -o takes of these


def take_options(options: dict[str, str], others: Iterable[str] = ()) -> dict[str, Any]:
    """Take the server's settings out of what -o says, as `ServeConfig` has them.

    Args:
        options: names and values as written; the settings are taken out.
        others: names that are somebody else's.

    Raises:
        OptionError: an unknown name, or a value that will not do.
    """
    others = tuple(others)
    for name in options:
        if name not in OPTIONS and name not in others:
            near = difflib.get_close_matches(name, (*OPTIONS, *others), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known options: {', '.join((*others, *OPTIONS))}"
            raise OptionError(f"unknown option {name!r}", hint)
    found: dict[str, Any] = {}
    for name in OPTIONS:
        if name in options:
            found[name] = _parse(name, options.pop(name).strip())
    return found


def _parse(name: str, text: str) -> object:
    if name == "log_prompts":
        if text.lower() not in ("true", "false"):
            raise OptionError(f"log_prompts is {text!r}; expected true or false", "-o log_prompts=true")
        return text.lower() == "true"
    if name == "body_limit":
        return parse_size(text)
    if name == "cors":
        origins = tuple(one.strip() for one in text.split(",") if one.strip())
        for origin in origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise OptionError(
                    f"cors names {origin!r}; expected an origin", "such as -o cors=https://chat.example.org"
                )
        return origins
    if name in ("max_queue", "max_per_key"):
        if not text.isdecimal() or int(text) < 1:
            raise OptionError(f"{name} is {text!r}; expected an integer of at least 1", f"such as -o {name}=16")
        return int(text)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6 or (seconds == 0 and name != "drain"):
        raise OptionError(f"{name} is {text!r}; expected seconds", f"such as -o {name}=30")
    return seconds


def read_keys(given: Iterable[str], environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys that --api-key and the environment name; "@FILE" is a file with a key a line.

    Raises:
        OptionError: a file that cannot be read or holds no key; a key that is empty or not printable ASCII.
    """
    keys: list[str] = []
    said = [(f"--api-key {one}" if one.startswith("@") else "--api-key", one) for one in given]
    if ENV_KEY in environment:
        said.append((ENV_KEY, environment[ENV_KEY]))
    for where, one in said:
        found = _key_file(one[1:]) if one.startswith("@") else [one]
        for key in found:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise OptionError(
                    f"{where}: a key is empty, or holds blanks or characters that a header cannot carry",
                    "make one with: python -c 'import secrets; print(secrets.token_urlsafe())'",
                )
        keys += found
    return tuple(dict.fromkeys(keys))


def _key_file(name: str) -> list[str]:
    try:
        lines = Path(name).expanduser().read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise OptionError(f"--api-key @{name}: cannot be read: {error.strerror}", "give a file of keys") from None
    except UnicodeDecodeError:
        raise OptionError(f"--api-key @{name}: holds more than ASCII text", "write one key a line") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise OptionError(f"--api-key @{name}: holds no key", "write one key a line")
    return keys


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(host: str, keys: tuple[str, ...]) -> frozenset[str] | None:
    """The names that requests may call the server by, for `ServeConfig.hosts`.

    Raises:
        OptionError: an address that others can reach, and no key.
    """
    if not is_loopback(host) and not keys:
        raise OptionError(
            f"--host {host} lets others in, and there is no key to keep them out",
            f"give one: --api-key KEY, --api-key @FILE or {ENV_KEY}; or stay with --host 127.0.0.1",
        )
    return None if keys else frozenset({*_LOCAL, host})
