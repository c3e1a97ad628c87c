"""Encoding of index changes in the change log of a slice, and merging of several entries."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import orjson

from schemas.events import IndexChange


@dataclass(frozen=True, slots=True)
class ChangeLog:
    """Passages of merged changes.

    Attributes:
        events: ids of the events that changed passages.
        documents: ids of the changed documents.
        added: chunk id → document id of passages that were added last.
        removed: ids of passages that were removed last.
    """

    events: tuple[str, ...]
    documents: frozenset[str]
    added: dict[str, str]
    removed: frozenset[str]

    def __len__(self) -> int:
        return len(self.added) + len(self.removed)


def encode_changes(changes: Iterable[IndexChange]) -> bytes:
    """Encode changes in stream order; empty if they change no passage."""
    entries = [
        (change.event_id, change.document_id, change.added, change.removed)
        for change in changes
        if change.changes_answers
    ]
    return orjson.dumps(entries) if entries else b""


def decode_changes(changes: Sequence[bytes]) -> ChangeLog:
    """Decode and merge several encoded changes, in their order."""
    last: dict[str, str | None] = {}
    events: dict[str, None] = {}
    documents: set[str] = set()
    for change in changes:
        for event_id, document_id, added, removed in orjson.loads(change) if change else ():
            events[event_id] = None
            documents.add(document_id)
            last.update(dict.fromkeys(removed))
            last.update(dict.fromkeys(added, document_id))
    return ChangeLog(
        events=tuple(events),
        documents=frozenset(documents),
        added={chunk_id: document_id for chunk_id, document_id in last.items() if document_id is not None},
        removed=frozenset(chunk_id for chunk_id, document_id in last.items() if document_id is None),
    )
