"""Sends the edits of a recorded history at a fixed rate while questions are asked."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from freshline.loadtest.load_statistics import FreshnessSlo
from ingest.connectors.client import IngestClient, Rejected, ServiceUnavailable
from ingest.connectors.event_file import RecordedEvent, read_events
from ingest.core.changes import DocumentRequest, Removal, Upload
from ingest.core.content import TYPE_OF_SUFFIX
from schemas.documents import Accepted, DocumentAttributes, Stage
from schemas.positions import Position

_POLL_S: Final = 0.1
"""Short compared with the freshness objective of a second."""

_OUTCOME_TIMEOUT_S: Final = 30.0


def history_of(path: Path, *, after: int | None = None) -> Iterator[RecordedEvent]:
    """The events that follow the snapshot of a history.

    Args:
        path: recorded history.
        after: only events with a higher ``seq``.

    Raises:
        BadEventFile: a line is no event.
    """
    in_snapshot = True
    for event in read_events(path):
        in_snapshot = in_snapshot and event.type == "created"
        if not in_snapshot and (after is None or event.seq > after):
            yield event


def snapshot_of(path: Path) -> Iterator[RecordedEvent]:
    """The snapshot of a history: its leading creations."""
    for event in read_events(path):
        if event.type != "created":
            return
        yield event


def final_state_of(path: Path) -> Iterator[RecordedEvent]:
    """The final state of a history: for each live document, the event with its content, as a creation."""
    live: dict[str, RecordedEvent] = {}
    for event in read_events(path):
        if event.type == "deleted":
            live.pop(event.doc_id, None)
        elif event.new_content() is not None:
            live[event.doc_id] = event.model_copy(update={"type": "created"})
    yield from live.values()


class EditSender:
    """Sends edits, and records when each becomes searchable.

    Args:
        client: client of the ingest service.
        events: events to send, in order.
        slo: receives each searchable edit.
        per_s: edits per second.
        sent: called with the ``seq`` of each sent event.
    """

    def __init__(
        self,
        client: IngestClient,
        events: Iterable[RecordedEvent],
        slo: FreshnessSlo,
        *,
        per_s: float,
        sent: Callable[[int], None] | None = None,
    ) -> None:
        self._client = client
        self._events = events
        self._ledger = slo
        self._per_s = per_s
        self._sent = sent
        self.ended: Counter[str] = Counter()
        self._searchable_ms: list[float] = []
        self._followed: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Send until cancelled or finished."""
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
            for task in self._followed:
                task.cancel()

    def figures(self) -> dict[str, Any]:
        """Figures for the report: outcomes, and time to searchable."""
        searchable_ms = sorted(self._searchable_ms)
        return {
            "edits": self.ended.total(),
            "edit_outcomes": dict(self.ended),
            "searchable_p50_ms": round(searchable_ms[len(searchable_ms) // 2], 1) if searchable_ms else None,
            "searchable_p99_ms": round(searchable_ms[int(len(searchable_ms) * 0.99)], 1) if searchable_ms else None,
        }

    async def _send(self, event: RecordedEvent, request: DocumentRequest) -> None:
        try:
            accepted = await self._client.send(request)
        except (Rejected, ServiceUnavailable):
            self.ended["not_sent"] += 1
            return
        if self._sent is not None:
            self._sent(event.seq)
        task = asyncio.create_task(self._follow(accepted), name=f"follow-{accepted.event_id}")
        self._followed.add(task)
        task.add_done_callback(self._followed.discard)

    async def _follow(self, accepted: Accepted) -> None:
        try:
            async with asyncio.timeout(_OUTCOME_TIMEOUT_S):
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
        except (Rejected, ServiceUnavailable, TimeoutError):
            self.ended["unknown"] += 1


def request_of(event: RecordedEvent) -> DocumentRequest | None:
    """The request for an event. None for a rename without content, and for unsupported file types."""
    revision = event.seq + 1
    if event.type == "deleted":
        return Removal(event.doc_id, revision)
    content, content_type = event.new_content(), TYPE_OF_SUFFIX.get(Path(event.path).suffix.lower())
    if content is None or content_type is None:
        return None
    attributes = DocumentAttributes(source=event.path, metadata={"path": event.path}, revision=revision)
    return Upload(event.doc_id, content, content_type, attributes, Path(event.path).name)
