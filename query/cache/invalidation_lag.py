"""Invalidation lag: searchable changes must be applied to cached answers within the freshness objective."""

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from infra.opensearch.port import IndexUnavailable, SearchIndex
from infra.redis.port import AnswerCache, CacheUnavailable
from query.telemetry.metrics import QueryMetrics
from schemas.index import MANIFESTS_REFRESH_S
from schemas.positions import AsOf

OBJECTIVE_S: Final = 1.0
"""Freshness objective: within this time after it became searchable, a change has invalidated the answers it alters."""

TOLERANCE_S: Final = OBJECTIVE_S - MANIFESTS_REFRESH_S - 0.05
"""How long a change may stay unapplied after the last check that did not see it. Less than the objective: positions in
the index appear with a delay, and an answer takes a moment to reach its reader."""

CHECK_INTERVAL_S: Final = 0.2
"""Interval of the checks of active tenants."""

DROP_ALL_AFTER_S: Final = 30.0
"""If no position advances for a lagging tenant for so long, all its cached answers are dropped and the searchable
positions count as applied. They may have been applied to a Redis that lost them, and nothing applies them again."""

_MAX_INTERVAL_S: Final = 0.5
"""A longer interval between checks counts as this. A short lag is normal operation of the pipeline."""

_CHECKS_KEPT: Final = 8
_NO_ANSWER: Final = "0" * 32
_ACTIVE_S: Final = 10.0
"""A tenant without requests for so long is not checked."""

_TENANTS_PER_ROUND: Final = 8
"""With very many tenants each is checked less often, instead of the index being asked more often."""

_log = structlog.get_logger(__name__)


class InvalidationLags(Exception):
    """Cached answers lack changes that have been searchable for longer than the objective."""


@dataclass(frozen=True, slots=True)
class _Check:
    """One comparison.

    Attributes:
        since_s: positions that this check saw and the one before did not became searchable after this time.
        searchable: partition → offset.
    """

    since_s: float
    searchable: Mapping[int, int]


class InvalidationLag:
    """Compares the searchable and the applied positions of one tenant.

    Each check records the positions that were searchable at its time. Once they are applied, so is every change that
    existed then. For positions that are not applied, the checks bound since when they have been searchable.

    Args:
        cache: source of applied positions.
        index: source of searchable positions.
        tenant: tenant to compare.
        monotonic_s: monotonic clock.

    Attributes:
        deadline_s: until when cached answers meet the objective; infinite if nothing is missing.
        searchable: searchable positions of the last check; None before the first.
        checked_s: start of the last check.
    """

    def __init__(
        self,
        cache: AnswerCache,
        index: SearchIndex,
        tenant: str,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._index = index
        self._tenant = tenant
        self._monotonic_s = monotonic_s
        self.deadline_s = math.inf
        self.searchable: AsOf | None = None
        self._unapplied: deque[_Check] = deque()
        self._applied: Mapping[int, int] = {}
        self.checked_s = -math.inf
        self._advanced_s = monotonic_s()

    @property
    def is_caught_up(self) -> bool:
        """Whether all positions of the last check are applied."""
        return not self._unapplied

    @property
    def stalled_s(self) -> float:
        """How long positions have been missing without any advance."""
        return self._monotonic_s() - self._advanced_s

    @property
    def reason(self) -> str:
        """Description of what is missing."""
        missing = sorted(_missing(self._unapplied[0].searchable, self._applied)) if self._unapplied else ()
        lag_s = self._monotonic_s() - self.deadline_s + TOLERANCE_S
        return (
            f"changes on partitions {', '.join(map(str, missing))} have been searchable for up to {lag_s:.1f} s "
            "and are not applied to cached answers: is `invalidate` running?"
        )

    async def check(self) -> None:
        """Compare once.

        Raises:
            CacheUnavailable, IndexUnavailable: the positions cannot be read.
        """
        checked_s, checked_ms = self._monotonic_s(), round(time.time() * 1_000, 3)
        positions = await self._index.positions(self._tenant)
        lookup = await self._cache.lookup(self._tenant, _NO_ANSWER)
        self.searchable = AsOf(positions=positions, checked_ms=checked_ms)
        since_s = max(self.checked_s, checked_s - _MAX_INTERVAL_S)
        self.checked_s = checked_s
        if len(self._unapplied) == _CHECKS_KEPT:
            since_s = self._unapplied.pop().since_s
        self._unapplied.append(_Check(since_s, positions))
        # A Redis that lost its data has no answers; the next request seeds its positions.
        while self._unapplied and (not lookup.seeded or not _missing(self._unapplied[0].searchable, lookup.positions)):
            self._unapplied.popleft()
        self.deadline_s = self._unapplied[0].since_s + TOLERANCE_S if self._unapplied else math.inf
        if not self._unapplied or lookup.positions != self._applied:
            self._applied, self._advanced_s = dict(lookup.positions), self._monotonic_s()

    async def require_caught_up(self) -> None:
        """Compare once.

        Raises:
            InvalidationLags: a change is not applied within the objective.
            CacheUnavailable, IndexUnavailable: the positions cannot be read.
        """
        await self.check()
        if self._monotonic_s() > self.deadline_s:
            raise InvalidationLags(self.reason)


def _missing(searchable: Mapping[int, int], applied: Mapping[int, int]) -> list[int]:
    return [partition for partition, offset in searchable.items() if applied.get(partition, -1) < offset]


@dataclass(slots=True)
class _Tenant:
    """A tenant with recent requests.

    Attributes:
        lag: its comparison.
        requested_s: time of its last request.
        cache_failed: Redis has failed, and not all searchable positions have been seen applied since.
        logged: its lag has been logged.
    """

    lag: InvalidationLag
    requested_s: float
    cache_failed: bool = False
    logged: bool = False

    def is_lagging(self, now_s: float) -> bool:
        """Whether its cached answers must not be served."""
        return self.cache_failed or now_s > self.lag.deadline_s


class InvalidationLagMonitor:
    """Finds the tenants for which invalidation lags. They bypass the cache.

    While Redis is down, changes cannot be applied to the answers in it. A tenant counts as lagging from then on until
    all searchable positions have been seen applied.

    Args:
        cache: source of applied positions.
        index: source of searchable positions.
        metrics: counts lagging tenants.
        monotonic_s: monotonic clock.
    """

    def __init__(
        self,
        cache: AnswerCache,
        index: SearchIndex,
        metrics: QueryMetrics,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._index = index
        self._metrics = metrics
        self._monotonic_s = monotonic_s
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()

    def is_lagging(self, tenant: str) -> bool:
        """Whether the tenant's cached answers must not be served. The call marks the tenant as active."""
        now_s = self._monotonic_s()
        state = self._tenants.get(tenant)
        if state is None:
            lag = InvalidationLag(self._cache, self._index, tenant, monotonic_s=self._monotonic_s)
            state = self._tenants[tenant] = _Tenant(lag, now_s)
        state.requested_s = now_s
        return state.is_lagging(now_s)

    def searchable(self, tenant: str) -> AsOf | None:
        """Lower bound of what a retrieval from now on reflects; None without a recent check."""
        state = self._tenants.get(tenant)
        if state is None or self._monotonic_s() - state.lag.checked_s > _MAX_INTERVAL_S:
            return None
        return state.lag.searchable

    @property
    def lags(self) -> bool:
        """Whether invalidation lags for any tenant. False if Redis is down: no change could be applied then."""
        now_s = self._monotonic_s()
        return any(state.is_lagging(now_s) and not state.cache_failed for state in self._tenants.values())

    async def run(self) -> None:
        """Check active tenants until cancelled."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self.check()

    async def check(self) -> None:
        """Check active tenants once, those first that were checked the longest time ago."""
        now_s = self._monotonic_s()
        for name in [name for name, state in self._tenants.items() if state.requested_s < now_s - _ACTIVE_S]:
            del self._tenants[name]
        for name in list(self._tenants)[:_TENANTS_PER_ROUND]:
            self._tenants.move_to_end(name)
            await self._check_tenant(name, self._tenants[name])
        now_s = self._monotonic_s()
        self._metrics.tenants_lagging.set(sum(state.is_lagging(now_s) for state in self._tenants.values()))

    async def _check_tenant(self, name: str, state: _Tenant) -> None:
        reason = None
        try:
            await state.lag.check()
            if state.lag.stalled_s > DROP_ALL_AFTER_S and state.lag.searchable is not None:
                await self._cache.apply(name, state.lag.searchable.positions, drop=True)
                _log.warning("answers_dropped_to_catch_up", tenant=name)
                await state.lag.check()
        except CacheUnavailable as error:
            state.cache_failed, reason = True, str(error)
        except IndexUnavailable:
            return  # nothing new is known, and nothing new becomes searchable
        else:
            state.cache_failed = state.cache_failed and not state.lag.is_caught_up
        lagging = state.is_lagging(self._monotonic_s())
        if lagging and not state.logged:
            _log.warning("invalidation_lags", tenant=name, reason=reason or state.lag.reason)
        elif state.logged and not lagging:
            _log.info("invalidation_caught_up", tenant=name)
        state.logged = lagging
