"""What is stored in the index: passages, manifests, vectors, and how their indices are laid out."""

from collections.abc import Mapping
from typing import Final

from pydantic import Field

from schemas.documents import DocumentKey, Groups, IndexedMetadata, LifeState, Metadata
from schemas.events import BlobRef
from schemas.models import Message
from schemas.positions import PositionText

PUBLIC_GROUP: Final = ",everyone"
"""Stored for a document without groups, so that one ``terms`` filter covers both kinds.

Its comma keeps it apart: no ``GroupName`` has one, so no document and no credential can name this group.
"""

LAYOUT: Final = 2
"""Of the chunk index, and kept in its mapping: changes whenever stored passages would be read or found otherwise."""

LONGEST_KEYWORD: Final = 8_000
"""UTF-16 units of a value that filters can match; the index drops longer ones. Above every limit of the attributes."""


MANIFESTS_REFRESH_S: Final = 0.2
"""What is stored of a change is found in positions so much later, at most: it says when cached answers are too old."""

MANIFESTS_REFRESH: Final = f"{MANIFESTS_REFRESH_S * 1_000:.0f}ms"
"""The same, as an index is told."""


FENCES_PER_VERSION: Final = 128
"""Distance of the lowest fencing tokens of two versions: external versions have 63 bits, document versions 53."""

COPY_MARK: Final = "~"
"""In ids of passages: behind it stands which copy of the passage it is."""

NEVER_COMPLETED: Final = -1
"""Version of a manifest of which no version has completed yet."""

MAX_GONE: Final = 20_000
"""Ids of passages that failed versions had written: so many are remembered at most, besides those of the last one."""

MAX_FAILED_VERSIONS: Final = 32
"""Failed versions that a manifest remembers; beyond it, the first are forgotten, and tried again if they come again."""


def original_id(chunk_id: str) -> str:
    """Id of the passage that this is, or is a copy of: it follows from all stored content."""
    return chunk_id.partition(COPY_MARK)[0]


class StoredChunk(Message):
    """One searchable passage. Its id is a hash of all content that is stored under it.

    ``version``, ``position``, ``start`` and ``end`` are provenance: they tell of the write, and stay as they are while
    later versions leave the passage alone.
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
    start: int = Field(description="Place in the parsed text of ``version``.")
    end: int
    groups: Groups = ()
    metadata: IndexedMetadata = Field(default_factory=dict)

    @property
    def key(self) -> DocumentKey:
        """The document's identity; its text is the routing value."""
        return DocumentKey(self.tenant, self.document_id)


class FailedVersion(Message):
    """A version that was given up. It changed nothing, and is given up again whenever its event comes again."""

    version: int
    position: PositionText
    kind: str = Field(description="Kind of the dead letter.")
    reason: str
    removed: tuple[str, ...] = Field(
        default=(), description="Ids of passages that its tries had written: a search may have found them meanwhile."
    )


class Manifest(Message):
    """What is, or is being made, searchable of one document; the arbiter between writers.

    It is in one of three states:

    - *complete*: exactly ``chunks`` are searchable, as ``version`` wrote them.
    - *claim* (``complete`` false): a writer makes ``version`` searchable in place of ``previous``. Nothing is
      superseded by a claim. Whoever finds one takes it over and settles it: it is rolled back to ``previous``, or,
      where the removals have begun and so all its passages are there, rolled forward.
    - *closed*: as complete, of the version before; ``failed`` has the versions that were given up since.

    Each write replaces exactly the manifest that it was made from. A writer whose claim is refused knew of an older
    state and must not write passages.

    A delete leaves it as tombstone: that is what keeps an old event from resurrecting the document, however late (I2).
    """

    tenant: str
    document_id: str
    version: int = Field(description="Of the content, or of the claim; -1 where no version has completed.")
    complete: bool
    state: LifeState
    position: PositionText
    profile: str
    title: str | None = None
    source: str | None = None
    groups: Groups = ()
    metadata: Metadata = Field(default_factory=dict, description="The sender's.")
    content_metadata: IndexedMetadata = Field(
        default_factory=dict, description="What the content says of itself, under other names than the sender's."
    )
    content: BlobRef | None = None
    content_type: str | None = None
    connector: str | None = Field(default=None, description="Owner: name of the connector that sent this version.")
    chunks: tuple[str, ...] = Field(default=(), description="Ids of all passages of this version, in order.")
    added: tuple[str, ...] = Field(default=(), description="Those that this version wrote.")
    removed: tuple[str, ...] = Field(default=(), description="Ids of earlier passages that this version took away.")
    gone: tuple[str, ...] = Field(
        default=(),
        description="Ids of removed passages that no index change may have named yet: removed when claims were "
        "settled, or by a version whose index change was not produced. The next index change names them.",
    )
    previous: "Manifest | None" = Field(
        default=None, description="Of a claim: the manifest of the version that serves until this one is complete."
    )
    failed: tuple[FailedVersion, ...] = Field(
        default=(), description="Versions above this one that were given up, in the order in which they were."
    )
    fence: int | None = Field(
        default=None, description="Fencing token: the index refuses writes of passages under a lower one."
    )
    writer: str | None = Field(default=None, description="Of a claim: the worker that made it.")
    updated_ms: float

    @property
    def key(self) -> DocumentKey:
        """The document's identity."""
        return DocumentKey(self.tenant, self.document_id)

    @property
    def write_version(self) -> int:
        """What OpenSearch orders the writes of passages by: the fencing token; it only grows."""
        # Manifests of earlier releases have none; the external versions that those used are below this.
        return self.fence if self.fence is not None else FENCES_PER_VERSION * (self.version + 1) - 1

    @property
    def newest_version(self) -> int:
        """The highest version that was claimed, completed or given up."""
        return max(self.version, *(one.version for one in self.failed)) if self.failed else self.version

    @property
    def completed(self) -> "Manifest | None":
        """The version that has completed last: this one, or the one that a claim is to replace."""
        return self if self.complete else self.previous

    @property
    def listed(self) -> "Manifest":
        """What a list of documents tells: a claim may be given up, but where nothing was before it is all there is."""
        return self.completed or self


def metadata_terms(metadata: Mapping[str, object]) -> list[str]:
    """Metadata as exact-match terms, one for each value.

    They share one keyword field, however many names there are, so mappings never grow.
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
