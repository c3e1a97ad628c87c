"""The contract of EventStates, run on the twin, on a Redis server and on a three-node cluster."""

import pytest

from infra.redis.connect import connect_redis
from infra.redis.event_states import EVENT_TTL_S, RedisEventStates, acceptance_fields, read_status
from infra.redis.memory_states import MemoryEventStates
from infra.redis.port import CacheUnavailable, EventStates, Progress
from infra.settings import RedisSettings
from schemas.documents import EventStatus, Outcome, Stage
from schemas.names import Names

EVENT = "0199-event"
BEGUN = EventStatus(
    event_id=EVENT,
    document_id="a/ä.md",
    version=2**53 - 1,
    position="documents.v1-3:42",
    stage=Stage.ACCEPTED,
    outcome=None,
    accepted_ms=1_700_000_000_000.25,
    stages_ms={Stage.ACCEPTED: 0.0},
)


def progress(stage: Stage, after_ms: float, outcome: Outcome | None = None, reason: str | None = None) -> Progress:
    return Progress("t1", EVENT, stage, BEGUN.accepted_ms + after_ms, outcome, reason)


@pytest.fixture
async def redis(settings):
    client = connect_redis(settings.redis)
    yield client
    await client.aclose()


@pytest.fixture(params=["memory", *(pytest.param(name, marks=pytest.mark.stack) for name in ("redis", "cluster"))])
def states(request) -> EventStates:
    if request.param == "memory":
        return MemoryEventStates()
    names = request.getfixturevalue("settings").names
    return RedisEventStates(request.getfixturevalue(request.param), names)


async def test_an_accepted_event_is_read_back_completely(states):
    await states.begin("t1", BEGUN)
    assert await states.get("t1", EVENT) == BEGUN


async def test_events_are_unknown_before_acceptance_and_to_other_tenants(states):
    await states.begin("t1", BEGUN)
    assert await states.get("t1", "other") is None
    assert await states.get("t2", EVENT) is None


STEPS = (
    progress(Stage.CHUNKED, 20),
    progress(Stage.SEARCHABLE, 60),
    progress(Stage.PURGED, 75, Outcome.DONE),
)


@pytest.mark.parametrize("recorded_before", range(4))
async def test_progress_before_acceptance_is_kept(states, recorded_before):
    for step in STEPS[:recorded_before]:
        await states.advance([step])
    if recorded_before:
        assert await states.get("t1", EVENT) is None
    await states.begin("t1", BEGUN)
    await states.advance(STEPS[recorded_before:])
    status = await states.get("t1", EVENT)
    assert status.stage is Stage.PURGED
    assert status.outcome is Outcome.DONE
    assert status.stages_ms == {Stage.ACCEPTED: 0, Stage.CHUNKED: 20, Stage.SEARCHABLE: 60, Stage.PURGED: 75}
    assert (status.document_id, status.version, status.position) == (BEGUN.document_id, BEGUN.version, BEGUN.position)


async def test_the_stage_is_the_last_in_order_not_the_last_recorded(states):
    await states.begin("t1", BEGUN)
    for step in reversed(STEPS[:2]):
        await states.advance([step])
    assert (await states.get("t1", EVENT)).stage is Stage.SEARCHABLE


async def test_repeated_progress_changes_nothing(states):
    await states.begin("t1", BEGUN)
    await states.advance(STEPS)
    before = await states.get("t1", EVENT)
    later = [progress(step.stage, 9_000, Outcome.SUPERSEDED, "again") for step in STEPS]
    await states.advance(later)
    await states.begin("t1", BEGUN)
    assert await states.get("t1", EVENT) == before


async def test_the_first_outcome_is_kept_with_its_reason(states):
    await states.begin("t1", BEGUN)
    await states.advance([progress(Stage.CHUNKED, 5, Outcome.DEAD_LETTER, "pas lisible: é")])
    await states.advance([progress(Stage.PURGED, 9, Outcome.DONE)])
    status = await states.get("t1", EVENT)
    assert (status.outcome, status.reason, status.stage) == (Outcome.DEAD_LETTER, "pas lisible: é", Stage.PURGED)


async def test_an_outcome_without_a_reason_takes_none_from_a_later_outcome(states):
    await states.begin("t1", BEGUN)
    await states.advance([progress(Stage.PURGED, 9, Outcome.DONE), progress(Stage.PURGED, 9, Outcome.DEAD_LETTER, "x")])
    status = await states.get("t1", EVENT)
    assert (status.outcome, status.reason) == (Outcome.DONE, None)


async def test_a_slow_clock_gives_no_negative_durations(states):
    await states.begin("t1", BEGUN)
    await states.advance([progress(Stage.CHUNKED, -3)])
    assert (await states.get("t1", EVENT)).stages_ms[Stage.CHUNKED] == 0


async def test_the_position_may_be_recorded_after_acceptance(states):
    await states.begin("t1", BEGUN.model_copy(update={"position": None}))
    assert (await states.get("t1", EVENT)).position is None
    await states.begin("t1", BEGUN)
    assert (await states.get("t1", EVENT)).position == BEGUN.position


async def test_many_events_in_one_call(states):
    events = [f"event-{number}" for number in range(100)]
    for event in events:
        await states.begin("t1", BEGUN.model_copy(update={"event_id": event}))
    await states.advance([Progress("t1", event, Stage.PURGED, BEGUN.accepted_ms, Outcome.DONE) for event in events])
    assert {(await states.get("t1", event)).outcome for event in events} == {Outcome.DONE}


async def test_many_statuses_in_one_call(states):
    for event in ("a", "b"):
        await states.begin("t1", BEGUN.model_copy(update={"event_id": event}))
    await states.advance(
        [Progress("t1", "c", Stage.CHUNKED, 1.0), Progress("t1", "b", Stage.PURGED, 2.0, Outcome.DONE)]
    )
    found = await states.get_many("t1", ["b", "other", "c", "a"])
    assert found == {event: await states.get("t1", event) for event in ("b", "a")}
    assert (found["b"].outcome, found["a"].outcome) == (Outcome.DONE, None)
    assert await states.get_many("t2", ["a"]) == await states.get_many("t1", []) == {}


async def test_passage_counts_are_those_of_the_outcome(states):
    await states.begin("t1", BEGUN)
    assert (await states.get("t1", EVENT)).passages is None
    await states.advance([Progress("t1", EVENT, Stage.PURGED, 9.0, Outcome.DONE, "no text", 0)])
    await states.advance([Progress("t1", EVENT, Stage.PURGED, 9.0, Outcome.DONE, None, 7)])
    status = await states.get("t1", EVENT)
    assert (status.reason, status.passages) == ("no text", 0)


def test_a_record_of_an_earlier_release_has_no_passage_counts():
    status = read_status(EVENT, acceptance_fields(BEGUN) | {"end": '["done",null]'})
    assert (status.outcome, status.reason, status.passages) == (Outcome.DONE, None, None)


async def test_advancing_without_progress_does_nothing(states):
    await states.advance([])
    assert await states.get("t1", EVENT) is None


@pytest.mark.stack
async def test_events_expire_after_a_week_whichever_write_is_first(redis, settings):
    states = RedisEventStates(redis, settings.names)
    await states.begin("t1", BEGUN)
    await states.advance([Progress("t1", "early", Stage.CHUNKED, 1.0)])
    keys = [key async for key in redis.scan_iter(match=f"{settings.namespace}:*", count=1_000)]
    assert len(keys) == 2
    for key in keys:
        assert EVENT_TTL_S - 60 < await redis.ttl(key) <= EVENT_TTL_S == 7 * 24 * 3_600


async def test_a_failing_server_is_unavailable():
    twin = MemoryEventStates()
    twin.available = False
    unreachable = connect_redis(RedisSettings(url="redis://127.0.0.1:1/0", timeout_s=0.2))
    try:
        for states in (twin, RedisEventStates(unreachable, Names("t"))):
            for call in (
                states.begin("t1", BEGUN),
                states.advance(STEPS),
                states.get("t1", EVENT),
                states.get_many("t1", [EVENT]),
            ):
                with pytest.raises(CacheUnavailable):
                    await call
    finally:
        await unreachable.aclose()
