"""Workers of one group on a real broker: no rebalance commits an offset beyond an unfinished record."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from infra.kafka.producer import KafkaProducer
from infra.kafka.provision import StreamAdmin
from schemas.records import Record
from schemas.topics import DOCUMENTS
from streams.faust_app import FaustWorker
from streams.topology import StepName

pytestmark = pytest.mark.stack

PARTITIONS = 3
WAIT_S = 60


class Group:
    """The workers of one step, and the records delivered to them."""

    def __init__(self, settings, admin, producer):
        self.settings = settings.model_copy(
            update={"kafka": settings.kafka.model_copy(update={"commit_interval_ms": 50})}
        )
        self.admin = admin
        self.producer = producer
        self.finished: set[tuple[int, int]] = set()
        self.sent: dict[tuple[int, int], bytes] = {}

    async def send(self, partition, count):
        for _ in range(count):
            value = b"%d" % len(self.sent)
            self.sent[await self.producer.send(Record(DOCUMENTS.name, b"k", value, (("h", b"x"),), partition))] = value

    async def committed(self):
        """Committed offset of each partition; each read checks it against unfinished records."""
        lags = await self.admin.lag(DOCUMENTS, self.settings.names.group(StepName.PREPARE))
        committed = [lag.committed for lag in lags]
        for partition, offset in enumerate(committed):
            lost = {(partition, one) for one in range(offset)} - self.finished
            assert not lost, f"committed {offset} of partition {partition}, while these are open: {sorted(lost)}"
        return committed

    async def commits(self, expected):
        async with asyncio.timeout(WAIT_S):
            while await self.committed() != expected:  # noqa: ASYNC110 - brokers send no notification
                await asyncio.sleep(0.05)

    @asynccontextmanager
    async def worker(self):
        worker = Worker(self)
        await worker.consumer.start()
        try:
            yield worker
        finally:
            await worker.consumer.stop()


class Worker:
    """A worker that finishes records only on request."""

    def __init__(self, group: Group):
        self.group = group
        self.open = {}
        self.seen: list[tuple[int, int]] = []
        self.delivered = asyncio.Condition()
        self.consumer = FaustWorker(group.settings, StepName.PREPARE, self.take)

    async def take(self, delivery):
        position = (delivery.partition, delivery.offset)
        assert (delivery.key, delivery.value, delivery.headers) == (b"k", self.group.sent[position], (("h", b"x"),))
        async with self.delivered:
            self.open[position] = delivery
            self.seen.append(position)
            self.delivered.notify_all()

    async def has_seen(self, positions):
        async with asyncio.timeout(WAIT_S), self.delivered:
            await self.delivered.wait_for(lambda: set(positions) <= set(self.seen))

    def finish(self, *positions):
        for position in positions:
            self.group.finished.add(position)
            self.open.pop(position).done()

    def finish_all(self):
        self.finish(*list(self.open))


@pytest.fixture
async def group(settings):
    async with AsyncExitStack() as closing:
        admin = await closing.enter_async_context(StreamAdmin(settings))
        await admin.create_topics()
        producer = await KafkaProducer.open(settings)
        closing.push_async_callback(producer.close)
        yield Group(settings, admin, producer)


async def test_commits_stop_at_the_first_unfinished_record_and_catch_up(group):
    for partition in range(PARTITIONS):
        await group.send(partition, 6)
    async with group.worker() as worker:
        await worker.has_seen(group.sent)
        assert await group.committed() == [0, 0, 0]
        worker.finish(*((0, offset) for offset in (1, 2, 3, 4, 5)))
        worker.finish(*((1, offset) for offset in (0, 1, 3, 5)))
        worker.finish(*((2, offset) for offset in range(6)))
        await group.commits([0, 2, 6])
        worker.finish((1, 2))
        await group.commits([0, 4, 6])
        worker.finish_all()
        await group.commits([6, 6, 6])
    assert sorted(worker.seen) == sorted(group.sent), "each record was delivered once"


async def test_unfinished_records_of_a_stopped_worker_are_delivered_to_the_other(group):
    for partition in range(PARTITIONS):
        await group.send(partition, 8)
    async with group.worker() as stays:
        await stays.has_seen(group.sent)
        async with group.worker() as leaves:
            async with asyncio.timeout(WAIT_S):
                while not (leaves.consumer.assigned and stays.consumer.assigned.isdisjoint(leaves.consumer.assigned)):  # noqa: ASYNC110 - Faust sends no notification
                    await asyncio.sleep(0.05)
            taken_over = leaves.consumer.assigned
            # Nothing was committed, so the new worker reads its partitions from their start.
            await leaves.has_seen({position for position in group.sent if position[0] in taken_over})
            leaves.finish(*((partition, offset) for partition in taken_over for offset in (0, 1, 5)))
            await group.commits([2 if partition in taken_over else 0 for partition in range(PARTITIONS)])
            # The first worker finishes records of these partitions after the new worker has taken them over.
            for position in [position for position in stays.open if position[0] in taken_over and position[1] > 5]:
                stays.open.pop(position).done()
            before = len(stays.seen)
        left_open = {position for position in leaves.open if position[1] > 1}
        await group.send(next(iter(taken_over)), 1)
        async with asyncio.timeout(WAIT_S), stays.delivered:
            await stays.delivered.wait_for(lambda: left_open <= set(stays.seen[before:]))
        await stays.has_seen(group.sent)
        assert await group.committed() == [2 if partition in taken_over else 0 for partition in range(PARTITIONS)]
        stays.finish_all()
        await group.commits([8 + (partition == next(iter(taken_over))) for partition in range(PARTITIONS)])
    assert group.finished == set(group.sent)


async def test_a_restarted_worker_begins_at_the_first_unfinished_record(group):
    await group.send(1, 6)
    async with group.worker() as first:
        await first.has_seen(group.sent)
        first.finish((1, 0), (1, 1), (1, 4))
    assert await group.committed() == [0, 2, 0], "stopping commits what is finished"
    async with group.worker() as second:
        await second.has_seen({(1, 5)})
        assert second.seen == [(1, offset) for offset in (2, 3, 4, 5)]
        second.finish_all()
        await group.commits([0, 6, 0])
