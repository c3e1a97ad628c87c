"""Where a tenant stands: up to which positions an answer given now is true, and whether one is cached."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import structlog

from infra.opensearch.port import IndexUnavailable, SearchIndex
from infra.redis.entry import UnreadableEntry, stored_response
from infra.redis.port import AnswerCache, CacheUnavailable
from query.cache.near_cache import NearCache, NearHit
from query.cache.subscription import InvalidationSubscription
from query.telemetry.metrics import QueryMetrics
from schemas.positions import AsOf, Position

BYPASS_S: Final = 1.0
"""After the cache failed it is left aside for this long, so that not every request waits for its time limit."""

POLL_S: Final = 0.05
"""How often a waiting request looks by itself, for announcements that were lost."""

LOOK_STANDS_MS: Final = 100.0
"""How old a look may be when the search begins. An older one is taken again, or the answer would be as old as its
question waited, and changes would overtake it."""

_log = structlog.get_logger(__name__)


class PositionNotReached(Exception):
    """The position asked for was not reached in time.

    Attributes:
        as_of: the positions instead.
    """

    def __init__(self, position: Position, as_of: AsOf) -> None:
        super().__init__(f"position {position} is not reached yet")
        self.as_of = as_of


@dataclass(frozen=True, slots=True)
class ReadSnapshot:
    """One look, taken before anything is retrieved.

    Attributes:
        epoch: under which an answer may be stored, or None where the cache is not to be had, or not needed.
        as_of: what an answer is true for that is cached, or retrieved from now on.
        cached: the response that is cached, without what differs from caller to caller.
        leased: False where another process is filling the answer.
    """

    epoch: int | None
    as_of: AsOf
    cached: bytes | None
    leased: bool = True

    @property
    def since(self) -> object:
        """Retrievals that began from equal values of this are equally true for both looks."""
        return self.epoch if self.epoch is not None else tuple(sorted(self.as_of.positions.items()))

    def joined(self, other: "ReadSnapshot") -> "ReadSnapshot":
        """The later of both looks, with all that is true for a retrieval that begins after both."""
        later, earlier = (other, self) if other.as_of.checked_ms >= self.as_of.checked_ms else (self, other)
        return later.knowing(earlier.as_of.positions)

    def knowing(self, positions: Mapping[int, int]) -> "ReadSnapshot":
        """The same look, of an answer that reflects these positions too."""
        known = self.as_of.positions
        more = {partition: max(offset, known.get(partition, -1)) for partition, offset in positions.items()}
        return replace(self, as_of=AsOf(positions={**known, **more}, checked_ms=self.as_of.checked_ms))


class SharedRead:
    """The latest look of all who share a retrieval.

    Until it begins whoever comes may share it, and it will be as true for each of them as their own; later, those may
    who see what it began with.

    Args:
        first: look of the first of them.

    Attributes:
        standing: what the answer is true for at least; with the answer, if it is found in the cache.
    """

    def __init__(self, first: ReadSnapshot) -> None:
        self.standing = first
        self._has_begun = False

    def serves(self, standing: ReadSnapshot) -> bool:
        """Whether the answer will be as true as the one of a retrieval that begins now."""
        return not self._has_begun or self.standing.since == standing.since

    def join(self, standing: ReadSnapshot) -> bool:
        """Share the answer, if it serves."""
        if not self._has_begun:
            self.standing = self.standing.joined(standing)
        return self.serves(standing)

    def begin(self, *, searchable: Mapping[int, int]) -> None:
        """The search begins now, and finds at least what is known to be searchable."""
        self.standing = self.standing.knowing(searchable)
        self._has_begun = True

    def found(self, standing: ReadSnapshot) -> bool:
        """Take what a later look has found; False where that lacks what others who share it were promised."""
        positions = standing.as_of.positions
        promised = self.standing.as_of.positions
        if any(positions.get(partition, -1) < offset for partition, offset in promised.items()):
            return False
        self.standing, self._has_begun = standing, True
        return True

    def seen_by(self, standing: ReadSnapshot) -> ReadSnapshot:
        """What the answer is true for, to one who shares it."""
        return replace(standing.joined(self.standing), cached=self.standing.cached)


class FreshnessReader:
    """Looks at the cache, and at the index where the cache has failed or lost what it knew.

    Args:
        cache: whose epoch and positions count.
        near: copies of answers in this process.
        behind: whether invalidation has fallen behind for a tenant, so that its answers are left aside.
        searchable: what is known to be searchable for a tenant, without asking the index.
        index: which positions are searchable at least.
        watch: tells of positions that become applied.
        metrics: where waits and failures are counted.
        wait_s: longest wait for a position.
        monotonic_s: a clock that only goes forward.
    """

    def __init__(
        self,
        *,
        cache: AnswerCache,
        near: NearCache,
        index: SearchIndex,
        watch: InvalidationSubscription,
        metrics: QueryMetrics,
        wait_s: float,
        behind: Callable[[str], bool] = lambda _tenant: False,
        searchable: Callable[[str], AsOf | None] = lambda _tenant: None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._near = near
        self._behind = behind
        self._searchable = searchable
        self._monotonic_s = monotonic_s
        self._index = index
        self._watch = watch
        self._metrics = metrics
        self._wait_s = wait_s
        self._bypass_until_s = 0.0

    def left_aside(self, tenant: str) -> bool:
        """Whether the tenant's cached answers are not served now."""
        return self._behind(tenant)

    def near_hit(self, tenant: str, key: str) -> NearHit | None:
        """The answer, if it is in this process and the tenant's answers are not left aside."""
        return None if self._behind(tenant) else self._near.get(key)

    async def near_proof(self, tenant: str, key: str) -> bool:
        """Wait for the next proof, if only that is missing to serve the answer of this process; else False at once."""
        if self._behind(tenant) or not self._near.lacks_proof(key):
            return False
        await self._near.next_proof()
        return True

    async def shared_hit(self, tenant: str, key: str) -> NearHit | None:
        """The answer, if it lies in Redis and the tenant's answers are not left aside; nothing else is asked."""
        if self._behind(tenant) or self._monotonic_s() < self._bypass_until_s:
            return None
        looked_s, looked_ms = self._monotonic_s(), _now_ms()
        try:
            look = await self._cache.lookup(tenant, key)
        except CacheUnavailable as error:
            self._leave_cache_aside(error)
            return None
        cached = _readable(look.entry)
        if cached is None or not look.seeded:
            return None
        self._near.put(tenant, key, look, cached, looked_s=looked_s)
        return NearHit(cached, dict(look.positions), looked_ms)

    async def look(self, tenant: str, key: str, *, lease_ms: int = 0) -> ReadSnapshot:
        """Where the tenant stands now; ``lease_ms`` as in ``AnswerCache.lookup``.

        Raises:
            IndexUnavailable: neither cache nor index can tell.
        """
        if self._behind(tenant):
            # What is searchable is true for more than the cached answers are.
            known = self._searchable(tenant)
            return ReadSnapshot(None, known, None) if known else await self._look_at_index(tenant)
        return await self._look_here_first(tenant, key, lease_ms)

    async def _look_here_first(self, tenant: str, key: str, lease_ms: int = 0) -> ReadSnapshot:
        hit = self._near.get(key)
        if hit is not None:
            self._metrics.near_hits.inc()
            return ReadSnapshot(
                None, AsOf.model_construct(positions=hit.positions, checked_ms=hit.checked_ms), hit.body
            )
        return await self._look_past_near(tenant, key, lease_ms)

    async def _look_past_near(self, tenant: str, key: str, lease_ms: int = 0) -> ReadSnapshot:
        if self._monotonic_s() >= self._bypass_until_s:
            try:
                return await self._look_at_cache(tenant, key, lease_ms)
            except CacheUnavailable as error:
                self._leave_cache_aside(error)
        return await self._look_at_index(tenant)

    async def _look_at_index(self, tenant: str) -> ReadSnapshot:
        looked_ms = _now_ms()
        return ReadSnapshot(None, _as_of(await self._index.positions(tenant), looked_ms), None)

    async def look_again(self, tenant: str, key: str, look: SharedRead) -> None:
        """A search begins: look again if the last look is old. The answer may be cached by now, and is ``found`` then.

        Where nobody can tell, the look before stands.
        """
        if _now_ms() - look.standing.as_of.checked_ms > LOOK_STANDS_MS:
            try:
                again = await self.look(tenant, key)
            except IndexUnavailable:
                pass
            else:
                if again.cached is None:
                    look.join(again)
                elif look.found(again):
                    return
        known = self._searchable(tenant)
        look.begin(searchable=known.positions if known else {})

    async def look_from(self, tenant: str, key: str, position: Position) -> ReadSnapshot:
        """Where the tenant stands once ``position`` is reached; waits for that.

        Raises:
            PositionNotReached: not within the time limit.
            IndexUnavailable: neither cache nor index can tell.
        """
        if self._behind(tenant):
            standing = await self._look_at_index(tenant)  # of this moment: what is known may just lack the position
        else:
            standing = await self._look_here_first(tenant, key)
        if standing.as_of.covers(position):
            return standing
        began_s = self._monotonic_s()
        standing = await self._wait(tenant, key, position, until_s=began_s + self._wait_s)
        reached = standing.as_of.covers(position)
        self._metrics.waited(self._monotonic_s() - began_s, reached=reached)
        if not reached:
            raise PositionNotReached(position, standing.as_of)
        return standing

    async def _wait(self, tenant: str, key: str, position: Position, *, until_s: float) -> ReadSnapshot:
        with self._watch.waiting(tenant, position) as woken:
            while True:
                woken.clear()
                # Only now, when no announcement can pass unnoticed any more.
                standing = await self._look_past_near(tenant, key)
                left_s = until_s - self._monotonic_s()
                if standing.as_of.covers(position):
                    return standing
                if left_s <= 0:
                    break
                try:
                    async with asyncio.timeout(min(POLL_S, left_s)):
                        await woken.wait()
                except TimeoutError:
                    pass
        return await self._catch_up(tenant, key, standing, position)

    async def _catch_up(self, tenant: str, key: str, standing: ReadSnapshot, position: Position) -> ReadSnapshot:
        """The index may be ahead of a Redis that lost its last announcements; what is searchable may be applied."""
        positions = await self._index.positions(tenant)
        if standing.epoch is None or not _as_of(positions, 0).covers(position):
            return standing
        try:
            await self._cache.apply(tenant, positions, drop=True)
        except CacheUnavailable as error:
            self._leave_cache_aside(error)
        return await self._look_past_near(tenant, key)  # what was just announced may not have been heard here yet

    async def _look_at_cache(self, tenant: str, key: str, lease_ms: int) -> ReadSnapshot:
        looked_s, looked_ms = self._monotonic_s(), _now_ms()
        look = await self._cache.lookup(tenant, key, lease_ms=lease_ms)
        if not look.seeded:
            await self._cache.seed(tenant, await self._index.positions(tenant))
            looked_s, looked_ms = self._monotonic_s(), _now_ms()
            look = await self._cache.lookup(tenant, key)
        cached = _readable(look.entry)
        if cached is not None:
            self._near.put(tenant, key, look, cached, looked_s=looked_s)
        return ReadSnapshot(look.epoch, _as_of(look.positions, looked_ms), cached, look.leased or cached is not None)

    def _leave_cache_aside(self, error: CacheUnavailable) -> None:
        self._bypass_until_s = self._monotonic_s() + BYPASS_S
        self._metrics.bypasses.inc()
        _log.warning("cache_bypassed", reason=str(error), for_s=BYPASS_S)


def _readable(entry: bytes | None) -> bytes | None:
    """The response of a stored entry, if there is one of this version."""
    try:
        return stored_response(entry) if entry is not None else None
    except UnreadableEntry:
        return None


def _as_of(positions: Mapping[int, int], looked_ms: float) -> AsOf:
    return AsOf(positions=dict(positions), checked_ms=looked_ms)


def _now_ms() -> float:
    return round(time.time() * 1_000, 3)
