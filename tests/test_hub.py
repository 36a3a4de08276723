"""The Hub's client against a real server that speaks the Hub's routes, each time in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from octavo.errors import HubError
from octavo.hub import snapshot
from tiny_folder import make_tiny_folder

SHA = "0123456789abcdef0123456789abcdef01234567"
EXTRA = {
    "consolidated.safetensors": b"the authors' own copy of the weights",
    "README.md": b"# a model card",
    "original/model.safetensors": b"another copy",
    "pytorch_model.bin": b"an old format",
}


class Hub(ThreadingHTTPServer):
    """One model, `org/tiny`, and the refusals `org/gated`, `org/private`, `org/broken`; everything else is not there.

    Attributes:
        fetched: paths of the files whose bytes were asked for.
        tokens: the Authorization headers of requests about a model.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()} | EXTRA
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if "/org/" in self.path:
            self.server.tokens.add(self.headers.get("Authorization"))
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/(org/[\w-]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/(org/tiny|org/bare)/resolve/([^/]+)/(.+)", path)
        if api:
            self._api(*api.groups())
        elif file and file[3] in self.server.files:
            self._file(file[3])
        else:
            self._refuse(404, "EntryNotFound")

    def _api(self, repo: str, what: str, revision: str) -> None:
        if repo == "org/gated":
            self._refuse(401, "GatedRepo")
        elif repo == "org/private":
            self._refuse(403, None)
        elif repo == "org/broken":
            self._refuse(500, None)
        elif repo not in ("org/tiny", "org/bare"):
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", SHA):
            self._refuse(404, "RevisionNotFound")
        else:
            names = [name for name in self.server.files if repo == "org/tiny" or "safetensors" not in name]
            if what == "revision":
                body: object = {"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in names]}
            else:
                body = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in self.server.files.items()
                    if name in names
                ]
            self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str) -> None:
        data = self.server.files[name]
        if self.command == "GET":
            self.server.fetched.append(name)
        self._send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": SHA})

    def _refuse(self, status: int, code: str | None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def client(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python that may use `snapshot` and `attempt`, with a cache of its own and no setting of ours."""
    prelude = (
        "from octavo.errors import HubError\n"
        "from octavo.hub import snapshot\n"
        "def attempt(*args):\n"
        "    try: return str(snapshot(*args))\n"
        "    except HubError as error: return f'HubError: {error.message} | {error.hint}'\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        env=clean | {"HF_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def attempt(home: Path, *args: str, **environment: str) -> str:
    done = client(f"print(attempt(*{args!r}))", home, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


def test_a_snapshot_is_the_model_and_nothing_else(hub: Hub, folder: Path, tmp_path: Path) -> None:
    found = Path(attempt(tmp_path, "org/tiny", HF_ENDPOINT=hub.url, HF_TOKEN="hf_ours"))
    wanted = {path.name for path in folder.iterdir()}
    assert {path.name for path in found.iterdir()} == wanted == set(hub.fetched)
    for name in wanted:
        assert (found / name).read_bytes() == (folder / name).read_bytes()
    assert hub.tokens == {"Bearer hf_ours"}


def test_the_second_time_the_cache_is_enough(hub: Hub, tmp_path: Path) -> None:
    first = attempt(tmp_path, "org/tiny", HF_ENDPOINT=hub.url)
    hub.fetched.clear()
    assert attempt(tmp_path, "org/tiny", HF_ENDPOINT=hub.url) == first
    assert hub.fetched == []
    hub.shutdown()
    hub.server_close()
    assert attempt(tmp_path, "org/tiny", HF_ENDPOINT=hub.url) == first  # nobody answers
    assert attempt(tmp_path, "org/tiny", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1") == first
    assert attempt(tmp_path, "org/tiny", SHA, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1") == first


REFUSALS = [
    (("org/absent",), "org/absent: no such repository", "HF_TOKEN"),
    (("org/gated",), "access on request", "accept their terms at {url}/org/gated"),
    (("org/private",), "denies access (403)", "HF_TOKEN"),
    (("org/tiny", "v9"), "no revision 'v9'", "{url}/org/tiny"),
    (("org/bare",), "no .safetensors weights", "safetensors layout"),
    (("org/broken",), "cannot be reached at {url}", "check the network"),
    (("org--x/tiny..y",), "no valid Hub id", "owner/name"),
    (("tiny",), "'tiny' is no Hub id", "such as"),
    (("org/tiny/deep",), "is no Hub id", "such as"),
]


def test_refusals_are_one_line_with_a_hint(hub: Hub, tmp_path: Path) -> None:
    calls = "".join(f"print(attempt(*{args!r}))\n" for args, _, _ in REFUSALS)
    done = client(calls, tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    for said, (args, says, hints) in zip(done.stdout.splitlines(), REFUSALS, strict=True):
        message, hint = said.removeprefix("HubError: ").split(" | ")
        assert says.format(url=hub.url) in message, args
        assert hints.format(url=hub.url) in hint, args


def test_without_a_network(tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"
    said = attempt(tmp_path, "org/tiny", HF_ENDPOINT=nobody)
    assert "cannot be reached at http://127.0.0.1:9" in said
    assert "check the network" in said
    offline = attempt(tmp_path, "org/tiny", HF_ENDPOINT=nobody, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids" in offline
    assert "unset HF_HUB_OFFLINE" in offline


def test_where_nothing_can_be_stored(hub: Hub, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    said = attempt(blocked, "org/tiny", HF_ENDPOINT=hub.url)
    assert "cannot be stored" in said
    assert "HF_HOME" in said


def test_a_bad_id_needs_no_client() -> None:
    with pytest.raises(HubError, match="is no Hub id"):
        snapshot("../etc")


def test_a_model_by_its_hub_id_end_to_end(hub: Hub, folder: Path, tmp_path: Path) -> None:
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from octavo.llm import LLM\n"
        "import sys\n"
        "say = lambda source: LLM.load(source, device='cpu').generate('The fox', temperature=0, max_tokens=20)\n"
        f"assert say('org/tiny').token_ids == say({str(folder)!r}).token_ids\n"
    )
    done = client(code, tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.fetched
