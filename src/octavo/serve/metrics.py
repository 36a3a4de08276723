"""A worker's counters as Prometheus reads them.

Nothing is counted here: each scrape asks `Worker.stats` and writes down the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from octavo.errors import OptionError
from octavo.serve.worker import Histogram, Worker

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise OptionError("serving needs packages that are not installed", "pip install 'octavo[serve]'") from error

__all__ = ["Metrics"]


class Metrics:
    """A registry of its own about one worker, so that several live side by side.

    Attributes:
        content_type: of `text`.
        registry: for whoever has more to tell under the same address.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_WorkerCollector(worker))

    def text(self) -> bytes:
        """Return what `/metrics` answers."""
        return generate_latest(self.registry)


class _WorkerCollector(Collector):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        stats = self._worker.stats()
        yield _gauge("requests_running", "Requests that the engine works on.", stats.running)
        yield _gauge("requests_waiting", "Requests that wait for the engine.", stats.waiting)
        yield _gauge("sequences_running", "Replies that the engine works on.", stats.sequences)
        yield _counter("requests_accepted", "Requests taken.", stats.accepted)
        finished = CounterMetricFamily("octavo_requests_finished", "Requests that are over.", labels=["finish_reason"])
        for reason, number in stats.finished.items():
            finished.add_metric([reason], number)
        yield finished
        refused = CounterMetricFamily("octavo_requests_refused", "Requests turned away.", labels=["cause"])
        for cause, number in stats.refused.items():
            refused.add_metric([cause], number)
        yield refused
        yield _counter("prompt_tokens", "Tokens of prompts read to their end.", stats.prompt_tokens)
        yield _counter("cached_prompt_tokens", "Prompt tokens that were not computed again.", stats.cached_tokens)
        yield _counter("generated_tokens", "Tokens generated.", stats.generated_tokens)
        yield _counter("engine_steps", "Steps of the engine.", stats.steps)
        yield _histogram("time_to_first_token_seconds", "From a request to its first token.", stats.first_token)
        yield _histogram("inter_token_seconds", "Between two tokens of a reply.", stats.inter_token)
        yield _gauge("prefix_cache_bytes", "Keys and values kept of earlier prompts.", stats.prefix_nbytes)
        experts = stats.experts
        if experts is not None:
            yield _counter("expert_cache_hits", "Experts that were in memory when chosen.", experts.hits)
            yield _counter("expert_cache_misses", "Experts of which something had to be read.", experts.misses)
            yield _counter("expert_cache_evictions", "Experts that made room for others.", experts.evictions)
            yield _counter("expert_cache_read_bytes", "Read of experts.", experts.nbytes)
            yield _counter("expert_cache_wait_seconds", "In which computing waited for reads.", experts.wait_seconds)


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(f"octavo_{name}", documentation, value=value)


def _counter(name: str, documentation: str, value: float) -> Metric:
    return CounterMetricFamily(f"octavo_{name}", documentation, value=value)


def _histogram(name: str, documentation: str, histogram: Histogram) -> Metric:
    bounds = [*map(repr, histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, itertools.accumulate(histogram.counts), strict=True))
    return HistogramMetricFamily(f"octavo_{name}", documentation, buckets=buckets, sum_value=histogram.total)
