"""A repository of the Hub, pinned at a commit, as a folder whose files are read by the range.

Bytes come from the Hub's storage under signed addresses, which expire. Whatever comes back is checked (status, range,
length, and before that the file's hash and size) before it is believed or kept.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.errors import CheckpointError, HubError
from octavo.hub.cache import COMMIT, FileEntry, Listing, RangeCache, cache_folder
from octavo.hub.client import KEPT, PassingError, check_repo_id, may_pass, passing_status, patiently, plain_errors
from octavo.storage.files import FETCH_AGAIN, ByteFile, MappedFile, PlainFile, parse_json

MAX_GAP = 32 << 10  # bytes between two ranges that are cheaper fetched than asked around
MAX_RUN = 8 << 20  # bytes of ranges fetched as one
PARALLEL = 4
MAX_REDIRECTS = 5
LATER = f"try again later; {KEPT}"


class RemoteFolder:
    """The files of a repository at one commit.

    Args:
        repo_id: "owner/name".
        revision: a branch, tag or commit; by default the main branch. It is resolved to a commit here, once. For a
            commit of 40 digits that was seen before, nothing is asked.
        keep: put the bytes that are fetched by range into the cache, and map files that are on the disk into memory.
            Otherwise both are let go once read, as for a model that is read once from end to end.

    Attributes:
        repo_id: as given.
        revision: as given.
        commit: 40 hexadecimal digits.
        location: "owner/name@" and the first eight of them.
        fetched: the bytes of files that this object received over the network so far.

    Raises:
        HubError: a bad id, no such repository or revision, no access to it, or no network and never seen before.
    """

    def __init__(self, repo_id: str, revision: str | None = None, *, keep: bool = True) -> None:
        check_repo_id(repo_id)
        self.repo_id = repo_id
        self.revision = revision
        self.keep = keep
        self.fetched = 0
        self.cache = RangeCache(cache_folder() / "bytes")
        self._listing = _listing(repo_id, revision)
        self.commit = self._listing.commit
        self.location = f"{repo_id}@{self.commit[:8]}"
        self._lock = threading.Lock()

    def files(self) -> Mapping[str, int]:
        """Sorted by name."""
        return {name: entry.size for name, entry in self._listing.files.items()}

    def file(self, name: str) -> ByteFile:
        """A local file if the Hub's client has downloaded it, else one that is read by the range.

        Raises:
            HubError: the commit has no such file.
        """
        entry = self._entry(name)
        local = _downloaded(self.repo_id, name, self.commit)
        if local is not None:
            return MappedFile(local) if self.keep else PlainFile(local)
        return RemoteFile(self, name, entry)

    def stamp(self, name: str) -> str:
        """The hash of a file."""
        return self._entry(name).hash

    def json(self, name: str) -> dict[str, Any]:
        """Read a small JSON object, which the Hub's client downloads and keeps.

        Raises:
            HubError: the commit has no such file, or it cannot be fetched.
            ConfigError: it holds something else.
        """
        file = PlainFile(self.download(name))
        return parse_json(bytes(file.read(0, file.size).numpy()), f"{self.location}/{name}")

    def download(self, name: str) -> Path:
        """Let the Hub's client download a whole file, unless it has it; return where it lies.

        Raises:
            HubError: the commit has no such file, or it cannot be fetched or stored.
        """
        from huggingface_hub import hf_hub_download

        size = self._entry(name).size
        local = _downloaded(self.repo_id, name, self.commit)
        if local is None:
            with plain_errors(self.repo_id, self.revision):
                local = Path(hf_hub_download(self.repo_id, name, revision=self.commit))
            self.count(size)
        return local

    def count(self, received: int) -> None:
        """Add to ``fetched``."""
        with self._lock:
            self.fetched += received

    def _entry(self, name: str) -> FileEntry:
        if name not in self._listing.files:
            raise HubError(
                f"{self.location}: has no file {name!r}", hint="check the spelling, or give another revision"
            )
        return self._listing.files[name]


class RemoteFile:
    """A file on the Hub, read by the range. Implements `ByteFile`; threads may share it."""

    def __init__(self, folder: RemoteFolder, name: str, entry: FileEntry) -> None:
        self.name = name
        self.location = f"{folder.location}/{name}"
        self.size = entry.size
        self._hash = entry.hash
        self._folder = folder
        self._lock = threading.Lock()
        self._address: str | None = None

    def read(self, begin: int, end: int) -> Tensor:
        """Return bytes ``begin`` to ``end`` (exclusive) as uint8 [end - begin], from the cache if they are there.

        Raises:
            CheckpointError: the file has no such bytes.
            HubError: they cannot be fetched, or what came back is not what was asked for.
        """
        return self.read_many([(begin, end)])[0]

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Read several ranges: neighbours in one request, the rest a few at a time. Raises what ``read`` does."""
        for begin, end in ranges:
            if not 0 <= begin <= end <= self.size:
                raise CheckpointError(
                    f"{self.location}: bytes {begin} to {end} are asked for, the file has {self.size}", hint=FETCH_AGAIN
                )
        found = {wanted: data for wanted in set(ranges) if (data := self._cached(*wanted)) is not None}
        runs = _runs(sorted(set(ranges) - found.keys()))
        with ThreadPoolExecutor(PARALLEL) as pool:
            for fetched in pool.map(self._fetch_run, runs):
                found |= fetched
        return [found[wanted] for wanted in ranges]

    def _cached(self, begin: int, end: int) -> Tensor | None:
        if begin == end:
            return torch.empty(0, dtype=torch.uint8)
        return self._folder.cache.get(self._hash, begin, end)

    def _fetch_run(self, run: list[tuple[int, int]]) -> dict[tuple[int, int], Tensor]:
        first, last = run[0][0], max(end for _, end in run)
        data = self._fetch(first, last)
        # Parts are copied, so that a small one does not hold on to the whole run.
        parts = {(b, e): data if (b, e) == (first, last) else data[b - first : e - first].clone() for b, e in run}
        if self._folder.keep:
            for (begin, _), part in parts.items():
                self._folder.cache.put(self._hash, begin, part)
        return parts

    def _fetch(self, begin: int, end: int) -> Tensor:
        """Fetch a range; where a body breaks off, the next request goes on from there."""
        try:
            data = torch.empty(end - begin, dtype=torch.uint8)
        except RuntimeError:
            raise HubError(
                f"{self.location}: {end - begin} bytes do not fit into memory", hint="is the file's header damaged?"
            ) from None
        view = memoryview(data.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
        done = 0

        def go_on() -> None:
            nonlocal done
            with closing(self._open(begin + done, end)) as response:
                try:
                    for chunk in response.iter_raw():
                        self._folder.count(len(chunk))
                        if done + len(chunk) > len(view):
                            raise self._refused("more bytes than were asked for")
                        view[done : done + len(chunk)] = chunk
                        done += len(chunk)
                except Exception as error:
                    if not may_pass(error):
                        raise
            if done < len(view):
                raise PassingError(f"{self.location}: the connection broke {len(view) - done} bytes early", hint=LATER)

        with plain_errors(self._folder.repo_id, self._folder.revision):
            patiently(go_on)
        return data

    def _open(self, begin: int, end: int) -> Any:
        """Return an HTTP response of whose body nothing is read yet, and which promises exactly these bytes."""
        address = self._resolved()
        response = _get(address, begin, end)
        if response.status_code in (401, 403):  # a signed address expires
            response.close()
            response = _get(self._resolved(stale=address), begin, end)
        try:
            self._check(response, begin, end)
        except BaseException:
            response.close()
            raise
        return response

    def _resolved(self, stale: str | None = None) -> str:
        """Return the address of the bytes; a new one if that was ``stale``."""
        with self._lock:
            if self._address is None or self._address == stale:
                self._address = self._resolve()
            return self._address

    def _resolve(self) -> str:
        """Ask the Hub where the bytes are now, and whether they are those that the commit lists."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        found = get_hf_file_metadata(hf_hub_url(self._folder.repo_id, self.name, revision=self._folder.commit))
        if (found.etag, found.size) != (self._hash, self.size):
            raise HubError(
                f"{self.location}: is not the file that the commit lists: it has {found.size} bytes and hash "
                f"{found.etag}, expected {self.size} and {self._hash}",
                hint=f"a mirror that is out of step? If not, remove {cache_folder()} and try again",
            )
        return found.location

    def _check(self, response: Any, begin: int, end: int) -> None:
        """Refuse a response that is not exactly the range that was asked for."""
        status, headers = response.status_code, response.headers
        if passing_status(status):
            raise PassingError(f"{self.location}: the Hub's storage answers with status {status}", hint=LATER)
        if status == 200:
            raise self._refused(f"the whole file, where bytes {begin} to {end} were asked for")
        if status != 206:
            raise self._refused(f"status {status}, where bytes {begin} to {end} were asked for")
        encoding = headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise self._refused(f"compressed bytes ({encoding}), which were not asked for")
        expected = f"bytes {begin}-{end - 1}/"
        if headers.get("Content-Range") not in (f"{expected}{self.size}", f"{expected}*"):
            raise self._refused(f"Content-Range {headers.get('Content-Range')!r}, expected '{expected}{self.size}'")

    def _refused(self, what: str) -> HubError:
        return HubError(
            f"{self.location}: the Hub's storage answers with {what}",
            hint=f"does a proxy or mirror stand between? `hf download {self._folder.repo_id}` fetches whole files",
        )


def _runs(ranges: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Group sorted ranges into what is fetched as one."""
    runs: list[list[tuple[int, int]]] = []
    reached = 0
    for begin, end in ranges:
        if runs and begin - reached <= MAX_GAP and max(reached, end) - runs[-1][0][0] <= MAX_RUN:
            runs[-1].append((begin, end))
            reached = max(reached, end)
        else:
            runs.append([(begin, end)])
            reached = end
    return runs


def _get(address: str, begin: int, end: int) -> Any:
    """Ask for a range; redirects are followed here, so that the token goes to the Hub and nowhere else."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in __all__

    headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={begin}-{end - 1}"}
    token = headers.pop("authorization", None)
    session = get_session()
    hub = _origin(session.build_request("GET", constants.ENDPOINT))
    for _ in range(MAX_REDIRECTS):
        request = session.build_request("GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        if token is not None and _origin(request) == hub:
            request.headers["authorization"] = token
        try:
            response = session.send(request, stream=True, follow_redirects=False)
        except RuntimeError as error:  # the client closes its session when another thread cannot connect
            raise PassingError(f"{address.partition('?')[0]}: {error}", hint=LATER) from error
        if not response.has_redirect_location:
            return response
        response.close()
        address = str(request.url.join(response.headers["Location"]))
    raise HubError(f"{address.partition('?')[0]}: reached by too many redirects", hint="is HF_ENDPOINT set rightly?")


def _origin(request: Any) -> tuple[str, str, int | None]:
    return request.url.scheme, request.url.host, request.url.port


def _listing(repo_id: str, revision: str | None) -> Listing:
    """Resolve a revision to a commit and its files, from what was seen before if nothing can have changed.

    The same where the Hub cannot be reached, as the Hub's client does.
    """
    from huggingface_hub import constants

    name = revision or "main"
    known = Listing.load(repo_id, name)
    if known is not None and COMMIT.fullmatch(name):
        return known
    with plain_errors(repo_id, revision):
        try:
            found = patiently(lambda: _ask_listing(repo_id, revision))
        except Exception as error:
            known = known or _downloaded_listing(repo_id, name)
            if known is None or not (constants.HF_HUB_OFFLINE or may_pass(error)):
                raise
            return known
    with suppress(HubError):  # without it the next call asks again; a cache may be there to be read only
        found.save(repo_id, name)
    return found


def _ask_listing(repo_id: str, revision: str | None) -> Listing:
    from huggingface_hub import HfApi, constants

    try:
        info = HfApi().model_info(
            repo_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        files = {s.rfilename: (s.size, s.lfs.sha256 if s.lfs else s.blob_id) for s in info.siblings or ()}
        return Listing.checked(info.sha, files)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"no listing of a model: {error!r}") from error


def _downloaded_listing(repo_id: str, revision: str) -> Listing | None:
    """What the Hub's client has downloaded of a revision, where nobody can be asked for more."""
    config = _downloaded(repo_id, "config.json", revision)
    if config is None:
        return None
    paths = sorted(path for path in config.parent.iterdir() if path.is_file())
    return Listing(config.parent.name, {p.name: FileEntry(p.stat().st_size, p.resolve().name) for p in paths})


def _downloaded(repo_id: str, name: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, name, revision=revision)
    return Path(found) if isinstance(found, str) else None
