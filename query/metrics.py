"""What the query service counts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram

from schemas.telemetry import (
    CACHE_BYPASSES,
    FILLS_OVERTAKEN,
    HTTP_SECONDS_BUCKETS,
    POSITION_WAIT_SECONDS,
    QUERIES,
    QUERY_STAGE_SECONDS,
)


class QueryMetrics:
    """Counters and histograms of one process.

    Args:
        registry: where they are registered; once.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.queries = Counter(QUERIES, "Questions answered.", ("served",), registry=registry)
        self.overtaken = Counter(FILLS_OVERTAKEN, "Answers not stored: a change came meanwhile.", registry=registry)
        self.bypasses = Counter(CACHE_BYPASSES, "Times the cache failed and was left aside.", registry=registry)
        self._stages = Histogram(
            QUERY_STAGE_SECONDS,
            "Seconds of each stage of an answer that was not cached.",
            ("stage",),
            buckets=HTTP_SECONDS_BUCKETS,
            registry=registry,
        )
        self._waits = Histogram(
            POSITION_WAIT_SECONDS,
            "Seconds that requests waited for a position.",
            ("reached",),
            buckets=HTTP_SECONDS_BUCKETS,
            registry=registry,
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage that succeeds."""
        began_s = time.perf_counter()
        yield
        self._stages.labels(name).observe(time.perf_counter() - began_s)

    def waited(self, wait_s: float, *, reached: bool) -> None:
        """Note a wait for a position."""
        self._waits.labels(str(reached).lower()).observe(wait_s)
