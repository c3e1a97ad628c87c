"""In-memory answer cache, for tests and simulation."""

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
    CacheUnavailable,
    Dropped,
    InvalidationMessage,
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
    evidence: bytes
    expires_us: int


@dataclass(slots=True)
class _Slice:
    epoch: int
    evaluated: int
    floor: int
    seeded: bool = False
    fill: int = 0
    sequence: int = 0
    positions: dict[int, int] = field(default_factory=dict)
    answers: dict[str, _Answer] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    # With the dropped keys; None: all of the slice.
    drops: list[tuple[frozenset[str] | None, Dropped]] = field(default_factory=list)
    # Oldest first, with their positions.
    changes: list[tuple[SliceChange, Mapping[int, int]]] = field(default_factory=list)


class MemoryAnswerCache(AnswerCache, AnswerSlices):
    """In-memory answer cache. No method suspends, so methods are as atomic as Redis scripts.

    Attributes:
        available: while False, every method raises ``CacheUnavailable``; open subscriptions continue.

    Args:
        now_us: server clock, in epoch microseconds.
        cache: layout of slices.
    """

    def __init__(
        self, now_us: Callable[[], int] = lambda: time_ns() // 1_000, cache: AnswerSettings | None = None
    ) -> None:
        self.available = True
        self._now_us = now_us
        self._cache = cache or AnswerSettings()
        self._last_epoch = 0
        self._slices: dict[tuple[str, int], _Slice] = {}
        self._subscribers: set[asyncio.Queue[InvalidationMessage | None]] = set()

    @property
    @override
    def count(self) -> int:
        return self._cache.slices

    @override
    async def lookup(self, tenant: str, key: str, *, lease_ms: int = 0, with_evidence: bool = False) -> Lookup:
        state, now_us = self._slice(tenant, slice_of(key, self.count)), self._now_us()
        answer = self._live_answer(state, key)
        leased = answer is None and (not lease_ms or state.leases.get(key, now_us) <= now_us)
        if lease_ms and leased:
            state.leases[key] = now_us + lease_ms * 1_000
        return Lookup(
            epoch=state.epoch,
            positions=dict(state.positions),
            entry=answer.entry + (answer.evidence if with_evidence else b"") if answer is not None else None,
            seeded=state.seeded,
            sequence=state.sequence,
            ttl_ms=(answer.expires_us - now_us) // 1_000 if answer is not None else 0,
            leased=leased,
        )

    @override
    async def store(
        self, tenant: str, key: str, entry: bytes, *, epoch: int, ttl_s: int, evidence: bytes = b""
    ) -> bool:
        number = slice_of(key, self.count)
        state = self._slice(tenant, number)
        state.leases.pop(key, None)
        if state.epoch != epoch:
            return False
        evicted = {key} if self._live_answer(state, key) is not None else set()
        state.fill += 1
        state.answers.pop(key, None)
        state.answers[key] = _Answer(state.fill, epoch, entry, evidence, self._now_us() + ttl_s * 1_000_000)
        for oldest in list(state.answers)[:4]:
            if self._live_answer(state, oldest) is not None:
                if len(state.answers) <= self._cache.per_slice:
                    break
                evicted.add(oldest)
            del state.answers[oldest]
        if evicted:
            self._publish(tenant, number, state, {}, evicted)
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
        return reached_by_all([state.positions if state is not None else {} for state in slices])

    @override
    async def seed(self, tenant: str, positions: Mapping[int, int]) -> None:
        for number in range(self.count):
            state = self._slice(tenant, number)
            if not state.seeded:
                state.seeded = True
                self._drop(tenant, number, positions)

    @override
    async def invalidations(
        self, *, on_subscribed: Callable[[], None] | None = None, on_heartbeat: Callable[[float], None] | None = None
    ) -> AsyncGenerator[InvalidationMessage, None]:
        self._check_available()
        messages: asyncio.Queue[InvalidationMessage | None] = asyncio.Queue()
        self._subscribers.add(messages)
        try:
            if on_subscribed is not None:
                on_subscribed()
            while True:
                if on_heartbeat is not None and messages.empty():
                    on_heartbeat(asyncio.get_running_loop().time())
                receiving = asyncio.ensure_future(messages.get())
                try:
                    while not (await asyncio.wait((receiving,), timeout=_HEARTBEAT_S))[0]:
                        if on_heartbeat is not None:
                            on_heartbeat(asyncio.get_running_loop().time())
                finally:
                    receiving.cancel()
                message = receiving.result()
                if message is None:
                    break
                yield message
            raise CacheUnavailable("the subscription was interrupted")
        finally:
            self._subscribers.discard(messages)

    @override
    async def append(self, tenant: str, number: int, positions: Mapping[int, int], change: bytes) -> Appended:
        state = self._slice(tenant, number)
        before = {partition: state.positions[partition] for partition in positions if partition in state.positions}
        return Appended(self._append(tenant, number, positions, change), before)

    @override
    async def pending(self, tenant: str, number: int, *, after_epoch: int, after_fill: int) -> Pending:
        state = self._slice(tenant, number)
        return Pending(
            epoch=state.epoch,
            evaluated=state.evaluated,
            floor=state.floor,
            changes=tuple(change for change, _ in state.changes if change.epoch > after_epoch),
            fills=tuple((answer.fill, key) for key, answer in state.answers.items() if answer.fill > after_fill),
            oldest_fill=next((answer.fill for answer in state.answers.values()), None),
        )

    @override
    async def entries(self, tenant: str, number: int, keys: Sequence[str]) -> list[StoredEntry | None]:
        state = self._slice(tenant, number)
        found = (self._live_answer(state, key) for key in keys)
        return [
            StoredEntry(one.fill, one.epoch, one.entry + one.evidence) if one is not None else None for one in found
        ]

    @override
    async def commit(
        self,
        tenant: str,
        number: int,
        *,
        evaluated: int,
        epoch: int,
        drop: Sequence[tuple[int, str]],
        reason: bytes = b"",
    ) -> bool:
        state = self._slice(tenant, number)
        if state.evaluated != evaluated:
            return False
        for fill, key in drop:
            if key in state.answers and state.answers[key].fill == fill:
                del state.answers[key]
        keys = frozenset(key for _, key in drop)
        if keys:
            state.drops.append((keys, Dropped(self._now_us() // 1_000, whole_slice=False, reason=reason)))
        self._set_evaluated(tenant, number, epoch, {}, keys)
        return True

    @override
    async def drop_all(self, tenant: str, number: int, reason: bytes = b"") -> None:
        self._drop(tenant, number, {}, reason)

    @override
    async def drops(self, tenant: str, number: int, key: str) -> list[Dropped]:
        return [one for keys, one in reversed(self._slice(tenant, number).drops) if keys is None or key in keys]

    def lose_everything(self) -> None:
        """Lose all data and break all subscriptions, as a restart without persistence does."""
        self._slices.clear()
        self.break_subscriptions()

    def break_subscriptions(self) -> None:
        """Break every subscription, after the messages published before."""
        for subscriber in self._subscribers:
            subscriber.put_nowait(None)

    def _append(self, tenant: str, number: int, positions: Mapping[int, int], change: bytes) -> bool:
        state = self._slice(tenant, number)
        if not change and state.evaluated == state.epoch:
            self._set_evaluated(tenant, number, state.epoch, positions, ())
            return False
        pending = sum(one.epoch > state.evaluated for one, _ in state.changes)
        if not state.answers or pending >= self._cache.changes:
            self._drop(tenant, number, positions)
            return False
        previous, state.epoch = state.epoch, self._new_epoch()
        state.changes.append((SliceChange(state.epoch, previous, change), dict(positions)))
        del state.changes[: -self._cache.changes]
        return True

    def _drop(self, tenant: str, number: int, positions: Mapping[int, int], reason: bytes = b"") -> None:
        state = self._slice(tenant, number)
        if state.answers:
            state.drops.append((None, Dropped(self._now_us() // 1_000, whole_slice=True, reason=reason)))
        state.epoch = state.floor = self._new_epoch()
        state.answers.clear()
        self._set_evaluated(tenant, number, state.epoch, positions, None)
        state.changes.clear()

    def _set_evaluated(
        self, tenant: str, number: int, epoch: int, positions: Mapping[int, int], dropped: Iterable[str] | None
    ) -> None:
        """Advance by the changes up to ``epoch`` and by ``positions``, and publish."""
        state = self._slice(tenant, number)
        reflected = [positions for change, positions in state.changes if state.evaluated < change.epoch <= epoch]
        state.evaluated = epoch
        published: dict[int, int] = {}
        for advanced in (*reflected, positions):
            for partition, offset in advanced.items():
                published[partition] = max(offset, published.get(partition, offset))
                state.positions[partition] = max(offset, state.positions.get(partition, offset))
        self._publish(tenant, number, state, published, dropped)

    def _publish(
        self, tenant: str, number: int, state: _Slice, positions: Mapping[int, int], dropped: Iterable[str] | None
    ) -> None:
        state.sequence += 1
        keys = None if dropped is None else frozenset(dropped)
        for subscriber in self._subscribers:
            subscriber.put_nowait(InvalidationMessage(tenant, number, state.sequence, dict(positions), keys))

    def _live_answer(self, state: _Slice, key: str) -> _Answer | None:
        answer = state.answers.get(key)
        return answer if answer is not None and self._now_us() < answer.expires_us else None

    def _slice(self, tenant: str, number: int) -> _Slice:
        self._check_available()
        state = self._slices.get((tenant, number))
        if state is None:
            epoch = self._new_epoch()
            state = self._slices[tenant, number] = _Slice(epoch, epoch, epoch, sequence=epoch)
        return state

    def _check_available(self) -> None:
        if not self.available:
            raise CacheUnavailable("the cache was made unavailable")

    def _new_epoch(self) -> int:
        # Kept across a loss of data: unlike a server's clock, a simulated clock may not advance.
        self._last_epoch = max(self._now_us(), self._last_epoch + 1)
        return self._last_epoch
