"""How many questions are retrieved at a time; the rest waits for a moment, or is told at once to come back."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from infra.opensearch.port import IndexUnavailable
from query.overload.adaptive_limit import AdaptiveLimit, FairQueue, places_in_line
from query.overload.deadline import left_s
from query.telemetry.metrics import QueryMetrics

RETRY_AFTER_S: Final = 1.0

_LEAST: Final = 8
"""A process that is slow for other reasons than the index gains nothing by asking it less."""

_FIRST: Final = 16

_LATE: Final = 2
"""While changes reach cached answers late, questions leave room for what brings them. Else all that was cached is
retrieved, which makes the next change late, and so on."""


class Overloaded(IndexUnavailable):
    """More is asked than can be answered in time."""


class Admission:
    """Admits retrievals, each tenant in its turn. Hits are not asked: they never wait here.

    Refusing costs next to nothing, so that whatever is asked, what is admitted is answered in time.

    Args:
        target_ms: see ``AdaptiveLimit``.
        queue_ms: longest wait for a place; nobody joins a line that is longer than is answered in that time.
        most: at a time: as many as the store has connections.
        metrics: where the limit and refusals are told.
        late: whether changes reach cached answers late, so that these are left aside.
        monotonic_s: a clock that only goes forward.
    """

    def __init__(
        self,
        *,
        target_ms: float,
        queue_ms: float,
        most: int,
        metrics: QueryMetrics,
        late: Callable[[], bool] = lambda: False,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        least = min(_LEAST, most)
        self._limit = AdaptiveLimit(target_ms=target_ms, least=least, most=most, first=max(least, min(_FIRST, most)))
        self._queue_ms = queue_ms
        self._metrics = metrics
        self._late = late
        self._monotonic_s = monotonic_s
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()
        self._under_way = 0
        metrics.admitted_at_a_time.set(self._limit.now)

    @property
    def limit(self) -> int:
        """How many at a time."""
        return min(_LATE, self._limit.now) if self._late() else self._limit.now

    def is_full(self, tenant: str) -> bool:
        """Whether one more of the tenant would be refused at once."""
        if self._under_way < self.limit and not self._waiting:
            return False
        waiting = self._waiting.waiting(tenant)
        # Where fewer are admitted than just before, each takes less time, and as many are answered in a second.
        at_a_time = max(self.limit, self._limit.at_a_time)
        tenants = self._waiting.tenants + (not waiting)
        return waiting >= places_in_line(at_a_time, tenants, wait_ms=self._queue_ms, mean_ms=self._limit.mean_ms)

    @property
    def has_room(self) -> bool:
        """Whether half of the places are free and nobody waits: time for what can be left undone."""
        return not self._waiting and 2 * self._under_way < self.limit

    @asynccontextmanager
    async def admitted(self, tenant: str) -> AsyncIterator[None]:
        """Retrieve in it.

        Raises:
            Overloaded: there is no place, and will be none soon.
        """
        await self._enter(tenant)
        began_s, failed = self._monotonic_s(), False
        try:
            yield
        except IndexUnavailable:
            failed = True
            raise
        finally:
            took_ms = (self._monotonic_s() - began_s) * 1_000
            self._limit.note(took_ms, at_a_time=self._under_way, failed=failed)
            self._metrics.admitted_at_a_time.set(self._limit.now)
            self._under_way -= 1
            self._let_in()

    async def _enter(self, tenant: str) -> None:
        if self._under_way < self.limit and not self._waiting:
            self._under_way += 1
            return
        if self.is_full(tenant):
            raise self._refused("full", "more is asked than can be answered now")
        waiting = self._waiting
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.add(tenant, place)
        self._let_in()
        try:
            async with asyncio.timeout(min(self._queue_ms / 1_000, max(0.0, left_s()))):
                await place
        except TimeoutError:
            if not self._took(place):
                waiting.remove(tenant, place)
                raise self._refused("late", "more is asked than can be answered in time") from None
        except asyncio.CancelledError:
            if self._took(place):
                self._under_way -= 1
                self._let_in()
            else:
                waiting.remove(tenant, place)
            raise

    @staticmethod
    def _took(place: asyncio.Future[None]) -> bool:
        """Whether the place was given in the instant in which its wait was ended."""
        return place.done() and not place.cancelled()

    def _let_in(self) -> None:
        while self._under_way < self.limit and (place := self._waiting.take()) is not None:
            if not place.done():
                place.set_result(None)
                self._under_way += 1

    def _refused(self, reason: str, message: str) -> Overloaded:
        self._metrics.not_admitted.labels("retrieval", reason).inc()
        return Overloaded(message, retry_after_s=RETRY_AFTER_S)
