"""Answer cache in Redis, without locks.

Operations on a slice are linearizable, because each is one script and Redis runs scripts atomically.

- A change becomes searchable, then begins a new epoch of the slice. Later it is evaluated: one script drops the answers
  that it alters, marks the slice as evaluated up to the epoch, and advances the positions.
- A fill reads the epoch, then retrieves, and stores its answer only if the epoch is still current.

Therefore an answer that a lookup returns reflects every change up to the positions of that lookup. If the change began
its epoch before the fill read the epoch, it was searchable when the fill retrieved. Otherwise the answer was stored
before the change began its epoch, and the evaluation has read it, because it reads fills after the epoch has begun.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import structlog
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, NoScriptError
from typing_extensions import override

from infra.coalescing import Coalescer
from infra.redis.answer_scripts import CHANGE, COMMIT, LOOKUP, PENDING, STORE, Script
from infra.redis.connect import redis_errors
from infra.redis.port import (
    AnswerCache,
    AnswerSlices,
    Appended,
    CacheUnavailable,
    CacheUntrusted,
    Dropped,
    InvalidationMessage,
    Lookup,
    Pending,
    SliceChange,
    StoredEntry,
    reached_by_all,
)
from infra.settings import AnswerSettings
from schemas.cache_keys import AnswerKeys, slice_of
from schemas.names import Names

HEARTBEAT_S: Final = 0.2
"""Interval of pings on the subscription connection."""

MAX_SILENCE_S: Final = 2.0
"""A subscription without a reply to pings for this time is broken."""

_MAX_CALLS: Final = 2
"""Maximum number of pipelined requests in progress."""

_MAX_RUNS: Final = 64
"""Maximum number of script runs per pipelined request."""

_DROP: Final = b"drop"
_KEEP: Final = b"keep"
_SEED: Final = b"seed"
_ALL: Final = "*"
_NONE: Final = "-"
_MAX_DROPS: Final = 1_000

_log = structlog.get_logger(__name__)


class RedisAnswerCache(AnswerCache, AnswerSlices):
    """Answer cache in Redis. Every method raises ``CacheUnavailable`` if Redis does not respond.

    Args:
        client: client that returns bytes.
        names: names of the installation.
        cache: layout of slices.
    """

    def __init__(self, client: Redis, names: Names, cache: AnswerSettings | None = None) -> None:
        self._client = client
        self._names = names
        self._cache = cache or AnswerSettings()
        self._runs: Coalescer[_Run, Any] = Coalescer(self._run_all, max_calls=_MAX_CALLS, max_items=_MAX_RUNS)

    @property
    @override
    def count(self) -> int:
        return self._cache.slices

    @override
    async def lookup(self, tenant: str, key: str, *, lease_ms: int = 0, with_evidence: bool = False) -> Lookup:
        keys = AnswerKeys.of(self._names, tenant, slice_of(key, self.count))
        answer = (keys.answer(key), keys.lease(key))
        reply = await self._run(LOOKUP, keys, answer, lease_ms, "evidence" if with_evidence else "")
        epoch, positions, seeded, sequence, entry, ttl_ms, leased = reply
        return Lookup(
            epoch=int(epoch),
            positions=_positions(positions),
            entry=entry,
            seeded=bool(seeded),
            sequence=int(sequence),
            ttl_ms=max(ttl_ms, 0),
            leased=bool(leased),
        )

    @override
    async def store(
        self, tenant: str, key: str, entry: bytes, *, epoch: int, ttl_s: int, evidence: bytes = b""
    ) -> bool:
        number = slice_of(key, self.count)
        keys = AnswerKeys.of(self._names, tenant, number)
        limits = (keys.answers, self._cache.per_slice)
        arguments = (self._target(tenant, number), epoch, entry, ttl_s, key, *limits, evidence)
        return bool(await self._run(STORE, keys, (keys.answer(key), keys.lease(key)), *arguments))

    @override
    async def apply(self, tenant: str, positions: Mapping[int, int], *, drop: bool) -> int:
        return await self._change_all(tenant, positions, _DROP if drop else _KEEP)

    @override
    async def positions(self, tenant: str) -> Mapping[int, int]:
        with redis_errors():
            pipeline = self._client.pipeline(transaction=False)
            for number in range(self.count):
                pipeline.hget(AnswerKeys.of(self._names, tenant, number).state, "positions")
            applied = await pipeline.execute()
        return reached_by_all([_positions(positions or b"") for positions in applied])

    @override
    async def seed(self, tenant: str, positions: Mapping[int, int]) -> None:
        await self._change_all(tenant, positions, _SEED)

    @override
    async def invalidations(
        self, *, on_subscribed: Callable[[], None] | None = None, on_heartbeat: Callable[[float], None] | None = None
    ) -> AsyncGenerator[InvalidationMessage, None]:
        # Redis replies to a connection in order, so the reply to a ping follows all messages published before it.
        with redis_errors():
            async with self._client.pubsub() as channel:
                await channel.subscribe(self._names.applied_channel)
                is_complete = await self._publishes_all_drops()
                confirmed = False
                ping_s = pong_s = time.monotonic()
                while True:
                    now_s = time.monotonic()
                    if now_s - pong_s > MAX_SILENCE_S:
                        raise CacheUnavailable(f"Redis: the subscription was silent for {MAX_SILENCE_S:g} s")
                    # Does not wait for the previous reply: in a busy process that would halve the heartbeat rate.
                    if confirmed and now_s - ping_s >= HEARTBEAT_S:
                        ping_s = now_s
                        await channel.ping(repr(now_s))
                    message = await channel.get_message(timeout=HEARTBEAT_S / 4)
                    kind = message["type"] if message is not None else None
                    if kind == "message":
                        yield _parse_message(message["data"])
                    elif kind == "pong":
                        pong_s = time.monotonic()
                        if on_heartbeat is not None and is_complete:
                            on_heartbeat(float(message["data"]))
                    elif kind == "subscribe":
                        _check_first(confirmed=confirmed)
                        confirmed = True
                        if on_subscribed is not None:
                            on_subscribed()

    @override
    async def append(self, tenant: str, number: int, positions: Mapping[int, int], change: bytes) -> Appended:
        _, needs_evaluation, offsets = await self._change(tenant, number, positions, change or _KEEP)
        before = zip(positions, offsets, strict=True)
        return Appended(
            bool(needs_evaluation), {partition: int(offset) for partition, offset in before if offset is not None}
        )

    @override
    async def pending(self, tenant: str, number: int, *, after_epoch: int, after_fill: int) -> Pending:
        keys = AnswerKeys.of(self._names, tenant, number)
        state, changes, fills, oldest = await self._run(PENDING, keys, (), after_epoch, after_fill)
        epoch, evaluated, floor = (int(value) for value in state)
        return Pending(
            epoch=epoch,
            evaluated=evaluated,
            floor=floor,
            changes=tuple(_read_change(number, fields) for number, fields in changes),
            fills=tuple((_number(fill), fields[1].decode()) for fill, fields in fills),
            oldest_fill=_number(oldest) if oldest is not None else None,
        )

    @override
    async def entries(self, tenant: str, number: int, keys: Sequence[str]) -> list[StoredEntry | None]:
        names = AnswerKeys.of(self._names, tenant, number)
        with redis_errors():
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.hmget(names.answer(key), ["fill", "epoch", "entry", "evidence"])
            found = await pipeline.execute()
        return [
            StoredEntry(int(fill), int(epoch), entry + evidence) if fill is not None else None
            for fill, epoch, entry, evidence in found
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
        keys = AnswerKeys.of(self._names, tenant, number)
        answers = tuple(keys.answer(key) for _, key in drop)
        fills = (fill for fill, _ in drop)
        dropped = ",".join(key for _, key in drop)
        target = self._target(tenant, number)
        return bool(await self._run(COMMIT, keys, answers, target, evaluated, epoch, reason, dropped, *fills))

    @override
    async def drop_all(self, tenant: str, number: int, reason: bytes = b"") -> None:
        await self._change(tenant, number, {}, _DROP, reason)

    @override
    async def drops(self, tenant: str, number: int, key: str) -> list[Dropped]:
        with redis_errors():
            stream = AnswerKeys.of(self._names, tenant, number).drops
            found: Any = await self._client.xrevrange(stream, count=_MAX_DROPS)
        dropped = ((_number(at), fields[b"keys"].decode(), fields[b"reason"]) for at, fields in found)
        return [Dropped(at_ms, keys == _ALL, reason) for at_ms, keys, reason in dropped if keys == _ALL or key in keys]

    async def _publishes_all_drops(self) -> bool:
        """False if Redis may evict answers, for which no invalidation message is published.

        Raises:
            CacheUntrusted: Redis may evict any key. It could keep answers and lose the stream of fills, so that they
                would never be evaluated.
        """
        try:
            memory = await self._client.info("memory")
        except NoPermissionError:
            _log.warning("near_cache_off", reason="Redis does not report its eviction policy: permit INFO")
            return False
        policy = str(memory.get("maxmemory_policy", "noeviction"))
        if not memory.get("maxmemory") or policy == "noeviction":
            return True
        if policy.startswith("allkeys"):
            raise CacheUntrusted(f"Redis has maxmemory-policy {policy}: set it to noeviction")
        _log.warning("near_cache_off", reason=f"Redis has maxmemory-policy {policy}: set it to noeviction")
        return False

    async def _change_all(self, tenant: str, positions: Mapping[int, int], effect: bytes) -> int:
        changes = (self._change(tenant, number, positions, effect) for number in range(self.count))
        return max(epoch for epoch, _, _ in await asyncio.gather(*changes))

    async def _change(
        self, tenant: str, number: int, positions: Mapping[int, int], effect: bytes, reason: bytes = b""
    ) -> tuple[int, int, list[bytes | None]]:
        keys = AnswerKeys.of(self._names, tenant, number)
        arguments = (self._target(tenant, number), _format_positions(positions), effect, self._cache.changes, reason)
        epoch, needs_evaluation, before = await self._run(CHANGE, keys, (), *arguments)
        return int(epoch), int(needs_evaluation), before

    def _target(self, tenant: str, number: int) -> str:
        return f"{self._names.applied_channel} {tenant} {number}"

    async def _run(
        self, script: Script, keys: AnswerKeys, answers: tuple[str, ...], *arguments: str | bytes | int
    ) -> Any:
        return await self._runs.submit(_Run.of(script, keys, answers, *arguments))

    async def _run_one(self, run: "_Run") -> Any:
        with redis_errors():
            try:
                return await self._client.evalsha(run.script.sha, len(run.names), *run.names, *run.arguments)
            except NoScriptError:  # not cached by this server
                return await self._client.eval(run.script.source, len(run.names), *run.names, *run.arguments)

    async def _run_all(self, runs: Sequence["_Run"]) -> list[Any]:
        """Run scripts of concurrent callers in one request."""
        if len(runs) == 1:
            return [await self._run_one(runs[0])]
        with redis_errors():
            pipeline = self._client.pipeline(transaction=False)
            for run in runs:
                pipeline.evalsha(run.script.sha, len(run.names), *run.names, *run.arguments)
            replies = await pipeline.execute(raise_on_error=False)
        return [
            await self._retry(run, reply) if isinstance(reply, Exception) else reply
            for run, reply in zip(runs, replies, strict=True)
        ]

    async def _retry(self, run: "_Run", failure: Exception) -> Any:
        """The reply of a run whose script was not cached, or the translated error."""
        try:
            if isinstance(failure, NoScriptError):
                return await self._run_one(run)
            with redis_errors():
                raise failure  # noqa: TRY301 - to be translated
        except Exception as error:  # noqa: BLE001 - raised to the caller by the coalescer
            return error


class _Run(NamedTuple):
    """One run of a script."""

    script: Script
    names: tuple[str, ...]
    arguments: tuple[str | bytes | int, ...]

    @classmethod
    def of(cls, script: Script, keys: AnswerKeys, answers: tuple[str, ...], *arguments: str | bytes | int) -> "_Run":
        return cls(script, (keys.state, keys.changes, keys.fills, keys.drops, *answers), arguments)


def _check_first(*, confirmed: bool) -> None:
    """Fail on a second confirmation: the client has reconnected by itself, and messages in between are lost."""
    if confirmed:
        raise CacheUnavailable("Redis: the subscription was interrupted")


def _positions(text: bytes) -> dict[int, int]:
    """Parse ``PARTITION:OFFSET …``."""
    numbers = list(map(int, text.replace(b":", b" ").split()))
    return dict(zip(numbers[::2], numbers[1::2], strict=True))


def _format_positions(positions: Mapping[int, int]) -> str:
    return " ".join(f"{partition}:{offset}" for partition, offset in positions.items())


def _read_change(stream_id: bytes, fields: Sequence[bytes]) -> SliceChange:
    _, previous, _, _, _, change = fields
    return SliceChange(_number(stream_id), int(previous), change if change != _KEEP else b"")


def _number(stream_id: bytes) -> int:
    return int(stream_id.partition(b"-")[0])


def _parse_message(data: bytes) -> InvalidationMessage:
    """Parse ``TENANT SLICE SEQUENCE DROPPED PARTITION:OFFSET …``, as the script function ``publish`` writes it."""
    tenant, number, sequence, dropped, *positions = data.decode().split()
    applied: dict[int, int] = {}
    for position in positions:
        partition, offset = (int(text) for text in position.split(":"))
        applied[partition] = max(offset, applied.get(partition, offset))
    keys = None if dropped == _ALL else frozenset() if dropped == _NONE else frozenset(dropped.split(","))
    return InvalidationMessage(tenant, int(number), int(sequence), applied, keys)
