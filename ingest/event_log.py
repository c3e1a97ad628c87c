"""Event log: appending an event to the stream is its commit point."""

import secrets
import time

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

_log = structlog.get_logger(__name__)


def new_event_id(now_ms: float) -> str:
    """Unique event id."""
    return event_id(int(now_ms), secrets.randbits(RANDOM_BITS))


class EventLog:
    """Appends events to the stream, the source of truth, then records their states, which may fail."""

    def __init__(self, producer: Producer, states: EventStates, tracing: Tracing | None = None) -> None:
        self._producer = producer
        self._states = states
        self._tracing = tracing or Tracing()
        self._states_unavailable = False

    async def append(self, event: DocumentEvent, traceparent: str | None = None) -> Accepted:
        """Append an event. On return, all in-sync replicas have it.

        Raises:
            StreamUnavailable: not acknowledged. The event may be in the stream nevertheless.
        """
        attributes = {"freshline.event_id": event.event_id, "freshline.document_id": event.document_id}
        span = self._tracing.begin(ACCEPT_SPAN, traceparent, attributes)
        try:
            appended = await self._producer.send(encode_event(event, span.traceparent))
        except Exception as error:
            span.end(type(error).__name__, failed=True)
            raise
        span.end("accepted")
        position = str(Position(appended.partition, appended.offset))
        await self._record_state(event, position)
        return Accepted(
            event_id=event.event_id, document_id=event.document_id, version=event.version, position=position
        )

    async def republish(self, event: DocumentEvent, traceparent: str | None = None) -> Accepted:
        """Append an event of the log again, as a new event of the same version that rewrites the document.

        Safe at any time: a newer version of the document supersedes it.

        Raises:
            StreamUnavailable: see ``append``.
        """
        now_ms = time.time_ns() / 1e6
        changes = {"event_id": new_event_id(now_ms), "accepted_ms": now_ms, "rewrite": True}
        return await self.append(event.model_copy(update=changes), traceparent)

    async def _record_state(self, event: DocumentEvent, position: str) -> None:
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
            # Logged once per outage, not once per event.
            if not self._states_unavailable:
                _log.warning("event_state_not_recorded", store="redis", reason=str(error))
            self._states_unavailable = True
        else:
            self._states_unavailable = False
