"""Counts what came of a load: times, refusals, hits, and answers that knew less than they should have."""

import bisect
import time
from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import orjson

from freshline.loadtest.lines import Exchange
from schemas.positions import Position

OBJECTIVE_S: Final = 1.0
"""A change that is searchable for longer must be reflected in every answer that arrives."""

_OK: Final = 200


class Ledger:
    """Which positions answers should reflect by now.

    Args:
        objective_s: see ``OBJECTIVE_S``.
    """

    def __init__(self, objective_s: float = OBJECTIVE_S) -> None:
        self._objective_ms = objective_s * 1_000
        self._waiting: list[tuple[float, Position]] = []
        self._due: dict[int, int] = {}

    def note_searchable(self, position: Position, at_ms: float) -> None:
        """A change became searchable at this time, in epoch milliseconds."""
        bisect.insort(self._waiting, (at_ms + self._objective_ms, position))

    def lacks(self, positions: Mapping[str, int], now_ms: float) -> bool:
        """Whether an answer that arrives now lacks what has been searchable for too long.

        Args:
            positions: of its ``as_of``: partition, as text, → offset.
            now_ms: epoch milliseconds.
        """
        while self._waiting and self._waiting[0][0] < now_ms:
            _, position = self._waiting.pop(0)
            self._due[position.partition] = max(position.offset, self._due.get(position.partition, -1))
        return any(positions.get(str(partition), -1) < offset for partition, offset in self._due.items())


class Tally:
    """What came of the exchanges of one load.

    Args:
        ledger: judges answers by their positions.
    """

    def __init__(self, ledger: Ledger | None = None) -> None:
        self._ledger = ledger or Ledger()
        self._ended_s = array("d")
        self._took_ms = array("d")
        self._hits = array("b")
        self._staleness_ms = array("d")
        self.statuses: Counter[int] = Counter()
        self.refusals_ms = array("d")
        self._refused_s = array("d")
        self._past_objective_s = array("d")
        self.last_refused_s: float | None = None
        self.first_failure: str | None = None
        self.began_s = time.perf_counter()

    def note(self, exchange: Exchange) -> None:
        """Count an exchange with ``/v1/query``."""
        if not self.note_other(exchange):
            return
        answer = orjson.loads(exchange.body)
        now_ms = time.time() * 1_000
        as_of = answer["as_of"]
        self._hits.append(answer["cached"])
        self._staleness_ms.append(max(0.0, now_ms - as_of["checked_ms"]))
        if self._ledger.lacks(as_of["positions"], now_ms):
            self._past_objective_s.append(self._ended_s[-1])

    def note_other(self, exchange: Exchange) -> bool:
        """Count an exchange whose response is not looked into; whether it succeeded."""
        self.statuses[exchange.status] += 1
        if exchange.status != _OK:
            self.refusals_ms.append(exchange.took_s * 1_000)
            self.last_refused_s = exchange.began_s + exchange.took_s - self.began_s
            self._refused_s.append(self.last_refused_s)
            if self.first_failure is None:
                self.first_failure = f"{exchange.status}: {exchange.body[:300].decode('utf-8', 'replace')}"
            return False
        self._ended_s.append(exchange.began_s + exchange.took_s - self.began_s)
        self._took_ms.append(exchange.took_s * 1_000)
        return True

    @property
    def past_objective(self) -> int:
        """Answers that lacked a change for longer than they may."""
        return len(self._past_objective_s)

    @property
    def answered(self) -> int:
        """Answers that came."""
        return len(self._took_ms)

    @property
    def requests(self) -> int:
        """All exchanges."""
        return self.statuses.total()

    def figures(self, seconds: float | None = None) -> dict[str, Any]:
        """What a report says of it.

        Args:
            seconds: over which the load ran; by default until now.
        """
        seconds = time.perf_counter() - self.began_s if seconds is None else seconds
        hits, ended_s = np.array(self._hits, dtype=np.float64), np.array(self._ended_s)
        late = hits[ended_s >= seconds / 2] if hits.size else hits
        return {
            "requests": self.requests,
            "seconds": round(seconds, 1),
            "answers_per_s": round(self.answered / seconds, 1),
            "success_share": round(self.answered / self.requests, 5) if self.requests else None,
            **times(np.array(self._took_ms)),
            "hit_share": round(float(hits.mean()), 4) if hits.size else None,
            "hit_share_second_half": round(float(late.mean()), 4) if late.size else None,
            "staleness_p50_ms": _percentile(np.array(self._staleness_ms), 50),
            "staleness_p99_ms": _percentile(np.array(self._staleness_ms), 99),
            "served_past_objective": self.past_objective,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "refused_p99_ms": _percentile(np.array(self.refusals_ms), 99),
            "first_failure": self.first_failure,
        }

    def minutes(self, seconds: float) -> list[dict[str, Any]]:
        """The same for each minute of the load: a mean over all of it hides how it began."""
        ended_s, took_ms, hits = np.array(self._ended_s), np.array(self._took_ms), np.array(self._hits)
        refused_s, past_s = np.array(self._refused_s), np.array(self._past_objective_s)
        found = []
        for first_s in range(0, max(1, int(seconds)), 60):
            within = _between(ended_s, first_s)
            found.append(
                {
                    "answers": int(within.sum()),
                    "refused": int(_between(refused_s, first_s).sum()),
                    "past_objective": int(_between(past_s, first_s).sum()),
                    "hit_share": round(float(hits[within].mean()), 4) if within.any() else None,
                    **times(took_ms[within]),
                }
            )
        return found

    def per_second(self, seconds: int) -> list[int]:
        """Answers in each second of the load."""
        counts, _ = np.histogram(np.array(self._ended_s), bins=seconds, range=(0, seconds))
        return [int(count) for count in counts]

    def times_between(self, first_s: float, last_s: float) -> dict[str, float | None]:
        """Times of the answers that came in a part of the load."""
        ended_s = np.array(self._ended_s)
        return times(np.array(self._took_ms)[(ended_s >= first_s) & (ended_s < last_s)])


def times(took_ms: "np.ndarray[Any, np.dtype[np.float64]]") -> dict[str, float | None]:
    """Mean and percentiles; None where there was nothing to time."""
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
