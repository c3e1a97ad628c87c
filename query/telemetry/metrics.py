"""Metrics of a query process."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import StatusCode, Tracer
from prometheus_client import CollectorRegistry

from infra.telemetry.metrics import counter, gauge, histogram
from infra.telemetry.tracing import NO_TRACER
from query.telemetry.audit_verdicts import AuditVerdict
from query.telemetry.rolling_stats import CacheStatus, RollingStats
from schemas import telemetry


class QueryMetrics:
    """Prometheus collectors and rolling statistics of one process.

    Args:
        registry: registry of the collectors. Each metric can be registered in it once.
        tracer: starts a span for each stage.

    Attributes:
        rolling_stats: statistics of the last hour, for ``/performance-summary`` and alerts.
    """

    def __init__(self, registry: CollectorRegistry, tracer: Tracer = NO_TRACER) -> None:
        self.rolling_stats = RollingStats()
        self._tracer = tracer
        self.queries = counter(telemetry.QUERIES, registry)
        self.lost_epoch_races = counter(telemetry.FILLS_LOST_EPOCH_RACE, registry)
        self.cache_bypasses = counter(telemetry.CACHE_BYPASSES, registry)
        self.tenants_lagging = gauge(telemetry.TENANTS_LAGGING, registry)
        self.near_cache_hits = counter(telemetry.NEAR_CACHE_HITS, registry)
        self.near_cache_bytes = gauge(telemetry.NEAR_CACHE_BYTES, registry)
        self.answers_abandoned = counter(telemetry.ANSWERS_ABANDONED, registry)
        self.generation_failures = counter(telemetry.GENERATION_FAILURES, registry)
        self.circuit_breaker_open = gauge(telemetry.CIRCUIT_BREAKER_OPEN, registry)
        self.calls_rejected = counter(telemetry.CALLS_REJECTED, registry)
        self.call_retries = counter(telemetry.CALL_RETRIES, registry)
        self.retrieval_limit = gauge(telemetry.RETRIEVAL_LIMIT, registry)
        self.alerts = counter(telemetry.ALERTS, registry)
        self.refreshes = counter(telemetry.ANSWERS_REFRESHED, registry)
        self.audits_skipped = counter(telemetry.AUDITS_SKIPPED, registry)
        self._audits = counter(telemetry.AUDITS, registry)
        for verdict in AuditVerdict:
            self._audits.labels(verdict)  # an alert on violations needs the series before the first violation
        self._audited_slo_violations = counter(telemetry.AUDITED_SLO_VIOLATIONS, registry)
        self._audited_staleness = histogram(telemetry.AUDITED_STALENESS_SECONDS, registry)
        self._tokens = counter(telemetry.GENERATION_TOKENS, registry)
        self._stages = histogram(telemetry.QUERY_STAGE_SECONDS, registry)
        self._position_waits = histogram(telemetry.POSITION_WAIT_SECONDS, registry)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run a stage in a span. Only the duration of a successful stage is observed."""
        began_s = time.perf_counter()
        # No exception in the span: its message may contain the question.
        with self._tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
            try:
                yield
            except BaseException:
                span.set_status(StatusCode.ERROR)
                raise
        self._stages.labels(name).observe(time.perf_counter() - began_s)

    def count_answer(self, status: CacheStatus, staleness_ms: float) -> None:
        """Count an answer that is sent."""
        self.queries.labels(status).inc()
        self.rolling_stats.record_answer(status, staleness_ms, now_s=time.monotonic())

    def count_audit(self, verdict: AuditVerdict, staleness_ms: float | None, *, violates_slo: bool) -> None:
        """Count an audited hit."""
        self._audits.labels(verdict).inc()
        if staleness_ms is not None:
            self._audited_staleness.observe(staleness_ms / 1_000)
        if violates_slo:
            self._audited_slo_violations.inc()
        self.rolling_stats.record_audit(verdict, staleness_ms, violates_slo=violates_slo, now_s=time.monotonic())

    def count_tokens(self, *, input_tokens: int | None, output_tokens: int | None) -> None:
        """Count the token usage of an answer; None if the generator does not report it."""
        self._tokens.labels("input").inc(input_tokens or 0)
        self._tokens.labels("output").inc(output_tokens or 0)

    def observe_position_wait(self, wait_s: float, *, reached: bool) -> None:
        """Observe a wait for a position."""
        self._position_waits.labels(str(reached).lower()).observe(wait_s)
