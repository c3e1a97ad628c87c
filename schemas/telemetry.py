"""Metrics and traces, declared once for code, dashboards and alerts."""

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """Declaration of a Prometheus metric.

    Attributes:
        name: full name, with unit and ``_total`` suffix where the conventions of Prometheus ask for them.
        kind: type of the metric.
        help: help text, as served at ``/metrics``.
        labels: label names.
        buckets: upper bounds of a histogram's buckets, in the unit of the metric.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


HTTP_SECONDS: Final = "freshline_http_request_seconds"
"""Histogram; labels service, method, route, status. Its count is the number of requests."""

HTTP_SECONDS_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

EVENTS_ACCEPTED: Final = "freshline_events_accepted_total"
"""Counter; label change. Events that the stream acknowledged."""

EVENTS_REJECTED: Final = "freshline_events_rejected_total"
"""Counter; label problem. Events that were not accepted, by problem type."""

ACCEPT_SECONDS: Final = "freshline_accept_seconds"
"""Histogram. From a read request to the stream's acknowledgement: content stored, version assigned, event durable."""

CONTENT_BYTES: Final = "freshline_content_bytes_total"
"""Counter. Bytes of accepted content."""

RECORDS_FINISHED: Final = "freshline_records_finished_total"
"""Counter; labels step, outcome: finished or dead_letter. Records that a step is through with."""

EVENTS_ENDED: Final = "freshline_events_ended_total"
"""Counter; label outcome: done, superseded or dead_letter."""

EVENTS_SECONDS: Final = "freshline_event_seconds"
"""Histogram; label stage: searchable or purged. From acceptance of an event to that stage: the freshness objective."""

EVENTS_SECONDS_BUCKETS: Final = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 60.0, 600.0)

RETRIES: Final = "freshline_retries_total"
"""Counter; labels step, reason: the error's type. Tries that failed, of records and of whole batches."""

STEP_WAITING: Final = "freshline_step_waiting"
"""Gauge; label step: 1 while the step holds its partitions because a store does not take its work, else 0."""

RECORDS_WAITING: Final = "freshline_records_waiting"
"""Gauge; label step. Records in this worker's partitions that are not finished: its lag, measured now and then."""

WEBHOOK_MESSAGES: Final = "freshline_webhook_messages_total"
"""Counter; label result: delivered, failed (a try), kept (to be tried again), or dropped (its webhook is disabled)."""

WEBHOOK_WAITING: Final = "freshline_webhook_waiting"
"""Gauge. Messages of all webhooks that wait to be sent again."""

QUERIES: Final = MetricSpec(
    "freshline_queries_total",
    "counter",
    "Questions answered, by cache status: hit, filled, or uncached (cache unavailable or bypassed).",
    ("cache_status",),
)
QUERY_STAGE_SECONDS: Final = MetricSpec(
    "freshline_query_stage_seconds",
    "histogram",
    "Duration of each stage of an answer that was not cached: embed, search, fetch, generate.",
    ("stage",),
    HTTP_SECONDS_BUCKETS,
)
POSITION_WAIT_SECONDS: Final = MetricSpec(
    "freshline_position_wait_seconds",
    "histogram",
    "Time that requests waited for their min_position, by whether it was reached: true or false.",
    ("reached",),
    HTTP_SECONDS_BUCKETS,
)
FILLS_LOST_EPOCH_RACE: Final = MetricSpec(
    "freshline_fills_lost_epoch_race_total",
    "counter",
    "Answers served but not stored because a change moved the epoch during the fill.",
)
CACHE_BYPASSES: Final = MetricSpec(
    "freshline_cache_bypasses_total", "counter", "Redis failures after which the cache was bypassed for a moment."
)
TENANTS_LAGGING: Final = MetricSpec(
    "freshline_tenants_lagging", "gauge", "Tenants that bypass the cache because invalidation lags."
)
NEAR_CACHE_BYTES: Final = MetricSpec(
    "freshline_near_cache_bytes", "gauge", "Approximate size of the in-process answer cache."
)
NEAR_CACHE_HITS: Final = MetricSpec(
    "freshline_near_cache_hits_total", "counter", "Hits of the in-process answer cache outside the fast path."
)
ANSWERS_REFRESHED: Final = MetricSpec(
    "freshline_answers_refreshed_total",
    "counter",
    "Refresh-ahead of invalidated answers, by result: filled, cached (filled by another request), not_stored, "
    "busy (no spare capacity), queue_full, or failed.",
    ("result",),
)
ANSWERS_ABANDONED: Final = MetricSpec(
    "freshline_answers_abandoned_total", "counter", "Streamed answers cancelled because their last reader disconnected."
)
GENERATION_FAILURES: Final = MetricSpec(
    "freshline_generation_failures_total",
    "counter",
    "Answers without generated text, by reason: busy, failed, or limited (token budget).",
    ("reason",),
)
GENERATION_TOKENS: Final = MetricSpec(
    "freshline_generation_tokens_total",
    "counter",
    "Tokens of streamed answers, as reported by the generator, by direction: input or output.",
    ("direction",),
)
CIRCUIT_BREAKER_OPEN: Final = MetricSpec(
    "freshline_circuit_breaker_open",
    "gauge",
    "1 while the circuit breaker of a store is open or half-open.",
    ("store",),
)
CALLS_REJECTED: Final = MetricSpec(
    "freshline_calls_rejected_total",
    "counter",
    "Calls rejected before they were made, by store (or application, retrieval) and reason: at_capacity, "
    "queue_timeout, or circuit_open.",
    ("store", "reason"),
)
CALL_RETRIES: Final = MetricSpec("freshline_call_retries_total", "counter", "Retried calls, by store.", ("store",))
RETRIEVAL_LIMIT: Final = MetricSpec(
    "freshline_retrieval_concurrency_limit", "gauge", "Current value of the adaptive limit of concurrent retrievals."
)
AUDITS: Final = MetricSpec(
    "freshline_audits_total",
    "counter",
    "Cache hits retrieved again for comparison, by verdict: same, drift, newer, violation, or gone.",
    ("verdict",),
)
AUDITS_SKIPPED: Final = MetricSpec(
    "freshline_audits_skipped_total",
    "counter",
    "Sampled cache hits that were not audited, by reason: queue_full, busy (no spare capacity), or failed.",
    ("reason",),
)
AUDITED_STALENESS_SECONDS: Final = MetricSpec(
    "freshline_audited_staleness_seconds",
    "histogram",
    "Time for which the oldest change missing from an audited hit had been searchable.",
    buckets=EVENTS_SECONDS_BUCKETS,
)
AUDITED_SLO_VIOLATIONS: Final = MetricSpec(
    "freshline_audited_slo_violations_total", "counter", "Audited hits that were stale beyond the freshness objective."
)
ALERTS: Final = MetricSpec(
    "freshline_alerts_total",
    "counter",
    "Alerts by channel and severity: warning, critical, resolved, or not_sent.",
    ("channel", "severity"),
)

SERVICE_NAMESPACE: Final = "freshline"
TRACER: Final = "freshline"

ACCEPT_SPAN: Final = "accept"
"""Span of an event's acceptance. Each step has one of its own name below it, the last of which is ``notify``."""
