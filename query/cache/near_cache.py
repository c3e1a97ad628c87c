"""Answers kept in this process, for as long as every drop is heard of.

A copy of a cached answer is true while it lies in Redis, and Redis announces what it drops. So a copy may be served as
long as all announcements are known to have come:

- Only what was looked up after the subscription began is kept; what is announced from then on is heard.
- A look and an announcement come over different connections. Each slice numbers its announcements, and a look tells the
  number of the last one: an answer is kept only if none with a higher number has been heard.
- A number that is not the next one means that something was lost, or that Redis lost its data: the slice is emptied.
- Redis answers a connection in order, so the reply to a ping proves that all was heard that was announced before the
  ping was sent. Without such a proof of the last ``PROOF_S`` nothing is served from here; when the subscription breaks,
  everything is forgotten.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from infra.redis.port import Applied, Lookup
from schemas.cache_keys import slice_of

PROOF_S: Final = 0.75
"""Age of the last proof up to which answers are served from here: less than the freshness objective of one second."""

_OVERHEAD_BYTES: Final = 600
"""What an entry takes besides its body and key, roughly."""


@dataclass(slots=True, eq=False)
class _Place:
    """A slice, as far as it was heard of.

    Attributes:
        told: number of the last announcement that was heard, or of the first look.
        heard: counts announcements, for copies to know whether their positions are the latest.
        positions: partition → offset, of all announcements.
        keys: of the copies.
    """

    tenant: str
    told: int | None = None
    heard: int = 0
    positions: dict[int, int] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Copy:
    place: _Place
    body: bytes
    positions: dict[int, int]
    heard: int
    ends_s: float
    size_bytes: int
    hits: int = 0


@dataclass(frozen=True, slots=True)
class NearHit:
    """An answer of this process.

    Attributes:
        body: see ``query.answers.response.stamped``.
        positions: what it is true for; not to be changed.
        checked_ms: epoch milliseconds of the moment up to which every drop is known to have been heard.
    """

    body: bytes
    positions: dict[int, int]
    checked_ms: float


class NearCache:
    """See the module. Not safe across threads: all calls come from one event loop.

    Args:
        slices: of each tenant, as the cache has them.
        max_bytes: of all copies; the least recently used give way. 0 keeps none.
        dropped: told of each copy that a change has dropped: its key, and how often it was served.
        monotonic_s: a clock that only goes forward.
        now_ms: epoch milliseconds.
    """

    def __init__(
        self,
        *,
        slices: int,
        max_bytes: int,
        dropped: Callable[[str, int], None] = lambda _key, _hits: None,
        monotonic_s: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], float] = lambda: time.time() * 1_000,
    ) -> None:
        self._slices = slices
        self._max_bytes = max_bytes
        self._dropped = dropped
        self._monotonic_s = monotonic_s
        self._now_ms = now_ms
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        self._places: dict[tuple[str, int], _Place] = {}
        self._size_bytes = 0
        self._since_s: float | None = None
        self._proven_s = float("-inf")
        self._proven_ms = 0.0
        self._proof: asyncio.Event | None = None

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def size_bytes(self) -> int:
        """About what the copies take."""
        return self._size_bytes

    @property
    def live(self) -> bool:
        """Whether answers are served from here."""
        return self._since_s is not None and self._monotonic_s() - self._proven_s <= PROOF_S

    def get(self, key: str) -> NearHit | None:
        """The answer, if it is here and certainly not dropped."""
        copy = self._copies.get(key)
        if copy is None:
            return None
        now_s = self._monotonic_s()
        if now_s - self._proven_s > PROOF_S:
            return None
        if now_s >= copy.ends_s:
            self._forget(key)
            return None
        place = copy.place
        if copy.heard != place.heard:
            # A copy that is still here is true for whatever was announced since.
            copy.positions, copy.heard = _later(copy.positions, place.positions), place.heard
        copy.hits += 1
        self._copies.move_to_end(key)
        return NearHit(copy.body, copy.positions, self._proven_ms)

    def lacks_proof(self, key: str) -> bool:
        """Whether the answer is here, and not served only because the last proof is too old."""
        copy = self._copies.get(key)
        return copy is not None and not self.live and self._monotonic_s() < copy.ends_s

    async def next_proof(self) -> None:
        """Wait until everything was heard again, or the subscription breaks. May take for ever: set a limit."""
        if self._proof is None:
            self._proof = asyncio.Event()
        await self._proof.wait()

    def holds(self, key: str) -> bool:
        """Whether ``get`` would find the answer, without counting as a hit."""
        copy = self._copies.get(key)
        return copy is not None and self.live and self._monotonic_s() < copy.ends_s

    def put(self, tenant: str, key: str, look: Lookup, body: bytes, *, looked_s: float) -> bool:
        """Keep a copy of what a look found; False where it may have been dropped since.

        Args:
            tenant: whose answer it is.
            key: of the answer.
            look: that found it.
            body: of the answer.
            looked_s: a moment of the clock before the look was asked for.
        """
        if self._since_s is None or looked_s < self._since_s or not look.ends_ms:
            return False
        place = self._place(tenant, slice_of(key, self._slices))
        if place.told is None:
            place.told = look.told  # what is announced first has to follow on this
        if look.told < place.told:
            return False
        size = len(body) + len(key) + _OVERHEAD_BYTES
        if size > self._max_bytes:
            return False
        self._forget(key)
        ends_s = looked_s + look.ends_ms / 1_000
        self._copies[key] = _Copy(place, body, dict(look.positions), place.heard, ends_s, size)
        place.keys.add(key)
        self._size_bytes += size
        while self._size_bytes > self._max_bytes:
            self._forget(next(iter(self._copies)))
        return True

    def subscribed(self) -> None:
        """From now on every announcement is heard."""
        self._since_s = self._monotonic_s()

    def heard(self, announced: Applied) -> None:
        """Take in an announcement."""
        place = self._place(announced.tenant, announced.number)
        is_next = place.told is None or announced.told == place.told + 1
        gone = announced.dropped if is_next else None
        for key in tuple(place.keys) if gone is None else gone & place.keys:
            hits = self._copies[key].hits
            self._forget(key)
            self._dropped(key, hits)
        place.told = announced.told
        place.heard += 1
        place.positions = _later(place.positions, announced.positions) if is_next else dict(announced.positions)

    def complete(self, moment_s: float) -> None:
        """Everything that was announced before ``moment_s`` has been heard."""
        if self._since_s is not None and moment_s > self._proven_s:
            self._proven_s = moment_s
            self._proven_ms = self._now_ms() - (self._monotonic_s() - moment_s) * 1_000
            self._wake()

    def lost(self) -> None:
        """The subscription is broken: forget everything."""
        self._since_s = None
        self._proven_s = float("-inf")
        self._copies.clear()
        self._places.clear()
        self._size_bytes = 0
        self._wake()

    def _wake(self) -> None:
        proof, self._proof = self._proof, None
        if proof is not None:
            proof.set()

    def _place(self, tenant: str, number: int) -> _Place:
        place = self._places.get((tenant, number))
        if place is None:
            place = self._places[tenant, number] = _Place(tenant)
        return place

    def _forget(self, key: str) -> None:
        copy = self._copies.pop(key, None)
        if copy is not None:
            self._size_bytes -= copy.size_bytes
            copy.place.keys.discard(key)


def _later(positions: Mapping[int, int], others: Mapping[int, int]) -> dict[int, int]:
    """The higher offset of each partition."""
    later = dict(positions)
    for partition, offset in others.items():
        if later.get(partition, -1) < offset:
            later[partition] = offset
    return later
