"""The commit point of every event: its record in the stream. Afterwards it cannot be lost."""

import secrets
import time
from typing import Final

import structlog

from infra.kafka.codec import encode_event
from infra.kafka.port import Producer
from infra.redis.port import CacheUnavailable, EventStates
from infra.telemetry.tracing import Tracing
from ingest.core.event_ids import RANDOM_BITS, event_id
from schemas.documents import Accepted, EventStatus, Stage
from schemas.events import DocumentEvent
from schemas.positions import Position
from schemas.telemetry import ACCEPT_SPAN

_log: Final = structlog.get_logger(__name__)


def new_event_id(now_ms: float) -> str:
    """An id that no other event has."""
    return event_id(int(now_ms), secrets.randbits(RANDOM_BITS))


class EventLog:
    """Puts events into the stream, then tells of them. The stream is the truth; what is told may fail."""

    def __init__(self, producer: Producer, states: EventStates, tracing: Tracing | None = None) -> None:
        self._producer = producer
        self._states = states
        self._tracing = tracing or Tracing()
        self._states_are_missing = False

    async def place(self, event: DocumentEvent, traceparent: str | None = None) -> Accepted:
        """Return once all in-sync replicas have the event.

        Raises:
            StreamUnavailable: it was not acknowledged; it may be in the stream all the same.
        """
        about = {"freshline.event_id": event.event_id, "freshline.document_id": event.document_id}
        span = self._tracing.begin(ACCEPT_SPAN, traceparent, about)
        try:
            placed = await self._producer.send(encode_event(event, span.traceparent))
        except Exception as error:
            span.end(type(error).__name__, failed=True)
            raise
        span.end("accepted")
        position = str(Position(placed.partition, placed.offset))
        await self._tell(event, position)
        return Accepted(
            event_id=event.event_id, document_id=event.document_id, version=event.version, position=position
        )

    async def republish(self, event: DocumentEvent, traceparent: str | None = None) -> Accepted:
        """Place an event of the log once more, as a new event of the same version that is to be written anew.

        A version of the document that is newer supersedes it, as it would have the first time: that is why it is safe.

        Raises:
            StreamUnavailable: see ``place``.
        """
        now_ms = time.time_ns() / 1e6
        anew = {"event_id": new_event_id(now_ms), "accepted_ms": now_ms, "rewrite": True}
        return await self.place(event.model_copy(update=anew), traceparent)

    async def _tell(self, event: DocumentEvent, position: str) -> None:
        status = EventStatus(
            event_id=event.event_id,
            document_id=event.document_id,
            version=event.version,
            position=position,
            stage=Stage.ACCEPTED,
            outcome=None,
            accepted_ms=event.accepted_ms,
            stages_ms={Stage.ACCEPTED: 0.0},
        )
        try:
            await self._states.begin(event.tenant, status)
        except CacheUnavailable as error:
            # Once when Redis stops answering, not once for each event.
            if not self._states_are_missing:
                _log.warning("event_state_not_recorded", store="redis", reason=str(error))
            self._states_are_missing = True
        else:
            self._states_are_missing = False
