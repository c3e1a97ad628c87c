"""In-process answer cache, kept coherent by the invalidation messages of Redis.

An entry is served only while the invalidation subscription is provably free of gaps:

- Only answers that were read after the subscription started are stored, so every later invalidation is received.
- Reads and messages use different connections. Each slice numbers its messages, and a read returns the number of the
  last one. An answer is stored only if no message with a higher number has been received.
- A gap in the numbers means a lost message, or a Redis that lost its data. The slice is emptied.
- Redis serves a connection in order, so the reply to a ping proves that all messages published before the ping have
  been received. Nothing is served without such a heartbeat in the last ``MAX_HEARTBEAT_AGE_S``.
- If the subscription breaks, the cache is emptied.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from infra.redis.port import InvalidationMessage, Lookup
from schemas.cache_keys import slice_of

MAX_HEARTBEAT_AGE_S: Final = 0.75
"""Age of the last heartbeat up to which entries are served. Less than the freshness objective of one second."""

_OVERHEAD_BYTES: Final = 600
"""Approximate size of an entry besides its body and key."""


@dataclass(slots=True, eq=False)
class _SliceState:
    """What is known of a slice of a tenant.

    Attributes:
        sequence: number of the last message received, or of the first read; None before both.
        generation: number of messages received. An entry with an older one has outdated positions.
        positions: partition → offset, merged over all messages.
        keys: keys of the slice's entries.
    """

    tenant: str
    sequence: int | None = None
    generation: int = 0
    positions: dict[int, int] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _CachedAnswer:
    slice: _SliceState
    body: bytes
    positions: dict[int, int]
    generation: int
    expires_s: float
    size_bytes: int
    hits: int = 0


@dataclass(frozen=True, slots=True)
class NearHit:
    """A cached answer that may be served.

    Attributes:
        body: see ``query.answers.response.stamped``.
        positions: positions that it reflects. Must not be modified.
        checked_ms: epoch milliseconds up to which every invalidation has been received.
    """

    body: bytes
    positions: dict[int, int]
    checked_ms: float


class NearCache:
    """See the module. Not thread-safe: all calls come from one event loop.

    Args:
        slices: slices of each tenant in Redis.
        max_bytes: total size; the least recently used entries are evicted. 0 stores nothing.
        on_invalidated: called with the key and hit count of each entry that a change invalidates.
        monotonic_s: monotonic clock.
        now_ms: epoch milliseconds.
    """

    def __init__(
        self,
        *,
        slices: int,
        max_bytes: int,
        on_invalidated: Callable[[str, int], None] = lambda _key, _hits: None,
        monotonic_s: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], float] = lambda: time.time() * 1_000,
    ) -> None:
        self._slice_count = slices
        self._max_bytes = max_bytes
        self._on_invalidated = on_invalidated
        self._monotonic_s = monotonic_s
        self._now_ms = now_ms
        self._entries: OrderedDict[str, _CachedAnswer] = OrderedDict()
        self._slices: dict[tuple[str, int], _SliceState] = {}
        self._size_bytes = 0
        self._subscribed_s: float | None = None
        self._heartbeat_s = float("-inf")
        self._heartbeat_ms = 0.0
        self._next_heartbeat: asyncio.Event | None = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        """Approximate size of all entries."""
        return self._size_bytes

    @property
    def live(self) -> bool:
        """Whether entries are served."""
        return self._subscribed_s is not None and self._monotonic_s() - self._heartbeat_s <= MAX_HEARTBEAT_AGE_S

    def get(self, key: str) -> NearHit | None:
        """The answer, if it is stored and may be served."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        now_s = self._monotonic_s()
        if now_s - self._heartbeat_s > MAX_HEARTBEAT_AGE_S:
            return None
        if now_s >= entry.expires_s:
            self._evict(key)
            return None
        state = entry.slice
        if entry.generation != state.generation:
            # An entry that survived the messages since is true for their positions too.
            entry.positions, entry.generation = _merged(entry.positions, state.positions), state.generation
        entry.hits += 1
        self._entries.move_to_end(key)
        return NearHit(entry.body, entry.positions, self._heartbeat_ms)

    def lacks_heartbeat(self, key: str) -> bool:
        """Whether the answer is stored and only the age of the last heartbeat keeps it from being served."""
        entry = self._entries.get(key)
        return entry is not None and not self.live and self._monotonic_s() < entry.expires_s

    async def next_heartbeat(self) -> None:
        """Wait for the next heartbeat, or for the subscription to break. Unbounded: use a timeout."""
        if self._next_heartbeat is None:
            self._next_heartbeat = asyncio.Event()
        await self._next_heartbeat.wait()

    def holds(self, key: str) -> bool:
        """Whether ``get`` would return the answer. Does not count as a hit."""
        entry = self._entries.get(key)
        return entry is not None and self.live and self._monotonic_s() < entry.expires_s

    def put(self, tenant: str, key: str, lookup: Lookup, body: bytes, *, read_s: float) -> bool:
        """Store an answer that was read from Redis; returns False if it may have been invalidated since.

        Args:
            tenant: tenant of the answer.
            key: key of the answer.
            lookup: result of the read.
            body: response body.
            read_s: monotonic time before the read was sent.
        """
        if self._subscribed_s is None or read_s < self._subscribed_s or not lookup.ttl_ms:
            return False
        state = self._slice(tenant, slice_of(key, self._slice_count))
        if state.sequence is None:
            state.sequence = lookup.sequence  # the next message must follow on this number
        if lookup.sequence < state.sequence:
            return False
        size = len(body) + len(key) + _OVERHEAD_BYTES
        if size > self._max_bytes:
            return False
        self._evict(key)
        expires_s = read_s + lookup.ttl_ms / 1_000
        self._entries[key] = _CachedAnswer(state, body, dict(lookup.positions), state.generation, expires_s, size)
        state.keys.add(key)
        self._size_bytes += size
        while self._size_bytes > self._max_bytes:
            self._evict(next(iter(self._entries)))
        return True

    def on_subscribed(self) -> None:
        """The subscription has started: every message from here on is received."""
        self._subscribed_s = self._monotonic_s()

    def on_message(self, message: InvalidationMessage) -> None:
        """Apply an invalidation message."""
        state = self._slice(message.tenant, message.number)
        is_next = state.sequence is None or message.sequence == state.sequence + 1
        invalidated = message.dropped if is_next else None
        for key in tuple(state.keys) if invalidated is None else invalidated & state.keys:
            hits = self._entries[key].hits
            self._evict(key)
            self._on_invalidated(key, hits)
        state.sequence = message.sequence
        state.generation += 1
        state.positions = _merged(state.positions, message.positions) if is_next else dict(message.positions)

    def on_heartbeat(self, sent_s: float) -> None:
        """Every message published before monotonic time ``sent_s`` has been received."""
        if self._subscribed_s is not None and sent_s > self._heartbeat_s:
            self._heartbeat_s = sent_s
            self._heartbeat_ms = self._now_ms() - (self._monotonic_s() - sent_s) * 1_000
            self._wake()

    def on_disconnected(self) -> None:
        """The subscription is broken: drop all entries."""
        self._subscribed_s = None
        self._heartbeat_s = float("-inf")
        self._entries.clear()
        self._slices.clear()
        self._size_bytes = 0
        self._wake()

    def _wake(self) -> None:
        waiting, self._next_heartbeat = self._next_heartbeat, None
        if waiting is not None:
            waiting.set()

    def _slice(self, tenant: str, number: int) -> _SliceState:
        state = self._slices.get((tenant, number))
        if state is None:
            state = self._slices[tenant, number] = _SliceState(tenant)
        return state

    def _evict(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._size_bytes -= entry.size_bytes
            entry.slice.keys.discard(key)


def _merged(positions: Mapping[int, int], others: Mapping[int, int]) -> dict[int, int]:
    """The higher offset of each partition."""
    merged = dict(positions)
    for partition, offset in others.items():
        if merged.get(partition, -1) < offset:
            merged[partition] = offset
    return merged
