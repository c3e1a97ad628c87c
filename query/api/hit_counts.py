"""Batched metrics of fast-path hits: updating collectors per hit would cost as much as the response."""

import asyncio
import time
from collections.abc import Mapping
from typing import Final, NamedTuple

from prometheus_client import Histogram

from query.telemetry.metrics import QueryMetrics
from query.telemetry.rolling_stats import CacheStatus, RequestOutcome

_FLUSH_INTERVAL_S: Final = 0.05


class _Hit(NamedTuple):
    path: str
    took_ms: float
    checked_ms: float


class HitCounts:
    """Counts fast-path hits as the application counts other answers, with a delay of at most ``_FLUSH_INTERVAL_S``.

    Args:
        metrics: metrics of the process.
        seconds: latency histogram by path.
    """

    def __init__(self, metrics: QueryMetrics, seconds: Mapping[str, Histogram]) -> None:
        self._metrics = metrics
        self._seconds = seconds
        self._hits: list[_Hit] = []

    def record(self, path: str, took_ms: float, checked_ms: float) -> None:
        """Record a hit that is sent; ``checked_ms`` as in ``NearHit``."""
        if not self._hits:
            asyncio.get_running_loop().call_later(_FLUSH_INTERVAL_S, self.flush)
        self._hits.append(_Hit(path, took_ms, checked_ms))

    def record_rejected(self, took_s: float) -> None:
        """Record a question that was rejected without the application."""
        self._metrics.calls_rejected.labels("application", "at_capacity").inc()
        self._metrics.rolling_stats.record_request(RequestOutcome.UNAVAILABLE, took_s * 1_000, now_s=time.monotonic())

    def flush(self) -> None:
        """Count the recorded hits."""
        hits, self._hits = self._hits, []
        if not hits:
            return
        now_ms = time.time() * 1_000
        for hit in hits:
            self._seconds[hit.path].observe(hit.took_ms / 1_000)
        self._metrics.queries.labels(CacheStatus.HIT).inc(len(hits))
        self._metrics.rolling_stats.record_hits(
            [hit.took_ms for hit in hits],
            [max(0.0, now_ms - hit.checked_ms) for hit in hits],
            now_s=time.monotonic(),
        )
