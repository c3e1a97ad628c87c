"""What happened in the last seconds: counts, times and their percentiles, for any window up to an hour. Pure.

One row for each second, in a ring. Times go into buckets that grow by a twentieth, so a percentile is off by at most
that; the memory is the same at any load.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from query.core.audit import Verdict

LONGEST_S: Final = 3_600

_LEAST_MS: Final = 0.05
_GROWTH: Final = 1.05
_LOG_GROWTH: Final = math.log(_GROWTH)
_BUCKETS: Final = 300
"""Up to 114 s; what took longer counts as that."""


class Served(StrEnum):
    """Where an answer came from."""

    HIT = "hit"
    FILLED = "filled"
    UNCACHED = "uncached"


class Ended(StrEnum):
    """How a request ended, by who is at fault."""

    ANSWERED = "answered"
    CLIENT = "client"
    LIMITED = "limited"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"

    @classmethod
    def of(cls, status: int) -> "Ended":
        """How a response with this status ended its request."""
        match status:
            case 429:
                return cls.LIMITED
            case 503:
                return cls.UNAVAILABLE
            case _ if status >= 500:  # noqa: PLR2004 - that is what the number means
                return cls.INTERNAL
            case _ if status >= 400:  # noqa: PLR2004 - as above
                return cls.CLIENT
        return cls.ANSWERED


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds; all zero where there was nothing to time."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Window:
    """What happened in some seconds.

    Attributes:
        seconds: how many.
        ended: requests by their end.
        served: answers by where they came from.
        times: of answered requests.
        staleness: how long before its answer went out the positions in ``as_of`` were read.
        audited: hits that were looked at again, by what was found.
        audited_stale: for how long a change had been searchable that a hit lacked; of those that lacked one.
        past_objective: hits for which that was longer than the freshness objective.
    """

    seconds: int
    ended: Mapping[Ended, int]
    served: Mapping[Served, int]
    times: Times
    staleness: Times
    audited: Mapping[Verdict, int]
    audited_stale: Times
    past_objective: int

    @property
    def requests(self) -> int:
        """All requests."""
        return sum(self.ended.values())

    @property
    def error_share(self) -> float:
        """Share of requests that ended by a fault of this process."""
        return self.ended[Ended.INTERNAL] / self.requests if self.requests else 0.0

    @property
    def unavailable_share(self) -> float:
        """Share of requests that were refused because a store or a generator cannot serve."""
        return self.ended[Ended.UNAVAILABLE] / self.requests if self.requests else 0.0

    @property
    def hit_share(self) -> float | None:
        """Share of answers from the cache; None where there were none."""
        answers = sum(self.served.values())
        return self.served[Served.HIT] / answers if answers else None


class _Histogram:
    """Times of each second."""

    def __init__(self) -> None:
        self._counts = np.zeros((LONGEST_S, _BUCKETS), dtype=np.uint32)
        self._sums_ms = np.zeros(LONGEST_S)

    def clear(self, row: int) -> None:
        self._counts[row] = 0
        self._sums_ms[row] = 0.0

    def note(self, row: int, ms: float) -> None:
        bucket = math.ceil(math.log(ms / _LEAST_MS) / _LOG_GROWTH) if ms > _LEAST_MS else 0
        self._counts[row, min(bucket, _BUCKETS - 1)] += 1
        self._sums_ms[row] += ms

    def note_many(self, row: int, many_ms: Sequence[float]) -> None:
        ms = np.maximum(np.array(many_ms), _LEAST_MS)
        buckets = np.minimum(np.ceil(np.log(ms / _LEAST_MS) / _LOG_GROWTH).astype(np.int64), _BUCKETS - 1)
        self._counts[row] += np.bincount(buckets, minlength=_BUCKETS).astype(np.uint32)
        self._sums_ms[row] += float(np.sum(many_ms))

    def times(self, rows: list[int]) -> Times:
        counts = self._counts[rows].sum(axis=0, dtype=np.int64)
        total = int(counts.sum())
        if not total:
            return Times(0.0, 0.0, 0.0, 0.0)
        reached = counts.cumsum()

        def percentile(share: float) -> float:
            bucket = int(np.searchsorted(reached, math.ceil(share * total)))
            # The middle of the bucket, on the scale on which buckets are equally wide.
            return round(_LEAST_MS * _GROWTH ** (bucket - 0.5), 3) if bucket else _LEAST_MS

        mean_ms = round(float(self._sums_ms[rows].sum()) / total, 3)
        return Times(mean_ms, percentile(0.50), percentile(0.95), percentile(0.99))


class Recent:
    """Remembers an hour.

    Times of all methods are seconds of any one clock that only goes forward.
    """

    def __init__(self) -> None:
        self._seconds = np.full(LONGEST_S, -1, dtype=np.int64)
        self._ended = np.zeros((LONGEST_S, len(Ended)), dtype=np.int64)
        self._served = np.zeros((LONGEST_S, len(Served)), dtype=np.int64)
        self._times = _Histogram()
        self._staleness = _Histogram()
        self._audited = np.zeros((LONGEST_S, len(Verdict)), dtype=np.int64)
        self._audited_stale = _Histogram()
        self._past_objective = np.zeros(LONGEST_S, dtype=np.int64)

    def note_end(self, ended: Ended, took_ms: float, *, now_s: float) -> None:
        """A request ended; its time counts if it was answered."""
        row = self._row(now_s)
        self._ended[row, _ENDED[ended]] += 1
        if ended is Ended.ANSWERED:
            self._times.note(row, took_ms)

    def note_served(self, served: Served, staleness_ms: float, *, now_s: float) -> None:
        """An answer goes out."""
        row = self._row(now_s)
        self._served[row, _SERVED[served]] += 1
        self._staleness.note(row, staleness_ms)

    def note_hits(self, took_ms: Sequence[float], staleness_ms: Sequence[float], *, now_s: float) -> None:
        """As many answers from the cache as there are times, all of them answered requests."""
        row = self._row(now_s)
        self._ended[row, _ENDED[Ended.ANSWERED]] += len(took_ms)
        self._times.note_many(row, took_ms)
        self._served[row, _SERVED[Served.HIT]] += len(took_ms)
        self._staleness.note_many(row, staleness_ms)

    def note_audited(self, verdict: Verdict, stale_ms: float | None, *, past_objective: bool, now_s: float) -> None:
        """A hit was looked at again."""
        row = self._row(now_s)
        self._audited[row, _AUDITED[verdict]] += 1
        self._past_objective[row] += past_objective
        if stale_ms is not None:
            self._audited_stale.note(row, stale_ms)

    def window(self, seconds: int, *, now_s: float) -> Window:
        """The last ``seconds``, of which the present one counts as one."""
        seconds = min(seconds, LONGEST_S)
        first = int(now_s) - seconds + 1
        rows = [second % LONGEST_S for second in range(first, int(now_s) + 1)]
        rows = [row for row in rows if self._seconds[row] >= first]
        ended, served = self._ended[rows].sum(axis=0), self._served[rows].sum(axis=0)
        audited = self._audited[rows].sum(axis=0)
        return Window(
            seconds=seconds,
            ended={kind: int(ended[place]) for kind, place in _ENDED.items()},
            served={kind: int(served[place]) for kind, place in _SERVED.items()},
            times=self._times.times(rows),
            staleness=self._staleness.times(rows),
            audited={kind: int(audited[place]) for kind, place in _AUDITED.items()},
            audited_stale=self._audited_stale.times(rows),
            past_objective=int(self._past_objective[rows].sum()),
        )

    def _row(self, now_s: float) -> int:
        second = int(now_s)
        row = second % LONGEST_S
        if self._seconds[row] != second:
            self._seconds[row] = second
            self._ended[row] = 0
            self._served[row] = 0
            self._times.clear(row)
            self._staleness.clear(row)
            self._audited[row] = 0
            self._audited_stale.clear(row)
            self._past_objective[row] = 0
        return row


_ENDED: Final = {kind: place for place, kind in enumerate(Ended)}
_AUDITED: Final = {kind: place for place, kind in enumerate(Verdict)}
_SERVED: Final = {kind: place for place, kind in enumerate(Served)}
