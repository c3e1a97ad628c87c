"""Whether invalidation keeps up: what is searchable is to be applied to cached answers soon after."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog

from infra.opensearch.port import IndexUnavailable, SearchIndex
from infra.redis.port import AnswerCache, CacheUnavailable
from query.metrics import QueryMetrics

OBJECTIVE_S: Final = 1.0
"""The freshness objective: a change that is searchable for longer should have dropped what it alters."""

PATIENCE_S: Final = 0.75
"""How long a change that is seen to be searchable may stay unapplied: less than the objective, as it is seen late."""

LOOK_S: Final = 0.25
"""How often tenants that ask are looked after."""

GIVE_UP_S: Final = 30.0
"""If nothing is applied for so long to the answers of a tenant that is behind, all of them are dropped, and what is
searchable counts as applied. It may have been applied to a cache that has forgotten it, and nobody does so again."""

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

    Being behind for a moment is how the steps work, so a difference counts only when it is still there at a later look.

    Args:
        cache: knows what is applied.
        index: knows what is searchable.
        tenant: whose changes.
        monotonic_s: a clock that only goes forward.
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
        self._expected: Mapping[int, int] = {}
        self._since_s = 0.0

    async def check(self) -> None:
        """Look once.

        Raises:
            InvalidationLags: what was searchable at a look more than ``PATIENCE_S`` ago is not applied yet.
            CacheUnavailable, IndexUnavailable: it cannot be told.
        """
        look = await self._cache.lookup(self._tenant, _NO_ANSWER)
        missing = {
            partition: offset
            for partition, offset in self._expected.items()
            if look.positions.get(partition, -1) < offset
        }
        now_s = self._monotonic_s()
        if missing and now_s - self._since_s > PATIENCE_S:
            raise InvalidationLags(
                f"changes on partitions {', '.join(map(str, sorted(missing)))} are searchable for more than "
                f"{now_s - self._since_s:.1f} s and not applied to cached answers: is `invalidate` running?"
            )
        if not missing:
            self._expected, self._since_s = await self._index.positions(self._tenant), now_s


@dataclass(slots=True)
class _Behind:
    """A tenant that is behind.

    Attributes:
        late: changes reach its answers late; else the cache was out, and nothing could.
        moved_s: when what is applied was last seen to move.
        applied: what that was.
    """

    late: bool
    moved_s: float
    applied: Mapping[int, int] = field(default_factory=dict)


class LagWatch:
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
        self._asked_s: OrderedDict[str, float] = OrderedDict()
        self._lags: dict[str, InvalidationLag] = {}
        self._behind: dict[str, _Behind] = {}

    def behind(self, tenant: str) -> bool:
        """Whether the tenant's cached answers are to be left aside; asking has it looked after."""
        self._asked_s[tenant] = self._monotonic_s()
        return tenant in self._behind

    @property
    def late(self) -> bool:
        """Whether changes reach any tenant's answers late; not where the cache is out, and nothing could reach it."""
        return any(one.late for one in self._behind.values())

    async def run(self) -> None:
        """Look after tenants until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Look once after the tenants that ask, those first that wait for the longest."""
        since_s = self._monotonic_s() - _ASKS_FOR_S
        for tenant in [tenant for tenant, asked_s in self._asked_s.items() if asked_s < since_s]:
            del self._asked_s[tenant]
            self._lags.pop(tenant, None)
            self._behind.pop(tenant, None)
        for tenant in list(self._asked_s)[:_LOOKS_AT_ONCE]:
            self._asked_s.move_to_end(tenant)
            await self._look_after(tenant)
        self._metrics.invalidation_behind.set(len(self._behind))

    async def _look_after(self, tenant: str) -> None:
        lag = self._lags.get(tenant)
        if lag is None:
            lag = self._lags[tenant] = InvalidationLag(self._cache, self._index, tenant, monotonic_s=self._monotonic_s)
        try:
            if tenant in self._behind:
                await self._try_to_return(tenant)
            else:
                await lag.check()
        except (CacheUnavailable, InvalidationLags) as error:
            if tenant not in self._behind:
                _log.warning("invalidation_behind", tenant=tenant, reason=str(error))
                self._behind[tenant] = _Behind(isinstance(error, InvalidationLags), self._monotonic_s())
        except IndexUnavailable:
            pass  # nothing new is known, and nothing new becomes searchable

    async def _try_to_return(self, tenant: str) -> None:
        positions = await self._index.positions(tenant)
        look = await self._cache.lookup(tenant, _NO_ANSWER)
        # A cache that was emptied has no answers, and is told its positions by the next who asks.
        caught_up = not look.seeded or all(look.positions.get(at, -1) >= offset for at, offset in positions.items())
        behind = self._behind[tenant]
        if look.positions != behind.applied:
            behind.applied, behind.moved_s = dict(look.positions), self._monotonic_s()
        if not caught_up and self._monotonic_s() - behind.moved_s > GIVE_UP_S:
            await self._cache.apply(tenant, positions, drop=True)
            _log.warning("answers_dropped_to_catch_up", tenant=tenant)
            caught_up = True
        if caught_up:
            _log.info("invalidation_caught_up", tenant=tenant)
            del self._behind[tenant]
            self._lags.pop(tenant, None)
