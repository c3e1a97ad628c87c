"""Statistics of a load: latency, rejections, cache hits and SLO violations."""

import bisect
import time
from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import orjson

from freshline.loadtest.connection import Exchange
from schemas.positions import Position

OBJECTIVE_S: Final = 1.0
"""Freshness objective: a response must reflect every change that has been searchable for longer."""

_OK: Final = 200


class FreshnessSlo:
    """Positions that responses must reflect by now.

    Args:
        objective_s: see ``OBJECTIVE_S``.
    """

    def __init__(self, objective_s: float = OBJECTIVE_S) -> None:
        self._objective_ms = objective_s * 1_000
        self._waiting: list[tuple[float, Position]] = []
        self._due: dict[int, int] = {}

    def note_searchable(self, position: Position, at_ms: float) -> None:
        """A change became searchable at ``at_ms``, in epoch milliseconds."""
        bisect.insort(self._waiting, (at_ms + self._objective_ms, position))

    def is_violated(self, positions: Mapping[str, int], now_ms: float) -> bool:
        """Whether a response that arrives now lacks a change that it must reflect.

        Args:
            positions: partition (as text) → offset, from its ``as_of``.
            now_ms: epoch milliseconds.
        """
        while self._waiting and self._waiting[0][0] < now_ms:
            _, position = self._waiting.pop(0)
            self._due[position.partition] = max(position.offset, self._due.get(position.partition, -1))
        return any(positions.get(str(partition), -1) < offset for partition, offset in self._due.items())


class LoadStatistics:
    """Statistics of the exchanges of a load.

    Args:
        slo: checks the positions of responses.
    """

    def __init__(self, slo: FreshnessSlo | None = None) -> None:
        self._slo = slo or FreshnessSlo()
        self._ended_s = array("d")
        self._took_ms = array("d")
        self._hits = array("b")
        self._staleness_ms = array("d")
        self.statuses: Counter[int] = Counter()
        self.rejections_ms = array("d")
        self._rejected_s = array("d")
        self._slo_violations_s = array("d")
        self.last_rejected_s: float | None = None
        self.first_failure: str | None = None
        self.began_s = time.perf_counter()

    def record(self, exchange: Exchange) -> None:
        """Record an exchange with ``/v1/query``."""
        if not self.record_unparsed(exchange):
            return
        answer = orjson.loads(exchange.body)
        now_ms = time.time() * 1_000
        as_of = answer["as_of"]
        self._hits.append(answer["cached"])
        self._staleness_ms.append(max(0.0, now_ms - as_of["checked_ms"]))
        if self._slo.is_violated(as_of["positions"], now_ms):
            self._slo_violations_s.append(self._ended_s[-1])

    def record_unparsed(self, exchange: Exchange) -> bool:
        """Record an exchange without reading the response body. Returns whether it succeeded."""
        self.statuses[exchange.status] += 1
        if exchange.status != _OK:
            self.rejections_ms.append(exchange.took_s * 1_000)
            self.last_rejected_s = exchange.began_s + exchange.took_s - self.began_s
            self._rejected_s.append(self.last_rejected_s)
            if self.first_failure is None:
                self.first_failure = f"{exchange.status}: {exchange.body[:300].decode('utf-8', 'replace')}"
            return False
        self._ended_s.append(exchange.began_s + exchange.took_s - self.began_s)
        self._took_ms.append(exchange.took_s * 1_000)
        return True

    @property
    def slo_violations(self) -> int:
        """Responses that violated the freshness SLO."""
        return len(self._slo_violations_s)

    @property
    def answered(self) -> int:
        """Successful responses."""
        return len(self._took_ms)

    @property
    def requests(self) -> int:
        """All exchanges."""
        return self.statuses.total()

    def figures(self, seconds: float | None = None) -> dict[str, Any]:
        """Figures for the report.

        Args:
            seconds: duration of the load; by default until now.
        """
        seconds = time.perf_counter() - self.began_s if seconds is None else seconds
        hits, ended_s = np.array(self._hits, dtype=np.float64), np.array(self._ended_s)
        second_half = hits[ended_s >= seconds / 2] if hits.size else hits
        return {
            "requests": self.requests,
            "seconds": round(seconds, 1),
            "answers_per_s": round(self.answered / seconds, 1),
            "success_rate": round(self.answered / self.requests, 5) if self.requests else None,
            **latency(np.array(self._took_ms)),
            "hit_rate": round(float(hits.mean()), 4) if hits.size else None,
            "hit_rate_second_half": round(float(second_half.mean()), 4) if second_half.size else None,
            "staleness_p50_ms": _percentile(np.array(self._staleness_ms), 50),
            "staleness_p99_ms": _percentile(np.array(self._staleness_ms), 99),
            "slo_violations": self.slo_violations,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "rejected_p99_ms": _percentile(np.array(self.rejections_ms), 99),
            "first_failure": self.first_failure,
        }

    def minutes(self, seconds: float) -> list[dict[str, Any]]:
        """Figures per minute, since a mean over the whole load hides its beginning."""
        ended_s, took_ms, hits = np.array(self._ended_s), np.array(self._took_ms), np.array(self._hits)
        rejected_s, slo_violations_s = np.array(self._rejected_s), np.array(self._slo_violations_s)
        minutes = []
        for first_s in range(0, max(1, int(seconds)), 60):
            within = _between(ended_s, first_s)
            minutes.append(
                {
                    "answers": int(within.sum()),
                    "rejected": int(_between(rejected_s, first_s).sum()),
                    "slo_violations": int(_between(slo_violations_s, first_s).sum()),
                    "hit_rate": round(float(hits[within].mean()), 4) if within.any() else None,
                    **latency(took_ms[within]),
                }
            )
        return minutes

    def per_second(self, seconds: int) -> list[int]:
        """Successful responses per second of the load."""
        counts, _ = np.histogram(np.array(self._ended_s), bins=seconds, range=(0, seconds))
        return [int(count) for count in counts]

    def latency_between(self, first_s: float, last_s: float) -> dict[str, float | None]:
        """Latency of the responses in a part of the load."""
        ended_s = np.array(self._ended_s)
        return latency(np.array(self._took_ms)[(ended_s >= first_s) & (ended_s < last_s)])


def latency(took_ms: "np.ndarray[Any, np.dtype[np.float64]]") -> dict[str, float | None]:
    """Mean and percentiles of the latency; None without responses."""
    return {
        "mean_ms": round(float(took_ms.mean()), 2) if took_ms.size else None,
        "p50_ms": _percentile(took_ms, 50),
        "p95_ms": _percentile(took_ms, 95),
        "p99_ms": _percentile(took_ms, 99),
        "max_ms": round(float(took_ms.max()), 2) if took_ms.size else None,
    }


def _between(at_s: "np.ndarray[Any, np.dtype[np.float64]]", first_s: float) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    return (at_s >= first_s) & (at_s < first_s + 60)


def _percentile(values: "np.ndarray[Any, np.dtype[np.float64]]", percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 2) if values.size else None
