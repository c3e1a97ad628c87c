"""Documents as content teams speak of them: identities, limits, and what the ingest API returns."""

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
"""Most events whose status one request returns."""
MAX_VERSION: Final = 2**53 - 1
"""Versions pass through JSON numbers, so they stay exact in every client."""

DocumentId = Annotated[
    str,
    StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$"),
    Field(description="The document's lasting name, unique in its tenant; a path or a URL is fine."),
]
TenantId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
GroupName = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f,]+$")]
Version = Annotated[int, Field(ge=0, le=MAX_VERSION)]
MetadataValue = Annotated[str, StringConstraints(max_length=MAX_METADATA_VALUE_CHARS)] | bool | int | FiniteFloat
MetadataName = Annotated[str, StringConstraints(min_length=1, max_length=MAX_METADATA_NAME_CHARS)]
Metadata = Annotated[dict[MetadataName, MetadataValue], Field(max_length=MAX_METADATA_ENTRIES)]
IndexedMetadataValue = MetadataValue | tuple[str, ...]
IndexedMetadata = Annotated[dict[MetadataName, IndexedMetadataValue], Field(max_length=MAX_METADATA_ENTRIES)]
"""Metadata of a passage: the sender's, and what the content says of itself, where a name may have several values."""


def _normalised_groups(given: object) -> object:
    """Names trimmed, composed (NFC), each once and in their order, blank ones left out; letter case counts.

    Raises:
        ValueError: names were given and all of them are blank. To take that for no groups would show to every reader
            what was meant for some.
    """
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        return given  # for the type itself to refuse
    trimmed = (unicodedata.normalize("NFC", name).strip() for name in given)
    names = tuple(dict.fromkeys(filter(None, trimmed)))
    if given and not names:
        raise ValueError("every group name is blank: name a group, or leave groups out to let every reader see it")
    return names


Groups = Annotated[tuple[GroupName, ...], Field(max_length=MAX_GROUPS), BeforeValidator(_normalised_groups)]
"""Who may see a document: empty means every reader of its tenant. Of a credential: whose documents it may find.

The same names are the same groups whichever way they came in: header, form, JSON, batch, API key, token or command.
"""


ConnectorName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"),
    Field(description="Name of the connector (of the source) that owns the document."),
]


class DocumentKey(NamedTuple):
    """A document's identity across tenants; its text is the Kafka key, so one document is one ordered lane."""

    tenant: str
    document_id: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.document_id}"

    @classmethod
    def parse(cls, text: str) -> "DocumentKey":
        """Read a written key; the tenant never holds a slash, the document id may."""
        tenant, _, document_id = text.partition("/")
        return cls(tenant, document_id)


class DocumentAttributes(Request):
    """What a content team may say of a document besides its content."""

    title: Annotated[str, StringConstraints(max_length=MAX_TITLE_CHARS)] | None = None
    source: Annotated[str, StringConstraints(max_length=2_000)] | None = Field(
        default=None, description="Where a person finds the original: a URL or path."
    )
    groups: Groups = ()
    metadata: Metadata = Field(default_factory=dict)
    revision: Version | None = Field(
        default=None,
        description="The source's own ever-growing revision number; left out, the version is assigned on acceptance.",
    )
    connector: ConnectorName | None = Field(
        default=None,
        description="Name of the connector that sends it and owns it from now on. A connector cannot replace or delete "
        "a live document of another one; a request without a connector can, and leaves the document without an owner.",
    )
    take_over: bool = Field(
        default=False, description="Replace or delete the document even if another connector owns it."
    )


class DocumentText(DocumentAttributes):
    """JSON body of an upload: text with its attributes."""

    text: str
    content_type: str = "text/markdown"


class BatchItem(DocumentAttributes):
    """One line of a batch: an upload, or with ``deleted`` a delete. Exactly one of text, content_b64, deleted."""

    document_id: DocumentId
    text: str | None = None
    content_b64: str | None = None
    content_type: str | None = None
    file_name: Annotated[str, StringConstraints(max_length=1_000)] | None = None
    deleted: bool = False
    empty: bool = Field(
        default=False, description="The document is empty on purpose; without it a line without content is refused."
    )


class Accepted(Message):
    """The durable promise: the event is in the stream at this position, on all in-sync replicas."""

    event_id: str
    document_id: str
    version: int
    position: PositionText


class LifeState(StrEnum):
    """Whether a document is searchable at all."""

    LIVE = "live"
    DELETED = "deleted"


class DocumentState(Message):
    """What is searchable of a document now."""

    document_id: str
    version: int
    state: LifeState
    position: PositionText
    title: str | None = None
    source: str | None = None
    content_type: str | None = None
    chunks: int
    updated_ms: float
    connector: str | None = Field(default=None, description="Name of the connector that owns it.")
    updating: bool = Field(
        default=False, description="This version is being made searchable; until then the one before is found."
    )


class ListedDocument(Message):
    """A live document, as its connector needs to know it."""

    document_id: str
    version: int
    content_sha256: str | None = None


class DocumentList(Message):
    """Live documents in the order of their ids."""

    documents: tuple[ListedDocument, ...]
    next_after: str | None = Field(default=None, description="Where more may follow: `after` of the next page.")
    complete: bool | None = Field(
        default=None,
        description="On the first page: whether every event that was accepted before this request is reflected. If "
        "not, a document that is not listed may still be on its way.",
    )


class InstallationState(Message):
    """Which installation this is, and as whom the credential speaks to it."""

    installation_id: str = Field(
        description="The same for as long as the log of document events lives; another where it was made anew."
    )
    tenant: str


class Outcome(StrEnum):
    """How an accepted event ended. Exactly one of these, once (I5)."""

    DONE = "done"
    SUPERSEDED = "superseded"
    DEAD_LETTER = "dead_letter"


class Stage(StrEnum):
    """Where an event is, in order."""

    ACCEPTED = "accepted"
    CHUNKED = "chunked"
    EMBEDDED = "embedded"
    SEARCHABLE = "searchable"
    PURGED = "purged"


class EventStatus(Message):
    """Where one accepted event is."""

    event_id: str
    document_id: str
    version: int
    position: PositionText | None = Field(
        description="Absent only for the instant before the broker's ack is recorded."
    )
    stage: Stage = Field(description="The last stage reached; `purged` means cached answers are dropped too.")
    outcome: Outcome | None = Field(description="Absent while the event is under way.")
    reason: str | None = Field(
        default=None, description="Why the event was superseded or failed, or why its version has no passages."
    )
    passages: int | None = Field(
        default=None,
        ge=0,
        description="Searchable passages of this version; 0 for a delete, and for a document without text. Absent "
        "unless the outcome is `done`.",
    )
    accepted_ms: float = Field(description="Epoch milliseconds of acceptance.")
    stages_ms: dict[Stage, float] = Field(description="Milliseconds from acceptance to each stage reached.")


class EventReference(Request):
    """An event to look up."""

    event_id: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    position: PositionText | None = Field(
        default=None,
        description="As the 202 gave it. With it an event that has ended is found even where Redis has lost its state.",
    )


class EventsRequest(Request):
    """Events to look up, all of one tenant."""

    events: Annotated[tuple[EventReference, ...], Field(min_length=1, max_length=MAX_EVENTS_PER_REQUEST)]


class EventsResponse(Message):
    """The statuses of the events that were asked for, in the order of the request."""

    events: tuple[EventStatus, ...]
    unknown: tuple[str, ...] = Field(description="Ids of events without a recorded state.")


class DeletionReceipt(Message):
    """That a document is gone: checked when the receipt was asked for."""

    event_id: str = Field(description="Of the delete.")
    document_id: str
    version: int
    position: PositionText = Field(description="From here on the stream no longer has the document.")
    accepted_ms: float = Field(description="Epoch milliseconds at which the delete was accepted.")
    purged_ms: float = Field(description="Epoch milliseconds at which all answers that may stand on it were dropped.")
    passages: int = Field(description="Passages of the document that can be found: none.")
    checked_ms: float = Field(description="Epoch milliseconds at which they were counted.")
