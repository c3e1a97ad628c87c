"""What index changes mention, as a slice of answers remembers it, and several of them made one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import orjson

from schemas.events import IndexChange


@dataclass(frozen=True, slots=True)
class ChangeLog:
    """Which passages changes were about.

    Attributes:
        events: ids of the events that changed something.
        documents: that were changed.
        added: chunk id → document id of passages whose last mention is that they were added.
        removed: ids of those whose last mention is that they were removed.
    """

    events: tuple[str, ...]
    documents: frozenset[str]
    added: dict[str, str]
    removed: frozenset[str]

    def __len__(self) -> int:
        return len(self.added) + len(self.removed)


def written(changes: Iterable[IndexChange]) -> bytes:
    """Changes in the order of the stream, to be remembered; empty where they change no answer."""
    told = [
        (change.event_id, change.document_id, change.added, change.removed)
        for change in changes
        if change.changes_answers
    ]
    return orjson.dumps(told) if told else b""


def read(changes: Sequence[bytes]) -> ChangeLog:
    """All of several written changes, in their order."""
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
