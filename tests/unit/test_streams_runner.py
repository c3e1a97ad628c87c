"""The runner: every record ends exactly once, in order, whatever the step and the stores do."""

import asyncio

import pytest
import structlog

from infra.kafka.codec import encode_event
from infra.kafka.memory import MemoryStreams
from infra.kafka.port import StreamUnavailable
from infra.opensearch.port import IndexUnavailable
from infra.settings import StreamSettings
from schemas.events import Change, DocumentEvent
from schemas.topics import CHUNKS, DEAD_LETTERS, MAX_RECORD_BYTES
from streams.core.outcomes import DeadLetter, Finished
from streams.runner import DeadLetterRateLimit, Delivery, Record, Runner, TooManyDeadLetters
from streams.topology import StepName

SETTINGS = StreamSettings(retry_first_ms=1, retry_max_ms=2, attempts=3, batch_events=4)


class Fake:
    """A step that fails by document id."""

    name = StepName.PREPARE

    def __init__(self, *, one_by_one=False):
        self.failures = {}
        self.closing = []
        self.closed = []
        self.batches = []
        self.one_by_one = one_by_one

    async def run(self, tasks):
        self.batches.append([task.message.document_id for task in tasks])
        for task in tasks:
            waiting = self.failures.get(task.message.document_id, [])
            if waiting:
                error = waiting[0] if waiting[0] is POISON else waiting.pop(0)
                raise error
            if self.one_by_one:
                yield [self._outcome(task)]
        if not self.one_by_one:
            yield [self._outcome(task) for task in tasks]

    def _outcome(self, task):
        return Finished((Record(CHUNKS.name, b"k", task.message.document_id.encode(), (), 0),))

    async def close(self, task, kind, reason):  # noqa: ARG002 - unused
        self.closed.append((task.message.document_id, kind))
        if self.closing:
            raise self.closing.pop(0)

    def give_up(self, task, reason):
        return (Record(CHUNKS.name, b"k", f"gave up {task.message.document_id}: {reason}".encode(), (), 0),)


POISON = ValueError("this document is poison")


def record(document_id: str) -> Record:
    event = DocumentEvent(
        event_id="e", tenant="local", document_id=document_id, version=1, change=Change.DELETED, accepted_ms=0
    )
    return encode_event(event)


async def ended(
    step: Fake, records: list[Record], settings: StreamSettings = SETTINGS
) -> tuple[MemoryStreams, list[int], list]:
    """Run the records through a runner until all have ended."""
    streams, done, outcomes, all_ended = MemoryStreams(1), [], [], asyncio.Event()

    def note(_step, _task, outcome):
        outcomes.append(outcome)
        if len(outcomes) == len(records):
            all_ended.set()

    runner = Runner(step, streams, settings, on_finished=note)
    running = asyncio.create_task(runner.run())
    try:
        async with asyncio.timeout(60):
            for offset, one in enumerate(records):
                finish = lambda offset=offset: done.append(offset)  # noqa: E731
                await runner.take(Delivery(0, offset, one.key, one.value, one.headers, finish))
            await all_ended.wait()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return streams, done, outcomes


def values(streams: MemoryStreams, topic: str) -> list[str]:
    return [one.value.decode() for one in streams.log[topic, 0]]


async def test_records_end_in_order_and_are_emitted_in_order():
    names = [f"d{number}" for number in range(20)]
    streams, done, _ = await ended(Fake(), [record(name) for name in names])
    assert done == list(range(20))
    assert values(streams, CHUNKS.name) == names


async def test_store_that_is_down_loses_nothing_and_dead_letters_nothing():
    step = Fake()
    step.failures["d1"] = [IndexUnavailable("down")] * 30
    streams, done, outcomes = await ended(step, [record(name) for name in ("d0", "d1", "d2")])
    assert done == [0, 1, 2]
    assert values(streams, CHUNKS.name) == ["d0", "d1", "d2"]
    assert not any(isinstance(outcome, DeadLetter) for outcome in outcomes)


async def test_what_has_an_outcome_ends_before_the_rest_of_its_batch():
    step = Fake(one_by_one=True)
    step.failures["d2"] = [IndexUnavailable("down")] * 2
    broken = Record("documents.v1", b"k", b"{}", ())
    records = [record("d0"), broken, record("d2"), record("d3")]
    streams, done, outcomes = await ended(step, records)
    assert done == [0, 1, 2, 3]
    assert [isinstance(outcome, DeadLetter) for outcome in outcomes] == [False, True, False, False]
    assert values(streams, CHUNKS.name) == ["d0", "d2", "d3"]
    assert step.batches == [["d0", "d2", "d3"], ["d2", "d3"], ["d2", "d3"]], "what ended is not run again"


async def test_poison_in_the_middle_costs_only_itself():
    step = Fake(one_by_one=True)
    step.failures["bad"] = [POISON]
    streams, done, _ = await ended(step, [record(name) for name in ("d0", "bad", "d2")])
    assert done == [0, 1, 2]
    assert step.batches == [["d0", "bad", "d2"], ["bad"], ["bad"], ["bad"], ["d2"]]
    assert values(streams, CHUNKS.name)[::2] == ["d0", "d2"]


async def test_one_poisonous_record_costs_only_itself():
    step = Fake()
    step.failures["bad"] = [POISON]
    streams, done, _ = await ended(step, [record(name) for name in ("d0", "bad", "d2")])
    assert done == [0, 1, 2]
    reported = values(streams, CHUNKS.name)
    assert (reported[0], reported[2]) == ("d0", "d2")
    assert reported[1].startswith("gave up bad: failed 3 times, last error: ValueError: this document is poison")
    [dead_letter] = streams.log[DEAD_LETTERS.name, 0]
    headers = dict(dead_letter.headers)
    assert headers["__connect.errors.topic"] == b"documents.v1"
    assert headers["__connect.errors.offset"] == b"1"
    assert headers["__connect.errors.stage"] == b"prepare"
    assert b"poison" in headers["__connect.errors.exception.message"]
    assert dead_letter.value == record("bad").value
    assert dead_letter.key == b"local/bad"


async def test_error_that_passes_is_not_dead_lettered():
    step = Fake()
    step.failures["d0"] = [ValueError("once")]
    _, done, outcomes = await ended(step, [record("d0")])
    assert done == [0]
    assert isinstance(outcomes[0], Finished)


async def test_undecodable_records_are_dead_lettered_with_their_reason():
    broken = [
        Record("documents.v1", b"k", b"\xff\x00 no json", (("ce_type", b"freshline.document.changed.v1"),)),
        Record("documents.v1", b"k", b"{}", ()),
        Record("documents.v1", b"k", b"{}", (("ce_type", b"freshline.document.changed.v9"),)),
    ]
    streams, done, outcomes = await ended(Fake(), [*broken, record("d3")])
    assert done == [0, 1, 2, 3]
    assert [isinstance(outcome, DeadLetter) for outcome in outcomes] == [True, True, True, False]
    reasons = [dict(one.headers)["__connect.errors.exception.message"] for one in streams.log[DEAD_LETTERS.name, 0]]
    assert b"event_id" in reasons[1]
    assert b"changed.v9" in reasons[2]
    assert values(streams, CHUNKS.name) == ["d3"]


async def test_what_waits_is_bounded():
    step, started = Fake(), asyncio.Event()

    async def never(_tasks):
        started.set()
        await asyncio.Event().wait()
        yield []

    step.run = never
    runner = Runner(step, MemoryStreams(1), SETTINGS, on_finished=lambda *_: None)
    running = asyncio.create_task(runner.run())
    one = record("d")
    taken = 0
    try:
        for offset in range(100):
            async with asyncio.timeout(0.2):
                await runner.take(Delivery(0, offset, one.key, one.value, one.headers, lambda: None))
            taken += 1
    except TimeoutError:
        pass
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert started.is_set()
    assert taken <= 3 * SETTINGS.batch_events


async def test_a_single_attempt_may_be_all_there_is():
    step = Fake()
    step.failures["bad"] = [POISON]
    settings = SETTINGS.model_copy(update={"attempts": 1})
    streams, done, _ = await ended(step, [record("bad"), record("d1")], settings)
    assert done == [0, 1]
    assert values(streams, CHUNKS.name)[0].startswith("gave up bad: failed 1 times, last error: ValueError")


@pytest.mark.parametrize("failing", [0, 1, 9])
async def test_what_tries_have_left_is_taken_back_before_a_record_is_given_up(failing):
    step = Fake()
    step.failures["bad"] = [POISON]
    step.closing = [StreamUnavailable("down"), *[POISON] * failing]
    settings = SETTINGS.model_copy(update={"attempts": 2})
    with structlog.testing.capture_logs():  # to write so many failures takes longer than all the rest
        streams, done, _ = await ended(step, [record("bad"), record("d1")], settings)
    assert step.closed == [("bad", "failed")] * min(2 + failing, 3)
    assert (done, len(streams.log[DEAD_LETTERS.name, 0])) == ([0, 1], 1), "it ends, whether or not that succeeds"


async def test_a_strangers_record_larger_than_ours_may_be_does_not_stop_the_stream():
    strange = Record("documents.v1", b"k", b"x" * (MAX_RECORD_BYTES + 1), ())
    streams, done, _ = await ended(Fake(), [strange, record("d1")])
    assert done == [0, 1]
    [dead_letter] = streams.log[DEAD_LETTERS.name, 0]
    assert dead_letter.value == b"x" * MAX_RECORD_BYTES
    assert values(streams, CHUNKS.name) == ["d1"]


async def test_nothing_counts_as_ended_before_the_broker_has_what_it_led_to():
    order, all_ended = [], asyncio.Event()

    class Unsteady(MemoryStreams):
        async def send_all(self, records):
            order.append("asked")
            if len(order) < 20:
                raise StreamUnavailable("no acknowledgement")
            return await super().send_all(records)

    step, streams = Fake(), Unsteady(1)
    runner = Runner(step, streams, SETTINGS, on_finished=lambda *_: all_ended.set())
    one = record("d0")
    await runner.take(Delivery(0, 0, one.key, one.value, one.headers, lambda: order.append("ended")))
    running = asyncio.create_task(runner.run())
    try:
        await asyncio.wait_for(all_ended.wait(), 10)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert order == ["asked"] * 20 + ["ended"]
    assert values(streams, CHUNKS.name) == ["d0"]
    assert step.batches == [["d0"]], "the step is not run again for the broker's sake"


LIMITED = SETTINGS.model_copy(update={"dead_letter_window": 10, "dead_letter_rate": 0.3})


UNDECODABLE = Record("documents.v1", b"k", b"no JSON")


async def test_step_that_would_give_up_everything_stops_and_what_stopped_it_is_read_again():
    streams, done = MemoryStreams(1), []
    runner = Runner(Fake(), streams, LIMITED, on_finished=lambda *_: None)
    running = asyncio.create_task(runner.run())

    async def feed():
        for offset, one in enumerate([record(f"d{number}") for number in range(8)] + [UNDECODABLE] * 22):
            finish = lambda offset=offset: done.append(offset)  # noqa: E731
            await runner.take(Delivery(0, offset, one.key, one.value, one.headers, finish))

    feeding = asyncio.create_task(feed())
    async with asyncio.timeout(10):
        with pytest.raises(
            TooManyDeadLetters, match=r"prepare would give up 4 of the last 10 records.*nothing is lost"
        ):
            await running
    feeding.cancel()
    assert done == list(range(len(done)))
    assert len(streams.log[DEAD_LETTERS.name, 0]) == len(done) - 8 <= 3


async def test_some_failures_among_many_records_stop_nothing():
    records = [UNDECODABLE if number % 5 == 0 else record(f"d{number}") for number in range(60)]
    streams, done, _ = await ended(Fake(), records, LIMITED)
    assert done == list(range(60))
    assert len(streams.log[DEAD_LETTERS.name, 0]) == 12


def test_documents_that_cannot_be_read_stop_nothing_however_many():
    share = DeadLetterRateLimit(StepName.PREPARE, LIMITED)
    share.count([DeadLetter("unsupported", "an image")] * 1_000)
    with pytest.raises(TooManyDeadLetters):
        share.count([DeadLetter("content-lost", "no blob")] * 4)
