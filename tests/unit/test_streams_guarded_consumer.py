"""Three ways in which Faust's commit bookkeeping loses records, and that ours does not."""

from unittest.mock import AsyncMock

import pytest
from faust.transport.drivers.aiokafka import Consumer, Transport
from faust.types import TP
from faust.types.tuples import ConsumerMessage

from infra.settings import Settings
from streams.faust_app import GuardedConsumer, GuardedTransport, _make_app
from streams.topology import StepName

LANE = TP("t.documents.v1", 0)


def message(offset):
    return ConsumerMessage(LANE.topic, LANE.partition, offset, 0.0, 0, (), b"k", b"v", None)


@pytest.fixture
async def consumers(tmp_path):
    """A stock consumer and ours, as their transports make them, with a broker that takes or refuses commits."""
    made = {}
    for transport_type in (Transport, GuardedTransport):
        app = _make_app(Settings(), StepName.PREPARE, tmp_path)
        app.topics.acking_topics.add(LANE.topic)
        app.producer.flush = AsyncMock()
        app.transport = transport_type(app.conf.broker_consumer, app)
        consumer = app.consumer
        consumer.assignment = lambda: {LANE}
        consumer._commit = AsyncMock(return_value=True)
        made[transport_type] = consumer
    stock, ours = made[Transport], made[GuardedTransport]
    assert type(stock) is Consumer
    assert type(ours) is GuardedConsumer
    yield stock, ours
    for consumer in made.values():
        consumer._thread.thread_loop.close()  # it was made for a thread that is never started


def deliver(ours, offsets):
    for offset in offsets:
        ours.lanes[LANE].deliver(offset)


def ack(consumer, offsets):
    for offset in offsets:
        assert consumer.ack(message(offset))


async def test_a_record_in_flight_right_at_the_committed_offset(consumers):
    stock, ours = consumers
    stock._committed_offset[LANE] = 2585
    ack(stock, range(2586, 2590))
    assert stock._new_offset(LANE) == 2590, "stock Faust commits past 2585, which is under way"

    deliver(ours, range(2585, 2590))
    ack(ours, range(2586, 2590))
    assert ours._new_offset(LANE) is None
    ack(ours, [2585])
    assert ours._new_offset(LANE) == 2590


async def test_the_very_first_record_in_flight_and_nothing_committed_yet(consumers):
    stock, ours = consumers
    ack(stock, range(1, 4))
    assert stock._new_offset(LANE) == 4, "stock Faust commits past 0, which is under way"

    deliver(ours, range(4))
    ack(ours, range(1, 4))
    assert ours._new_offset(LANE) is None
    ack(ours, [0])
    assert ours._new_offset(LANE) == 4


async def test_a_commit_that_fails_is_tried_again(consumers):
    stock, ours = consumers
    deliver(ours, range(3))
    for consumer in (stock, ours):
        consumer._commit.return_value = False
        ack(consumer, range(3))
        assert not await consumer.commit()
        consumer._commit.assert_awaited_once_with({LANE: 3})
        consumer._commit.return_value = True
        await consumer.commit()
    assert stock._commit.await_count == 1, "stock Faust takes the refused commit for done"
    assert ours._commit.await_count == 2
    assert ours._new_offset(LANE) is None, "and once it is taken, there is nothing left to commit"


async def test_records_that_end_while_a_commit_is_in_progress_are_in_the_next(consumers):
    _, ours = consumers
    deliver(ours, range(4))
    ack(ours, [0, 1])

    async def broker(_offsets):
        ack(ours, [2])
        return True

    ours._commit.side_effect = broker
    assert await ours.commit()
    assert ours._new_offset(LANE) == 3


async def test_a_lane_that_went_to_another_worker_is_not_committed(consumers):
    _, ours = consumers
    deliver(ours, range(2))
    ack(ours, [0])
    await ours.on_partitions_revoked({LANE})
    assert not ours.ack(message(1)), "its record ends behind our back"
    assert not await ours.commit()
    ours._commit.assert_not_awaited()


async def test_after_a_seek_what_ended_before_counts_no_more(consumers):
    _, ours = consumers
    ours.seek_to_committed = AsyncMock(return_value={LANE: 0})
    deliver(ours, range(4))
    ack(ours, [1, 2])
    await ours.perform_seek()
    ack_of_an_earlier_delivery = message(3)
    ours.ack(ack_of_an_earlier_delivery)
    deliver(ours, range(4))
    ack(ours, [0])
    assert ours._new_offset(LANE) == 1


async def test_a_record_counts_once(consumers):
    _, ours = consumers
    deliver(ours, [0])
    once = message(0)
    assert ours.ack(once)
    assert not ours.ack(once)
