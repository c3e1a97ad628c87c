"""How events of replayed dead letters ended, read from the stores: the command line may act for every tenant."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from infra.kafka.dead_letters import DeadLetterRecord
from infra.kafka.reading import read_lane
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from infra.redis.event_states import RedisEventStates
from infra.settings import Settings
from ingest.connectors.client import SentEvent
from ingest.connectors.outcomes import EndedEvent, EventOutcomes, wait_for_outcomes
from ingest.event_status import EventStatuses
from schemas.dead_letters import Replayed
from schemas.documents import EventReference, EventStatus
from schemas.events import Change
from schemas.positions import Position


@dataclass(frozen=True, slots=True)
class _TenantEvents:
    """See ``EventReader``; the events of one tenant."""

    known: EventStatuses
    tenant: str

    async def statuses(self, events: Sequence[SentEvent]) -> dict[str, EventStatus]:
        references = [EventReference(event_id=one.event_id, position=str(one.position)) for one in events]
        return await self.known.get_many(self.tenant, references)


async def outcomes_of(
    settings: Settings, replayed: Sequence[tuple[DeadLetterRecord, Replayed]], *, timeout_s: float
) -> dict[str, EndedEvent]:
    """Event id → how the event ended, of those that did in time.

    Raises:
        CacheUnavailable: nobody can tell now.
    """
    events: dict[str, list[SentEvent]] = defaultdict(list)
    for letter, done in replayed:
        if letter.event is not None and done.event_id is not None and done.position is not None:
            event, position = letter.event, Position.parse(done.position)
            deleted = event.change is Change.DELETED
            events[event.tenant].append(
                SentEvent(done.event_id, event.document_id, event.version, position, deleted=deleted)
            )
    redis = connect_redis(settings.redis)
    try:
        answers = RedisAnswerCache(redis, settings.names, settings.answers)
        known = EventStatuses(RedisEventStates(redis, settings.names), answers, partial(read_lane, settings))
        ended: dict[str, EndedEvent] = {}
        until_s = time.monotonic() + timeout_s
        for tenant, some in events.items():
            outcomes = EventOutcomes()
            outcomes.expect(some)
            left_s = max(0.0, until_s - time.monotonic())
            await wait_for_outcomes(_TenantEvents(known, tenant), outcomes, timeout_s=left_s)
            ended |= {one.event.event_id: one for one in outcomes.ended}
        return ended
    finally:
        await redis.aclose()
