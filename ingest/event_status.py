"""Where an accepted event is: what was recorded of it, and what the stream tells where a record is missing."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from infra.kafka.codec import Undecodable, decode, header
from infra.kafka.port import ReadLane, StreamUnavailable
from infra.redis.port import CacheUnavailable, EventStates, Progress
from ingest.accept import AppliedPositions
from ingest.core.event_ids import made_ms
from schemas.documents import EventReference, EventStatus
from schemas.events import EventEnded
from schemas.positions import Position
from schemas.topics import EVENT_ENDS

_LIMIT_S: Final = 5.0

_OVERTAKEN: Final = 2_000
"""Every event leaves one end at least, in its own partition; so many later ones may have ended before it."""

_READS_AT_ONCE: Final = 8
"""Reads of the stream of ends by one process, one for each tenant; whoever comes meanwhile gets what is recorded."""

_CLOCKS_MS: Final = 60_000.0
"""How far apart the clocks of machines may be."""


class _Sought(NamedTuple):
    """An event whose end is looked for in the stream of ends."""

    event_id: str
    position: Position
    accepted_ms: float


@dataclass(frozen=True, slots=True)
class EventStatuses:
    """Looks up events.

    A Redis that dies forgets its last second. But every event at or before an applied position has ended, and the
    stream of ends tells how. It tells so too of an event of which Redis has lost everything, to those who still know
    its position.
    """

    states: EventStates
    applied: AppliedPositions
    read_lane: ReadLane
    _reading: set[str] = field(default_factory=set)

    async def get(self, tenant: str, event_id: str) -> EventStatus | None:
        """Where the event is; None where nothing is recorded of it.

        Raises:
            CacheUnavailable: nobody can tell now.
        """
        # Not validated: any text may stand in a path.
        event = EventReference.model_construct(event_id=event_id, position=None)
        return (await self.get_many(tenant, [event])).get(event_id)

    async def get_many(self, tenant: str, events: Sequence[EventReference]) -> dict[str, EventStatus]:
        """Event id → where the event is, without those of which nothing is known.

        Raises:
            CacheUnavailable: nobody can tell now.
        """
        statuses = dict(await self.states.get_many(tenant, list(dict.fromkeys(one.event_id for one in events))))
        sought = [*_lost(events, statuses), *await self._unrecorded(tenant, statuses)]
        if not sought or tenant in self._reading or len(self._reading) >= _READS_AT_ONCE:
            return statuses
        self._reading.add(tenant)
        try:
            ends = await self._ends(tenant, sought)
        finally:
            self._reading.discard(tenant)
        with suppress(CacheUnavailable):  # or the next one who asks reads the stream again
            for event_id, end in ends.items():
                if event_id not in statuses:
                    await self.states.begin(tenant, end)
            await self.states.advance([step for end in ends.values() for step in _progress(tenant, end)])
        return statuses | ends

    async def _unrecorded(self, tenant: str, statuses: dict[str, EventStatus]) -> list[_Sought]:
        """The events that have ended without a record of it; what is recorded by now is put into ``statuses``."""
        opened = [
            (status, Position.parse(status.position))
            for status in statuses.values()
            if status.outcome is None and status.position is not None
        ]
        if not opened:
            return []
        reached = await self.applied.positions(tenant)
        passed = [
            _Sought(status.event_id, position, status.accepted_ms)
            for status, position in opened
            if reached.get(position.partition, -1) >= position.offset
        ]
        # They may have ended, and been recorded, since they were looked up: what is recorded says more.
        statuses.update(await self.states.get_many(tenant, [one.event_id for one in passed]))
        return [one for one in passed if statuses[one.event_id].outcome is None]

    async def _ends(self, tenant: str, sought: Sequence[_Sought]) -> dict[str, EventStatus]:
        """Event id → its end, of those that the stream tells of; each partition is read once."""
        lanes: dict[int, list[_Sought]] = defaultdict(list)
        for one in sought:
            lanes[one.position.partition].append(one)
        ends: dict[str, EventStatus] = {}
        with suppress(StreamUnavailable, TimeoutError):
            async with asyncio.timeout(_LIMIT_S):
                for partition, some in lanes.items():
                    await self._read_ends(tenant, partition, {one.event_id: one for one in some}, ends)
        return ends

    async def _read_ends(
        self, tenant: str, partition: int, sought: Mapping[str, _Sought], ends: dict[str, EventStatus]
    ) -> None:
        """Put into ``ends`` how the events of a partition ended: as it was told first."""
        first = max(0, min(one.position.offset for one in sought.values()) - _OVERTAKEN)
        since_ms = min(one.accepted_ms for one in sought.values()) - _CLOCKS_MS
        left = set(sought)
        async with aclosing(self.read_lane(EVENT_ENDS, partition, offset=first, since_ms=since_ms)) as records:
            async for record in records:
                if header(record.headers, "ce_id") not in left:
                    continue
                with suppress(Undecodable):
                    end = decode(EventEnded, record.value, record.headers)
                    if end.tenant == tenant and end.event_id in left:
                        ends[end.event_id] = end.status
                        left.remove(end.event_id)
                if not left:
                    return


def _lost(events: Sequence[EventReference], statuses: Mapping[str, EventStatus]) -> list[_Sought]:
    """The events without a recorded state of which the position is known."""
    return [
        _Sought(one.event_id, Position.parse(one.position), accepted_ms)
        for one in events
        if one.event_id not in statuses and one.position is not None and (accepted_ms := made_ms(one.event_id))
    ]


def _progress(tenant: str, ended: EventStatus) -> list[Progress]:
    at_ms = {stage: ended.accepted_ms + after_ms for stage, after_ms in ended.stages_ms.items()}
    reached = [Progress(tenant, ended.event_id, stage, at_ms[stage]) for stage in at_ms if stage is not ended.stage]
    last = Progress(
        tenant, ended.event_id, ended.stage, at_ms[ended.stage], ended.outcome, ended.reason, ended.passages
    )
    return [*reached, last]
