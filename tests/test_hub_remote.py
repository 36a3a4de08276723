"""Ranged reads of a repository, against a real server that speaks the Hub's routes and can be made to misbehave."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_server import HubServer, run_python
from octavo.hub import cache
from octavo.hub.cache import Listing, RangeCache

INDEX = "model.safetensors.index.json"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
HEADER = 65_536
PRELUDE = """
import hashlib
import torch
from octavo.errors import UserError
from octavo.hub import RemoteFolder, client
from octavo.storage.safetensors import SafetensorsFile, ShardedSafetensors
client.PAUSES = (0, 0, 0)
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"

def tensors(folder):
    return ShardedSafetensors(folder, "model.safetensors.index.json")

def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()

def attempt(call):
    try: return digest(call())
    except UserError as error: return f"{type(error).__name__}: {error.message} | {error.hint}"
"""
ONE_ROUTER = "folder = RemoteFolder('org/tiny')\nprint(attempt(lambda: tensors(folder).read(ROUTER)), folder.fetched)"


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def make_shards(folder: Path, seed: int) -> Path:
    """Two shards of about 400 KiB with an index."""
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    folder.mkdir(parents=True)
    for layer in range(2):
        name = f"model-0000{layer + 1}-of-00002.safetensors"
        prefix = f"model.layers.{layer}.block_sparse_moe"
        shard = {f"{prefix}.gate.weight": torch.randn(8, 512, generator=generator).bfloat16()}
        for expert in range(4):
            shard[f"{prefix}.experts.{expert}.w1.weight"] = torch.randn(96, 512, generator=generator).bfloat16()
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    (folder / "original").mkdir()
    (folder / "original" / "copy.safetensors").write_bytes(b"of the authors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("hub") / "tiny", seed=1)


@pytest.fixture(scope="module")
def router(folder: Path) -> torch.Tensor:
    return load_file(folder / "model-00002-of-00002.safetensors")[ROUTER]


@pytest.fixture
def hub(folder: Path) -> Iterator[HubServer]:
    with HubServer({"org/tiny": folder}) as server:
        yield server


def entries(home: Path) -> list[Path]:
    return sorted(path for path in (home / "octavo-ranges" / "bytes").rglob("*") if path.is_file())


def test_a_router_costs_index_header_and_itself_and_then_nothing(
    hub: HubServer, folder: Path, router: torch.Tensor, tmp_path: Path
) -> None:
    environment = hub.environment(tmp_path, HF_TOKEN="hf_ours")
    cost = (folder / INDEX).stat().st_size + HEADER + router.nbytes
    assert run_python(PRELUDE + ONE_ROUTER, environment).split() == [digest(router), str(cost)]
    assert hub.sent() == cost
    assert hub.authorizations("hub") == {"Bearer hf_ours"}
    assert hub.authorizations("cdn") == {None}

    hub.requests.clear()
    assert run_python(PRELUDE + ONE_ROUTER, environment).split() == [digest(router), "0"]
    assert [request.path for request in hub.requests] == ["/api/models/org/tiny"]  # where is main now?

    hub.requests.clear()
    pinned = ONE_ROUTER.replace("'org/tiny'", f"'org/tiny', {hub.commit('org/tiny')!r}")
    assert run_python(PRELUDE + pinned, environment).split() == [digest(router), "0"]
    assert run_python(PRELUDE + ONE_ROUTER, environment | {"HF_HUB_OFFLINE": "1"}).split() == [digest(router), "0"]
    assert not hub.requests

    hub.close()
    assert run_python(PRELUDE + ONE_ROUTER, environment).split() == [digest(router), "0"]  # nobody answers
    code = PRELUDE + "print(attempt(lambda: tensors(RemoteFolder('org/tiny')).read(ROUTER.replace('1', '0'))))"
    assert "HF_HUB_OFFLINE forbids to fetch it | unset" in run_python(code, environment | {"HF_HUB_OFFLINE": "1"})
    assert f"cannot be reached at {hub.url}" in run_python(code, environment)


def test_the_folder_names_its_files_and_its_commit(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    code = """
folder = RemoteFolder('org/tiny')
print([folder.repo_id, folder.revision, folder.commit, folder.location, dict(folder.files())])
print(folder.json('config.json'), folder.file('config.json').location)
print(attempt(lambda: folder.file('original/copy.safetensors')))
print(attempt(lambda: folder.json('absent.json')))
print(attempt(lambda: folder.file('model-00001-of-00002.safetensors').read(5, 1 << 40)))
"""
    seen, config, deep, absent, beyond = run_python(PRELUDE + code, hub.environment(tmp_path)).splitlines()
    commit = hub.commit("org/tiny")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    assert seen == str(["org/tiny", None, commit, f"org/tiny@{commit[:8]}", sizes])
    assert config.startswith("{'model_type': 'mixtral'} " + str(tmp_path))  # read where the Hub's client keeps it
    assert f"HubError: org/tiny@{commit[:8]}: has no file 'original/copy.safetensors'" in deep
    assert "has no file 'absent.json'" in absent
    assert beyond.startswith("CheckpointError: ")
    assert "bytes 5 to 1099511627776 are asked for" in beyond


def test_neighbours_are_fetched_as_one(hub: HubServer, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    hub.push("org/bytes", {"a.bin": content})
    ranges = [(500_000, 500_010), (0, 100), (90, 300), (20_000, 20_001), (7, 7), (0, 100), (900_000, 1_048_576)]
    code = f"""
file = RemoteFolder('org/bytes').file('a.bin')
for data in file.read_many({ranges}) + file.read_many({ranges}): print(bytes(data.numpy()).hex())
"""
    parts = [content[begin:end].hex() for begin, end in ranges]
    assert run_python(PRELUDE + code, hub.environment(tmp_path)).splitlines() == parts * 2
    asked = {request.asked for request in hub.requests if request.host == "cdn"}
    assert asked == {"bytes=0-20000", "bytes=500000-500009", "bytes=900000-1048575"}
    assert len(hub.requests) == 1 + 1 + 3  # the listing, the address, the bytes


def test_small_files_are_read_by_the_range_too(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    code = "print(bytes(RemoteFolder('org/tiny').file('config.json').read(2, 12).numpy()))"
    assert run_python(PRELUDE + code, hub.environment(tmp_path, HF_TOKEN="hf_ours")).strip() == "b'model_type'"
    assert hub.authorizations("hub") == {"Bearer hf_ours"}  # which sends their bytes itself
    assert not hub.authorizations("cdn")


def test_nothing_is_kept_of_a_model_that_is_streamed(hub: HubServer, router: torch.Tensor, tmp_path: Path) -> None:
    code = "print(attempt(lambda: tensors(RemoteFolder('org/tiny', keep=False)).read(ROUTER)))"
    assert run_python(PRELUDE + code, hub.environment(tmp_path)).strip() == digest(router)
    assert entries(tmp_path) == []


def test_what_the_client_has_downloaded_is_read_there(hub: HubServer, router: torch.Tensor, tmp_path: Path) -> None:
    code = """
folder = RemoteFolder('org/tiny')
for name in ('config.json', 'model.safetensors.index.json', 'model-00002-of-00002.safetensors'): folder.download(name)
print(folder.fetched, attempt(lambda: tensors(folder).read(ROUTER)), folder.fetched)
"""
    environment = hub.environment(tmp_path)
    before, found, after = run_python(PRELUDE + code, environment).split()
    assert int(before) == int(after) == hub.sent()
    assert found == digest(router)
    # Even if this is all that is known of the repository.
    (tmp_path / "octavo-ranges").rename(tmp_path / "away")
    code = f"""
folder = RemoteFolder('org/tiny', {hub.commit("org/tiny")!r})
print(attempt(lambda: SafetensorsFile(folder.file('model-00002-of-00002.safetensors')).read(ROUTER)))
"""
    assert run_python(PRELUDE + code, environment | {"HF_HUB_OFFLINE": "1"}).strip() == digest(router)


def test_a_new_commit_is_noticed_and_an_old_one_stays(hub: HubServer, router: torch.Tensor, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path / "home")
    first = hub.commit("org/tiny")
    run_python(PRELUDE + ONE_ROUTER, environment)
    changed = make_shards(tmp_path / "changed", seed=2)
    second = hub.push("org/tiny", changed)
    new = load_file(changed / "model-00002-of-00002.safetensors")[ROUTER]
    code = f"""
for revision in (None, {first!r}, {second!r}):
    folder = RemoteFolder('org/tiny', revision)
    print(folder.commit, digest(tensors(folder).read(ROUTER)))
"""
    answers = run_python(PRELUDE + code, environment).split()
    assert answers == [second, digest(new), first, digest(router), second, digest(new)]


def test_other_bytes_under_the_same_commit_are_refused(hub: HubServer, router: torch.Tensor, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path / "home")
    run_python(PRELUDE + "RemoteFolder('org/tiny')", environment)
    changed = make_shards(tmp_path / "changed", seed=2) / "model-00002-of-00002.safetensors"
    hub.replace("org/tiny", changed.name, changed.read_bytes())
    pinned = ONE_ROUTER.replace("'org/tiny'", f"'org/tiny', {hub.commit('org/tiny')!r}")
    said = run_python(PRELUDE + pinned, environment)
    assert "is not the file that the commit lists" in said
    assert entries(tmp_path / "home") == []
    assert hub.sent("*.safetensors") == 0


def test_troubles_that_pass_are_waited_for(hub: HubServer, tmp_path: Path) -> None:
    content = bytes(range(256)) * 1024
    hows: list[str | int] = ["short", 500, 503, 429, "expire"]
    names = [f"{how}.bin" for how in hows] + ["resolve.bin"]
    hub.push("org/bytes", {name: content + name.encode() for name in names})
    for how in hows:
        hub.fail(f"{how}.bin", how, times=1)
    hub.fail("resolve.bin", 502, times=2, host="hub")
    code = f"""
folder = RemoteFolder('org/bytes')
for name in {names}: print(digest(folder.file(name).read(8, 200_000)))
print(folder.fetched)
"""
    *answers, fetched = run_python(PRELUDE + code, hub.environment(tmp_path)).split()
    assert answers == [hashlib.sha256(content[8:200_000]).hexdigest()] * len(names)
    # What came of a broken body is not asked for again.
    assert int(fetched) == hub.sent() == len(names) * (200_000 - 8)


REFUSED: dict[str | int, str] = {
    "whole": "answers with the whole file, where bytes 8 to 65536 were asked for",
    "short": "the connection broke 4096 bytes early | try again later",
    "long": "answers with more bytes than were asked for",
    "gzip": "answers with compressed bytes (gzip), which were not asked for",
    "shifted": "answers with Content-Range 'bytes 9-65536/1048577', expected 'bytes 8-65535/1048577'",
    "loop": "reached by too many redirects",
    401: "answers with status 401",
    403: "answers with status 403",
    404: "answers with status 404",
    416: "answers with status 416",
    500: "answers with status 500 | try again later",
}


def test_wrong_answers_are_refused_and_never_kept(hub: HubServer, tmp_path: Path) -> None:
    content = bytes(1 << 20)
    hub.push("org/bytes", {f"{how}.bin": content + bytes([i]) for i, how in enumerate(REFUSED)})
    hub.push("org/bytes", {"whole.bin": bytes(64 << 20)})  # more than the system's buffers take
    for how in REFUSED:
        hub.fail(f"{how}.bin", how)
    names = [f"{how}.bin" for how in REFUSED]
    code = f"""
folder = RemoteFolder('org/bytes')
for name in {names}: print(attempt(lambda: folder.file(name).read(8, 65536)))
"""
    answers = run_python(PRELUDE + code, hub.environment(tmp_path)).splitlines()
    for said, (how, says) in zip(answers, REFUSED.items(), strict=True):
        kind = "PassingError" if how in ("short", 500) else "HubError"
        where = f"{hub.cdn_url}/" if how == "loop" else f"org/bytes@{hub.commit('org/bytes')[:8]}/{how}.bin: "
        assert said.startswith(f"{kind}: {where}"), said
        assert says in said
        assert " | " in said
    assert hub.sent("whole.bin") < 32 << 20  # hung up before the body
    assert entries(tmp_path) == []
    hub.recover()
    right = hashlib.sha256(content[8:65536]).hexdigest()
    assert run_python(PRELUDE + code, hub.environment(tmp_path)).split() == [right] * len(names)


def test_refusals_name_the_way_out(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hub.push("org/gated", folder)
    hub.refuse("org/gated", 401, "GatedRepo", listed=True)
    hub.refuse("org/broken", 500)
    hub.refuse("org/odd", 200)  # an empty JSON object
    code = """
print(attempt(lambda: RemoteFolder('org/gated').json('config.json')))
print(attempt(lambda: RemoteFolder('org/gated').file('model-00001-of-00002.safetensors').read(0, 8)))
for args in ('org/absent',), ('org/tiny', 'v9'), ('org/broken',), ('org/odd',), ('org--x/tiny..y',), ('tiny',):
    print(attempt(lambda: RemoteFolder(*args)))
"""
    answers = run_python(PRELUDE + code, hub.environment(tmp_path)).splitlines()
    terms = f"access on request only | accept their terms at {hub.url}/org/gated, then set HF_TOKEN"
    reasons = ["no such repository", "no revision 'v9'", "cannot be reached", "makes no sense"]
    reasons += ["no valid Hub id", "is no Hub id"]
    for said, says in zip(answers, [terms, terms, *reasons], strict=True):
        assert says in said
    code = PRELUDE + "print(attempt(lambda: RemoteFolder('org/new')))"
    assert "HF_HUB_OFFLINE forbids" in run_python(code, hub.environment(tmp_path, HF_HUB_OFFLINE="1"))


def test_a_header_that_claims_everything_costs_one_read(hub: HubServer, tmp_path: Path) -> None:
    hub.push("org/bytes", {"model.safetensors": struct.pack("<Q", 1 << 63) + bytes(200_000)})
    code = "print(attempt(lambda: SafetensorsFile(RemoteFolder('org/bytes').file('model.safetensors'))))"
    said = run_python(PRELUDE + code, hub.environment(tmp_path))
    assert said.startswith("CheckpointError: org/bytes@")
    assert "claims 9223372036854775808 bytes, the file has 200008" in said
    assert hub.sent() == HEADER


def test_several_processes_leave_one_good_entry(hub: HubServer, router: torch.Tensor, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: run_python(PRELUDE + ONE_ROUTER, environment), range(4)))
    assert {answer.split()[0] for answer in answers} == {digest(router)}
    assert len(entries(tmp_path)) == 2  # header and router
    answer = run_python(PRELUDE + ONE_ROUTER, environment | {"HF_HUB_OFFLINE": "1"})
    assert answer.split() == [digest(router), "0"]


def test_a_damaged_entry_is_fetched_again(hub: HubServer, router: torch.Tensor, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path)
    run_python(PRELUDE + ONE_ROUTER, environment)
    header, kept = sorted(entries(tmp_path), key=lambda path: path.stat().st_size, reverse=True)
    whole = kept.read_bytes()
    kept.write_bytes(whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
    header.write_bytes(header.read_bytes()[:-1])
    assert run_python(PRELUDE + ONE_ROUTER, environment).split() == [digest(router), str(HEADER + router.nbytes)]
    assert kept.read_bytes() == whole


def test_where_nothing_can_be_stored(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "octavo-ranges").write_text("in the way")
    said = run_python(PRELUDE + ONE_ROUTER, hub.environment(tmp_path))
    assert "cannot be stored: Not a directory | HF_HOME says where" in said


def test_the_least_recently_used_entries_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 1000 + cache.DIGEST_BYTES
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * size)
    kept = RangeCache(tmp_path)
    data = torch.arange(1000).to(torch.uint8)
    for begin in (0, 1000, 2000):
        kept.put("a" * 40, begin, data)
    for path, seconds in zip(sorted(tmp_path.rglob("*-*")), (1, 2, 3), strict=True):
        os.utime(path, (seconds, seconds))
    assert kept.get("a" * 40, 0, 1000) is not None  # used now
    RangeCache(tmp_path).put("b" * 64, 0, data)
    assert kept.get("a" * 40, 1000, 2000) is None
    for name, begin in (("a" * 40, 0), ("a" * 40, 2000), ("b" * 64, 0)):
        found = kept.get(name, begin, begin + 1000)
        assert found is not None
        assert torch.equal(found, data)
    kept.put("c" * 40, 0, torch.zeros(4 * size, dtype=torch.uint8))  # larger than everything: not kept
    assert len(list(tmp_path.rglob("*-*"))) == 3


SHA = "0123456789abcdef0123456789abcdef01234567"


def test_a_listing_is_checked() -> None:
    found = Listing.checked(SHA, {"b.bin": [2, "f" * 64], "a.bin": (0, SHA), "deep/c.bin": (1, SHA), "..\\d": (1, SHA)})
    assert list(found.files) == ["a.bin", "b.bin"]
    assert found.files["b.bin"].size == 2


@pytest.mark.parametrize("commit", [None, "", "main", "../../../x", SHA[:-1] + "/", SHA.upper()])
def test_a_listing_of_no_commit_is_refused(commit: str | None) -> None:
    with pytest.raises((ValueError, TypeError)):
        Listing.checked(commit, {})


@pytest.mark.parametrize("entry", [(-1, SHA), (None, SHA), ("9", SHA), (1, None), (1, "../../../x"), (1,), 1, "ab"])
def test_a_listing_with_a_nonsensical_file_is_refused(entry: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        Listing.checked(SHA, {"a.bin": entry})
