"""What the query service counts."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import StatusCode, Tracer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from infra.telemetry.tracing import NO_TRACER
from query.telemetry.audit_verdicts import Verdict
from query.telemetry.rolling_stats import RollingStats, Served
from schemas.telemetry import (
    ADMITTED_AT_A_TIME,
    ALERTS,
    ANSWERS_ABANDONED,
    AUDITED_PAST_OBJECTIVE,
    AUDITED_STALE_SECONDS,
    AUDITS,
    AUDITS_SKIPPED,
    BREAKER_OPEN,
    CACHE_BYPASSES,
    CALL_RETRIES,
    CALLS_NOT_ADMITTED,
    EVENTS_SECONDS_BUCKETS,
    FILLS_OVERTAKEN,
    GENERATED_TOKENS,
    GENERATION_FAILURES,
    HTTP_SECONDS_BUCKETS,
    INVALIDATION_BEHIND,
    NEAR_BYTES,
    NEAR_HITS,
    POSITION_WAIT_SECONDS,
    QUERIES,
    QUERY_STAGE_SECONDS,
    REFILLS,
)


class QueryMetrics:
    """Counters and histograms of one process.

    Attributes:
        recent: the last hour, for the process's own summary.

    Args:
        registry: where they are registered; once.
        tracer: makes a span of each stage.
    """

    def __init__(self, registry: CollectorRegistry, tracer: Tracer = NO_TRACER) -> None:
        self.recent = RollingStats()
        self._tracer = tracer
        self.queries = Counter(QUERIES, "Questions answered.", ("served",), registry=registry)
        self.overtaken = Counter(FILLS_OVERTAKEN, "Answers not stored: a change came meanwhile.", registry=registry)
        self.bypasses = Counter(CACHE_BYPASSES, "Times the cache failed and was left aside.", registry=registry)
        self.invalidation_behind = Gauge(
            INVALIDATION_BEHIND, "Tenants whose cached answers are left aside.", registry=registry
        )
        self.near_hits = Counter(NEAR_HITS, "Answers from this process itself.", registry=registry)
        self.near_bytes = Gauge(NEAR_BYTES, "About what copies of answers take.", registry=registry)
        self.abandoned = Counter(ANSWERS_ABANDONED, "Answers given up with their last reader.", registry=registry)
        self.generation_failures = Counter(
            GENERATION_FAILURES, "Answers that the generator did not write.", ("reason",), registry=registry
        )
        self.breaker_open = Gauge(BREAKER_OPEN, "1 while calls are refused.", ("store",), registry=registry)
        self.not_admitted = Counter(
            CALLS_NOT_ADMITTED, "Calls that were not made at all.", ("store", "reason"), registry=registry
        )
        self.admitted_at_a_time = Gauge(ADMITTED_AT_A_TIME, "Retrievals admitted at a time.", registry=registry)
        self.alerts = Counter(ALERTS, "Alerts sent.", ("channel", "severity"), registry=registry)
        self.retries = Counter(CALL_RETRIES, "Calls made a second time.", ("store",), registry=registry)
        self.unaudited = Counter(
            AUDITS_SKIPPED, "Hits drawn for an audit and not looked at.", ("reason",), registry=registry
        )
        self.refills = Counter(
            REFILLS, "Dropped answers retrieved again before anybody asked.", ("result",), registry=registry
        )
        self._audits = Counter(AUDITS, "Hits that were looked at again.", ("verdict",), registry=registry)
        for verdict in Verdict:
            self._audits.labels(verdict)  # an alarm on violations needs to see none of them
        self._audited_past_objective = Counter(
            AUDITED_PAST_OBJECTIVE, "Hits that lacked a change for longer than they may.", registry=registry
        )
        self._audited_stale = Histogram(
            AUDITED_STALE_SECONDS,
            "Seconds for which a change had been searchable that a hit lacked.",
            buckets=EVENTS_SECONDS_BUCKETS,
            registry=registry,
        )
        self._tokens = Counter(
            GENERATED_TOKENS,
            "Tokens of streamed answers.",
            ("direction",),
            registry=registry,
        )
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
        """Time a stage that succeeds, in a span of its name."""
        began_s = time.perf_counter()
        # Without the exception: its message may hold what was asked.
        with self._tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
            try:
                yield
            except BaseException:
                span.set_status(StatusCode.ERROR)
                raise
        self._stages.labels(name).observe(time.perf_counter() - began_s)

    def served(self, served: Served, staleness_ms: float) -> None:
        """Count an answer that goes out."""
        self.queries.labels(served).inc()
        self.recent.note_served(served, staleness_ms, now_s=time.monotonic())

    def audited(self, verdict: Verdict, stale_ms: float | None, *, past_objective: bool) -> None:
        """Count a hit that was looked at again."""
        self._audits.labels(verdict).inc()
        if stale_ms is not None:
            self._audited_stale.observe(stale_ms / 1_000)
        if past_objective:
            self._audited_past_objective.inc()
        self.recent.note_audited(verdict, stale_ms, past_objective=past_objective, now_s=time.monotonic())

    def generated(self, *, input_tokens: int | None, output_tokens: int | None) -> None:
        """Count what an answer has cost, where that is known."""
        self._tokens.labels("input").inc(input_tokens or 0)
        self._tokens.labels("output").inc(output_tokens or 0)

    def waited(self, wait_s: float, *, reached: bool) -> None:
        """Note a wait for a position."""
        self._waits.labels(str(reached).lower()).observe(wait_s)
