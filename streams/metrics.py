"""Metrics of workers."""

import time

from prometheus_client import CollectorRegistry

from infra.telemetry.metrics import counter, gauge, histogram
from schemas import telemetry
from schemas.documents import Outcome as EventOutcome
from schemas.events import IndexChange
from streams.core.outcomes import DeadLetter, Outcome
from streams.runner import Runner, Task
from streams.topology import StepName


class WorkerMetrics:
    """Metrics of one worker process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._records = counter(telemetry.RECORDS_FINISHED, registry)
        self._events = counter(telemetry.EVENTS_ENDED, registry)
        self._seconds = histogram(telemetry.EVENT_SECONDS, registry)
        self._retries = counter(telemetry.RETRIES, registry)
        self._waiting = gauge(telemetry.STEP_WAITING, registry)
        self._lag = gauge(telemetry.RECORDS_LAG, registry)
        self._messages = counter(telemetry.WEBHOOK_MESSAGES, registry)
        self._messages_waiting = gauge(telemetry.WEBHOOK_WAITING, registry)

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
