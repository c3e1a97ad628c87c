"""The contract of Versions, run on the twin, on a Redis server and on a three-node cluster."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from infra.redis.connect import connect_redis
from infra.redis.memory_states import MemoryVersions
from infra.redis.port import CacheUnavailable, Versions
from infra.redis.versions import VERSION_TTL_S, RedisVersions
from infra.settings import RedisSettings
from schemas.documents import MAX_VERSION, DocumentKey
from schemas.names import Names

A, B = DocumentKey("t1", "a/b c.md"), DocumentKey("t1", "b")
OTHER = DocumentKey("t2", "a/b c.md")


@pytest.fixture
async def redis(settings):
    client = connect_redis(settings.redis)
    yield client
    await client.aclose()


@pytest.fixture(params=["memory", *(pytest.param(name, marks=pytest.mark.stack) for name in ("redis", "cluster"))])
def versions(request) -> Versions:
    if request.param == "memory":
        return MemoryVersions()
    names = request.getfixturevalue("settings").names
    return RedisVersions(request.getfixturevalue(request.param), names)


async def test_a_document_without_a_stored_version_requires_a_floor(versions):
    assert await versions.assign([A], now_us=100, floors={}) == [None]
    assert await versions.assign([A], now_us=100, floors={A: 0}) == [100]
    assert await versions.assign([A], now_us=101, floors={}) == [101]


async def test_a_slow_clock_does_not_decrease_versions(versions):
    await versions.assign([A], now_us=1_000, floors={A: 0})
    assert await versions.assign([A], now_us=7, floors={}) == [1_001]


async def test_a_floor_above_the_clock_is_used(versions):
    assert await versions.assign([A], now_us=1_000, floors={A: 5_000}) == [5_001]


async def test_floor_below_the_last_version_changes_nothing(versions):
    await versions.assign([A], now_us=9_000, floors={A: 0})
    assert await versions.assign([A], now_us=1, floors={A: 5}) == [9_001]


async def test_zero_is_a_valid_floor(versions):
    assert await versions.assign([A], now_us=0, floors={A: 0}) == [1]


async def test_many_keys_keep_their_order_and_tenants_apart(versions):
    floors = {A: 10, B: 20, OTHER: 30}
    assert await versions.assign([A, B, OTHER, A], now_us=0, floors=floors) == [11, 21, 31, 12]


async def test_known_and_unknown_in_one_call(versions):
    await versions.assign([B], now_us=50, floors={B: 0})
    assert await versions.assign([A, B], now_us=60, floors={}) == [None, 60]


async def test_no_keys(versions):
    assert await versions.assign([], now_us=1, floors={}) == []


async def test_largest_versions_are_exact(versions):
    assert await versions.assign([A], now_us=0, floors={A: MAX_VERSION - 2}) == [MAX_VERSION - 1]
    assert await versions.assign([A], now_us=0, floors={}) == [MAX_VERSION]
    assert await versions.assign([A], now_us=0, floors={}) == [MAX_VERSION + 1]


async def test_concurrent_callers_never_share_a_version(versions):
    await versions.assign([A], now_us=1, floors={A: 0})
    calls = (versions.assign([A, A], now_us=1, floors={}) for _ in range(25))
    assigned = [version for call in await asyncio.gather(*calls) for version in call]
    assert len(set(assigned)) == len(assigned) == 50


@examples(deadline=None)
@given(calls=st.lists(st.tuples(st.integers(0, 50), st.none() | st.integers(0, 50)), max_size=20))
async def test_versions_only_increase(calls):
    versions = MemoryVersions()
    seen = [-1]
    for now_us, floor in calls:
        (version,) = await versions.assign([A], now_us=now_us, floors={} if floor is None else {A: floor})
        if version is None:
            assert floor is None
            assert seen == [-1]
        else:
            assert version > max(seen[-1], -1 if floor is None else floor)
            assert version >= now_us
            seen.append(version)


@pytest.mark.stack
async def test_the_last_version_expires_after_two_days(redis, settings):
    await RedisVersions(redis, settings.names).assign([A], now_us=1, floors={A: 0})
    (key,) = [key async for key in redis.scan_iter(match=f"{settings.namespace}:*", count=1_000)]
    assert VERSION_TTL_S - 60 < await redis.ttl(key) <= VERSION_TTL_S == 2 * 24 * 3_600


@pytest.mark.stack
async def test_scripts_are_loaded_again_after_a_flush(redis, settings):
    versions = RedisVersions(redis, settings.names)
    await versions.assign([A], now_us=1, floors={A: 0})
    await redis.script_flush()
    assert await versions.assign([A], now_us=2, floors={}) == [2]


async def test_a_failing_server_is_unavailable():
    twin = MemoryVersions()
    twin.available = False
    unreachable = connect_redis(RedisSettings(url="redis://127.0.0.1:1/0", timeout_s=0.2))
    try:
        for versions in (twin, RedisVersions(unreachable, Names("t"))):
            with pytest.raises(CacheUnavailable):
                await versions.assign([A], now_us=1, floors={})
    finally:
        await unreachable.aclose()
