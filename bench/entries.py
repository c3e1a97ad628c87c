"""Overhead of exact invalidation on the cache: fills, hits and memory; and the propagation time of invalidations.

Real answers over the snapshot of a recorded history are stored in Redis by the query tier's code. Each operation is
compared with that of a plain cache (``GET``, ``SET`` with a TTL) with the same responses in the same Redis. Then edits
of the history follow while several near caches, like those of query processes, hold all answers and record when each
invalidation arrives.
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
from typing import Final, TypedDict

import stamina
from redis.asyncio import Redis

from bench.installation import BenchmarkFailed
from bench.preloaded import BenchmarkSetup, empty_cache, preloaded
from freshline.figures import extremes, spread
from freshline.loadtest.edits import history_of, request_of
from freshline.services import ServiceBusy, Services, connect_services, ingest_client
from infra.local import Stack
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from infra.redis.entry import Entry, stored_response
from infra.redis.port import Lookup
from infra.settings import Settings
from infra.tasks import cancel_and_wait
from ingest.connectors.event_file import RecordedEvent
from query.cache.near_cache import NearCache
from schemas.cache_keys import AnswerKeys, slice_of
from schemas.documents import Stage

_ROUNDS: Final = 5
_TTL_S: Final = 3_600
_NEAR_BYTES: Final = 256_000_000
_ASKED_AT_ONCE: Final = 8
_RECEIVE_TIMEOUT_S: Final = 30.0
_BUSY_FOR_S: Final = 60.0

Say = Callable[[str, str], None]


class Comparison(TypedDict):
    """Microseconds of an operation on the exact and on a plain cache, and the ratio of both."""

    exact: dict[str, float]
    plain: dict[str, float]
    ratio: dict[str, float]


class AnswerBytes(TypedDict):
    """Mean bytes of an answer: its response, its stored entry, and memory in Redis."""

    response: int
    stored: int
    in_redis: int
    in_redis_plain: int


class Overhead(TypedDict):
    """Overhead of exact invalidation in the cache."""

    answers: int
    near_cache_hit_us: Comparison
    hit_us: Comparison
    fill_us: Comparison
    fill_wait_us: Comparison
    bytes_per_answer: AnswerBytes


class EntriesResults(Overhead):
    """Results of the benchmark. Invalidation times are milliseconds from the refresh of an edit."""

    questions: int
    edits: int
    near_caches: int
    invalidated: int
    last_invalidation_ms: dict[str, float]
    each_invalidation_ms: dict[str, float]


async def bench_entries(
    stack: Stack,
    events: Path,
    questions: Sequence[str],
    *,
    edits: int,
    near_caches: int,
    say: Say,
) -> EntriesResults:
    """Fill the cache with answers, compare it with a plain one, then edit and measure invalidations.

    Args:
        stack: a running stack.
        events: the history whose snapshot is searched and whose edits are sent.
        questions: questions to ask.
        edits: number of measured edits that invalidate an answer.
        near_caches: number of near caches, each with its own subscription.
        say: reports progress.

    Raises:
        BenchmarkFailed: the installation did not start, or the history has too few edits.
    """
    # Refreshed answers would lookup as if they had not been invalidated.
    overrides = {"FRESHLINE_QUERY__REFRESHES_PER_S": "0"}
    async with (
        preloaded(BenchmarkSetup(stack, events, say, overrides)) as installation,
        connect_services(installation.settings) as services,
    ):
        settings = installation.settings
        say("answers", f"{len(questions)} questions")
        await _ask_all(services, questions)
        async with _opened(settings) as (redis, cache):
            overhead = await _overhead(redis, cache, settings)
        await empty_cache(installation)
        say("invalidations", f"{edits} edits, {near_caches} near caches")
        last_ms, each_ms = await _invalidation_times(
            settings,
            history_of(events),
            edits=edits,
            near_caches=near_caches,
            fill=partial(_ask_all, services, questions),
        )
    return {
        "questions": len(questions),
        **overhead,
        "edits": len(last_ms),
        "near_caches": near_caches,
        "invalidated": len(each_ms) // near_caches,
        "last_invalidation_ms": spread(last_ms),
        "each_invalidation_ms": spread(each_ms),
    }


async def _ask_all(services: Services, questions: Sequence[str]) -> None:
    slots = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def ask(question: str) -> None:
        async with slots:
            async for attempt in stamina.retry_context(on=_retry_after_s, attempts=None, timeout=_BUSY_FOR_S):
                with attempt:
                    await services.ask(question, generate=False)

    await asyncio.gather(*map(ask, questions))


def _retry_after_s(error: Exception) -> bool | float:
    """Evaluators that store many answers at once may lag; questions are rejected then."""
    return error.after_s if isinstance(error, ServiceBusy) else False


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[tuple[Redis, RedisAnswerCache]]:
    async with aclosing(connect_redis(settings.redis)) as redis:
        yield redis, RedisAnswerCache(redis, settings.names, settings.answers)


async def _cached_answers(cache: RedisAnswerCache, tenant: str) -> dict[str, tuple[Lookup, float]]:
    """All cached answers, with the time before each was read."""
    answers = {}
    for number in range(cache.count):
        for _, key in (await cache.pending(tenant, number, after_epoch=0, after_fill=0)).fills:
            read_s = time.monotonic()
            lookup = await cache.lookup(tenant, key, with_evidence=True)
            if lookup.entry is not None:
                answers[key] = lookup, read_s
    return answers


async def _overhead(redis: Redis, cache: RedisAnswerCache, settings: Settings) -> Overhead:
    tenant = settings.tenant.default
    answers = {key: lookup for key, (lookup, _) in (await _cached_answers(cache, tenant)).items()}
    entries = {key: lookup.entry for key, lookup in answers.items() if lookup.entry is not None}
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
        lookup = await cache.lookup(tenant, name, lease_ms=2_000)
        entry, evidence = decoded[key].encode()
        return await cache.store(tenant, name, entry, epoch=lookup.epoch, ttl_s=_TTL_S, evidence=evidence)

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
        fill_waits = await _compared(keys, before_a_fill, plain_fill)
        tenant_slices = settings.answers.slices
        exact_keys = [AnswerKeys.of(settings.names, tenant, slice_of(key, tenant_slices)).answer(key) for key in keys]
        in_redis, in_redis_plain = [
            await _memory(redis, names) for names in (exact_keys, [f"{plain}:{key}" for key in keys])
        ]
    finally:
        async for name in redis.scan_iter(match=f"{plain}:*", count=1_000):
            await redis.delete(name)
    return {
        "answers": len(entries),
        "near_cache_hit_us": near_hits,
        "hit_us": hits,
        "fill_us": fills,
        "fill_wait_us": fill_waits,
        "bytes_per_answer": {
            "response": round(statistics.mean(map(len, responses.values()))),
            "stored": round(statistics.mean(map(len, entries.values()))),
            "in_redis": in_redis,
            "in_redis_plain": in_redis_plain,
        },
    }


async def _near_hits(
    settings: Settings, cache: RedisAnswerCache, keys: Sequence[str], plain_hit: Callable[[str], Awaitable[object]]
) -> Comparison:
    """Hits of a near cache, served only while its subscription is provably gap-free."""
    tenant = settings.tenant.default
    async with _subscribed_probe(settings) as probe:
        for key, (lookup, read_s) in (await _cached_answers(cache, tenant)).items():
            probe.near.put(tenant, key, lookup, stored_response(lookup.entry or b""), read_s=read_s)

        async def near_hit(key: str) -> object:
            return probe.near.get(key)

        return await _compared(keys, near_hit, plain_hit)


async def _compared(
    keys: Sequence[str], exact_keys: Callable[[str], Awaitable[object]], plain: Callable[[str], Awaitable[object]]
) -> Comparison:
    """Microseconds of each operation, alternating, so that both run under the same conditions."""
    rounds: list[tuple[float, float]] = []
    for _ in range(1 + _ROUNDS):  # the first warms up
        took: tuple[list[float], list[float]] = ([], [])
        for key in keys:
            for times, operation in zip(took, (exact_keys, plain), strict=True):
                began_s = time.perf_counter()
                if not await operation(key):
                    raise BenchmarkFailed("an answer was missing or not stored: there were concurrent changes")
                times.append((time.perf_counter() - began_s) * 1e6)
        rounds.append((statistics.median(took[0]), statistics.median(took[1])))
    del rounds[0]
    return {
        "exact": extremes([one for one, _ in rounds], digits=0),
        "plain": extremes([other for _, other in rounds], digits=0),
        "ratio": extremes([one / other for one, other in rounds], digits=3),
    }


async def _memory(redis: Redis, names: Sequence[str]) -> int:
    """Mean memory of these keys in Redis, in bytes."""
    return round(statistics.mean([await redis.memory_usage(name) or 0 for name in names]))


@dataclass(slots=True)
class _NearCacheProbe:
    """A near cache with its own subscription, which records invalidations.

    Attributes:
        invalidated_ms: key → epoch milliseconds, since it was last cleared.
        proven_s: all messages published before were received.
    """

    near: NearCache
    invalidated_ms: dict[str, float] = field(default_factory=dict)
    proven_s: float = float("-inf")
    proven: asyncio.Event = field(default_factory=asyncio.Event)

    def on_heartbeat(self, moment_s: float) -> None:
        self.near.on_heartbeat(moment_s)
        self.proven_s = moment_s
        self.proven.set()

    async def received_all(self, until_s: float) -> None:
        async with asyncio.timeout(_RECEIVE_TIMEOUT_S):
            while self.proven_s <= until_s:
                self.proven.clear()
                await self.proven.wait()


@asynccontextmanager
async def _subscribed_probe(settings: Settings) -> AsyncIterator[_NearCacheProbe]:
    invalidated_ms: dict[str, float] = {}

    def invalidated(key: str, _hits: int) -> None:
        invalidated_ms[key] = time.time() * 1_000

    async with _opened(settings) as (_, cache):
        probe = _NearCacheProbe(
            NearCache(slices=cache.count, max_bytes=_NEAR_BYTES, on_invalidated=invalidated), invalidated_ms
        )

        async def receive() -> None:
            messages = cache.invalidations(on_subscribed=probe.near.on_subscribed, on_heartbeat=probe.on_heartbeat)
            async with aclosing(messages) as received:
                async for message in received:
                    probe.near.on_message(message)

        task = asyncio.create_task(receive(), name="near-cache-probe")
        try:
            await probe.received_all(time.monotonic())
            yield probe
        finally:
            await cancel_and_wait(task)


async def _invalidation_times(
    settings: Settings,
    history: Iterator[RecordedEvent],
    *,
    edits: int,
    near_caches: int,
    fill: Callable[[], Awaitable[None]],
) -> tuple[list[float], list[float]]:
    """Milliseconds from the refresh of each edit to its last invalidation, and to each one in each near cache."""
    tenant = settings.tenant.default
    last_ms: list[float] = []
    each_ms: list[float] = []
    async with AsyncExitStack() as ending:
        _, cache = await ending.enter_async_context(_opened(settings))
        client = await ending.enter_async_context(ingest_client(settings))
        services = await ending.enter_async_context(connect_services(settings))
        probes = [await ending.enter_async_context(_subscribed_probe(settings)) for _ in range(near_caches)]
        for event in history:
            request = request_of(event)
            if request is None:
                continue
            await fill()
            answers = await _cached_answers(cache, tenant)
            for probe in probes:
                for key, (lookup, read_s) in answers.items():
                    probe.near.put(tenant, key, lookup, stored_response(lookup.entry or b""), read_s=read_s)
                probe.invalidated_ms.clear()
            status = await services.ended((await client.send(request)).event_id)
            ended_s = time.monotonic()
            for probe in probes:
                await probe.received_all(ended_s)
            if Stage.SEARCHABLE not in status["stages_ms"]:
                continue
            searchable_ms = status["accepted_ms"] + status["stages_ms"][Stage.SEARCHABLE]
            delays_ms = [at_ms - searchable_ms for probe in probes for at_ms in probe.invalidated_ms.values()]
            if delays_ms:
                each_ms += delays_ms
                last_ms.append(max(delays_ms))
            if len(last_ms) == edits:
                return last_ms, each_ms
    raise BenchmarkFailed(f"the history has only {len(last_ms)} edits that invalidate an answer to these questions")
