"""Cached answers in this process: the in-memory twin, for tests and simulation."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from time import time_ns

from infra.redis.port import Applied, CacheUnavailable, Lookup


@dataclass(slots=True)
class _Answer:
    epoch: int
    entry: bytes
    ends_us: int


@dataclass(slots=True)
class _Slice:
    epoch: int
    seeded: bool = False
    positions: dict[int, int] = field(default_factory=dict)
    answers: dict[str, _Answer] = field(default_factory=dict)


class MemoryAnswerCache:
    """See ``AnswerCache``. No method gives way to another, as scripts do not.

    Attributes:
        available: set to False to have every method raise CacheUnavailable; open subscriptions go on.

    Args:
        now_us: epoch microseconds of the server's clock.
    """

    def __init__(self, now_us: Callable[[], int] = lambda: time_ns() // 1_000) -> None:
        self.available = True
        self._now_us = now_us
        self._last_epoch = 0
        self._slices: dict[str, _Slice] = {}
        self._subscribers: set[asyncio.Queue[Applied | None]] = set()

    async def lookup(self, tenant: str, key: str) -> Lookup:
        """See ``AnswerCache``."""
        place = self._slice(tenant)
        answer = place.answers.get(key)
        valid = answer is not None and answer.epoch == place.epoch and self._now_us() < answer.ends_us
        entry = answer.entry if answer is not None and valid else None
        return Lookup(place.epoch, dict(place.positions), entry, seeded=place.seeded)

    async def store(self, tenant: str, key: str, entry: bytes, *, epoch: int, ttl_s: int) -> bool:
        """See ``AnswerCache``."""
        place = self._slice(tenant)
        if place.epoch != epoch:
            return False
        place.answers[key] = _Answer(epoch, entry, self._now_us() + ttl_s * 1_000_000)
        return True

    async def apply(self, tenant: str, positions: Mapping[int, int], *, drop: bool) -> int:
        """See ``AnswerCache``."""
        place = self._slice(tenant)
        if drop:
            place.epoch = self._new_epoch()
        for partition, offset in positions.items():
            place.positions[partition] = max(offset, place.positions.get(partition, offset))
        for subscriber in self._subscribers:
            subscriber.put_nowait(Applied(tenant, place.epoch, dict(positions)))
        return place.epoch

    async def positions(self, tenant: str) -> Mapping[int, int]:
        """See ``AnswerCache``."""
        self._check_available()
        place = self._slices.get(tenant)
        return {} if place is None else dict(place.positions)

    async def seed(self, tenant: str, positions: Mapping[int, int]) -> None:
        """See ``AnswerCache``."""
        place = self._slice(tenant)
        if not place.seeded:
            place.seeded = True
            await self.apply(tenant, positions, drop=True)

    async def applied(self, *, subscribed: asyncio.Event | None = None) -> AsyncGenerator[Applied, None]:
        """See ``AnswerCache``."""
        self._check_available()
        announcements: asyncio.Queue[Applied | None] = asyncio.Queue()
        self._subscribers.add(announcements)
        try:
            if subscribed is not None:
                subscribed.set()
            while (announcement := await announcements.get()) is not None:
                yield announcement
            raise CacheUnavailable("the subscription was interrupted")
        finally:
            self._subscribers.discard(announcements)

    def lose_everything(self) -> None:
        """What a restart without persistence does; open subscriptions break."""
        self._slices.clear()
        self.break_subscriptions()

    def break_subscriptions(self) -> None:
        """End every subscription, after what was announced."""
        for subscriber in self._subscribers:
            subscriber.put_nowait(None)

    def _slice(self, tenant: str) -> _Slice:
        self._check_available()
        place = self._slices.get(tenant)
        if place is None:
            place = self._slices[tenant] = _Slice(self._new_epoch())
        return place

    def _check_available(self) -> None:
        if not self.available:
            raise CacheUnavailable("the cache was made unavailable")

    def _new_epoch(self) -> int:
        # Remembered past a loss, where the server has its clock: a simulated clock may stand still.
        self._last_epoch = max(self._now_us(), self._last_epoch + 1)
        return self._last_epoch
