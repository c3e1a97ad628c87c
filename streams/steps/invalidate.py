"""index-changes.v1 → Redis → event-ends.v1: drop the cached answers that a change alters, then advance the positions.

The order is the guarantee: a client that reads a position, or receives the end of an event, gets no answer that a
change up to it alters. Each slice of a tenant's answers takes the change as a new epoch, is evaluated, and then
advances. An event is purged when all slices have advanced.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import structlog
from typing_extensions import override

from infra.kafka.codec import encode_ended
from infra.redis.port import AnswerSlices, CacheUnavailable, EventStates, Progress, reached_by_all
from schemas.documents import EventStatus, Stage
from schemas.documents import Outcome as EventOutcome
from schemas.events import EventEnded, IndexChange
from schemas.positions import Position
from schemas.records import Record
from streams.core.invalidation.change_log import encode_changes
from streams.core.outcomes import Finished, Outcome
from streams.runner import Step, Task
from streams.slice_evaluators import SliceEvaluators
from streams.topology import StepName

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Invalidate(Step):
    """The invalidate step."""

    slices: AnswerSlices
    evaluators: SliceEvaluators
    states: EventStates

    name = StepName.INVALIDATE

    @override
    async def run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        changes = [cast("IndexChange", task.message) for task in tasks]
        by_tenant: dict[str, list[IndexChange]] = defaultdict(list)
        for change in changes:
            by_tenant[change.tenant].append(change)
        for tenant, tenant_changes in by_tenant.items():
            encoded = encode_changes(tenant_changes)
            if encoded:
                self.evaluators.prefetch(tenant, encoded)
            pending = [self._apply(tenant, number, tenant_changes, encoded) for number in range(self.slices.count)]
            # Wait for all of them, also if one fails: the next attempt must start without running tasks.
            reached = []
            for result in await asyncio.gather(*pending, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
                reached.append(result)
            await self._record(first_reported(tenant_changes, reached_by_all(reached)))
        now_ms = time.time() * 1000
        yield [
            Finished((encode_ended(ended(change, now_ms), task.partition, task.traceparent),))
            for task, change in zip(tasks, changes, strict=True)
        ]

    @override
    async def close(self, task: Task, kind: str, reason: str) -> None:
        pass  # attempts of this step leave nothing to undo

    @override
    def give_up(self, task: Task, reason: str) -> tuple[Record, ...]:

        return ()

    async def _apply(
        self, tenant: str, number: int, changes: Sequence[IndexChange], encoded: bytes
    ) -> Mapping[int, int]:
        """Apply changes to a slice; returns the positions that it had reached before."""
        positions: dict[int, int] = {}
        for change in changes:
            partition, offset = Position.parse(change.position)
            positions[partition] = max(offset, positions.get(partition, offset))
        appended = await self.slices.append(tenant, number, positions, encoded)
        if appended.needs_evaluation:
            await self.evaluators.catch_up(tenant, number)
        return appended.positions_before

    async def _record(self, changes: Sequence[IndexChange]) -> None:
        if not changes:
            return
        now_ms = time.time() * 1000
        try:
            await self.states.advance([step for change in changes for step in _progress(change, now_ms)])
        except CacheUnavailable as error:
            # A Redis without memory accepts changes but no event states. Clients read them from the stream of ends.
            _log.warning("event_progress_not_recorded", reason=str(error))


def first_reported(changes: Sequence[IndexChange], reached: Mapping[int, int]) -> list[IndexChange]:
    """Changes of a tenant that report the end of an event for the first time, given the positions reached before.

    If a worker crashes after reporting the end of an event, another worker processes the event again. It may find a
    newer version and report the event as superseded. The first report is valid; Redis may have lost it, so the second
    one must not replace it.
    """
    first: dict[str, IndexChange] = {}
    for change in changes:
        first.setdefault(change.event_id, change)
    positions = {event_id: Position.parse(change.position) for event_id, change in first.items()}
    return [
        change
        for event_id, change in first.items()
        if positions[event_id].offset > reached.get(positions[event_id].partition, -1)
    ]


def ended(change: IndexChange, now_ms: float) -> EventEnded:
    """The end of the event of a change that is completely applied at ``now_ms``."""
    accepted_ms = change.times.accepted_ms
    reached = [(one.stage, one.at_ms) for one in _progress(change, now_ms)]
    # Stages are timed by several machines, whose clocks can put a stage before acceptance.
    stages_ms = {Stage.ACCEPTED: 0.0} | {stage: max(0.0, at_ms - accepted_ms) for stage, at_ms in reached}
    return EventEnded(
        tenant=change.tenant,
        status=EventStatus(
            event_id=change.event_id,
            document_id=change.document_id,
            version=change.version,
            position=change.position,
            stage=max(stages_ms, key=list(Stage).index),
            outcome=change.outcome,
            reason=change.reason,
            passages=change.passages,
            accepted_ms=accepted_ms,
            stages_ms=stages_ms,
        ),
    )


def _progress(change: IndexChange, now_ms: float) -> list[Progress]:
    """All stages of an event, recorded again because earlier reports are best effort."""
    times = change.times
    reached = {
        Stage.CHUNKED: times.chunked_ms,
        Stage.EMBEDDED: times.embedded_ms,
        Stage.SEARCHABLE: times.searchable_ms,
    }
    steps = [
        Progress(change.tenant, change.event_id, stage, at_ms) for stage, at_ms in reached.items() if at_ms is not None
    ]
    last = Stage.PURGED if change.outcome is EventOutcome.DONE else Stage.CHUNKED
    if last is Stage.CHUNKED:
        steps = []
    return [
        *steps,
        Progress(change.tenant, change.event_id, last, now_ms, change.outcome, change.reason, change.passages),
    ]
