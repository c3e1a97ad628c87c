"""Reading of topics without a consumer group, for queries, checks and measurements."""

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
    """Read all records (``ConsumerRecord`` of aiokafka) of a topic up to its current end, partition by partition.

    Raises:
        StreamUnavailable: no broker responds.
    """
    name = settings.names.topic(topic.name)
    partitions = [TopicPartition(name, number) for number in range(settings.kafka.partitions)]
    with _kafka_errors():
        async with _consumer(settings) as consumer:
            consumer.assign(partitions)
            await consumer.seek_to_beginning()
            ends = await consumer.end_offsets(partitions)
            for partition in partitions:
                async for record in _up_to(consumer, partition, ends[partition]):
                    yield record


async def read_partition(
    settings: Settings, topic: Topic, partition: int, *, offset: int, since_ms: float
) -> AsyncGenerator[Any, None]:
    """Implements ``ReadPartition``."""
    assigned = TopicPartition(settings.names.topic(topic.name), partition)
    with _kafka_errors():
        async with _consumer(settings) as consumer:
            consumer.assign([assigned])
            first = (await consumer.beginning_offsets([assigned]))[assigned]
            end = (await consumer.end_offsets([assigned]))[assigned]
            by_time = (await consumer.offsets_for_times({assigned: max(0, int(since_ms))}))[assigned]
            later = end if by_time is None else by_time.offset
            consumer.seek(assigned, max(first, min(offset, later)))
            async for record in _up_to(consumer, assigned, end):
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
        batch = await consumer.getmany(partition, timeout_ms=1_000)
        for record in batch.get(partition, ()):
            yield record


@contextmanager
def _kafka_errors() -> Iterator[None]:
    try:
        yield
    except KafkaError as error:
        raise StreamUnavailable(f"no Kafka broker responded: {error!r}") from error
