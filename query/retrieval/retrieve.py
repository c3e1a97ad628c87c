"""From a question to passages: embed, search both legs, fuse, fetch, and see that no two versions are mixed."""

from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Final

from infra.embedding.port import Embedder
from infra.opensearch.port import SearchIndex
from query.overload.admission import Admission
from query.retrieval.fusion import Candidate, fuse
from query.retrieval.passage_cache import PassageCache
from query.retrieval.version_check import VersionCheck
from query.telemetry.metrics import QueryMetrics
from schemas.documents import DocumentKey, MetadataValue
from schemas.index import StoredChunk
from schemas.search import Access, Hit, HybridSearch, Vector, Windows

VECTORS_KEPT: Final = 4_096
"""Vectors of recent questions; about 6 MB at 384 dimensions. Text and model decide a vector, so none ever ages."""

PASSAGES_KEPT_BYTES: Final = 64_000_000

LOOKS: Final = 3
"""How often to search where what is found is just being replaced."""

Passages = tuple[tuple[Candidate, StoredChunk], ...]
"""Best first, each with the place that it was found at."""


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What was found.

    Attributes:
        search: what was asked of the index; its window is deeper than what is fused.
        windows: both legs, as the index gave them.
        passages: see there.
    """

    search: HybridSearch
    windows: Windows
    passages: Passages

    @property
    def sources(self) -> tuple[tuple[str, int], ...]:
        """Chunk id and version of each passage."""
        return tuple((chunk.chunk_id, chunk.version) for _, chunk in self.passages)


class Retrieval:
    """Hybrid retrieval over the searchable state of the index.

    Args:
        index: to search.
        embedder: the model of its vectors.
        metrics: where stages are timed.
        window: places of each leg to fuse.
        kept: places of each leg to keep with the answer, as evidence of what later changes do to it.
        rrf_k: constant of the fusion.
        admission: says how many are retrieved at a time; without, all are.
    """

    def __init__(
        self,
        *,
        index: SearchIndex,
        embedder: Embedder,
        metrics: QueryMetrics,
        window: int,
        kept: int,
        rrf_k: int,
        admission: Admission | None = None,
    ) -> None:
        self._index = index
        self._versions = VersionCheck(index)
        self._embedder = embedder
        self._metrics = metrics
        self._window = window
        self._kept = kept
        self._rrf_k = rrf_k
        self._admission = admission
        self._vectors: OrderedDict[str, Vector] = OrderedDict()
        self._read = PassageCache(max_bytes=PASSAGES_KEPT_BYTES)

    @property
    def has_room(self) -> bool:
        """Whether there is time for what can be left undone."""
        return self._admission is None or self._admission.has_room

    def is_full(self, tenant: str) -> bool:
        """Whether one more question of the tenant would be refused at once."""
        return self._admission is not None and self._admission.is_full(tenant)

    async def retrieve(
        self,
        question: str,
        access: Access,
        *,
        top_k: int,
        filters: Mapping[str, MetadataValue | tuple[MetadataValue, ...]],
        exact: bool = False,
    ) -> Retrieved:
        """The best passages that ``access`` may see, at most ``top_k``; ``exact`` as in ``HybridSearch``.

        Raises:
            EmbeddingError: the question has no vector.
            IndexUnavailable: the index cannot answer now; or ``Overloaded``.
        """
        async with self.turn(question, access.tenant) as vector:
            return await self.find(question, vector, access, top_k=top_k, filters=filters, exact=exact)

    @asynccontextmanager
    async def turn(self, question: str, tenant: str) -> AsyncIterator[Vector]:
        """Wait until the question may be retrieved: all of what ``retrieve`` does before it searches; ``find`` in it.

        Raises:
            EmbeddingError: the question has no vector.
            Overloaded: there is no place, and will be none soon.
        """
        async with self._admission.admitted(tenant) if self._admission else nullcontext():
            yield await self._vector(question)

    async def find(
        self,
        question: str,
        vector: Vector,
        access: Access,
        *,
        top_k: int,
        filters: Mapping[str, MetadataValue | tuple[MetadataValue, ...]],
        exact: bool = False,
    ) -> Retrieved:
        """As ``retrieve``, of a question whose turn it is."""
        fused = max(self._window, top_k)
        search = HybridSearch(question, vector, access, max(self._kept, fused), filters, exact)
        written: dict[DocumentKey, frozenset[str]] = {}
        for _ in range(LOOKS):
            with self._metrics.stage("search"):
                [windows] = await self._index.search([search])
            with self._metrics.stage("fetch"):
                candidates = fuse(Windows(windows.vector[:fused], windows.lexical[:fused]), k=self._rrf_k)
                passages, whole = await self._passages(candidates, access, top_k, written)
            if whole:
                break
        return Retrieved(search, windows, passages)

    async def _vector(self, question: str) -> Vector:
        vector = self._vectors.get(question)
        if vector is None:
            with self._metrics.stage("embed"):
                vector = await self._embedder.embed_query(question)
            self._vectors[question] = vector
            if len(self._vectors) > VECTORS_KEPT:
                self._vectors.popitem(last=False)
        self._vectors.move_to_end(question)
        return vector

    async def _passages(
        self, candidates: Sequence[Candidate], access: Access, top_k: int, written: dict[DocumentKey, frozenset[str]]
    ) -> tuple[Passages, bool]:
        """The best passages, without two versions of a document among them.

        Args:
            candidates: of one search.
            access: of the reader.
            top_k: how many.
            written: document → passages of a version which were all written before that search; is added to.

        Returns:
            The passages; and whether nothing is missing, which another search would find.
        """
        whole = True
        kept: dict[DocumentKey, frozenset[str]] = {}
        while True:
            wanted = [one for one in candidates if one.hit.chunk_id in kept.get(one.hit.key, (one.hit.chunk_id,))]
            passages, vanished = await self._fetch(wanted, access, top_k)
            whole = whole and not vanished
            mixed = await self._versions.mixed(chunk for _, chunk in passages if chunk.key not in kept)
            if not mixed:
                return tuple(passages), whole
            for manifest in mixed:
                serving = None if manifest.complete else await self._versions.serving(manifest)
                serves = frozenset(manifest.chunks) if serving is None else serving
                if serving is None or (manifest.previous and manifest.previous.gone):
                    # The search may have come before the last of them was written, also where a writer was stopped
                    # and another one has found all of them.
                    whole = whole and written.get(manifest.key) == serves
                    written[manifest.key] = serves
                kept[manifest.key] = serves

    async def _fetch(
        self, candidates: Sequence[Candidate], access: Access, top_k: int
    ) -> tuple[list[tuple[Candidate, StoredChunk]], bool]:
        """Passages that are still there, the next best in place of those that are not; and whether any are not."""
        found: list[tuple[Candidate, StoredChunk]] = []
        vanished = False
        taken = 0
        while len(found) < top_k and taken < len(candidates):
            wanted = candidates[taken : taken + top_k - len(found)]
            taken += len(wanted)
            chunks = await self._passages_of([candidate.hit for candidate in wanted])
            vanished = vanished or len(chunks) < len(wanted)
            for candidate in wanted:
                chunk = chunks.get(candidate.hit.chunk_id)
                if chunk is not None and _may_see(access, chunk):
                    found.append((candidate, chunk))
        return found, vanished

    async def _passages_of(self, hits: Sequence[Hit]) -> dict[str, StoredChunk]:
        """The passages as they were found; those that are read only now, as they are now."""
        known = {hit.chunk_id: chunk for hit in hits if (chunk := self._read.get(hit)) is not None}
        unread = [hit for hit in hits if hit.chunk_id not in known]
        if unread:
            read = await self._index.fetch(unread)
            for hit in unread:
                if (chunk := read.get(hit.chunk_id)) is not None:
                    self._read.put(hit, chunk)
                    known[hit.chunk_id] = chunk
        return known


def _may_see(access: Access, chunk: StoredChunk) -> bool:
    """Asked again after the search: a passage keeps its id when only the groups of its document change (I7)."""
    allowed = not chunk.groups or not set(chunk.groups).isdisjoint(access.groups)
    return allowed and chunk.tenant == access.tenant
