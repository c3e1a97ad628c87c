"""Idempotent Kafka producer; records are acknowledged by all in-sync replicas."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from typing_extensions import override

from infra.kafka.port import Producer, RecordMetadata, RecordTooLarge, StreamUnavailable, check_sizes
from infra.kafka.security import client_options
from infra.settings import Settings
from schemas.records import Record
from schemas.topics import MAX_RECORD_BYTES

if TYPE_CHECKING:
    from aiokafka.structs import RecordMetadata as KafkaMetadata

SEND_TIMEOUT_S: Final = 10.0


class KafkaProducer(Producer):
    """Kafka producer. All tasks of an event loop may share it."""

    def __init__(self, client: AIOKafkaProducer, settings: Settings) -> None:
        self._client = client
        self._names = settings.names

    @classmethod
    async def open(cls, settings: Settings) -> Self:
        """Connect.

        Raises:
            StreamUnavailable: no broker responds.
        """
        client = AIOKafkaProducer(
            **client_options(settings.kafka),
            acks="all",
            enable_idempotence=True,
            # The first record is sent immediately; records produced meanwhile share the next request. Lingering would
            # delay each edit at three steps.
            linger_ms=0,
            request_timeout_ms=int(SEND_TIMEOUT_S * 1000),
            max_request_size=MAX_RECORD_BYTES + 100_000,
        )
        try:
            await client.start()
        except BaseException as error:
            await client.stop()
            if not isinstance(error, KafkaError):
                raise
            servers = settings.kafka.bootstrap_servers
            raise StreamUnavailable(f"no Kafka broker responded at {servers}: {error}") from error
        return cls(client, settings)

    @override
    async def send(self, record: Record) -> RecordMetadata:
        return (await self.send_all([record]))[0]

    @override
    async def send_all(self, records: Sequence[Record]) -> list[RecordMetadata]:
        check_sizes(records)
        try:
            # Enqueued sequentially, which defines their order, then awaited together.
            acknowledgements = [await self._enqueue(record) for record in records]
            async with asyncio.timeout(SEND_TIMEOUT_S):
                acknowledged = [await asyncio.shield(one) for one in acknowledgements]
        except MessageSizeTooLargeError as error:
            raise RecordTooLarge(str(error)) from error
        except (KafkaError, TimeoutError) as error:
            raise StreamUnavailable(f"a record was not acknowledged: {error!r}") from error
        return [RecordMetadata(metadata.partition, metadata.offset) for metadata in acknowledged]

    async def _enqueue(self, record: Record) -> "asyncio.Future[KafkaMetadata]":
        return await self._client.send(  # type: ignore[no-any-return]  # aiokafka is not typed
            self._names.topic(record.topic),
            value=record.value,
            key=record.key,
            partition=record.partition,
            headers=list(record.headers),
        )

    async def ready(self) -> None:
        """Check that a broker responds.

        Raises:
            StreamUnavailable: no broker responds.
        """
        try:
            await asyncio.wait_for(self._client.client.force_metadata_update(), SEND_TIMEOUT_S)
        except (KafkaError, TimeoutError) as error:
            raise StreamUnavailable(f"no Kafka broker responded: {error!r}") from error

    async def close(self) -> None:
        """Send pending records, then disconnect."""
        await self._client.stop()
