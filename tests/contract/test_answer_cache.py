"""The contract of AnswerCache, run on the twin, on a Redis server and on a three-node cluster."""

import asyncio
import signal
import time
from contextlib import aclosing
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis, RedisCluster
from redis.crc import key_slot
from redis_servers import free_port, redis_server, url

from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from infra.redis.memory_answers import MemoryAnswerCache
from infra.redis.port import Appended, CacheUnavailable, CacheUntrusted, InvalidationMessage
from infra.settings import RedisSettings
from schemas.cache_keys import AnswerKeys
from schemas.names import Names

NAMES = Names("contract")
WAIT_S = 10


@pytest.fixture(params=["twin", "server", "cluster"])
async def cache(request):
    if request.param == "twin":
        yield MemoryAnswerCache()
        return
    if request.param == "server":
        client = connect_redis(RedisSettings(url=url(request.getfixturevalue("redis_port"))))
    else:
        client = RedisCluster.from_url(url(request.getfixturevalue("cluster_port")))
        await client.initialize()
    await client.flushall()
    # Its own channel: messages of another test may still be in flight between the nodes of a cluster.
    yield RedisAnswerCache(client, Names(f"contract-{uuid4().hex[:8]}"))
    await client.aclose()


async def test_a_new_slice_has_only_an_epoch(cache):
    first = await cache.lookup("acme", "k")
    assert (first.positions, first.entry, first.seeded) == ({}, None, False)
    assert (await cache.lookup("acme", "k")).epoch == first.epoch


async def test_an_answer_is_found_under_its_key_and_tenant_only(cache):
    epoch = (await cache.lookup("acme", "k")).epoch
    assert await cache.store("acme", "k", b"\x00\xff answer", epoch=epoch, ttl_s=60)
    assert (await cache.lookup("acme", "k")).entry == b"\x00\xff answer"
    assert (await cache.lookup("acme", "other")).entry is None
    assert (await cache.lookup("umbrella", "k")).entry is None


async def test_evidence_is_returned_to_evaluators_and_on_request(cache):
    epoch = (await cache.lookup("acme", "k")).epoch
    for key, evidence in {"k": b"\x00evidence", "bare": b""}.items():
        assert await cache.store("acme", key, b"answer ", epoch=epoch, ttl_s=60, evidence=evidence)
    assert (await cache.lookup("acme", "k")).entry == b"answer "
    assert (await cache.lookup("acme", "k", with_evidence=True)).entry == b"answer \x00evidence"
    found = await cache.entries("acme", 0, ["k", "bare", "other"])
    assert [one and one.entry for one in found] == [b"answer \x00evidence", b"answer ", None]


async def test_a_drop_removes_all_answers_of_the_tenant_only(cache):
    for tenant in ("acme", "umbrella"):
        epoch = (await cache.lookup(tenant, "k")).epoch
        assert await cache.store(tenant, "k", b"old", epoch=epoch, ttl_s=60)
    epoch = await cache.apply("acme", {3: 42}, drop=True)
    lookup = await cache.lookup("acme", "k")
    assert (lookup.epoch, lookup.positions, lookup.entry) == (epoch, {3: 42}, None)
    assert (await cache.lookup("umbrella", "k")).entry == b"old"


async def test_positions_are_those_applied_for_the_tenant(cache):
    assert await cache.positions("acme") == {}
    await cache.apply("acme", {3: 42}, drop=False)
    await cache.seed("acme", {3: 7, 11: 0})
    await cache.apply("umbrella", {3: 50}, drop=True)
    assert await cache.positions("acme") == (await cache.lookup("acme", "k")).positions == {3: 42, 11: 0}


async def test_a_fill_begun_before_a_drop_is_rejected(cache):
    epoch = (await cache.lookup("acme", "k")).epoch
    await cache.apply("acme", {0: 1}, drop=True)
    assert not await cache.store("acme", "k", b"old", epoch=epoch, ttl_s=60)
    assert (await cache.lookup("acme", "k")).entry is None


async def test_positions_without_a_drop_keep_answers(cache):
    epoch = (await cache.lookup("acme", "k")).epoch
    await cache.store("acme", "k", b"answer", epoch=epoch, ttl_s=60)
    assert await cache.apply("acme", {0: 7}, drop=False) == epoch
    lookup = await cache.lookup("acme", "k")
    assert (lookup.entry, lookup.positions) == (b"answer", {0: 7})


async def test_positions_never_decrease(cache):
    await cache.apply("acme", {0: 9, 1: 100}, drop=True)
    await cache.apply("acme", {0: 10, 1: 11, 2: 0}, drop=True)
    assert (await cache.lookup("acme", "k")).positions == {0: 10, 1: 100, 2: 0}


async def test_only_the_first_seed_drops_answers(cache):
    first = (await cache.lookup("acme", "k")).epoch
    await cache.apply("acme", {0: 9}, drop=False)
    await cache.seed("acme", {0: 5, 1: 3})
    lookup = await cache.lookup("acme", "k")
    assert lookup.epoch > first
    assert lookup.seeded
    assert lookup.positions == {0: 9, 1: 3}
    assert not await cache.store("acme", "k", b"old", epoch=first, ttl_s=60)
    await cache.seed("acme", {0: 50})
    assert await cache.lookup("acme", "k") == lookup


async def test_the_first_miss_holds_the_fill_lease_until_the_fill(cache):
    first = await cache.lookup("acme", "k", lease_ms=60_000)
    second = await cache.lookup("acme", "k", lease_ms=60_000)
    other = await cache.lookup("acme", "other", lease_ms=60_000)
    assert (first.leased, second.leased, other.leased) == (True, False, True)
    assert await cache.store("acme", "k", b"answer", epoch=first.epoch, ttl_s=60)
    lookup = await cache.lookup("acme", "k", lease_ms=60_000)
    assert (lookup.entry, lookup.leased) == (b"answer", False)
    assert 59_000 < lookup.ttl_ms <= 60_000
    await cache.apply("acme", {0: 1}, drop=True)
    assert (await cache.lookup("acme", "k", lease_ms=60_000)).leased


async def test_a_rejected_fill_releases_its_lease(cache):
    first = await cache.lookup("acme", "k", lease_ms=60_000)
    await cache.apply("acme", {0: 1}, drop=True)
    assert not await cache.store("acme", "k", b"old", epoch=first.epoch, ttl_s=60)
    assert (await cache.lookup("acme", "k", lease_ms=60_000)).leased


async def test_replacing_an_answer_publishes_an_invalidation_message(cache):
    epoch = (await cache.lookup("acme", "k")).epoch
    sequence = [(await cache.lookup("acme", "k")).sequence]
    for text in (b"one", b"two"):
        assert await cache.store("acme", "k", text, epoch=epoch, ttl_s=60)
        sequence.append((await cache.lookup("acme", "k")).sequence)
    assert (await cache.lookup("acme", "k")).entry == b"two"
    assert [number - sequence[0] for number in sequence] == [0, 0, 1]


async def test_drops_are_recorded_with_their_reason(cache):
    epoch = (await cache.lookup("acme", "a")).epoch
    for key in "ab":
        assert await cache.store("acme", key, b"answer", epoch=epoch, ttl_s=60)
    assert (await cache.append("acme", 0, {0: 1}, b"change")).needs_evaluation
    pending = await cache.pending("acme", 0, after_epoch=0, after_fill=0)
    [fill] = [fill for fill, key in pending.fills if key == "a"]
    evaluated, now = pending.evaluated, pending.epoch
    assert await cache.commit("acme", 0, evaluated=evaluated, epoch=now, drop=[(fill, "a")], reason=b"event 7")
    await cache.drop_all("acme", 0, b"too many")
    drops = {key: await cache.drops("acme", 0, key) for key in "ab"}
    assert [(one.whole_slice, one.reason) for one in drops["a"]] == [(True, b"too many"), (False, b"event 7")]
    assert [(one.whole_slice, one.reason) for one in drops["b"]] == [(True, b"too many")]


async def test_append_returns_the_positions_reached_before_it(cache):
    assert await cache.append("acme", 0, {0: 1, 7: 4}, b"change") == Appended(
        needs_evaluation=False, positions_before={}
    )
    assert (await cache.append("acme", 0, {7: 6, 0: 1, 2: 9}, b"change")).positions_before == {0: 1, 7: 4}
    epoch = (await cache.lookup("acme", "a")).epoch
    assert await cache.store("acme", "a", b"answer", epoch=epoch, ttl_s=60)
    # A change that waits for its evaluation is not reached yet.
    assert await cache.append("acme", 0, {7: 8}, b"change") == Appended(needs_evaluation=True, positions_before={7: 6})
    assert (await cache.append("acme", 0, {7: 8}, b"change")).positions_before == {7: 6}


async def test_a_slice_without_answers_has_nothing_to_evaluate(cache):
    never = await cache.pending("acme", 0, after_epoch=0, after_fill=0)
    assert (never.changes, never.fills, never.oldest_fill) == ((), (), None)
    epoch = (await cache.lookup("acme", "a")).epoch
    assert await cache.store("acme", "a", b"answer", epoch=epoch, ttl_s=60)
    assert (await cache.append("acme", 0, {0: 1}, b"change")).needs_evaluation
    pending = await cache.pending("acme", 0, after_epoch=0, after_fill=0)
    [(fill, _)] = pending.fills
    assert pending.oldest_fill == fill
    assert await cache.commit("acme", 0, evaluated=pending.evaluated, epoch=pending.epoch, drop=[(fill, "a")])
    emptied = await cache.pending("acme", 0, after_epoch=pending.epoch, after_fill=fill)
    assert (emptied.epoch, emptied.fills, emptied.oldest_fill) == (pending.epoch, (), None)


async def test_epochs_only_increase(cache):
    epochs = [await cache.apply("acme", {}, drop=True) for _ in range(50)]
    assert epochs == sorted(set(epochs))


async def test_invalidation_messages_arrive_in_order_after_subscription(cache):
    subscribed = asyncio.Event()
    received: list[InvalidationMessage] = []

    async def listen():
        async with aclosing(cache.invalidations(on_subscribed=subscribed.set)) as messages:
            async for message in messages:
                received.append(message)
                if len(received) == 2:
                    return

    async with asyncio.timeout(WAIT_S):
        listening = asyncio.create_task(listen())
        await subscribed.wait()
        await cache.apply("acme", {3: 42, 5: 7}, drop=True)
        await cache.apply("umbrella-1", {}, drop=False)
        await listening
    sequence = [(await cache.lookup(tenant, "k")).sequence for tenant in ("acme", "umbrella-1")]
    assert received == [
        InvalidationMessage("acme", 0, sequence[0], {3: 42, 5: 7}, None),
        InvalidationMessage("umbrella-1", 0, sequence[1], {}, frozenset()),
    ]


async def test_an_answer_expires_after_its_ttl():
    now_us = 1_000_000
    twin = MemoryAnswerCache(lambda: now_us)
    epoch = (await twin.lookup("acme", "k")).epoch
    await twin.store("acme", "k", b"answer", epoch=epoch, ttl_s=5)
    now_us += 4_999_999
    assert (await twin.lookup("acme", "k")).entry == b"answer"
    now_us += 1
    assert (await twin.lookup("acme", "k")).entry is None


@pytest.fixture
async def client(redis_port):
    client = connect_redis(RedisSettings(url=url(redis_port)))
    await client.flushall()
    yield client
    await client.aclose()


async def test_redis_expires_an_answer(client: Redis):
    cache = RedisAnswerCache(client, NAMES)
    epoch = (await cache.lookup("acme", "k")).epoch
    await cache.store("acme", "k", b"answer", epoch=epoch, ttl_s=77)
    keys = AnswerKeys.of(NAMES, "acme")
    assert 70 < await client.ttl(keys.answer("k")) <= 77
    assert await client.ttl(keys.state) == -1


async def test_losing_the_slice_state_alone_loses_the_answers(client: Redis):
    cache = RedisAnswerCache(client, NAMES)
    before = await cache.lookup("acme", "k")
    await cache.store("acme", "k", b"answer", epoch=before.epoch, ttl_s=60)
    await client.delete(AnswerKeys.of(NAMES, "acme").state)
    after = await cache.lookup("acme", "k")
    assert after.epoch > before.epoch
    assert after.entry is None
    assert not await cache.store("acme", "k", b"answer", epoch=before.epoch, ttl_s=60)


async def test_scripts_are_loaded_again_after_a_flush(client: Redis):
    cache = RedisAnswerCache(client, NAMES)
    await cache.lookup("acme", "k")
    await client.script_flush()
    assert (await cache.lookup("acme", "k")).entry is None


def test_all_keys_of_a_slice_share_a_hash_slot():
    acme, umbrella = AnswerKeys.of(NAMES, "acme"), AnswerKeys.of(NAMES, "umbrella")
    assert key_slot(acme.state.encode()) == key_slot(acme.answer("k").encode())
    assert key_slot(acme.state.encode()) != key_slot(umbrella.state.encode())


@pytest.fixture
def own_server(tmp_path):
    port = free_port()
    with redis_server(tmp_path, port) as process:
        yield process, RedisSettings(url=url(port), timeout_s=0.5)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_dead_or_hanging_server_is_unavailable(own_server, fault):
    process, redis_settings = own_server
    client = connect_redis(redis_settings)
    cache = RedisAnswerCache(client, NAMES)
    epoch = (await cache.lookup("acme", "k")).epoch
    process.send_signal(fault)
    if fault is signal.SIGKILL:
        process.wait()
    async with asyncio.timeout(WAIT_S):
        for call in (
            cache.lookup("acme", "k"),
            cache.store("acme", "k", b"x", epoch=epoch, ttl_s=60),
            cache.apply("acme", {0: 1}, drop=True),
            cache.seed("acme", {0: 1}),
            anext(cache.invalidations()),
        ):
            with pytest.raises(CacheUnavailable):
                await call
    await client.aclose()


@pytest.mark.parametrize("fault", ["killed", "hangs", "connection dropped"])
async def test_a_broken_subscription_raises(own_server, fault):
    process, redis_settings = own_server
    client = connect_redis(redis_settings)
    cache = RedisAnswerCache(client, NAMES)
    subscribed = asyncio.Event()
    listening = asyncio.create_task(anext(cache.invalidations(on_subscribed=subscribed.set)))
    async with asyncio.timeout(WAIT_S):
        await subscribed.wait()
        if fault == "connection dropped":
            assert await client.execute_command("CLIENT", "KILL", "TYPE", "pubsub") == 1
        else:
            process.send_signal(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
        with pytest.raises(CacheUnavailable):
            await listening
    await client.aclose()


@pytest.mark.parametrize(("policy", "proves"), [("noeviction", True), ("volatile-lru", False)])
async def test_only_a_server_without_eviction_sends_heartbeats(own_server, policy, proves):
    client = connect_redis(own_server[1])
    await client.config_set("maxmemory", 100_000_000)
    await client.config_set("maxmemory-policy", policy)
    cache = RedisAnswerCache(client, NAMES)
    began_s, heartbeats = time.monotonic(), []
    listening = asyncio.create_task(anext(cache.invalidations(on_heartbeat=heartbeats.append)))
    async with asyncio.timeout(WAIT_S):
        if proves:
            while not heartbeats:  # noqa: ASYNC110 - called from within
                await asyncio.sleep(0.01)
            assert began_s < heartbeats[0] < time.monotonic()
        pings = 0
        while pings < 3:
            pings = (await client.info("commandstats")).get("cmdstat_ping", {}).get("calls", 0)
            await asyncio.sleep(0.01)
    assert bool(heartbeats) is proves
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await client.aclose()


async def test_a_server_that_evicts_keys_without_a_ttl_is_not_trusted(own_server):
    client = connect_redis(own_server[1])
    await client.config_set("maxmemory", 100_000_000)
    await client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(CacheUntrusted, match="noeviction"):
        await anext(RedisAnswerCache(client, NAMES).invalidations())
    await client.aclose()


STEPS = st.one_of(
    st.tuples(st.just("lookup"), st.sampled_from("ab")),
    st.tuples(st.just("store"), st.sampled_from("ab"), st.integers(0, 3)),
    st.tuples(st.just("apply"), st.dictionaries(st.integers(0, 2), st.integers(0, 20)), st.booleans()),
    st.tuples(st.just("seed"), st.dictionaries(st.integers(0, 2), st.integers(0, 20))),
    st.tuples(st.just("lose")),
)


async def outcomes(cache, lose, steps):
    """Result of each step. Epochs differ between caches, so they are numbered in order of appearance."""
    epochs: dict[int, int] = {}
    results = []
    for number, (kind, *values) in enumerate(steps):
        if kind == "lookup":
            lookup = await cache.lookup("acme", values[0])
            results.append(
                (epochs.setdefault(lookup.epoch, len(epochs)), lookup.positions, lookup.entry, lookup.seeded)
            )
        elif kind == "store" and epochs:
            epoch = list(epochs)[-1 - values[1] % len(epochs)]
            results.append(await cache.store("acme", values[0], b"%d" % number, epoch=epoch, ttl_s=60))
        elif kind == "apply":
            epoch = await cache.apply("acme", values[0], drop=values[1])
            results.append(epochs.setdefault(epoch, len(epochs)))
        elif kind == "seed":
            await cache.seed("acme", values[0])
        elif kind == "lose":
            await lose()
    return results


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=25))
def test_twin_and_server_agree(redis_port, steps):
    async def compare():
        client = connect_redis(RedisSettings(url=url(redis_port)))
        await client.flushall()
        twin = MemoryAnswerCache()

        async def lose_twin():
            twin.lose_everything()

        real = await outcomes(RedisAnswerCache(client, NAMES), client.flushall, steps)
        await client.aclose()
        assert await outcomes(twin, lose_twin, steps) == real

    asyncio.run(compare())
