"""Where an accepted event is: what was recorded of it, and what the stream tells where a record is missing."""

import asyncio
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Final

from infra.kafka.codec import Undecodable, decode
from infra.kafka.port import ReadLane, StreamUnavailable
from infra.redis.port import CacheUnavailable, EventStates, Progress
from ingest.accept import AppliedPositions
from schemas.documents import EventStatus
from schemas.events import EventEnded
from schemas.positions import Position
from schemas.topics import EVENT_ENDS

_LIMIT_S: Final = 5.0

_OVERTAKEN: Final = 2_000
"""Every event leaves one end at least, in its own partition; so many later ones may have ended before it."""

_CLOCKS_MS: Final = 60_000.0
"""How far apart the clocks of machines may be."""


@dataclass(frozen=True, slots=True)
class EventStatuses:
    """Looks up events.

    A Redis that dies forgets its last second. But every event at or before an applied position has ended, and the
    stream of ends tells how.
    """

    states: EventStates
    applied: AppliedPositions
    read_lane: ReadLane

    async def get(self, tenant: str, event_id: str) -> EventStatus | None:
        """Where the event is; None where nothing is recorded of it.

        Raises:
            CacheUnavailable: nobody can tell now.
        """
        status = await self.states.get(tenant, event_id)
        if status is None or status.outcome is not None or status.position is None:
            return status
        position = Position.parse(status.position)
        if (await self.applied.positions(tenant)).get(position.partition, -1) < position.offset:
            return status
        # It may have ended, and been recorded, since it was looked up: what is recorded says more.
        status = await self.states.get(tenant, event_id)
        if status is None or status.outcome is not None:
            return status
        try:
            async with asyncio.timeout(_LIMIT_S):
                end = await self._end(tenant, event_id, position, status.accepted_ms)
        except (StreamUnavailable, TimeoutError):
            return status
        if end is None:  # it is told in a moment
            return status
        with suppress(CacheUnavailable):  # or the next one who asks reads the stream again
            await self.states.advance(_progress(tenant, end))
        return end

    async def _end(self, tenant: str, event_id: str, position: Position, accepted_ms: float) -> EventStatus | None:
        """As it was told first."""
        named = event_id.encode()
        first = max(0, position.offset - _OVERTAKEN)
        lane = self.read_lane(EVENT_ENDS, position.partition, offset=first, since_ms=accepted_ms - _CLOCKS_MS)
        async with aclosing(lane) as records:
            async for record in records:
                if named not in record.value:
                    continue
                with suppress(Undecodable):
                    end = decode(EventEnded, record.value, record.headers)
                    if (end.tenant, end.status.event_id) == (tenant, event_id):
                        return end.status
        return None


def _progress(tenant: str, ended: EventStatus) -> list[Progress]:
    at_ms = {stage: ended.accepted_ms + after_ms for stage, after_ms in ended.stages_ms.items()}
    reached = [Progress(tenant, ended.event_id, stage, at_ms[stage]) for stage in at_ms if stage is not ended.stage]
    last = Progress(tenant, ended.event_id, ended.stage, at_ms[ended.stage], ended.outcome, ended.reason)
    return [*reached, last]
