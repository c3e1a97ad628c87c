"""Reading what is in a topic, for checks, questions and measurements; nothing here belongs to a consumer group."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from infra.kafka.port import StreamUnavailable
from infra.kafka.security import client_options
from infra.settings import Settings
from schemas.topics import Topic


async def read_to_end(settings: Settings, topic: Topic) -> AsyncIterator[Any]:
    """All records (aiokafka's ``ConsumerRecord``) of a topic up to its present end, one partition after the other.

    Raises:
        StreamUnavailable: the brokers do not answer.
    """
    name = settings.names.topic(topic.name)
    partitions = [TopicPartition(name, number) for number in range(settings.kafka.partitions)]
    with _unavailable_is_said():
        async with _consumer(settings) as consumer:
            consumer.assign(partitions)
            await consumer.seek_to_beginning()
            ends = await consumer.end_offsets(partitions)
            for partition in partitions:
                async for record in _up_to(consumer, partition, ends[partition]):
                    yield record


async def read_lane(
    settings: Settings, topic: Topic, partition: int, *, offset: int, since_ms: float
) -> AsyncGenerator[Any, None]:
    """See ``ReadLane``."""
    lane = TopicPartition(settings.names.topic(topic.name), partition)
    with _unavailable_is_said():
        async with _consumer(settings) as consumer:
            consumer.assign([lane])
            first = (await consumer.beginning_offsets([lane]))[lane]
            end = (await consumer.end_offsets([lane]))[lane]
            by_time = (await consumer.offsets_for_times({lane: max(0, int(since_ms))}))[lane]
            later = end if by_time is None else by_time.offset
            consumer.seek(lane, max(first, min(offset, later)))
            async for record in _up_to(consumer, lane, end):
                yield record


@asynccontextmanager
async def _consumer(settings: Settings) -> AsyncIterator[Any]:
    consumer = AIOKafkaConsumer(**client_options(settings.kafka), enable_auto_commit=False)
    try:
        await consumer.start()
        yield consumer
    finally:
        await consumer.stop()


async def _up_to(consumer: Any, partition: TopicPartition, end: int) -> AsyncIterator[Any]:
    while await consumer.position(partition) < end:
        got = await consumer.getmany(partition, timeout_ms=1_000)
        for record in got.get(partition, ()):
            yield record


@contextmanager
def _unavailable_is_said() -> Iterator[None]:
    try:
        yield
    except KafkaError as error:
        raise StreamUnavailable(f"the brokers do not answer: {error!r}") from error
