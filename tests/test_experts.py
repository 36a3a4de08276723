"""Experts read from the disk: the same bits at every budget, a plain simulation's counters, and reads that fail."""

from __future__ import annotations

import ctypes
import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import needs_compiled
from octavo import kernels
from octavo.cache import make_cache
from octavo.checkpoint import open_checkpoint
from octavo.engine import Engine
from octavo.errors import CheckpointError, OptionError
from octavo.experts import ExpertCache, StreamedExperts
from octavo.experts.cache import Stored
from octavo.experts.memory import Memory
from octavo.experts.prefetch import STRETCHES, TOKENS, Ahead, Prefetch
from octavo.kernels.ops import compiled
from octavo.load import build_model
from octavo.machine import resident_memory
from octavo.model import Mixtral
from octavo.plan import Placement
from octavo.sampling import SamplingParams
from octavo.storage.files import MappedFile, Place, place_of
from stores import make_source, quantise

pytestmark = [needs_compiled, pytest.mark.usefixtures("own_kernels")]
KINDS = ("16", "8", "4", "3", "2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in bfloat16, and its stores."""
    folder = tmp_path_factory.mktemp("experts")
    made = {"16": make_source(folder)}
    for bits in KINDS[1:]:
        quantise(made["16"], folder / bits, bits)
        made[bits] = folder / bits
    return made


def cache_of(model: Mixtral) -> ExpertCache:
    (cache,) = {module.cache for module in model.modules() if isinstance(module, StreamedExperts)}
    return cache


def streamed(folder: Path, placement: Placement) -> tuple[Mixtral, ExpertCache]:
    model = build_model(open_checkpoint(folder), placement=placement)
    return model, cache_of(model)


def size_of_expert(folder: Path) -> int:
    checkpoint = open_checkpoint(folder)
    return sum(checkpoint.info(f"layers.0.feed_forward.experts.0.w{n}.weight").nbytes for n in (1, 2, 3))


def placements(folder: Path) -> st.SearchStrategy[Placement]:
    """From the smallest that is allowed to those that hold all, under every policy."""
    expert = size_of_expert(folder)
    keys = st.tuples(st.integers(0, 1), st.integers(0, 3))

    def place(slots: int, pinned: frozenset[tuple[int, int]], more: int, prefetch: bool) -> Placement:
        return Placement((slots + len(pinned)) * expert + more, slots, pinned, prefetch)

    room = st.integers(0, 8 * expert)
    return st.builds(place, st.integers(2, 9), st.frozensets(keys, max_size=3), room, st.booleans())


def run(model: Mixtral) -> Tensor:
    """Logits of prompts of two rows, then of steps of decoding."""
    ids_BT = torch.arange(2 * 19).view(2, 19) * 7 % model.args.vocab_size
    cache = make_cache(model.args, 2, dtype=model.dtype)
    found = [model(ids_BT[:, :14], cache=cache)]
    found += [model(ids_BT[:, i : i + 1], cache=cache) for i in range(14, 19)]
    return torch.cat([*found, model(ids_BT)], dim=1)  # and without a cache


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_same_bits_at_every_budget(kind: str, folders: dict[str, Path]) -> None:
    expected = run(build_model(open_checkpoint(folders[kind]), kernels=True))

    @settings(max_examples=15, deadline=None)
    @given(placements(folders[kind]))
    def check(placement: Placement) -> None:
        model, cache = streamed(folders[kind], placement)
        assert torch.equal(run(model), expected)
        total = cache.counters.total
        assert total.misses >= 8  # every expert's first use
        assert total.nbytes >= total.asked_nbytes - total.found_nbytes
        assert 0 <= total.found_nbytes <= total.asked_nbytes
        cache.close()

    check()


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_engines_say_the_same_at_any_budget(data: st.DataObject, folders: dict[str, Path]) -> None:
    folder = folders[data.draw(st.sampled_from(KINDS))]
    prompts = data.draw(st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=20), min_size=1, max_size=4))
    model, _ = streamed(folder, data.draw(placements(folder)))
    resident = build_model(open_checkpoint(folder), kernels=True)
    assert said(model, prompts) == said(resident, prompts)


def said(model: Mixtral, prompts: list[list[int]]) -> list[Any]:
    engine = Engine(model, max_batch_size=3, prefill_chunk=6)
    for prompt in prompts:
        engine.add(prompt, SamplingParams(max_tokens=6, temperature=0, logprobs=2))
    found = []
    while engine.has_work:
        found += [(event.seq_id, event.token_id, event.logprobs) for event in engine.step()]
    return found


def test_torch_reads_experts_too(folders: dict[str, Path]) -> None:
    kernels.use("reference")
    expected = run(build_model(open_checkpoint(folders["4"])))
    kernels.use(None)
    model, _ = streamed(folders["4"], Placement(5 * size_of_expert(folders["4"]), 2))
    kernels.use("reference")
    assert torch.equal(run(model), expected)


# ---------------------------------------- the cache alone


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[MappedFile]:
    """Two files of random bytes."""
    folder, found = tmp_path_factory.mktemp("files"), []
    for number in range(2):
        path = folder / f"{number}.bin"
        path.write_bytes(torch.randint(0, 256, (50_001,), dtype=torch.uint8).numpy().tobytes())
        found.append(MappedFile(path))
    return found


def experts_in(files: list[MappedFile], layers: int = 2, experts: int = 4) -> dict[tuple[int, int], list[Stored]]:
    """Three matrices for each expert: two side by side at an odd place, one in the other file at its end."""
    return {
        (layer, e): [
            Stored(Place(files[0], 5000 * e + 64 * layer, 5000 * e + 2000), 100),
            Stored(Place(files[0], 5000 * e + 2000, 5000 * e + 4999), 7),
            Stored(Place(files[1], 49_000 - e, 50_001), 1000),
        ]
        for layer in range(layers)
        for e in range(experts)
    }


LARGEST = 2000 + 2999 + 1001 + 3
PAGES = 4 * 4096  # that the places of an expert touch beyond what they hold


@pytest.fixture
def opened(files: list[MappedFile]) -> Iterator[Any]:
    """Makes caches, and closes them."""
    made: list[ExpertCache] = []

    def make(slots: int, pinned: Any = (), more: int = 0, **shape: int) -> ExpertCache:
        placement = Placement((slots + len(pinned)) * LARGEST + more, slots, frozenset(pinned))
        made.append(ExpertCache(experts_in(files, **shape), placement))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def bytes_of(cache: ExpertCache, held: Any) -> list[bytes]:
    """Of each matrix, head and tail together."""
    cache.check(held)
    return [b"".join(_bytes(piece) for piece in parts) for parts in held.matrices]


def _bytes(piece: Any) -> bytes:
    import ctypes

    return ctypes.string_at(piece.address, piece.nbytes)


def bytes_on_disk(stored: list[Stored]) -> list[bytes]:
    return [m.place.file.read(m.place.begin, m.place.end).numpy().tobytes() for m in stored]


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), max_size=40),
    slots=st.integers(2, 9),
    pinned=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 3)), max_size=2),
    more=st.integers(0, 20 * (LARGEST + PAGES)),
)
def test_counters_are_those_of_a_simulation_and_bytes_those_of_the_files(
    asked: list[tuple[int, int]], slots: int, pinned: set[tuple[int, int]], more: int, files: list[MappedFile]
) -> None:
    stored = experts_in(files)
    cache = ExpertCache(stored, Placement((slots + len(pinned)) * LARGEST + more, slots, frozenset(pinned)))
    assert cache.nbytes <= cache.placement.nbytes + (slots + len(pinned)) * PAGES
    heads: set[tuple[int, int]] = set()
    tails: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = evictions = found_nbytes = asked_nbytes = 0
    for key in asked:
        size = sum(m.place.end - m.place.begin for m in stored[key])
        held = cache.take(key)
        assert held is not None
        head, tail = (sum(piece.nbytes for piece in parts) for parts in zip(*held.matrices, strict=True))
        assert head + tail == size
        assert key not in pinned or not tail
        there = head * (key in heads) + tail * (key in tails)
        hits, found_nbytes, asked_nbytes = hits + (there == size), found_nbytes + there, asked_nbytes + size
        heads.add(key)
        if tail:
            if key not in tails and len(tails) == cache.n_slots:
                tails.popitem(last=False)
                evictions += 1
            tails[key] = None
            tails.move_to_end(key)
        assert bytes_of(cache, held) == bytes_on_disk(stored[key])
        assert cache.holds(key)
        cache.give_back(held)
    total = cache.counters.total
    assert (total.hits, total.misses, total.evictions) == (hits, len(asked) - hits, evictions)
    assert (total.found_nbytes, total.asked_nbytes) == (found_nbytes, asked_nbytes)
    assert cache.counters.hit_rate == found_nbytes / max(1, asked_nbytes)
    cache.close()


def test_heads_fill_the_memory_there_is(files: list[MappedFile]) -> None:
    stored, before = experts_in(files), 0
    for nbytes in range(2 * LARGEST, 8 * LARGEST + 20 * PAGES, 3000):
        cache = ExpertCache(stored, Placement(nbytes, 2))
        head = (
            sum(piece.nbytes for key in stored for piece, _ in cache.take(key).matrices) if not cache.n_slots else None
        )
        assert cache.nbytes <= max(nbytes, 2 * (LARGEST + PAGES))
        assert cache.nbytes >= before - 20_000  # more memory is used, but for slots that are not needed any more
        before = max(before, cache.nbytes)
        cache.close()
    assert head == sum(m.place.end - m.place.begin for matrices in stored.values() for m in matrices)


def test_what_is_in_use_stays(opened: Any, files: list[MappedFile]) -> None:
    cache, stored = opened(2), experts_in(files)
    first, second = cache.take((0, 0)), cache.take((0, 1))
    assert cache.take((0, 2)) is None
    assert cache.counters.total.misses == 2
    assert bytes_of(cache, second) == bytes_on_disk(stored[0, 1])
    cache.give_back(first)
    third = cache.take((1, 2))
    assert not cache.holds((0, 0))
    assert bytes_of(cache, third) == bytes_on_disk(stored[1, 2])
    assert bytes_of(cache, second) == bytes_on_disk(stored[0, 1])
    assert cache.counters.layers[1].evictions == 1


def test_what_is_read_ahead_waits_for_its_turn(opened: Any, files: list[MappedFile]) -> None:
    cache, stored = opened(3), experts_in(files)
    first = cache.take((0, 0))
    assert cache.prefetch((1, 0))
    assert cache.prefetch((1, 1))
    assert not cache.prefetch((1, 2))  # what was read ahead does not make room for more of it
    held = cache.take((1, 0))
    assert bytes_of(cache, held) == bytes_on_disk(stored[1, 0])
    assert cache.counters.total.hits == 0  # it was not there when it was needed
    cache.give_back(first)
    cache.give_back(held)
    again = cache.take((1, 0))
    assert cache.counters.total.hits == 1
    assert cache.take((0, 1)) is not None
    assert cache.holds((1, 1))  # but what is needed takes the place of other things first,
    assert cache.take((0, 2)) is not None
    assert not cache.holds((1, 1))  # and then of what nobody asked for
    assert bytes_of(cache, again) == bytes_on_disk(stored[1, 0])


def test_what_was_read_ahead_in_vain_makes_room(opened: Any) -> None:
    cache = opened(2)
    assert cache.prefetch((1, 0))
    assert cache.prefetch((1, 1))
    cache.end_layer(1)
    assert cache.prefetch((0, 3))
    assert not cache.holds((1, 0))
    assert cache.holds((1, 1))


def test_memory_is_taken_before_it_is_needed_and_keeps_what_is_in_it() -> None:
    before, nbytes = resident_memory(), 64 << 20
    memory = Memory(nbytes)
    first = ctypes.c_uint8.from_address(memory.address + 12345)
    first.value = 7
    if not before or not compiled().populate(memory.address, 4096):
        memory.close()
        pytest.skip("the system does not take memory ahead, or does not tell what was taken")
    deadline = time.monotonic() + 20
    while resident_memory() - before < 0.9 * nbytes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident_memory() - before >= 0.9 * nbytes
    memory.close()
    assert first.value == 7


def test_measuring_the_disk_changes_nothing(opened: Any, files: list[MappedFile]) -> None:
    cache, stored = opened(3, more=3 * LARGEST + PAGES), experts_in(files)
    for key in stored:
        held = cache.take(key)
        cache.check(held)
        cache.give_back(held)
    assert cache.disk_bandwidth(1 << 20) > 0
    for key in stored:
        held = cache.take(key)
        assert bytes_of(cache, held) == bytes_on_disk(stored[key])
        cache.give_back(held)


def test_snapshots_are_subtracted(opened: Any) -> None:
    cache = opened(2)
    for key in ((0, 0), (1, 1)):
        cache.give_back(cache.take(key))
    before = cache.counters.copy()
    held = cache.take((1, 1))
    cache.check(held)
    since = cache.counters.since(before)
    assert (since.total.hits, since.total.misses, since.layers[0].asked_nbytes) == (1, 0, 0)
    assert since.hit_rate == 1
    assert before.total.misses == 2


def test_too_little_memory_is_refused_and_the_hint_is_enough(files: list[MappedFile]) -> None:
    stored = experts_in(files)
    for pinned in ([], [(0, 0), (0, 1)]):
        with pytest.raises(OptionError, match="hold less than 2 experts") as error:
            ExpertCache(stored, Placement(100, 2, frozenset(pinned)))
        enough = int(str(error.value.hint).split()[1])
        ExpertCache(stored, Placement(enough, 2, frozenset(pinned))).close()
        with pytest.raises(OptionError):
            ExpertCache(stored, Placement(enough - 1, 2, frozenset(pinned)))


# ---------------------------------------- what goes wrong


def test_a_file_that_was_cut_short_is_told_and_nothing_is_computed_from_it(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(40_000))
    status = path.stat()
    file = MappedFile(path)
    stored = {(0, e): [Stored(Place(file, 10_000 * e, 10_000 * (e + 1)), 16)] for e in range(4)}
    cache = ExpertCache(stored, Placement(1 << 20, 2))
    os.truncate(path, 25_000)
    with pytest.raises(CheckpointError, match=r"weights.bin: has 25000 bytes, where 40000 were expected"):
        cache.take((0, 3))
    assert not cache.holds((0, 3))
    path.write_bytes(os.urandom(40_000))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    held = cache.take((0, 3))
    assert bytes_of(cache, held) == [path.read_bytes()[30_000:]]
    os.truncate(path, 25_000)  # while it is open
    for _ in range(2):
        with pytest.raises(CheckpointError, match="where 40000 were expected"):
            cache.take((0, 2))
        assert not cache.holds((0, 2))
    cache.close()


def test_a_file_that_is_cut_short_under_a_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(40_000))
    file = MappedFile(path)
    stored = {(0, e): [Stored(Place(file, 10_000 * e, 10_000 * (e + 1)), 16)] for e in range(4)}
    cache = ExpertCache(stored, Placement(21_000, 2))
    held = cache.take((0, 0))
    cache.check(held)
    cache.give_back(held)
    fstat = os.fstat(cache._reader._open[file.location].handle)
    monkeypatch.setattr(os, "fstat", lambda handle: fstat)  # it is looked at just before
    os.truncate(path, 25_000)
    for ahead in (False, True):
        if ahead:
            cache.prefetch((0, 2))
        held = cache.take((0, 2))
        with pytest.raises(CheckpointError, match=r"weights.bin: has 25000 bytes, where 40000 were expected"):
            cache.check(held)
        cache.give_back(held)
        assert not cache.holds((0, 2))
    held = cache.take((0, 1))
    assert bytes_of(cache, held) == [path.read_bytes()[10_000:20_000]]
    cache.close()


def test_a_file_that_was_written_to_is_told(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = copied(folders["4"], tmp_path)
    model, cache = streamed(folder, Placement(2 * size_of_expert(folder), 2))
    run(model)
    (weights,) = folder.glob("*.safetensors")
    with weights.open("r+b") as file:
        file.write(file.read(1))
    os.utime(weights)
    with pytest.raises(CheckpointError, match=r"model.safetensors: was written to") as error:
        run(model)
    assert "load the model anew" in str(error.value.hint)
    cache.close()


def copied(store: Path, target: Path) -> Path:
    folder = target / "store"
    folder.mkdir()
    for path in store.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("layers.1.feed_forward.experts.2.w3.weight", "used"),
        ("layers.0.feed_forward.experts.0.w2.weight", "used"),
        ("layers.1.attention.wk.weight", "loaded"),
        ("tok_embeddings.weight", "loaded"),
    ],
)
def test_damage_is_found_at_the_first_read(name: str, when: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = copied(folders["4"], tmp_path)
    checkpoint = open_checkpoint(folder)
    packed = checkpoint.packed(name)
    place = place_of(checkpoint.read(name) if packed is None else packed.data)
    assert place is not None
    with place.file.path.open("r+b") as file:
        file.seek(place.end - 1)
        byte = file.read(1)[0]
        file.seek(place.end - 1)
        file.write(bytes([byte ^ 1]))
    placement = Placement(4 * size_of_expert(folder), 2)
    if when == "loaded":
        with pytest.raises(CheckpointError, match=f"{name}.*not those that were written"):
            streamed(folder, placement)
        return
    model, cache = streamed(folder, placement)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{name}.*not those that were written"):
            run(model)
    cache.close()


def test_a_sequence_fails_with_the_read_and_the_next_goes_on(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["4"], tmp_path)
    model, _ = streamed(folder, Placement(2 * size_of_expert(folder), 2))
    expected = said(model, [[1, 2, 3]])
    (weights,) = folder.glob("*.safetensors")
    whole, status = weights.read_bytes(), weights.stat()
    os.truncate(weights, 8192)
    engine = Engine(model)
    engine.add([4, 5, 6, 7, 8, 9], SamplingParams(max_tokens=4))
    (event,) = engine.step()
    assert event.finish_reason == "error"
    assert isinstance(event.error, CheckpointError)
    weights.write_bytes(whole)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert said(model, [[1, 2, 3]]) == expected


def test_another_process_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = streamed(folders["4"], Placement(2 * size_of_expert(folders["4"]), 2))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(OptionError, match="forked"):
        run(model)


def test_weights_that_are_converted_cannot_be_streamed(folders: dict[str, Path]) -> None:
    placement = Placement(1 << 30, 4)
    with pytest.raises(OptionError, match="cannot be read when it is needed") as error:
        build_model(open_checkpoint(folders["16"]), bits=4, placement=placement)
    assert "octavo quantize" in str(error.value.hint)
    with pytest.raises(OptionError, match="is a store"):
        build_model(open_checkpoint(folders["4"]), bits=4, placement=placement)
    with pytest.raises(OptionError, match="CPU's compiled kernels"):
        build_model(open_checkpoint(folders["16"]), dtype="float32", placement=placement)


def test_places_are_those_of_mapped_views(files: list[MappedFile]) -> None:
    data = files[0].read(100, 300)
    found = place_of(data[50:].view(torch.int16))
    assert found is not None
    assert (found.file, found.begin, found.end) == (files[0], 150, 300)
    assert place_of(data.clone()) is None
    assert place_of(data[::2]) is None


def test_the_model_says_where_its_experts_are(folders: dict[str, Path]) -> None:
    model, cache = streamed(folders["4"], Placement(3 * size_of_expert(folders["4"]), 2))
    assert f"8 experts, {cache.nbytes} bytes in memory" in repr(model)
    assert "tok_embeddings): StreamedEmbedding(420 x 64, on the disk)" in repr(model)


# ---------------------------------------- prefetch


def test_guesses_are_those_of_the_next_router(folders: dict[str, Path]) -> None:
    model, _ = streamed(folders["16"], Placement(4 * size_of_expert(folders["16"]), 2, prefetch=True))
    first, second = model.layers
    prefetch = first.feed_forward.experts.prefetch
    h_TD = torch.randn(3, model.args.dim, dtype=torch.bfloat16)
    guessed = prefetch.guess(0, first.ffn_norm(h_TD))
    chosen = second.feed_forward.gate(second.ffn_norm(h_TD)).topk_ids_TK
    assert guessed == torch.unique(chosen).tolist()
    assert prefetch.guess(1, h_TD) == []  # the last layer has no next one


@pytest.mark.parametrize(("seconds", "stays"), [(0.5, True), (0.99, False), (2.0, False)])
def test_prefetch_that_does_not_pay_turns_itself_off(
    seconds: float, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefetch, now = Prefetch([Ahead(torch.ones(4), torch.eye(4), 2)]), 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    x_TD = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    for _ in range(2 * STRETCHES * TOKENS + 1):
        assert prefetch.note is None
        assert prefetch.guess(0, x_TD) == ([1, 3] if prefetch.on else [])
        now += seconds if prefetch.on else 1.0
    assert prefetch.note is not None
    assert prefetch.note.startswith("prefetch stays on" if stays else "prefetch turned itself off")
    assert f"{seconds * 1e3:.0f} ms" in prefetch.note
    assert bool(prefetch.guess(0, x_TD)) == stays
