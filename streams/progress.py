"""Progress of events for clients that wait for them. Best effort; it never delays the events."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog
from typing_extensions import override

from infra.redis.port import CacheUnavailable, EventStates, Progress
from schemas.documents import Stage
from schemas.events import DocumentEvent

_log = structlog.get_logger(__name__)


class ProgressReporter(Protocol):
    """Receives the progress of events."""

    def reached(self, event: DocumentEvent, stage: Stage, at_ms: float) -> None:
        """Record that an event reached a stage. Returns immediately."""
        ...


class NoProgress(ProgressReporter):
    """Discards progress. For step code that runs outside the stream, where no client waits."""

    @override
    def reached(self, event: DocumentEvent, stage: Stage, at_ms: float) -> None:
        pass


class EventStateProgress(ProgressReporter):
    """Writes progress in the background.

    Progress that cannot be written is discarded; the last step records all stages of an event again.
    """

    def __init__(self, states: EventStates) -> None:
        self._states = states
        self._pending: list[Progress] = []
        self._writer: asyncio.Task[None] | None = None

    @override
    def reached(self, event: DocumentEvent, stage: Stage, at_ms: float) -> None:
        self._pending.append(Progress(event.tenant, event.event_id, stage, at_ms))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())

    async def close(self) -> None:
        """Write pending progress."""
        if self._writer is not None:
            await self._writer

    async def _write(self) -> None:
        try:
            while self._pending:
                batch: Sequence[Progress] = self._pending
                self._pending = []
                await self._states.advance(batch)
        except CacheUnavailable as error:
            self._pending.clear()
            _log.warning("event_progress_not_recorded", reason=str(error))
        finally:
            self._writer = None
