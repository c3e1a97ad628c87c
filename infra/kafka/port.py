"""Port of the streams."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple, Protocol

from schemas.records import Record
from schemas.topics import MAX_RECORD_BYTES, Topic


class StreamUnavailable(Exception):
    """No broker responded in time. A record may or may not be in the stream; a retry is safe."""


class RecordTooLarge(Exception):
    """The record exceeds ``MAX_RECORD_BYTES``. Larger contents are stored as blobs."""


def check_sizes(records: Sequence[Record]) -> None:
    """Check the size of records before any of them is sent.

    Raises:
        RecordTooLarge: a record exceeds ``MAX_RECORD_BYTES``.
    """
    for record in records:
        if len(record.value) > MAX_RECORD_BYTES:
            raise RecordTooLarge(f"record of {len(record.value)} bytes exceeds {MAX_RECORD_BYTES}")


class RecordMetadata(NamedTuple):
    """Partition and offset of an acknowledged record."""

    partition: int
    offset: int


class ReadPartition(Protocol):
    """Reads one partition of a topic up to its current end."""

    def __call__(self, topic: Topic, partition: int, /, *, offset: int, since_ms: float) -> AsyncGenerator[Any, None]:
        """Records with the attributes of aiokafka, in order, starting at the earlier of an offset and a time.

        Args:
            topic: topic to read.
            partition: partition to read.
            offset: first offset; may be below the first record, or above the last.
            since_ms: timestamp of the first record, in epoch milliseconds.

        Raises:
            StreamUnavailable: no broker responds.
        """
        ...


class DocumentLog(Protocol):
    """The log of document events."""

    async def log_id(self) -> str:
        """Id of the log. A log that is deleted and created again has another id.

        Raises:
            StreamUnavailable: no broker responds.
        """
        ...

    async def is_indexed(self, *, timeout_s: float) -> bool:
        """Wait until every current event of the log is indexed or has ended; False at the timeout.

        Raises:
            StreamUnavailable: no broker responds.
        """
        ...


class Producer(Protocol):
    """Durable, idempotent production."""

    async def send(self, record: Record) -> RecordMetadata:
        """Send a record; returns once all in-sync replicas have it.

        Raises:
            StreamUnavailable: not acknowledged in time.
            RecordTooLarge: the record exceeds ``MAX_RECORD_BYTES``.
        """
        ...

    async def send_all(self, records: Sequence[Record]) -> list[RecordMetadata]:
        """Send several records. Records of one partition keep their order."""
        ...
