"""The answer service: a question in, an answer and the positions it is true for out."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from typing_extensions import override

from query.answers.fill import AnswerFill
from query.answers.refresh_ahead import RefreshOutcome
from query.answers.response import response_body, stamped
from query.answers.single_flight import SingleFlight
from query.cache.freshness import FreshnessReader, ReadSnapshot, SharedRead
from query.cache.key import AnswerMaker, cache_key
from query.retrieval.retrieve import Retrieved
from query.telemetry.metrics import QueryMetrics
from query.telemetry.rolling_stats import CacheStatus
from schemas.positions import Position
from schemas.queries import GeneratedAnswer, QueryRequest, Unanswered
from schemas.search import Access

_LEASE_MS: Final = 2_000
"""Time to live of a fill lease: other processes wait for the holder's answer at most that long."""

_LEASE_POLL_S: Final = 0.02
_LEASE_POLLS: Final = 12


class AnswerObserver(Protocol):
    """Observes questions and cache hits. Must not block."""

    def on_question(self, key: str, request: QueryRequest, access: Access) -> None:
        """A question was asked."""
        ...

    def on_hit(self, tenant: str, key: str, body: bytes, positions: Mapping[int, int]) -> None:
        """A cached answer is sent."""
        ...


class NoObserver(AnswerObserver):
    """An ``AnswerObserver`` that does nothing."""

    @override
    def on_question(self, key: str, request: QueryRequest, access: Access) -> None:
        pass

    @override
    def on_hit(self, tenant: str, key: str, body: bytes, positions: Mapping[int, int]) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Fill:
    """A fill under way.

    Attributes:
        read: latest read of all requests that wait for it.
        body: the response body, as soon as it exists.
        stored: ends once the answer is stored, or will not be.
    """

    read: SharedRead
    body: asyncio.Future[bytes]
    stored: asyncio.Task[None]


class AnswerService:
    """Serves cached answers and fills missing ones.

    A cached answer is true for the positions of the read that found it, because the epoch still holds with them. A
    question that was queued is read again before its search, or its answer would be as old as the queue time. Only a
    request that repeats the question before the answer is stored waits for the store.

    Args:
        freshness: reads epoch, positions and cached answer.
        fill: fills missing answers.
        maker: identifies everything besides question and reader that decides an answer.
        metrics: counts answers.
        observer: observes questions and hits.
    """

    def __init__(
        self,
        *,
        freshness: FreshnessReader,
        fill: AnswerFill,
        maker: AnswerMaker,
        metrics: QueryMetrics,
        observer: AnswerObserver | None = None,
    ) -> None:
        self._freshness = freshness
        self._fill = fill
        self._maker = maker
        self._metrics = metrics
        self._observer = observer or NoObserver()
        self._flights: SingleFlight[_Fill] = SingleFlight()
        self._filling: set[asyncio.Task[None]] = set()

    async def answer(self, request: QueryRequest, access: Access) -> bytes:
        """A ``QueryResponse`` as JSON.

        Raises:
            PositionNotReached: ``min_position`` was not reached in time.
            EmbeddingError: the question has no vector.
            IndexUnavailable: the answer is not cached, and the index is unavailable or the process overloaded.
        """
        began_s = time.perf_counter()
        key, snapshot = await self.read(request, access)
        if snapshot.cached is None and (storing := self._being_stored(key, snapshot)) is not None:
            await asyncio.wait((storing.stored,))
            snapshot = await self._read(request, access, key)
        body = snapshot.cached
        if body is None:
            flight = self._join_or_start(request, access, key, snapshot)
            body = await asyncio.shield(flight.body)
            snapshot = flight.read.seen_by(snapshot)
        self.count(access.tenant, key, snapshot)
        query_time_ms = (time.perf_counter() - began_s) * 1_000
        return stamped(body, query_time_ms=query_time_ms, cached=snapshot.cached is not None, as_of=snapshot.as_of)

    async def refresh(self, request: QueryRequest, access: Access) -> RefreshOutcome:
        """Fill an answer that is not cached, and store it in the near cache too.

        Raises:
            EmbeddingError, IndexUnavailable: as ``answer``.
        """
        key = cache_key(request, access, self._maker)
        snapshot = await self._freshness.read(access.tenant, key, lease_ms=_LEASE_MS)
        if snapshot.cached is not None:
            return RefreshOutcome.CACHED
        if snapshot.epoch is not None:
            flight = self._join_or_start(request, access, key, snapshot)
            await asyncio.shield(flight.body)
            await asyncio.wait((flight.stored,))
            snapshot = await self._freshness.read(access.tenant, key)
        return RefreshOutcome.NOT_STORED if snapshot.cached is None else RefreshOutcome.FILLED

    async def read(self, request: QueryRequest, access: Access) -> tuple[str, ReadSnapshot]:
        """Cache key, and the tenant's state once ``min_position`` is reached; raises as ``answer``."""
        key = cache_key(request, access, self._maker)
        self._observer.on_question(key, request, access)
        return key, await self._read(request, access, key)

    def count(self, tenant: str, key: str, snapshot: ReadSnapshot) -> None:
        """Count an answer that is sent."""
        if snapshot.cached is not None:
            self._observer.on_hit(tenant, key, snapshot.cached, snapshot.as_of.positions)
            status = CacheStatus.HIT
        else:
            status = CacheStatus.UNCACHED if snapshot.epoch is None else CacheStatus.FILLED
        self._metrics.count_answer(status, max(0.0, time.time() * 1_000 - snapshot.as_of.checked_ms))

    async def close(self) -> None:
        """Cancel the fills whose callers are gone."""
        for filling in self._filling:
            filling.cancel()
        await asyncio.gather(*self._filling, return_exceptions=True)

    async def _read(self, request: QueryRequest, access: Access, key: str) -> ReadSnapshot:
        if request.min_position is None:
            return await self._freshness.read(access.tenant, key, lease_ms=_LEASE_MS)
        return await self._freshness.read_at(access.tenant, key, Position.parse(request.min_position))

    def _being_stored(self, key: str, snapshot: ReadSnapshot) -> _Fill | None:
        """A flight that has its answer and would serve ``snapshot``, once the answer is stored."""
        flight = self._flights.current(key)
        serves = flight is not None and flight.body.done() and flight.read.is_valid_for(snapshot)
        return flight if serves else None

    def _join_or_start(self, request: QueryRequest, access: Access, key: str, snapshot: ReadSnapshot) -> _Fill:
        """The flight for ``key``. It outlives its callers: others, and the cache, still want the answer."""

        def start(read: SharedRead) -> _Fill:
            body: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            work = self._run_fill(request, access, key, read, body, leased=snapshot.leased)
            flight = _Fill(read, body, asyncio.create_task(work, name=f"fill-{key}"))
            self._filling.add(flight.stored)
            flight.stored.add_done_callback(partial(self._end, key, flight))
            return flight

        return self._flights.join_or_start(key, snapshot, start)

    def _end(self, key: str, flight: _Fill, stored: asyncio.Task[None]) -> None:
        self._filling.discard(stored)
        self._flights.end(key, flight.read)
        # Retrieve exceptions: every caller may be gone, and asyncio logs unretrieved ones.
        if not stored.cancelled():
            stored.exception()
        if not flight.body.cancel() and not flight.body.cancelled():
            flight.body.exception()

    async def _run_fill(
        self,
        request: QueryRequest,
        access: Access,
        key: str,
        read: SharedRead,
        answered: asyncio.Future[bytes],
        *,
        leased: bool,
    ) -> None:
        try:
            if not leased:
                await self._await_lease(access.tenant, key, read)
            body, retrieved = read.snapshot.cached, None
            if body is None:
                body, retrieved = await self._make(request, access, key, read)
        except Exception as error:  # noqa: BLE001 - raised to the requests that wait for the answer
            answered.set_exception(error)
            return
        answered.set_result(body)
        if retrieved is not None:
            await self._fill.store(request, access, key, read.snapshot, body=body, retrieved=retrieved)

    async def _make(
        self, request: QueryRequest, access: Access, key: str, read: SharedRead
    ) -> tuple[bytes, Retrieved | None]:
        """The response body, and what it was made from if it may be stored."""
        retrieved = await self._fill.retrieve(request, access, key, read)
        if isinstance(retrieved, bytes):
            return retrieved, None
        generated = await self._fill.generate(request, access, retrieved) if request.generate else None
        answer = generated if isinstance(generated, GeneratedAnswer) else None
        unanswered = generated if isinstance(generated, Unanswered) else None
        body = response_body(
            retrieved.passages, answer, include_metadata=request.include_metadata, unanswered=unanswered
        )
        return body, retrieved if unanswered is None else None

    async def _await_lease(self, tenant: str, key: str, read: SharedRead) -> None:
        """Wait for the process that holds the fill lease, within a bound."""
        for _ in range(_LEASE_POLLS):
            await asyncio.sleep(_LEASE_POLL_S)
            snapshot = await self._freshness.read(tenant, key, lease_ms=_LEASE_MS)
            if snapshot.cached is not None:
                read.resolve(snapshot)
                return
            read.join(snapshot)
            if snapshot.leased:
                return
