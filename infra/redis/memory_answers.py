"""Cached answers in this process: the in-memory twin, for tests and simulation."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import time_ns

from infra.redis.port import Applied, CacheUnavailable, Lookup, Pending, SliceChange, StoredEntry, reached_by_all
from infra.settings import AnswerSettings
from schemas.cache_keys import slice_of


@dataclass(slots=True)
class _Answer:
    fill: int
    epoch: int
    entry: bytes
    ends_us: int


@dataclass(slots=True)
class _Slice:
    epoch: int
    judged: int
    floor: int
    seeded: bool = False
    fill: int = 0
    positions: dict[int, int] = field(default_factory=dict)
    answers: dict[str, _Answer] = field(default_factory=dict)
    # Oldest first, like the stream.
    changes: list[tuple[SliceChange, Mapping[int, int]]] = field(default_factory=list)


class MemoryAnswerCache:
    """See ``AnswerCache`` and ``AnswerSlices``. No method gives way to another, as scripts do not.

    Attributes:
        available: set to False to have every method raise CacheUnavailable; open subscriptions go on.

    Args:
        now_us: epoch microseconds of the server's clock.
        cache: how slices are laid out.
    """

    def __init__(
        self, now_us: Callable[[], int] = lambda: time_ns() // 1_000, cache: AnswerSettings | None = None
    ) -> None:
        self.available = True
        self._now_us = now_us
        self._cache = cache or AnswerSettings()
        self._last_epoch = 0
        self._slices: dict[tuple[str, int], _Slice] = {}
        self._subscribers: set[asyncio.Queue[Applied | None]] = set()

    @property
    def count(self) -> int:
        """See ``AnswerSlices``."""
        return self._cache.slices

    async def lookup(self, tenant: str, key: str) -> Lookup:
        """See ``AnswerCache``."""
        place = self._slice(tenant, slice_of(key, self.count))
        answer = self._there(place, key)
        entry = answer.entry if answer is not None else None
        return Lookup(place.epoch, dict(place.positions), entry, seeded=place.seeded)

    async def store(self, tenant: str, key: str, entry: bytes, *, epoch: int, ttl_s: int) -> bool:
        """See ``AnswerCache``."""
        place = self._slice(tenant, slice_of(key, self.count))
        if place.epoch != epoch:
            return False
        place.fill += 1
        place.answers.pop(key, None)
        place.answers[key] = _Answer(place.fill, epoch, entry, self._now_us() + ttl_s * 1_000_000)
        for oldest in list(place.answers)[:4]:
            if self._there(place, oldest) is not None and len(place.answers) <= self._cache.per_slice:
                break
            del place.answers[oldest]
        return True

    async def apply(self, tenant: str, positions: Mapping[int, int], *, drop: bool) -> int:
        """See ``AnswerCache``."""
        for number in range(self.count):
            place = self._slice(tenant, number)
            if drop:
                self._drop(tenant, place, positions)
            else:
                self._append(tenant, place, positions, b"")
        return max(self._slice(tenant, number).epoch for number in range(self.count))

    async def positions(self, tenant: str) -> Mapping[int, int]:
        """See ``AnswerCache``."""
        self._check_available()
        slices = (self._slices.get((tenant, number)) for number in range(self.count))
        return reached_by_all([place.positions if place is not None else {} for place in slices])

    async def seed(self, tenant: str, positions: Mapping[int, int]) -> None:
        """See ``AnswerCache``."""
        for number in range(self.count):
            place = self._slice(tenant, number)
            if not place.seeded:
                place.seeded = True
                self._drop(tenant, place, positions)

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

    async def append(self, tenant: str, number: int, positions: Mapping[int, int], change: bytes) -> bool:
        """See ``AnswerSlices``."""
        return self._append(tenant, self._slice(tenant, number), positions, change)

    async def pending(self, tenant: str, number: int, *, known: int, fill: int) -> Pending:
        """See ``AnswerSlices``."""
        place = self._slice(tenant, number)
        return Pending(
            epoch=place.epoch,
            judged=place.judged,
            floor=place.floor,
            changes=tuple(change for change, _ in place.changes if change.epoch > known),
            fills=tuple((answer.fill, key) for key, answer in place.answers.items() if answer.fill > fill),
            oldest_fill=next((answer.fill for answer in place.answers.values()), None),
        )

    async def entries(self, tenant: str, number: int, keys: Sequence[str]) -> list[StoredEntry | None]:
        """See ``AnswerSlices``."""
        place = self._slice(tenant, number)
        found = (self._there(place, key) for key in keys)
        return [StoredEntry(one.fill, one.epoch, one.entry) if one is not None else None for one in found]

    async def settle(
        self, tenant: str, number: int, *, judged: int, epoch: int, drop: Sequence[tuple[int, str]]
    ) -> bool:
        """See ``AnswerSlices``."""
        place = self._slice(tenant, number)
        if place.judged != judged:
            return False
        for fill, key in drop:
            if key in place.answers and place.answers[key].fill == fill:
                del place.answers[key]
        self._judged(tenant, place, epoch, {})
        return True

    async def drop_all(self, tenant: str, number: int) -> None:
        """See ``AnswerSlices``."""
        self._drop(tenant, self._slice(tenant, number), {})

    def lose_everything(self) -> None:
        """What a restart without persistence does; open subscriptions break."""
        self._slices.clear()
        self.break_subscriptions()

    def break_subscriptions(self) -> None:
        """End every subscription, after what was announced."""
        for subscriber in self._subscribers:
            subscriber.put_nowait(None)

    def _append(self, tenant: str, place: _Slice, positions: Mapping[int, int], change: bytes) -> bool:
        if not change and place.judged == place.epoch:
            self._judged(tenant, place, place.epoch, positions)
            return False
        waiting = sum(one.epoch > place.judged for one, _ in place.changes)
        if not place.answers or waiting >= self._cache.changes:
            self._drop(tenant, place, positions)
            return False
        previous, place.epoch = place.epoch, self._new_epoch()
        place.changes.append((SliceChange(place.epoch, previous, change), dict(positions)))
        del place.changes[: -self._cache.changes]
        return True

    def _drop(self, tenant: str, place: _Slice, positions: Mapping[int, int]) -> None:
        place.epoch = place.floor = self._new_epoch()
        self._judged(tenant, place, place.epoch, positions)
        place.answers.clear()
        place.changes.clear()

    def _judged(self, tenant: str, place: _Slice, epoch: int, positions: Mapping[int, int]) -> None:
        """Advance by the changes up to ``epoch`` and by ``positions``, and announce it."""
        reflected = [positions for change, positions in place.changes if place.judged < change.epoch <= epoch]
        place.judged = epoch
        announced: dict[int, int] = {}
        for told in (*reflected, positions):
            for partition, offset in told.items():
                announced[partition] = max(offset, announced.get(partition, offset))
                place.positions[partition] = max(offset, place.positions.get(partition, offset))
        for subscriber in self._subscribers:
            subscriber.put_nowait(Applied(tenant, epoch, announced))

    def _there(self, place: _Slice, key: str) -> _Answer | None:
        answer = place.answers.get(key)
        return answer if answer is not None and self._now_us() < answer.ends_us else None

    def _slice(self, tenant: str, number: int) -> _Slice:
        self._check_available()
        place = self._slices.get((tenant, number))
        if place is None:
            epoch = self._new_epoch()
            place = self._slices[tenant, number] = _Slice(epoch, epoch, epoch)
        return place

    def _check_available(self) -> None:
        if not self.available:
            raise CacheUnavailable("the cache was made unavailable")

    def _new_epoch(self) -> int:
        # Remembered past a loss, where the server has its clock: a simulated clock may stand still.
        self._last_epoch = max(self._now_us(), self._last_epoch + 1)
        return self._last_epoch
