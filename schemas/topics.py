"""The one table of topics. They are created explicitly from it; brokers must not create any by themselves."""

from dataclasses import dataclass
from typing import Final

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
FOREVER: Final = -1


@dataclass(frozen=True, slots=True)
class Topic:
    """A logical topic.

    Attributes:
        name: logical name, with its schema version; the namespace is put before it.
        retention_ms: how long the broker keeps records, or ``FOREVER``.
        about: one line for operators.
    """

    name: str
    retention_ms: int
    about: str


DOCUMENTS: Final = Topic("documents.v1", FOREVER, "accepted document events; the source of truth for replay")
CHUNKS: Final = Topic("chunks.v1", 7 * DAY_MS, "one chunk plan per document event")
INDEX_CHANGES: Final = Topic("index-changes.v1", 7 * DAY_MS, "one record per finished event, after it is searchable")
EVENT_ENDS: Final = Topic("event-ends.v1", 7 * DAY_MS, "one record per finished event, after answers are purged")
DEAD_LETTERS: Final = Topic("dead-letters.v1", 30 * DAY_MS, "records that a step gave up on, with the reason")

TOPICS: Final = (DOCUMENTS, CHUNKS, INDEX_CHANGES, EVENT_ENDS, DEAD_LETTERS)
"""All topics have the same partition count and the same key, so one document is one ordered lane from end to end."""

TO_THE_INDEX: Final = ((DOCUMENTS, "prepare"), (CHUNKS, "index"))
"""The topics that an event passes on its way into the index, each with the step whose consumer group reads it."""

MAX_RECORD_BYTES: Final = 1_000_000
"""Below every broker's default limit (1 MiB); what is larger travels by blob reference."""
