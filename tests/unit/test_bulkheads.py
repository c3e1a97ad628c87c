"""Bulkheads, circuit breakers, timeouts, deadlines and retries in front of the stores."""

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry

from infra.generation.port import AnswerWithheld, GenerationError, GenerationThrottled, Written
from infra.opensearch.port import IndexUnavailable
from query.overload.bulkhead import Bulkhead, CallRejected
from query.overload.deadline import DeadlineExceeded, deadline_in, remaining_s
from query.overload.guarded_stores import GuardedGenerator, GuardedIndex
from query.overload.retry_budget import MAX_BALANCE, RETRY_RATIO, RetryBudget
from query.telemetry.metrics import QueryMetrics
from schemas.queries import GeneratedAnswer

WAIT_S = 10
POSITIONS = {0: 7}


class Index:
    """Responds, fails or hangs as configured, and counts calls."""

    def __init__(self):
        self.errors: list[Exception] = []
        self.down = False
        self.calls = self.inside = self.max_inside = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def positions(self, _tenant):
        self.calls += 1
        self.inside += 1
        self.max_inside = max(self.inside, self.max_inside)
        try:
            if self.down:
                raise IndexUnavailable("refused")
            if self.errors:
                raise self.errors.pop()
            await self.may_answer.wait()
            return POSITIONS
        finally:
            self.inside -= 1

    search = fetch = positions


class World:
    def __init__(self, *, slots=4, timeout_s=5.0):
        self.registry = CollectorRegistry()
        metrics = QueryMetrics(self.registry)
        self.index = Index()
        self.bulkhead = Bulkhead("index", slots=slots, metrics=metrics)
        self.guarded = GuardedIndex(self.index, bulkhead=self.bulkhead, metrics=metrics, timeout_s=timeout_s)

    def count(self, name, **labels):
        return self.registry.get_sample_value(name, labels) or 0


@pytest.fixture
def world():
    return World()


async def rejected(world):
    with pytest.raises(IndexUnavailable) as raised:
        await world.guarded.positions("acme")
    return raised.value


async def test_a_fast_failure_is_retried_once(world):
    world.index.errors = [IndexUnavailable("moved")]
    assert await world.guarded.positions("acme") == POSITIONS
    assert (world.index.calls, world.count("freshline_call_retries_total", store="index")) == (2, 1)


async def test_a_second_failure_is_raised(world):
    world.index.errors = [IndexUnavailable("2"), IndexUnavailable("1")]
    await rejected(world)
    assert world.index.calls == 2


async def test_other_errors_are_not_retried(world):
    world.index.errors = [ValueError("bug")]
    with pytest.raises(ValueError, match="bug"):
        await world.guarded.positions("acme")
    assert world.index.calls == 1


async def test_the_circuit_breaker_opens_and_recovers(world):
    world.index.down = True
    while world.index.calls < 10:
        await rejected(world)
    calls = world.index.calls
    for _ in range(50):
        error = await rejected(world)
        assert 0 < error.retry_after_s <= 1
    assert world.index.calls == calls
    assert world.count("freshline_circuit_breaker_open", store="index") == 1
    assert world.count("freshline_calls_rejected_total", store="index", reason="circuit_open") == 50
    world.index.down = False
    async with asyncio.timeout(WAIT_S):
        while world.count("freshline_circuit_breaker_open", store="index"):
            try:
                await world.guarded.positions("acme")
            except IndexUnavailable:
                await asyncio.sleep(0.02)
    assert await world.guarded.positions("acme") == POSITIONS


async def test_calls_above_the_slots_wait():
    world = World(slots=3)
    world.index.may_answer.clear()
    callers = [asyncio.create_task(world.guarded.positions("acme")) for _ in range(12)]
    async with asyncio.timeout(WAIT_S):
        while world.index.inside < 3:  # noqa: ASYNC110 - no event to await
            await asyncio.sleep(0)
    world.index.may_answer.set()
    assert await asyncio.gather(*callers) == [POSITIONS] * 12
    assert world.index.max_inside == 3


async def test_a_call_times_out_and_is_not_retried():
    world = World(timeout_s=0.6)
    world.index.may_answer.clear()
    assert "0.6 s" in str(await rejected(world))
    assert (world.index.calls, world.index.inside) == (1, 0)


async def test_cancelled_calls_do_not_count_as_failures(world):
    world.index.may_answer.clear()
    for _ in range(30):
        caller = asyncio.create_task(world.guarded.positions("acme"))
        while not world.index.inside:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
    world.index.may_answer.set()
    assert await world.guarded.positions("acme") == POSITIONS


async def test_a_call_is_bounded_by_the_deadline_of_its_request(world):
    world.index.may_answer.clear()
    began_s = time.monotonic()
    with pytest.raises((DeadlineExceeded, IndexUnavailable)):
        async with deadline_in(0.1):
            await world.guarded.positions("acme")
    assert time.monotonic() - began_s < 2
    assert world.index.inside == 0


async def test_tasks_inherit_the_deadline():
    assert remaining_s() == float("inf")
    async with deadline_in(5):
        assert 4 < await asyncio.create_task(_remaining()) <= 5
        async with deadline_in(60):
            assert remaining_s() <= 5
    assert remaining_s() == float("inf")


async def _remaining():
    return remaining_s()


async def test_timeouts_within_the_deadline_are_not_converted():
    async with deadline_in(5):
        pass
    with pytest.raises(TimeoutError):
        async with deadline_in(5):
            raise TimeoutError


def test_retries_are_a_fraction_of_all_calls():
    budget = RetryBudget()
    assert sum(budget.withdraw() for _ in range(100)) == MAX_BALANCE
    withdrawn = 0
    for _ in range(1_000):
        budget.deposit()
        withdrawn += budget.withdraw()
    assert withdrawn == pytest.approx(1_000 * RETRY_RATIO, abs=1)


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


def generator_of(inner, *, slots=2, timeout_s=5.0):
    bulkhead = Bulkhead("generator", slots=slots, metrics=QueryMetrics(CollectorRegistry()), ignored=(AnswerWithheld,))
    return GuardedGenerator(inner, bulkhead=bulkhead, timeout_s=timeout_s)


async def drained(stream):
    return [item async for item in stream]


@pytest.mark.parametrize("method", ["answer", "stream"])
async def test_an_open_circuit_breaker_throttles_generation(method):
    inner = Generator()
    inner.error = GenerationError("down")
    guarded = generator_of(inner)

    async def ask():
        return await guarded.answer("q", ()) if method == "answer" else await drained(guarded.stream("q", ()))

    for _ in range(10):
        with pytest.raises(GenerationError):
            await ask()
    with pytest.raises(GenerationThrottled) as raised:
        await ask()
    assert raised.value.retry_after_s > 0
    assert inner.calls == 10


async def test_withheld_answers_do_not_count_as_failures():
    inner = Generator()
    inner.error = AnswerWithheld("no")
    guarded = generator_of(inner)
    for _ in range(30):
        with pytest.raises(AnswerWithheld):
            await guarded.answer("q", ())
    inner.error = None
    assert await guarded.answer("q", ()) == GeneratedAnswer("yes")


async def test_generation_is_throttled_at_capacity_and_times_out():
    inner = Generator()
    inner.may_answer = asyncio.Event()
    guarded = generator_of(inner, slots=1, timeout_s=1.5)
    slow = asyncio.create_task(guarded.answer("q", ()))
    while not inner.calls:  # noqa: ASYNC110 - no event to await
        await asyncio.sleep(0)
    with pytest.raises(GenerationThrottled):
        await guarded.answer("q", ())
    with pytest.raises(GenerationError, match=r"1\.5 s"):
        await slow


async def test_generation_ends_before_the_deadline_of_the_request():
    inner = Generator()
    inner.may_answer = asyncio.Event()
    async with deadline_in(0.5):
        with pytest.raises(GenerationError):
            await generator_of(inner).answer("q", ())


async def test_a_closed_stream_releases_its_slot():
    inner = Generator()
    guarded = generator_of(inner, slots=1)
    stream = guarded.stream("q", ())
    await anext(stream)
    await stream.aclose()
    assert await guarded.answer("q", ()) == GeneratedAnswer("yes")


async def test_a_rejected_call_has_a_retry_delay(world):
    world.index.down = True
    while world.index.calls < 10:
        await rejected(world)
    with pytest.raises(CallRejected) as raised:
        async with world.bulkhead.admitted(queue_s=1, timeout_s=1):
            pass
    assert raised.value.retry_after_s > 0
