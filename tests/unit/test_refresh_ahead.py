"""Answers that are retrieved again before anybody asks: which, how many, and never under load."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from infra.opensearch.port import IndexUnavailable
from query.answers.refresh_ahead import WAITING, RefreshAhead, RefreshOutcome
from query.telemetry.metrics import QueryMetrics
from schemas.queries import QueryRequest
from schemas.search import Access

HR = Access("acme", ("hr",))


class Answers:
    def __init__(self):
        self.filled = []
        self.fails = None
        self.there = False

    async def refill(self, request, access):
        if self.fails is not None:
            raise self.fails
        self.filled.append((request, access))
        return RefreshOutcome.THERE if self.there else RefreshOutcome.FILLED


class World:
    def __init__(self, **told):
        self.metrics = QueryMetrics(CollectorRegistry())
        settings = {"per_s": 1_000.0, "hits": 3, "written": True, "deadline_s": 5.0} | told
        self.refills = RefreshAhead(metrics=self.metrics, **settings)
        self.answers, self.room = Answers(), True

    def counted(self, result):
        return self.metrics.refills.labels(result)._value.get()

    @asynccontextmanager
    async def running(self):
        task = asyncio.create_task(self.refills.run(self.answers, lambda: self.room))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until(self, check):
        async with asyncio.timeout(5):
            while not check():  # noqa: ASYNC110 - metrics tell nobody
                await asyncio.sleep(0.001)


def question(text="days off", **told):
    return QueryRequest(query=text, **told)


async def test_what_was_asked_for_often_is_asked_again_as_it_was():
    world = World()
    world.refills.asked("a", question(min_position="documents.v1-0:3"), HR)
    world.refills.asked("b", question("seldom"), HR)
    async with world.running():
        world.refills.dropped("b", 2)
        world.refills.dropped("nobody knows", 9)
        world.refills.dropped("a", 3)
        await world.until(lambda: world.counted("filled") == 1)
    assert world.answers.filled == [(question(), HR)]


async def test_under_load_it_is_let_go():
    world = World()
    world.room = False
    world.refills.asked("a", question(), HR)
    async with world.running():
        world.refills.dropped("a", 3)
        await world.until(lambda: world.counted("busy") == 1)
    assert world.answers.filled == []


async def test_what_waits_is_bounded_and_waits_once():
    world = World()
    for number in range(WAITING + 5):
        world.refills.asked(str(number), question(f"q {number}"), HR)
        world.refills.dropped(str(number), 9)
        world.refills.dropped(str(number), 9)
    assert world.counted("full") == 10
    async with world.running():
        await world.until(lambda: world.counted("filled") == WAITING)
    assert len({request.query for request, _ in world.answers.filled}) == WAITING


async def test_so_many_in_a_second():
    world = World(per_s=20.0)
    for number in range(5):
        world.refills.asked(str(number), question(f"q {number}"), HR)
        world.refills.dropped(str(number), 9)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    async with world.running():
        await world.until(lambda: world.counted("filled") == 5)
    assert loop.time() - began_s >= 4 / 20


@pytest.mark.parametrize("told", [{"per_s": 0.0}, {"written": False}])
async def test_what_is_switched_off_or_costs_is_not_remembered(told):
    world = World(**told)
    world.refills.asked("a", question(generate=True), HR)
    world.refills.dropped("a", 9)
    assert not world.refills._waiting


async def test_a_failure_is_counted_and_the_next_is_filled():
    world = World()
    for name in "abc":
        world.refills.asked(name, question(name), HR)
    async with world.running():
        for fails in (IndexUnavailable("down"), ValueError("a mistake")):
            world.answers.fails = fails
            failed = world.counted("failed")
            world.refills.dropped("a", 3)
            await world.until(lambda before=failed: world.counted("failed") == before + 1)
        world.answers.fails, world.answers.there = None, True
        world.refills.dropped("c", 3)
        await world.until(lambda: world.counted("there") == 1)
