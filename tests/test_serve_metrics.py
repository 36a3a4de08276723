"""What a worker counts, and how Prometheus reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import needs_compiled
from octavo.errors import OptionError
from octavo.llm import LLM
from octavo.serve.metrics import Metrics
from octavo.serve.worker import Worker
from stores import make_source
from test_plan import smallest
from workers import (
    LONG,
    ROWS,
    ask,
    shipped,
    working,
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return shipped()


def scraped(worker: Worker) -> dict[tuple[str, str], float]:
    """Every sample, by name and its one label."""
    text = Metrics(worker).text().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(one.name, next(iter(one.labels.values()), "")): one.value for one in samples}


def test_counters_add_up(llm: LLM) -> None:
    with working(llm) as worker:
        assert Metrics(worker).registry is not Metrics(worker).registry  # two side by side get on
        tickets = [worker.submit(ask(llm, i, n=1 + i % 2, max_tokens=5 + i)) for i in range(10)]
        for ticket in tickets:
            list(ticket)
        cancelled = worker.submit(ask(llm))
        cancelled.cancel()
        list(cancelled)
        done = [ticket.result for ticket in (*tickets, cancelled)]
        stats, told = worker.stats(), scraped(worker)
        began = [ticket.result for ticket in (*tickets, cancelled) if ticket.result.usage.completion_tokens]
        generated = sum(one.usage.completion_tokens for one in done)
        n_first = sum(bool(choice.token_ids) for one in done for choice in one.choices)
        assert stats.generated_tokens == generated == told["octavo_generated_tokens_total", ""]
        assert stats.prompt_tokens == sum(one.usage.prompt_tokens for one in began)
        assert stats.cached_tokens == sum(one.usage.cached_tokens for one in began)
        assert sum(stats.first_token.counts) == told["octavo_time_to_first_token_seconds_count", ""] == len(began)
        assert sum(stats.inter_token.counts) == told["octavo_inter_token_seconds_bucket", "+Inf"] == generated - n_first
        seconds = sum(one.timings.time_to_first_token for one in began)
        assert stats.first_token.total == pytest.approx(seconds, abs=0.01 * len(began))
        assert told["octavo_inter_token_seconds_sum", ""] == pytest.approx(stats.inter_token.total)
        assert told["octavo_requests_accepted_total", ""] == stats.accepted == 11
        assert told["octavo_requests_finished_total", "cancelled"] == 1
        assert told["octavo_requests_finished_total", "length"] == stats.finished["length"] > 0
        assert told["octavo_requests_running", ""] == told["octavo_requests_waiting", ""] == 0
        assert told["octavo_requests_refused_total", "queue"] == 0
        assert told["octavo_prefix_cache_bytes", ""] == llm.engine.prefix_nbytes
        assert told["octavo_engine_steps_total", ""] == stats.steps > 0
        assert not any(name.startswith("octavo_expert") for name, _ in told)


def test_running_and_waiting_are_told_while_they_do(llm: LLM) -> None:
    with working(llm) as worker:
        tickets = [worker.submit(ask(llm, i, **LONG)) for i in range(ROWS + 3)]
        next(tickets[0])
        told = scraped(worker)
        assert told["octavo_requests_running", ""] == told["octavo_sequences_running", ""] == ROWS
        assert told["octavo_requests_waiting", ""] == 3
        del tickets


@needs_compiled
def test_streamed_experts_are_counted(tmp_path: Path) -> None:
    folder = make_source(tmp_path, hidden_dim=1024)
    with pytest.raises(OptionError) as caught:
        LLM.load(folder, memory=1000)
    streamed = LLM.load(folder, memory=smallest(caught.value))
    assert streamed.experts is not None
    with working(streamed) as worker:
        list(worker.submit(streamed.prepare([1, 5, 7], max_tokens=8, temperature=0)))
        told, total = scraped(worker), streamed.experts.total
        assert told["octavo_expert_cache_read_bytes_total", ""] == total.nbytes > 0
        assert told["octavo_expert_cache_misses_total", ""] == total.misses > 0
        assert told["octavo_expert_cache_hits_total", ""] == total.hits
        assert told["octavo_expert_cache_evictions_total", ""] == total.evictions
        assert told["octavo_expert_cache_wait_seconds_total", ""] == pytest.approx(total.wait_seconds)
