"""Whole files of a repository in a local folder: all of a model, or all but its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from octavo.errors import HubError
from octavo.hub.client import plain_errors
from octavo.hub.remote import RemoteFolder

SMALL = (
    "config.json",
    "params.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
INDICES = ("*.safetensors.index.json",)
OWN = ("consolidated*",)
"""The authors' raw weights: beside the Hub's they would double the download."""
KINDS = (("*.safetensors",), ("*.npz",), ("*.pt", "*.pth"), ("*.gguf",))
SPLIT = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")


def snapshot(repo_id: str, revision: str | None = None) -> Path:
    """Return a local folder with a repository's weights, configuration and tokenizer, downloading what is missing.

    Of several kinds of weights one is taken: the Hub's safetensors, the authors' own, npz, torch files, GGUF.

    Args:
        repo_id: "owner/name".
        revision: a branch, tag or commit; by default the main branch.

    Raises:
        HubError: a bad id, no such repository or revision, no access to it, no network and not in the cache, a
            full disk, or a repository without weights of a kind that Octavo reads, or with several GGUF models.
    """
    folder = RemoteFolder(repo_id, revision)
    wanted = _weights(folder) + _matching(folder, SMALL)
    from huggingface_hub import snapshot_download

    with plain_errors(repo_id, revision):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))


def _matching(folder: RemoteFolder, patterns: Iterable[str]) -> list[str]:
    return [name for name in folder.files() if any(fnmatch(name, pattern) for pattern in patterns)]


def _weights(folder: RemoteFolder) -> list[str]:
    own = _matching(folder, OWN)
    for patterns in KINDS:
        found = _matching(folder, patterns)
        found = [name for name in found if name not in own] or found
        models = {SPLIT.sub("", name) for name in found}
        if patterns == ("*.gguf",) and len(models) > 1:
            raise HubError(
                f"{folder.repo_id}: holds {len(models)} models: {', '.join(sorted(models))}",
                hint=f"download one, such as with hf download {folder.repo_id} {found[0]}, and give its path",
            )
        if found:
            return found + _matching(folder, INDICES)
    raise HubError(
        f"{folder.repo_id}: the repository holds no .safetensors weights, nor others that Octavo reads",
        hint="Octavo reads .safetensors, .npz, .pt, .pth and .gguf; look for a repository that has one of them",
    )


def download_small(folder: RemoteFolder) -> Path:
    """Return a local folder with a repository's configuration and tokenizer, downloading what is missing.

    Raises:
        HubError: it has none of them, or they cannot be fetched.
    """
    wanted = _matching(folder, SMALL)
    if not wanted:
        raise HubError(
            f"{folder.location}: holds neither config.json nor a tokenizer", hint="is it the repository of a model?"
        )
    paths = [folder.download(name) for name in wanted]
    return paths[0].parent
