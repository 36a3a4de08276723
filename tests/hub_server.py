"""A Hub of our own on 127.0.0.1, for the real `huggingface_hub`: it serves folders as repositories.

Start it, and give its environment to a client in a process of its own (huggingface_hub reads its settings on import):

    with HubServer({"org/tiny": folder}) as hub:
        env = hub.environment(home)  # HF_ENDPOINT, an empty HF_HOME, none of the machine's own HF_ settings
        subprocess.run([sys.executable, "-m", "octavo", "tensors", "org/tiny"], env=env, ...)
        run_python("from octavo.hub import RemoteFolder; print(RemoteFolder('org/tiny').commit)", env)

As on the Hub, weights (`LFS`) are redirected to signed addresses on a second host, and other files are not. Afterwards
or meanwhile:

    hub.requests                    what was asked and answered, see `Request`; `hub.requests.clear()` starts anew
    hub.sent()                      the bytes of files that were sent: what a download costs
    hub.sent("config.json")         of one file; hub.sent("*.safetensors") of many
    hub.commit("org/tiny")          the commit of main
    hub.push("org/tiny", {"config.json": b"{}"})        a new commit on main, its id returned
    hub.replace("org/tiny", "config.json", b"...")      other bytes under the same commit, which no Hub should do
    hub.refuse("org/gated", 401, "GatedRepo", listed=True)      its files are listed, but not given
    hub.fail("*.safetensors", "short", times=1)         the next answer with bytes of it goes wrong, see `fail`
    hub.expire()                    no signed address given so far is good any more
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS = (".safetensors", ".gguf", ".npz", ".pt", ".pth", ".bin", ".model")
CHUNK = 1 << 16


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    """This process's environment without its Hub settings, and with a cache of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return clean | {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"} | more


def run_python(code: str, environment: Mapping[str, str]) -> str:
    """Run Python in a process of its own; return what it printed, or fail with what it raised.

    The process is forked from one that has imported torch, but nothing that reads the environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["octavo.storage.safetensors"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(code, dict(environment), sender))
    process.start()
    sender.close()
    assert receiver.poll(120), "no answer within two minutes"
    printed, raised = receiver.recv()
    process.join()
    assert not raised, raised
    return str(printed)


def _run(code: str, environment: dict[str, str], sender: Connection) -> None:
    os.environ.clear()
    os.environ.update(environment)
    raised = ""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            raised = traceback.format_exc()
    sender.send((printed.getvalue(), raised))


@dataclass
class Request:
    """A request and its answer.

    Attributes:
        host: "hub" or "cdn".
        path: without the query.
        file: the name of the file that was asked for, where it was one.
        asked: the Range header.
        authorization: the header.
        status: of the answer.
        sent: bytes of the answer's body; fewer than it has when the client hung up.
    """

    host: str
    method: str
    path: str
    file: str | None
    asked: str | None
    authorization: str | None
    status: int
    sent: int


class Blob:
    """A file's bytes, in memory or on the disk, and their hashes."""

    def __init__(self, content: bytes | Path) -> None:
        self.content = content
        self.size = len(content) if isinstance(content, bytes) else content.stat().st_size
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self.size)
        for chunk in self.chunks(0, self.size):
            sha256.update(chunk)
            sha1.update(chunk)
        self.sha256, self.sha1 = sha256.hexdigest(), sha1.hexdigest()

    def chunks(self, begin: int, end: int) -> Iterator[bytes]:
        with io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb") as file:
            file.seek(begin)
            for at in range(begin, end, CHUNK):
                yield file.read(min(CHUNK, end - at))


@dataclass
class _Repository:
    main: str = ""
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def push(self, files: dict[str, Blob]) -> str:
        listing = json.dumps([self.main, sorted((name, blob.sha256) for name, blob in files.items())])
        self.main = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[self.main] = files
        return self.main

    def resolve(self, revision: str) -> str | None:
        return self.main if revision == "main" else revision if revision in self.commits else None


@dataclass
class _Failure:
    pattern: str
    how: str | int
    host: str
    times: int | None


@dataclass(frozen=True)
class _Refusal:
    status: int
    code: str | None
    listed: bool


class HubServer:
    """Two servers, the Hub and its CDN; see the head of this file.

    Args:
        repositories: "owner/name" to a folder, or to files' contents by name.
    """

    def __init__(self, repositories: Mapping[str, Path | Mapping[str, bytes]]) -> None:
        self.requests: list[Request] = []
        self.repositories: dict[str, _Repository] = {}
        self.refusals: dict[str, _Refusal] = {}
        self.addresses: dict[str, Blob] = {}
        self._failures: list[_Failure] = []
        self._lock = threading.Lock()
        for repo_id, files in repositories.items():
            self.push(repo_id, files)
        self._servers = {host: _Server(self, host) for host in ("hub", "cdn")}
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers.values())

    def __enter__(self) -> Self:
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Answer no more. May be called twice."""
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """For a client in a process of its own, whose cache is `home`."""
        return clean_environment(home, HF_ENDPOINT=self.url, **more)

    def commit(self, repo_id: str) -> str:
        """The commit that main is at."""
        return self.repositories[repo_id].main

    def push(self, repo_id: str, files: Path | Mapping[str, bytes]) -> str:
        """Put files over those of main, and return the new commit; what is not there yet is created."""
        repository = self.repositories.setdefault(repo_id, _Repository())
        new = (
            {path.relative_to(files).as_posix(): Blob(path) for path in sorted(files.rglob("*")) if path.is_file()}
            if isinstance(files, Path)
            else {name: Blob(content) for name, content in files.items()}
        )
        return repository.push(repository.commits.get(repository.main, {}) | new)

    def replace(self, repo_id: str, name: str, content: bytes) -> None:
        """Change a file without a commit: listings already given do not fit it any more."""
        repository = self.repositories[repo_id]
        repository.commits[repository.main][name] = Blob(content)

    def refuse(self, repo_id: str, status: int, code: str | None = None, *, listed: bool = False) -> None:
        """Answer everything about a repository, or with `listed` only its files, with an error."""
        self.refusals[repo_id] = _Refusal(status, code, listed)

    def fail(self, pattern: str, how: str | int, *, times: int | None = None, host: str = "cdn") -> None:
        """Let answers about a file go wrong; what is asked for first is used up first.

        Args:
            pattern: of the file's name.
            how: a status; of an answer with bytes: "whole" (200 and the file), "short" (the connection breaks after
                half), "long" (eight bytes too many), "gzip", "shifted" (other bytes, honestly labelled); of the CDN:
                "expire" (all addresses do, before it answers), "loop" (a redirect to the same address).
            times: how often; by default always.
            host: which of the two.
        """
        self._failures.append(_Failure(pattern, how, host, times))

    def recover(self) -> None:
        """Let nothing go wrong any more."""
        self._failures.clear()

    def expire(self) -> None:
        """Let the CDN answer 403 at every address given so far."""
        self.addresses.clear()

    def sent(self, pattern: str = "*") -> int:
        """The bytes of files that were sent."""
        given = (r for r in self.requests if r.file is not None and r.status in (200, 206))
        return sum(r.sent for r in given if fnmatch(r.file or "", pattern))

    def authorizations(self, host: str) -> set[str | None]:
        """The Authorization headers that a host saw."""
        return {r.authorization for r in self.requests if r.host == host}

    def failure(self, name: str, host: str) -> str | int | None:
        """What goes wrong now."""
        with self._lock:
            for failure in self._failures:
                if failure.host == host and fnmatch(name, failure.pattern) and failure.times != 0:
                    if failure.times is not None:
                        failure.times -= 1
                    return failure.how
        return None

    def address(self, name: str, blob: Blob) -> str:
        """A new signed address."""
        with self._lock:
            ticket = hashlib.sha1(f"{len(self.requests)} {blob.sha256}".encode()).hexdigest()
            self.addresses[ticket] = blob
        return f"{self.cdn_url}/{blob.sha256}?file={quote(name)}&signature={ticket}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer, host: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.host = hub, host

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may hang up
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self.route = unquote(address.path)
        self.file: str | None = None
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        if self.server.host == "cdn":
            return self._signed(query)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", self.route):
            return self._listing(match[1], match[2] or "revision", match[3] or "main", "blobs" in query)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.route):
            return self._resolve(match[1], match[2], match[3])
        return self._refuse(404)

    def _listing(self, repo_id: str, what: str, revision: str, detailed: bool) -> None:
        found = self._repository(repo_id, revision, listing=True)
        if found is None:
            return
        commit, files = found
        if what == "tree":
            body: object = [
                {"type": "file", "path": name, "size": blob.size, "oid": blob.sha1}
                | ({"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}} if name.endswith(LFS) else {})
                for name, blob in files.items()
            ]
        else:
            siblings = [
                {"rfilename": name}
                | ({"size": blob.size, "blobId": blob.sha1} if detailed else {})
                | (
                    {"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}}
                    if detailed and name.endswith(LFS)
                    else {}
                )
                for name, blob in files.items()
            ]
            body = {"id": repo_id, "sha": commit, "siblings": siblings}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _repository(self, repo_id: str, revision: str, *, listing: bool) -> tuple[str, dict[str, Blob]] | None:
        """Commit and files; None where the answer has been given already."""
        refusal = self.server.hub.refusals.get(repo_id)
        repository = self.server.hub.repositories.get(repo_id)
        commit = repository.resolve(revision) if repository else None
        if refusal is not None and not (listing and refusal.listed):
            self._refuse(refusal.status, refusal.code)
        elif repository is None:
            self._refuse(404, "RepoNotFound")
        elif commit is None:
            self._refuse(404, "RevisionNotFound")
        else:
            return commit, repository.commits[commit]
        return None

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        self.file = name
        found = self._repository(repo_id, revision, listing=False)
        if found is None:
            return None
        commit, files = found
        if name not in files:
            return self._refuse(404, "EntryNotFound")
        blob = files[name]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        failure = self.server.hub.failure(name, "hub")
        if isinstance(failure, int):
            return self._refuse(failure)
        if name.endswith(LFS):
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
            return self._send(302, b"", headers | {"Location": self.server.hub.address(name, blob)})
        return self._bytes(blob, headers | {"ETag": f'"{blob.sha1}"'}, failure)

    def _signed(self, query: Mapping[str, str]) -> None:
        self.file = query.get("file", "")
        failure = self.server.hub.failure(self.file, "cdn")
        if failure == "expire":
            self.server.hub.expire()
        if failure == "loop":
            return self._send(302, b"", {"Location": self.path})
        blob = self.server.hub.addresses.get(query.get("signature", ""))
        if blob is None:
            return self._refuse(403)
        if isinstance(failure, int):
            return self._refuse(failure)
        return self._bytes(blob, {"ETag": '"the-storage-has-its-own"', "Accept-Ranges": "bytes"}, failure)

    def _bytes(self, blob: Blob, headers: dict[str, str], failure: str | None) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None or failure == "whole":
            return self._send(200, blob.chunks(0, blob.size), headers, blob.size, cut=failure == "short")
        begin, end = int(asked[1]), min(int(asked[2] or blob.size - 1) + 1, blob.size)
        if begin >= end:
            return self._send(416, b"", {"Content-Range": f"bytes */{blob.size}"})
        if failure == "shifted":
            begin, end = (begin + 1, end + 1) if end < blob.size else (begin - 1, end - 1)
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{blob.size}"
        if failure == "gzip":
            packed = gzip.compress(b"".join(blob.chunks(begin, end)))
            return self._send(206, packed, headers | {"Content-Encoding": "gzip"})
        if failure == "long":
            return self._send(206, b"".join(blob.chunks(begin, end)) + bytes(8), headers)
        return self._send(206, blob.chunks(begin, end), headers, end - begin, cut=failure == "short")

    def _refuse(self, status: int, code: str | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(
        self,
        status: int,
        body: bytes | Iterator[bytes],
        headers: dict[str, str],
        size: int | None = None,
        *,
        cut: bool = False,
    ) -> None:
        chunks = iter([body]) if isinstance(body, bytes) else body
        size = len(body) if isinstance(body, bytes) else size or 0
        asked, authorization = self.headers.get("Range"), self.headers.get("Authorization")
        # Noted before it is answered, so that who has the answer finds the note.
        request = Request(self.server.host, self.command, self.route, self.file, asked, authorization, status, 0)
        self.server.hub.requests.append(request)
        self.close_connection |= cut
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        for chunk in chunks if self.command == "GET" else ():
            part = chunk[: size // 2 - request.sent] if cut else chunk
            request.sent += len(part)
            self.wfile.write(part)
