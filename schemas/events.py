"""The messages on the streams, each named for what has happened."""

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
    """Content in the blob store, named by what it is: immutable, and the same content is stored once."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class Change(StrEnum):
    """What happened to a document."""

    UPSERTED = "upserted"
    DELETED = "deleted"


class StageTimes(Message):
    """Epoch milliseconds at which each stage was finished; carried along so that the stream itself can tell."""

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
        default=None, description="Media type; with the `charset` parameter where the sender declares one for text."
    )
    file_name: str | None = None
    title: str | None = None
    source: str | None = None
    groups: Groups = ()
    metadata: Metadata = Field(default_factory=dict)
    connector: ConnectorName | None = None
    take_over: bool = Field(default=False, description="It is meant to replace what another connector owns.")
    rewrite: bool = Field(
        default=False,
        description="An event of the log once more, for a repair or after a dead letter: what stands of this version "
        "is not trusted, and every passage of it is written anew.",
    )

    @model_validator(mode="after")
    def _content_goes_with_upsert(self) -> Self:
        if (self.change is Change.UPSERTED) != (self.content is not None):
            raise ValueError("an upserted event carries content, a deleted one does not")
        return self

    @property
    def key(self) -> DocumentKey:
        """The document's identity and ordering lane."""
        return DocumentKey(self.tenant, self.document_id)


class PlannedChunk(Message):
    """One passage of a parsed document.

    Attributes:
        text: the passage as it stands in the parsed text.
        heading_path: headings above it, outermost first.
        start: first character in the parsed text of this version.
        end: one past the last character.
        text_sha256: hash of the embedded text: the key of the vector. It does not identify the passage, as the embedded
            text holds no more of title and headings than fits.
    """

    text: str
    heading_path: tuple[str, ...] = ()
    start: int
    end: int
    text_sha256: str


class ChunkPlan(Message):
    """A document event was parsed and split (or ended early). Topic ``chunks.v1``; exactly one per event.

    ``outcome`` is set when the event already ended in this step: the record then only carries the news onward, so that
    watermarks and event status see every event.
    """

    event: DocumentEvent
    position: PositionText
    profile: str = Field(description="Parser, splitter and model: chunks of different profiles never mix.")
    chunked_ms: float
    title: str | None = None
    content_metadata: IndexedMetadata = Field(
        default_factory=dict,
        description="What the content says of itself, such as tags in its front matter; names that the sender gives "
        "are left out.",
    )
    chunks: tuple[PlannedChunk, ...] = ()
    chunks_blob: BlobRef | None = Field(default=None, description="The chunks, where they are too large for a record.")
    outcome: Outcome | None = None
    reason: str | None = Field(
        default=None, description="Why the event ended in this step; without an outcome, why there are no chunks."
    )


class IndexChange(Message):
    """An event ended, and what it changed is searchable on every copy that may serve. Topic ``index-changes.v1``."""

    event_id: str
    tenant: TenantId
    document_id: DocumentId
    version: Version
    position: PositionText
    generation: str
    outcome: Outcome
    reason: str | None = None
    passages: int | None = Field(
        default=None, ge=0, description="Searchable passages of this version. Absent unless the outcome is `done`."
    )
    added: tuple[str, ...] = Field(default=(), description="Ids of chunks that became searchable.")
    removed: tuple[str, ...] = Field(default=(), description="Ids of chunks that no longer are.")
    deleted: bool = Field(default=False, description="The document is gone, whatever chunks are known of it.")
    times: StageTimes

    @property
    def changes_answers(self) -> bool:
        """True if any answer may differ because of this event.

        A delete always counts: where the index has lost the document, nobody knows what the delete took away.
        """
        return bool(self.added or self.removed or self.deleted)


class EventEnded(Message):
    """An event ended, and no cached answer is older than it. Topic ``event-ends.v1``."""

    tenant: TenantId
    status: EventStatus

    @property
    def event_id(self) -> str:
        """Of the event."""
        return self.status.event_id

    @property
    def document_id(self) -> str:
        """Of the event's document."""
        return self.status.document_id

    @property
    def version(self) -> int:
        """Of the event's document."""
        return self.status.version


StreamMessage = DocumentEvent | ChunkPlan | IndexChange | EventEnded
"""Whatever a step reads."""

EVENT_TYPES: Final[Mapping[type[Message], str]] = {
    DocumentEvent: "freshline.document.changed.v1",
    ChunkPlan: "freshline.chunks.planned.v1",
    IndexChange: "freshline.index.changed.v1",
    EventEnded: "freshline.event.ended.v1",
}
"""CloudEvents ``type`` of each message."""
