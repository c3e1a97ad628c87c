"""index-changes.v1 → Redis → event-ends.v1: drop the cached answers that a change alters, then advance the positions.

The order is the promise: whoever reads a position, or is told of an end, reads answers from which every change up to it
is gone. Each slice of a tenant's answers takes the change as a new epoch, is judged, and then advances; an event is
purged when all have.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import structlog

from infra.kafka.codec import encode_ended
from infra.redis.port import AnswerSlices, CacheUnavailable, EventStates, Progress, reached_by_all
from schemas.documents import EventStatus, Stage
from schemas.documents import Outcome as EventOutcome
from schemas.events import EventEnded, IndexChange
from schemas.positions import Position
from schemas.records import Record
from streams.core.invalidation.change_log import encode_changes
from streams.core.outcomes import Finished, Outcome
from streams.evaluation import SliceEvaluators
from streams.runner import Task
from streams.topology import StepName

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Invalidate:
    """The step."""

    slices: AnswerSlices
    judges: SliceEvaluators
    states: EventStates

    name = StepName.INVALIDATE

    async def run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        """See ``Step.run``."""
        changes = [cast("IndexChange", task.message) for task in tasks]
        by_tenant: dict[str, list[IndexChange]] = defaultdict(list)
        for change in changes:
            by_tenant[change.tenant].append(change)
        for tenant, its_changes in by_tenant.items():
            told = encode_changes(its_changes)
            if told:
                self.judges.prefetch(tenant, told)
            applying = [self._apply(tenant, number, its_changes, told) for number in range(self.slices.count)]
            # None is left running when another fails: what comes next begins with all of them at rest.
            reached = []
            for applied in await asyncio.gather(*applying, return_exceptions=True):
                if isinstance(applied, BaseException):
                    raise applied
                reached.append(applied)
            await self._record(told_first(its_changes, reached_by_all(reached)))
        now_ms = time.time() * 1000
        yield [
            Finished((encode_ended(ended(change, now_ms), task.partition, task.traceparent),))
            for task, change in zip(tasks, changes, strict=True)
        ]

    async def close(self, task: Task, kind: str, reason: str) -> None:
        """See ``Step.close``: a try of this step leaves nothing that the next would not do as well."""

    def give_up(self, task: Task, reason: str) -> tuple[Record, ...]:  # noqa: ARG002 - nothing follows this step
        """See ``Step.give_up``."""
        return ()

    async def _apply(self, tenant: str, number: int, changes: Sequence[IndexChange], told: bytes) -> Mapping[int, int]:
        """Positions that the slice had reached before."""
        positions: dict[int, int] = {}
        for change in changes:
            partition, offset = Position.parse(change.position)
            positions[partition] = max(offset, positions.get(partition, offset))
        appended = await self.slices.append(tenant, number, positions, told)
        if appended.waits:
            await self.judges.catch_up(tenant, number)
        return appended.reached

    async def _record(self, changes: Sequence[IndexChange]) -> None:
        if not changes:
            return
        now_ms = time.time() * 1000
        try:
            await self.states.advance([step for change in changes for step in _progress(change, now_ms)])
        except CacheUnavailable as error:
            # A Redis without room takes changes and no records. Whoever asks for these reads the stream of ends.
            log.warning("event progress was not recorded", reason=str(error))


def told_first(changes: Sequence[IndexChange], reached: Mapping[int, int]) -> list[IndexChange]:
    """Those of a tenant's changes that tell of an end for the first time, where these positions were reached before.

    A worker that died after it had told of an event leaves it to another, which may find a newer version there, and
    tell it as superseded. It ended as it was told first; Redis may have lost that record, so nothing takes its place.
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
    """The end of the event that made this change, of which everything is applied at ``now_ms``."""
    accepted_ms = change.times.accepted_ms
    reached = [(one.stage, one.at_ms) for one in _progress(change, now_ms)]
    # Stages are timed by several machines, whose clocks may put one before acceptance.
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
    """All stages of an event, told again: earlier reports are best effort."""
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
