"""The contract of Producer, run on the twin and on a Kafka broker; and the administration of real topics."""

import asyncio
from collections import defaultdict
from functools import partial

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from infra.kafka.codec import decode, encode_change, encode_event, encode_plan, header
from infra.kafka.memory import MemoryStreams
from infra.kafka.port import RecordMetadata, RecordTooLarge, StreamUnavailable
from infra.kafka.producer import KafkaProducer
from infra.kafka.provision import PartitionLag, StreamAdmin, TopicMismatch
from infra.kafka.topic_reader import read_partition, read_to_end
from infra.settings import KafkaSettings, Settings
from schemas.documents import Outcome
from schemas.events import BlobRef, Change, ChunkPlan, DocumentEvent, IndexChange, PlannedChunk, StageTimes
from schemas.records import Record
from schemas.topics import CHUNKS, DOCUMENTS, INDEX_CHANGES, MAX_RECORD_BYTES, TOPICS

PARTITIONS = 3
TOPIC = DOCUMENTS.name
WAIT_S = 20


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.stack)])
def broker(request) -> Settings | None:
    return None if request.param == "memory" else request.getfixturevalue("settings")


@pytest.fixture
async def producer(broker):
    if broker is None:
        yield MemoryStreams(PARTITIONS)
        return
    assert broker.kafka.partitions == PARTITIONS
    async with StreamAdmin(broker) as admin:
        await admin.create_topics()
    producer = await KafkaProducer.open(broker)
    yield producer
    await producer.close()


async def read(producer, broker, topic=TOPIC) -> dict[RecordMetadata, Record]:
    """All records of a topic."""
    if broker is None:
        lanes = [(at, lane) for (name, at), lane in producer.log.items() if name == topic]
        return {RecordMetadata(at, offset): record for at, lane in lanes for offset, record in enumerate(lane)}
    [which] = [one for one in TOPICS if one.name == topic]
    async with asyncio.timeout(WAIT_S):
        return {
            RecordMetadata(one.partition, one.offset): Record(topic, one.key, one.value, one.headers)
            async for one in read_to_end(broker, which)
        }


async def test_a_partition_is_read_from_an_offset_to_its_end(producer, broker):
    sent = [Record(TOPIC, b"acme/a", str(number).encode(), partition=1) for number in range(5)]
    await producer.send_all([*sent, Record(TOPIC, b"acme/b", b"other", partition=2)])
    lane = producer.read_partition if broker is None else partial(read_partition, broker)
    later_ms = 4e12

    async def values(offset, partition=1, since_ms=later_ms):
        async with asyncio.timeout(WAIT_S):
            return [one.value async for one in lane(DOCUMENTS, partition, offset=offset, since_ms=since_ms)]

    assert await values(3) == [b"3", b"4"]
    assert await values(0) == [b"0", b"1", b"2", b"3", b"4"]
    assert await values(9) == []
    assert await values(0, partition=0) == []
    if broker is not None:
        # Records of the twin have no timestamp.
        assert await values(9, since_ms=0.0) == [b"0", b"1", b"2", b"3", b"4"], (
            "reading starts at the lower of both offsets"
        )


@pytest.mark.stack
async def test_reading_from_unreachable_brokers_is_unavailable(settings):
    away = settings.model_copy(update={"kafka": KafkaSettings(bootstrap_servers="127.0.0.1:9", partitions=3)})
    with pytest.raises(StreamUnavailable):
        [_ async for _ in read_partition(away, DOCUMENTS, 0, offset=0, since_ms=0.0)]
    with pytest.raises(StreamUnavailable):
        [_ async for _ in read_to_end(away, DOCUMENTS)]


async def test_equal_keys_share_a_partition_and_different_keys_are_distributed(producer):
    keys = [f"acme/{number}".encode() for number in range(60)]
    first = await producer.send_all([Record(TOPIC, key, b"1") for key in keys])
    second = await producer.send_all([Record(TOPIC, key, b"2") for key in keys])
    assert [one.partition for one in first] == [one.partition for one in second]
    assert {one.partition for one in first} == set(range(PARTITIONS))


async def test_send_returns_the_position_of_the_record(producer, broker):
    records = [Record(TOPIC, b"acme/%d" % number, b"value %d" % number) for number in range(10)]
    records.append(Record(TOPIC, b"acme/empty", b""))
    placed = [await producer.send(record) for record in records]
    found = await read(producer, broker)
    assert {one: record.value for one, record in found.items()} == {
        one: record.value for one, record in zip(placed, records, strict=True)
    }
    assert [found[one].key for one in placed] == [record.key for record in records]


async def test_records_sent_together_keep_their_order_within_a_partition(producer, broker):
    records = [Record(TOPIC, b"acme/%d" % (number % 7), b"%d" % number) for number in range(500)]
    placed = await producer.send_all(records)
    found = await read(producer, broker)
    by_partition = defaultdict(list)
    for one in sorted(found):
        by_partition[one.partition].append(int(found[one].value))
    assert all(values == sorted(values) for values in by_partition.values())
    assert [found[one].value for one in placed] == [record.value for record in records]
    assert sum(map(len, by_partition.values())) == 500


async def test_an_explicit_partition_overrides_the_key(producer, broker):
    records = [Record(CHUNKS.name, b"acme/one", b"v", (), partition) for partition in (2, 0, 2)]
    placed = await producer.send_all(records)
    assert placed == [RecordMetadata(2, 0), RecordMetadata(0, 0), RecordMetadata(2, 1)]
    assert set(await read(producer, broker, CHUNKS.name)) == set(placed)


async def test_the_largest_record_is_sent_and_a_larger_one_fails_alone(producer, broker):
    largest = Record(TOPIC, b"acme/a", b"x" * MAX_RECORD_BYTES, (("ce_id", b"1" * 2_000),))
    placed = await producer.send(largest)
    too_large = Record(TOPIC, b"acme/a", b"x" * (MAX_RECORD_BYTES + 1))
    with pytest.raises(RecordTooLarge, match=str(MAX_RECORD_BYTES + 1)):
        await producer.send(too_large)
    with pytest.raises(RecordTooLarge):
        await producer.send_all([Record(TOPIC, b"acme/b", b"fine"), too_large])
    assert set(await read(producer, broker)) == {placed}


async def test_sending_no_records_returns_no_positions(producer):
    assert await producer.send_all([]) == []


def messages():
    event = DocumentEvent(
        event_id="0199-ä",
        tenant="acme",
        document_id="hr/travel ä.md",
        version=2**53 - 1,
        change=Change.UPSERTED,
        accepted_ms=1_700_000_000_123.5,
        content=BlobRef(sha256="a" * 64, size_bytes=3),
        metadata={"final": True, "share": 0.25, "year": 2024, "owner": "Zoë"},
        groups=("hr",),
    )
    chunk = PlannedChunk(text="A\u2028b", heading_path=("Ä",), start=0, end=3, text_sha256="b" * 64)
    plan = ChunkPlan(event=event, position="documents.v1-2:7", profile="p", chunked_ms=1.0, chunks=(chunk,))
    change = IndexChange(
        event_id=event.event_id,
        tenant=event.tenant,
        document_id=event.document_id,
        version=event.version,
        position=plan.position,
        generation="g1",
        outcome=Outcome.DONE,
        added=("x",),
        times=StageTimes(accepted_ms=event.accepted_ms, searchable_ms=1_700_000_000_200.0),
    )
    return event, plan, change


async def test_messages_are_cloud_events_on_the_partition_of_their_event(producer, broker):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    event, plan, change = messages()
    records = [encode_event(event, trace), encode_plan(plan, 2, trace), encode_change(change, 2)]
    placed = await producer.send_all(records)
    assert [one.partition for one in placed[1:]] == [2, 2]
    topics = (DOCUMENTS.name, CHUNKS.name, INDEX_CHANGES.name)
    back = [(await read(producer, broker, topic))[one] for topic, one in zip(topics, placed, strict=True)]
    decoded = [
        decode(model, one.value, one.headers)
        for model, one in zip((DocumentEvent, ChunkPlan, IndexChange), back, strict=True)
    ]
    assert decoded == [event, plan, change]
    assert all(one.key.decode() == "acme/hr/travel ä.md" for one in back)
    assert dict(back[0].headers) == {
        "content-type": b"application/json",
        "ce_specversion": b"1.0",
        "ce_id": "0199-ä".encode(),
        "ce_source": b"/freshline",
        "ce_type": b"freshline.document.changed.v1",
        "ce_subject": "acme/hr/travel ä.md".encode(),
        "ce_time": b"2023-11-14T22:13:20.123+00:00",
        "traceparent": trace.encode(),
    }
    assert [header(one.headers, "ce_type") for one in back[1:]] == [
        "freshline.chunks.planned.v1",
        "freshline.index.changed.v1",
    ]
    assert header(back[2].headers, "traceparent") is None


# Administration


@pytest.mark.stack
async def test_topics_are_created_once_by_concurrent_callers(settings):
    async with StreamAdmin(settings) as one, StreamAdmin(settings) as other:
        mine, theirs = await asyncio.gather(one.create_topics(), other.create_topics())
        assert sorted([*mine, *theirs]) == sorted(settings.names.topic(topic.name) for topic in TOPICS)
        assert await one.create_topics() == []
        await one.delete_topics()
        await one.delete_topics()


@pytest.mark.stack
async def test_topics_are_created_with_the_configuration_of_the_table(settings):
    async with StreamAdmin(settings) as admin:
        await admin.create_topics()
    client = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await client.start()
    try:
        for topic in TOPICS:
            name = settings.names.topic(topic.name)
            [described] = await client.describe_topics([name])
            assert len(described["partitions"]) == PARTITIONS
            [answer] = await client.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)])
            [(*_, entries)] = answer.resources
            config = {entry[0]: entry[1] for entry in entries}
            assert config["retention.ms"] == str(topic.retention_ms)
            assert config["cleanup.policy"] == "delete"
            assert int(config["max.message.bytes"]) > MAX_RECORD_BYTES
    finally:
        await client.close()


@pytest.mark.stack
async def test_topics_with_another_partition_count_are_rejected_with_advice(settings):
    async with StreamAdmin(settings) as admin:
        await admin.create_topics()
    other = settings.model_copy(update={"kafka": settings.kafka.model_copy(update={"partitions": 5})})
    async with StreamAdmin(other) as admin:
        with pytest.raises(
            TopicMismatch, match=r"has 3 partitions, 5 are configured: change FRESHLINE_KAFKA__PARTITIONS"
        ):
            await admin.create_topics()


@pytest.mark.stack
async def test_lag_counts_the_records_that_a_group_has_not_committed(settings):
    async with StreamAdmin(settings) as admin:
        await admin.create_topics()
        group = settings.names.group("index")
        assert await admin.lag(CHUNKS, group) == [PartitionLag(number, 0, 0) for number in range(PARTITIONS)]
        assert not await admin.is_consumed(group)
        producer = await KafkaProducer.open(settings)
        await producer.send_all([Record(CHUNKS.name, b"k", b"v", (), 1)] * 5)
        await producer.close()
        assert [one.records for one in await admin.lag(CHUNKS, group)] == [0, 5, 0]
        topic = settings.names.topic(CHUNKS.name)
        consumer = AIOKafkaConsumer(
            topic, bootstrap_servers=settings.kafka.bootstrap_servers, group_id=group, enable_auto_commit=False
        )
        await consumer.start()
        try:
            await consumer.commit({TopicPartition(topic, 1): 3})
            assert await admin.lag(CHUNKS, group) == [
                PartitionLag(0, 0, 0),
                PartitionLag(1, 3, 5),
                PartitionLag(2, 0, 0),
            ]
            assert await admin.is_consumed(group)
        finally:
            await consumer.stop()
        assert not await admin.is_consumed(group)


async def test_an_unreachable_broker_is_reported():
    settings = Settings(kafka=KafkaSettings(bootstrap_servers="127.0.0.1:1"))
    with pytest.raises(StreamUnavailable, match=r"no Kafka broker responded at 127\.0\.0\.1:1"):
        await KafkaProducer.open(settings)
    with pytest.raises(StreamUnavailable, match=r"no Kafka broker responded at 127\.0\.0\.1:1"):
        async with StreamAdmin(settings):
            pass
