"""Outcomes of sent events, polled in batches."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple, Protocol

from ingest.connectors.client import Rejected, SentEvent, ServiceUnavailable
from schemas.documents import MAX_EVENTS_PER_REQUEST, EventStatus, Outcome

_POLL_FIRST_S: Final = 0.05
_POLL_MAX_S: Final = 1.0
_LAST_READ_S: Final = 5.0
"""Timeout of the last poll of all events after the wait has timed out."""


class EventReader(Protocol):
    """Reads event statuses. Implemented by ``IngestClient``."""

    async def statuses(self, events: Sequence[SentEvent]) -> dict[str, EventStatus]:
        """Event id → status, without unknown or expired events."""
        ...


class EndedEvent(NamedTuple):
    """A sent event with its outcome."""

    event: SentEvent
    outcome: Outcome
    reason: str | None
    passages: int | None

    @property
    def is_empty(self) -> bool:
        """Whether it is an upload without searchable passages."""
        return self.outcome is Outcome.DONE and self.passages == 0 and not self.event.deleted


@dataclass(slots=True)
class EventOutcomes:
    """Outcomes of sent events.

    Attributes:
        ended: events with an outcome, in the order of reading.
        problem: error of the service that ended polling, if any.
    """

    ended: list[EndedEvent] = field(default_factory=list)
    problem: str | None = None
    _pending: deque[SentEvent] = field(default_factory=deque)

    def expect(self, events: Iterable[SentEvent]) -> None:
        """Add events to poll."""
        self._pending.extend(events)

    def forget(self) -> None:
        """Discard all events without an outcome."""
        self._pending.clear()

    @property
    def is_complete(self) -> bool:
        """Whether all events have an outcome."""
        return not self._pending

    @property
    def in_progress(self) -> list[SentEvent]:
        """Events without an outcome, ordered by position."""
        return sorted(self._pending, key=lambda event: event.position)

    async def read(self, reader: EventReader) -> int:
        """Poll events without an outcome, oldest first, until a request returns no new outcome.

        Events without an outcome move to the end of the queue, so that a stalled partition does not block the others.

        Returns:
            Number of new outcomes.

        Raises:
            Rejected: the service rejected the request.
            ServiceUnavailable: it did not respond.
        """
        total = 0
        while self._pending and (count := await self._read_batch(reader)):
            total += count
        return total

    async def read_all(self, reader: EventReader) -> None:
        """Poll every event without an outcome once."""
        for _ in range(-(-len(self._pending) // MAX_EVENTS_PER_REQUEST)):
            await self._read_batch(reader)

    async def _read_batch(self, reader: EventReader) -> int:
        batch = list(islice(self._pending, MAX_EVENTS_PER_REQUEST))
        statuses = await reader.statuses(batch)
        count = 0
        for event in batch:
            self._pending.popleft()
            status = statuses.get(event.event_id)
            if status is None or status.outcome is None:
                self._pending.append(event)
            else:
                self.ended.append(EndedEvent(event, status.outcome, status.reason, status.passages))
                count += 1
        return count


async def wait_for_outcomes(
    reader: EventReader,
    outcomes: EventOutcomes,
    *,
    timeout_s: float,
    progress: Callable[[EventOutcomes], None] = lambda _outcomes: None,
) -> None:
    """Wait until all events have an outcome, the timeout, or a permanent failure of the service.

    Events without an outcome stay in ``outcomes.in_progress``; ``outcomes.problem`` has the failure.

    Args:
        reader: reads statuses.
        outcomes: the events; receives their outcomes.
        timeout_s: longest wait in seconds.
        progress: called after each poll with new outcomes.
    """
    deadline_s = time.monotonic() + timeout_s
    pause_s = _POLL_FIRST_S
    try:
        async with asyncio.timeout(timeout_s + _LAST_READ_S):
            while not outcomes.is_complete:
                if await outcomes.read(reader):
                    progress(outcomes)
                    pause_s = _POLL_FIRST_S
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    # Events that were not polled recently may have ended.
                    await outcomes.read_all(reader)
                    return
                if not outcomes.is_complete:
                    await asyncio.sleep(min(pause_s, left_s))
                    pause_s = min(2 * pause_s, _POLL_MAX_S)
    except TimeoutError:
        return
    except (Rejected, ServiceUnavailable) as error:
        outcomes.problem = str(error)


class Findings(NamedTuple):
    """Classified outcomes of a run.

    Attributes:
        failed: events that could not be processed.
        superseded: events superseded by a version that this run did not send.
        replaced: events superseded by a later version of this run, as intended.
        empty: uploads without passages that were not replaced.
    """

    failed: list[EndedEvent]
    superseded: list[EndedEvent]
    replaced: list[EndedEvent]
    empty: list[EndedEvent]


def classify(ended: Sequence[EndedEvent]) -> Findings:
    """Classify outcomes."""
    newest: dict[str, int] = {}
    for end in ended:
        if end.outcome is Outcome.DONE:
            newest[end.event.document_id] = max(end.event.version, newest.get(end.event.document_id, -1))

    def is_replaced(end: EndedEvent) -> bool:
        return newest.get(end.event.document_id, -1) > end.event.version

    superseded = [end for end in ended if end.outcome is Outcome.SUPERSEDED]
    return Findings(
        failed=[end for end in ended if end.outcome is Outcome.DEAD_LETTER],
        superseded=[end for end in superseded if not is_replaced(end)],
        replaced=[end for end in superseded if is_replaced(end)],
        empty=[end for end in ended if end.is_empty and not is_replaced(end)],
    )
