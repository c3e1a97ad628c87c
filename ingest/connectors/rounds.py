"""What is sent together: small events in one batch, large contents beside it, each document's events in order."""

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass, field
from typing import Final

from ingest.core.changes import DocumentRequest, Upload

ROUND_EVENTS: Final = 200
"""Enough that the cost of a request is nothing to each event, few enough that progress is seen."""

ROUND_BYTES: Final = 8_000_000
"""Content held in memory at a time, but for a single event that is larger."""

ALONE_BYTES: Final = 500_000
"""Content from here on travels as it is, in a request of its own: in a batch it would grow by its encoding."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An event to send.

    Attributes:
        mark: what the log remembers once it is accepted; None forgets the document.
    """

    request: DocumentRequest
    mark: str | None

    @property
    def size_bytes(self) -> int:
        """Length of the content."""
        return len(self.request.content) if isinstance(self.request, Upload) else 0


@dataclass(slots=True)
class Round:
    """Events that may be sent side by side."""

    events: list[Outgoing] = field(default_factory=list)
    size_bytes: int = 0
    _unordered: set[str] = field(default_factory=set)

    def fits(self, event: Outgoing) -> bool:
        """Whether the event may join.

        A part of a round may have to be sent again while the rest was accepted. Revisions keep a document's events in
        order all the same; without them, a document has one event in a round.
        """
        if not self.events:
            return True
        request = event.request
        ordered = request.revision is not None or request.document_id not in self._unordered
        return ordered and len(self.events) < ROUND_EVENTS and self.size_bytes + event.size_bytes <= ROUND_BYTES

    def add(self, event: Outgoing) -> None:
        """Let the event join."""
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
    """The events in rounds, to be sent one after the other.

    Raises:
        Exception: what ``outgoing`` raised, after the round of what came before it.
    """
    current = Round()
    broken: Exception | None = None
    try:
        async for event in outgoing:
            if not current.fits(event):
                yield current
                current = Round()
            current.add(event)
    except Exception as error:  # noqa: BLE001 - raised below
        broken = error
    if current.events:
        yield current
    if broken is not None:
        raise broken
