"""Admission: the limit follows the store, tenants alternate, and slots are neither lost nor granted twice."""

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from infra.opensearch.port import IndexUnavailable
from query.overload.adaptive_limit import AdaptiveLimit, FairQueue, max_queued_per_tenant
from query.overload.admission import Admission, Overloaded
from query.telemetry.metrics import QueryMetrics


def converge(limit, *, capacity_per_s, rounds=400):
    """The limit for a store with constant throughput, whose latency grows with the calls in flight."""
    for _ in range(rounds):
        in_flight = limit.current
        for _ in range(in_flight):
            limit.record(max(5.0, in_flight / capacity_per_s * 1_000), in_flight=in_flight)
    return limit.current


@given(capacity_per_s=st.floats(20, 220))
def test_the_limit_converges_to_the_target_latency(capacity_per_s):
    limit = AdaptiveLimit(target_ms=250, min_limit=4, max_limit=64, initial_limit=16)
    limit_reached = converge(limit, capacity_per_s=capacity_per_s)
    ideal = min(64, max(4, capacity_per_s * 0.25))
    assert 0.75 * ideal - 1 <= limit_reached <= ideal + 2


def test_the_limit_follows_a_store_that_becomes_slower_and_recovers():
    limit = AdaptiveLimit(target_ms=250, min_limit=4, max_limit=64, initial_limit=16)
    fast = converge(limit, capacity_per_s=200)
    slow = converge(limit, capacity_per_s=40)
    assert slow <= 12 < fast
    assert converge(limit, capacity_per_s=200) >= 0.75 * fast


def test_without_demand_the_limit_does_not_grow():
    limit = AdaptiveLimit(target_ms=250, min_limit=4, max_limit=64, initial_limit=16)
    for _ in range(10_000):
        limit.record(5.0, in_flight=2)
    assert limit.current == 16


def test_each_failure_decreases_the_limit_down_to_the_minimum():
    limit = AdaptiveLimit(target_ms=250, min_limit=4, max_limit=64, initial_limit=16)
    limit.record(1.0, in_flight=1, failed=True)
    assert limit.current == 14
    for _ in range(100):
        limit.record(1.0, in_flight=1, failed=True)
    assert limit.current == 4


@given(st.lists(st.sampled_from("abc"), max_size=60))
def test_the_queue_is_round_robin_over_tenants_and_fifo_within_each(tenants):
    queue = FairQueue()
    for number, tenant in enumerate(tenants):
        queue.push(tenant, (tenant, number))
    popped = [queue.pop() for _ in tenants]
    assert queue.pop() is None
    assert len(queue) == 0
    for tenant in set(tenants):
        numbers = [number for owner, number in popped if owner == tenant]
        assert numbers == sorted(numbers)
        # Between two items of a tenant, every other queued tenant has one.
        turns = [turn for turn, (owner, _) in enumerate(popped) if owner == tenant]
        for first, second in itertools.pairwise(turns):
            between = {owner for owner, _ in popped[first + 1 : second]}
            assert between >= {owner for owner, _ in popped[second + 1 :]} - {tenant}


@given(st.integers(1, 64), st.integers(0, 10), st.floats(0, 2_000), st.floats(0, 2_000))
def test_tenants_share_the_queue_that_completes_in_time_with_at_least_one_slot_each(
    limit, tenants, max_wait_ms, mean_ms
):
    per_tenant = max_queued_per_tenant(limit, tenants, max_wait_ms=max_wait_ms, mean_ms=mean_ms)
    assert per_tenant >= 1
    if tenants and mean_ms >= 1:
        completed = limit * max_wait_ms / mean_ms
        assert (per_tenant - 1) * tenants <= completed * (1 + 1e-9)
        assert completed <= per_tenant * tenants * (1 + 1e-9)


def admission(**options):
    defaults = {
        "target_ms": 100.0,
        "queue_ms": 100.0,
        "max_concurrent": 4,
        "metrics": QueryMetrics(CollectorRegistry()),
    }
    return Admission(**(defaults | options))


@examples(max_examples=40, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(("done", "fails", "cancelled")), st.integers(0, 3)),
        min_size=1,
        max_size=40,
    )
)
def test_slots_are_neither_lost_nor_granted_twice(calls):
    async def run():
        gate = admission(queue_ms=5.0)
        in_flight = peak = 0

        async def call(tenant, end, turns):
            nonlocal in_flight, peak
            try:
                async with gate.admitted(tenant):
                    in_flight += 1
                    peak = max(peak, in_flight)
                    try:
                        for _ in range(turns):
                            await asyncio.sleep(0.002)
                        if end == "fails":
                            raise IndexUnavailable("down")
                    finally:
                        in_flight -= 1
            except IndexUnavailable:
                pass

        tasks = []
        for tenant, end, turns in calls:
            task = asyncio.create_task(call(tenant, end, turns))
            tasks.append(task)
            if end == "cancelled":
                asyncio.get_running_loop().call_later(0.001 * turns, task.cancel)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert peak <= 4
        assert (gate._in_flight, len(gate._queue)) == (0, 0)

    asyncio.run(run())


async def test_a_busy_tenant_leaves_capacity_for_others():
    gate = admission(queue_ms=200.0)
    release = asyncio.Event()

    async def call(tenant):
        async with gate.admitted(tenant):
            await release.wait()
            return tenant

    crowd = [asyncio.create_task(call("busy")) for _ in range(40)]
    await asyncio.sleep(0)
    assert gate._queue.queued("busy") == 8  # two rounds of four
    quiet = asyncio.create_task(call("quiet"))
    await asyncio.sleep(0)
    release.set()
    assert await quiet == "quiet"
    ended = await asyncio.gather(*crowd, return_exceptions=True)
    assert sum(isinstance(end, Overloaded) for end in ended) == 40 - 4 - 8


async def test_admission_is_throttled_while_invalidation_lags():
    is_lagging = True
    gate = admission(max_concurrent=8, queue_ms=5_000.0, is_lagging=lambda: is_lagging)
    release, in_flight = asyncio.Event(), 0

    async def call():
        nonlocal in_flight
        async with gate.admitted("a"):
            in_flight += 1
            await release.wait()

    async def reaches(count):
        async with asyncio.timeout(5):
            while in_flight != count:  # noqa: ASYNC110 - no event to await
                await asyncio.sleep(0.001)

    calls = [asyncio.create_task(call()) for _ in range(6)]
    await reaches(2)
    for _ in range(100):  # iterations of the event loop, any of which could admit another
        await asyncio.sleep(0)
    assert in_flight == gate.limit == 2
    is_lagging = False
    last = asyncio.create_task(call())  # the next arrival or completion dispatches the queue
    await reaches(7)
    release.set()
    await asyncio.gather(*calls, last)


async def test_the_queue_bound_does_not_drop_with_the_limit_when_invalidation_begins_to_lag():
    is_lagging, clock = False, [0.0]
    gate = admission(
        max_concurrent=8, target_ms=100.0, queue_ms=200.0, is_lagging=lambda: is_lagging, monotonic_s=lambda: clock[0]
    )
    release = asyncio.Event()

    async def call():
        async with gate.admitted("a"):
            await release.wait()

    for took_s in (0.1, 0.2):  # two rounds of eight, the second with a latency of 0.2 s
        release.clear()
        calls = [asyncio.create_task(call()) for _ in range(8)]
        await asyncio.sleep(0)
        clock[0] += took_s
        release.set()
        await asyncio.gather(*calls)
    is_lagging = True
    release.clear()
    calls = [asyncio.create_task(call()) for _ in range(40)]
    await asyncio.sleep(0)
    # Throughput was forty per second: eight in the 0.2 s of the queue, though only two are in flight now.
    assert (gate.limit, gate._in_flight, len(gate._queue)) == (2, 2, 8)
    assert gate.is_at_capacity("a")
    for task in calls:
        task.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_a_wait_longer_than_the_queue_time_is_rejected():
    gate = admission(queue_ms=20.0)
    release = asyncio.Event()

    async def hold():
        async with gate.admitted("a"):
            await release.wait()

    held = [asyncio.create_task(hold()) for _ in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as rejected:
        await asyncio.wait_for(hold(), 5)
    assert rejected.value.retry_after_s >= 1
    release.set()
    await asyncio.gather(*held)
    async with gate.admitted("a"):
        pass
