"""Whether invalidation keeps up: what is searchable is to be applied to cached answers soon after."""

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
"""The freshness objective: a change that is searchable for longer should have dropped what it alters."""

PATIENCE_S: Final = OBJECTIVE_S - MANIFESTS_REFRESH_S - 0.05
"""How long after a look a change that it did not see yet may stay unapplied: less than the objective, as what is
searchable is seen that much later, and as an answer is on its way for a moment."""

LOOK_S: Final = 0.2
"""How often tenants that ask are looked after."""

GIVE_UP_S: Final = 30.0
"""If nothing is applied for so long to the answers of a tenant that is behind, all of them are dropped, and what is
searchable counts as applied. It may have been applied to a cache that has forgotten it, and nobody does so again."""

_LONGEST_BETWEEN_S: Final = 0.5
"""What was found after a longer time came later than the look before: being behind for a moment is how steps work."""

_LOOKS_KEPT: Final = 8
_NO_ANSWER: Final = "0" * 32
_ASKS_FOR_S: Final = 10.0
"""A tenant that has not asked for so long is not looked after."""

_LOOKS_AT_ONCE: Final = 8
"""Of very many tenants each waits longer for its turn, rather than the index being asked more often."""

_log = structlog.get_logger(__name__)


class InvalidationLags(Exception):
    """Cached answers do not know of changes that are searchable for longer than they should be."""


class InvalidationLag:
    """Compares, for one tenant, what is searchable with what is applied.

    Each look tells what was searchable at its time. As soon as that is applied, so is every change that was there then;
    so of what is not applied it is known since when it is searchable at most.

    Args:
        cache: knows what is applied.
        index: knows what is searchable.
        tenant: whose changes.
        monotonic_s: a clock that only goes forward.

    Attributes:
        deadline_s: until when cached answers are within the objective; infinite where nothing is missing.
        searchable: as of the last look; None before.
        looked_s: when that began.
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
        self._unapplied: deque[_Look] = deque()
        self._applied: Mapping[int, int] = {}
        self.looked_s = -math.inf
        self._moved_s = monotonic_s()

    @property
    def is_level(self) -> bool:
        """Whether all that was searchable at the last look is applied."""
        return not self._unapplied

    @property
    def stands_for_s(self) -> float:
        """For how long something is missing and nothing was applied."""
        return self._monotonic_s() - self._moved_s

    async def look(self) -> None:
        """Look once.

        Raises:
            CacheUnavailable, IndexUnavailable: it cannot be told.
        """
        looked_s, looked_ms = self._monotonic_s(), round(time.time() * 1_000, 3)
        positions = await self._index.positions(self._tenant)
        found = await self._cache.lookup(self._tenant, _NO_ANSWER)
        self.searchable = AsOf(positions=positions, checked_ms=looked_ms)
        since_s = max(self.looked_s, looked_s - _LONGEST_BETWEEN_S)
        self.looked_s = looked_s
        if len(self._unapplied) == _LOOKS_KEPT:
            since_s = self._unapplied.pop().since_s
        self._unapplied.append(_Look(since_s, positions))
        # A cache that was emptied has no answers, and is told its positions by the next who asks.
        while self._unapplied and (not found.seeded or not _missing(self._unapplied[0].searchable, found.positions)):
            self._unapplied.popleft()
        self.deadline_s = self._unapplied[0].since_s + PATIENCE_S if self._unapplied else math.inf
        if not self._unapplied or found.positions != self._applied:
            self._applied, self._moved_s = dict(found.positions), self._monotonic_s()

    async def check(self) -> None:
        """Look once, and complain.

        Raises:
            InvalidationLags: a change is not applied yet, and the time for that is over.
            CacheUnavailable, IndexUnavailable: it cannot be told.
        """
        await self.look()
        if self._monotonic_s() > self.deadline_s:
            raise InvalidationLags(self.reason)

    @property
    def reason(self) -> str:
        """What is missing, for people."""
        missing = sorted(_missing(self._unapplied[0].searchable, self._applied)) if self._unapplied else ()
        late_s = self._monotonic_s() - self.deadline_s + PATIENCE_S
        return (
            f"changes on partitions {', '.join(map(str, missing))} are searchable for up to {late_s:.1f} s "
            "and not applied to cached answers: is `invalidate` running?"
        )


@dataclass(frozen=True, slots=True)
class _Look:
    """One look.

    Attributes:
        since_s: what it found that the look before did not, became searchable after this.
        searchable: partition → offset.
    """

    since_s: float
    searchable: Mapping[int, int]


def _missing(searchable: Mapping[int, int], applied: Mapping[int, int]) -> list[int]:
    return [partition for partition, offset in searchable.items() if applied.get(partition, -1) < offset]


@dataclass(slots=True)
class _Tenant:
    """A tenant that asks.

    Attributes:
        lag: its own.
        asked_s: when it last did.
        out: the cache was out, and all that is searchable was not seen to be applied since.
        told: of being behind, in the log.
    """

    lag: InvalidationLag
    asked_s: float
    out: bool = False
    told: bool = False

    def is_behind(self, now_s: float) -> bool:
        """Whether its cached answers are to be left aside."""
        return self.out or now_s > self.lag.deadline_s


class InvalidationLagMonitor:
    """Knows the tenants whose cached answers have fallen behind what is searchable: they are answered past the cache.

    While the cache is out, changes cannot be applied to what it holds, so a tenant is behind from then on until all
    that is searchable is seen to be applied.

    Args:
        cache: knows what is applied.
        index: knows what is searchable.
        metrics: where they are counted.
        monotonic_s: a clock that only goes forward.
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

    def behind(self, tenant: str) -> bool:
        """Whether the tenant's cached answers are to be left aside; asking has it looked after."""
        now_s = self._monotonic_s()
        one = self._tenants.get(tenant)
        if one is None:
            lag = InvalidationLag(self._cache, self._index, tenant, monotonic_s=self._monotonic_s)
            one = self._tenants[tenant] = _Tenant(lag, now_s)
        one.asked_s = now_s
        return one.is_behind(now_s)

    def searchable(self, tenant: str) -> AsOf | None:
        """What a retrieval from now on is true for at least; None where it was not looked at lately."""
        one = self._tenants.get(tenant)
        if one is None or self._monotonic_s() - one.lag.looked_s > _LONGEST_BETWEEN_S:
            return None
        return one.lag.searchable

    @property
    def late(self) -> bool:
        """Whether changes reach any tenant's answers late; not where the cache is out, and nothing could reach it."""
        now_s = self._monotonic_s()
        return any(one.is_behind(now_s) and not one.out for one in self._tenants.values())

    async def run(self) -> None:
        """Look after tenants until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Look once after the tenants that ask, those first that wait for the longest."""
        now_s = self._monotonic_s()
        for name in [name for name, one in self._tenants.items() if one.asked_s < now_s - _ASKS_FOR_S]:
            del self._tenants[name]
        for name in list(self._tenants)[:_LOOKS_AT_ONCE]:
            self._tenants.move_to_end(name)
            await self._look_after(name, self._tenants[name])
        now_s = self._monotonic_s()
        self._metrics.invalidation_behind.set(sum(one.is_behind(now_s) for one in self._tenants.values()))

    async def _look_after(self, name: str, one: _Tenant) -> None:
        reason = None
        try:
            await one.lag.look()
            if one.lag.stands_for_s > GIVE_UP_S and one.lag.searchable is not None:
                await self._cache.apply(name, one.lag.searchable.positions, drop=True)
                _log.warning("answers_dropped_to_catch_up", tenant=name)
                await one.lag.look()
        except CacheUnavailable as error:
            one.out, reason = True, str(error)
        except IndexUnavailable:
            return  # nothing new is known, and nothing new becomes searchable
        else:
            one.out = one.out and not one.lag.is_level
        behind = one.is_behind(self._monotonic_s())
        if behind and not one.told:
            _log.warning("invalidation_behind", tenant=name, reason=reason or one.lag.reason)
        elif one.told and not behind:
            _log.info("invalidation_caught_up", tenant=name)
        one.told = behind
