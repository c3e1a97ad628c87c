"""Messages of the streams."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, Self

from pydantic import Field, model_validator

from schemas.documents import (
    ConnectorName,
    DocumentId,
    DocumentKey,
    EventStatus,
    Groups,
    IndexedMetadata,
    Metadata,
    Outcome,
    TenantId,
    Version,
)
from schemas.models import Message
from schemas.positions import PositionText


class BlobRef(Message):
    """Reference to content in the blob store. Content-addressed and immutable; equal content is stored once."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class Change(StrEnum):
    """Kind of change of a document."""

    UPSERTED = "upserted"
    DELETED = "deleted"


class StageTimes(Message):
    """Epoch milliseconds at which each stage was completed."""

    accepted_ms: float
    chunked_ms: float | None = None
    embedded_ms: float | None = None
    searchable_ms: float | None = None
    purged_ms: float | None = None


class DocumentEvent(Message):
    """A document was uploaded, updated or deleted. Topic ``documents.v1``."""

    event_id: str
    tenant: TenantId
    document_id: DocumentId
    version: Version
    change: Change
    accepted_ms: float
    content: BlobRef | None = None
    content_type: str | None = Field(
        default=None, description="Media type, with the `charset` parameter if the sender declares one for text."
    )
    file_name: str | None = None
    title: str | None = None
    source: str | None = None
    groups: Groups = ()
    metadata: Metadata = Field(default_factory=dict)
    connector: ConnectorName | None = None
    take_over: bool = Field(default=False, description="May replace a document that another connector owns.")
    rewrite: bool = Field(
        default=False,
        description="Republished event, for a repair or after a dead letter: every passage of this version is "
        "rewritten.",
    )

    @model_validator(mode="after")
    def _require_content_of_upsert(self) -> Self:
        if (self.change is Change.UPSERTED) != (self.content is not None):
            raise ValueError("an upserted event carries content, a deleted one does not")
        return self

    @property
    def key(self) -> DocumentKey:
        """Identity and ordering key of the document."""
        return DocumentKey(self.tenant, self.document_id)


class PlannedChunk(Message):
    """A passage of a parsed document.

    Attributes:
        text: text of the passage.
        heading_path: headings above it, outermost first.
        start: index of its first character in the parsed text of this version.
        end: index after its last character.
        text_sha256: hash of the embedded text, the key of the vector. It does not identify the passage: title and
            headings may be truncated in the embedded text.
    """

    text: str
    heading_path: tuple[str, ...] = ()
    start: int
    end: int
    text_sha256: str


class ChunkPlan(Message):
    """A document event was parsed and split, or ended early. Topic ``chunks.v1``; exactly one per event.

    ``outcome`` is set if the event ended in this step. The record is then forwarded so that watermarks and event
    statuses include every event.
    """

    event: DocumentEvent
    position: PositionText
    profile: str = Field(description="Parser, splitter and model. Chunks of different profiles are never mixed.")
    chunked_ms: float
    title: str | None = None
    content_metadata: IndexedMetadata = Field(
        default_factory=dict,
        description="Metadata from the content, such as tags in front matter, without names that the sender set.",
    )
    chunks: tuple[PlannedChunk, ...] = ()
    chunks_blob: BlobRef | None = Field(default=None, description="The chunks, if they are too large for a record.")
    outcome: Outcome | None = None
    reason: str | None = Field(
        default=None, description="Why the event ended in this step; without an outcome, why it has no chunks."
    )


class IndexChange(Message):
    """An event ended, and its changes are searchable on every serving replica. Topic ``index-changes.v1``."""

    event_id: str
    tenant: TenantId
    document_id: DocumentId
    version: Version
    position: PositionText
    generation: str
    outcome: Outcome
    reason: str | None = None
    passages: int | None = Field(
        default=None, ge=0, description="Searchable passages of this version. Null unless the outcome is `done`."
    )
    added: tuple[str, ...] = Field(default=(), description="Ids of chunks that became searchable.")
    removed: tuple[str, ...] = Field(default=(), description="Ids of chunks that were removed.")
    deleted: bool = Field(default=False, description="The document was deleted.")
    times: StageTimes

    @property
    def changes_answers(self) -> bool:
        """Whether the event may change any answer.

        Always true for a deletion: if the index has lost the document, its removed chunks are unknown.
        """
        return bool(self.added or self.removed or self.deleted)


class EventEnded(Message):
    """An event ended, and all affected cached answers are invalidated. Topic ``event-ends.v1``."""

    tenant: TenantId
    status: EventStatus

    @property
    def event_id(self) -> str:
        """Id of the event."""
        return self.status.event_id

    @property
    def document_id(self) -> str:
        """Id of the document."""
        return self.status.document_id

    @property
    def version(self) -> int:
        """Version of the document."""
        return self.status.version


StreamMessage = DocumentEvent | ChunkPlan | IndexChange | EventEnded
"""Input of a step."""

EVENT_TYPES: Final[Mapping[type[Message], str]] = {
    DocumentEvent: "freshline.document.changed.v1",
    ChunkPlan: "freshline.chunks.planned.v1",
    IndexChange: "freshline.index.changed.v1",
    EventEnded: "freshline.event.ended.v1",
}
"""CloudEvents ``type`` of each message."""
