"""Names of metrics and traces, in one place: dashboards, alarms and code must not drift apart."""

from typing import Final

HTTP_SECONDS: Final = "freshline_http_request_seconds"
"""Histogram; labels service, method, route, status. Its count is the number of requests."""

HTTP_SECONDS_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

EVENTS_ACCEPTED: Final = "freshline_events_accepted_total"
"""Counter; label change. Events that the stream acknowledged."""

EVENTS_REFUSED: Final = "freshline_events_refused_total"
"""Counter; label problem. Events that were not accepted, by problem type."""

ACCEPT_SECONDS: Final = "freshline_accept_seconds"
"""Histogram. From a read request to the stream's acknowledgement: content stored, version assigned, event durable."""

CONTENT_BYTES: Final = "freshline_content_bytes_total"
"""Counter. Bytes of accepted content."""

QUERIES: Final = "freshline_queries_total"
"""Counter; label served: hit, filled, or uncached (the cache was unavailable)."""

QUERY_STAGE_SECONDS: Final = "freshline_query_stage_seconds"
"""Histogram; label stage: embed, search, fetch, generate. What answers that were not cached spend their time on."""

FILLS_OVERTAKEN: Final = "freshline_fills_overtaken_total"
"""Counter. Answers served but not stored, because a change came while they were made."""

CACHE_BYPASSES: Final = "freshline_cache_bypasses_total"
"""Counter. Times the cache failed and was left aside for a moment."""

INVALIDATION_BEHIND: Final = "freshline_invalidation_behind"
"""Gauge. Tenants whose cached answers are left aside, since changes are searchable and not applied to them."""

NEAR_BYTES: Final = "freshline_near_cache_bytes"
"""Gauge. About what the copies of cached answers in this process take."""

NEAR_HITS: Final = "freshline_near_cache_hits_total"
"""Counter. Answers that came from this process itself."""

AUDITS: Final = "freshline_audits_total"
"""Counter; label verdict: same, drift, newer, violation or gone. Hits that were retrieved again to compare."""

AUDITS_SKIPPED: Final = "freshline_audits_skipped_total"
"""Counter; label reason: full, busy or failed. Hits that were drawn for that and not looked at."""

AUDITED_STALE_SECONDS: Final = "freshline_audited_stale_seconds"
"""Histogram. For how long a change had been searchable that a hit lacked, of the hits that lacked one."""

AUDITED_PAST_OBJECTIVE: Final = "freshline_audited_past_objective_total"
"""Counter. Hits for which that was longer than the freshness objective."""

GENERATION_FAILURES: Final = "freshline_generation_failures_total"
"""Counter; label reason: busy or failed. Answers that the generator did not write."""

GENERATED_TOKENS: Final = "freshline_generation_tokens_total"
"""Counter; label direction: input or output. What the generator says that streamed answers have cost."""

ANSWERS_ABANDONED: Final = "freshline_answers_abandoned_total"
"""Counter. Answers whose last reader went away while they were written; the work was ended."""

BREAKER_OPEN: Final = "freshline_breaker_open"
"""Gauge; label store: 1 while calls to it are refused, or tried one at a time."""

ADMITTED_AT_A_TIME: Final = "freshline_retrievals_admitted"
"""How many questions are retrieved at a time at most, as the adaptive limit has it now."""

CALLS_NOT_ADMITTED: Final = "freshline_calls_not_admitted_total"
"""Counter; labels store, reason: open (the breaker) or full (the bulkhead)."""

CALL_RETRIES: Final = "freshline_call_retries_total"
"""Counter; label store. Calls that were made a second time."""

ALERTS: Final = "freshline_alerts_total"
"""Counter; labels channel, severity: warning, critical, resolved, or not_sent."""

POSITION_WAIT_SECONDS: Final = "freshline_position_wait_seconds"
"""Histogram; label reached: true or false. How long requests waited for the position that they asked for."""

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

REFILLS: Final = "freshline_answers_refilled_total"
"""Counter; label result: filled, there (somebody else was quicker), busy or full (let go), failed. Answers that were
dropped and retrieved again before anybody asked."""

WEBHOOK_MESSAGES: Final = "freshline_webhook_messages_total"
"""Counter; label result: delivered, failed (a try), kept (to be tried again), or dropped (its webhook is disabled)."""

WEBHOOK_WAITING: Final = "freshline_webhook_waiting"
"""Gauge. Messages of all webhooks that wait to be sent again."""

SERVICE_NAMESPACE: Final = "freshline"
TRACER: Final = "freshline"

ACCEPT_SPAN: Final = "accept"
"""Span of an event's acceptance. Each step has one of its own name below it, the last of which is ``notify``."""
