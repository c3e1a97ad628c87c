"""The topology as a table: input, message type, output and dead-letter topic of each step."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from schemas.events import ChunkPlan, DocumentEvent, EventEnded, IndexChange, StreamMessage
from schemas.topics import CHUNKS, DEAD_LETTERS, DOCUMENTS, EVENT_ENDS, INDEX_CHANGES, Topic


class StepName(StrEnum):
    """Steps, which are also the names of their consumer groups and worker targets."""

    PREPARE = "prepare"
    INDEX = "index"
    INVALIDATE = "invalidate"
    NOTIFY = "notify"


@dataclass(frozen=True, slots=True)
class Row:
    """One step of the topology."""

    reads: Topic
    message: type[StreamMessage]
    writes: Topic | None
    dead_letters: Topic
    about: str


TOPOLOGY: Final = {
    StepName.PREPARE: Row(DOCUMENTS, DocumentEvent, CHUNKS, DEAD_LETTERS, "fetch, parse and split"),
    StepName.INDEX: Row(CHUNKS, ChunkPlan, INDEX_CHANGES, DEAD_LETTERS, "embed, write, remove, refresh"),
    StepName.INVALIDATE: Row(
        INDEX_CHANGES, IndexChange, EVENT_ENDS, DEAD_LETTERS, "drop cached answers, advance positions"
    ),
    StepName.NOTIFY: Row(EVENT_ENDS, EventEnded, None, DEAD_LETTERS, "notify webhooks"),
}
