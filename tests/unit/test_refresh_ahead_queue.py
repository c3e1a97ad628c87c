"""Refresh-ahead: which answers are refreshed, at which rate, and only with spare capacity."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from infra.opensearch.port import IndexUnavailable
from query.answers.refresh_ahead import MAX_QUEUED, RefreshAhead, RefreshOutcome, RefreshPolicy
from query.telemetry.metrics import QueryMetrics
from schemas.queries import QueryRequest
from schemas.search import Access

HR = Access("acme", ("hr",))


class Answers:
    def __init__(self):
        self.filled = []
        self.error = None
        self.is_cached = False

    async def refresh(self, request, access):
        if self.error is not None:
            raise self.error
        self.filled.append((request, access))
        return RefreshOutcome.CACHED if self.is_cached else RefreshOutcome.FILLED


class World:
    def __init__(self, **policy):
        self.metrics = QueryMetrics(CollectorRegistry())
        defaults = {"per_s": 1_000.0, "min_hits": 3, "generated": True, "deadline_s": 5.0}
        self.refresh = RefreshAhead(RefreshPolicy(**(defaults | policy)), self.metrics)
        self.answers, self.has_spare_capacity = Answers(), True

    def counted(self, result):
        return self.metrics.refreshes.labels(result)._value.get()

    @asynccontextmanager
    async def running(self):
        task = asyncio.create_task(self.refresh.run(self.answers, lambda: self.has_spare_capacity))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until(self, check):
        async with asyncio.timeout(5):
            while not check():  # noqa: ASYNC110 - no event to await
                await asyncio.sleep(0.001)


def question(text="days off", **fields):
    return QueryRequest(query=text, **fields)


async def test_a_popular_answer_is_refreshed_with_its_original_access():
    world = World()
    world.refresh.on_question("a", question(min_position="documents.v1-0:3"), HR)
    world.refresh.on_question("b", question("unpopular"), HR)
    async with world.running():
        world.refresh.on_invalidated("b", 2)
        world.refresh.on_invalidated("unknown key", 9)
        world.refresh.on_invalidated("a", 3)
        await world.until(lambda: world.counted("filled") == 1)
    assert world.answers.filled == [(question(), HR)]


async def test_refreshes_are_skipped_without_spare_capacity():
    world = World()
    world.has_spare_capacity = False
    world.refresh.on_question("a", question(), HR)
    async with world.running():
        world.refresh.on_invalidated("a", 3)
        await world.until(lambda: world.counted("busy") == 1)
    assert world.answers.filled == []


async def test_the_queue_is_bounded_and_holds_each_answer_once():
    world = World()
    for number in range(MAX_QUEUED + 5):
        world.refresh.on_question(str(number), question(f"q {number}"), HR)
        world.refresh.on_invalidated(str(number), 9)
        world.refresh.on_invalidated(str(number), 9)
    assert world.counted("queue_full") == 10
    async with world.running():
        await world.until(lambda: world.counted("filled") == MAX_QUEUED)
    assert len({request.query for request, _ in world.answers.filled}) == MAX_QUEUED


async def test_the_refresh_rate_is_bounded():
    world = World(per_s=20.0)
    for number in range(5):
        world.refresh.on_question(str(number), question(f"q {number}"), HR)
        world.refresh.on_invalidated(str(number), 9)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    async with world.running():
        await world.until(lambda: world.counted("filled") == 5)
    assert loop.time() - began_s >= 4 / 20


@pytest.mark.parametrize("policy", [{"per_s": 0.0}, {"generated": False}])
async def test_disabled_refreshes_are_not_queued(policy):
    world = World(**policy)
    world.refresh.on_question("a", question(generate=True), HR)
    world.refresh.on_invalidated("a", 9)
    assert not world.refresh._queue


async def test_a_failed_refresh_is_counted_and_the_next_one_runs():
    world = World()
    for name in "abc":
        world.refresh.on_question(name, question(name), HR)
    async with world.running():
        for error in (IndexUnavailable("down"), ValueError("bug")):
            world.answers.error = error
            failed = world.counted("failed")
            world.refresh.on_invalidated("a", 3)
            await world.until(lambda before=failed: world.counted("failed") == before + 1)
        world.answers.error, world.answers.is_cached = None, True
        world.refresh.on_invalidated("c", 3)
        await world.until(lambda: world.counted("cached") == 1)
