"""Freshness reads: up to which positions an answer given now is true, and whether it is cached."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import structlog

from infra.opensearch.port import IndexUnavailable, SearchIndex
from infra.redis.entry import UnreadableEntry, stored_response
from infra.redis.port import AnswerCache, CacheUnavailable
from query.cache.near_cache import NearCache, NearHit
from query.cache.subscription import InvalidationSubscription
from query.telemetry.metrics import QueryMetrics
from schemas.positions import AsOf, Position

BYPASS_S: Final = 1.0
"""Cache bypass after a Redis failure, so that not every request waits for the Redis timeout."""

POLL_S: Final = 0.05
"""Poll interval of a request that waits for a position. It covers lost invalidation messages."""

MAX_READ_AGE_MS: Final = 100.0
"""Maximum age of a read when its search starts. An older read is repeated: the answer would be as old as its question
was queued, and the next changes would win the epoch race against it."""

_log = structlog.get_logger(__name__)


class PositionNotReached(Exception):
    """The requested position was not reached in time.

    Attributes:
        as_of: the current positions.
    """

    def __init__(self, position: Position, as_of: AsOf) -> None:
        super().__init__(f"position {position} is not reached yet")
        self.as_of = as_of


@dataclass(frozen=True, slots=True)
class ReadSnapshot:
    """Result of one freshness read. It precedes every retrieval.

    Attributes:
        epoch: epoch under which an answer may be stored. None if Redis is unavailable, bypassed, or not needed.
        as_of: positions that a cached answer, or one retrieved from now on, reflects.
        cached: cached response body without the per-request fields, or None.
        leased: False if another process holds the fill lease.
    """

    epoch: int | None
    as_of: AsOf
    cached: bytes | None
    leased: bool = True

    @property
    def basis(self) -> object:
        """Retrievals that started from reads of equal basis are equally fresh for both readers."""
        return self.epoch if self.epoch is not None else tuple(sorted(self.as_of.positions.items()))

    def merged_with(self, other: "ReadSnapshot") -> "ReadSnapshot":
        """The later of both reads, with the positions that hold for a retrieval that starts after both."""
        later, earlier = (other, self) if other.as_of.checked_ms >= self.as_of.checked_ms else (self, other)
        return later.with_positions(earlier.as_of.positions)

    def with_positions(self, positions: Mapping[int, int]) -> "ReadSnapshot":
        """The same read, for an answer that also reflects these positions."""
        read = self.as_of.positions
        merged = {partition: max(offset, read.get(partition, -1)) for partition, offset in positions.items()}
        return replace(self, as_of=AsOf(positions={**read, **merged}, checked_ms=self.as_of.checked_ms))


class SharedRead:
    """The latest read of all requests that share one flight.

    Any request may join until the search starts: the answer will be as fresh for it as its own retrieval would be.
    After that, only requests whose read has the same basis as the search may join.

    Args:
        first: read of the request that started the flight.

    Attributes:
        snapshot: lower bound of what the answer reflects; includes the answer if it was found in the cache.
    """

    def __init__(self, first: ReadSnapshot) -> None:
        self.snapshot = first
        self._search_started = False

    def is_valid_for(self, snapshot: ReadSnapshot) -> bool:
        """Whether the answer is at least as fresh as a retrieval that starts from ``snapshot``."""
        return not self._search_started or self.snapshot.basis == snapshot.basis

    def join(self, snapshot: ReadSnapshot) -> bool:
        """Join with a read of one's own; returns False if the answer would be too old for it."""
        if not self._search_started:
            self.snapshot = self.snapshot.merged_with(snapshot)
        return self.is_valid_for(snapshot)

    def start_search(self, *, searchable: Mapping[int, int]) -> None:
        """Close the flight to older reads. The search finds at least the positions in ``searchable``."""
        self.snapshot = self.snapshot.with_positions(searchable)
        self._search_started = True

    def resolve(self, snapshot: ReadSnapshot) -> bool:
        """Use a cached answer that a later read found; returns False if it lacks positions promised to a joiner."""
        positions = snapshot.as_of.positions
        promised = self.snapshot.as_of.positions
        if any(positions.get(partition, -1) < offset for partition, offset in promised.items()):
            return False
        self.snapshot, self._search_started = snapshot, True
        return True

    def seen_by(self, snapshot: ReadSnapshot) -> ReadSnapshot:
        """What the shared answer reflects for a request that read ``snapshot``."""
        return replace(snapshot.merged_with(self.snapshot), cached=self.snapshot.cached)


class InvalidationMonitor(Protocol):
    """Which tenants bypass the cache because invalidation lags."""

    def is_lagging(self, tenant: str) -> bool:
        """Whether cached answers of the tenant must not be served."""
        ...

    def searchable(self, tenant: str) -> AsOf | None:
        """Positions known to be searchable from a recent read of the index; None if there was none."""
        ...


class NoLag:
    """An ``InvalidationMonitor`` for caches that never lag."""

    def is_lagging(self, _tenant: str) -> bool:
        """Never."""
        return False

    def searchable(self, _tenant: str) -> AsOf | None:
        """Unknown."""
        return None


@dataclass(frozen=True, slots=True)
class FreshnessSources:
    """What freshness reads are made from.

    Attributes:
        cache: Redis answer cache; authority for epochs and positions.
        near: in-process answer cache.
        index: source of searchable positions while Redis is unavailable or has lost its data.
        subscription: wakes requests that wait for a position.
        monitor: decides which tenants bypass the cache.
    """

    cache: AnswerCache
    near: NearCache
    index: SearchIndex
    subscription: InvalidationSubscription
    monitor: InvalidationMonitor = field(default_factory=NoLag)


class FreshnessReader:
    """Reads epoch, positions and cached answer from the near cache or Redis; positions from the index as a fallback.

    Args:
        sources: stores and caches.
        metrics: counts waits and failures.
        wait_s: longest wait for a position.
        monotonic_s: monotonic clock.
    """

    def __init__(
        self,
        sources: FreshnessSources,
        *,
        metrics: QueryMetrics,
        wait_s: float,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = sources.cache
        self._near = sources.near
        self._index = sources.index
        self._subscription = sources.subscription
        self._monitor = sources.monitor
        self._monotonic_s = monotonic_s
        self._metrics = metrics
        self._wait_s = wait_s
        self._bypass_until_s = 0.0

    def is_bypassed(self, tenant: str) -> bool:
        """Whether cached answers of the tenant are not served now: invalidation lags, or Redis may evict keys."""
        return self._monitor.is_lagging(tenant) or not self._subscription.trusted

    def near_hit(self, tenant: str, key: str) -> NearHit | None:
        """The answer from the in-process cache, if it may be served."""
        return None if self.is_bypassed(tenant) else self._near.get(key)

    async def await_heartbeat(self, tenant: str, key: str) -> bool:
        """Wait for the next heartbeat if that is all an in-process answer lacks; else return False at once."""
        if self.is_bypassed(tenant) or not self._near.lacks_heartbeat(key):
            return False
        await self._near.next_heartbeat()
        return True

    async def redis_hit(self, tenant: str, key: str) -> NearHit | None:
        """The answer from Redis, if it may be served. Asks nothing else."""
        if self.is_bypassed(tenant) or self._monotonic_s() < self._bypass_until_s:
            return None
        read_s, read_ms = self._monotonic_s(), _now_ms()
        try:
            lookup = await self._cache.lookup(tenant, key)
        except CacheUnavailable as error:
            self._start_bypass(error)
            return None
        cached = _readable(lookup.entry)
        if cached is None or not lookup.seeded:
            return None
        self._near.put(tenant, key, lookup, cached, read_s=read_s)
        return NearHit(cached, dict(lookup.positions), read_ms)

    async def read(self, tenant: str, key: str, *, lease_ms: int = 0) -> ReadSnapshot:
        """Read the tenant's current state; ``lease_ms`` as in ``AnswerCache.lookup``.

        Raises:
            IndexUnavailable: neither Redis nor the index is available.
        """
        if self.is_bypassed(tenant):
            # The index is ahead of the cached answers, so its positions are the better ones.
            searchable = self._monitor.searchable(tenant)
            return ReadSnapshot(None, searchable, None) if searchable else await self._read_index(tenant)
        return await self._read_near_first(tenant, key, lease_ms)

    async def reread(self, tenant: str, key: str, read: SharedRead) -> None:
        """Repeat an old read as the search starts. A cached answer that it finds resolves ``read``.

        Keeps the previous read if neither store is available.
        """
        if _now_ms() - read.snapshot.as_of.checked_ms > MAX_READ_AGE_MS:
            try:
                again = await self.read(tenant, key)
            except IndexUnavailable:
                pass
            else:
                if again.cached is None:
                    read.join(again)
                elif read.resolve(again):
                    return
        searchable = self._monitor.searchable(tenant)
        read.start_search(searchable=searchable.positions if searchable else {})

    async def read_at(self, tenant: str, key: str, position: Position) -> ReadSnapshot:
        """Read the tenant's state once ``position`` is reached.

        Raises:
            PositionNotReached: the wait timed out.
            IndexUnavailable: neither Redis nor the index is available.
        """
        if self.is_bypassed(tenant):
            snapshot = await self._read_index(tenant)  # a recent read may just lack the position
        else:
            snapshot = await self._read_near_first(tenant, key)
        if snapshot.as_of.covers(position):
            return snapshot
        began_s = self._monotonic_s()
        snapshot = await self._wait(tenant, key, position, until_s=began_s + self._wait_s)
        reached = snapshot.as_of.covers(position)
        self._metrics.observe_position_wait(self._monotonic_s() - began_s, reached=reached)
        if not reached:
            raise PositionNotReached(position, snapshot.as_of)
        return snapshot

    async def _read_near_first(self, tenant: str, key: str, lease_ms: int = 0) -> ReadSnapshot:
        hit = self._near.get(key)
        if hit is not None:
            self._metrics.near_cache_hits.inc()
            as_of = AsOf.model_construct(positions=hit.positions, checked_ms=hit.checked_ms)
            return ReadSnapshot(None, as_of, hit.body)
        return await self._read_stores(tenant, key, lease_ms)

    async def _read_stores(self, tenant: str, key: str, lease_ms: int = 0) -> ReadSnapshot:
        if self._monotonic_s() >= self._bypass_until_s:
            try:
                return await self._read_redis(tenant, key, lease_ms)
            except CacheUnavailable as error:
                self._start_bypass(error)
        return await self._read_index(tenant)

    async def _read_index(self, tenant: str) -> ReadSnapshot:
        read_ms = _now_ms()
        return ReadSnapshot(None, _as_of(await self._index.positions(tenant), read_ms), None)

    async def _read_redis(self, tenant: str, key: str, lease_ms: int) -> ReadSnapshot:
        read_s, read_ms = self._monotonic_s(), _now_ms()
        lookup = await self._cache.lookup(tenant, key, lease_ms=lease_ms)
        if not lookup.seeded:
            await self._cache.seed(tenant, await self._index.positions(tenant))
            read_s, read_ms = self._monotonic_s(), _now_ms()
            lookup = await self._cache.lookup(tenant, key)
        cached = _readable(lookup.entry)
        if cached is not None:
            self._near.put(tenant, key, lookup, cached, read_s=read_s)
        is_leased = lookup.leased or cached is not None
        return ReadSnapshot(lookup.epoch, _as_of(lookup.positions, read_ms), cached, is_leased)

    async def _wait(self, tenant: str, key: str, position: Position, *, until_s: float) -> ReadSnapshot:
        with self._subscription.waiting(tenant, position) as woken:
            while True:
                woken.clear()
                # Only after clear(): an invalidation message that arrives from here on sets the event.
                snapshot = await self._read_stores(tenant, key)
                remaining_s = until_s - self._monotonic_s()
                if snapshot.as_of.covers(position):
                    return snapshot
                if remaining_s <= 0:
                    break
                try:
                    async with asyncio.timeout(min(POLL_S, remaining_s)):
                        await woken.wait()
                except TimeoutError:
                    pass
        return await self._catch_up(tenant, key, snapshot, position)

    async def _catch_up(self, tenant: str, key: str, snapshot: ReadSnapshot, position: Position) -> ReadSnapshot:
        """Apply searchable positions to a Redis that lost its last invalidations, dropping all its answers."""
        positions = await self._index.positions(tenant)
        if snapshot.epoch is None or not _as_of(positions, 0).covers(position):
            return snapshot
        try:
            await self._cache.apply(tenant, positions, drop=True)
        except CacheUnavailable as error:
            self._start_bypass(error)
        return await self._read_stores(tenant, key)  # this process may not have received the message yet

    def _start_bypass(self, error: CacheUnavailable) -> None:
        self._bypass_until_s = self._monotonic_s() + BYPASS_S
        self._metrics.cache_bypasses.inc()
        _log.warning("cache_bypassed", reason=str(error), for_s=BYPASS_S)


def _readable(entry: bytes | None) -> bytes | None:
    """The response of a stored entry; None if there is none of this format version."""
    try:
        return stored_response(entry) if entry is not None else None
    except UnreadableEntry:
        return None


def _as_of(positions: Mapping[int, int], read_ms: float) -> AsOf:
    return AsOf(positions=dict(positions), checked_ms=read_ms)


def _now_ms() -> float:
    return round(time.time() * 1_000, 3)
