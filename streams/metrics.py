"""What workers count and time."""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram

from schemas.documents import Outcome as EventOutcome
from schemas.events import IndexChange
from schemas.telemetry import EVENTS_ENDED, EVENTS_SECONDS, EVENTS_SECONDS_BUCKETS, RECORDS_FINISHED
from streams.core.outcomes import DeadLetter, Outcome
from streams.runner import Task
from streams.topology import StepName


class WorkerMetrics:
    """Metrics of one worker process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._records = Counter(
            RECORDS_FINISHED, "Records a step has finished.", ("step", "outcome"), registry=registry
        )
        self._events = Counter(EVENTS_ENDED, "Events that ended.", ("outcome",), registry=registry)
        self._seconds = Histogram(
            EVENTS_SECONDS,
            "Seconds from acceptance of an event to the named stage.",
            ("stage",),
            buckets=EVENTS_SECONDS_BUCKETS,
            registry=registry,
        )

    def finished(self, step: StepName, task: Task | None, outcome: Outcome) -> None:
        """Count a record that a step has finished, and with the last step its event."""
        self._records.labels(step, "dead_letter" if isinstance(outcome, DeadLetter) else "finished").inc()
        if step is StepName.INVALIDATE and task is not None and isinstance(task.message, IndexChange):
            self._ended(task.message)

    def _ended(self, change: IndexChange) -> None:
        self._events.labels(change.outcome).inc()
        times = change.times
        if change.outcome is EventOutcome.DONE and times.searchable_ms is not None:
            self._seconds.labels("searchable").observe((times.searchable_ms - times.accepted_ms) / 1000)
            self._seconds.labels("purged").observe(time.time() - times.accepted_ms / 1000)
