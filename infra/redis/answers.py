"""Cached answers in Redis, filled, judged and dropped without locks.

A slice is one linearisation point: each operation is one script, and Redis runs one script at a time.

- A change is made searchable first; then it begins a new epoch of the slice. It is judged after that: what it alters is
  dropped, and in the same script the slice counts as judged up to that epoch, and the positions advance.
- A fill looks up the epoch first, retrieves, and may store its answer only while that epoch stands.

So an answer that a lookup returns reflects every change at or before the positions of the same lookup. Such a change
either began its epoch before the fill did, and was searchable when the fill retrieved; or after the answer was stored,
and then whoever judged it has seen the answer, for the fills were read after the epoch began.
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
from infra.redis.answer_scripts import CHANGE, LOOKUP, PENDING, SETTLE, STORE, Script
from infra.redis.connect import redis_errors
from infra.redis.port import (
    AnswerCache,
    AnswerSlices,
    Appended,
    Applied,
    CacheUnavailable,
    CacheUntrusted,
    Dropped,
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
"""How often a subscription is asked for a sign of life."""

SILENT_S: Final = 2.0
"""A subscription that gives none for so long counts as broken."""

_AT_A_TIME: Final = 2
_OF_ONE: Final = 64
"""Requests with many runs under way, and runs of one request."""

_DROP: Final = b"drop"
_KEEP: Final = b"keep"
_SEED: Final = b"seed"
_ALL: Final = "*"
_NONE: Final = "-"
_DROPS_READ: Final = 1_000

_log = structlog.get_logger(__name__)


class RedisAnswerCache(AnswerCache, AnswerSlices):
    """See ``AnswerCache`` and ``AnswerSlices``. Every method raises CacheUnavailable where Redis cannot serve.

    Args:
        client: whose replies are bytes.
        names: of this installation.
        cache: how slices are laid out.
    """

    def __init__(self, client: Redis, names: Names, cache: AnswerSettings | None = None) -> None:
        self._client = client
        self._names = names
        self._cache = cache or AnswerSettings()
        self._asked: Coalescer[_Run, Any] = Coalescer(self._run_all, at_a_time=_AT_A_TIME, most=_OF_ONE)

    @property
    @override
    def count(self) -> int:
        return self._cache.slices

    @override
    async def lookup(self, tenant: str, key: str, *, lease_ms: int = 0, whole: bool = False) -> Lookup:
        keys = AnswerKeys.of(self._names, tenant, slice_of(key, self.count))
        looking = (keys.answer(key), keys.lease(key))
        found = await self._run(LOOKUP, keys, looking, lease_ms, "whole" if whole else "")
        epoch, positions, seeded, told, entry, ends_ms, leased = found
        return Lookup(
            epoch=int(epoch),
            positions=_positions(positions),
            entry=entry,
            seeded=bool(seeded),
            told=int(told),
            ends_ms=max(ends_ms, 0),
            leased=bool(leased),
        )

    @override
    async def store(self, tenant: str, key: str, entry: bytes, *, epoch: int, ttl_s: int, rest: bytes = b"") -> bool:
        number = slice_of(key, self.count)
        keys = AnswerKeys.of(self._names, tenant, number)
        arguments = (self._where(tenant, number), epoch, entry, ttl_s, key, keys.answers, self._cache.per_slice, rest)
        return bool(await self._run(STORE, keys, (keys.answer(key), keys.lease(key)), *arguments))

    @override
    async def apply(self, tenant: str, positions: Mapping[int, int], *, drop: bool) -> int:
        return await self._change_all(tenant, positions, _DROP if drop else _KEEP)

    @override
    async def positions(self, tenant: str) -> Mapping[int, int]:
        with redis_errors():
            reading = self._client.pipeline(transaction=False)
            for number in range(self.count):
                reading.hget(AnswerKeys.of(self._names, tenant, number).state, "positions")
            applied = await reading.execute()
        return reached_by_all([_positions(positions or b"") for positions in applied])

    @override
    async def seed(self, tenant: str, positions: Mapping[int, int]) -> None:
        await self._change_all(tenant, positions, _SEED)

    @override
    async def applied(
        self, *, subscribed: Callable[[], None] | None = None, complete: Callable[[float], None] | None = None
    ) -> AsyncGenerator[Applied, None]:
        """See ``AnswerCache``. Redis answers a connection in order: before the reply to a ping comes all there was."""
        with redis_errors():
            async with self._client.pubsub() as channel:
                await channel.subscribe(self._names.applied_channel)
                tells_all = await self._tells_all()
                confirmed = False
                asked_s = answered_s = time.monotonic()
                while True:
                    now_s = time.monotonic()
                    if now_s - answered_s > SILENT_S:
                        raise CacheUnavailable(f"Redis: the subscription was silent for {SILENT_S:g} s")
                    # Also while a reply is due: in a busy process proofs would come at half the rate.
                    if confirmed and now_s - asked_s >= HEARTBEAT_S:
                        asked_s = now_s
                        await channel.ping(repr(now_s))
                    message = await channel.get_message(timeout=HEARTBEAT_S / 4)
                    kind = message["type"] if message is not None else None
                    if kind == "message":
                        yield _parse_announcement(message["data"])
                    elif kind == "pong":
                        answered_s = time.monotonic()
                        if complete is not None and tells_all:
                            complete(float(message["data"]))
                    elif kind == "subscribe":
                        _once(confirmed=confirmed)
                        confirmed = True
                        if subscribed is not None:
                            subscribed()

    @override
    async def append(self, tenant: str, number: int, positions: Mapping[int, int], change: bytes) -> Appended:
        _, waits, before = await self._change(tenant, number, positions, change or _KEEP)
        reached = zip(positions, before, strict=True)
        return Appended(bool(waits), {partition: int(offset) for partition, offset in reached if offset is not None})

    @override
    async def pending(self, tenant: str, number: int, *, known: int, fill: int) -> Pending:
        keys = AnswerKeys.of(self._names, tenant, number)
        state, changes, fills, oldest = await self._run(PENDING, keys, (), known, fill)
        epoch, judged, floor = (int(value) for value in state)
        return Pending(
            epoch=epoch,
            judged=judged,
            floor=floor,
            changes=tuple(_read_change(number, fields) for number, fields in changes),
            fills=tuple((_number(fill), fields[1].decode()) for fill, fields in fills),
            oldest_fill=_number(oldest) if oldest is not None else None,
        )

    @override
    async def entries(self, tenant: str, number: int, keys: Sequence[str]) -> list[StoredEntry | None]:
        names = AnswerKeys.of(self._names, tenant, number)
        with redis_errors():
            reading = self._client.pipeline(transaction=False)
            for key in keys:
                reading.hmget(names.answer(key), ["fill", "epoch", "entry", "rest"])
            found = await reading.execute()
        return [
            StoredEntry(int(fill), int(epoch), entry + rest) if fill is not None else None
            for fill, epoch, entry, rest in found
        ]

    @override
    async def settle(
        self, tenant: str, number: int, *, judged: int, epoch: int, drop: Sequence[tuple[int, str]], why: bytes = b""
    ) -> bool:
        keys = AnswerKeys.of(self._names, tenant, number)
        answers = tuple(keys.answer(key) for _, key in drop)
        fills = (fill for fill, _ in drop)
        dropped = ",".join(key for _, key in drop)
        where = self._where(tenant, number)
        return bool(await self._run(SETTLE, keys, answers, where, judged, epoch, why, dropped, *fills))

    @override
    async def drop_all(self, tenant: str, number: int, why: bytes = b"") -> None:
        await self._change(tenant, number, {}, _DROP, why)

    @override
    async def drops(self, tenant: str, number: int, key: str) -> list[Dropped]:
        with redis_errors():
            stream = AnswerKeys.of(self._names, tenant, number).drops
            found: Any = await self._client.xrevrange(stream, count=_DROPS_READ)
        dropped = ((_number(at), fields[b"keys"].decode(), fields[b"why"]) for at, fields in found)
        return [Dropped(at_ms, keys == _ALL, why) for at_ms, keys, why in dropped if keys == _ALL or key in keys]

    async def _tells_all(self) -> bool:
        """False where Redis evicts answers to make room, which nobody is told.

        Raises:
            CacheUntrusted: it evicts anything, and so might keep answers without the list of them that is judged.
        """
        try:
            memory = await self._client.info("memory")
        except NoPermissionError:
            _log.warning("near_cache_off", reason="Redis does not say how it evicts: allow the command INFO")
            return False
        policy = str(memory.get("maxmemory_policy", "noeviction"))
        if not memory.get("maxmemory") or policy == "noeviction":
            return True
        if policy.startswith("allkeys"):
            raise CacheUntrusted(f"Redis evicts by {policy}: set maxmemory-policy to noeviction")
        _log.warning("near_cache_off", reason=f"Redis evicts by {policy}: set maxmemory-policy to noeviction")
        return False

    async def _change_all(self, tenant: str, positions: Mapping[int, int], effect: bytes) -> int:
        changed = (self._change(tenant, number, positions, effect) for number in range(self.count))
        return max(epoch for epoch, _, _ in await asyncio.gather(*changed))

    async def _change(
        self, tenant: str, number: int, positions: Mapping[int, int], effect: bytes, why: bytes = b""
    ) -> tuple[int, int, list[bytes | None]]:
        keys = AnswerKeys.of(self._names, tenant, number)
        arguments = (self._where(tenant, number), _told(positions), effect, self._cache.changes, why)
        epoch, waits, before = await self._run(CHANGE, keys, (), *arguments)
        return int(epoch), int(waits), before

    def _where(self, tenant: str, number: int) -> str:
        return f"{self._names.applied_channel} {tenant} {number}"

    async def _run(
        self, script: Script, keys: AnswerKeys, answers: tuple[str, ...], *arguments: str | bytes | int
    ) -> Any:
        return await self._asked.ask(_Run.of(script, keys, answers, *arguments))

    async def _run_one(self, run: "_Run") -> Any:
        with redis_errors():
            try:
                return await self._client.evalsha(run.script.sha, len(run.names), *run.names, *run.arguments)
            except NoScriptError:  # this server has not seen it yet, or has forgotten it
                return await self._client.eval(run.script.source, len(run.names), *run.names, *run.arguments)

    async def _run_all(self, runs: Sequence["_Run"]) -> list[Any]:
        """What questions, or slices, of one process ask at the same time, in one request."""
        if len(runs) == 1:
            return [await self._run_one(runs[0])]
        with redis_errors():
            asking = self._client.pipeline(transaction=False)
            for run in runs:
                asking.evalsha(run.script.sha, len(run.names), *run.names, *run.arguments)
            found = await asking.execute(raise_on_error=False)
        return [
            await self._again(run, one) if isinstance(one, Exception) else one
            for run, one in zip(runs, found, strict=True)
        ]

    async def _again(self, run: "_Run", failed: Exception) -> Any:
        """What is to be told of one that failed."""
        try:
            if isinstance(failed, NoScriptError):
                return await self._run_one(run)
            with redis_errors():
                raise failed  # noqa: TRY301 - translated as everywhere
        except Exception as error:  # noqa: BLE001 - handed to whoever asked
            return error


class _Run(NamedTuple):
    """One run of a script."""

    script: Script
    names: tuple[str, ...]
    arguments: tuple[str | bytes | int, ...]

    @classmethod
    def of(cls, script: Script, keys: AnswerKeys, answers: tuple[str, ...], *arguments: str | bytes | int) -> "_Run":
        return cls(script, (keys.state, keys.changes, keys.fills, keys.drops, *answers), arguments)


def _once(*, confirmed: bool) -> None:
    """The client connects and subscribes again by itself; what was announced between is lost."""
    if confirmed:
        raise CacheUnavailable("Redis: the subscription was interrupted")


def _positions(told: bytes) -> dict[int, int]:
    """As ``_told`` wrote them."""
    numbers = list(map(int, told.replace(b":", b" ").split()))
    return dict(zip(numbers[::2], numbers[1::2], strict=True))


def _told(positions: Mapping[int, int]) -> str:
    return " ".join(f"{partition}:{offset}" for partition, offset in positions.items())


def _read_change(stream_id: bytes, fields: Sequence[bytes]) -> SliceChange:
    _, previous, _, _, _, change = fields
    return SliceChange(_number(stream_id), int(previous), change if change != _KEEP else b"")


def _number(stream_id: bytes) -> int:
    return int(stream_id.partition(b"-")[0])


def _parse_announcement(data: bytes) -> Applied:
    """``TENANT SLICE TOLD DROPPED PARTITION:OFFSET …``, as ``announce`` writes it."""
    tenant, number, told, dropped, *positions = data.decode().split()
    applied: dict[int, int] = {}
    for position in positions:
        partition, offset = (int(text) for text in position.split(":"))
        applied[partition] = max(offset, applied.get(partition, offset))
    gone = None if dropped == _ALL else frozenset() if dropped == _NONE else frozenset(dropped.split(","))
    return Applied(tenant, int(number), int(told), applied, gone)
