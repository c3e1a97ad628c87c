"""Cached answers in this process: the in-memory twin, for tests and simulation."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import time_ns
from typing import Final

from typing_extensions import override

from infra.redis.port import (
    AnswerCache,
    AnswerSlices,
    Appended,
    Applied,
    CacheUnavailable,
    Dropped,
    Lookup,
    Pending,
    SliceChange,
    StoredEntry,
    reached_by_all,
)
from infra.settings import AnswerSettings
from schemas.cache_keys import slice_of

_HEARTBEAT_S: Final = 0.2


@dataclass(slots=True)
class _Answer:
    fill: int
    epoch: int
    entry: bytes
    rest: bytes
    ends_us: int


@dataclass(slots=True)
class _Slice:
    epoch: int
    judged: int
    floor: int
    seeded: bool = False
    fill: int = 0
    told: int = 0
    positions: dict[int, int] = field(default_factory=dict)
    answers: dict[str, _Answer] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    # Keys (None: all of the slice) with the rest.
    drops: list[tuple[frozenset[str] | None, Dropped]] = field(default_factory=list)
    # Oldest first, like the stream.
    changes: list[tuple[SliceChange, Mapping[int, int]]] = field(default_factory=list)


class MemoryAnswerCache(AnswerCache, AnswerSlices):
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
    @override
    def count(self) -> int:
        return self._cache.slices

    @override
    async def lookup(self, tenant: str, key: str, *, lease_ms: int = 0, whole: bool = False) -> Lookup:
        place, now_us = self._slice(tenant, slice_of(key, self.count)), self._now_us()
        answer = self._there(place, key)
        leased = answer is None and (not lease_ms or place.leases.get(key, now_us) <= now_us)
        if lease_ms and leased:
            place.leases[key] = now_us + lease_ms * 1_000
        return Lookup(
            epoch=place.epoch,
            positions=dict(place.positions),
            entry=answer.entry + (answer.rest if whole else b"") if answer is not None else None,
            seeded=place.seeded,
            told=place.told,
            ends_ms=(answer.ends_us - now_us) // 1_000 if answer is not None else 0,
            leased=leased,
        )

    @override
    async def store(self, tenant: str, key: str, entry: bytes, *, epoch: int, ttl_s: int, rest: bytes = b"") -> bool:
        number = slice_of(key, self.count)
        place = self._slice(tenant, number)
        place.leases.pop(key, None)
        if place.epoch != epoch:
            return False
        given_up = {key} if self._there(place, key) is not None else set()
        place.fill += 1
        place.answers.pop(key, None)
        place.answers[key] = _Answer(place.fill, epoch, entry, rest, self._now_us() + ttl_s * 1_000_000)
        for oldest in list(place.answers)[:4]:
            if self._there(place, oldest) is not None:
                if len(place.answers) <= self._cache.per_slice:
                    break
                given_up.add(oldest)
            del place.answers[oldest]
        if given_up:
            self._announce(tenant, number, place, {}, given_up)
        return True

    @override
    async def apply(self, tenant: str, positions: Mapping[int, int], *, drop: bool) -> int:
        for number in range(self.count):
            if drop:
                self._drop(tenant, number, positions)
            else:
                self._append(tenant, number, positions, b"")
        return max(self._slice(tenant, number).epoch for number in range(self.count))

    @override
    async def positions(self, tenant: str) -> Mapping[int, int]:
        self._check_available()
        slices = (self._slices.get((tenant, number)) for number in range(self.count))
        return reached_by_all([place.positions if place is not None else {} for place in slices])

    @override
    async def seed(self, tenant: str, positions: Mapping[int, int]) -> None:
        for number in range(self.count):
            place = self._slice(tenant, number)
            if not place.seeded:
                place.seeded = True
                self._drop(tenant, number, positions)

    @override
    async def applied(
        self, *, subscribed: Callable[[], None] | None = None, complete: Callable[[float], None] | None = None
    ) -> AsyncGenerator[Applied, None]:
        self._check_available()
        announcements: asyncio.Queue[Applied | None] = asyncio.Queue()
        self._subscribers.add(announcements)
        try:
            if subscribed is not None:
                subscribed()
            while True:
                if complete is not None and announcements.empty():
                    complete(asyncio.get_running_loop().time())
                waiting = asyncio.ensure_future(announcements.get())
                try:
                    while not (await asyncio.wait((waiting,), timeout=_HEARTBEAT_S))[0]:
                        if complete is not None:
                            complete(asyncio.get_running_loop().time())
                finally:
                    waiting.cancel()
                announcement = waiting.result()
                if announcement is None:
                    break
                yield announcement
            raise CacheUnavailable("the subscription was interrupted")
        finally:
            self._subscribers.discard(announcements)

    @override
    async def append(self, tenant: str, number: int, positions: Mapping[int, int], change: bytes) -> Appended:
        place = self._slice(tenant, number)
        reached = {partition: place.positions[partition] for partition in positions if partition in place.positions}
        return Appended(self._append(tenant, number, positions, change), reached)

    @override
    async def pending(self, tenant: str, number: int, *, known: int, fill: int) -> Pending:
        place = self._slice(tenant, number)
        return Pending(
            epoch=place.epoch,
            judged=place.judged,
            floor=place.floor,
            changes=tuple(change for change, _ in place.changes if change.epoch > known),
            fills=tuple((answer.fill, key) for key, answer in place.answers.items() if answer.fill > fill),
            oldest_fill=next((answer.fill for answer in place.answers.values()), None),
        )

    @override
    async def entries(self, tenant: str, number: int, keys: Sequence[str]) -> list[StoredEntry | None]:
        place = self._slice(tenant, number)
        found = (self._there(place, key) for key in keys)
        return [StoredEntry(one.fill, one.epoch, one.entry + one.rest) if one is not None else None for one in found]

    @override
    async def settle(
        self, tenant: str, number: int, *, judged: int, epoch: int, drop: Sequence[tuple[int, str]], why: bytes = b""
    ) -> bool:
        place = self._slice(tenant, number)
        if place.judged != judged:
            return False
        for fill, key in drop:
            if key in place.answers and place.answers[key].fill == fill:
                del place.answers[key]
        keys = frozenset(key for _, key in drop)
        if keys:
            place.drops.append((keys, Dropped(self._now_us() // 1_000, everything=False, why=why)))
        self._judged(tenant, number, epoch, {}, keys)
        return True

    @override
    async def drop_all(self, tenant: str, number: int, why: bytes = b"") -> None:
        self._drop(tenant, number, {}, why)

    @override
    async def drops(self, tenant: str, number: int, key: str) -> list[Dropped]:
        return [one for keys, one in reversed(self._slice(tenant, number).drops) if keys is None or key in keys]

    def lose_everything(self) -> None:
        """What a restart without persistence does; open subscriptions break."""
        self._slices.clear()
        self.break_subscriptions()

    def break_subscriptions(self) -> None:
        """End every subscription, after what was announced."""
        for subscriber in self._subscribers:
            subscriber.put_nowait(None)

    def _append(self, tenant: str, number: int, positions: Mapping[int, int], change: bytes) -> bool:
        place = self._slice(tenant, number)
        if not change and place.judged == place.epoch:
            self._judged(tenant, number, place.epoch, positions, ())
            return False
        waiting = sum(one.epoch > place.judged for one, _ in place.changes)
        if not place.answers or waiting >= self._cache.changes:
            self._drop(tenant, number, positions)
            return False
        previous, place.epoch = place.epoch, self._new_epoch()
        place.changes.append((SliceChange(place.epoch, previous, change), dict(positions)))
        del place.changes[: -self._cache.changes]
        return True

    def _drop(self, tenant: str, number: int, positions: Mapping[int, int], why: bytes = b"") -> None:
        place = self._slice(tenant, number)
        if place.answers:
            place.drops.append((None, Dropped(self._now_us() // 1_000, everything=True, why=why)))
        place.epoch = place.floor = self._new_epoch()
        place.answers.clear()
        self._judged(tenant, number, place.epoch, positions, None)
        place.changes.clear()

    def _judged(
        self, tenant: str, number: int, epoch: int, positions: Mapping[int, int], dropped: Iterable[str] | None
    ) -> None:
        """Advance by the changes up to ``epoch`` and by ``positions``, and announce it."""
        place = self._slice(tenant, number)
        reflected = [positions for change, positions in place.changes if place.judged < change.epoch <= epoch]
        place.judged = epoch
        announced: dict[int, int] = {}
        for told in (*reflected, positions):
            for partition, offset in told.items():
                announced[partition] = max(offset, announced.get(partition, offset))
                place.positions[partition] = max(offset, place.positions.get(partition, offset))
        self._announce(tenant, number, place, announced, dropped)

    def _announce(
        self, tenant: str, number: int, place: _Slice, positions: Mapping[int, int], dropped: Iterable[str] | None
    ) -> None:
        place.told += 1
        gone = None if dropped is None else frozenset(dropped)
        for subscriber in self._subscribers:
            subscriber.put_nowait(Applied(tenant, number, place.told, dict(positions), gone))

    def _there(self, place: _Slice, key: str) -> _Answer | None:
        answer = place.answers.get(key)
        return answer if answer is not None and self._now_us() < answer.ends_us else None

    def _slice(self, tenant: str, number: int) -> _Slice:
        self._check_available()
        place = self._slices.get((tenant, number))
        if place is None:
            epoch = self._new_epoch()
            place = self._slices[tenant, number] = _Slice(epoch, epoch, epoch, told=epoch)
        return place

    def _check_available(self) -> None:
        if not self.available:
            raise CacheUnavailable("the cache was made unavailable")

    def _new_epoch(self) -> int:
        # Remembered past a loss, where the server has its clock: a simulated clock may stand still.
        self._last_epoch = max(self._now_us(), self._last_epoch + 1)
        return self._last_epoch
