"""The producer of all records: idempotent, acknowledged by all in-sync replicas."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from typing_extensions import override

from infra.kafka.port import Placed, Producer, RecordTooLarge, StreamUnavailable, check_sizes
from infra.kafka.security import client_options
from infra.settings import Settings
from schemas.records import Record
from schemas.topics import MAX_RECORD_BYTES

if TYPE_CHECKING:
    from aiokafka.structs import RecordMetadata

SEND_TIMEOUT_S: Final = 10.0


class KafkaProducer(Producer):
    """One connection set to the brokers; safe to share by all tasks of an event loop."""

    def __init__(self, client: AIOKafkaProducer, settings: Settings) -> None:
        self._client = client
        self._names = settings.names

    @classmethod
    async def open(cls, settings: Settings) -> Self:
        """Connect.

        Raises:
            StreamUnavailable: no broker answers.
        """
        client = AIOKafkaProducer(
            **client_options(settings.kafka),
            acks="all",
            enable_idempotence=True,
            # No lingering: the first record leaves at once, and those that come while it is under way share the next
            # request. Waiting to fill batches would cost every single edit that time three times over.
            linger_ms=0,
            request_timeout_ms=int(SEND_TIMEOUT_S * 1000),
            max_request_size=MAX_RECORD_BYTES + 100_000,
        )
        try:
            await client.start()
        except KafkaError as error:
            await client.stop()
            servers = settings.kafka.bootstrap_servers
            raise StreamUnavailable(f"no Kafka broker answers at {servers}: {error}") from error
        return cls(client, settings)

    @override
    async def send(self, record: Record) -> Placed:
        return (await self.send_all([record]))[0]

    @override
    async def send_all(self, records: Sequence[Record]) -> list[Placed]:
        check_sizes(records)
        try:
            # Handed over one after the other, which fixes their order, then awaited together.
            under_way = [await self._hand_over(record) for record in records]
            async with asyncio.timeout(SEND_TIMEOUT_S):
                placed = [await asyncio.shield(acked) for acked in under_way]
        except MessageSizeTooLargeError as error:
            raise RecordTooLarge(str(error)) from error
        except (KafkaError, TimeoutError) as error:
            raise StreamUnavailable(f"a record was not acknowledged: {error!r}") from error
        return [Placed(metadata.partition, metadata.offset) for metadata in placed]

    async def _hand_over(self, record: Record) -> "asyncio.Future[RecordMetadata]":
        return await self._client.send(  # type: ignore[no-any-return]  # aiokafka is not typed
            self._names.topic(record.topic),
            value=record.value,
            key=record.key,
            partition=record.partition,
            headers=list(record.headers),
        )

    async def ready(self) -> None:
        """Check that a broker answers.

        Raises:
            StreamUnavailable: none does.
        """
        try:
            await asyncio.wait_for(self._client.client.force_metadata_update(), SEND_TIMEOUT_S)
        except (KafkaError, TimeoutError) as error:
            raise StreamUnavailable(f"no Kafka broker answers: {error!r}") from error

    async def close(self) -> None:
        """Send what is under way, then disconnect."""
        await self._client.stop()
