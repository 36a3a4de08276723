"""What tests of serving share: the shipped model behind a worker, what it says alone, and what must hold of replies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from octavo.completion import Completion, Prepared
from octavo.llm import LLM
from octavo.serve.ticket import Ticket, Update
from octavo.serve.worker import Worker

PROMPTS = (
    "Once upon a time",
    "The little dog",
    "A rainy day",
    "Lily went to the park and",
    "My name is",
    "In the forest",
    "One day, a boy named Tom found a big red ball. He",
    "Grandma said",
    "The cat and the bird",
    "Why",
    "It was night, and",
    "Mia had a box",
)
ROWS = 8
LONG = {"max_tokens": 400, "logit_bias": {2: -100.0}}  # it does not end by itself
TIE = 1e-3  # logits this close may change places with the size of the batch


@cache
def shipped() -> LLM:
    return LLM.load("menny", device="cpu", max_batch_size=ROWS)


@cache
def reference() -> LLM:
    return LLM.load("menny", device="cpu")


@contextmanager
def working(llm: LLM, **options: int) -> Iterator[Worker]:
    """A worker that is idle when it is left, and then stopped."""
    with Worker(llm, **options) as worker:
        yield worker
        until(lambda: not worker._open)
        assert_idle(worker)


def assert_idle(worker: Worker) -> None:
    stats = worker.stats()
    assert (stats.running, stats.waiting, stats.sequences) == (0, 0, 0)
    assert sum(stats.finished.values()) == stats.accepted
    assert not any((worker._running, worker._waiting, worker._n_open, worker._open))
    assert not any((worker.llm.engine.has_work, worker.llm._requests))


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for does not come"
        time.sleep(0.002)


def ask(llm: LLM, prompt: int | str = 0, **options: object) -> Prepared:
    text = prompt if isinstance(prompt, str) else PROMPTS[prompt % len(PROMPTS)]
    return llm.prepare(text, **({"temperature": 0, "max_tokens": 16} | options))


@cache
def alone(prompt: int, max_tokens: int, n: int = 1, **options: object) -> Completion:
    """What the model says with nobody else about, in an engine of its own."""
    return reference().generate(
        PROMPTS[prompt % len(PROMPTS)], temperature=0, max_tokens=max_tokens, n=n, logprobs=2, **options
    )


def assert_same(got: Completion, expected: Completion) -> None:
    """Token for token, up to the first place where the two likeliest are as good as equal."""
    for one, other in zip(got.choices, expected.choices, strict=True):
        pairs = zip(one.token_ids, other.token_ids, strict=False)
        place = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        if place is None:
            assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
        else:
            assert other.logprobs is not None
            (_, first), (_, second) = other.logprobs[place].top
            assert first - second < TIE, f"differs at token {place}"


def assert_whole(updates: list[Update], result: Completion) -> None:
    """The updates are the result, cut into pieces."""
    for choice in result.choices:
        chunks = [update.chunk for update in updates if update.index == choice.index]
        assert "".join(chunk.text for chunk in chunks) == choice.text
        reasons = [chunk.finish_reason for chunk in chunks]
        assert reasons[-1] == choice.finish_reason
        assert reasons[:-1] == [None] * (len(chunks) - 1)
        if choice.finish_reason != "cancelled":  # then tokens that were no text yet are not told
            assert tuple(token_id for chunk in chunks for token_id in chunk.token_ids) == choice.token_ids
            if choice.logprobs is not None:
                assert tuple(one for chunk in chunks for one in chunk.logprobs or ()) == choice.logprobs
    assert [(update.chunk.usage, update.chunk.timings) for update in updates[:-1]] == [(None, None)] * len(updates[:-1])
    assert (updates[-1].chunk.usage, updates[-1].chunk.timings) == (result.usage, result.timings)


async def read(ticket: Ticket) -> list[Update]:
    return [update async for update in ticket]


def assert_same_after(worker: Worker) -> None:
    """The worker lives on."""
    ticket = worker.submit(ask(worker.llm, 5))
    list(ticket)
    assert_same(ticket.result, alone(5, 16))


@contextmanager
def watching(llm: LLM, look: Callable[[torch.Tensor], object]) -> Iterator[None]:
    """Call `look` with the token ids of every forward, before it."""

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        look(args[0])

    handle = llm.model.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
