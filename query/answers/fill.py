"""Filling an answer: admission, re-read, search, generate, store."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from infra.embedding.port import EmbeddingError
from infra.generation.port import GenerationError, GenerationThrottled, Generator, SourceText
from infra.opensearch.port import IndexUnavailable
from infra.redis.entry import Entry
from infra.redis.port import AnswerCache, CacheUnavailable
from query.cache.freshness import FreshnessReader, ReadSnapshot, SharedRead
from query.cache.key import normalised
from query.overload.token_budget import GenerationBudget, OverBudget
from query.retrieval.retrieve import Retrieval, Retrieved
from query.telemetry.metrics import QueryMetrics
from schemas.queries import GeneratedAnswer, QueryRequest, Unanswered
from schemas.search import Access, Vector

_STORE_ATTEMPTS: Final = 3
"""Attempts to store an answer that loses the epoch race, before it is served without being stored."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AnswerStore:
    """Where filled answers are stored.

    Attributes:
        cache: Redis answer cache.
        ttl_s: maximum time to live.
    """

    cache: AnswerCache
    ttl_s: int


class AnswerFill:
    """The steps of a fill. The order keeps answers true: freshness read, search, store under the epoch that was read.

    Args:
        freshness: repeats an old read as the search starts.
        retrieval: finds passages.
        generator: writes answers.
        store: keeps answers.
        metrics: counts failures and lost epoch races.
        budget: generation budget of each tenant; None for no limit.
    """

    def __init__(
        self,
        *,
        freshness: FreshnessReader,
        retrieval: Retrieval,
        generator: Generator,
        store: AnswerStore,
        metrics: QueryMetrics,
        budget: GenerationBudget | None = None,
    ) -> None:
        self._freshness = freshness
        self._retrieval = retrieval
        self._generator = generator
        self._store = store
        self._metrics = metrics
        self._budget = budget

    async def retrieve(self, request: QueryRequest, access: Access, key: str, read: SharedRead) -> Retrieved | bytes:
        """The passages to answer from; or the answer itself, if another process stored it while this one was queued.

        Raises:
            EmbeddingError: the question has no vector.
            IndexUnavailable: the index is unavailable, or the process is overloaded.
        """
        async with self._retrieval.admitted(normalised(request.query), access.tenant) as vector:
            await self._freshness.reread(access.tenant, key, read)
            return read.snapshot.cached or await self._search(request, access, vector)

    async def generate(
        self, request: QueryRequest, access: Access, retrieved: Retrieved
    ) -> GeneratedAnswer | Unanswered:
        """The written answer, or why there is none."""
        try:
            self.spend(access.tenant)
            with self._metrics.stage("generate"):
                return await self._generator.answer(request.query, sources_of(retrieved), retrieved.search.vector)
        except GenerationError as error:
            return self.unanswered(error)

    def spend(self, tenant: str) -> None:
        """Take one answer from the tenant's generation budget.

        Raises:
            OverBudget: the budget is exhausted.
        """
        if self._budget is not None:
            self._budget.spend(tenant)

    def unanswered(self, error: GenerationError) -> Unanswered:
        """Count and log a generation failure; returns the reason for the response."""
        reason = _reason(error)
        self._metrics.generation_failures.labels(reason).inc()
        _log.warning("generation_failed", reason=str(error))
        return reason

    async def store(
        self,
        request: QueryRequest,
        access: Access,
        key: str,
        snapshot: ReadSnapshot,
        *,
        body: bytes,
        retrieved: Retrieved,
    ) -> None:
        """Store an answer that was retrieved after ``snapshot``, unless the epoch has moved.

        A change that moved the epoch usually alters other answers. A new search that finds the same sources proves it,
        and costs no generation. Without a generated answer it is worth that only while there is spare capacity.
        """
        if snapshot.epoch is None:
            return
        epoch, positions = snapshot.epoch, snapshot.as_of.positions
        try:
            for attempt in range(_STORE_ATTEMPTS):
                if attempt:
                    if not (request.generate or self._retrieval.has_spare_capacity):
                        break
                    async with self._retrieval.admitted(normalised(request.query), access.tenant) as vector:
                        lookup = await self._store.cache.lookup(access.tenant, key)
                        epoch, positions = lookup.epoch, dict(lookup.positions)
                        again = await self._search(request, access, vector)
                    if again.sources != retrieved.sources:
                        break
                    retrieved = again
                entry, evidence = _entry(body, retrieved, request.top_k, positions).encode()
                if await self._store.cache.store(
                    access.tenant, key, entry, epoch=epoch, ttl_s=self._store.ttl_s, evidence=evidence
                ):
                    return
        except (CacheUnavailable, EmbeddingError, IndexUnavailable):
            return  # the answer is valid without being stored; the next read counts and logs the failure
        self._metrics.lost_epoch_races.inc()

    async def _search(self, request: QueryRequest, access: Access, vector: Vector) -> Retrieved:
        return await self._retrieval.search(
            normalised(request.query), vector, access, top_k=request.top_k, filters=request.filters or {}
        )


def sources_of(retrieved: Retrieved) -> list[SourceText]:
    """The numbered sources that a generator answers from."""
    numbered = enumerate(retrieved.passages, start=1)
    return [SourceText(number, chunk.text, chunk.title) for number, (_, chunk) in numbered]


def _reason(error: GenerationError) -> Unanswered:
    match error:
        case OverBudget():
            return Unanswered.LIMITED
        case GenerationThrottled():
            return Unanswered.BUSY
    return Unanswered.FAILED


def _entry(body: bytes, retrieved: Retrieved, top_k: int, positions: Mapping[int, int]) -> Entry:
    return Entry(
        response=body,
        search=retrieved.search,
        top_k=top_k,
        sources=retrieved.sources,
        vector_candidates=retrieved.candidates.vector,
        lexical_candidates=retrieved.candidates.lexical,
        filled_ms=time.time() * 1_000,
        positions=positions,
    )
