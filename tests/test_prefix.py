"""What sequences leave behind for prompts that begin alike; constraints; log-probabilities of prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import tiny_model
from octavo.cache import SavedRow
from octavo.engine import Engine, Event
from octavo.llm import LLM
from octavo.model import Mixtral
from octavo.prefix import LEAST, PrefixCache
from octavo.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)
PLENTY = 1 << 30


@pytest.fixture(scope="module", params=[None, 40], ids=["full", "window-40"])
def model(request: pytest.FixtureRequest) -> Mixtral:
    return tiny_model(seed=3, sliding_window=request.param)


def run(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams = GREEDY) -> list[list[Event]]:
    ids = [engine.add(prompt, params) for prompt in prompts]
    told: dict[int, list[Event]] = {seq_id: [] for seq_id in ids}
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            told[event.seq_id].append(event)
    return [told[seq_id] for seq_id in ids]


def tokens(events: Sequence[Event]) -> list[int | None]:
    return [event.token_id for event in events]


def random_ids(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(101), k=n)


@pytest.mark.parametrize("chunk", [7, 512])
def test_a_next_turn_reads_only_what_is_new(model: Mixtral, chunk: int) -> None:
    engine = Engine(model, prefill_chunk=chunk, prefix_bytes=PLENTY)
    first = random_ids(20, seed=1)
    (said,) = run(engine, [first])
    second = [*first, *tokens(said)[:-1], *random_ids(5, seed=2)]
    (ours,) = run(engine, [second])
    (fresh,) = run(Engine(model), [second])
    assert tokens(ours) == tokens(fresh)
    assert (said[0].cached_tokens, fresh[0].cached_tokens) == (0, 0)
    assert ours[0].cached_tokens == len(first) + len(said) - 1


def test_a_shared_beginning_is_computed_once_and_any_part_of_it_serves(model: Mixtral) -> None:
    engine, system = Engine(model, prefix_bytes=PLENTY), random_ids(25, seed=3)
    prompts = [[*system[: 25 - i], *random_ids(6, seed=10 + i)] for i in range(5)]
    found = [run(engine, [prompt])[0] for prompt in prompts]
    for i, (prompt, ours) in enumerate(zip(prompts, found, strict=True)):
        assert tokens(ours) == tokens(run(Engine(model), [prompt])[0])
        assert i == 0 or ours[0].cached_tokens >= 25 - i


def test_the_same_prompt_again_still_computes_its_last_token(model: Mixtral) -> None:
    engine, prompt = Engine(model, prefix_bytes=PLENTY), random_ids(22, seed=4)
    (first,), (again,) = run(engine, [prompt]), run(engine, [prompt])
    assert tokens(first) == tokens(again)
    assert again[0].cached_tokens == len(prompt) - 1


def test_what_a_rolling_cache_has_lost_is_not_reused() -> None:
    model = tiny_model(seed=3, sliding_window=20)
    engine, prompt = Engine(model, prefix_bytes=PLENTY), random_ids(30, seed=5)
    (first,), (again,) = run(engine, [prompt]), run(engine, [prompt])
    assert again[0].cached_tokens == 0
    assert engine.prefix_nbytes == 0
    assert tokens(first) == tokens(again)


def test_a_cancelled_sequence_leaves_what_it_had_computed(model: Mixtral) -> None:
    engine, prompt = Engine(model, prefix_bytes=PLENTY), random_ids(24, seed=6)
    seq_id = engine.add(prompt, GREEDY)
    engine.step()
    engine.cancel(seq_id)
    assert not engine.has_work
    (again,) = run(engine, [prompt])
    assert again[0].cached_tokens == len(prompt) - 1
    assert tokens(again) == tokens(run(Engine(model), [prompt])[0])


def test_nothing_is_kept_without_a_budget(model: Mixtral) -> None:
    engine, prompt = Engine(model), random_ids(24, seed=7)
    run(engine, [prompt])
    assert run(engine, [prompt])[0][0].cached_tokens == 0
    assert engine.prefix_nbytes == 0


def test_a_failed_sequence_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(seed=3)
    engine, prompt = Engine(model, prefix_bytes=PLENTY), random_ids(24, seed=8)
    with torch.no_grad():
        kept = model.norm.weight.clone()
        model.norm.weight.fill_(float("nan"))
        engine.add(prompt, GREEDY)
        (event,) = engine.step()
        assert event.finish_reason == "error"
        model.norm.weight.copy_(kept)
    assert engine.prefix_nbytes == 0
    assert run(engine, [prompt])[0][0].cached_tokens == 0


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 60), st.integers(0, 3)), max_size=30),
    st.integers(0, 200),
)
def test_the_longest_common_beginning_within_the_budget(asked: list[tuple[str, int, int]], budget: int) -> None:
    """Against every saved sequence compared one by one."""
    cache = PrefixCache(budget)
    for letter, length, tail in asked:
        ids = [ord(letter)] * length + [tail] * 3
        match, best = cache.find(ids), 0
        for entry, _ in cache._entries.values():
            shared = [i for i, (a, b) in enumerate(zip(ids, entry.tolist(), strict=False)) if a != b]
            best = max(best, shared[0] if shared else min(len(ids), len(entry)))
        best = min(best, len(ids) - 1)
        assert (0 if match is None else match.length) == (best if best >= LEAST else 0)
        data = torch.zeros(len(ids), dtype=torch.uint8)
        if cache.wants(ids, data.nbytes):
            cache.add(ids, SavedRow(data, data[:0]))
            assert cache.find([*ids, 7]) is not None
        assert cache.nbytes == sum(saved.nbytes for _, saved in cache._entries.values()) <= budget


# ---------------------------------------- constraints and prompts' log-probabilities


class EvenThenOdd:
    """Even tokens and odd ones in turn."""

    def __init__(self, vocab_size: int) -> None:
        self._ids_V, self.odd = torch.arange(vocab_size), 0

    def allowed(self) -> Tensor:
        return self._ids_V % 2 == self.odd

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == self.odd
        self.odd = 1 - self.odd


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_constraint_chooses_among_what_it_allows(model: Mixtral, temperature: float) -> None:
    engine = Engine(model)
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=9, logprobs=2)
    free = engine.add(random_ids(9, seed=1), params)
    bound = engine.add(random_ids(9, seed=1), params, constraint=EvenThenOdd(101))
    told: dict[int, list[Event]] = {free: [], bound: []}
    while engine.has_work:
        for event in engine.step():
            told[event.seq_id].append(event)
    assert [event.token_id % 2 for event in told[bound]] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert tokens(told[free]) == tokens(run(Engine(model), [random_ids(9, seed=1)], params)[0])
    assert told[bound][0].logprobs.top == told[free][0].logprobs.top  # the model's own, whatever is allowed


@pytest.mark.parametrize("chunk", [3, 512])
def test_log_probabilities_of_a_prompt_are_the_model_s(model: Mixtral, chunk: int) -> None:
    engine, prompt = Engine(model, prefill_chunk=chunk, prefix_bytes=PLENTY), random_ids(23, seed=9)
    run(engine, [prompt])  # what is saved of it must not keep its logits from being computed
    engine.add(prompt, GREEDY, prompt_logprobs=2)
    first = next(event for _ in range(99) for event in engine.step())
    expected = model(torch.tensor([prompt]))[0].log_softmax(-1)
    assert first.cached_tokens == 0
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert len(first.prompt_logprobs) == len(prompt)
    for at, (token_id, found) in enumerate(zip(prompt[1:], first.prompt_logprobs[1:], strict=True)):
        assert found.token_id == token_id
        assert found.logprob == pytest.approx(float(expected[at, token_id]), abs=1e-4)
        assert [one for _, one in found.top] == pytest.approx(expected[at].topk(2).values.tolist(), abs=1e-4)


def test_whose_tokens_a_forward_computes(model: Mixtral) -> None:
    engine, seen = Engine(model, prefill_chunk=6), []
    router = model.routers()[0]
    hook = router.register_forward_hook(lambda _, inputs, out: seen.append((engine.computing, len(inputs[0]))))
    first, second = engine.add(random_ids(9, seed=1), GREEDY), engine.add(random_ids(3, seed=2), GREEDY)
    while engine.has_work:
        engine.step()
    hook.remove()
    assert seen[0] == (((first, 6),), 6)
    assert all(sum(n for _, n in computing) == rows for computing, rows in seen)
    computed = {seq_id: sum(n for one, _ in seen for i, n in one if i == seq_id) for seq_id in (first, second)}
    assert computed == {first: 9 + 8 - 1, second: 3 + 8 - 1}


def test_a_conversation_s_next_turn_is_mostly_there() -> None:
    llm = LLM.load("menny")
    turns = [{"role": "user", "content": "What is the capital of France, and what is it known for?"}]
    first = llm.chat(turns, temperature=0, max_tokens=40)
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And of Italy?"}]
    second = llm.chat(turns, temperature=0, max_tokens=20)
    fresh = LLM.load("menny", prefix_bytes=0).chat(turns, temperature=0, max_tokens=20)
    assert second.text == fresh.text
    assert fresh.usage.cached_tokens == 0
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
