"""What stands before the stores: nobody waits for one that is down, and nobody takes all of one."""

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry

from infra.generation.port import AnswerWithheld, GenerationError, GenerationThrottled, Written
from infra.opensearch.port import IndexUnavailable
from query.overload.bulkhead import Bulkhead, NotAdmitted
from query.overload.deadline import DeadlineExceeded, deadline_in, left_s
from query.overload.guarded_stores import GuardedGenerator, GuardedIndex
from query.overload.retry_budget import MOST, SHARE, RetryBudget
from query.telemetry.metrics import QueryMetrics
from schemas.queries import GeneratedAnswer

WAIT_S = 10
FOUND = {0: 7}


class Index:
    """Answers, fails or hangs as told, and counts who came."""

    def __init__(self):
        self.errors: list[Exception] = []
        self.down = False
        self.calls = self.inside = self.most_inside = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def positions(self, _tenant):
        self.calls += 1
        self.inside += 1
        self.most_inside = max(self.inside, self.most_inside)
        try:
            if self.down:
                raise IndexUnavailable("refused")
            if self.errors:
                raise self.errors.pop()
            await self.may_answer.wait()
            return FOUND
        finally:
            self.inside -= 1

    search = fetch = positions


class World:
    def __init__(self, *, places=4, limit_s=5.0):
        self.registry = CollectorRegistry()
        metrics = QueryMetrics(self.registry)
        self.index = Index()
        self.guard = Bulkhead("index", places=places, metrics=metrics)
        self.guarded = GuardedIndex(self.index, guard=self.guard, metrics=metrics, limit_s=limit_s)

    def count(self, name, **labels):
        return self.registry.get_sample_value(name, labels) or 0


@pytest.fixture
def world():
    return World()


async def refused(world):
    with pytest.raises(IndexUnavailable) as raised:
        await world.guarded.positions("acme")
    return raised.value


async def test_a_quick_failure_is_tried_once_more(world):
    world.index.errors = [IndexUnavailable("moved")]
    assert await world.guarded.positions("acme") == FOUND
    assert (world.index.calls, world.count("freshline_call_retries_total", store="index")) == (2, 1)


async def test_a_second_failure_is_told(world):
    world.index.errors = [IndexUnavailable("2"), IndexUnavailable("1")]
    await refused(world)
    assert world.index.calls == 2


async def test_other_errors_are_not_tried_again(world):
    world.index.errors = [ValueError("ours")]
    with pytest.raises(ValueError, match="ours"):
        await world.guarded.positions("acme")
    assert world.index.calls == 1


async def test_a_store_that_is_down_is_left_alone_and_found_again(world):
    world.index.down = True
    while world.index.calls < 10:
        await refused(world)
    called = world.index.calls
    for _ in range(50):
        error = await refused(world)
        assert 0 < error.retry_after_s <= 1
    assert world.index.calls == called
    assert world.count("freshline_breaker_open", store="index") == 1
    assert world.count("freshline_calls_not_admitted_total", store="index", reason="open") == 50
    world.index.down = False
    async with asyncio.timeout(WAIT_S):
        while world.count("freshline_breaker_open", store="index"):
            try:
                await world.guarded.positions("acme")
            except IndexUnavailable:
                await asyncio.sleep(0.02)
    assert await world.guarded.positions("acme") == FOUND


async def test_no_more_than_its_places_are_inside_and_the_others_wait():
    world = World(places=3)
    world.index.may_answer.clear()
    callers = [asyncio.create_task(world.guarded.positions("acme")) for _ in range(12)]
    async with asyncio.timeout(WAIT_S):
        while world.index.inside < 3:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0)
    world.index.may_answer.set()
    assert await asyncio.gather(*callers) == [FOUND] * 12
    assert world.index.most_inside == 3


async def test_a_call_ends_at_its_limit_and_is_not_tried_again():
    world = World(limit_s=0.6)
    world.index.may_answer.clear()
    assert "0.6 s" in str(await refused(world))
    assert (world.index.calls, world.index.inside) == (1, 0)


async def test_callers_that_go_away_say_nothing_against_the_store(world):
    world.index.may_answer.clear()
    for _ in range(30):
        caller = asyncio.create_task(world.guarded.positions("acme"))
        while not world.index.inside:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
    world.index.may_answer.set()
    assert await world.guarded.positions("acme") == FOUND


async def test_a_call_has_the_time_that_the_request_has_left(world):
    world.index.may_answer.clear()
    began_s = time.monotonic()
    with pytest.raises((DeadlineExceeded, IndexUnavailable)):
        async with deadline_in(0.1):
            await world.guarded.positions("acme")
    assert time.monotonic() - began_s < 2
    assert world.index.inside == 0


async def test_tasks_know_the_deadline_of_the_request_that_began_them():
    assert left_s() == float("inf")
    async with deadline_in(5):
        assert 4 < await asyncio.create_task(_left()) <= 5
        async with deadline_in(60):
            assert left_s() <= 5
    assert left_s() == float("inf")


async def _left():
    return left_s()


async def test_what_is_over_in_time_is_left_alone_and_its_own_timeouts_stay_its_own():
    async with deadline_in(5):
        pass
    with pytest.raises(TimeoutError):
        async with deadline_in(5):
            raise TimeoutError


def test_repetitions_are_a_share_of_all_calls():
    budget = RetryBudget()
    assert sum(budget.take() for _ in range(100)) == MOST
    taken = 0
    for _ in range(1_000):
        budget.note_call()
        taken += budget.take()
    assert taken == pytest.approx(1_000 * SHARE, abs=1)


class Generator:
    name = "writer"
    error: Exception | None = None
    may_answer: asyncio.Event | None = None
    calls = 0

    async def answer(self, *_):
        self.calls += 1
        if self.may_answer:
            await self.may_answer.wait()
        if self.error:
            raise self.error
        return GeneratedAnswer("yes")

    async def stream(self, *_):
        yield Written(await self.answer())

    async def close(self):
        pass


def generator_of(inner, *, places=2, limit_s=5.0):
    guard = Bulkhead("generator", places=places, metrics=QueryMetrics(CollectorRegistry()), harmless=(AnswerWithheld,))
    return GuardedGenerator(inner, guard=guard, limit_s=limit_s)


async def drained(stream):
    return [item async for item in stream]


@pytest.mark.parametrize("how", ["answer", "stream"])
async def test_a_generator_that_is_down_is_said_to_be_busy_at_once(how):
    inner = Generator()
    inner.error = GenerationError("down")
    guarded = generator_of(inner)

    async def ask():
        return await guarded.answer("q", ()) if how == "answer" else await drained(guarded.stream("q", ()))

    for _ in range(10):
        with pytest.raises(GenerationError):
            await ask()
    with pytest.raises(GenerationThrottled) as raised:
        await ask()
    assert raised.value.retry_after_s > 0
    assert inner.calls == 10


async def test_withheld_answers_say_nothing_against_the_generator():
    inner = Generator()
    inner.error = AnswerWithheld("no")
    guarded = generator_of(inner)
    for _ in range(30):
        with pytest.raises(AnswerWithheld):
            await guarded.answer("q", ())
    inner.error = None
    assert await guarded.answer("q", ()) == GeneratedAnswer("yes")


async def test_a_full_generator_is_busy_and_a_slow_one_fails():
    inner = Generator()
    inner.may_answer = asyncio.Event()
    guarded = generator_of(inner, places=1, limit_s=1.5)
    slow = asyncio.create_task(guarded.answer("q", ()))
    while not inner.calls:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0)
    with pytest.raises(GenerationThrottled):
        await guarded.answer("q", ())
    with pytest.raises(GenerationError, match=r"1\.5 s"):
        await slow


async def test_an_answer_is_given_up_before_the_request_is():
    inner = Generator()
    inner.may_answer = asyncio.Event()
    async with deadline_in(0.5):
        with pytest.raises(GenerationError):
            await generator_of(inner).answer("q", ())


async def test_a_stream_that_is_closed_frees_its_place():
    inner = Generator()
    guarded = generator_of(inner, places=1)
    stream = guarded.stream("q", ())
    await anext(stream)
    await stream.aclose()
    assert await guarded.answer("q", ()) == GeneratedAnswer("yes")


async def test_not_admitted_tells_when_to_come_back(world):
    world.index.down = True
    while world.index.calls < 10:
        await refused(world)
    with pytest.raises(NotAdmitted) as raised:
        async with world.guard.admitted(queue_s=1, limit_s=1):
            pass
    assert raised.value.retry_after_s > 0
