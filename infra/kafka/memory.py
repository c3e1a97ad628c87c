"""In-memory streams, for tests and simulation: partitions, offsets, partitioning by key, size limits."""

from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any
from uuid import uuid4
from zlib import crc32

from typing_extensions import override

from infra.kafka.port import DocumentLog, Producer, RecordMetadata, check_sizes
from schemas.records import Record
from schemas.topics import Topic


class MemoryStreams(Producer, DocumentLog):
    """All topics of one broker, with unlimited retention.

    Attributes:
        id: id of the document log.
        indexed: result of ``is_indexed``; set by tests.
        log: records by topic and partition.
    """

    def __init__(self, partitions: int) -> None:
        self._partitions = partitions
        self.id = uuid4().hex
        self.indexed = True
        self.log: dict[tuple[str, int], list[Record]] = defaultdict(list)

    @override
    async def send(self, record: Record) -> RecordMetadata:
        # Other partitions than in Kafka, but equal keys share one too.
        return (await self.send_all([record]))[0]

    @override
    async def send_all(self, records: Sequence[Record]) -> list[RecordMetadata]:
        check_sizes(records)
        return [self._append(record) for record in records]

    async def read_to_end(self, topic: Topic) -> AsyncIterator[Any]:
        """Like ``infra.kafka.topic_reader.read_to_end``: records with the attributes of aiokafka that are used."""
        for partition in range(self._partitions):
            async for record in self.read_partition(topic, partition, offset=0, since_ms=0):
                yield record

    async def read_partition(
        self,
        topic: Topic,
        partition: int,
        *,
        offset: int,
        since_ms: float,  # noqa: ARG002 - all records have the same time
    ) -> AsyncGenerator[Any, None]:
        """Implements ``ReadPartition``."""
        for at, record in enumerate(list(self.log[topic.name, partition])):
            if at >= offset:
                content = {"key": record.key, "value": record.value, "headers": record.headers}
                yield SimpleNamespace(partition=partition, offset=at, timestamp=0, **content)

    @override
    async def log_id(self) -> str:
        return self.id

    @override
    async def is_indexed(self, *, timeout_s: float) -> bool:
        return self.indexed

    def _append(self, record: Record) -> RecordMetadata:
        partition = crc32(record.key) % self._partitions if record.partition is None else record.partition
        log = self.log[record.topic, partition]
        log.append(record)
        return RecordMetadata(partition, len(log) - 1)
