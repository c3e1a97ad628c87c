"""Hits are counted many at a time: for each alone it would cost as much as answering."""

import asyncio
import time
from collections.abc import Mapping
from typing import Final

from prometheus_client import Histogram

from query.telemetry.metrics import QueryMetrics
from query.telemetry.rolling_stats import Ended, Served

_EVERY_S: Final = 0.05


class HitCounts:
    """Counts hits as ``QueryMetrics`` and ``Operations`` count other answers, at most ``_EVERY_S`` later.

    Args:
        metrics: of the process.
        seconds: by path, where times of requests go.
    """

    def __init__(self, metrics: QueryMetrics, seconds: Mapping[str, Histogram]) -> None:
        self._metrics = metrics
        self._seconds = seconds
        self._hits: list[tuple[str, float, float]] = []

    def note(self, path: str, took_ms: float, checked_ms: float) -> None:
        """A hit goes out."""
        if not self._hits:
            asyncio.get_running_loop().call_later(_EVERY_S, self.flush)
        self._hits.append((path, took_ms, checked_ms))

    def note_refused(self, took_s: float) -> None:
        """A question was refused before it came to the application."""
        self._metrics.not_admitted.labels("application", "full").inc()
        self._metrics.recent.note_end(Ended.UNAVAILABLE, took_s * 1_000, now_s=time.monotonic())

    def flush(self) -> None:
        """Count what waits."""
        hits, self._hits = self._hits, []
        if not hits:
            return
        now_ms = time.time() * 1_000
        for path, took_ms, _ in hits:
            self._seconds[path].observe(took_ms / 1_000)
        self._metrics.queries.labels(Served.HIT).inc(len(hits))
        self._metrics.recent.note_hits(
            [took_ms for _, took_ms, _ in hits],
            [max(0.0, now_ms - checked_ms) for _, _, checked_ms in hits],
            now_s=time.monotonic(),
        )
