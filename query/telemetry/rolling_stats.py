"""What happened in the last seconds: counts, times and their percentiles, for any window up to an hour. Pure.

One row for each second, in a ring. Times go into buckets that grow by a twentieth, so a percentile is off by at most
that; the memory is the same at any load. What several processes count adds up.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from query.telemetry.audit_verdicts import Verdict

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


@dataclass(frozen=True, slots=True)
class Spread:
    """How times spread: how many are in each bucket, and what they add up to."""

    counts: NDArray[np.int64]
    sum_ms: float

    def __add__(self, other: "Spread") -> "Spread":
        return Spread(self.counts + other.counts, self.sum_ms + other.sum_ms)

    def times(self) -> Times:
        """What is told of them."""
        total = int(self.counts.sum())
        if not total:
            return Times(0.0, 0.0, 0.0, 0.0)
        reached = self.counts.cumsum()

        def percentile(share: float) -> float:
            bucket = int(np.searchsorted(reached, math.ceil(share * total)))
            # The middle of the bucket, on the scale on which buckets are equally wide.
            return round(_LEAST_MS * _GROWTH ** (bucket - 0.5), 3) if bucket else _LEAST_MS

        return Times(round(self.sum_ms / total, 3), percentile(0.50), percentile(0.95), percentile(0.99))


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of some seconds, which add up over processes.

    Attributes:
        ended: requests, in the order of ``Ended``.
        served: answers, in the order of ``Served``.
        audited: hits that were looked at again, in the order of ``Verdict``.
        past_objective: one number; this and the rest as in ``Window``.
    """

    ended: NDArray[np.int64]
    served: NDArray[np.int64]
    audited: NDArray[np.int64]
    past_objective: NDArray[np.int64]
    times: Spread
    staleness: Spread
    audited_stale: Spread

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, name) + getattr(other, name) for name in _PARTS))

    def told(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            **{name: getattr(self, name).tolist() for name in _COUNTED},
            **{name: [spread.counts.tolist(), spread.sum_ms] for name, spread in self._spreads()},
        }

    def _spreads(self) -> Iterator[tuple[str, Spread]]:
        return ((name, getattr(self, name)) for name in _TIMED)

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "Tally":
        """Read ``told`` back.

        Raises:
            ValueError: it is of another release.
        """
        try:
            counted = {name: np.array(told[name], dtype=np.int64) for name in _COUNTED}
            spreads = {name: Spread(np.array(told[name][0], dtype=np.int64), float(told[name][1])) for name in _TIMED}
            parts: dict[str, Any] = counted | spreads
            tally = cls(**parts)
        except (LookupError, TypeError, OverflowError) as error:
            raise ValueError(f"not a tally: {error!r}") from error
        lengths = [getattr(tally, name).shape for name in _COUNTED]
        lengths += [spread.counts.shape for _, spread in tally._spreads()]
        if lengths != [(len(Ended),), (len(Served),), (len(Verdict),), (1,), *[(_BUCKETS,)] * len(_TIMED)]:
            raise ValueError(f"not a tally of this release: {lengths}")
        return tally

    def window(self, seconds: int) -> Window:
        """What is told of them, which were so many seconds."""
        return Window(
            seconds=seconds,
            ended={kind: int(self.ended[place]) for kind, place in _ENDED.items()},
            served={kind: int(self.served[place]) for kind, place in _SERVED.items()},
            times=self.times.times(),
            staleness=self.staleness.times(),
            audited={kind: int(self.audited[place]) for kind, place in _AUDITED.items()},
            audited_stale=self.audited_stale.times(),
            past_objective=int(self.past_objective[0]),
        )


_COUNTED: Final = ("ended", "served", "audited", "past_objective")
_TIMED: Final = ("times", "staleness", "audited_stale")
_PARTS: Final = _COUNTED + _TIMED


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

    def spread(self, rows: list[int]) -> Spread:
        return Spread(self._counts[rows].sum(axis=0, dtype=np.int64), float(self._sums_ms[rows].sum()))


class RollingStats:
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
        return self.tally(seconds, now_s=now_s).window(seconds)

    def tally(self, seconds: int, *, now_s: float) -> Tally:
        """Likewise, to be added to what others counted."""
        first = int(now_s) - min(seconds, LONGEST_S) + 1
        rows = [second % LONGEST_S for second in range(first, int(now_s) + 1)]
        rows = [row for row in rows if self._seconds[row] >= first]
        return Tally(
            ended=self._ended[rows].sum(axis=0),
            served=self._served[rows].sum(axis=0),
            audited=self._audited[rows].sum(axis=0),
            past_objective=self._past_objective[rows].sum(keepdims=True),
            times=self._times.spread(rows),
            staleness=self._staleness.spread(rows),
            audited_stale=self._audited_stale.spread(rows),
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
