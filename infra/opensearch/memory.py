"""In-memory document index, for tests and simulation."""

import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from typing_extensions import override

from infra.opensearch.port import (
    ChunkChange,
    ChunkWrite,
    DocumentIndex,
    FieldStatistics,
    FoundPassage,
    IndexUnavailable,
    ManifestWrite,
    Revision,
    ScannedChunk,
    SearchIndex,
    StoredManifest,
    TermIndex,
)
from schemas.documents import DocumentKey, LifeState
from schemas.index import Manifest, StoredChunk
from schemas.search import Candidates, Hit, HybridSearch, Vector, allows

_WORD: Final = re.compile(r"\w+")
_STOP_WORDS: Final = frozenset(("a", "an", "and", "are", "for", "in", "is", "it", "of", "on", "or", "the", "to"))
_BM25_K1: Final = 1.2
_BM25_B: Final = 0.75


@dataclass(frozen=True, slots=True)
class _Written:
    """A passage and its write version, which differs from the version of its document."""

    write: ChunkWrite
    version: int


@dataclass(frozen=True, slots=True)
class _Deleted:
    version: int
    at_s: float


async def _no_pause() -> None:
    pass


class MemoryIndex(DocumentIndex, SearchIndex, TermIndex):
    """In-memory document index.

    Like OpenSearch, it retains external versions of deleted ids for a limited time, and writes become searchable with
    a refresh. A refresh includes only the documents of its request; in OpenSearch it includes whole shards.

    Attributes:
        available: while False, every method raises ``IndexUnavailable``.

    Args:
        dimension: vectors of another length are rejected.
        gc_deletes_s: retention of versions of deleted passages.
        now_s: clock of the index, in seconds.
        pause: awaited before every single write of a request; if it raises, the request is applied partially.
    """

    def __init__(
        self,
        dimension: int,
        *,
        gc_deletes_s: float = 3_600.0,
        now_s: Callable[[], float] = time.monotonic,
        pause: Callable[[], Awaitable[None]] = _no_pause,
    ) -> None:
        self.available = True
        self._dimension = dimension
        self._gc_deletes_s = gc_deletes_s
        self._now_s = now_s
        self._pause = pause
        self._written: dict[str, _Written | _Deleted] = {}
        self._searchable: dict[str, ChunkWrite] = {}
        self._manifests: dict[DocumentKey, StoredManifest] = {}
        self._manifest_writes = 0
        self._positions: dict[tuple[str, int], int] = {}
        self._vectors: dict[str, Vector] = {}

    # Read side

    @override
    async def search(self, searches: Sequence[HybridSearch]) -> list[Candidates]:
        # Exact cosine, and BM25 with statistics of the whole index.
        self._check_available()
        return [self._search(search) for search in searches]

    @override
    async def fetch(self, hits: Sequence[Hit]) -> dict[str, StoredChunk]:
        self._check_available()
        found = {hit.chunk_id: self._searchable[hit.chunk_id] for hit in hits if hit.chunk_id in self._searchable}
        return {chunk_id: write.chunk.model_copy(update={"text_sha256": ""}) for chunk_id, write in found.items()}

    @override
    async def count_chunks(self, key: DocumentKey) -> int:
        self._check_available()
        return sum(write.chunk.key == key for write in self._searchable.values())

    @override
    async def positions(self, tenant: str) -> dict[int, int]:
        # In real time; OpenSearch may lag by ``MANIFESTS_REFRESH_S``.
        self._check_available()
        return {partition: offset for (owner, partition), offset in self._positions.items() if owner == tenant}

    @override
    async def live_documents(
        self, tenant: str, *, connector: str | None, after: str | None, limit: int
    ) -> list[Manifest]:
        self._check_available()
        found = [
            one.manifest.listed
            for key, one in self._manifests.items()
            if key.tenant == tenant
            and one.manifest.listed.state is LifeState.LIVE
            and connector in {None, one.manifest.listed.connector}
            and (after is None or key.document_id.encode() > after.encode())
        ]
        return sorted(found, key=lambda manifest: manifest.document_id.encode())[:limit]

    # Terms

    @override
    async def with_vectors(self, hits: Sequence[Hit]) -> dict[str, ChunkWrite]:
        self._check_available()
        return {hit.chunk_id: self._searchable[hit.chunk_id] for hit in hits if hit.chunk_id in self._searchable}

    @override
    async def term_counts(self, hits: Sequence[Hit]) -> dict[str, Mapping[str, int]]:
        return {chunk_id: Counter(_terms(one.chunk)) for chunk_id, one in (await self.with_vectors(hits)).items()}

    @override
    async def analyze(self, texts: Sequence[str]) -> list[Mapping[str, int]]:
        self._check_available()
        return [Counter(_words(text)) for text in texts]

    @override
    async def statistics(self, terms: Collection[str]) -> FieldStatistics:
        self._check_available()
        passages = [_terms(one.chunk) for one in self._searchable.values()]
        frequencies = Counter(term for passage in passages for term in set(passage))
        return FieldStatistics(len(passages), sum(map(len, passages)), {term: frequencies[term] for term in terms})

    # Write side

    @override
    async def manifests(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, Manifest]:
        return {key: found.manifest for key, found in (await self.stored_manifests(keys)).items()}

    @override
    async def stored_manifests(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, StoredManifest]:
        self._check_available()
        return {key: self._manifests[key] for key in keys if key in self._manifests}

    @override
    async def put_manifests(self, writes: Sequence[ManifestWrite]) -> list[Revision | None]:
        self._check_available()
        put: list[Revision | None] = []
        for write in writes:
            await self._pause()
            key = write.manifest.key
            current = self._manifests.get(key)
            revision: Revision | None = None
            if (current.revision if current else None) == write.replaces:
                self._manifest_writes += 1
                revision = Revision(self._manifest_writes, 1)
                self._manifests[key] = StoredManifest(write.manifest, revision)
            put.append(revision)
        return put

    @override
    async def apply(self, changes: Sequence[ChunkChange]) -> list[str | None]:
        self._check_available()
        rejected: list[str | None] = []
        for change in changes:
            rejected.append(await self._put(change.put, change.version))
            await self._remove(change.remove if rejected[-1] is None else change.put_ids, change.version)
        await self._pause()
        self._refresh(change.key for change in changes)
        return rejected

    @override
    async def enforce(self, change: ChunkChange) -> None:
        self._check_available()
        if (rejection := await self._put(change.put, change.version)) is not None:
            raise IndexUnavailable(f"the index rejected a passage that it had accepted before: {rejection}")
        await self._remove(change.remove, change.version)
        await self._pause()
        self._refresh([change.key])

    @override
    async def read_passages(self, hits: Sequence[Hit]) -> dict[str, ChunkWrite]:
        self._check_available()
        found = {hit.chunk_id: self._written.get(hit.chunk_id) for hit in hits}
        return {chunk_id: one.write for chunk_id, one in found.items() if isinstance(one, _Written)}

    @override
    async def passages(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, list[FoundPassage]]:
        self._check_available()
        found: dict[DocumentKey, list[FoundPassage]] = {}
        for chunk_id, write in self._searchable.items():
            if write.chunk.key in keys:
                bare = write.chunk.model_copy(update={"text": ""})
                found.setdefault(bare.key, []).append(FoundPassage(bare, self._version(chunk_id)))
        return found

    @override
    async def advance(self, positions: Mapping[tuple[str, int], int]) -> None:
        self._check_available()
        for partition, offset in positions.items():
            await self._pause()
            self._positions[partition] = max(offset, self._positions.get(partition, offset))

    @override
    async def chunk_ids(self, key: DocumentKey) -> tuple[str, ...]:
        self._check_available()
        return tuple(chunk_id for chunk_id, write in self._searchable.items() if write.chunk.key == key)

    @override
    async def stored_vectors(self, keys: Sequence[str]) -> dict[str, Vector]:
        self._check_available()
        return {key: self._vectors[key].copy() for key in keys if key in self._vectors}

    @override
    async def store_vectors(self, vectors: Mapping[str, Vector]) -> None:
        self._check_available()
        for key, vector in vectors.items():
            await self._pause()
            self._vectors[key] = vector.astype(np.float32)

    # Operators

    @override
    async def scan_manifests(self) -> AsyncIterator[Manifest]:
        self._check_available()
        for stored in list(self._manifests.values()):
            yield stored.manifest

    @override
    async def scan_chunks(self) -> AsyncIterator[ScannedChunk]:
        self._check_available()
        for write in list(self._searchable.values()):
            yield ScannedChunk(write.chunk)

    @override
    async def delete_chunks(self, hits: Sequence[Hit]) -> None:
        self._check_available()
        for hit in hits:
            # A deletion without an external version increments the stored version.
            self._written[hit.chunk_id] = _Deleted(self._version(hit.chunk_id) + 1, self._now_s())
        self._refresh(hit.key for hit in hits)

    async def _remove(self, chunk_ids: Sequence[str], version: int) -> None:
        for chunk_id in chunk_ids:
            await self._pause()
            if self._version(chunk_id) <= version:
                self._written[chunk_id] = _Deleted(version, self._now_s())

    async def _put(self, writes: Sequence[ChunkWrite], version: int) -> str | None:
        rejected = None
        for write in writes:
            await self._pause()
            if write.vector.shape != (self._dimension,):
                rejected = f"the vector has shape {write.vector.shape}, not ({self._dimension},)"
            elif self._version(write.chunk.chunk_id) <= version:
                self._written[write.chunk.chunk_id] = _Written(write, version)
        return rejected

    def _version(self, chunk_id: str) -> int:
        """Version of an id; -1 if the index has none."""
        match self._written.get(chunk_id):
            case _Written(_, version):
                return version
            case _Deleted(version, at_s) if self._now_s() - at_s <= self._gc_deletes_s:
                return version
            case _:
                return -1

    def _refresh(self, keys: Iterable[DocumentKey]) -> None:
        touched = set(keys)
        passages = {chunk_id: one.write for chunk_id, one in self._written.items() if isinstance(one, _Written)}
        self._searchable = {
            **{chunk_id: write for chunk_id, write in self._searchable.items() if write.chunk.key not in touched},
            **{chunk_id: write for chunk_id, write in passages.items() if write.chunk.key in touched},
        }

    def _search(self, search: HybridSearch) -> Candidates:
        passages = list(self._searchable.values())
        weights = _term_weights(search.text, passages)
        average_length = sum(len(_terms(write.chunk)) for write in passages) / max(len(passages), 1)
        vector: list[Hit] = []
        lexical: list[Hit] = []
        for write in passages:
            if allows(search, write.chunk):
                chunk_id, key = write.chunk.chunk_id, write.chunk.key
                written = ("memory", write.chunk.position)
                vector.append(Hit(chunk_id, key, (1 + _cosine(search.vector, write.vector)) / 2, written))
                if (score := _bm25(weights, _terms(write.chunk), average_length)) > 0:
                    lexical.append(Hit(chunk_id, key, score, written))
        return Candidates(_best(vector, search.candidates), _best(lexical, search.candidates))

    def _check_available(self) -> None:
        if not self.available:
            raise IndexUnavailable("the index was made unavailable")


def _best(hits: Iterable[Hit], count: int) -> tuple[Hit, ...]:
    return tuple(sorted(hits, key=lambda hit: (-hit.score, hit.chunk_id))[:count])


def _cosine(one: Vector, other: Vector) -> float:
    return float(np.dot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))


def _words(text: str) -> list[str]:
    return [word.removesuffix("s") for word in _WORD.findall(text.lower()) if word not in _STOP_WORDS]


def _terms(chunk: StoredChunk) -> list[str]:
    return _words(" ".join((chunk.title or "", *chunk.heading_path, chunk.text)))


def _term_weights(text: str, passages: Sequence[ChunkWrite]) -> dict[str, float]:
    query = Counter(_words(text))  # a repeated word has a multiple weight
    counts = Counter(term for write in passages for term in query.keys() & set(_terms(write.chunk)))
    total = len(passages)
    return {term: query[term] * math.log(1 + (total - count + 0.5) / (count + 0.5)) for term, count in counts.items()}


def _bm25(weights: Mapping[str, float], terms: Sequence[str], average_length: float) -> float:
    counts = Counter(terms)
    norm = _BM25_K1 * (1 - _BM25_B + _BM25_B * len(terms) / max(average_length, 1))
    return sum(weight * counts[term] / (counts[term] + norm) for term, weight in weights.items())
