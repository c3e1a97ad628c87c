"""The topology, as a table: what each step reads, does, writes, and where its failures go."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from schemas.events import ChunkPlan, DocumentEvent, IndexChange
from schemas.topics import CHUNKS, DEAD_LETTERS, DOCUMENTS, INDEX_CHANGES, Topic


class StepName(StrEnum):
    """The steps; also the names of their consumer groups and worker targets."""

    PREPARE = "prepare"
    INDEX = "index"
    INVALIDATE = "invalidate"


@dataclass(frozen=True, slots=True)
class Row:
    """One step of the topology."""

    reads: Topic
    message: type[DocumentEvent | ChunkPlan | IndexChange]
    writes: Topic | None
    dead_letters: Topic
    about: str


TOPOLOGY: Final = {
    StepName.PREPARE: Row(DOCUMENTS, DocumentEvent, CHUNKS, DEAD_LETTERS, "fetch, parse and split"),
    StepName.INDEX: Row(CHUNKS, ChunkPlan, INDEX_CHANGES, DEAD_LETTERS, "embed, write, remove, refresh"),
    StepName.INVALIDATE: Row(INDEX_CHANGES, IndexChange, None, DEAD_LETTERS, "drop cached answers, advance positions"),
}
