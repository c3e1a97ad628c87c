"""Event status: from the recorded states in Redis, else from the stream of ended events."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from infra.kafka.codec import Undecodable, decode, header
from infra.kafka.port import ReadPartition, StreamUnavailable
from infra.redis.port import CacheUnavailable, EventStates, Progress
from ingest.accept import AppliedPositions
from ingest.core.event_ids import made_ms
from schemas.documents import EventReference, EventStatus
from schemas.events import EventEnded
from schemas.positions import Position
from schemas.topics import EVENT_ENDS

_TIMEOUT_S: Final = 5.0

_MAX_REORDERED: Final = 2_000
"""How many later events of a partition may have ended before an event. Each event has at least one end record."""

_READS_AT_ONCE: Final = 8
"""Concurrent reads of the stream per process, at most one per tenant. Other requests get the recorded states."""

_MAX_CLOCK_SKEW_MS: Final = 60_000.0
"""Maximum clock skew between machines."""


class _Sought(NamedTuple):
    """An event whose end is read from the stream."""

    event_id: str
    position: Position
    accepted_ms: float


@dataclass(frozen=True, slots=True)
class EventStatuses:
    """Reads event statuses.

    Redis may lose its last second of writes in a crash. Every event at or before an applied position has ended, so its
    outcome is read from the stream of ended events. The same is possible for an event whose state Redis has lost
    entirely, if the caller has its position.
    """

    states: EventStates
    applied: AppliedPositions
    read_partition: ReadPartition
    _reading: set[str] = field(default_factory=set)

    async def get(self, tenant: str, event_id: str) -> EventStatus | None:
        """Status of an event; None if no state is recorded.

        Raises:
            CacheUnavailable: Redis did not respond.
        """
        # Not validated: a path may contain any text.
        event = EventReference.model_construct(event_id=event_id, position=None)
        return (await self.get_many(tenant, [event])).get(event_id)

    async def get_many(self, tenant: str, events: Sequence[EventReference]) -> dict[str, EventStatus]:
        """Event id → status, without unknown events.

        Raises:
            CacheUnavailable: Redis did not respond.
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
        with suppress(CacheUnavailable):  # then the next request reads the stream again
            for event_id, end in ends.items():
                if event_id not in statuses:
                    await self.states.begin(tenant, end)
            await self.states.advance([step for end in ends.values() for step in _progress(tenant, end)])
        return statuses | ends

    async def _unrecorded(self, tenant: str, statuses: dict[str, EventStatus]) -> list[_Sought]:
        """Events that ended without a recorded outcome. Updates ``statuses`` with outcomes recorded meanwhile."""
        unfinished = [
            (status, Position.parse(status.position))
            for status in statuses.values()
            if status.outcome is None and status.position is not None
        ]
        if not unfinished:
            return []
        applied = await self.applied.positions(tenant)
        passed = [
            _Sought(status.event_id, position, status.accepted_ms)
            for status, position in unfinished
            if applied.get(position.partition, -1) >= position.offset
        ]
        # They may have ended and been recorded since the first read. The recorded state has more details.
        statuses.update(await self.states.get_many(tenant, [one.event_id for one in passed]))
        return [one for one in passed if statuses[one.event_id].outcome is None]

    async def _ends(self, tenant: str, sought: Sequence[_Sought]) -> dict[str, EventStatus]:
        """Event id → final status, of the events found in the stream. Each partition is read once."""
        lanes: dict[int, list[_Sought]] = defaultdict(list)
        for one in sought:
            lanes[one.position.partition].append(one)
        ends: dict[str, EventStatus] = {}
        with suppress(StreamUnavailable, TimeoutError):
            async with asyncio.timeout(_TIMEOUT_S):
                for partition, some in lanes.items():
                    await self._read_ends(tenant, partition, {one.event_id: one for one in some}, ends)
        return ends

    async def _read_ends(
        self, tenant: str, partition: int, sought: Mapping[str, _Sought], ends: dict[str, EventStatus]
    ) -> None:
        """Read the final statuses of a partition's events into ``ends``. The first record of an event counts."""
        first = max(0, min(one.position.offset for one in sought.values()) - _MAX_REORDERED)
        since_ms = min(one.accepted_ms for one in sought.values()) - _MAX_CLOCK_SKEW_MS
        left = set(sought)
        async with aclosing(self.read_partition(EVENT_ENDS, partition, offset=first, since_ms=since_ms)) as records:
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
    """Events without a recorded state whose position is known."""
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
