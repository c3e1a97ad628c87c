"""The use case: a question in, an answer with the positions it is true for out."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog

from infra.embedding.port import EmbeddingError
from infra.generation.port import GenerationError, GenerationThrottled, Generator, SourceText
from infra.opensearch.port import IndexUnavailable
from infra.redis.entry import Entry
from infra.redis.port import AnswerCache, CacheUnavailable
from query.answers.refresh_ahead import RefreshOutcome
from query.answers.response import response_body, stamped
from query.cache.freshness import FreshnessReader, ReadSnapshot, SharedRead
from query.cache.key import AnswerMaker, cache_key, normalised
from query.overload.token_budget import GenerationBudget, OverBudget
from query.retrieval.retrieve import Retrieval, Retrieved
from query.telemetry.metrics import QueryMetrics
from query.telemetry.rolling_stats import Served
from schemas.positions import Position
from schemas.queries import GeneratedAnswer, QueryRequest, Unanswered
from schemas.search import Access, Vector

AskedHook = Callable[[str, QueryRequest, Access], None]
"""Told of what is asked for: key, question, and with which access."""

AuditHook = Callable[[str, str, bytes, Mapping[int, int]], None]
"""Told of a hit that goes out: tenant, key, body, positions."""

_log = structlog.get_logger(__name__)

_LEASE_MS: Final = 2_000
"""How long others leave an answer to the process that first missed it, at most."""

_LEASE_LOOK_S: Final = 0.02
_LEASE_LOOKS: Final = 12

_STORE_TRIES: Final = 3
"""How often an answer that changes overtake is tried to be kept, before it is served and forgotten."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A fill under way.

    Attributes:
        look: of all who wait for it.
        body: the answer, as soon as it is made.
        kept: ends when it is stored, or is not to be.
    """

    look: SharedRead
    body: asyncio.Future[bytes]
    kept: asyncio.Task[None]


class AnswerService:
    """Answers from the cache where it can, and fills it where it may.

    The order is what keeps answers true: look (epoch and positions), then retrieve, then store under that epoch. A
    cached answer is true for the positions of the look that found it, as the epoch still stands with them. Who had to
    wait for a turn looks again before the search, or the answer would be as old as that took. Nobody waits for the
    store but who asks the same again before it is done.

    Args:
        freshness: looks before each answer.
        retrieval: finds passages.
        generator: writes answers where asked to.
        cache: keeps answers.
        maker: what decides an answer besides the question.
        metrics: where answers are counted.
        ttl_s: how long an answer is kept at most.
        budget: what a tenant may have written.
        audit: told of every hit.
        asked: told of every question.
    """

    def __init__(
        self,
        *,
        freshness: FreshnessReader,
        retrieval: Retrieval,
        generator: Generator,
        cache: AnswerCache,
        maker: AnswerMaker,
        metrics: QueryMetrics,
        ttl_s: int,
        budget: GenerationBudget | None = None,
        audit: AuditHook | None = None,
        asked: AskedHook = lambda _key, _request, _access: None,
    ) -> None:
        self._asked = asked
        self._freshness = freshness
        self._retrieval = retrieval
        self._generator = generator
        self._cache = cache
        self._maker = maker
        self._metrics = metrics
        self._ttl_s = ttl_s
        self._budget = budget
        self._audit = audit
        self._flights: dict[str, _Flight] = {}
        self._fills: set[asyncio.Task[None]] = set()

    async def answer(self, request: QueryRequest, access: Access) -> bytes:
        """A ``QueryResponse`` as JSON.

        Raises:
            PositionNotReached: ``min_position`` is not reached in time.
            EmbeddingError: the question has no vector.
            IndexUnavailable: nothing is cached and the index cannot answer now.
        """
        began_s = time.perf_counter()
        key, standing = await self.look(request, access)
        earlier = self._flights.get(key)
        if standing.cached is None and earlier is not None and earlier.body.done() and earlier.look.serves(standing):
            await asyncio.wait((earlier.kept,))
            standing = await self._stand(request, access, key)
        body = standing.cached
        if body is None:
            flight = self._fill_once(request, access, key, standing)
            body = await asyncio.shield(flight.body)
            standing = flight.look.seen_by(standing)
        self.served(access.tenant, key, standing)
        query_time_ms = (time.perf_counter() - began_s) * 1_000
        return stamped(body, query_time_ms=query_time_ms, cached=standing.cached is not None, as_of=standing.as_of)

    async def refill(self, request: QueryRequest, access: Access) -> RefreshOutcome:
        """Fill an answer that is not there, and copy it into this process.

        Raises:
            EmbeddingError, IndexUnavailable: as ``answer``.
        """
        key = cache_key(request, access, self._maker)
        standing = await self._freshness.look(access.tenant, key, lease_ms=_LEASE_MS)
        if standing.cached is not None:
            return RefreshOutcome.THERE
        if standing.epoch is not None:
            flight = self._fill_once(request, access, key, standing)
            await asyncio.shield(flight.body)
            await asyncio.wait((flight.kept,))
            standing = await self._freshness.look(access.tenant, key)
        return RefreshOutcome.UNKEPT if standing.cached is None else RefreshOutcome.FILLED

    async def look(self, request: QueryRequest, access: Access) -> tuple[str, ReadSnapshot]:
        """Key of the answer, and where the tenant stands once ``min_position`` is reached; raises as ``answer``."""
        key = cache_key(request, access, self._maker)
        self._asked(key, request, access)
        return key, await self._stand(request, access, key)

    async def _stand(self, request: QueryRequest, access: Access, key: str) -> ReadSnapshot:
        if request.min_position is None:
            return await self._freshness.look(access.tenant, key, lease_ms=_LEASE_MS)
        return await self._freshness.look_from(access.tenant, key, Position.parse(request.min_position))

    def served(self, tenant: str, key: str, standing: ReadSnapshot) -> None:
        """Count an answer that goes out."""
        if self._audit is not None and standing.cached is not None:
            self._audit(tenant, key, standing.cached, standing.as_of.positions)
        served = (
            Served.HIT if standing.cached is not None else Served.UNCACHED if standing.epoch is None else Served.FILLED
        )
        self._metrics.served(served, max(0.0, time.time() * 1_000 - standing.as_of.checked_ms))

    async def retrieve(self, request: QueryRequest, access: Access, key: str, look: SharedRead) -> Retrieved | bytes:
        """The passages to answer from; raises as ``answer`` does.

        Or the answer itself, where somebody else has filled it before its turn came: ``look`` has found it.
        """
        async with self._retrieval.turn(normalised(request.query), access.tenant) as vector:
            await self._freshness.look_again(access.tenant, key, look)
            return look.standing.cached or await self._find(request, access, vector)

    async def _find(self, request: QueryRequest, access: Access, vector: Vector) -> Retrieved:
        return await self._retrieval.find(
            normalised(request.query), vector, access, top_k=request.top_k, filters=request.filters or {}
        )

    def spend(self, tenant: str) -> None:
        """Take an answer from the tenant's budget.

        Raises:
            OverBudget: there is not enough left.
        """
        if self._budget is not None:
            self._budget.spend(tenant)

    async def keep(
        self,
        request: QueryRequest,
        access: Access,
        key: str,
        standing: ReadSnapshot,
        *,
        body: bytes,
        retrieved: Retrieved,
    ) -> None:
        """Store an answer that was retrieved after ``standing``.

        A change that came meanwhile mostly changes other answers: what a new retrieval finds tells, and costs no
        generation. While there is much to do, it is worth that only for a text.
        """
        if standing.epoch is None:
            return
        epoch, positions = standing.epoch, standing.as_of.positions
        try:
            for again in range(_STORE_TRIES):
                if again:
                    if not (request.generate or self._retrieval.has_room):
                        break
                    async with self._retrieval.turn(normalised(request.query), access.tenant) as vector:
                        look = await self._cache.lookup(access.tenant, key)
                        epoch, positions = look.epoch, dict(look.positions)
                        found = await self._find(request, access, vector)
                    if found.sources != retrieved.sources:
                        break
                    retrieved = found
                entry, rest = _entry(body, retrieved, request.top_k, positions).encode()
                if await self._cache.store(access.tenant, key, entry, epoch=epoch, ttl_s=self._ttl_s, rest=rest):
                    return
        except (CacheUnavailable, EmbeddingError, IndexUnavailable):
            return  # the answer is good all the same; the next look counts and reports the failure
        self._metrics.overtaken.inc()

    async def close(self) -> None:
        """End what is still under way for callers that are gone."""
        for fill in self._fills:
            fill.cancel()
        await asyncio.gather(*self._fills, return_exceptions=True)

    def _fill_once(self, request: QueryRequest, access: Access, key: str, standing: ReadSnapshot) -> _Flight:
        """Equal questions at a time share one retrieval, if it is as true for the later as for the first.

        A caller that goes away leaves it to the others, and to the cache.
        """
        flight = self._flights.get(key)
        if flight is None or not flight.look.join(standing):
            look = SharedRead(standing)
            body: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            filling = self._fill(request, access, key, look, body, leased=standing.leased)
            flight = _Flight(look, body, asyncio.create_task(filling, name=f"fill-{key}"))
            self._flights[key] = flight
            self._fills.add(flight.kept)
            flight.kept.add_done_callback(partial(self._land, key, flight))
        return flight

    def _land(self, key: str, flight: _Flight, kept: asyncio.Task[None]) -> None:
        self._fills.discard(kept)
        if self._flights.get(key) is flight:
            del self._flights[key]
        # Every caller may be gone, and asyncio complains of errors nobody looked at.
        if not kept.cancelled():
            kept.exception()
        if not flight.body.cancel() and not flight.body.cancelled():
            flight.body.exception()

    async def _fill(
        self,
        request: QueryRequest,
        access: Access,
        key: str,
        look: SharedRead,
        made: asyncio.Future[bytes],
        *,
        leased: bool,
    ) -> None:
        try:
            if not leased:
                await self._filled_elsewhere(access.tenant, key, look)
            body, retrieved = look.standing.cached, None
            if body is None:
                body, retrieved = await self._make(request, access, key, look)
        except Exception as error:  # noqa: BLE001 - raised to those who wait for the answer
            made.set_exception(error)
            return
        made.set_result(body)
        if retrieved is not None:
            await self.keep(request, access, key, look.standing, body=body, retrieved=retrieved)

    async def _make(
        self, request: QueryRequest, access: Access, key: str, look: SharedRead
    ) -> tuple[bytes, Retrieved | None]:
        """The answer, and what it was made from if it is to be kept."""
        found = await self.retrieve(request, access, key, look)
        if isinstance(found, bytes):
            return found, None
        generated = unanswered = None
        if request.generate:
            try:
                self.spend(access.tenant)
                generated = await self._generate(request.query, found)
            except GenerationError as error:
                unanswered = why_unanswered(error)
                self._metrics.generation_failures.labels(unanswered).inc()
                _log.warning("not_generated", reason=str(error))
        body = response_body(
            found.passages, generated, include_metadata=request.include_metadata, unanswered=unanswered
        )
        return body, found if unanswered is None else None

    async def _filled_elsewhere(self, tenant: str, key: str, look: SharedRead) -> None:
        """Wait for what another process fills just now, if it comes soon."""
        for _ in range(_LEASE_LOOKS):
            await asyncio.sleep(_LEASE_LOOK_S)
            standing = await self._freshness.look(tenant, key, lease_ms=_LEASE_MS)
            if standing.cached is not None:
                look.found(standing)
                return
            look.join(standing)
            if standing.leased:
                return

    async def _generate(self, question: str, retrieved: Retrieved) -> GeneratedAnswer:
        with self._metrics.stage("generate"):
            return await self._generator.answer(question, sources_of(retrieved), retrieved.search.vector)


def _entry(body: bytes, retrieved: Retrieved, top_k: int, positions: Mapping[int, int]) -> Entry:
    return Entry(
        response=body,
        search=retrieved.search,
        top_k=top_k,
        sources=retrieved.sources,
        vector_window=retrieved.windows.vector,
        lexical_window=retrieved.windows.lexical,
        filled_ms=time.time() * 1_000,
        positions=positions,
    )


def sources_of(retrieved: Retrieved) -> list[SourceText]:
    """What a generator answers from."""
    numbered = enumerate(retrieved.passages, start=1)
    return [SourceText(number, chunk.text, chunk.title) for number, (_, chunk) in numbered]


def why_unanswered(error: GenerationError) -> Unanswered:
    """What is told of a generator that wrote nothing."""
    match error:
        case OverBudget():
            return Unanswered.LIMITED
        case GenerationThrottled():
            return Unanswered.BUSY
    return Unanswered.FAILED
