"""A budget: the same replies within it as without, refusals that say what works, and what is counted and told."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import needs_compiled, tiny_model
from octavo import kernels, machine
from octavo.checkpoint import open_checkpoint
from octavo.engine import Engine
from octavo.errors import CheckpointError, OptionError, PromptError, ResourceError, UserError
from octavo.experts import CacheCounters
from octavo.experts.replay import placement_from_trace
from octavo.experts.trace import RoutingTrace
from octavo.llm import LLM
from octavo.plan import BASE, CHUNK, MemoryPlan, footprint_of, kv_cache_bytes, weights_at
from octavo.sampling import SamplingParams
from run_octavo import command, refused, run, terminal
from stores import make_source, quantise
from test_plan import MEMINFO, smallest, tree
from tiny_folder import make_tiny_folder

pytestmark = [needs_compiled, pytest.mark.usefixtures("own_kernels")]
KINDS = ("16", "8", "4", "3", "2")
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=3)
FLAGS = ("-o", "temperature=0", "-o", "max_tokens=12")
TURN = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memory")


@pytest.fixture(scope="module")
def folders(home: Path) -> dict[str, Path]:
    """One model in bfloat16, and its stores; its experts are most of it."""
    made = {"16": make_source(home, hidden_dim=1024)}
    for bits in KINDS[1:]:
        quantise(made["16"], home / f"store {bits}", bits)
        made[bits] = home / f"store {bits}"
    return made


@functools.cache
def resident(folder: Path) -> LLM:
    return LLM.load(folder, device="cpu", max_batch_size=3)


@functools.cache
def span(folder: Path, **options: Any) -> tuple[int, int]:
    """The smallest budget that works, and the smallest with which every expert is in memory."""
    whole = plan_of(LLM.load(folder, memory="1GB", **options)).footprint.total
    with pytest.raises(OptionError) as caught:
        LLM.load(folder, memory=1000, **options)
    return smallest(caught.value), whole


def plan_of(llm: LLM) -> MemoryPlan:
    assert llm.plan is not None
    return llm.plan


def counted(llm: LLM) -> CacheCounters:
    assert llm.experts is not None
    return llm.experts


# ---------------------------------------- the same replies


@pytest.mark.parametrize("kind", KINDS)
def test_replies_are_the_same_from_the_smallest_budget_up(kind: str, folders: dict[str, Path]) -> None:
    folder = folders[kind]
    least, whole = span(folder)
    text = resident(folder).generate("The quick", GREEDY)
    said = resident(folder).chat(TURN, temperature=0.8, seed=4, n=2, max_tokens=9)
    for budget in (least, least + 1, (least + whole) // 2, whole - 1, whole):
        llm = LLM.load(folder, memory=budget)
        assert (plan_of(llm).placement is None, llm.experts is None) == (budget == whole, budget == whole)
        assert plan_of(llm).footprint.total <= budget
        assert llm.generate("The quick", GREEDY).choices == text.choices
        assert llm.chat(TURN, temperature=0.8, seed=4, n=2, max_tokens=9).choices == said.choices


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_batches_are_the_same_at_any_budget(data: st.DataObject, folders: dict[str, Path]) -> None:
    folder = folders[data.draw(st.sampled_from(KINDS))]
    prompts = data.draw(st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=20), min_size=1, max_size=4))
    least, whole = span(folder, max_batch_size=3)
    llm = LLM.load(folder, memory=data.draw(st.integers(least, whole)), max_batch_size=3)
    assert plan_of(llm).batch == llm.engine.max_batch_size == 3
    expected = resident(folder).generate(prompts, GREEDY)
    assert [one.choices for one in llm.generate(prompts, GREEDY)] == [one.choices for one in expected]


def test_one_byte_less_than_the_smallest_is_refused(folders: dict[str, Path]) -> None:
    for kind in KINDS:
        least, _ = span(folders[kind])
        with pytest.raises(OptionError, match="too little") as caught:
            LLM.load(folders[kind], memory=least - 1)
        assert smallest(caught.value) == least


def test_a_budget_as_people_write_it(folders: dict[str, Path]) -> None:
    for text in ("1GiB", "1 gib", str(2**30)):
        assert plan_of(LLM.load(folders["4"], memory=text)).budget == 2**30
    with pytest.raises(OptionError, match="'lots' is no size"):
        LLM.load(folders["4"], memory="lots")
    assert LLM.load(folders["4"]).plan is None


def test_the_precision_is_never_lowered(folders: dict[str, Path], home: Path) -> None:
    least, whole = span(folders["16"])
    for budget in (least, whole):
        assert plan_of(LLM.load(folders["16"], memory=budget)).bits == 16
    assert plan_of(LLM.load(folders["16"], memory="1GB", bits=4)).bits == 4
    assert plan_of(LLM.load(folders["4"], memory="1GB")).bits is None
    assert plan_of(LLM.load(home / "float32", memory="1GB")).bits == 32
    assert plan_of(LLM.load("menny", memory="2GB")).bits == 32  # as it is without a budget
    assert LLM.load(home / "float32", memory="1GB").model.dtype == torch.float32
    assert plan_of(LLM.load(home / "float32", memory="1GB", dtype="bfloat16")).bits == 16


def test_what_is_not_low_bit_is_counted_in_the_dtype_asked_for(home: Path, folders: dict[str, Path]) -> None:
    assert folders
    quantise(home / "float32", home / "wide store")
    wide, narrow = (plan_of(LLM.load(home / "wide store", memory="1GB", dtype=dtype)) for dtype in (None, "bfloat16"))
    assert wide.footprint.kv_cache == 2 * narrow.footprint.kv_cache
    assert wide.weights.embedding == 2 * narrow.weights.embedding
    assert wide.weights.experts == narrow.weights.experts
    assert narrow.weights.total == weights_at(narrow.args, 4).total
    least, _ = span(home / "wide store")
    whole = LLM.load(home / "wide store", device="cpu").generate("The", GREEDY)
    assert LLM.load(home / "wide store", memory=least).generate("The", GREEDY).choices == whole.choices


# ---------------------------------------- what does not go together, and what does instead


def test_what_cannot_be_streamed_is_refused_and_the_hint_works(
    folders: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    run("convert", folders["16"], home / "float16", "--to", "hf", "--dtype", "float16")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (folders["16"], {"bits": 4}, "quantised while loading"),
        (home / "float32", {}, "computed with as float32"),
        (home / "float32", {"dtype": "bfloat16"}, "computed with as bfloat16"),
        (home / "float16", {}, "computed with as float16"),
    ]
    for number, (folder, options, why) in enumerate(cases):
        budget = span(folder, **options)[1] - 1
        with pytest.raises(OptionError, match=why) as caught:
            LLM.load(folder, memory=budget, **options)
        found = re.search(r"octavo (quantize '?.*'? DST --bits \d)$", caught.value.hint or "")
        assert found
        store = tmp_path / f"store{number}"
        done = run("quantize", folder, store, "--bits", found[1][-1])
        assert done.code == 0
        assert str(folder) in found[1]
        llm = LLM.load(store, memory=budget, dtype=None if folder.name == "float32" else "bfloat16")
        assert llm.generate("The", GREEDY).usage.completion_tokens > 0


def test_a_dense_model_fits_or_does_not(tmp_path: Path) -> None:
    folder = make_source(tmp_path, moe=None)
    least, whole = span(folder)
    assert least == whole
    text = LLM.load(folder, device="cpu").generate("The", GREEDY)
    assert LLM.load(folder, memory=least).generate("The", GREEDY).choices == text.choices
    with pytest.raises(OptionError, match="too little"):
        LLM.load(folder, memory=least - 1)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"device": "cuda"}, "device"),
        ({"device": "meta"}, "device"),
        ({"dtype": "float64"}, "dtype"),
        ({"bits": 4}, "bits"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"context": 0}, "context"),
        ({"context": 257}, "257"),
    ],
)
def test_what_does_not_go_with_a_budget(options: dict[str, Any], word: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=word) as caught:
        LLM.load(folders["4"], memory="1GB", **options)
    assert caught.value.hint or word == "max_batch_size"


def test_low_bits_within_a_budget_are_counted_beside_bfloat16(home: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="dtype is float32") as caught:
        LLM.load(home / "float32", memory="1GB", bits=4)
    assert caught.value.hint == "--dtype bfloat16"
    llm = LLM.load(home / "float32", memory="1GB", bits=4, dtype="bfloat16")
    assert plan_of(llm).weights == weights_at(llm.model.args, 4)
    with pytest.raises(OptionError, match="expected one of 8, 4, 3, 2"):
        LLM.load(folders["16"], memory="1GB", bits=5)


def test_without_compiled_kernels_every_expert_stays_in_memory(folders: dict[str, Path]) -> None:
    for kind in ("16", "4"):
        least, whole = span(folders[kind])
        kernels.use("reference")
        with pytest.raises(OptionError, match="for compiled kernels") as caught:
            LLM.load(folders[kind], memory=least)
        assert (caught.value.hint or "").endswith(f"--memory {whole}")
        expected = LLM.load(folders[kind], device="cpu").generate("The", GREEDY)
        assert LLM.load(folders[kind], memory=whole).generate("The", GREEDY).choices == expected.choices
        kernels.use(None)


def test_options_of_streaming_need_a_budget(folders: dict[str, Path], tmp_path: Path) -> None:
    for options in ({"prefetch": True}, {"trace": tmp_path / "trace"}):
        with pytest.raises(OptionError, match=f"{next(iter(options))} needs memory") as caught:
            LLM.load(folders["4"], **options)  # type: ignore[arg-type]
        assert "--memory" in (caught.value.hint or "")


@pytest.mark.parametrize("prefetch", [False, True])
def test_prefetch_and_a_trace_are_passed_on(prefetch: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    least, whole = span(folders["4"])
    budget, path = (least + whole) // 2, tmp_path / "trace"
    ids = np.array([[(3, 5 if (token + layer) % 4 else token // 4 % 3) for layer in range(2)] for token in range(400)])
    RoutingTrace(np.sort(ids.astype(np.int16), axis=2)).save(path)  # mostly the same two of eight
    plain = plan_of(LLM.load(folders["4"], memory=budget))
    placement = placement_from_trace(path, plain)
    assert placement.pinned
    line = ("-m", folders["4"], "--memory", budget, "-o", f"trace={path}", "-o", f"prefetch={str(prefetch).lower()}")
    llm = LLM.load(folders["4"], memory=budget, trace=str(path), prefetch=prefetch)
    assert plan_of(llm).placement == dataclasses.replace(placement, prefetch=prefetch)
    done = llm.generate("The", GREEDY)
    assert done.choices == resident(folders["4"]).generate("The", GREEDY).choices
    said = run("generate", *line, *FLAGS, "--raw", "The")
    assert said.out == done.text + "\n"
    assert f"{len(placement.pinned)} experts and " in said.err
    assert re.search(r"and \d+% of every other in memory \(\d experts' worth\)", said.err)
    LLM.load(folders["4"], memory=whole, trace=tmp_path / "absent")  # of no use where every expert is in memory
    refused(run("generate", *line, "-o", f"trace={tmp_path / 'absent'}", "Who?"), str(tmp_path / "absent"))


# ---------------------------------------- the context


def test_the_context_is_bounded_and_the_message_says_how_to_get_more(home: Path, folders: dict[str, Path]) -> None:
    long = make_tiny_folder(home / "long" / "tiny", max_seq_len=5000)
    assert LLM.load(long, memory="1GB").context == 4096
    assert LLM.load(long).context == 5000
    for options in ({"memory": "1GB"}, {}):
        llm = LLM.load(folders["4"], context=40, **options)  # type: ignore[arg-type]
        assert llm.context == 40
        done = llm.generate([5] * 30, temperature=0, max_tokens=None, logit_bias={2: -100.0})
        assert (done.usage.total_tokens, done.finish_reason) == (40, "length")
        with pytest.raises(PromptError, match="has 40 tokens; the context that was asked for or planned holds 40") as e:
            llm.generate([5] * 40)
        assert "context=N, up to 256" in (e.value.hint or "")
    with pytest.raises(PromptError, match="the model's context holds 256") as caught:
        LLM.load(folders["4"], memory="1GB").generate([5] * 256)
    assert caught.value.hint == "shorten the prompt"


@settings(max_examples=30, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=30), min_size=1, max_size=5),
    window=st.sampled_from([None, 5, 40, 64]),
    context=st.sampled_from([40, 50, 256]),
)
def test_a_whole_cache_says_the_same_and_takes_what_was_planned(
    prompts: list[list[int]], window: int | None, context: int
) -> None:
    model = tiny_model(seed=3, sliding_window=window)
    growing = said_by(Engine(model, max_batch_size=3, prefill_chunk=7, context=context), prompts)
    engine = Engine(model, max_batch_size=3, prefill_chunk=7, context=context, whole_cache=True)
    assert said_by(engine, prompts) == growing
    cache = engine._cache
    assert cache is not None
    expected = kv_cache_bytes(model.args, context, 3, 4)
    assert cache.nbytes == expected
    assert cache.k_LBHSK.nbytes + cache.v_LBHSK.nbytes == expected
    if context == model.args.max_seq_len:
        assert said_by(Engine(model, max_batch_size=3, prefill_chunk=7), prompts) == growing


def said_by(engine: Engine, prompts: list[list[int]]) -> list[Any]:
    for prompt in prompts:
        engine.add(prompt, SamplingParams(temperature=0, max_tokens=9, logprobs=2))
    found = []
    while engine.has_work:
        found += [(event.seq_id, event.token_id, event.logprobs, event.finish_reason) for event in engine.step()]
    return found


def test_a_prompt_is_read_in_chunks_that_the_plan_counts() -> None:
    assert Engine(tiny_model()).prefill_chunk == CHUNK


def test_after_a_failure_the_whole_cache_is_used_again() -> None:
    model, prompts = tiny_model(seed=3), [[5, 6, 7], [9] * 60]
    expected = said_by(Engine(model, max_batch_size=2), prompts)
    engine = Engine(model, max_batch_size=2, whole_cache=True)
    row = model.tok_embeddings.weight[77].clone()
    model.tok_embeddings.weight[77] = torch.nan
    engine.add([3] * 20 + [77], SamplingParams(max_tokens=9))

    def fail(*_: object) -> None:
        raise RuntimeError("disk on fire")

    handle = model.layers[1].register_forward_pre_hook(fail)
    (event,) = engine.step()
    assert event.finish_reason == "error"  # and holds the cache by its traceback, as a caller may for long
    handle.remove()
    model.tok_embeddings.weight[77] = row
    cache = engine._cache
    assert cache is not None
    assert [(one[0] - 1, *one[1:]) for one in said_by(engine, prompts)] == expected
    assert engine._cache is cache


# ---------------------------------------- what is counted


def test_counters_of_replies_add_up(folders: dict[str, Path]) -> None:
    llm = LLM.load(folders["4"], memory=sum(span(folders["4"])) // 2)
    first, second = (llm.generate(text, GREEDY).experts for text in ("The quick", "Wer reist"))
    assert first is not None
    assert second is not None
    assert list(first.layers) == [0, 1]
    for field in dataclasses.fields(first.total):
        values = [getattr(one, field.name) for one in first.layers.values()]
        assert getattr(first.total, field.name) == pytest.approx(sum(values))
        both = getattr(first.total, field.name) + getattr(second.total, field.name)
        assert getattr(counted(llm).total, field.name) == pytest.approx(both)
    # 2 of 8 experts a token and layer; of a prompt all that its tokens chose, once
    steps = 2 * 2 * 11
    assert steps < first.total.hits + first.total.misses <= steps + 2 * 8
    assert first.total.nbytes > 0
    assert 0 < first.hit_rate < 1
    assert resident(folders["4"]).generate("The", GREEDY).experts is None


def test_what_others_read_later_is_not_counted(folders: dict[str, Path]) -> None:
    llm = LLM.load(folders["4"], memory=span(folders["4"])[0])
    stream = llm.stream("The quick", GREEDY)
    list(stream)
    expected = stream.result.experts
    llm.generate("Wer reist", GREEDY)
    assert stream.result.experts == expected
    closed = llm.stream("The quick", GREEDY)
    next(closed)
    closed.close()
    expected = closed.result.experts
    llm.generate("Wer reist", GREEDY)
    assert closed.result.experts == expected
    assert expected is not None
    assert expected.total.hits + expected.total.misses > 0


def test_generate_as_json_tells_plan_and_counters(folders: dict[str, Path]) -> None:
    least, whole = span(folders["4"])
    said = json.loads(run("generate", "-m", folders["4"], *FLAGS, "--memory", least, "--json", "--raw", "The").out)
    assert "experts" not in said
    plan, cache = said["memory"]["plan"], said["memory"]["cache"]
    expected = plan_of(LLM.load(folders["4"], memory=least))
    assert (plan["budget"], plan["total"], plan["context"], plan["slots"]) == (least, least, 256, 2)
    assert plan["expert_share"] == expected.share
    assert plan["precision"] == expected.weights.label
    assert plan["kv_cache"] == expected.footprint.kv_cache
    assert [one["layer"] for one in cache["layers"]] == [0, 1]
    for name in ("hits", "misses", "evictions", "nbytes"):
        assert cache["total"][name] == sum(one[name] for one in cache["layers"])
    assert cache["total"]["misses"] > 0
    said = json.loads(run("generate", "-m", folders["4"], *FLAGS, "--memory", whole, "--json", "--raw", "The").out)
    assert said["memory"]["cache"] is None
    assert said["memory"]["plan"]["expert_share"] == 1
    assert "memory" not in json.loads(run("generate", "-m", folders["4"], *FLAGS, "--json", "--raw", "The").out)


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_the_command_line_says_the_same_and_tells_how(verb: str, folders: dict[str, Path]) -> None:
    least, _ = span(folders["4"])
    line = [verb, "-m", folders["4"], *FLAGS]
    plain = run(*line, stdin=b"Who are you?\n")
    done = run(*line, "--memory", least, stdin=b"Who are you?\n")
    assert (done.code, done.out) == (0, plain.out)
    (note,) = [one for one in done.err.splitlines() if one.startswith("memory ")]
    assert re.fullmatch(
        r"memory \d+ MB of \d+ MB: store, .* bits, 0% of every expert in memory \(0 experts' worth\), the rest "
        r"streamed from disk; KV cache for 256 tokens .* kB",
        note,
    )
    told = run(*line, "--memory", least, "--verbose", stdin=b"Who are you?\n")
    assert (told.code, told.out) == (0, plain.out)
    head, *rows = told.err.splitlines()[-4:]
    assert head.split() == ["experts", "hits", "misses", "hit", "rate", "read", "waited", "evicted"]
    assert [row[:9].strip() for row in rows] == ["layer 0", "layer 1", "all"]
    assert len({len(row) for row in (head, *rows)}) == 1
    hits = [int(row[9:18]) for row in rows]
    assert hits[0] + hits[1] == hits[2]
    assert "none read from the disk" in run(*line, "-v", stdin=b"Who are you?\n").err


def test_rare_options_go_to_the_model(folders: dict[str, Path]) -> None:
    least, whole = span(folders["4"])
    line = ["generate", "-m", folders["4"], "--raw", "The", "--memory"]
    done = run(*line, whole, "-o", "context=40", *FLAGS)
    assert "KV cache for 40 tokens" in done.err
    done = run(*line, whole, "-o", "prefetch=true", *FLAGS)
    assert "every expert is in memory: there is nothing for prefetch to do" in done.err
    assert "nothing for" not in run(*line, whole, "-o", "prefetch=false", *FLAGS).err
    assert run(*line, least, "-o", "prefetch=true", *FLAGS).out == run(*line[:-1], *FLAGS).out
    refused(run(*line, whole, "-o", "context=lots"), "context is 'lots'", hint="-o context=")
    refused(run(*line, whole, "-o", "context=999"), "context is 999", hint="256")
    refused(run(*line, whole, "-o", "prefetch=maybe"), "prefetch is 'maybe'", hint="-o prefetch=true")
    refused(run(*line, whole, "-o", "trace="), "trace is empty", hint="octavo routing trace")
    refused(run(*line, whole, "-o", "prefech=true"), "'prefech'", hint="did you mean prefetch?")
    refused(run(*line, whole, "-o", "temprature=1"), "'temprature'", hint="did you mean temperature?")
    refused(run(*line[:-1], "-o", "prefetch=true"), "prefetch needs memory", hint="--memory")
    refused(run(*line, "1kB"), "too little", hint=f"--memory {least} ")


# ---------------------------------------- what goes wrong


def test_a_budget_that_is_not_free_is_refused_and_the_hint_works(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least, whole = span(folders["16"])
    assert whole - least > 5_000_000
    there = min(BASE, machine.resident_memory())
    group = "sys/fs/cgroup/box/"
    free = whole - there - 2_000_000
    files = {
        "proc/meminfo": f"MemAvailable: {2**34} kB\n",
        "proc/self/cgroup": "0::/box\n",
        f"{group}memory.max": str(free + 1000),
        f"{group}memory.current": "1000",
        f"{group}memory.stat": "anon 1000\n",
    }
    root = tree(tmp_path / "root", files)
    monkeypatch.setattr("octavo.budget.room", functools.partial(machine.room, root))
    with pytest.raises(ResourceError, match=r"takes \d+ MB, and \d+ MB can be had .*box/memory.max") as caught:
        LLM.load(folders["16"], memory=whole)
    found = re.search(r"--memory (\d+MB)$", caught.value.hint or "")
    assert found
    llm = LLM.load(folders["16"], memory=found[1])
    assert whole - 4_000_000 < plan_of(llm).budget < whole


def test_memory_that_others_have_taken_ends_the_reply_alone(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM.load(folders["4"], memory=span(folders["4"])[0])
    expected = resident(folders["4"]).generate("The", GREEDY)
    full = tree(tmp_path, {"proc/meminfo": "MemAvailable: 1000 kB\n"})
    with monkeypatch.context() as patch:
        patch.setattr("octavo.engine.check_room", functools.partial(machine.check_room, root=full))
        with pytest.raises(ResourceError, match=r"0\.00 GB can be had on this machine"):
            llm.generate("The", GREEDY)
    assert llm.generate("The", GREEDY).choices == expected.choices


def test_room_is_what_is_free_and_told_at_once(tmp_path: Path) -> None:
    root = tree(tmp_path / "one", MEMINFO)
    free = 16_000_000 * 1024 - machine.SPARE
    machine.check_room(free, root=root)
    with pytest.raises(ResourceError, match="on this machine") as caught:
        machine.check_room(free + 1, root=root)
    assert "--memory" in (caught.value.hint or "")
    machine.check_room(1 << 60, root=tmp_path)  # a system that does not tell
    group = "sys/fs/cgroup/box/"
    inside = MEMINFO | {
        "proc/self/cgroup": "0::/box\n",
        f"{group}memory.max": "9000",
        f"{group}memory.current": "8000",
        f"{group}memory.stat": "active_file 500\ninactive_file 100\n",
    }
    root = tree(tmp_path / "two", inside)
    machine.check_room(1600, root)  # what its cache could give is asked for where it matters
    with pytest.raises(ResourceError, match=r"box/memory\.max"):
        machine.check_room(1601, root)


@pytest.fixture
def store(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A store of one's own, to damage."""
    folder = tmp_path / "store"
    folder.mkdir()
    for path in folders["4"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@contextlib.contextmanager
def cut_short(store: Path) -> Iterator[Path]:
    """Within, most of the weights are gone, as on a disk that fails; then all is as it was."""
    (weights,) = store.glob("*.safetensors")
    whole, status = weights.read_bytes(), weights.stat()
    os.truncate(weights, 8192)
    try:
        yield weights
    finally:
        weights.write_bytes(whole)
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_cut_short_ends_a_reply_and_not_the_model(store: Path, folders: dict[str, Path]) -> None:
    llm = LLM.load(store, memory=span(folders["4"])[0])
    expected = resident(folders["4"]).generate("The", GREEDY)
    assert llm.generate("The", GREEDY).choices == expected.choices
    with cut_short(store) as weights:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=re.escape(str(weights))):
                llm.generate("The", GREEDY)
    assert llm.generate("The", GREEDY).choices == expected.choices


def test_a_chat_survives_a_read_that_fails(store: Path, folders: dict[str, Path]) -> None:
    llm = resident(folders["4"])
    first = llm.chat(TURN, temperature=0, max_tokens=12).text
    turns = [*TURN, {"role": "assistant", "content": first}, {"role": "user", "content": "And who am I?"}]
    second = llm.chat(turns, temperature=0, max_tokens=12).text
    with terminal("chat", "-m", store, *FLAGS, "--memory", span(folders["4"])[0]) as screen:
        screen.wait_for("> ")
        screen.type("Who are you?\n")
        screen.wait_for("> ")
        with cut_short(store) as weights:
            screen.type("Where am I?\n")
            told = screen.wait_for("> ")
        assert "error: " in told
        assert str(weights) in told.replace("\r\n", "")
        assert "hint: " in told
        assert "Traceback" not in told
        screen.type("And who am I?\n")
        assert re.findall(r"\w+", second) == re.findall(r"\w+", screen.wait_for(" tokens, "))[4:-2]
        screen.wait_for("> ")
        screen.type("\x04")
        assert screen.wait() == 0


def test_in_a_pipe_a_read_that_fails_ends_it(store: Path, folders: dict[str, Path]) -> None:
    line = command("chat", "-m", store, *FLAGS, "--memory", span(folders["4"])[0])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(b"Who are you?\n")
        process.stdin.flush()
        expected = resident(folders["4"]).chat(TURN, temperature=0, max_tokens=12).text + "\n"
        assert process.stdout.read(len(expected.encode())).decode() == expected
        with cut_short(store) as weights:
            _, told = process.communicate(b"And who am I?\n", timeout=60)
    assert process.returncode == 1
    error, hint = told.decode().splitlines()[-2:]
    assert error.startswith("error: ")
    assert str(weights) in error
    assert hint.startswith("hint: ")


def test_a_plan_counts_what_the_checkpoint_holds(folders: dict[str, Path]) -> None:
    for kind in KINDS:
        checkpoint, plan = open_checkpoint(folders[kind]), plan_of(LLM.load(folders[kind], memory="1GB"))
        assert plan.weights.total == sum(checkpoint.info(name).nbytes for name in checkpoint.names())
        assert plan.footprint == footprint_of(checkpoint.args, plan.weights, 256, 1)
