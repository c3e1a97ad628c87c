"""Waking those who wait for a position, as soon as invalidation announces it."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog

from infra.redis.port import AnswerCache, Applied, CacheUnavailable, CacheUntrusted
from query.cache.near_cache import NearCache
from schemas.positions import Position

RESUBSCRIBE_S: Final = 0.5
"""Pause after a broken subscription."""

_log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class _Waiter:
    position: Position
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class InvalidationSubscription:
    """One subscription for the near cache and all waiting requests of this process.

    A wake is a hint, not a proof: a waiter looks up the positions again, and also does so now and then unasked, since
    announcements are lost while the subscription is broken. The near cache is told of that.

    Args:
        cache: whose announcements are heard.
        near: told of each of them.
    """

    def __init__(self, cache: AnswerCache, near: NearCache | None = None) -> None:
        self._cache = cache
        self._near = near if near is not None else NearCache(slices=cache.count, max_bytes=0)
        self._waiters: defaultdict[str, set[_Waiter]] = defaultdict(set)
        self._subscribed = asyncio.Event()
        self._trusted = True

    @property
    def trusted(self) -> bool:
        """False while the cache is one whose answers are not to be served."""
        return self._trusted

    @property
    def live(self) -> bool:
        """True while no announcement can be missed."""
        return self._subscribed.is_set()

    async def run(self) -> None:
        """Listen until cancelled; a broken subscription is renewed."""
        while True:
            try:
                heard = self._cache.applied(subscribed=self._begin, complete=self._near.complete)
                async with aclosing(heard) as announcements:
                    async for announcement in announcements:
                        self._near.heard(announcement)
                        self._wake(announcement)
            except CacheUntrusted as error:
                self._trusted = False
                _log.error("cache_not_used", reason=str(error))
            except CacheUnavailable as error:
                _log.warning("subscription_broken", reason=str(error))
            finally:
                self._subscribed.clear()
                self._near.lost()
            await asyncio.sleep(RESUBSCRIBE_S)

    @contextmanager
    def waiting(self, tenant: str, position: Position) -> Iterator[asyncio.Event]:
        """An event that is set whenever an announcement covers ``position``."""
        waiter = _Waiter(position)
        self._waiters[tenant].add(waiter)
        try:
            yield waiter.woken
        finally:
            self._waiters[tenant].discard(waiter)
            if not self._waiters[tenant]:
                del self._waiters[tenant]

    def _begin(self) -> None:
        self._trusted = True
        self._near.subscribed()
        self._subscribed.set()

    def _wake(self, announcement: Applied) -> None:
        for waiter in self._waiters.get(announcement.tenant, ()):
            if announcement.positions.get(waiter.position.partition, -1) >= waiter.position.offset:
                waiter.woken.set()
