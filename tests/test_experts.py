"""Experts read from the disk: the same bits at every budget, a plain simulation's counters, and reads that fail."""

from __future__ import annotations

import os
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
from octavo.load import build_model
from octavo.model import Mixtral
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


def streamed(folder: Path, budget: int) -> tuple[Mixtral, ExpertCache]:
    model = build_model(open_checkpoint(folder), expert_memory=budget)
    (cache,) = {block.feed_forward.experts.cache for block in model.layers}
    return model, cache


def budgets(folder: Path) -> list[int]:
    """From the smallest that is allowed to one that holds all."""
    _, cache = streamed(folder, 1 << 40)
    return [slots * cache.slot_nbytes for slots in range(2, cache.n_slots + 1)]


def run(model: Mixtral) -> Tensor:
    """Logits of prompts of two rows, then of steps of decoding."""
    ids_BT = torch.arange(2 * 19).view(2, 19) * 7 % model.args.vocab_size
    cache = make_cache(model.args, 2, dtype=model.dtype)
    found = [model(ids_BT[:, :14], cache=cache)]
    found += [model(ids_BT[:, i : i + 1], cache=cache) for i in range(14, 19)]
    return torch.cat([*found, model(ids_BT)], dim=1)  # and without a cache


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_same_bits_at_every_budget(kind: str, folders: dict[str, Path]) -> None:
    resident = build_model(open_checkpoint(folders[kind]), kernels=True)
    expected = run(resident)
    for budget in budgets(folders[kind]):
        model, cache = streamed(folders[kind], budget)
        assert torch.equal(run(model), expected)
        total = cache.counters.total
        assert total.misses >= cache.n_slots
        assert 0 < total.nbytes <= total.misses * cache.slot_nbytes


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_engines_say_the_same_at_any_budget(data: st.DataObject, folders: dict[str, Path]) -> None:
    folder = folders[data.draw(st.sampled_from(KINDS))]
    prompts = data.draw(st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=20), min_size=1, max_size=4))
    model, _ = streamed(folder, data.draw(st.sampled_from(budgets(folder))))
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
    model, _ = streamed(folders["4"], budgets(folders["4"])[0])
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


def places_in(files: list[MappedFile], layers: int = 2, experts: int = 4) -> dict[tuple[int, int], list[Place]]:
    """Three matrices for each expert: two side by side at an odd place, one in the other file at its end."""
    return {
        (layer, e): [
            Place(files[0], 5000 * e + 64 * layer, 5000 * e + 2000),
            Place(files[0], 5000 * e + 2000, 5000 * e + 4999),
            Place(files[1], 49_000 - e, 50_001),
        ]
        for layer in range(layers)
        for e in range(experts)
    }


@pytest.fixture
def opened(files: list[MappedFile]) -> Iterator[Any]:
    """Makes caches, and closes them."""
    made: list[ExpertCache] = []

    def make(slots: int, pinned: Any = (), **shape: int) -> ExpertCache:
        places = places_in(files, **shape)
        made.append(ExpertCache(places, slots * ExpertCache(places, 1 << 30).slot_nbytes, pinned))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), max_size=40),
    slots=st.integers(2, 9),
    pinned=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 3)), max_size=1),
)
def test_counters_are_those_of_a_simulation_and_bytes_those_of_the_files(
    asked: list[tuple[int, int]], slots: int, pinned: set[tuple[int, int]], files: list[MappedFile]
) -> None:
    places = places_in(files)
    cache = ExpertCache(places, slots * ExpertCache(places, 1 << 30).slot_nbytes, pinned)
    there: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = evictions = 0
    for key in asked:
        hits += key in there
        assert cache.holds(key) == (key in there)
        if key not in there and len(there) == cache.n_slots:
            del there[next(one for one in there if one not in pinned)]
            evictions += 1
        there[key] = None
        there.move_to_end(key)
        slot = cache.take(key)
        assert slot is not None
        for tensor, place in zip(cache.wait(slot), places[key], strict=True):
            assert torch.equal(tensor, place.file.read(place.begin, place.end))
        cache.give_back(slot)
    total = cache.counters.total
    assert (total.hits, total.misses, total.evictions) == (hits, len(asked) - hits, evictions)
    assert cache.counters.hit_rate == hits / max(1, len(asked))
    cache.close()


def test_what_is_in_use_stays(opened: Any) -> None:
    cache = opened(2)
    first, second = cache.take((0, 0)), cache.take((0, 1))
    assert cache.take((0, 2)) is None
    assert cache.counters.total.misses == 2
    bytes_of_second = [tensor.clone() for tensor in cache.wait(second)]
    cache.give_back(first)
    third = cache.take((1, 2))
    assert not cache.holds((0, 0))
    cache.wait(third)
    assert all(torch.equal(*pair) for pair in zip(cache.wait(second), bytes_of_second, strict=True))
    assert cache.counters.layers[1].evictions == 1


def test_what_is_pinned_stays(opened: Any) -> None:
    cache = opened(3, pinned={(0, 0), (1, 3)})
    for key in [(0, 0), (1, 3), *((layer, e) for layer in range(2) for e in range(4))] * 2:
        slot = cache.take(key)
        cache.wait(slot)
        cache.give_back(slot)
    assert cache.holds((0, 0))
    assert cache.holds((1, 3))


def test_too_little_memory_is_refused_and_the_hint_is_enough(files: list[MappedFile]) -> None:
    places = places_in(files)
    with pytest.raises(OptionError, match="at least 2 are needed") as error:
        ExpertCache(places, 100)
    enough = int(str(error.value.hint).split()[1])
    ExpertCache(places, enough).close()
    with pytest.raises(OptionError):
        ExpertCache(places, enough - 1)
    with pytest.raises(OptionError, match="2 experts are pinned, and there are 2 slots"):
        ExpertCache(places, enough, [(0, 0), (0, 1)])


# ---------------------------------------- what goes wrong


def test_a_file_that_was_cut_short_is_told_and_nothing_is_computed_from_it(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(40_000))
    file = MappedFile(path)
    places = {(0, e): [Place(file, 10_000 * e, 10_000 * (e + 1))] for e in range(4)}
    cache = ExpertCache(places, 1 << 20)
    os.truncate(path, 25_000)
    with pytest.raises(CheckpointError, match=r"weights.bin: has 25000 bytes, where 40000 were expected"):
        cache.take((0, 3))
    assert not cache.holds((0, 3))
    path.write_bytes(os.urandom(40_000))
    slot = cache.take((0, 3))
    cache.wait(slot)
    cache.give_back(slot)
    os.truncate(path, 25_000)  # while it is open
    for _ in range(2):
        slot = cache.take((0, 2))
        with pytest.raises(CheckpointError, match="where 40000 were expected"):
            cache.wait(slot)
        cache.give_back(slot)
        assert not cache.holds((0, 2))
    slot = cache.take((0, 1))
    assert bytes(cache.wait(slot)[0].numpy()) == path.read_bytes()[10_000:20_000]


def test_a_sequence_fails_with_the_read_and_the_next_goes_on(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    for path in folders["4"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model, _ = streamed(folder, budgets(folder)[0])
    expected = said(model, [[1, 2, 3]])
    (weights,) = folder.glob("*.safetensors")
    whole = weights.read_bytes()
    os.truncate(weights, 8192)
    engine = Engine(model)
    engine.add([4, 5, 6, 7, 8, 9], SamplingParams(max_tokens=4))
    (event,) = engine.step()
    assert event.finish_reason == "error"
    assert isinstance(event.error, CheckpointError)
    weights.write_bytes(whole)
    assert said(model, [[1, 2, 3]]) == expected


def test_weights_that_are_converted_cannot_be_streamed(folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="cannot be read when it is needed") as error:
        build_model(open_checkpoint(folders["16"]), bits=4, expert_memory=1 << 30)
    assert "octavo quantize" in str(error.value.hint)
    with pytest.raises(OptionError, match="CPU's kernels"):
        build_model(open_checkpoint(folders["16"]), dtype="float32", expert_memory=1 << 30)


def test_places_are_those_of_mapped_views(files: list[MappedFile]) -> None:
    data = files[0].read(100, 300)
    found = place_of(data[50:].view(torch.int16))
    assert found is not None
    assert (found.file, found.begin, found.end) == (files[0], 150, 300)
    assert place_of(data.clone()) is None
    assert place_of(data[::2]) is None


def test_the_model_says_where_its_experts_are(folders: dict[str, Path]) -> None:
    model, cache = streamed(folders["4"], budgets(folders["4"])[1])
    assert f"8 experts, {cache.n_slots} slots" in repr(model)
    assert all(isinstance(block.feed_forward.experts, StreamedExperts) for block in model.layers)
