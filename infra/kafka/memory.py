"""In-memory twin of the streams, for simulation: partitions, offsets, key routing, size limits."""

from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any
from uuid import uuid4
from zlib import crc32

from typing_extensions import override

from infra.kafka.port import DocumentLog, Placed, Producer, check_sizes
from schemas.records import Record
from schemas.topics import Topic


class MemoryStreams(Producer, DocumentLog):
    """All topics of one broker. Records are kept for ever; ``log`` is what a consumer would read.

    Attributes:
        indexed: whether the steps are through with every event, which nobody tells the twin.
    """

    def __init__(self, partitions: int) -> None:
        self._partitions = partitions
        self.id = uuid4().hex
        self.indexed = True
        self.log: dict[tuple[str, int], list[Record]] = defaultdict(list)

    @override
    async def send(self, record: Record) -> Placed:
        """See ``Producer.send``. The partition of a key differs from Kafka's; that equal keys share one does not."""
        return (await self.send_all([record]))[0]

    @override
    async def send_all(self, records: Sequence[Record]) -> list[Placed]:
        check_sizes(records)
        return [self._place(record) for record in records]

    async def read_to_end(self, topic: Topic) -> AsyncIterator[Any]:
        """As ``infra.kafka.reading.read_to_end``: records with the attributes of aiokafka's that we read."""
        for partition in range(self._partitions):
            async for record in self.read_lane(topic, partition, offset=0, since_ms=0):
                yield record

    async def read_lane(
        self,
        topic: Topic,
        partition: int,
        *,
        offset: int,
        since_ms: float,  # noqa: ARG002 - all are of the same time
    ) -> AsyncGenerator[Any, None]:
        """See ``ReadLane``."""
        for at, record in enumerate(list(self.log[topic.name, partition])):
            if at >= offset:
                told = {"key": record.key, "value": record.value, "headers": record.headers}
                yield SimpleNamespace(partition=partition, offset=at, timestamp=0, **told)

    @override
    async def log_id(self) -> str:
        return self.id

    @override
    async def is_indexed(self, *, timeout_s: float) -> bool:
        return self.indexed

    def _place(self, record: Record) -> Placed:
        partition = crc32(record.key) % self._partitions if record.partition is None else record.partition
        lane = self.log[record.topic, partition]
        lane.append(record)
        return Placed(partition, len(lane) - 1)
