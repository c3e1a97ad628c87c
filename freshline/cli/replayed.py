"""Outcomes of replayed dead letters, read from the stores: the command line acts for all tenants."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from infra.kafka.dead_letters import DeadLetterRecord
from infra.kafka.topic_reader import read_partition
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
    """Reads the statuses of one tenant's events."""

    event_statuses: EventStatuses
    tenant: str

    async def statuses(self, events: Sequence[SentEvent]) -> dict[str, EventStatus]:
        references = [EventReference(event_id=event.event_id, position=str(event.position)) for event in events]
        return await self.event_statuses.get_many(self.tenant, references)


async def outcomes_of(
    settings: Settings, replayed: Sequence[tuple[DeadLetterRecord, Replayed]], *, timeout_s: float
) -> dict[str, EndedEvent]:
    """Wait for the outcomes of replayed dead letters.

    Returns:
        Event id → outcome, of the events that ended within ``timeout_s``.

    Raises:
        CacheUnavailable: Redis did not answer.
    """
    events: dict[str, list[SentEvent]] = defaultdict(list)
    for dead_letter, replay in replayed:
        if dead_letter.event is not None and replay.event_id is not None and replay.position is not None:
            event, position = dead_letter.event, Position.parse(replay.position)
            deleted = event.change is Change.DELETED
            events[event.tenant].append(
                SentEvent(replay.event_id, event.document_id, event.version, position, deleted=deleted)
            )
    redis = connect_redis(settings.redis)
    try:
        answers = RedisAnswerCache(redis, settings.names, settings.answers)
        statuses = EventStatuses(RedisEventStates(redis, settings.names), answers, partial(read_partition, settings))
        ended: dict[str, EndedEvent] = {}
        deadline_s = time.monotonic() + timeout_s
        for tenant, tenant_events in events.items():
            outcomes = EventOutcomes()
            outcomes.expect(tenant_events)
            left_s = max(0.0, deadline_s - time.monotonic())
            await wait_for_outcomes(_TenantEvents(statuses, tenant), outcomes, timeout_s=left_s)
            ended |= {end.event.event_id: end for end in outcomes.ended}
        return ended
    finally:
        await redis.aclose()
