"""Ports of the document index, for the read path and the write path."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from schemas.documents import DocumentKey
from schemas.index import Manifest, StoredChunk
from schemas.search import Candidates, Hit, HybridSearch, Vector


class IndexUnavailable(Exception):
    """The index is down or overloaded, or the request timed out. The request is valid and may be retried.

    A request that timed out may have taken effect; every operation is idempotent.

    Attributes:
        retry_after_s: seconds to wait before a retry; 0 if unknown.
    """

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ChunkWrite:
    """A passage to write, and its vector of shape (dimension,)."""

    chunk: StoredChunk
    vector: Vector


@dataclass(frozen=True, slots=True)
class ChunkChange:
    """All writes and removals of one document version. They are applied to one shard, in this order.

    Attributes:
        version: external version of the writes: the manifest's ``write_version``.
        put: passages to write. If the change is rejected, they are removed; nothing else is stored under their ids.
        remove: ids of passages to remove, if the index accepts all of ``put``.
    """

    key: DocumentKey
    version: int
    put: tuple[ChunkWrite, ...]
    remove: tuple[str, ...]

    @property
    def put_ids(self) -> list[str]:
        """Ids of ``put``."""
        return [write.chunk.chunk_id for write in self.put]


@dataclass(frozen=True, slots=True)
class ScannedChunk:
    """A passage returned by a scan.

    Attributes:
        consistent: whether the fields for searches match the fields of the passage.
    """

    chunk: StoredChunk
    consistent: bool = True


@dataclass(frozen=True, slots=True)
class FoundPassage:
    """A searchable passage without text, and the external version of its last write."""

    chunk: StoredChunk
    write_version: int


class Revision(NamedTuple):
    """Identifies one write of a manifest."""

    sequence: int
    term: int


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest and its revision, for a conditional replacement."""

    manifest: Manifest
    revision: Revision


@dataclass(frozen=True, slots=True)
class ManifestWrite:
    """A conditional write of a manifest.

    Attributes:
        replaces: revision of the manifest to replace; None if none may exist.
    """

    manifest: Manifest
    replaces: Revision | None


class SearchIndex(Protocol):
    """Read access to searchable state. Methods may raise ``IndexUnavailable``."""

    async def search(self, searches: Sequence[HybridSearch]) -> list[Candidates]:
        """Candidates of both retrievers for each search, in one round trip."""
        ...

    async def fetch(self, hits: Sequence[Hit]) -> dict[str, StoredChunk]:
        """Chunk id → passage; without passages that no longer exist."""
        ...

    async def manifests(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, Manifest]:
        """Current manifests, in real time; one that never was is absent."""
        ...

    async def count_chunks(self, key: DocumentKey) -> int:
        """Number of searchable passages of a document."""
        ...

    async def positions(self, tenant: str) -> dict[int, int]:
        """Partition → offset up to which all events of the tenant have ended, as recorded by ``advance``."""
        ...


@dataclass(frozen=True, slots=True)
class FieldStatistics:
    """Term statistics of the lexical field of all shards, as scores use them.

    Attributes:
        document_count: number of passages with the field. Removed passages count until segments are merged.
        total_length: number of terms in all of them.
        frequencies: requested term → number of passages that contain it.
    """

    document_count: int
    total_length: int
    frequencies: Mapping[str, int]


class TermIndex(Protocol):
    """Terms and statistics of searchable passages, for the computation of scores."""

    async def with_vectors(self, hits: Sequence[Hit]) -> dict[str, ChunkWrite]:
        """Chunk id → passage with vector; without missing passages. Scores of the hits are ignored."""
        ...

    async def term_counts(self, hits: Sequence[Hit]) -> dict[str, Mapping[str, int]]:
        """Chunk id → term frequencies of the passage; without missing passages."""
        ...

    async def chunk_ids(self, key: DocumentKey) -> tuple[str, ...]:
        """Ids of all searchable passages of a document."""
        ...

    async def analyze(self, texts: Sequence[str]) -> list[Mapping[str, int]]:
        """Term frequencies of each text, as the analyzer of the index produces them."""
        ...

    async def statistics(self, terms: Collection[str]) -> FieldStatistics:
        """Current statistics of these terms."""
        ...


class DocumentIndex(Protocol):
    """Write access, and reads in real time. Methods may raise ``IndexUnavailable``."""

    async def manifests(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, Manifest]:
        """Current manifests, in real time; one that never was is absent."""
        ...

    async def stored_manifests(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, StoredManifest]:
        """Current manifests with their revisions, in real time; without missing ones."""
        ...

    async def put_manifests(self, writes: Sequence[ManifestWrite]) -> list[Revision | None]:
        """Write each manifest if its predecessor is unchanged; returns new revisions, and None for each conflict.

        After an error, some of them may be written.
        """
        ...

    async def apply(self, changes: Sequence[ChunkChange]) -> list[str | None]:
        """Write and remove passages, and refresh the affected shards.

        Returns None for each applied change, or the reason for which the index rejects its content. Of a rejected
        change no passage is stored or removed: passages are removed only after all new ones are accepted. Writes that
        are older than the stored version have no effect, and are not errors.
        """
        ...

    async def enforce(self, change: ChunkChange) -> None:
        """Like ``apply``, for passages that the index has accepted before: none of them is removed on a failure.

        Raises:
            IndexUnavailable: also if the index rejects a passage.
        """
        ...

    async def read_passages(self, hits: Sequence[Hit]) -> dict[str, ChunkWrite]:
        """Chunk id → passage in real time, searchable or not; without missing passages."""
        ...

    async def passages(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, list[FoundPassage]]:
        """All searchable passages of documents without a manifest; without documents that have none."""
        ...

    async def advance(self, positions: Mapping[tuple[str, int], int]) -> None:
        """Record that all events of a tenant up to an offset have ended and are searchable.

        Args:
            positions: (tenant, partition) → offset. Offsets lower than recorded ones have no effect.
        """
        ...

    async def chunk_ids(self, key: DocumentKey) -> tuple[str, ...]:
        """Ids of all searchable passages of a document without a manifest."""
        ...

    async def stored_vectors(self, keys: Sequence[str]) -> dict[str, Vector]:
        """Key → stored vector; without missing ones."""
        ...

    async def store_vectors(self, vectors: Mapping[str, Vector]) -> None:
        """Store vectors for reuse with equal texts."""
        ...

    async def live_documents(
        self, tenant: str, *, connector: str | None, after: str | None, limit: int
    ) -> list[Manifest]:
        """A page of manifests of live documents, ordered by id (code points).

        For a claim, the manifest that it replaces is listed, or the future one if it replaces none. The first page
        reflects every write before the call.

        Args:
            tenant: tenant of the documents.
            connector: owner of the documents; None for all.
            after: last id of the previous page; None for the first page.
            limit: maximum number of manifests.
        """
        ...

    def scan_manifests(self) -> AsyncIterator[Manifest]:
        """All manifests, including tombstones, unordered."""
        ...

    def scan_chunks(self) -> AsyncIterator[ScannedChunk]:
        """All searchable passages, unordered."""
        ...

    async def delete_chunks(self, hits: Sequence[Hit]) -> None:
        """Remove passages that no manifest contains, and refresh. For repairs."""
        ...
