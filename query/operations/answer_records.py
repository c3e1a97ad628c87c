"""What is stored about a cached answer: its entry, its invalidations, and the events that caused them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from infra.redis.entry import Entry, UnreadableEntry
from infra.redis.port import AnswerCache, AnswerSlices, Dropped, EventStates
from schemas.cache_keys import slice_of
from schemas.documents import EventStatus


@dataclass(frozen=True, slots=True)
class AnswerRecords:
    """Read access for audits and explanations.

    Attributes:
        cache: entries.
        slices: recent invalidations; the same store as ``cache``.
        states: status of events.
    """

    cache: AnswerCache
    slices: AnswerSlices
    states: EventStates

    def slice_of(self, key: str) -> int:
        """Number of the answer's slice."""
        return slice_of(key, self.slices.count)

    async def drops(self, tenant: str, key: str) -> list[Dropped]:
        """Recent invalidations of the answer, newest first."""
        return await self.slices.drops(tenant, self.slice_of(key), key)

    async def events(self, tenant: str, event_ids: Sequence[str]) -> list[EventStatus | None]:
        """Status of each event; None if unknown or expired."""
        return [await self.states.get(tenant, event_id) for event_id in event_ids]


def readable(stored: bytes | None) -> Entry | None:
    """The decoded entry; None if there is none, or none of this format version."""
    try:
        return Entry.decode(stored) if stored is not None else None
    except UnreadableEntry:
        return None


def reason_of(drop: Dropped) -> dict[str, Any]:
    """The recorded reason of an invalidation: events and documents."""
    return dict(orjson.loads(drop.reason)) if drop.reason else {}
