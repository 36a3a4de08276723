"""Model folders from the Hugging Face Hub: the only floor that opens a socket to it.

The Hub's own client does the work, so its environment variables hold: HF_ENDPOINT (a mirror), HF_TOKEN,
HF_HUB_OFFLINE, HF_HOME (where the cache lies). Its progress bars go to stderr.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from octavo.errors import HubError

WANTED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
# The authors' raw weights beside the Hub's would double the download; folders hold other formats.
UNWANTED = ("consolidated*", "*/*")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""What a Hub id looks like: owner/name."""


def snapshot(repo_id: str, revision: str | None = None) -> Path:
    """Return a local folder with a repository's weights, configuration and tokenizer, downloading what is missing.

    Args:
        repo_id: "owner/name".
        revision: a branch, tag or commit; by default the main branch.

    Raises:
        HubError: a bad id, no such repository or revision, no access to it, no network and not in the cache, a
            full disk, or a repository without safetensors weights.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise HubError(
            f"{repo_id!r} is no Hub id; expected owner/name", hint="such as mistralai/Mixtral-8x7B-Instruct-v0.1"
        )
    # The client takes a while to import, and a folder on the disk does without.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # What lies under the client's own errors is its HTTP library's base error, be that httpx or a successor.
    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
        )
    except HFValidationError as error:
        raise HubError(f"{repo_id}: no valid Hub id: {_first_line(error)}", hint="expected owner/name") from error
    except (transport_error, OSError) as error:
        _explain(error, repo_id, revision, constants.ENDPOINT, offline=constants.HF_HUB_OFFLINE)
    path = Path(folder)
    if not any(path.glob("*.safetensors")):
        raise HubError(
            f"{repo_id}: the repository holds no .safetensors weights",
            hint="Octavo reads the Hugging Face safetensors layout; look for a repository that has it",
        )
    return path


def _explain(error: Exception, repo_id: str, revision: str | None, endpoint: str, *, offline: bool) -> NoReturn:
    """Raise the HubError that says in one line what the client said in many."""
    from huggingface_hub import errors

    page = f"{endpoint}/{repo_id}"
    answer = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    status = answer.response.status_code if isinstance(answer, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        raise HubError(
            f"{repo_id}: its authors give access on request only",
            hint=f"accept their terms at {page}, then set HF_TOKEN to a token of your account",
        ) from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise HubError(
            f"{repo_id}: no such repository on the Hub, or a private one",
            hint="check the spelling; for a private one set HF_TOKEN",
        ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise HubError(f"{repo_id}: has no revision {revision!r}", hint=f"they are listed at {page}") from error
    if status in (401, 403):
        raise HubError(
            f"{repo_id}: the Hub denies access ({status})", hint="is HF_TOKEN set, valid, and allowed to read it?"
        ) from error
    if offline:
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
        f"{repo_id}: the Hub cannot be reached at {endpoint} ({_reason(error)})",
        hint="check the network; what was fetched already is kept",
    ) from error


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the root."""
    while error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
        error = error.__cause__ or error.__context__ or error
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
