"""Documents of the index: passages and manifests, and constants of their layout."""

from collections.abc import Mapping
from typing import Final

from pydantic import Field

from schemas.documents import DocumentKey, Groups, IndexedMetadata, LifeState, Metadata
from schemas.events import BlobRef
from schemas.models import Message
from schemas.positions import PositionText

PUBLIC_GROUP: Final = ",everyone"
"""Stored for a document without groups, so that a single ``terms`` filter covers all documents.

It contains a comma, which no ``GroupName`` may contain, so neither a document nor a credential can name this group.
"""

LAYOUT: Final = 2
"""Layout version of the chunk index, stored in its mapping. It changes with the format or analysis of passages."""

LONGEST_KEYWORD: Final = 8_000
"""Maximum length of a filterable value, in UTF-16 units. It exceeds every attribute limit."""


MANIFESTS_REFRESH_S: Final = 0.2
"""Refresh interval of the manifest index: positions read from it lag by at most this time."""

MANIFESTS_REFRESH: Final = f"{MANIFESTS_REFRESH_S * 1_000:.0f}ms"
"""``MANIFESTS_REFRESH_S`` as an index setting."""

FENCES_PER_VERSION: Final = 128
"""Distance between the lowest fencing tokens of consecutive versions. External versions have 63 bits, versions 53."""

COPY_MARK: Final = "~"
"""Separates the id of a passage from the number of its copy."""

NEVER_COMPLETED: Final = -1
"""Version in the manifest of a document without a completed version."""

MAX_GONE: Final = 20_000
"""Maximum number of passage ids of failed versions in a manifest, besides those of the last one."""

MAX_FAILED_VERSIONS: Final = 32
"""Maximum number of failed versions in a manifest. Earlier ones are processed again if redelivered."""


def original_id(chunk_id: str) -> str:
    """Id of the passage without its copy number: a hash of all stored content."""
    return chunk_id.partition(COPY_MARK)[0]


class StoredChunk(Message):
    """A searchable passage. Its id is a hash of all stored content.

    ``version``, ``position``, ``start`` and ``end`` describe the write, and do not change while later versions keep the
    passage.
    """

    chunk_id: str
    tenant: str
    document_id: str
    version: int = Field(description="Document version that wrote this passage.")
    position: PositionText
    text: str
    text_sha256: str = Field(description="Hash of the embedded text: the key of the vector.")
    title: str | None = None
    source: str | None = None
    heading_path: tuple[str, ...] = ()
    start: int = Field(description="Offset in the parsed text of ``version``, in characters.")
    end: int
    groups: Groups = ()
    metadata: IndexedMetadata = Field(default_factory=dict)

    @property
    def key(self) -> DocumentKey:
        """The document's identity; its text is the routing value."""
        return DocumentKey(self.tenant, self.document_id)


class FailedVersion(Message):
    """A version that was given up. It changed nothing. If its event is redelivered, it has the same outcome."""

    version: int
    position: PositionText
    kind: str = Field(description="Kind of the dead letter.")
    reason: str
    removed: tuple[str, ...] = Field(
        default=(), description="Ids of passages that its attempts wrote and that searches may have returned."
    )


class Manifest(Message):
    """State of a document in the index. Conditional writes of it decide between concurrent writers.

    States:

    - *complete*: exactly ``chunks`` are searchable, as ``version`` wrote them.
    - *claim* (``complete`` false): a writer makes ``version`` searchable in place of ``previous``. A claim supersedes
      nothing. A worker that finds the claim of another one takes it over and recovers it: it rolls the claim back to
      ``previous``, or forward if removals have begun, because all passages of the claim exist by then.
    - *closed*: complete, with the previous version; ``failed`` lists the versions that were given up since.

    Each write replaces exactly the manifest that it is based on. A writer whose claim is rejected has read an older
    state and must not write passages.

    A delete leaves the manifest as a tombstone, so that no late event can resurrect the document (I2).
    """

    tenant: str
    document_id: str
    version: int = Field(description="Version of the content, or of the claim; -1 if no version has completed.")
    complete: bool
    state: LifeState
    position: PositionText
    profile: str
    title: str | None = None
    source: str | None = None
    groups: Groups = ()
    metadata: Metadata = Field(default_factory=dict, description="Metadata that the sender set.")
    content_metadata: IndexedMetadata = Field(
        default_factory=dict, description="Metadata from the content, without names that the sender set."
    )
    content: BlobRef | None = None
    content_type: str | None = None
    connector: str | None = Field(default=None, description="Owner: name of the connector that sent this version.")
    chunks: tuple[str, ...] = Field(default=(), description="Ids of all passages of this version, in order.")
    added: tuple[str, ...] = Field(default=(), description="Ids of passages that this version wrote.")
    removed: tuple[str, ...] = Field(default=(), description="Ids of earlier passages that this version removed.")
    gone: tuple[str, ...] = Field(
        default=(),
        description="Ids of removed passages that no index change may have named yet: removed when claims were "
        "recovered, or by a version whose index change was not produced. The next index change names them.",
    )
    previous: "Manifest | None" = Field(
        default=None,
        description="In a claim: the manifest that it replaces, whose version stays searchable until then.",
    )
    failed: tuple[FailedVersion, ...] = Field(
        default=(), description="Higher versions that were given up, in the order of giving up."
    )
    fence: int | None = Field(
        default=None, description="Fencing token: the index rejects writes of passages with a lower one."
    )
    writer: str | None = Field(default=None, description="In a claim: the worker that wrote it.")
    updated_ms: float

    @property
    def key(self) -> DocumentKey:
        """The document's identity."""
        return DocumentKey(self.tenant, self.document_id)

    @property
    def write_version(self) -> int:
        """Fencing token, the external version of passage writes in OpenSearch. It never decreases."""
        # Manifests of earlier releases have no token; their external versions are lower than this.
        return self.fence if self.fence is not None else FENCES_PER_VERSION * (self.version + 1) - 1

    @property
    def newest_version(self) -> int:
        """The highest version that was claimed, completed or given up."""
        return max(self.version, *(one.version for one in self.failed)) if self.failed else self.version

    @property
    def completed(self) -> "Manifest | None":
        """Manifest of the last completed version: this one, or the one that a claim replaces."""
        return self if self.complete else self.previous

    @property
    def listed(self) -> "Manifest":
        """Manifest in a listing of documents: the completed one, or the claim of a new document."""
        return self.completed or self


def metadata_terms(metadata: Mapping[str, object]) -> list[str]:
    """Metadata as exact-match terms, one for each value.

    All names share one keyword field, so that mappings do not grow.
    """
    return [
        metadata_term(name, one)
        for name, value in metadata.items()
        for one in (value if isinstance(value, tuple) else (value,))
    ]


def metadata_term(name: str, value: object) -> str:
    """One value as ``name=value``. What is before the first bare ``=`` is the name, so two pairs never share a term."""
    escaped = name.replace("\\", "\\\\").replace("=", "\\=")
    return f"{escaped}={metadata_text(value)}"


def metadata_text(value: object) -> str:
    """A metadata value as filters compare it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
