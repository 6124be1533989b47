"""Prometheus metrics of one server. Nothing here is global: two servers do not share counters."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine import Engine, Generation, Timings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """What the server counts itself, and what the engine counts, read when asked for."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.requests = Counter(
            "gptoss_requests",
            "HTTP requests answered, by route and status; 499: the client left.",
            ["route", "status"],
            registry=self._registry,
        )
        self._cancelled = Counter(
            "gptoss_generations_cancelled",
            "Generations ended before the model was done: a client left, or a stop string came.",
            registry=self._registry,
        )
        self._first_token = Histogram(
            "gptoss_time_to_first_token_seconds",
            "From the moment a generation was queued to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._per_token = Histogram(
            "gptoss_time_per_token_seconds",
            "Mean time between the tokens of one generation, without the first.",
            buckets=(0.001, 0.0025, *_SECONDS),
            registry=self._registry,
        )

    def first_token(self, generation: Generation) -> None:
        """The first token of a generation was taken."""
        if generation.first_token_at is not None:
            self._first_token.observe(max(generation.first_token_at - generation.queued_at, 0))

    def finished(self, timings: Timings | None) -> None:
        """A generation ended by itself."""
        if timings is not None and timings.decode_tokens > 0:
            self._per_token.observe(timings.decode_seconds / timings.decode_tokens)

    def cancelled(self) -> None:
        """A generation was ended from outside."""
        self._cancelled.inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's own numbers at the moment of the scrape."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, text, value in (
            ("running", "Generations that take part in steps.", stats.running),
            ("waiting", "Generations in the queue.", stats.waiting),
        ):
            yield GaugeMetricFamily(f"gptoss_{name}", text, value=value)
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens read, reused ones too.", stats.prompt_tokens),
            ("generated_tokens", "Tokens generated.", stats.generated_tokens),
            (
                "prefix_tokens_reused",
                "Prompt tokens that the prefix cache had.",
                stats.prefix_tokens_reused,
            ),
            ("preemptions", "Generations that yielded their cache pages.", stats.preemptions),
        ):
            yield CounterMetricFamily(f"gptoss_{name}", text, value=value)
        pages = GaugeMetricFamily("gptoss_cache_pages", "Cache pages there are.", labels=["layers"])
        in_use = GaugeMetricFamily(
            "gptoss_cache_pages_in_use", "Cache pages that generations hold.", labels=["layers"]
        )
        core = self._engine.core
        cache = core.cache_stats()
        for layers, n_pages in (("full", core.full_pages), ("window", core.window_pages)):
            pages.add_metric([layers], n_pages)
            in_use.add_metric([layers], cache[f"{layers}_in_use"])
        yield pages
        yield in_use
        yield GaugeMetricFamily(
            "gptoss_cached_pages", "Cache pages the prefix cache knows.", cache["cached_pages"]
        )
