"""Ports to Redis: cached answers, event states and versions. All data can be rebuilt; its loss costs only time."""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.documents import DocumentKey, EventStatus, Outcome, Stage


class CacheUnavailable(Exception):
    """Redis did not respond in time. Callers proceed without it or reject the request, as their contract requires."""


class CacheUntrusted(CacheUnavailable):
    """Redis may evict keys that belong together, so its answers must not be served."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """An atomic read of a tenant's slice.

    Attributes:
        epoch: current epoch. A fill that began at it is stored only while it is current.
        positions: partition → last offset whose effect on cached answers is applied.
        entry: the cached answer, if it is valid at ``positions``.
        seeded: False if Redis lost the slice, so that ``positions`` may lack partitions until ``seed``.
        sequence: number of the slice's last invalidation message.
        ttl_ms: remaining time to live of the cached answer; 0 without one.
        leased: False if another process holds the fill lease of the answer.
    """

    epoch: int
    positions: Mapping[int, int]
    entry: bytes | None
    seeded: bool = True
    sequence: int = 0
    ttl_ms: int = 0
    leased: bool = True


@dataclass(frozen=True, slots=True)
class InvalidationMessage:
    """Positions that a slice has applied, and answers that it has dropped.

    Attributes:
        tenant: tenant of the slice.
        number: number of the slice.
        sequence: previous number + 1 as long as Redis keeps its data; after a loss of data, far from all earlier ones.
        positions: partition → last offset applied, for partitions that advanced.
        dropped: keys of dropped answers; None if all answers of the slice were dropped.
    """

    tenant: str
    number: int
    sequence: int
    positions: Mapping[int, int]
    dropped: frozenset[str] | None = frozenset()


@dataclass(frozen=True, slots=True)
class Progress:
    """A stage that an event reached.

    Attributes:
        at_ms: epoch milliseconds.
        outcome: set with the last stage.
        passages: searchable passages of the version, if the outcome is ``done``.
    """

    tenant: str
    event_id: str
    stage: Stage
    at_ms: float
    outcome: Outcome | None = None
    reason: str | None = None
    passages: int | None = None


class AnswerCache(Protocol):
    """Cached answers of all tenants, for the read path. Operations on a slice are linearizable."""

    @property
    def count(self) -> int:
        """Number of slices per tenant."""
        ...

    async def lookup(self, tenant: str, key: str, *, lease_ms: int = 0, with_evidence: bool = False) -> Lookup:
        """Read epoch, positions and entry atomically. A slice without an epoch gets a new, unique one.

        The entry includes its evidence only with ``with_evidence``. With ``lease_ms``, the first caller that finds no
        entry gets the fill lease. For others, ``leased`` is False until the answer is stored or the lease expires.
        """
        ...

    async def store(
        self, tenant: str, key: str, entry: bytes, *, epoch: int, ttl_s: int, evidence: bytes = b""
    ) -> bool:
        """Store an entry if ``epoch`` is still current; returns False if a change came in between.

        ``evidence`` is stored apart from ``entry``, because hits do not need it. An existing entry is replaced, and
        reported as dropped, because copies of it are no longer evaluated.
        """
        ...

    async def apply(self, tenant: str, positions: Mapping[int, int], *, drop: bool) -> int:
        """Drop all answers if ``drop``, advance the positions, and publish; returns the epoch.

        Positions never decrease. Without ``drop`` they are applied after the pending changes are evaluated.
        """
        ...

    async def positions(self, tenant: str) -> Mapping[int, int]:
        """Partition → last offset applied: every event up to it has ended. Empty if Redis has none."""
        ...

    async def seed(self, tenant: str, positions: Mapping[int, int]) -> None:
        """Advance to positions read from the index, after Redis lost them. Only the first call has an effect.

        Drops the tenant's answers, as ``apply`` does: the index may be ahead of invalidation, and answers stored before
        such a change do not reflect it.
        """
        ...

    def invalidations(
        self, *, on_subscribed: Callable[[], None] | None = None, on_heartbeat: Callable[[float], None] | None = None
    ) -> AsyncGenerator[InvalidationMessage, None]:
        """Subscribe to invalidation messages.

        Args:
            on_subscribed: called once every further message will be received. Earlier effects are visible to
                ``lookup`` from then on.
            on_heartbeat: called repeatedly with a ``time.monotonic`` value: every message published before it has been
                yielded. Never called if Redis may drop answers without a message.

        Raises:
            CacheUnavailable: the subscription is broken.
            CacheUntrusted: Redis may evict keys that belong together.
        """
        ...


def reached_by_all(slices: Sequence[Mapping[int, int]]) -> dict[int, int]:
    """Partition → lowest offset of all slices; without partitions that a slice lacks."""
    return {
        partition: min(positions[partition] for positions in slices)
        for partition in slices[0]
        if all(partition in positions for positions in slices)
    }


@dataclass(frozen=True, slots=True)
class SliceChange:
    """A change in the change log of a slice.

    Attributes:
        epoch: epoch that the change began.
        previous: the epoch before it. If it differs from that of the preceding change, changes were truncated.
        change: encoded change, as given to ``append``; empty if only positions advance.
    """

    epoch: int
    previous: int
    change: bytes


@dataclass(frozen=True, slots=True)
class Pending:
    """Changes and fills of a slice after given numbers, read atomically.

    Attributes:
        epoch: epoch of the last change.
        evaluated: epoch up to which answers are evaluated.
        floor: answers of earlier epochs are invalid.
        changes: retained changes after the given epoch, evaluated or not.
        fills: (fill number, key) of each answer stored after the given fill.
        oldest_fill: number of the oldest stored answer; None without answers.
    """

    epoch: int
    evaluated: int
    floor: int
    changes: tuple[SliceChange, ...]
    fills: tuple[tuple[int, str], ...]
    oldest_fill: int | None


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """A stored answer: number of its fill, epoch of the fill, and the complete entry."""

    fill: int
    epoch: int
    entry: bytes


@dataclass(frozen=True, slots=True)
class Dropped:
    """A recorded drop.

    Attributes:
        at_ms: epoch milliseconds of the Redis server.
        whole_slice: whether all answers of the slice were dropped.
        reason: reason given by the caller.
    """

    at_ms: int
    whole_slice: bool
    reason: bytes


@dataclass(frozen=True, slots=True)
class Appended:
    """Result of ``AnswerSlices.append``.

    Attributes:
        needs_evaluation: False if no answer has to be evaluated.
        positions_before: partition → last offset applied before, for the partitions of the change.
    """

    needs_evaluation: bool
    positions_before: Mapping[int, int]


class AnswerSlices(Protocol):
    """Cached answers, for evaluation. Slices of a tenant are numbered from 0.

    Any number of workers may evaluate a slice concurrently. ``commit`` succeeds only if it continues the last commit,
    and an evaluation that read a slice at an epoch has read every answer filled before that epoch.
    """

    @property
    def count(self) -> int:
        """Number of slices per tenant."""
        ...

    async def append(self, tenant: str, number: int, positions: Mapping[int, int], change: bytes) -> Appended:
        """Begin an epoch with a change whose passages are searchable. An empty change only advances positions.

        If the maximum number of changes is pending, all answers of the slice are dropped.
        """
        ...

    async def pending(self, tenant: str, number: int, *, after_epoch: int, after_fill: int) -> Pending:
        """Read changes after an epoch and fills after a fill number."""
        ...

    async def entries(self, tenant: str, number: int, keys: Sequence[str]) -> list[StoredEntry | None]:
        """Read stored answers; None for each that no longer exists."""
        ...

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
        """Drop answers and mark the others as evaluated up to ``epoch``; advances positions and publishes.

        Args:
            tenant: tenant of the slice.
            number: number of the slice.
            evaluated: epoch at which the evaluation began. If the slice is no longer at it, nothing changes and the
                result is False.
            epoch: epoch at which the evaluation ended.
            drop: (fill number, key) of each answer to drop. An answer with another fill number is kept.
            reason: recorded with the dropped answers.
        """
        ...

    async def drop_all(self, tenant: str, number: int, reason: bytes = b"") -> None:
        """Drop all answers of the slice without evaluation. Positions advance as in ``commit``."""
        ...

    async def drops(self, tenant: str, number: int, key: str) -> list[Dropped]:
        """Recorded drops that affected an answer, newest first."""
        ...


class EventStates(Protocol):
    """Progress of accepted events, retained for a week. The streams are the durable record."""

    async def begin(self, tenant: str, status: EventStatus) -> None:
        """Record acceptance. A worker may have recorded later stages before."""
        ...

    async def advance(self, progress: Sequence[Progress]) -> None:
        """Record stages in one round trip. A recorded stage keeps its time, so redelivery has no effect."""
        ...

    async def get(self, tenant: str, event_id: str) -> EventStatus | None:
        """The status; None before acceptance is recorded, or if the event is unknown or expired."""
        ...

    async def get_many(self, tenant: str, event_ids: Sequence[str]) -> Mapping[str, EventStatus]:
        """Event id → status, in one round trip; without events for which ``get`` returns None."""
        ...


class Versions(Protocol):
    """Assigns versions to documents whose source provides none."""

    async def assign(
        self, keys: Sequence[DocumentKey], *, now_us: int, floors: Mapping[DocumentKey, int]
    ) -> list[int | None]:
        """A version for each key, above every earlier version of the document, for all replicas and clocks (I1).

        None if the document's last version is not stored and ``floors`` lacks it: the caller reads the indexed version
        and calls again.

        Raises:
            CacheUnavailable: no version can be assigned.
        """
        ...
