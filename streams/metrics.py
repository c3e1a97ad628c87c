"""Metrics of workers."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from schemas.documents import Outcome as EventOutcome
from schemas.events import IndexChange
from schemas.telemetry import (
    EVENTS_ENDED,
    EVENTS_SECONDS,
    EVENTS_SECONDS_BUCKETS,
    RECORDS_FINISHED,
    RECORDS_WAITING,
    RETRIES,
    STEP_WAITING,
    WEBHOOK_MESSAGES,
    WEBHOOK_WAITING,
)
from streams.core.outcomes import DeadLetter, Outcome
from streams.runner import Runner, Task
from streams.topology import StepName


class WorkerMetrics:
    """Metrics of one worker process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._records = Counter(
            RECORDS_FINISHED, "Records a step has finished.", ("step", "outcome"), registry=registry
        )
        self._events = Counter(EVENTS_ENDED, "Finished events.", ("outcome",), registry=registry)
        self._seconds = Histogram(
            EVENTS_SECONDS,
            "Seconds from acceptance of an event to the named stage.",
            ("stage",),
            buckets=EVENTS_SECONDS_BUCKETS,
            registry=registry,
        )

        self._retries = Counter(RETRIES, "Failed attempts.", ("step", "reason"), registry=registry)
        self._waiting = Gauge(STEP_WAITING, "1 while a step waits for a store, else 0.", ("step",), registry=registry)
        self._lag = Gauge(
            RECORDS_WAITING, "Records in this worker's partitions that are not finished.", ("step",), registry=registry
        )

        self._messages = Counter(WEBHOOK_MESSAGES, "Webhook messages.", ("result",), registry=registry)
        self._messages_waiting = Gauge(WEBHOOK_WAITING, "Webhook messages that wait for a retry.", registry=registry)

    def count_webhook_messages(self, result: str, count: int) -> None:
        """Count webhook messages by result."""
        self._messages.labels(result).inc(count)

    def set_webhooks_waiting(self, messages: int) -> None:
        """Set the number of waiting webhook messages."""
        self._messages_waiting.set(messages)

    def watch(self, step: StepName, runner: Runner) -> None:
        """Export whether the step waits for a store."""
        self._waiting.labels(step).set_function(lambda: float(runner.waiting_for is not None))

    def count_retry(self, step: StepName, error: Exception) -> None:
        """Count a failed attempt."""
        self._retries.labels(step, type(error).__name__).inc()

    def set_lag(self, step: StepName, records: int) -> None:
        """Set the lag of a step, in records."""
        self._lag.labels(step).set(records)

    def count_finished(self, step: StepName, task: Task | None, outcome: Outcome) -> None:
        """Count a finished record, and its event after the last step."""
        self._records.labels(step, "dead_letter" if isinstance(outcome, DeadLetter) else "finished").inc()
        if step is StepName.INVALIDATE and task is not None and isinstance(task.message, IndexChange):
            self._count_event(task.message)

    def _count_event(self, change: IndexChange) -> None:
        self._events.labels(change.outcome).inc()
        times = change.times
        if change.outcome is EventOutcome.DONE and times.searchable_ms is not None:
            self._seconds.labels("searchable").observe((times.searchable_ms - times.accepted_ms) / 1000)
            self._seconds.labels("purged").observe(time.time() - times.accepted_ms / 1000)
