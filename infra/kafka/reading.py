"""Reading what is in a topic, for checks and measurements; nothing here belongs to a consumer group."""

from collections.abc import AsyncIterator
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from infra.kafka.security import client_options
from infra.settings import Settings
from schemas.topics import Topic


async def read_to_end(settings: Settings, topic: Topic) -> AsyncIterator[Any]:
    """All records (aiokafka's ``ConsumerRecord``) of a topic up to its present end, one partition after the other."""
    name = settings.names.topic(topic.name)
    partitions = [TopicPartition(name, number) for number in range(settings.kafka.partitions)]
    consumer = AIOKafkaConsumer(**client_options(settings.kafka), enable_auto_commit=False)
    await consumer.start()
    try:
        consumer.assign(partitions)
        await consumer.seek_to_beginning()
        ends = await consumer.end_offsets(partitions)
        for partition in partitions:
            while await consumer.position(partition) < ends[partition]:
                got = await consumer.getmany(partition, timeout_ms=1_000)
                for record in got.get(partition, ()):
                    yield record
    finally:
        await consumer.stop()
