"""Metrics and traces, declared once for code, dashboards and alerts."""

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """Declaration of a Prometheus metric.

    Attributes:
        name: full name, with unit and ``_total`` suffix where the conventions of Prometheus ask for them.
        process: kind of process that exports it.
        kind: type of the metric.
        help: help text, as served at ``/metrics``.
        labels: label names.
        buckets: upper bounds of a histogram's buckets, in the unit of the metric.
    """

    name: str
    process: Literal["service", "ingest", "worker", "query"]
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


HTTP_SECONDS_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
EVENT_SECONDS_BUCKETS: Final = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 60.0, 600.0)

HTTP_SECONDS: Final = MetricSpec(
    "freshline_http_request_seconds",
    "service",
    "histogram",
    "Duration of HTTP requests; the count is the number of requests.",
    ("service", "method", "route", "status"),
    HTTP_SECONDS_BUCKETS,
)
EVENTS_ACCEPTED: Final = MetricSpec(
    "freshline_events_accepted_total",
    "ingest",
    "counter",
    "Events that the stream acknowledged, by change: upserted or deleted.",
    ("change",),
)
EVENTS_REJECTED: Final = MetricSpec(
    "freshline_events_rejected_total",
    "ingest",
    "counter",
    "Events that were not accepted, by problem type.",
    ("problem",),
)
ACCEPT_SECONDS: Final = MetricSpec(
    "freshline_accept_seconds",
    "ingest",
    "histogram",
    "Time from the end of a request body to the acknowledgement by the stream.",
    buckets=HTTP_SECONDS_BUCKETS,
)
CONTENT_BYTES: Final = MetricSpec("freshline_content_bytes_total", "ingest", "counter", "Bytes of accepted content.")
RECORDS_FINISHED: Final = MetricSpec(
    "freshline_records_finished_total",
    "worker",
    "counter",
    "Records that a step has processed, by outcome: finished or dead_letter.",
    ("step", "outcome"),
)
EVENTS_ENDED: Final = MetricSpec(
    "freshline_events_ended_total",
    "worker",
    "counter",
    "Events by final outcome: done, superseded, or dead_letter.",
    ("outcome",),
)
EVENT_SECONDS: Final = MetricSpec(
    "freshline_event_seconds",
    "worker",
    "histogram",
    "Time from the acceptance of an event to the stage searchable or purged.",
    ("stage",),
    EVENT_SECONDS_BUCKETS,
)
RETRIES: Final = MetricSpec(
    "freshline_retries_total",
    "worker",
    "counter",
    "Failed attempts to process a record or a batch, by type of the error.",
    ("step", "reason"),
)
STEP_WAITING: Final = MetricSpec(
    "freshline_step_waiting",
    "worker",
    "gauge",
    "1 while the step waits for a store and holds its partitions, else 0.",
    ("step",),
)
RECORDS_LAG: Final = MetricSpec(
    "freshline_records_lag",
    "worker",
    "gauge",
    "Unfinished records in the partitions of this worker, measured periodically.",
    ("step",),
)
WEBHOOK_MESSAGES: Final = MetricSpec(
    "freshline_webhook_messages_total",
    "worker",
    "counter",
    "Webhook messages, by result: delivered, failed (one attempt), kept (waiting for a retry), or dropped (the webhook "
    "is disabled).",
    ("result",),
)
WEBHOOK_WAITING: Final = MetricSpec(
    "freshline_webhook_waiting", "worker", "gauge", "Webhook messages that wait for a retry, of all webhooks."
)
QUERIES: Final = MetricSpec(
    "freshline_queries_total",
    "query",
    "counter",
    "Questions answered, by cache status: hit, filled, or uncached (cache unavailable or bypassed).",
    ("cache_status",),
)
QUERY_STAGE_SECONDS: Final = MetricSpec(
    "freshline_query_stage_seconds",
    "query",
    "histogram",
    "Duration of each stage of an answer that was not cached: embed, search, fetch, generate.",
    ("stage",),
    HTTP_SECONDS_BUCKETS,
)
POSITION_WAIT_SECONDS: Final = MetricSpec(
    "freshline_position_wait_seconds",
    "query",
    "histogram",
    "Time that requests waited for their min_position, by whether it was reached: true or false.",
    ("reached",),
    HTTP_SECONDS_BUCKETS,
)
FILLS_LOST_EPOCH_RACE: Final = MetricSpec(
    "freshline_fills_lost_epoch_race_total",
    "query",
    "counter",
    "Answers served but not stored because a change moved the epoch during the fill.",
)
CACHE_BYPASSES: Final = MetricSpec(
    "freshline_cache_bypasses_total",
    "query",
    "counter",
    "Redis failures after which the cache was bypassed for a moment.",
)
TENANTS_LAGGING: Final = MetricSpec(
    "freshline_tenants_lagging", "query", "gauge", "Tenants that bypass the cache because invalidation lags."
)
NEAR_CACHE_BYTES: Final = MetricSpec(
    "freshline_near_cache_bytes", "query", "gauge", "Approximate size of the in-process answer cache."
)
NEAR_CACHE_HITS: Final = MetricSpec(
    "freshline_near_cache_hits_total", "query", "counter", "Hits of the in-process answer cache outside the fast path."
)
ANSWERS_REFRESHED: Final = MetricSpec(
    "freshline_answers_refreshed_total",
    "query",
    "counter",
    "Refresh-ahead of invalidated answers, by result: filled, cached (filled by another request), not_stored, "
    "busy (no spare capacity), queue_full, or failed.",
    ("result",),
)
ANSWERS_ABANDONED: Final = MetricSpec(
    "freshline_answers_abandoned_total",
    "query",
    "counter",
    "Streamed answers cancelled because their last reader disconnected.",
)
GENERATION_FAILURES: Final = MetricSpec(
    "freshline_generation_failures_total",
    "query",
    "counter",
    "Answers without generated text, by reason: busy, failed, or limited (token budget).",
    ("reason",),
)
GENERATION_TOKENS: Final = MetricSpec(
    "freshline_generation_tokens_total",
    "query",
    "counter",
    "Tokens of streamed answers, as reported by the generator, by direction: input or output.",
    ("direction",),
)
CIRCUIT_BREAKER_OPEN: Final = MetricSpec(
    "freshline_circuit_breaker_open",
    "query",
    "gauge",
    "1 while the circuit breaker of a store is open or half-open.",
    ("store",),
)
CALLS_REJECTED: Final = MetricSpec(
    "freshline_calls_rejected_total",
    "query",
    "counter",
    "Calls rejected before they were made, by store (or application, retrieval) and reason: at_capacity, "
    "queue_timeout, or circuit_open.",
    ("store", "reason"),
)
CALL_RETRIES: Final = MetricSpec(
    "freshline_call_retries_total", "query", "counter", "Retried calls, by store.", ("store",)
)
RETRIEVAL_LIMIT: Final = MetricSpec(
    "freshline_retrieval_concurrency_limit",
    "query",
    "gauge",
    "Current value of the adaptive limit of concurrent retrievals.",
)
AUDITS: Final = MetricSpec(
    "freshline_audits_total",
    "query",
    "counter",
    "Cache hits retrieved again for comparison, by verdict: same, drift, newer, violation, or gone.",
    ("verdict",),
)
AUDITS_SKIPPED: Final = MetricSpec(
    "freshline_audits_skipped_total",
    "query",
    "counter",
    "Sampled cache hits that were not audited, by reason: queue_full, busy (no spare capacity), or failed.",
    ("reason",),
)
AUDITED_STALENESS_SECONDS: Final = MetricSpec(
    "freshline_audited_staleness_seconds",
    "query",
    "histogram",
    "Time for which the oldest change missing from an audited hit had been searchable.",
    buckets=EVENT_SECONDS_BUCKETS,
)
AUDITED_SLO_VIOLATIONS: Final = MetricSpec(
    "freshline_audited_slo_violations_total",
    "query",
    "counter",
    "Audited hits that were stale beyond the freshness objective.",
)
ALERTS: Final = MetricSpec(
    "freshline_alerts_total",
    "query",
    "counter",
    "Alerts by channel and severity: warning, critical, resolved, or not_sent.",
    ("channel", "severity"),
)

SERVICE_NAMESPACE: Final = "freshline"
TRACER: Final = "freshline"

ACCEPT_SPAN: Final = "accept"
"""Span of the acceptance of an event. Each step adds a child span with its name."""
