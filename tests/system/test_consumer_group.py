"""Workers of one group on a real broker: partitions move, and no offset is committed beyond a record that is open."""

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
    """The workers of one step, and what was handed to them."""

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
        """Next offset of each partition; checked on every look."""
        lags = await self.admin.lag(DOCUMENTS, self.settings.names.group(StepName.PREPARE))
        committed = [lag.committed for lag in lags]
        for partition, offset in enumerate(committed):
            lost = {(partition, one) for one in range(offset)} - self.finished
            assert not lost, f"committed {offset} of partition {partition}, while these are open: {sorted(lost)}"
        return committed

    async def commits(self, expected):
        async with asyncio.timeout(WAIT_S):
            while await self.committed() != expected:  # noqa: ASYNC110 - brokers do not tell
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
    """One worker that ends records only when told."""

    def __init__(self, group: Group):
        self.group = group
        self.open = {}
        self.seen: list[tuple[int, int]] = []
        self.news = asyncio.Condition()
        self.consumer = FaustWorker(group.settings, StepName.PREPARE, self.take)

    async def take(self, delivery):
        place = (delivery.partition, delivery.offset)
        assert (delivery.key, delivery.value, delivery.headers) == (b"k", self.group.sent[place], (("h", b"x"),))
        async with self.news:
            self.open[place] = delivery
            self.seen.append(place)
            self.news.notify_all()

    async def has_seen(self, places):
        async with asyncio.timeout(WAIT_S), self.news:
            await self.news.wait_for(lambda: set(places) <= set(self.seen))

    def finish(self, *places):
        for place in places:
            self.group.finished.add(place)
            self.open.pop(place).done()

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


async def test_commits_stop_at_the_first_open_record_and_catch_up(group):
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
    assert sorted(worker.seen) == sorted(group.sent), "each record was handed out once"


async def test_open_records_of_a_worker_that_stops_go_to_the_other(group):
    for partition in range(PARTITIONS):
        await group.send(partition, 8)
    async with group.worker() as stays:
        await stays.has_seen(group.sent)
        async with group.worker() as leaves:
            async with asyncio.timeout(WAIT_S):
                while not (leaves.consumer.assigned and stays.consumer.assigned.isdisjoint(leaves.consumer.assigned)):  # noqa: ASYNC110 - Faust does not tell
                    await asyncio.sleep(0.05)
            taken_over = leaves.consumer.assigned
            # Nothing was committed, so the newcomer reads its partitions from their start.
            await leaves.has_seen({place for place in group.sent if place[0] in taken_over})
            leaves.finish(*((partition, offset) for partition in taken_over for offset in (0, 1, 5)))
            await group.commits([2 if partition in taken_over else 0 for partition in range(PARTITIONS)])
            # What the first worker still holds of these partitions ends behind the new owner's back.
            for place in [place for place in stays.open if place[0] in taken_over and place[1] > 5]:
                stays.open.pop(place).done()
            before = len(stays.seen)
        left_open = {place for place in leaves.open if place[1] > 1}
        await group.send(next(iter(taken_over)), 1)
        async with asyncio.timeout(WAIT_S), stays.news:
            await stays.news.wait_for(lambda: left_open <= set(stays.seen[before:]))
        await stays.has_seen(group.sent)
        assert await group.committed() == [2 if partition in taken_over else 0 for partition in range(PARTITIONS)]
        stays.finish_all()
        await group.commits([8 + (partition == next(iter(taken_over))) for partition in range(PARTITIONS)])
    assert group.finished == set(group.sent)


async def test_a_worker_that_starts_again_begins_at_the_first_open_record(group):
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
