"""Documents: identities, limits, and requests and responses of the ingest API."""

import unicodedata
from enum import StrEnum
from typing import Annotated, Final, NamedTuple

from pydantic import BeforeValidator, Field, FiniteFloat, StringConstraints

from schemas.models import Message, Request
from schemas.positions import PositionText

MAX_TITLE_CHARS: Final = 500
MAX_GROUPS: Final = 64
MAX_METADATA_ENTRIES: Final = 64
MAX_METADATA_NAME_CHARS: Final = 128
MAX_METADATA_VALUE_CHARS: Final = 1_000
MAX_EVENTS_PER_REQUEST: Final = 1_000
"""Maximum number of event statuses per request."""
MAX_VERSION: Final = 2**53 - 1
"""Versions are JSON numbers; up to this value they are exact in every client."""

DocumentId = Annotated[
    str,
    StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$"),
    Field(description="Stable id of the document, unique in its tenant, such as a path or a URL."),
]
TenantId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
GroupName = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f,]+$")]
Version = Annotated[int, Field(ge=0, le=MAX_VERSION)]
MetadataValue = Annotated[str, StringConstraints(max_length=MAX_METADATA_VALUE_CHARS)] | bool | int | FiniteFloat
MetadataName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_METADATA_NAME_CHARS)]
Metadata = Annotated[dict[MetadataName, MetadataValue], Field(max_length=MAX_METADATA_ENTRIES)]
IndexedMetadataValue = MetadataValue | tuple[str, ...]
IndexedMetadata = Annotated[dict[MetadataName, IndexedMetadataValue], Field(max_length=MAX_METADATA_ENTRIES)]
"""Metadata of a passage: from the sender and from the content, where a name may have several values."""


def _normalised_groups(value: object) -> object:
    """Trim names, normalize them to NFC, remove duplicates and blank names. Case-sensitive.

    Raises:
        ValueError: all names are blank. Treating that as no groups would show a restricted document to every reader.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return value  # rejected by the type validation
    trimmed = (unicodedata.normalize("NFC", name).strip() for name in value)
    names = tuple(dict.fromkeys(filter(None, trimmed)))
    if value and not names:
        raise ValueError("every group name is blank: name a group, or omit groups to let every reader see the document")
    return names


Groups = Annotated[tuple[GroupName, ...], Field(max_length=MAX_GROUPS), BeforeValidator(_normalised_groups)]
"""Groups that can read a document; empty: every reader of its tenant. Of a credential: groups that it belongs to.

Normalized in the same way from every input: header, form, JSON, batch, API key, token and command line.
"""


ConnectorName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"),
    Field(description="Name of the connector that owns the document."),
]


class DocumentKey(NamedTuple):
    """Identity of a document across tenants. Its text is the Kafka key, which orders the events of a document."""

    tenant: str
    document_id: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.document_id}"

    @classmethod
    def parse(cls, text: str) -> "DocumentKey":
        """Parse the text of a key. The tenant contains no slash, the document id may."""
        tenant, _, document_id = text.partition("/")
        return cls(tenant, document_id)


class DocumentAttributes(Request):
    """Attributes of a document besides its content."""

    title: Annotated[str, StringConstraints(max_length=MAX_TITLE_CHARS)] | None = None
    source: Annotated[str, StringConstraints(max_length=2_000)] | None = Field(
        default=None, description="URL or path of the original."
    )
    groups: Groups = ()
    metadata: Metadata = Field(default_factory=dict)
    revision: Version | None = Field(
        default=None,
        description="Monotonic revision number of the source. Default: the version is assigned on acceptance.",
    )
    connector: ConnectorName | None = Field(
        default=None,
        description="Name of the connector that sends the document and becomes its owner. A connector cannot replace "
        "or delete a live document of another one. A request without a connector can, and removes the owner.",
    )
    take_over: bool = Field(
        default=False, description="Replace or delete the document even if another connector owns it."
    )


class DocumentText(DocumentAttributes):
    """JSON body of an upload: text with its attributes."""

    text: str
    content_type: str = "text/markdown"


class BatchItem(DocumentAttributes):
    """Line of a batch: an upload, or with ``deleted`` a deletion. Exactly one of text, content_b64, deleted."""

    document_id: DocumentId
    text: str | None = None
    content_b64: str | None = None
    content_type: str | None = None
    file_name: Annotated[str, StringConstraints(max_length=1_000)] | None = None
    deleted: bool = False
    empty: bool = Field(default=False, description="Declares an empty document. Required for a line without content.")


class Accepted(Message):
    """Acknowledgement: the event is durable in the stream at this position, on all in-sync replicas."""

    event_id: str
    document_id: str
    version: int
    position: PositionText


class LifeState(StrEnum):
    """Whether a document exists or is deleted."""

    LIVE = "live"
    DELETED = "deleted"


class DocumentState(Message):
    """Indexed state of a document."""

    document_id: str
    version: int
    state: LifeState
    position: PositionText
    title: str | None = None
    source: str | None = None
    content_type: str | None = None
    chunks: int
    updated_ms: float
    connector: str | None = Field(default=None, description="Name of the connector that owns the document.")
    updating: bool = Field(
        default=False, description="The version is being indexed. Until then, searches find the previous version."
    )


class ListedDocument(Message):
    """A live document in a list."""

    document_id: str
    version: int
    content_sha256: str | None = None


class DocumentList(Message):
    """Page of live documents, ordered by id."""

    documents: tuple[ListedDocument, ...]
    next_after: str | None = Field(default=None, description="`after` of the next page, if any.")
    complete: bool | None = Field(
        default=None,
        description="First page only: whether every event accepted before this request is reflected. If false, "
        "accepted documents may be missing.",
    )


class InstallationState(Message):
    """Identity of the installation, and tenant of the credential."""

    installation_id: str = Field(description="Identity of the log of document events. Changes if the log is recreated.")
    tenant: str


class Outcome(StrEnum):
    """Outcome of an accepted event. Each event has exactly one (I5)."""

    DONE = "done"
    SUPERSEDED = "superseded"
    DEAD_LETTER = "dead_letter"


class Stage(StrEnum):
    """Processing stages of an event, in order."""

    ACCEPTED = "accepted"
    CHUNKED = "chunked"
    EMBEDDED = "embedded"
    SEARCHABLE = "searchable"
    PURGED = "purged"


class EventStatus(Message):
    """Status of an accepted event."""

    event_id: str
    document_id: str
    version: int
    position: PositionText | None = Field(description="Null until the acknowledgement of the broker is recorded.")
    stage: Stage = Field(description="Last stage reached. `purged`: affected cached answers are invalidated too.")
    outcome: Outcome | None = Field(description="Null while the event is in progress.")
    reason: str | None = Field(
        default=None, description="Why the event was superseded or failed, or why the version has no passages."
    )
    passages: int | None = Field(
        default=None,
        ge=0,
        description="Number of searchable passages of this version; 0 for a deletion and for a document without text. "
        "Null unless the outcome is `done`.",
    )
    accepted_ms: float = Field(description="Epoch milliseconds of acceptance.")
    stages_ms: dict[Stage, float] = Field(description="Milliseconds from acceptance to each stage reached.")


class EventReference(Request):
    """An event to look up."""

    event_id: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    position: PositionText | None = Field(
        default=None,
        description="Position from the 202. With it, an ended event is found even if its state was lost in Redis.",
    )


class EventsRequest(Request):
    """Events to look up, all of one tenant."""

    events: Annotated[tuple[EventReference, ...], Field(min_length=1, max_length=MAX_EVENTS_PER_REQUEST)]


class EventsResponse(Message):
    """Statuses of the requested events, in the order of the request."""

    events: tuple[EventStatus, ...]
    unknown: tuple[str, ...] = Field(description="Ids of events without a recorded state.")


class DeletionReceipt(Message):
    """Receipt of a deletion, verified at the time of the request."""

    event_id: str = Field(description="Id of the deletion event.")
    document_id: str
    version: int
    position: PositionText = Field(description="Position of the deletion in the stream.")
    accepted_ms: float = Field(description="Epoch milliseconds at which the deletion was accepted.")
    purged_ms: float = Field(description="Epoch milliseconds at which all affected answers were invalidated.")
    passages: int = Field(description="Number of searchable passages of the document: 0.")
    checked_ms: float = Field(description="Epoch milliseconds of the count.")
