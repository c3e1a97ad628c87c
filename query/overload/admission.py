"""Admission control of retrievals: an adaptive concurrency limit, a short queue, and load shedding."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from infra.opensearch.port import IndexUnavailable
from query.overload.adaptive_limit import AdaptiveLimit, FairQueue, max_queued_per_tenant
from query.overload.deadline import remaining_s
from query.telemetry.metrics import QueryMetrics

RETRY_AFTER_S: Final = 1.0

_MIN_LIMIT: Final = 8
"""Lower bound of the adaptive limit. If latency has causes other than the index, a lower limit does not help."""

_INITIAL_LIMIT: Final = 16

_LAGGING_LIMIT: Final = 2
"""Limit while invalidation lags. Tenants that lag bypass the cache, and retrieving all their answers would delay
invalidation further."""


class Overloaded(IndexUnavailable):
    """The retrieval was rejected because it could not complete in time."""


class Admission:
    """Admits retrievals, round-robin over tenants. Cache hits are not subject to it.

    A rejection costs next to nothing, so under any load the admitted retrievals complete in time.

    Args:
        target_ms: target latency, as in ``AdaptiveLimit``.
        queue_ms: longest wait in the queue. It also bounds the queue length.
        max_concurrent: upper bound of the limit: the connections of the store.
        metrics: counts rejections and exports the limit.
        is_lagging: whether invalidation lags.
        monotonic_s: monotonic clock.
    """

    def __init__(
        self,
        *,
        target_ms: float,
        queue_ms: float,
        max_concurrent: int,
        metrics: QueryMetrics,
        is_lagging: Callable[[], bool] = lambda: False,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        min_limit = min(_MIN_LIMIT, max_concurrent)
        self._limit = AdaptiveLimit(
            target_ms=target_ms,
            min_limit=min_limit,
            max_limit=max_concurrent,
            initial_limit=max(min_limit, min(_INITIAL_LIMIT, max_concurrent)),
        )
        self._queue_ms = queue_ms
        self._metrics = metrics
        self._is_lagging = is_lagging
        self._monotonic_s = monotonic_s
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()
        self._in_flight = 0
        metrics.retrieval_limit.set(self._limit.current)

    @property
    def limit(self) -> int:
        """Concurrent retrievals allowed now."""
        return min(_LAGGING_LIMIT, self._limit.current) if self._is_lagging() else self._limit.current

    def is_at_capacity(self, tenant: str) -> bool:
        """Whether a retrieval for the tenant would be rejected now."""
        if self._in_flight < self.limit and not self._queue:
            return False
        queued = self._queue.queued(tenant)
        # Just after the limit has dropped, latency drops too, and throughput stays the same.
        limit = max(self.limit, self._limit.peak_in_flight)
        tenants = self._queue.tenants + (not queued)
        return queued >= max_queued_per_tenant(limit, tenants, max_wait_ms=self._queue_ms, mean_ms=self._limit.mean_ms)

    @property
    def has_spare_capacity(self) -> bool:
        """Whether the queue is empty and at least half of the slots are free."""
        return not self._queue and 2 * self._in_flight < self.limit

    @asynccontextmanager
    async def admitted(self, tenant: str) -> AsyncIterator[None]:
        """Hold a retrieval slot.

        Raises:
            Overloaded: the queue is at capacity, or no slot became free in time.
        """
        await self._acquire(tenant)
        began_s, failed = self._monotonic_s(), False
        try:
            yield
        except IndexUnavailable:
            failed = True
            raise
        finally:
            took_ms = (self._monotonic_s() - began_s) * 1_000
            self._limit.record(took_ms, in_flight=self._in_flight, failed=failed)
            self._metrics.retrieval_limit.set(self._limit.current)
            self._in_flight -= 1
            self._dispatch()

    async def _acquire(self, tenant: str) -> None:
        if self._in_flight < self.limit and not self._queue:
            self._in_flight += 1
            return
        if self.is_at_capacity(tenant):
            raise self._rejection("at_capacity", "the retrieval queue is at capacity")
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.push(tenant, slot)
        self._dispatch()
        try:
            async with asyncio.timeout(min(self._queue_ms / 1_000, max(0.0, remaining_s()))):
                await slot
        except TimeoutError:
            if not self._is_granted(slot):
                self._queue.remove(tenant, slot)
                raise self._rejection("queue_timeout", "no retrieval slot became free in time") from None
        except asyncio.CancelledError:
            if self._is_granted(slot):
                self._in_flight -= 1
                self._dispatch()
            else:
                self._queue.remove(tenant, slot)
            raise

    @staticmethod
    def _is_granted(slot: asyncio.Future[None]) -> bool:
        """Whether the slot was granted just as the wait for it ended."""
        return slot.done() and not slot.cancelled()

    def _dispatch(self) -> None:
        while self._in_flight < self.limit and (slot := self._queue.pop()) is not None:
            if not slot.done():
                slot.set_result(None)
                self._in_flight += 1

    def _rejection(self, reason: str, message: str) -> Overloaded:
        self._metrics.calls_rejected.labels("retrieval", reason).inc()
        return Overloaded(message, retry_after_s=RETRY_AFTER_S)
