"""From a question to passages: embed, search both legs, fuse, fetch."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from infra.embedding.port import Embedder
from infra.opensearch.port import Access, HybridSearch, SearchIndex, Vector, Windows
from query.core.fusion import Candidate, fuse
from query.metrics import QueryMetrics
from schemas.documents import MetadataValue
from schemas.index import StoredChunk

VECTORS_KEPT: Final = 4_096
"""Vectors of recent questions; about 6 MB at 384 dimensions. Text and model decide a vector, so none ever ages."""


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What was found.

    Attributes:
        windows: both legs, as the index gave them.
        passages: best first, each with the place that it was found at.
        query_vector: unit length, shape (dimension,).
    """

    windows: Windows
    passages: tuple[tuple[Candidate, StoredChunk], ...]
    query_vector: Vector


class Retrieval:
    """Hybrid retrieval over the searchable state of the index.

    Args:
        index: to search.
        embedder: the model of its vectors.
        metrics: where stages are timed.
        window: places of each leg to fuse.
        rrf_k: constant of the fusion.
    """

    def __init__(
        self, *, index: SearchIndex, embedder: Embedder, metrics: QueryMetrics, window: int, rrf_k: int
    ) -> None:
        self._index = index
        self._embedder = embedder
        self._metrics = metrics
        self._window = window
        self._rrf_k = rrf_k
        self._vectors: OrderedDict[str, Vector] = OrderedDict()

    async def retrieve(
        self,
        question: str,
        access: Access,
        *,
        top_k: int,
        filters: Mapping[str, MetadataValue | tuple[MetadataValue, ...]],
    ) -> Retrieved:
        """The best passages that ``access`` may see, at most ``top_k``.

        Raises:
            EmbeddingError: the question has no vector.
            IndexUnavailable: the index cannot answer now.
        """
        vector = await self._vector(question)
        search = HybridSearch(question, vector, access, max(self._window, top_k), filters)
        with self._metrics.stage("search"):
            [windows] = await self._index.search([search])
        candidates = fuse(windows, k=self._rrf_k)
        with self._metrics.stage("fetch"):
            passages = await self._fetch(candidates, access, top_k)
        return Retrieved(windows, tuple(passages), vector)

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

    async def _fetch(
        self, candidates: Sequence[Candidate], access: Access, top_k: int
    ) -> list[tuple[Candidate, StoredChunk]]:
        """Passages that are still there; the next best take the place of those that are not."""
        found: list[tuple[Candidate, StoredChunk]] = []
        taken = 0
        while len(found) < top_k and taken < len(candidates):
            wanted = candidates[taken : taken + top_k - len(found)]
            taken += len(wanted)
            chunks = await self._index.fetch([candidate.hit for candidate in wanted])
            for candidate in wanted:
                chunk = chunks.get(candidate.hit.chunk_id)
                if chunk is not None and _may_see(access, chunk):
                    found.append((candidate, chunk))
        return found


def _may_see(access: Access, chunk: StoredChunk) -> bool:
    """Asked again after the search: a passage keeps its id when only the groups of its document change (I7)."""
    allowed = not chunk.groups or not set(chunk.groups).isdisjoint(access.groups)
    return allowed and chunk.tenant == access.tenant
