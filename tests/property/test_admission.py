"""Admission: the limit follows the store, turns are fair, and places are neither lost nor given twice."""

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from infra.opensearch.port import IndexUnavailable
from query.overload.adaptive_limit import AdaptiveLimit, FairQueue, places_in_line
from query.overload.admission import Admission, Overloaded
from query.telemetry.metrics import QueryMetrics


def settle(limit, *, capacity_per_s, rounds=400):
    """A store that works on all at a time and gets through ``capacity_per_s``: times grow with what is under way."""
    for _ in range(rounds):
        at_a_time = limit.now
        for _ in range(at_a_time):
            limit.note(max(5.0, at_a_time / capacity_per_s * 1_000), at_a_time=at_a_time)
    return limit.now


@given(capacity_per_s=st.floats(20, 220))
def test_the_limit_settles_where_the_target_is_met(capacity_per_s):
    limit = AdaptiveLimit(target_ms=250, least=4, most=64, first=16)
    found = settle(limit, capacity_per_s=capacity_per_s)
    fitting = min(64, max(4, capacity_per_s * 0.25))
    assert 0.75 * fitting - 1 <= found <= fitting + 2


def test_the_limit_follows_a_store_that_becomes_slower_and_recovers():
    limit = AdaptiveLimit(target_ms=250, least=4, most=64, first=16)
    quick = settle(limit, capacity_per_s=200)
    slow = settle(limit, capacity_per_s=40)
    assert slow <= 12 < quick
    assert settle(limit, capacity_per_s=200) >= 0.75 * quick


def test_without_demand_the_limit_does_not_grow():
    limit = AdaptiveLimit(target_ms=250, least=4, most=64, first=16)
    for _ in range(10_000):
        limit.note(5.0, at_a_time=2)
    assert limit.now == 16


def test_failures_shrink_it_at_once_and_not_below_the_least():
    limit = AdaptiveLimit(target_ms=250, least=4, most=64, first=16)
    limit.note(1.0, at_a_time=1, failed=True)
    assert limit.now == 14
    for _ in range(100):
        limit.note(1.0, at_a_time=1, failed=True)
    assert limit.now == 4


@given(st.lists(st.sampled_from("abc"), max_size=60))
def test_turns_go_round_the_tenants_and_each_line_keeps_its_order(tenants):
    queue = FairQueue()
    for number, tenant in enumerate(tenants):
        queue.add(tenant, (tenant, number))
    taken = [queue.take() for _ in tenants]
    assert queue.take() is None
    assert len(queue) == 0
    for tenant in set(tenants):
        mine = [number for one, number in taken if one == tenant]
        assert mine == sorted(mine)
        # While others wait, nobody is served twice before each of them was.
        places = [place for place, (one, _) in enumerate(taken) if one == tenant]
        for first, second in itertools.pairwise(places):
            between = {one for one, _ in taken[first + 1 : second]}
            assert between >= {one for one, _ in taken[second + 1 :]} - {tenant}


@given(st.integers(1, 64), st.integers(0, 10), st.floats(0, 2_000), st.floats(0, 2_000))
def test_everybody_may_have_one_in_line_and_all_as_many_as_are_answered_in_time(limit, tenants, wait_ms, mean_ms):
    places = places_in_line(limit, tenants, wait_ms=wait_ms, mean_ms=mean_ms)
    assert places >= 1
    if tenants and mean_ms >= 1:
        answered = limit * wait_ms / mean_ms
        assert (places - 1) * tenants <= answered * (1 + 1e-9)
        assert answered <= places * tenants * (1 + 1e-9)


def admission(**options):
    given_options = {"target_ms": 100.0, "queue_ms": 100.0, "most": 4, "metrics": QueryMetrics(CollectorRegistry())}
    return Admission(**(given_options | options))


@examples(max_examples=40, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(("done", "fails", "cancelled")), st.integers(0, 3)),
        min_size=1,
        max_size=40,
    )
)
def test_places_are_neither_lost_nor_given_twice(calls):
    async def run():
        gate = admission(queue_ms=5.0)
        under_way = most = 0

        async def call(tenant, end, turns):
            nonlocal under_way, most
            try:
                async with gate.admitted(tenant):
                    under_way += 1
                    most = max(most, under_way)
                    try:
                        for _ in range(turns):
                            await asyncio.sleep(0.002)
                        if end == "fails":
                            raise IndexUnavailable("down")
                    finally:
                        under_way -= 1
            except IndexUnavailable:
                pass

        tasks = []
        for tenant, end, turns in calls:
            task = asyncio.create_task(call(tenant, end, turns))
            tasks.append(task)
            if end == "cancelled":
                asyncio.get_running_loop().call_later(0.001 * turns, task.cancel)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most <= 4
        assert (gate._under_way, len(gate._waiting)) == (0, 0)

    asyncio.run(run())


async def test_a_tenant_that_asks_much_leaves_room_for_others():
    gate = admission(queue_ms=200.0)
    release = asyncio.Event()

    async def call(tenant):
        async with gate.admitted(tenant):
            await release.wait()
            return tenant

    crowd = [asyncio.create_task(call("much")) for _ in range(40)]
    await asyncio.sleep(0)
    assert gate._waiting.waiting("much") == 8  # two rounds of four
    one = asyncio.create_task(call("little"))
    await asyncio.sleep(0)
    release.set()
    assert await one == "little"
    ended = await asyncio.gather(*crowd, return_exceptions=True)
    assert sum(isinstance(end, Overloaded) for end in ended) == 40 - 4 - 8


async def test_while_changes_come_late_few_are_admitted_at_a_time():
    late = True
    gate = admission(most=8, queue_ms=5_000.0, late=lambda: late)
    release, under_way = asyncio.Event(), 0

    async def call():
        nonlocal under_way
        async with gate.admitted("a"):
            under_way += 1
            await release.wait()

    async def settled(count):
        async with asyncio.timeout(5):
            while under_way != count:  # noqa: ASYNC110 - a place has no event
                await asyncio.sleep(0.001)

    calls = [asyncio.create_task(call()) for _ in range(6)]
    await settled(2)
    for _ in range(100):  # turns of the loop, in any of which another could be let in
        await asyncio.sleep(0)
    assert under_way == gate.limit == 2
    late = False
    last = asyncio.create_task(call())  # whoever comes next, or ends, lets the others in
    await settled(7)
    release.set()
    await asyncio.gather(*calls, last)


async def test_when_changes_come_late_those_that_wait_are_not_too_many_for_what_was_answered_until_then():
    late, clock = False, [0.0]
    gate = admission(most=8, target_ms=100.0, queue_ms=200.0, late=lambda: late, monotonic_s=lambda: clock[0])
    release = asyncio.Event()

    async def call():
        async with gate.admitted("a"):
            await release.wait()

    for took_s in (0.1, 0.2):  # a round of eight, twice; of the second, one takes 0.2 s
        release.clear()
        calls = [asyncio.create_task(call()) for _ in range(8)]
        await asyncio.sleep(0)
        clock[0] += took_s
        release.set()
        await asyncio.gather(*calls)
    late = True
    release.clear()
    calls = [asyncio.create_task(call()) for _ in range(40)]
    await asyncio.sleep(0)
    # Forty in a second until now: in the 0.2 s of the line they are eight, though only two are under way.
    assert (gate.limit, gate._under_way, len(gate._waiting)) == (2, 2, 8)
    assert gate.is_full("a")
    for one in calls:
        one.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_who_waits_too_long_is_refused():
    gate = admission(queue_ms=20.0)
    release = asyncio.Event()

    async def hold():
        async with gate.admitted("a"):
            await release.wait()

    held = [asyncio.create_task(hold()) for _ in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        await asyncio.wait_for(hold(), 5)
    assert refused.value.retry_after_s >= 1
    release.set()
    await asyncio.gather(*held)
    async with gate.admitted("a"):
        pass
