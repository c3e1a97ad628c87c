"""What is asked of Redis: cached answers, event states, versions. Losing all of it costs time, never truth."""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.documents import DocumentKey, EventStatus, Outcome, Stage


class CacheUnavailable(Exception):
    """Redis did not answer in time. Callers go on without it or refuse, as their promise demands."""


class CacheUntrusted(CacheUnavailable):
    """Redis may throw away a part of what belongs together: its answers are not to be served."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """One consistent look at a tenant's slice.

    Attributes:
        epoch: current epoch; a fill that began at it may be stored only while it stands.
        positions: partition → last offset whose effect on cached answers is applied.
        entry: the cached answer, if one is true for ``positions``.
        seeded: False where Redis lost the slice, so that ``positions`` may lack partitions until ``seed``.
        told: number of the slice's last announcement.
        ends_ms: milliseconds until the cached answer ends by itself; 0 without one.
        leased: False where another process has said that it is filling the answer.
    """

    epoch: int
    positions: Mapping[int, int]
    entry: bytes | None
    seeded: bool = True
    told: int = 0
    ends_ms: int = 0
    leased: bool = True


@dataclass(frozen=True, slots=True)
class Applied:
    """Announcement of a slice: these positions are applied, and these answers are gone.

    Attributes:
        tenant: of the slice.
        number: of the slice.
        told: number of the announcement: one more than that before it, as long as Redis keeps its data; after it lost
            them, one that is far from all before.
        positions: partition → last offset applied, of those that advance.
        dropped: keys of answers that are gone; None where all of the slice are.
    """

    tenant: str
    number: int
    told: int
    positions: Mapping[int, int]
    dropped: frozenset[str] | None = frozenset()


@dataclass(frozen=True, slots=True)
class Progress:
    """A stage that an event reached.

    Attributes:
        at_ms: epoch milliseconds.
        outcome: set with the last stage.
        passages: searchable passages of the version, where the outcome is ``done``.
    """

    tenant: str
    event_id: str
    stage: Stage
    at_ms: float
    outcome: Outcome | None = None
    reason: str | None = None
    passages: int | None = None


class AnswerCache(Protocol):
    """Cached answers of all tenants, in slices by their keys. A slice is one linearisation point."""

    @property
    def count(self) -> int:
        """Slices of each tenant."""
        ...

    async def lookup(self, tenant: str, key: str, *, lease_ms: int = 0, whole: bool = False) -> Lookup:
        """Epoch, positions and entry of one instant. A slice without an epoch gets one that was never used before.

        The entry comes with its ``rest`` only if ``whole`` is asked for. With ``lease_ms`` the first of those who find
        no entry is told to fill it, and the others that it is being filled, until it is or the time is over.
        """
        ...

    async def store(self, tenant: str, key: str, entry: bytes, *, epoch: int, ttl_s: int, rest: bytes = b"") -> bool:
        """Keep the entry if the epoch still stands; False where a change came in between.

        ``rest`` is a part of it behind ``entry`` that hits do not need, and are not sent.
        One that is there already gives way, and is announced as dropped: copies of it are not judged any more.
        """
        ...

    async def apply(self, tenant: str, positions: Mapping[int, int], *, drop: bool) -> int:
        """Drop the answers if asked, then advance the positions (never back), then announce; return the epoch.

        Without a drop the positions wait for changes that are not judged yet.
        """
        ...

    async def positions(self, tenant: str) -> Mapping[int, int]:
        """Partition → last offset applied: every event up to it has ended. Empty where Redis knows of none."""
        ...

    async def seed(self, tenant: str, positions: Mapping[int, int]) -> None:
        """Advance positions known from the index, after Redis lost them; nothing happens where that was done already.

        Drops the tenant's answers as ``apply`` does: the index may be ahead of invalidation, and an answer stored
        before such a change must not be taken as true for it.
        """
        ...

    def applied(
        self, *, subscribed: Callable[[], None] | None = None, complete: Callable[[float], None] | None = None
    ) -> AsyncGenerator[Applied, None]:
        """Announcements from now on; ends with CacheUnavailable when the subscription breaks.

        Raises:
            CacheUntrusted: see there.

        Args:
            subscribed: called as soon as no announcement can be missed any more: what was announced earlier is to be
                read by ``lookup`` after that.
            complete: called now and then with a moment of ``time.monotonic``: everything that was announced before it
                has been yielded. Never, where answers may vanish without an announcement.
        """
        ...


def reached_by_all(slices: Sequence[Mapping[int, int]]) -> dict[int, int]:
    """Positions that every slice has reached."""
    return {
        partition: min(positions[partition] for positions in slices)
        for partition in slices[0]
        if all(partition in positions for positions in slices)
    }


@dataclass(frozen=True, slots=True)
class SliceChange:
    """A change as a slice remembers it.

    Attributes:
        epoch: that it began.
        previous: the epoch before it; where that is not the one of the change before, some are no longer remembered.
        change: what ``append`` was given; empty where only positions advance.
    """

    epoch: int
    previous: int
    change: bytes


@dataclass(frozen=True, slots=True)
class Pending:
    """What there is to know of a slice, at one instant.

    Attributes:
        epoch: of the last change.
        judged: of the last change that the answers were judged by.
        floor: answers of earlier epochs do not count.
        changes: those after the epoch that was named, judged or not, as far as they are remembered.
        fills: number and key of each answer stored after the fill that was named.
        oldest_fill: number of the oldest answer that is still there; None without answers.
    """

    epoch: int
    judged: int
    floor: int
    changes: tuple[SliceChange, ...]
    fills: tuple[tuple[int, str], ...]
    oldest_fill: int | None


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """An answer as it lies in its slice: the number of its fill, the epoch that it was filled in, and its bytes."""

    fill: int
    epoch: int
    entry: bytes


@dataclass(frozen=True, slots=True)
class Dropped:
    """A drop: when, in epoch milliseconds of Redis, whether of all answers of the slice, and what was given as why."""

    at_ms: int
    everything: bool
    why: bytes


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of a change.

    Attributes:
        waits: False where no answer has to be judged by it.
        reached: partition → last offset that the slice had applied before, of the partitions that the change is of.
    """

    waits: bool
    reached: Mapping[int, int]


class AnswerSlices(Protocol):
    """The side of those who judge answers by changes. Numbers of slices run from 0.

    Safe whoever judges, and however many at a time: ``settle`` counts only if it begins where the last one ended, and
    a judgement that saw a slice at an epoch has seen every answer that was filled before it.
    """

    @property
    def count(self) -> int:
        """Slices of each tenant."""
        ...

    async def append(self, tenant: str, number: int, positions: Mapping[int, int], change: bytes) -> Appended:
        """Begin an epoch with a change whose passages are searchable.

        Where more changes wait than are remembered, the answers are dropped. An empty change advances positions alone.
        """
        ...

    async def pending(self, tenant: str, number: int, *, known: int, fill: int) -> Pending:
        """What came after the epoch ``known`` and after the fill numbered ``fill``."""
        ...

    async def entries(self, tenant: str, number: int, keys: Sequence[str]) -> list[StoredEntry | None]:
        """Stored answers; None for one that is gone."""
        ...

    async def settle(
        self, tenant: str, number: int, *, judged: int, epoch: int, drop: Sequence[tuple[int, str]], why: bytes = b""
    ) -> bool:
        """Drop answers, and count those that stay as judged up to ``epoch``: positions advance, and are announced.

        Args:
            tenant: of the slice.
            number: of the slice.
            judged: where the judgement began; False, and nothing happens, where that is not the state any more.
            epoch: where it ends.
            drop: number of its fill and key of each answer to drop; one that was filled anew stays.
            why: remembered for a while with what is dropped.
        """
        ...

    async def drop_all(self, tenant: str, number: int, why: bytes = b"") -> None:
        """Drop the slice's answers unjudged, with the same effect on positions."""
        ...

    async def drops(self, tenant: str, number: int, key: str) -> list[Dropped]:
        """The latest drops that an answer fell under, newest first, as far as they are remembered."""
        ...


class EventStates(Protocol):
    """Where accepted events are. Kept for a week; the stream itself is the durable record."""

    async def begin(self, tenant: str, status: EventStatus) -> None:
        """Record acceptance."""
        ...

    async def advance(self, progress: Sequence[Progress]) -> None:
        """Record stages; a stage already recorded keeps its time, so redelivery changes nothing."""
        ...

    async def get(self, tenant: str, event_id: str) -> EventStatus | None:
        """The status, or None where the event is unknown or too long ago."""
        ...

    async def get_many(self, tenant: str, event_ids: Sequence[str]) -> Mapping[str, EventStatus]:
        """Event id → status, in one round trip; without the events for which ``get`` returns None."""
        ...


class Versions(Protocol):
    """Who assigns versions to documents whose source gives none."""

    async def assign(
        self, keys: Sequence[DocumentKey], *, now_us: int, floors: Mapping[DocumentKey, int]
    ) -> list[int | None]:
        """A version above every earlier one of each document, on every replica, whatever their clocks say (I1).

        None where nothing is remembered of the document and ``floors`` does not name it: the caller looks up the
        version last indexed and asks again.

        Raises:
            CacheUnavailable: no version can be promised.
        """
        ...
