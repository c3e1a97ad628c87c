"""What the write path and the read path ask of the index, and in which words it answers."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from schemas.documents import DocumentKey
from schemas.index import Manifest, StoredChunk
from schemas.search import Hit, HybridSearch, Vector, Windows


class IndexUnavailable(Exception):
    """The index cannot take the request now (down, overloaded, timed out): try again later, nothing is wrong with it.

    A request that timed out may still have taken effect; every operation here may be repeated.

    Attributes:
        retry_after_s: when to try again; 0 where nobody knows.
    """

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ChunkWrite:
    """A passage to write, with its vector of shape (dimension,)."""

    chunk: StoredChunk
    vector: Vector


@dataclass(frozen=True, slots=True)
class ChunkChange:
    """All writes and removals of one document version. They land on one shard, in this order.

    Attributes:
        version: what the index orders them by: the manifest's ``write_version``.
        put: passages to write. Nothing else is stored under their ids, so if the change is refused they are removed.
        remove: ids of passages to remove, if the index takes all of ``put``.
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
    """A passage as a scan finds it.

    Attributes:
        consistent: the fields that are searched hold what the passage's own fields say.
    """

    chunk: StoredChunk
    consistent: bool = True


@dataclass(frozen=True, slots=True)
class FoundPassage:
    """A searchable passage, without text, and what the index orders its writes by."""

    chunk: StoredChunk
    write_version: int


class Revision(NamedTuple):
    """Names one write of a manifest; the next write of it has another."""

    sequence: int
    term: int


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest as it was read, to be replaced."""

    manifest: Manifest
    revision: Revision


@dataclass(frozen=True, slots=True)
class ManifestWrite:
    """A manifest to write in place of the one that was read.

    Attributes:
        replaces: what stood when it was read; None where there was none.
    """

    manifest: Manifest
    replaces: Revision | None


class SearchIndex(Protocol):
    """The read side: searchable state only."""

    async def search(self, searches: Sequence[HybridSearch]) -> list[Windows]:
        """Both legs of each search, in one round trip.

        Raises:
            IndexUnavailable: see there.
        """
        ...

    async def fetch(self, hits: Sequence[Hit]) -> dict[str, StoredChunk]:
        """The passages by chunk id; one that is no longer there is absent."""
        ...

    async def manifests(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, Manifest]:
        """Current manifests, in real time; one that never was is absent."""
        ...

    async def count_chunks(self, key: DocumentKey) -> int:
        """How many passages of a document can be found."""
        ...

    async def positions(self, tenant: str) -> dict[int, int]:
        """Partition → offset that was told to ``advance`` for the tenant: up to there everything has ended."""
        ...


@dataclass(frozen=True, slots=True)
class FieldStatistics:
    """Term statistics of the lexical field, summed over the shards: what a search scores with.

    Attributes:
        document_count: passages that have the field. Removed ones count until the index merges them away.
        total_length: terms in all of them.
        frequencies: term → passages that hold it, of the terms asked for.
    """

    document_count: int
    total_length: int
    frequencies: Mapping[str, int]


class TermIndex(Protocol):
    """What the index makes of texts, for those who compute its scores: searchable state only."""

    async def with_vectors(self, hits: Sequence[Hit]) -> dict[str, ChunkWrite]:
        """Passages with their vectors, by chunk id; one that is not there is absent. Scores of the hits are ignored."""
        ...

    async def term_counts(self, hits: Sequence[Hit]) -> dict[str, Mapping[str, int]]:
        """How often each passage holds each term, by chunk id; one that is not there is absent."""
        ...

    async def chunk_ids(self, key: DocumentKey) -> tuple[str, ...]:
        """See ``DocumentIndex.chunk_ids``."""
        ...

    async def analysed(self, texts: Sequence[str]) -> list[Mapping[str, int]]:
        """The terms of questions, with how often each occurs."""
        ...

    async def statistics(self, terms: Collection[str]) -> FieldStatistics:
        """Statistics of this moment."""
        ...


class DocumentIndex(Protocol):
    """The write side."""

    async def manifests(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, Manifest]:
        """Current manifests, in real time; one that never was is absent."""
        ...

    async def standing(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, StoredManifest]:
        """As ``manifests``, for a writer."""
        ...

    async def put_manifests(self, writes: Sequence[ManifestWrite]) -> list[Revision | None]:
        """Write each manifest whose predecessor still stands, and return its revision; None where another came before.

        After a failure some may be written.
        """
        ...

    async def apply(self, changes: Sequence[ChunkChange]) -> list[str | None]:
        """Write and remove passages and make the touched shards searchable before returning.

        Stale writes (a newer version stands) count as done. Nothing is removed before all passages of its change are
        taken. Per change: None, or why the index refuses its content; of a refused change nothing is left, and what it
        was to remove is there.
        """
        ...

    async def enforce(self, change: ChunkChange) -> None:
        """As ``apply``, for passages that were in the index before: none of them is taken back.

        Raises:
            IndexUnavailable: see there; also if the index refuses one.
        """
        ...

    async def read_passages(self, hits: Sequence[Hit]) -> dict[str, ChunkWrite]:
        """Passages in real time, searchable or not, by chunk id; one that is not there is absent."""
        ...

    async def passages(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, list[FoundPassage]]:
        """All searchable passages of documents, for want of a manifest; a document without any is absent."""
        ...

    async def advance(self, positions: Mapping[tuple[str, int], int]) -> None:
        """Note that everything in a lane has ended, and is searchable as it ended.

        Args:
            positions: (tenant, partition) → offset of the last event that has. One that is lower than what was told
                before changes nothing.
        """
        ...

    async def chunk_ids(self, key: DocumentKey) -> tuple[str, ...]:
        """Ids of all of a document's searchable passages, for want of a manifest."""
        ...

    async def stored_vectors(self, keys: Sequence[str]) -> dict[str, Vector]:
        """Vectors stored earlier, by key; absent where none is."""
        ...

    async def store_vectors(self, vectors: Mapping[str, Vector]) -> None:
        """Keep vectors for the next time the same text comes."""
        ...

    async def live_documents(
        self, tenant: str, *, connector: str | None, after: str | None, limit: int
    ) -> list[Manifest]:
        """Manifests of the tenant's live documents in the order of their ids (by code points), some at a time.

        A claim counts as what it is to replace, or else as what it is to become. The first page (``after`` None)
        reflects every write before the call.

        Args:
            tenant: whose.
            connector: only those that it owns; None for all.
            after: only ids greater than this one.
            limit: at most so many.
        """
        ...

    def scan_manifests(self) -> AsyncIterator[Manifest]:
        """Every manifest, tombstones too, in no order."""
        ...

    def scan_chunks(self) -> AsyncIterator[ScannedChunk]:
        """Every searchable passage, in no order."""
        ...

    async def delete_chunks(self, hits: Sequence[Hit]) -> None:
        """Remove passages that no manifest knows (repair) and refresh."""
        ...
