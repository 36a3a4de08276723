"""What all requests to the Hub have in common: a valid id, patience, and refusals said in one line."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from octavo.errors import HubError

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""What a Hub id looks like: owner/name."""
PAUSES = (0.2, 0.5, 1.0)  # seconds before a failed request is made again
KEPT = "what was fetched already is kept"

T = TypeVar("T")


class PassingError(HubError):
    """A trouble of the network or the server that may be over in a moment."""


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be a Hub id.

    Raises:
        HubError: it is not of the form owner/name.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise HubError(
            f"{repo_id!r} is no Hub id; expected owner/name", hint="such as mistralai/Mixtral-8x7B-Instruct-v0.1"
        )


def patiently(call: Callable[[], T]) -> T:
    """Make a request, and make it again a few times while its failure may pass."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            if not may_pass(error):
                raise
        time.sleep(pause)
    return call()


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: the server's own trouble, or the network's."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return passing_status(error.response.status_code)
    return isinstance(error, (PassingError, _client_errors()[0]))


def passing_status(status: int) -> bool:
    """Whether an HTTP status means "later"."""
    return status in (408, 429) or status >= 500


@contextmanager
def plain_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the Hub's client raises into a HubError of one line."""
    # The client takes a while to import, and a folder on the disk does without.
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{repo_id}: no valid Hub id: {_first_line(error)}", hint="expected owner/name") from error
    except _client_errors() as error:
        _explain(error, repo_id, revision)
    except ValueError as error:  # JSON, or the address of a redirect
        raise HubError(
            f"{repo_id}: what {constants.ENDPOINT} answers makes no sense ({_first_line(error)})",
            hint="is HF_ENDPOINT the address of a Hub?",
        ) from error


def _client_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises: first the base of its HTTP library, be that httpx or a successor."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base, sys.modules[base.__module__.partition(".")[0]].InvalidURL, OSError


def _explain(error: Exception, repo_id: str, revision: str | None) -> NoReturn:
    """Raise the HubError that says in one line what the client said in many."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo_id}"
    answer = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    status = answer.response.status_code if isinstance(answer, errors.HfHubHTTPError) else None
    if isinstance(answer, errors.GatedRepoError):
        raise HubError(
            f"{repo_id}: its authors give access on request only",
            hint=f"accept their terms at {page}, then set HF_TOKEN to a token of your account",
        ) from error
    if isinstance(answer, errors.RepositoryNotFoundError):
        raise HubError(
            f"{repo_id}: no such repository on the Hub, or a private one",
            hint="check the spelling; for a private one set HF_TOKEN",
        ) from error
    if isinstance(answer, errors.RevisionNotFoundError):
        raise HubError(f"{repo_id}: has no revision {revision!r}", hint=f"they are listed at {page}") from error
    if status in (401, 403):
        raise HubError(
            f"{repo_id}: the Hub denies access ({status})", hint="is HF_TOKEN set, valid, and allowed to read it?"
        ) from error
    if status == 404:
        raise HubError(f"{repo_id}: a file that is listed is not there (404)", hint=f"look at {page}") from error
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"{repo_id}: not (whole) in the cache, and HF_HUB_OFFLINE forbids to fetch it",
            hint="unset HF_HUB_OFFLINE",
        ) from error
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        raise HubError(
            f"{repo_id}: cannot be stored: {error.strerror}: {error.filename}",
            hint="HF_HOME says where downloads are kept",
        ) from error
    raise HubError(
        f"{repo_id}: the Hub cannot be reached at {constants.ENDPOINT} ({_reason(error)})",
        hint=f"check the network; {KEPT}",
    ) from error


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the root."""
    while error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        error = error.__cause__ or error.__context__ or error
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
