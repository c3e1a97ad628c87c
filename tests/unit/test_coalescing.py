"""Calls of one thing each that are made as fewer calls of many."""

import asyncio

import pytest

from infra.coalescing import Coalescer, gather_all


class Store:
    """Answers when it is let; notes what it was asked."""

    def __init__(self):
        self.asked = []
        self.let = asyncio.Event()
        self.let.set()

    async def __call__(self, things):
        self.asked.append(list(things))
        await self.let.wait()
        if "broken" in things:
            raise OSError("the store is down")
        return [ValueError(thing) if thing.startswith("bad") else thing.upper() for thing in things]


def coalescer(store, max_calls=1, max_items=3):
    return Coalescer(store, max_calls=max_calls, max_items=max_items)


async def test_alone_no_caller_waits_and_together_one_call_is_made():
    store = Store()
    asked = coalescer(store)
    assert await asked.submit("a") == "A"
    assert await gather_all([asked.submit(thing) for thing in "bc"]) == ["B", "C"]
    assert store.asked == [["a"], ["b", "c"]]


async def test_what_arrives_meanwhile_makes_the_next_calls_of_bounded_size():
    store = Store()
    store.let.clear()
    asked = coalescer(store)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(asked.submit("a"))
        await asyncio.sleep(0.01)
        rest = [group.create_task(asked.submit(thing)) for thing in "bcdef"]
        await asyncio.sleep(0.01)
        assert store.asked == [["a"]]
        store.let.set()
    assert first.result() == "A"
    assert [one.result() for one in rest] == list("BCDEF")
    assert store.asked == [["a"], ["b", "c", "d"], ["e", "f"]]


async def test_several_calls_are_in_progress_where_that_is_allowed():
    store = Store()
    store.let.clear()
    asked = coalescer(store, max_calls=2, max_items=1)
    async with asyncio.TaskGroup() as group:
        for thing in "abc":
            group.create_task(asked.submit(thing))
        await asyncio.sleep(0.01)
        assert store.asked == [["a"], ["b"]]
        store.let.set()


async def test_one_that_fails_does_not_fail_its_neighbours():
    asked = coalescer(Store())
    found = await asyncio.gather(*(asked.submit(thing) for thing in ("a", "bad", "c")), return_exceptions=True)
    assert found[0] == "A"
    assert isinstance(found[1], ValueError)
    assert found[2] == "C"


async def test_a_call_that_fails_is_reported_to_all_of_it_and_the_next_is_made_all_the_same():
    asked = coalescer(Store(), max_items=2)
    found = await asyncio.gather(*(asked.submit(thing) for thing in ("a", "broken", "c")), return_exceptions=True)
    assert [type(one) for one in found] == [OSError, OSError, str]
    with pytest.raises(OSError, match="down"):
        await gather_all([asked.submit("broken")])


async def test_who_has_gone_is_not_asked_for():
    store = Store()
    store.let.clear()
    asked = coalescer(store)
    first = asyncio.create_task(asked.submit("a"))
    await asyncio.sleep(0.01)
    gone, there = (asyncio.create_task(asked.submit(thing)) for thing in "bc")
    await asyncio.sleep(0.01)
    first.cancel()
    gone.cancel()
    store.let.set()
    assert await there == "C"
    assert store.asked == [["a"], ["c"]]
