"""Request statistics of the last hour: counts, durations and percentiles of any window. Pure.

A ring buffer holds one row per second. Durations are counted in exponential buckets with a growth factor of 1.05, which
bounds the relative error of a percentile to 5 % and makes memory independent of load. Counts of several processes can
be added.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from query.telemetry.audit_verdicts import AuditVerdict

MAX_WINDOW_S: Final = 3_600

_MIN_MS: Final = 0.05
_GROWTH: Final = 1.05
_LOG_GROWTH: Final = math.log(_GROWTH)
_BUCKETS: Final = 300
"""The last bucket begins at 114 s and also counts everything above."""


class CacheStatus(StrEnum):
    """How the cache was used for an answer. ``UNCACHED``: it was unavailable or bypassed."""

    HIT = "hit"
    FILLED = "filled"
    UNCACHED = "uncached"


class RequestOutcome(StrEnum):
    """Outcome of a request, by the party at fault."""

    ANSWERED = "answered"
    CLIENT = "client"
    LIMITED = "limited"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"

    @classmethod
    def of(cls, status: int) -> "RequestOutcome":
        """Outcome for an HTTP status."""
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
class DurationSummary:
    """Mean and percentiles in milliseconds; all zero if nothing was recorded."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class WindowStats:
    """Statistics of a window.

    Attributes:
        seconds: length of the window.
        outcomes: requests by outcome.
        answers: answers by cache status.
        latency: duration of answered requests.
        staleness: time from the read of an answer's positions to its response.
        audits: audited hits by verdict.
        audited_staleness: time for which a change missing from an audited hit had been searchable; hits that lack none
            are not included.
        slo_violations: audited hits that were stale beyond the freshness objective.
    """

    seconds: int
    outcomes: Mapping[RequestOutcome, int]
    answers: Mapping[CacheStatus, int]
    latency: DurationSummary
    staleness: DurationSummary
    audits: Mapping[AuditVerdict, int]
    audited_staleness: DurationSummary
    slo_violations: int

    @property
    def requests(self) -> int:
        """Number of requests."""
        return sum(self.outcomes.values())

    @property
    def error_rate(self) -> float:
        """Fraction of requests that failed with an internal error."""
        return self.outcomes[RequestOutcome.INTERNAL] / self.requests if self.requests else 0.0

    @property
    def rejection_rate(self) -> float:
        """Fraction of requests rejected with 503: overload, or a dependency that is down."""
        return self.outcomes[RequestOutcome.UNAVAILABLE] / self.requests if self.requests else 0.0

    @property
    def cache_hit_rate(self) -> float | None:
        """Fraction of answers from the cache; None without answers."""
        answers = sum(self.answers.values())
        return self.answers[CacheStatus.HIT] / answers if answers else None


@dataclass(frozen=True, slots=True)
class DurationHistogram:
    """Durations by bucket, and their sum."""

    counts: NDArray[np.int64]
    sum_ms: float

    def __add__(self, other: "DurationHistogram") -> "DurationHistogram":
        return DurationHistogram(self.counts + other.counts, self.sum_ms + other.sum_ms)

    def summary(self) -> DurationSummary:
        """Mean and percentiles."""
        total = int(self.counts.sum())
        if not total:
            return DurationSummary(0.0, 0.0, 0.0, 0.0)
        cumulative = self.counts.cumsum()

        def percentile(quantile: float) -> float:
            bucket = int(np.searchsorted(cumulative, math.ceil(quantile * total)))
            # The geometric middle of the bucket.
            return round(_MIN_MS * _GROWTH ** (bucket - 0.5), 3) if bucket else _MIN_MS

        return DurationSummary(round(self.sum_ms / total, 3), percentile(0.50), percentile(0.95), percentile(0.99))


@dataclass(frozen=True, slots=True)
class WindowCounts:
    """Counts of a window. Counts of several processes add up.

    Attributes:
        outcomes: requests, in the order of ``RequestOutcome``.
        answers: answers, in the order of ``CacheStatus``.
        audits: audited hits, in the order of ``AuditVerdict``.
        slo_violations: array of one number; this and the histograms as in ``WindowStats``.
    """

    outcomes: NDArray[np.int64]
    answers: NDArray[np.int64]
    audits: NDArray[np.int64]
    slo_violations: NDArray[np.int64]
    latency: DurationHistogram
    staleness: DurationHistogram
    audited_staleness: DurationHistogram

    def __add__(self, other: "WindowCounts") -> "WindowCounts":
        return WindowCounts(*(getattr(self, name) + getattr(other, name) for name in _FIELDS))

    def to_json(self) -> dict[str, Any]:
        """A JSON object for ``from_json`` of another process."""
        return {
            **{name: getattr(self, name).tolist() for name in _COUNTS},
            **{name: [histogram.counts.tolist(), histogram.sum_ms] for name, histogram in self._histograms()},
        }

    def _histograms(self) -> Iterator[tuple[str, DurationHistogram]]:
        return ((name, getattr(self, name)) for name in _HISTOGRAMS)

    @classmethod
    def from_json(cls, encoded: Mapping[str, Any]) -> "WindowCounts":
        """Decode the result of ``to_json``.

        Raises:
            ValueError: it was encoded by another release.
        """
        try:
            counts = {name: np.array(encoded[name], dtype=np.int64) for name in _COUNTS}
            histograms = {
                name: DurationHistogram(np.array(encoded[name][0], dtype=np.int64), float(encoded[name][1]))
                for name in _HISTOGRAMS
            }
            fields: dict[str, Any] = counts | histograms
            decoded = cls(**fields)
        except (LookupError, TypeError, OverflowError) as error:
            raise ValueError(f"not window counts: {error!r}") from error
        shapes = [getattr(decoded, name).shape for name in _COUNTS]
        shapes += [histogram.counts.shape for _, histogram in decoded._histograms()]
        expected = [(len(RequestOutcome),), (len(CacheStatus),), (len(AuditVerdict),), (1,)]
        if shapes != [*expected, *[(_BUCKETS,)] * len(_HISTOGRAMS)]:
            raise ValueError(f"not window counts of this release: {shapes}")
        return decoded

    def stats(self, seconds: int) -> WindowStats:
        """Statistics of the counts, taken over a window of ``seconds``."""
        return WindowStats(
            seconds=seconds,
            outcomes={outcome: int(self.outcomes[column]) for outcome, column in _OUTCOME_COLUMNS.items()},
            answers={status: int(self.answers[column]) for status, column in _STATUS_COLUMNS.items()},
            latency=self.latency.summary(),
            staleness=self.staleness.summary(),
            audits={verdict: int(self.audits[column]) for verdict, column in _VERDICT_COLUMNS.items()},
            audited_staleness=self.audited_staleness.summary(),
            slo_violations=int(self.slo_violations[0]),
        )


_COUNTS: Final = ("outcomes", "answers", "audits", "slo_violations")
_HISTOGRAMS: Final = ("latency", "staleness", "audited_staleness")
_FIELDS: Final = _COUNTS + _HISTOGRAMS


class _HistogramRing:
    """A histogram for each second."""

    def __init__(self) -> None:
        self._counts = np.zeros((MAX_WINDOW_S, _BUCKETS), dtype=np.uint32)
        self._sums_ms = np.zeros(MAX_WINDOW_S)

    def clear(self, row: int) -> None:
        self._counts[row] = 0
        self._sums_ms[row] = 0.0

    def record(self, row: int, ms: float) -> None:
        bucket = math.ceil(math.log(ms / _MIN_MS) / _LOG_GROWTH) if ms > _MIN_MS else 0
        self._counts[row, min(bucket, _BUCKETS - 1)] += 1
        self._sums_ms[row] += ms

    def record_many(self, row: int, durations_ms: Sequence[float]) -> None:
        ms = np.maximum(np.array(durations_ms), _MIN_MS)
        buckets = np.minimum(np.ceil(np.log(ms / _MIN_MS) / _LOG_GROWTH).astype(np.int64), _BUCKETS - 1)
        self._counts[row] += np.bincount(buckets, minlength=_BUCKETS).astype(np.uint32)
        self._sums_ms[row] += float(np.sum(durations_ms))

    def total(self, rows: list[int]) -> DurationHistogram:
        return DurationHistogram(self._counts[rows].sum(axis=0, dtype=np.int64), float(self._sums_ms[rows].sum()))


class RollingStats:
    """Counts of the last hour.

    ``now_s`` of all methods is the time of one monotonic clock, in seconds.
    """

    def __init__(self) -> None:
        self._seconds = np.full(MAX_WINDOW_S, -1, dtype=np.int64)
        self._outcomes = np.zeros((MAX_WINDOW_S, len(RequestOutcome)), dtype=np.int64)
        self._answers = np.zeros((MAX_WINDOW_S, len(CacheStatus)), dtype=np.int64)
        self._latency = _HistogramRing()
        self._staleness = _HistogramRing()
        self._audits = np.zeros((MAX_WINDOW_S, len(AuditVerdict)), dtype=np.int64)
        self._audited_staleness = _HistogramRing()
        self._slo_violations = np.zeros(MAX_WINDOW_S, dtype=np.int64)

    def record_request(self, outcome: RequestOutcome, took_ms: float, *, now_s: float) -> None:
        """Record the end of a request. Only answered requests count towards latency."""
        row = self._row(now_s)
        self._outcomes[row, _OUTCOME_COLUMNS[outcome]] += 1
        if outcome is RequestOutcome.ANSWERED:
            self._latency.record(row, took_ms)

    def record_answer(self, status: CacheStatus, staleness_ms: float, *, now_s: float) -> None:
        """Record an answer that is sent."""
        row = self._row(now_s)
        self._answers[row, _STATUS_COLUMNS[status]] += 1
        self._staleness.record(row, staleness_ms)

    def record_hits(self, took_ms: Sequence[float], staleness_ms: Sequence[float], *, now_s: float) -> None:
        """Record requests answered from the cache: one element of each sequence per request."""
        row = self._row(now_s)
        self._outcomes[row, _OUTCOME_COLUMNS[RequestOutcome.ANSWERED]] += len(took_ms)
        self._latency.record_many(row, took_ms)
        self._answers[row, _STATUS_COLUMNS[CacheStatus.HIT]] += len(took_ms)
        self._staleness.record_many(row, staleness_ms)

    def record_audit(
        self, verdict: AuditVerdict, staleness_ms: float | None, *, violates_slo: bool, now_s: float
    ) -> None:
        """Record an audited hit."""
        row = self._row(now_s)
        self._audits[row, _VERDICT_COLUMNS[verdict]] += 1
        self._slo_violations[row] += violates_slo
        if staleness_ms is not None:
            self._audited_staleness.record(row, staleness_ms)

    def window(self, seconds: int, *, now_s: float) -> WindowStats:
        """Statistics of the last ``seconds``, at most ``MAX_WINDOW_S``, including the current second."""
        seconds = min(seconds, MAX_WINDOW_S)
        return self.counts(seconds, now_s=now_s).stats(seconds)

    def counts(self, seconds: int, *, now_s: float) -> WindowCounts:
        """Counts of the last ``seconds``, to be added to those of other processes."""
        first = int(now_s) - min(seconds, MAX_WINDOW_S) + 1
        rows = [second % MAX_WINDOW_S for second in range(first, int(now_s) + 1)]
        rows = [row for row in rows if self._seconds[row] >= first]
        return WindowCounts(
            outcomes=self._outcomes[rows].sum(axis=0),
            answers=self._answers[rows].sum(axis=0),
            audits=self._audits[rows].sum(axis=0),
            slo_violations=self._slo_violations[rows].sum(keepdims=True),
            latency=self._latency.total(rows),
            staleness=self._staleness.total(rows),
            audited_staleness=self._audited_staleness.total(rows),
        )

    def _row(self, now_s: float) -> int:
        second = int(now_s)
        row = second % MAX_WINDOW_S
        if self._seconds[row] != second:
            self._seconds[row] = second
            self._outcomes[row] = 0
            self._answers[row] = 0
            self._latency.clear(row)
            self._staleness.clear(row)
            self._audits[row] = 0
            self._audited_staleness.clear(row)
            self._slo_violations[row] = 0
        return row


_OUTCOME_COLUMNS: Final = {outcome: column for column, outcome in enumerate(RequestOutcome)}
_STATUS_COLUMNS: Final = {status: column for column, status in enumerate(CacheStatus)}
_VERDICT_COLUMNS: Final = {verdict: column for column, verdict in enumerate(AuditVerdict)}
