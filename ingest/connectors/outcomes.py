"""How sent events ended: each of them is asked for, many in one request."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple, Protocol

from ingest.connectors.client import Refused, SentEvent, ServiceUnavailable
from schemas.documents import MAX_EVENTS_PER_REQUEST, EventStatus, Outcome

_POLL_FIRST_S: Final = 0.05
_POLL_MAX_S: Final = 1.0
_LAST_READ_S: Final = 5.0
"""Longest time that asking for all events once takes when the wait is over."""


class EventReader(Protocol):
    """The part of ``IngestClient`` that tells how events ended."""

    async def statuses(self, events: Sequence[SentEvent]) -> dict[str, EventStatus]:
        """See ``IngestClient``."""
        ...


class EndedEvent(NamedTuple):
    """A sent event and how it ended."""

    event: SentEvent
    outcome: Outcome
    reason: str | None
    passages: int | None

    @property
    def is_empty(self) -> bool:
        """Whether it is an upload that made nothing searchable."""
        return self.outcome is Outcome.DONE and self.passages == 0 and not self.event.deleted


@dataclass(slots=True)
class EventOutcomes:
    """The outcomes of sent events, as far as they are known.

    Attributes:
        ended: in the order in which they became known.
        problem: why the service was not asked any more, where it failed.
    """

    ended: list[EndedEvent] = field(default_factory=list)
    problem: str | None = None
    _waiting: deque[SentEvent] = field(default_factory=deque)

    def expect(self, events: Iterable[SentEvent]) -> None:
        """Ask for these events, too."""
        self._waiting.extend(events)

    def forget(self) -> None:
        """Expect nothing any more."""
        self._waiting.clear()

    @property
    def is_complete(self) -> bool:
        """Whether all expected events are known to have ended."""
        return not self._waiting

    @property
    def under_way(self) -> list[SentEvent]:
        """Events that are not known to have ended, in the order of their positions."""
        return sorted(self._waiting, key=lambda event: event.position)

    async def read(self, reader: EventReader) -> int:
        """Ask for the events under way, oldest first, until one request brings no outcome.

        What has not ended goes to the end of the queue, so that a partition that stands still hides no other.

        Returns:
            How many outcomes became known.

        Raises:
            Refused: the service does not answer such a request.
            ServiceUnavailable: it did not answer.
        """
        known = 0
        while self._waiting and (found := await self._read_some(reader)):
            known += found
        return known

    async def read_all(self, reader: EventReader) -> None:
        """Ask for every event under way once."""
        for _ in range(-(-len(self._waiting) // MAX_EVENTS_PER_REQUEST)):
            await self._read_some(reader)

    async def _read_some(self, reader: EventReader) -> int:
        asked = list(islice(self._waiting, MAX_EVENTS_PER_REQUEST))
        statuses = await reader.statuses(asked)
        found = 0
        for event in asked:
            self._waiting.popleft()
            status = statuses.get(event.event_id)
            if status is None or status.outcome is None:
                self._waiting.append(event)
            else:
                self.ended.append(EndedEvent(event, status.outcome, status.reason, status.passages))
                found += 1
        return found


async def wait_for_outcomes(
    reader: EventReader,
    outcomes: EventOutcomes,
    *,
    timeout_s: float,
    told: Callable[[EventOutcomes], None] = lambda _outcomes: None,
) -> None:
    """Wait until all expected events have ended, the time is over, or the service fails for good.

    What is not known by then stays in ``outcomes.under_way``; ``outcomes.problem`` says where the service failed.

    Args:
        reader: asked for outcomes.
        outcomes: the expected events; gets their outcomes.
        timeout_s: longest wait.
        told: called whenever more is known.
    """
    until_s = time.monotonic() + timeout_s
    pause_s = _POLL_FIRST_S
    try:
        async with asyncio.timeout(timeout_s + _LAST_READ_S):
            while not outcomes.is_complete:
                if await outcomes.read(reader):
                    told(outcomes)
                    pause_s = _POLL_FIRST_S
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    # Those that were not asked for lately may have ended, too.
                    await outcomes.read_all(reader)
                    return
                if not outcomes.is_complete:
                    await asyncio.sleep(min(pause_s, left_s))
                    pause_s = min(2 * pause_s, _POLL_MAX_S)
    except TimeoutError:
        return
    except (Refused, ServiceUnavailable) as error:
        outcomes.problem = str(error)


class Findings(NamedTuple):
    """What a run made searchable, and what it did not, document by document.

    Attributes:
        failed: events that could not be processed.
        superseded: events in whose place a version stands that this run did not send.
        replaced: events in whose place a later version of this run is searchable; nothing is wrong with them.
        empty: uploads without any passage, none of them replaced.
    """

    failed: list[EndedEvent]
    superseded: list[EndedEvent]
    replaced: list[EndedEvent]
    empty: list[EndedEvent]


def find(ended: Sequence[EndedEvent]) -> Findings:
    """Sort out how events ended."""
    newest: dict[str, int] = {}
    for one in ended:
        if one.outcome is Outcome.DONE:
            newest[one.event.document_id] = max(one.event.version, newest.get(one.event.document_id, -1))

    def is_replaced(one: EndedEvent) -> bool:
        return newest.get(one.event.document_id, -1) > one.event.version

    superseded = [one for one in ended if one.outcome is Outcome.SUPERSEDED]
    return Findings(
        failed=[one for one in ended if one.outcome is Outcome.DEAD_LETTER],
        superseded=[one for one in superseded if not is_replaced(one)],
        replaced=[one for one in superseded if is_replaced(one)],
        empty=[one for one in ended if one.is_empty and not is_replaced(one)],
    )
