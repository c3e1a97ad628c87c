"""Edits of a recorded history, sent at a steady rate while questions are asked."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from freshline.loadtest.tally import Ledger
from ingest.connectors.client import IngestClient, Refused, ServiceUnavailable
from ingest.connectors.event_file import RecordedEvent, read_events
from ingest.core.changes import DocumentRequest, Removal, Upload
from ingest.core.content import TYPE_OF_SUFFIX
from schemas.documents import Accepted, DocumentAttributes, Stage
from schemas.positions import Position

_POLL_S: Final = 0.1
"""A change counts a second after it was searchable, so this is often enough to know of it in time."""

_END_S: Final = 30.0


def history_of(path: Path, *, after: int | None = None) -> Iterator[RecordedEvent]:
    """Events that edit: those after the snapshot that a history begins with.

    Args:
        path: the recorded history.
        after: only events with a higher ``seq``.

    Raises:
        BadEventFile: see ``read_events``.
    """
    in_snapshot = True
    for event in read_events(path):
        in_snapshot = in_snapshot and event.type == "created"
        if not in_snapshot and (after is None or event.seq > after):
            yield event


def snapshot_of(path: Path) -> Iterator[RecordedEvent]:
    """The creations that a history begins with."""
    for event in read_events(path):
        if event.type != "created":
            return
        yield event


def last_state_of(path: Path) -> Iterator[RecordedEvent]:
    """For each document that there is at the end of a history, the event that gave it its content, as a creation."""
    live: dict[str, RecordedEvent] = {}
    for event in read_events(path):
        if event.type == "deleted":
            live.pop(event.doc_id, None)
        elif event.new_content() is not None:
            live[event.doc_id] = event.model_copy(update={"type": "created"})
    yield from live.values()


class Edits:
    """Sends edits, and notes when each became searchable.

    Args:
        client: of the ingest service.
        events: what to send, in order.
        ledger: told of each edit that is searchable.
        per_s: edits in a second.
        sent: called with the ``seq`` of each event that was sent.
    """

    def __init__(
        self,
        client: IngestClient,
        events: Iterable[RecordedEvent],
        ledger: Ledger,
        *,
        per_s: float,
        sent: Callable[[int], None] | None = None,
    ) -> None:
        self._client = client
        self._events = events
        self._ledger = ledger
        self._per_s = per_s
        self._sent = sent
        self.ended: Counter[str] = Counter()
        self._searchable_ms: list[float] = []
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Send until cancelled, or until there are no more."""
        began_s, number = time.perf_counter(), 0
        try:
            for event in self._events:
                request = request_of(event)
                if request is None:
                    continue
                await asyncio.sleep(max(0.0, began_s + number / self._per_s - time.perf_counter()))
                number += 1
                await self._send(event, request)
        finally:
            for following in self._under_way:
                following.cancel()

    def figures(self) -> dict[str, Any]:
        """What a report says of them: how many ended how, and how long they took to be searchable."""
        took = sorted(self._searchable_ms)
        return {
            "edits": self.ended.total(),
            "edits_ended": dict(self.ended),
            "searchable_p50_ms": round(took[len(took) // 2], 1) if took else None,
            "searchable_p99_ms": round(took[int(len(took) * 0.99)], 1) if took else None,
        }

    async def _send(self, event: RecordedEvent, request: DocumentRequest) -> None:
        try:
            accepted = await self._client.send(request)
        except (Refused, ServiceUnavailable):
            self.ended["not sent"] += 1
            return
        if self._sent is not None:
            self._sent(event.seq)
        following = asyncio.create_task(self._follow(accepted), name=f"follow-{accepted.event_id}")
        self._under_way.add(following)
        following.add_done_callback(self._under_way.discard)

    async def _follow(self, accepted: Accepted) -> None:
        try:
            async with asyncio.timeout(_END_S):
                while True:
                    status = await self._client.status(accepted.event_id)
                    if status is not None and Stage.SEARCHABLE in status.stages_ms:
                        took_ms = status.stages_ms[Stage.SEARCHABLE]
                        self._searchable_ms.append(took_ms)
                        self._ledger.note_searchable(Position.parse(accepted.position), status.accepted_ms + took_ms)
                        self.ended["searchable"] += 1
                        return
                    if status is not None and status.outcome is not None:
                        self.ended[str(status.outcome)] += 1
                        return
                    await asyncio.sleep(_POLL_S)
        except (Refused, ServiceUnavailable, TimeoutError):
            self.ended["not known"] += 1


def request_of(event: RecordedEvent) -> DocumentRequest | None:
    """What to send; None for a rename that leaves the content, and for files that are not supported."""
    revision = event.seq + 1
    if event.type == "deleted":
        return Removal(event.doc_id, revision)
    content, content_type = event.new_content(), TYPE_OF_SUFFIX.get(Path(event.path).suffix.lower())
    if content is None or content_type is None:
        return None
    attributes = DocumentAttributes(source=event.path, metadata={"path": event.path}, revision=revision)
    return Upload(event.doc_id, content, content_type, attributes, Path(event.path).name)
