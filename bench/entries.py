"""What exact invalidation costs a cache: filling, looking up, memory; and how soon drops are heard everywhere.

Real answers over the snapshot of a recorded history, in Redis as the query tier stores them. Beside each operation the
same is done as a plain cache does it (``GET``, ``SET`` with a time to live) with the same responses in the same Redis.
Then edits follow in the history: a few listeners, as many query processes have them, hold copies of all answers, and
note when each drop reaches them.
"""

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import stamina
from redis.asyncio import Redis

from bench.installation import BenchmarkFailed
from bench.loaded import Ground, empty_cache, loaded
from freshline.figures import extremes, spread
from freshline.loadtest.edits import history_of, request_of
from freshline.services import ServiceBusy, Services, connect_services, ingest_client
from infra.local import Stack
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from infra.redis.entry import Entry, stored_response
from infra.redis.port import Lookup
from infra.settings import Settings
from infra.tasks import ended
from ingest.connectors.event_file import RecordedEvent
from query.cache.near_cache import NearCache
from schemas.cache_keys import AnswerKeys, slice_of
from schemas.documents import Stage

_ROUNDS: Final = 5
_TTL_S: Final = 3_600
_NEAR_BYTES: Final = 256_000_000
_ASKED_AT_ONCE: Final = 8
_HEARD_S: Final = 30.0
_BUSY_FOR_S: Final = 60.0

Say = Callable[[str, str], None]


async def bench_entries(
    stack: Stack,
    events: Path,
    questions: Sequence[str],
    *,
    edits: int,
    listeners: int,
    say: Say,
) -> dict[str, Any]:
    """Fill the cache with answers to the questions, time it beside a plain one, then edit and time the drops.

    Args:
        stack: a running stack.
        events: the history whose snapshot is searched and whose edits are sent.
        questions: what is asked.
        edits: how many that drop an answer are timed.
        listeners: copies of all answers, each with a subscription of its own.
        say: told of progress.

    Raises:
        BenchmarkFailed: the installation did not start, or the history has too few edits.
    """
    # Answers that come back by themselves would be timed as if they had not been dropped.
    overrides = {"FRESHLINE_QUERY__REFILLS_PER_S": "0"}
    async with (
        loaded(Ground(stack, events, say, overrides)) as installation,
        connect_services(installation.settings) as services,
    ):
        settings = installation.settings
        say("answers", f"to {len(questions)} questions")
        await _ask_all(services, questions)
        async with _opened(settings) as (redis, cache):
            costs = await _costs(redis, cache, settings)
        await empty_cache(installation)
        say("drops", f"{edits} edits, {listeners} listeners")
        last_ms, each_ms = await _drops(
            settings,
            history_of(events),
            edits=edits,
            listeners=listeners,
            fill=partial(_ask_all, services, questions),
        )
    return {
        "questions": len(questions),
        **costs,
        "edits": len(last_ms),
        "listeners": listeners,
        "dropped": len(each_ms) // listeners,
        "last_drop_ms": spread(last_ms),
        "each_drop_ms": spread(each_ms),
    }


async def _ask_all(services: Services, questions: Sequence[str]) -> None:
    places = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def ask(question: str) -> None:
        async with places:
            async for attempt in stamina.retry_context(on=_in_a_moment, attempts=None, timeout=_BUSY_FOR_S):
                with attempt:
                    await services.ask(question, generate=False)

    await asyncio.gather(*map(ask, questions))


def _in_a_moment(error: Exception) -> bool | float:
    """SliceEvaluators that take in many answers at once may be late, and questions are refused then."""
    return error.after_s if isinstance(error, ServiceBusy) else False


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[tuple[Redis, RedisAnswerCache]]:
    async with aclosing(connect_redis(settings.redis)) as redis:
        yield redis, RedisAnswerCache(redis, settings.names, settings.answers)


async def _standing(cache: RedisAnswerCache, tenant: str) -> dict[str, tuple[Lookup, float]]:
    """All answers that are there, with the moment before each was looked up."""
    found = {}
    for number in range(cache.count):
        for _, key in (await cache.pending(tenant, number, known=0, fill=0)).fills:
            looked_s = time.monotonic()
            look = await cache.lookup(tenant, key, whole=True)
            if look.entry is not None:
                found[key] = look, looked_s
    return found


async def _costs(redis: Redis, cache: RedisAnswerCache, settings: Settings) -> dict[str, Any]:
    tenant = settings.tenant.default
    standing = {key: look for key, (look, _) in (await _standing(cache, tenant)).items()}
    entries = {key: look.entry for key, look in standing.items() if look.entry is not None}
    responses = {key: stored_response(entry) for key, entry in entries.items()}
    decoded = {key: Entry.decode(entry) for key, entry in entries.items()}
    new = itertools.count()
    plain = f"{settings.namespace}:plain"

    async def hit(key: str) -> object:
        return (await cache.lookup(tenant, key)).entry

    async def plain_hit(key: str) -> object:
        return await redis.get(f"{plain}:{key}")

    async def fill(key: str) -> object:
        name = f"{key}-{next(new)}"
        look = await cache.lookup(tenant, name, lease_ms=2_000)
        entry, rest = decoded[key].encode()
        return await cache.store(tenant, name, entry, epoch=look.epoch, ttl_s=_TTL_S, rest=rest)

    async def before_a_fill(key: str) -> object:
        return await cache.lookup(tenant, f"{key}-{next(new)}", lease_ms=2_000)

    async def plain_fill(key: str) -> object:
        name = f"{plain}:{key}-{next(new)}"
        return await redis.get(name) or await redis.set(name, responses[key], ex=_TTL_S)

    for key, response in responses.items():
        await redis.set(f"{plain}:{key}", response, ex=_TTL_S)
    keys = list(entries)
    try:
        near_hits = await _near_hits(settings, cache, keys, plain_hit)
        hits = await _compared(keys, hit, plain_hit)
        fills = await _compared(keys, fill, plain_fill)
        waited = await _compared(keys, before_a_fill, plain_fill)
        tenant_slices = settings.answers.slices
        ours = [AnswerKeys.of(settings.names, tenant, slice_of(key, tenant_slices)).answer(key) for key in keys]
        in_redis, in_redis_plain = [await _memory(redis, names) for names in (ours, [f"{plain}:{key}" for key in keys])]
    finally:
        async for name in redis.scan_iter(match=f"{plain}:*", count=1_000):
            await redis.delete(name)
    return {
        "answers": len(entries),
        "near_hit_us": near_hits,
        "hit_us": hits,
        "fill_us": fills,
        "waited_for_at_a_fill_us": waited,
        "bytes_per_answer": {
            "response": round(statistics.mean(map(len, responses.values()))),
            "stored": round(statistics.mean(map(len, entries.values()))),
            "in_redis": in_redis,
            "in_redis_plain": in_redis_plain,
        },
    }


async def _near_hits(
    settings: Settings, cache: RedisAnswerCache, keys: Sequence[str], plain_hit: Callable[[str], Awaitable[object]]
) -> dict[str, Any]:
    """Of copies in this process, which are served only while it is proven that no drop was missed."""
    tenant = settings.tenant.default
    async with _listening(settings) as listener:
        for key, (look, looked_s) in (await _standing(cache, tenant)).items():
            listener.near.put(tenant, key, look, stored_response(look.entry or b""), looked_s=looked_s)

        async def near_hit(key: str) -> object:
            return listener.near.get(key)

        return await _compared(keys, near_hit, plain_hit)


async def _compared(
    keys: Sequence[str], ours: Callable[[str], Awaitable[object]], plain: Callable[[str], Awaitable[object]]
) -> dict[str, Any]:
    """Microseconds of each, in turns, so that both meet the same machine."""
    rounds: list[tuple[float, float]] = []
    for _ in range(1 + _ROUNDS):  # the first warms up
        took: tuple[list[float], list[float]] = ([], [])
        for key in keys:
            for times, operation in zip(took, (ours, plain), strict=True):
                began_s = time.perf_counter()
                if not await operation(key):
                    raise BenchmarkFailed("an answer was not there, or was not kept: other changes came meanwhile")
                times.append((time.perf_counter() - began_s) * 1e6)
        rounds.append((statistics.median(took[0]), statistics.median(took[1])))
    del rounds[0]
    return {
        "exact": extremes([one for one, _ in rounds], digits=0),
        "plain": extremes([other for _, other in rounds], digits=0),
        "ratio": extremes([one / other for one, other in rounds], digits=3),
    }


async def _memory(redis: Redis, names: Sequence[str]) -> int:
    """Mean bytes that Redis takes for these keys."""
    return round(statistics.mean([await redis.memory_usage(name) or 0 for name in names]))


@dataclass(slots=True)
class _Listener:
    """A near cache with its own subscription, which notes when what was dropped.

    Attributes:
        dropped_ms: key → epoch milliseconds, since it was cleared last.
        proven_s: everything announced before was heard.
    """

    near: NearCache
    dropped_ms: dict[str, float] = field(default_factory=dict)
    proven_s: float = float("-inf")
    told: asyncio.Event = field(default_factory=asyncio.Event)

    def complete(self, moment_s: float) -> None:
        self.near.complete(moment_s)
        self.proven_s = moment_s
        self.told.set()

    async def heard_all(self, until_s: float) -> None:
        async with asyncio.timeout(_HEARD_S):
            while self.proven_s <= until_s:
                self.told.clear()
                await self.told.wait()


@asynccontextmanager
async def _listening(settings: Settings) -> AsyncIterator[_Listener]:
    dropped_ms: dict[str, float] = {}

    def dropped(key: str, _hits: int) -> None:
        dropped_ms[key] = time.time() * 1_000

    async with _opened(settings) as (_, cache):
        listener = _Listener(NearCache(slices=cache.count, max_bytes=_NEAR_BYTES, dropped=dropped), dropped_ms)

        async def listen() -> None:
            heard = cache.applied(subscribed=listener.near.subscribed, complete=listener.complete)
            async with aclosing(heard) as announcements:
                async for announced in announcements:
                    listener.near.heard(announced)

        task = asyncio.create_task(listen(), name="listener")
        try:
            await listener.heard_all(time.monotonic())
            yield listener
        finally:
            await ended(task)


async def _drops(
    settings: Settings,
    history: Iterator[RecordedEvent],
    *,
    edits: int,
    listeners: int,
    fill: Callable[[], Awaitable[None]],
) -> tuple[list[float], list[float]]:
    """Milliseconds from the refresh of each edit to its last drop at the last listener; and to every drop at each."""
    tenant = settings.tenant.default
    last_ms: list[float] = []
    each_ms: list[float] = []
    async with AsyncExitStack() as ending:
        _, cache = await ending.enter_async_context(_opened(settings))
        client = await ending.enter_async_context(ingest_client(settings))
        services = await ending.enter_async_context(connect_services(settings))
        heard = [await ending.enter_async_context(_listening(settings)) for _ in range(listeners)]
        for event in history:
            request = request_of(event)
            if request is None:
                continue
            await fill()
            standing = await _standing(cache, tenant)
            for listener in heard:
                for key, (look, looked_s) in standing.items():
                    listener.near.put(tenant, key, look, stored_response(look.entry or b""), looked_s=looked_s)
                listener.dropped_ms.clear()
            status = await services.ended((await client.send(request)).event_id)
            ended_s = time.monotonic()
            for listener in heard:
                await listener.heard_all(ended_s)
            if Stage.SEARCHABLE not in status["stages_ms"]:
                continue
            searchable_ms = status["accepted_ms"] + status["stages_ms"][Stage.SEARCHABLE]
            late_ms = [at_ms - searchable_ms for listener in heard for at_ms in listener.dropped_ms.values()]
            if late_ms:
                each_ms += late_ms
                last_ms.append(max(late_ms))
            if len(last_ms) == edits:
                return last_ms, each_ms
    raise BenchmarkFailed(f"the history has only {len(last_ms)} edits that drop an answer to these questions")
