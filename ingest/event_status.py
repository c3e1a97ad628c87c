"""Where an accepted event is: what was recorded of it, and what follows from it where a record is missing."""

from dataclasses import dataclass

from infra.opensearch.port import IndexUnavailable
from infra.redis.port import EventStates
from ingest.accept import AppliedPositions, Documents
from ingest.core.event_end import with_derived_end
from schemas.documents import DocumentKey, EventStatus
from schemas.positions import Position


@dataclass(frozen=True, slots=True)
class EventStatuses:
    """Looks up events.

    The last step records an outcome after its work, and does not wait for a Redis that fails in that moment: the
    outcome is missing then, for ever. But every event at or before an applied position has ended, and the manifest of
    its document tells how.
    """

    states: EventStates
    applied: AppliedPositions
    index: Documents

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
        key = DocumentKey(tenant, status.document_id)
        try:
            manifest = (await self.index.manifests([key])).get(key)
        except IndexUnavailable:
            return status
        return with_derived_end(status, manifest)
