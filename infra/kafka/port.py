"""What the rest of Freshline asks of the streams."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple, Protocol

from schemas.records import Record
from schemas.topics import MAX_RECORD_BYTES, Topic


class StreamUnavailable(Exception):
    """The broker did not acknowledge in time. The record may or may not be in the stream: producing again is safe."""


class RecordTooLarge(Exception):
    """The record exceeds what the stream takes; larger content travels by blob reference."""


def check_sizes(records: Sequence[Record]) -> None:
    """Refuse what the stream would, before any of ``records`` is sent.

    Raises:
        RecordTooLarge: see there.
    """
    for record in records:
        if len(record.value) > MAX_RECORD_BYTES:
            raise RecordTooLarge(f"record of {len(record.value)} bytes exceeds {MAX_RECORD_BYTES}")


class Placed(NamedTuple):
    """Where the broker put a record."""

    partition: int
    offset: int


class ReadLane(Protocol):
    """Reads one partition of a topic up to its present end."""

    def __call__(self, topic: Topic, partition: int, /, *, offset: int, since_ms: float) -> AsyncGenerator[Any, None]:
        """Records with aiokafka's attributes, in their order, from the earlier of two places on.

        Args:
            topic: see there.
            partition: see there.
            offset: one place; it may be below the first record, or above the last.
            since_ms: the other, by the time at which records were sent; epoch milliseconds.

        Raises:
            StreamUnavailable: the brokers do not answer.
        """
        ...


class DocumentLog(Protocol):
    """The log of document events as a whole."""

    async def log_id(self) -> str:
        """Which log this is: the same for as long as it lives, and another where it was made anew.

        Raises:
            StreamUnavailable: it cannot be told.
        """
        ...

    async def is_indexed(self, *, timeout_s: float) -> bool:
        """Whether every event that is in the log now has been indexed or has ended, waiting so long for it at most.

        Raises:
            StreamUnavailable: it cannot be told.
        """
        ...


class Producer(Protocol):
    """Durable, idempotent production."""

    async def send(self, record: Record) -> Placed:
        """Return once all in-sync replicas have the record.

        Raises:
            StreamUnavailable: not acknowledged within the time limit.
            RecordTooLarge: larger than the stream takes.
        """
        ...

    async def send_all(self, records: Sequence[Record]) -> list[Placed]:
        """The same for several records at once; those of one partition keep their order."""
        ...
