"""Administration of topics: creation, checks and consumer lag."""

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import stamina
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError, TopicAlreadyExistsError, for_code

from infra.kafka.port import StreamUnavailable
from infra.kafka.security import client_options
from infra.kafka.topic_ids import TopicIdRequest, read_topic_id
from infra.settings import Settings
from schemas.topics import MAX_RECORD_BYTES, TOPICS, Topic

_VISIBLE_S: Final = 30.0
"""Time for the partitions of a new topic to appear in the metadata of the brokers."""

_POLL_S: Final = 0.05

_while_groups_start = stamina.retry(on=GroupCoordinatorNotAvailableError, timeout=15.0)
"""A new broker creates its offsets topic at the first request for a group, which takes a second or two."""


class TopicMismatch(Exception):
    """A topic has another number of partitions than configured, so partitions of topics would not correspond."""


@dataclass(frozen=True, slots=True)
class PartitionLag:
    """Lag of a consumer group on one partition.

    Attributes:
        committed: next offset that the group reads after a restart; 0 without a commit.
        end: next offset that the broker assigns.
    """

    partition: int
    committed: int
    end: int

    @property
    def records(self) -> int:
        """Number of records that are not committed."""
        return max(0, self.end - self.committed)


class StreamAdmin:
    """Administration of the topics. An async context manager."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = AIOKafkaAdminClient(**client_options(settings.kafka))

    async def __aenter__(self) -> Self:
        try:
            await self._client.start()
        except KafkaError as error:
            await self._client.close()
            servers = self._settings.kafka.bootstrap_servers
            raise StreamUnavailable(f"no Kafka broker responded at {servers}: {error}") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def create_topics(self) -> list[str]:
        """Create missing topics, and wait until the metadata contains the partitions of all topics.

        Brokers confirm a topic before they list its partitions. A process that starts then would read zero of them.

        Returns:
            The names of the created topics.

        Raises:
            TopicMismatch: an existing topic has another number of partitions.
            StreamUnavailable: a topic could not be created.
            StreamUnavailable: a topic was not created, or its partitions did not appear.
        """
        wanted = {self._settings.names.topic(topic.name): topic for topic in TOPICS}
        existing = set(await self._client.list_topics())
        created = []
        for name, topic in wanted.items():
            if name not in existing and await self._create(name, topic):
                created.append(name)
        await self._await_partitions(wanted)
        return created

    async def delete_topics(self) -> None:
        """Delete all topics of the namespace."""
        wanted = {self._settings.names.topic(topic.name) for topic in TOPICS}
        present = wanted & set(await self._client.list_topics())
        if present:
            await self._client.delete_topics(sorted(present))

    async def topic_id(self, topic: Topic) -> str:
        """Unique id of the topic. A topic that is deleted and created again has another id.

        Raises:
            StreamUnavailable: no broker responds, the topic does not exist, or the brokers are older than Kafka 3.1.
        """
        name = self._settings.names.topic(topic.name)
        client = AIOKafkaClient(**client_options(self._settings.kafka))
        try:
            await client.bootstrap()
            response = await client.send(client.get_random_node(), TopicIdRequest(name))
        except (KafkaError, NotImplementedError) as error:
            raise StreamUnavailable(f"the id of topic {name} cannot be read: {error!r}") from error
        finally:
            await client.close()
        topic_id = read_topic_id(response)
        if topic_id is None:
            raise StreamUnavailable(f"topic {name} does not exist: start a worker, which creates it")
        return topic_id.hex

    async def lag(self, topic: Topic, group: str) -> list[PartitionLag]:
        """Lag of ``group`` on each partition of ``topic``."""
        name = self._settings.names.topic(topic.name)
        committed = await self._committed(group)
        consumer = AIOKafkaConsumer(**client_options(self._settings.kafka))
        try:
            await consumer.start()
            partitions = [TopicPartition(name, number) for number in range(self._settings.kafka.partitions)]
            ends = await consumer.end_offsets(partitions)
        finally:
            await consumer.stop()
        return [PartitionLag(tp.partition, committed.get(tp, 0), ends[tp]) for tp in partitions]

    @_while_groups_start
    async def is_consumed(self, group: str) -> bool:
        """Whether the group has a member and is not rebalancing."""
        [response] = await self._client.describe_consumer_groups([group])
        _error, _name, state, *_ = response.groups[0]
        return bool(state == "Stable")

    @_while_groups_start
    async def _committed(self, group: str) -> Mapping[TopicPartition, int]:
        offsets = await self._client.list_consumer_group_offsets(group)
        return {tp: meta.offset for tp, meta in offsets.items() if meta.offset >= 0}

    async def _create(self, name: str, topic: Topic) -> bool:
        kafka = self._settings.kafka
        new = NewTopic(
            name,
            num_partitions=kafka.partitions,
            replication_factor=kafka.replication,
            topic_configs={
                "retention.ms": str(topic.retention_ms),
                "min.insync.replicas": str(kafka.min_in_sync_replicas),
                "max.message.bytes": str(MAX_RECORD_BYTES + 100_000),
                "compression.type": "producer",
            },
        )
        response = await self._client.create_topics([new])
        for _, code, *rest in response.topic_errors:
            error = for_code(code)
            if error is TopicAlreadyExistsError:  # another process created it
                return False
            if code:
                raise StreamUnavailable(f"topic {name} could not be created: {error.__name__} {rest}")
        return True

    async def _await_partitions(self, names: Collection[str]) -> None:
        missing = sorted(names)
        try:
            async with asyncio.timeout(_VISIBLE_S):
                while missing := await self._without_partitions(missing):  # noqa: ASYNC110 - no notification
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise StreamUnavailable(
                f"the brokers list no partitions of {', '.join(missing)} after {_VISIBLE_S:.0f} s"
            ) from None

    async def _without_partitions(self, names: list[str]) -> list[str]:
        """Those of the topics whose partitions are not listed yet."""
        missing = []
        for found in await self._client.describe_topics(names):
            count = len(found["partitions"])
            if not count:
                missing.append(found["topic"])
            elif count != self._settings.kafka.partitions:
                raise TopicMismatch(
                    f"topic {found['topic']} has {count} partitions, {self._settings.kafka.partitions} are configured: "
                    "change FRESHLINE_KAFKA__PARTITIONS, or replay into another namespace"
                )
        return missing
