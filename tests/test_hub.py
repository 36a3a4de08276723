"""Whole repositories by the Hub's client, against a real server that speaks the Hub's routes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_server import HubServer, clean_environment, run_python
from octavo.errors import HubError
from octavo.hub import snapshot
from tiny_folder import make_tiny_folder

EXTRA = {
    "consolidated.safetensors": b"the authors' own copy of the weights",
    "README.md": b"# a model card",
    "original/model.safetensors": b"another copy",
    "pytorch_model.bin": b"an old format",
}
PRELUDE = """
from octavo.errors import HubError
from octavo.hub import RemoteFolder, download_small, snapshot
def attempt(*args):
    try: return str(snapshot(*args))
    except HubError as error: return f'{error.message} | {error.hint}'
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture
def hub(folder: Path) -> Iterator[HubServer]:
    ggufs = {"a.gguf": b"", "b-00001-of-00002.gguf": b"", "b-00002-of-00002.gguf": b""}
    with HubServer({"org/tiny": folder, "org/bare": {"config.json": b"{}"}, "org/ggufs": ggufs}) as server:
        server.push("org/tiny", EXTRA)
        server.refuse("org/gated", 401, "GatedRepo")
        server.refuse("org/private", 403)
        server.refuse("org/broken", 500)
        yield server


def attempt(environment: dict[str, str], *args: str) -> str:
    return run_python(PRELUDE + f"print(attempt(*{args!r}))", environment).removesuffix("\n")


def fetched(hub: HubServer) -> set[str | None]:
    return {request.file for request in hub.requests if request.file and request.sent}


def test_a_snapshot_is_the_model_and_nothing_else(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    found = Path(attempt(hub.environment(tmp_path, HF_TOKEN="hf_ours"), "org/tiny"))
    wanted = {path.name for path in folder.iterdir()}
    assert {path.name for path in found.iterdir()} == wanted == fetched(hub)
    for name in wanted:
        assert (found / name).read_bytes() == (folder / name).read_bytes()
    assert hub.authorizations("hub") == {"Bearer hf_ours"}
    assert hub.authorizations("cdn") == {None}


def test_the_small_files_come_without_the_weights(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    code = PRELUDE + "print(download_small(RemoteFolder('org/tiny')))"
    found = Path(run_python(code, hub.environment(tmp_path)).strip())
    small = {path.name for path in folder.iterdir()} - {"model.safetensors"}
    assert {path.name for path in found.iterdir()} == small == fetched(hub)


KINDS = {
    "the authors' own": ({"consolidated.safetensors", "params.json"}, {"a.gguf", "notes.txt"}),
    "npz": ({"weights.0.npz", "weights.1.npz", "config.json"}, {"a.pth"}),
    "torch": ({"consolidated.00.pt", "consolidated.01.pt", "tokenizer.model"}, {"a.gguf"}),
    "gguf": ({"a-00001-of-00002.gguf", "a-00002-of-00002.gguf"}, {"imatrix.dat"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_weights(hub: HubServer, kind: str, tmp_path: Path) -> None:
    """One kind is fetched, and what belongs to it."""
    wanted, others = KINDS[kind]
    hub.push("org/other", {name: name.encode() for name in wanted | others})
    found = Path(attempt(hub.environment(tmp_path), "org/other"))
    assert {path.name for path in found.iterdir()} == wanted == fetched(hub)


def test_the_second_time_the_cache_is_enough(hub: HubServer, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path)
    first = attempt(environment, "org/tiny")
    hub.requests.clear()
    assert attempt(environment, "org/tiny") == first
    assert not fetched(hub)
    hub.close()
    assert attempt(environment, "org/tiny") == first  # nobody answers
    assert attempt(environment | {"HF_HUB_OFFLINE": "1"}, "org/tiny") == first
    assert attempt(environment | {"HF_HUB_OFFLINE": "1"}, "org/tiny", hub.commit("org/tiny")) == first
    shutil.rmtree(tmp_path / "octavo-ranges")  # so that only the client's own cache is left
    code = PRELUDE + "folder = RemoteFolder('org/tiny')\nprint(folder.commit, *folder.files())"
    commit, *names = run_python(code, environment | {"HF_HUB_OFFLINE": "1"}).split()
    assert commit == hub.commit("org/tiny")
    assert sorted(names) == sorted(path.name for path in Path(first).iterdir())


REFUSALS = [
    (("org/absent",), "org/absent: no such repository", "HF_TOKEN"),
    (("org/gated",), "access on request", "accept their terms at {url}/org/gated"),
    (("org/private",), "denies access (403)", "HF_TOKEN"),
    (("org/tiny", "v9"), "no revision 'v9'", "{url}/org/tiny"),
    (("org/bare",), "no .safetensors weights", ".npz, .pt, .pth and .gguf"),
    (("org/ggufs",), "holds 2 models: a.gguf, b.gguf", "hf download org/ggufs a.gguf"),
    (("org/broken",), "cannot be reached at {url}", "check the network"),
    (("org--x/tiny..y",), "no valid Hub id", "owner/name"),
    (("tiny",), "'tiny' is no Hub id", "such as"),
    (("org/tiny/deep",), "is no Hub id", "such as"),
]


def test_refusals_are_one_line_with_a_hint(hub: HubServer, tmp_path: Path) -> None:
    calls = "".join(f"print(attempt(*{args!r}))\n" for args, _, _ in REFUSALS)
    answers = run_python(PRELUDE + calls, hub.environment(tmp_path)).splitlines()
    for said, (args, says, hints) in zip(answers, REFUSALS, strict=True):
        message, hint = said.split(" | ")
        assert says.format(url=hub.url) in message, args
        assert hints.format(url=hub.url) in hint, args


def test_without_a_network(tmp_path: Path) -> None:
    nobody = clean_environment(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    said = attempt(nobody, "org/tiny")
    assert "cannot be reached at http://127.0.0.1:9" in said
    assert "check the network" in said
    offline = attempt(nobody | {"HF_HUB_OFFLINE": "1"}, "org/tiny")
    assert "HF_HUB_OFFLINE forbids" in offline
    assert "unset HF_HUB_OFFLINE" in offline


def test_where_nothing_can_be_stored(hub: HubServer, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    said = attempt(hub.environment(blocked), "org/tiny")
    assert "cannot be stored" in said
    assert "HF_HOME" in said


def test_a_bad_id_needs_no_client() -> None:
    with pytest.raises(HubError, match="is no Hub id"):
        snapshot("../etc")


def test_a_model_by_its_hub_id_end_to_end(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from octavo.llm import LLM\n"
        "say = lambda source: LLM.load(source, device='cpu').generate('The fox', temperature=0, max_tokens=20)\n"
        f"assert say('org/tiny').token_ids == say({str(folder)!r}).token_ids\n"
    )
    run_python(code, hub.environment(tmp_path))
    assert "model.safetensors" in fetched(hub)
