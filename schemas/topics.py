"""Topics. Workers create them explicitly; automatic topic creation must be disabled in the brokers."""

from dataclasses import dataclass
from typing import Final

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
FOREVER: Final = -1


@dataclass(frozen=True, slots=True)
class Topic:
    """A logical topic.

    Attributes:
        name: logical name with schema version, without the namespace.
        retention_ms: retention in milliseconds, or ``FOREVER``.
        about: one-line description.
    """

    name: str
    retention_ms: int
    about: str


DOCUMENTS: Final = Topic("documents.v1", FOREVER, "accepted document events; source of truth for replays")
CHUNKS: Final = Topic("chunks.v1", 7 * DAY_MS, "one chunk plan per document event")
INDEX_CHANGES: Final = Topic(
    "index-changes.v1", 7 * DAY_MS, "one record per finished event, after its changes are searchable"
)
EVENT_ENDS: Final = Topic(
    "event-ends.v1", 7 * DAY_MS, "one record per finished event, after affected answers are invalidated"
)
DEAD_LETTERS: Final = Topic("dead-letters.v1", 30 * DAY_MS, "records that a step could not process, with the reason")

TOPICS: Final = (DOCUMENTS, CHUNKS, INDEX_CHANGES, EVENT_ENDS, DEAD_LETTERS)
"""All topics have the same partition count and keys, so events of a document stay ordered from end to end."""

TO_THE_INDEX: Final = ((DOCUMENTS, "prepare"), (CHUNKS, "index"))
"""Topics between acceptance and index, each with the step that consumes it."""

MAX_RECORD_BYTES: Final = 1_000_000
"""Below the default limit of brokers (1 MiB). Larger content is referenced in the blob store."""
