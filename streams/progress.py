"""ChangeLoader of how far events are, for the people who wait for them: best effort, never in the way of the events."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog

from infra.redis.port import CacheUnavailable, EventStates, Progress
from schemas.documents import Stage
from schemas.events import DocumentEvent

log = structlog.get_logger(__name__)


class ProgressLog(Protocol):
    """Where steps report."""

    def reached(self, event: DocumentEvent, stage: Stage, at_ms: float) -> None:
        """Note that an event reached a stage; returns at once."""
        ...


class NoProgress:
    """For those who run a step's code beside the stream: nobody waits for their events."""

    def reached(self, event: DocumentEvent, stage: Stage, at_ms: float) -> None:
        """See ``ProgressLog.reached``."""


class StatesProgress:
    """Writes reports behind the steps' backs; what cannot be written is dropped, for the last step tells it again."""

    def __init__(self, states: EventStates) -> None:
        self._states = states
        self._waiting: list[Progress] = []
        self._writing: asyncio.Task[None] | None = None

    def reached(self, event: DocumentEvent, stage: Stage, at_ms: float) -> None:
        """See ``ProgressLog.reached``."""
        self._waiting.append(Progress(event.tenant, event.event_id, stage, at_ms))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    async def close(self) -> None:
        """Write what is waiting."""
        if self._writing is not None:
            await self._writing

    async def _write(self) -> None:
        try:
            while self._waiting:
                batch: Sequence[Progress] = self._waiting
                self._waiting = []
                await self._states.advance(batch)
        except CacheUnavailable as error:
            self._waiting.clear()
            log.warning("event progress was not recorded", reason=str(error))
        finally:
            self._writing = None
