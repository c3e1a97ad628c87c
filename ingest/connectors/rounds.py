"""Grouping of events into rounds: small events share a batch, large contents have requests of their own."""

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from ingest.core.changes import DocumentRequest, Upload

ROUND_EVENTS: Final = 200
"""Large enough to amortize the cost of a request, small enough for visible progress."""

ROUND_BYTES: Final = 8_000_000
"""Content held in memory at a time. A single larger event forms a round of its own."""

ALONE_BYTES: Final = 500_000
"""Content of this size or larger is sent raw in its own request, without the encoding overhead of a batch."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An event to send.

    Attributes:
        mark: recorded in the log once it is accepted; None removes the document from the log.
    """

    request: DocumentRequest
    mark: str | None

    @property
    def size_bytes(self) -> int:
        """Length of the content."""
        return len(self.request.content) if isinstance(self.request, Upload) else 0


@dataclass(slots=True)
class Round:
    """Events that are sent concurrently."""

    events: list[Outgoing] = field(default_factory=list)
    size_bytes: int = 0
    _unordered: set[str] = field(default_factory=set)

    def fits(self, event: Outgoing) -> bool:
        """Whether the event can be added.

        Part of a round may be retried after the rest was accepted. Revisions keep the events of a document in order;
        without revisions, a round has at most one event per document.
        """
        if not self.events:
            return True
        request = event.request
        ordered = request.revision is not None or request.document_id not in self._unordered
        return ordered and len(self.events) < ROUND_EVENTS and self.size_bytes + event.size_bytes <= ROUND_BYTES

    def add(self, event: Outgoing) -> None:
        """Add an event."""
        self.events.append(event)
        self.size_bytes += event.size_bytes
        if event.request.revision is None:
            self._unordered.add(event.request.document_id)

    @property
    def batched(self) -> list[Outgoing]:
        """Events that share a request."""
        return [event for event in self.events if event.size_bytes < ALONE_BYTES]

    @property
    def alone(self) -> list[Outgoing]:
        """Events with requests of their own."""
        return [event for event in self.events if event.size_bytes >= ALONE_BYTES]


async def rounds(outgoing: AsyncIterable[Outgoing]) -> AsyncIterator[Round]:
    """Group events into rounds, to be sent sequentially.

    Raises:
        Exception: raised by ``outgoing``; the events before it are yielded first.
    """
    current = Round()
    failure: Exception | None = None
    try:
        async for event in outgoing:
            if not current.fits(event):
                yield current
                current = Round()
            current.add(event)
    except Exception as error:  # noqa: BLE001 - raised below
        failure = error
    if current.events:
        yield current
    if failure is not None:
        raise failure
