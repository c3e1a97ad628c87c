"""Kafka records, as every part of the pipeline produces them."""

from dataclasses import dataclass

Headers = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class Record:
    """A record to produce.

    Attributes:
        topic: logical topic name; the namespace is added by the producer.
        key: document key; equal keys share a partition and an order.
        value: encoded message.
        headers: CloudEvents attributes and trace context.
        partition: set on derived topics to the partition of the source record, so that lanes stay lanes.
    """

    topic: str
    key: bytes
    value: bytes
    headers: Headers = ()
    partition: int | None = None
