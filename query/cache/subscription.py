"""The invalidation subscription of a query process."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog

from infra.redis.port import AnswerCache, CacheUnavailable, CacheUntrusted, InvalidationMessage
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
    """One subscription to invalidation messages, for the near cache and for requests that wait for a position.

    A wake-up is a hint: the waiter reads the positions again. It also polls, because messages are lost while the
    subscription is broken.

    Args:
        cache: Redis answer cache that publishes the messages.
        near: receives each message, heartbeat and disconnect.
    """

    def __init__(self, cache: AnswerCache, near: NearCache | None = None) -> None:
        self._cache = cache
        self._near = near if near is not None else NearCache(slices=cache.count, max_bytes=0)
        self._waiters: defaultdict[str, set[_Waiter]] = defaultdict(set)
        self._subscribed = asyncio.Event()
        self._trusted = True

    @property
    def trusted(self) -> bool:
        """False if Redis may evict keys at will, so that its answers must not be served."""
        return self._trusted

    @property
    def live(self) -> bool:
        """Whether the subscription is up."""
        return self._subscribed.is_set()

    async def run(self) -> None:
        """Receive messages until cancelled; reconnects a broken subscription."""
        while True:
            try:
                received = self._cache.invalidations(on_subscribed=self._start, on_heartbeat=self._near.on_heartbeat)
                async with aclosing(received) as messages:
                    async for message in messages:
                        self._near.on_message(message)
                        self._wake(message)
            except CacheUntrusted as error:
                self._trusted = False
                _log.error("cache_not_used", reason=str(error))
            except CacheUnavailable as error:
                _log.warning("subscription_broken", reason=str(error))
            finally:
                self._subscribed.clear()
                self._near.on_disconnected()
            await asyncio.sleep(RESUBSCRIBE_S)

    @contextmanager
    def waiting(self, tenant: str, position: Position) -> Iterator[asyncio.Event]:
        """An event that is set by each message that covers ``position``."""
        waiter = _Waiter(position)
        self._waiters[tenant].add(waiter)
        try:
            yield waiter.woken
        finally:
            self._waiters[tenant].discard(waiter)
            if not self._waiters[tenant]:
                del self._waiters[tenant]

    def _start(self) -> None:
        self._trusted = True
        self._near.on_subscribed()
        self._subscribed.set()

    def _wake(self, message: InvalidationMessage) -> None:
        for waiter in self._waiters.get(message.tenant, ()):
            if message.positions.get(waiter.position.partition, -1) >= waiter.position.offset:
                waiter.woken.set()
