"""index-changes.v1 → Redis → event-ends.v1: drop the cached answers that a change alters, then advance the positions.

The order is the promise: whoever reads a position, or is told of an end, reads answers from which every change up to it
is gone. Each slice of a tenant's answers takes the change as a new epoch, is judged, and then advances; an event is
purged when all have.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import cast

from infra.kafka.codec import encode_ended
from infra.kafka.port import Record
from infra.redis.port import AnswerSlices, EventStates, Progress
from schemas.documents import EventStatus, Stage
from schemas.documents import Outcome as EventOutcome
from schemas.events import EventEnded, IndexChange
from schemas.positions import Position
from streams.core.invalidation.mentions import written
from streams.core.outcomes import Finished, Outcome
from streams.judging import Judges
from streams.runner import Task
from streams.topology import StepName


@dataclass(frozen=True, slots=True)
class Invalidate:
    """The step."""

    slices: AnswerSlices
    judges: Judges
    states: EventStates

    name = StepName.INVALIDATE

    async def run(self, tasks: Sequence[Task]) -> AsyncGenerator[Sequence[Outcome], None]:
        """See ``Step.run``."""
        changes = [cast("IndexChange", task.message) for task in tasks]
        # An event that is told twice, because a worker died after it had told it, ended as it was told first.
        first: dict[tuple[str, str], IndexChange] = {}
        for change in changes:
            first.setdefault((change.tenant, change.event_id), change)
        done = [change for change in first.values() if change.outcome is EventOutcome.DONE]
        # How the others ended is recorded before their positions are reached: nothing has to be searchable for it.
        await self._record([change for change in first.values() if change.outcome is not EventOutcome.DONE])
        by_tenant: dict[str, list[IndexChange]] = defaultdict(list)
        for change in changes:
            by_tenant[change.tenant].append(change)
        for tenant, its_changes in by_tenant.items():
            told = written(its_changes)
            if told:
                self.judges.expect(tenant, told)
            applied = [self._apply(tenant, number, its_changes, told) for number in range(self.slices.count)]
            # None is left running when another fails: what comes next begins with all of them at rest.
            for error in await asyncio.gather(*applied, return_exceptions=True):
                if error is not None:
                    raise error
        await self._record(done)
        now_ms = time.time() * 1000
        yield [
            Finished((encode_ended(ended(change, now_ms), task.partition, task.traceparent),))
            for task, change in zip(tasks, changes, strict=True)
        ]

    def give_up(self, task: Task, reason: str) -> tuple[Record, ...]:  # noqa: ARG002 - nothing follows this step
        """See ``Step.give_up``."""
        return ()

    async def _apply(self, tenant: str, number: int, changes: Sequence[IndexChange], told: bytes) -> None:
        positions: dict[int, int] = {}
        for change in changes:
            partition, offset = Position.parse(change.position)
            positions[partition] = max(offset, positions.get(partition, offset))
        if await self.slices.append(tenant, number, positions, told):
            await self.judges.catch_up(tenant, number)

    async def _record(self, changes: Sequence[IndexChange]) -> None:
        """Record how events ended. Not to be passed over: what tells of one of them again would be recorded instead."""
        if changes:
            now_ms = time.time() * 1000
            await self.states.advance([step for change in changes for step in _progress(change, now_ms)])


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
        return [Progress(change.tenant, change.event_id, last, now_ms, change.outcome, change.reason)]
    return [*steps, Progress(change.tenant, change.event_id, last, now_ms, change.outcome, change.reason)]
