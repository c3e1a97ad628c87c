"""Hybrid retrieval: embed the question, search, fuse, fetch passages, and check that versions are not mixed."""

from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Final

from infra.embedding.port import Embedder
from infra.opensearch.port import SearchIndex
from query.overload.admission import Admission
from query.retrieval.fusion import FusedHit, fuse
from query.retrieval.passage_cache import PassageCache
from query.retrieval.version_check import VersionCheck
from query.telemetry.metrics import QueryMetrics
from schemas.documents import DocumentKey, MetadataValue
from schemas.index import StoredChunk
from schemas.search import Access, Candidates, Hit, HybridSearch, Vector

MAX_CACHED_VECTORS: Final = 4_096
"""Recent question vectors; about 6 MB at 384 dimensions. Text and model determine a vector, so none becomes stale."""

PASSAGE_CACHE_BYTES: Final = 64_000_000

MAX_SEARCHES: Final = 3
"""Searches per question while its results are being replaced."""

Passages = tuple[tuple[FusedHit, StoredChunk], ...]
"""Passages, best first, each with its position in the fused ranking."""


@dataclass(frozen=True, slots=True)
class FusionPolicy:
    """How deep to search, and how to fuse.

    Attributes:
        candidates: candidates of each retriever to fuse.
        kept: candidates of each retriever to keep with a cached answer, as evidence for its invalidation.
        rrf_k: rank constant of reciprocal rank fusion.
    """

    candidates: int
    kept: int
    rrf_k: int


@dataclass(frozen=True, slots=True)
class Retrieved:
    """Result of a retrieval.

    Attributes:
        search: the search. It asks for more candidates than are fused.
        candidates: candidates of both retrievers, as returned by the index.
        passages: the best passages.
    """

    search: HybridSearch
    candidates: Candidates
    passages: Passages

    @property
    def sources(self) -> tuple[tuple[str, int], ...]:
        """Chunk id and version of each passage."""
        return tuple((chunk.chunk_id, chunk.version) for _, chunk in self.passages)


class Retrieval:
    """Hybrid retrieval from the searchable state of the index.

    Args:
        index: index to search.
        embedder: embedding model of the index.
        metrics: measures the stages.
        policy: depth of the search, and fusion.
        admission: limits concurrent retrievals; None for unlimited.
    """

    def __init__(
        self,
        *,
        index: SearchIndex,
        embedder: Embedder,
        metrics: QueryMetrics,
        policy: FusionPolicy,
        admission: Admission | None = None,
    ) -> None:
        self._index = index
        self._versions = VersionCheck(index)
        self._embedder = embedder
        self._metrics = metrics
        self._policy = policy
        self._admission = admission
        self._vectors: OrderedDict[str, Vector] = OrderedDict()
        self._passage_cache = PassageCache(max_bytes=PASSAGE_CACHE_BYTES)

    @property
    def has_spare_capacity(self) -> bool:
        """Whether optional work, such as audits and refreshes, may run."""
        return self._admission is None or self._admission.has_spare_capacity

    def is_at_capacity(self, tenant: str) -> bool:
        """Whether a retrieval for the tenant would be rejected now."""
        return self._admission is not None and self._admission.is_at_capacity(tenant)

    async def retrieve(
        self,
        question: str,
        access: Access,
        *,
        top_k: int,
        filters: Mapping[str, MetadataValue | tuple[MetadataValue, ...]],
        exact: bool = False,
    ) -> Retrieved:
        """The best passages visible to ``access``, at most ``top_k``; ``exact`` as in ``HybridSearch``.

        Raises:
            EmbeddingError: the question has no vector.
            IndexUnavailable: the index is unavailable; or ``Overloaded``.
        """
        async with self.admitted(question, access.tenant) as vector:
            return await self.search(question, vector, access, top_k=top_k, filters=filters, exact=exact)

    @asynccontextmanager
    async def admitted(self, question: str, tenant: str) -> AsyncIterator[Vector]:
        """Hold a retrieval slot; yields the question's vector for ``search``.

        Raises:
            EmbeddingError: the question has no vector.
            Overloaded: no slot became free in time.
        """
        async with self._admission.admitted(tenant) if self._admission else nullcontext():
            yield await self._vector(question)

    async def search(
        self,
        question: str,
        vector: Vector,
        access: Access,
        *,
        top_k: int,
        filters: Mapping[str, MetadataValue | tuple[MetadataValue, ...]],
        exact: bool = False,
    ) -> Retrieved:
        """As ``retrieve``, for the holder of a retrieval slot."""
        depth = max(self._policy.candidates, top_k)
        search = HybridSearch(question, vector, access, max(self._policy.kept, depth), filters, exact)
        written: dict[DocumentKey, frozenset[str]] = {}
        for _ in range(MAX_SEARCHES):
            with self._metrics.stage("search"):
                [candidates] = await self._index.search([search])
            with self._metrics.stage("fetch"):
                fused = fuse(Candidates(candidates.vector[:depth], candidates.lexical[:depth]), k=self._policy.rrf_k)
                passages, is_complete = await self._passages(fused, access, top_k, written)
            if is_complete:
                break
        return Retrieved(search, candidates, passages)

    async def _vector(self, question: str) -> Vector:
        vector = self._vectors.get(question)
        if vector is None:
            with self._metrics.stage("embed"):
                vector = await self._embedder.embed_query(question)
            self._vectors[question] = vector
            if len(self._vectors) > MAX_CACHED_VECTORS:
                self._vectors.popitem(last=False)
        self._vectors.move_to_end(question)
        return vector

    async def _passages(
        self, fused: Sequence[FusedHit], access: Access, top_k: int, written: dict[DocumentKey, frozenset[str]]
    ) -> tuple[Passages, bool]:
        """The best passages, without two versions of any document.

        Args:
            fused: fused ranking of one search.
            access: access of the reader.
            top_k: maximum number of passages.
            written: document → passages of a version that were all written before that search. Updated.

        Returns:
            The passages, and False if another search would find missing ones.
        """
        is_complete = True
        selected: dict[DocumentKey, frozenset[str]] = {}
        while True:
            eligible = [hit for hit in fused if hit.hit.chunk_id in selected.get(hit.hit.key, (hit.hit.chunk_id,))]
            passages, any_missing = await self._fetch(eligible, access, top_k)
            is_complete = is_complete and not any_missing
            mixed = await self._versions.mixed(chunk for _, chunk in passages if chunk.key not in selected)
            if not mixed:
                return tuple(passages), is_complete
            for manifest in mixed:
                searchable = None if manifest.complete else await self._versions.searchable_version(manifest)
                version = frozenset(manifest.chunks) if searchable is None else searchable
                if searchable is None or (manifest.previous and manifest.previous.gone):
                    # The search may precede the last write of the version, also if a writer was stopped and another one
                    # has read all its passages.
                    is_complete = is_complete and written.get(manifest.key) == version
                    written[manifest.key] = version
                selected[manifest.key] = version

    async def _fetch(
        self, fused: Sequence[FusedHit], access: Access, top_k: int
    ) -> tuple[list[tuple[FusedHit, StoredChunk]], bool]:
        """The best passages that still exist, and whether any hit has none."""
        passages: list[tuple[FusedHit, StoredChunk]] = []
        any_missing = False
        offset = 0
        while len(passages) < top_k and offset < len(fused):
            page = fused[offset : offset + top_k - len(passages)]
            offset += len(page)
            chunks = await self._chunks([hit.hit for hit in page])
            any_missing = any_missing or len(chunks) < len(page)
            for hit in page:
                chunk = chunks.get(hit.hit.chunk_id)
                if chunk is not None and _is_visible(access, chunk):
                    passages.append((hit, chunk))
        return passages, any_missing

    async def _chunks(self, hits: Sequence[Hit]) -> dict[str, StoredChunk]:
        """Passages by chunk id: cached ones as the search returned them, fetched ones in their current state."""
        chunks = {hit.chunk_id: chunk for hit in hits if (chunk := self._passage_cache.get(hit)) is not None}
        uncached = [hit for hit in hits if hit.chunk_id not in chunks]
        if uncached:
            fetched = await self._index.fetch(uncached)
            for hit in uncached:
                if (chunk := fetched.get(hit.chunk_id)) is not None:
                    self._passage_cache.put(hit, chunk)
                    chunks[hit.chunk_id] = chunk
        return chunks


def _is_visible(access: Access, chunk: StoredChunk) -> bool:
    """Access check of a fetched passage. Its groups may have changed since the search under the same chunk id (I7)."""
    is_allowed = not chunk.groups or not set(chunk.groups).isdisjoint(access.groups)
    return is_allowed and chunk.tenant == access.tenant
