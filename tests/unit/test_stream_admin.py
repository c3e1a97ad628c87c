"""Topics are created completely, and a start that is cancelled leaves no connection open."""

import asyncio
import gc
from types import SimpleNamespace

import pytest

from infra.kafka import provision
from infra.kafka.port import StreamUnavailable
from infra.kafka.producer import KafkaProducer
from infra.kafka.provision import StreamAdmin, TopicMismatch
from infra.settings import KafkaSettings, Settings
from schemas.topics import DOCUMENTS, TOPICS

PARTITIONS = 3


class LateMetadata:
    """A broker that confirms a topic at once, and lists its partitions only in a later response.

    Attributes:
        late: number of responses without partitions.
        described: number of responses.
    """

    def __init__(self, late, existing=(), partitions=PARTITIONS):
        self.late, self.described, self._partitions = late, 0, partitions
        self._topics = list(existing)

    async def start(self):
        pass

    async def close(self):
        pass

    async def list_topics(self):
        return self._topics

    async def create_topics(self, new):
        self._topics += [one.name for one in new]
        return SimpleNamespace(topic_errors=[(one.name, 0, None) for one in new])

    async def describe_topics(self, names):
        self.described += 1
        count = 0 if self.described <= self.late else self._partitions
        return [{"topic": name, "partitions": [{"partition": number} for number in range(count)]} for name in names]


@pytest.fixture
def settings():
    return Settings(namespace="t", kafka=KafkaSettings(bootstrap_servers="127.0.0.1:1", partitions=PARTITIONS))


@pytest.fixture
def admin_of(monkeypatch, settings):
    def build(client):
        monkeypatch.setattr(provision, "AIOKafkaAdminClient", lambda **_: client)
        return StreamAdmin(settings)

    return build


async def test_creation_waits_until_the_metadata_contains_the_partitions(admin_of, settings):
    client = LateMetadata(late=2)
    async with admin_of(client) as admin:
        assert await admin.create_topics() == [settings.names.topic(topic.name) for topic in TOPICS]
    assert client.described == 3


async def test_topics_that_another_process_has_just_created_are_awaited(admin_of, settings):
    client = LateMetadata(late=1, existing=[settings.names.topic(topic.name) for topic in TOPICS])
    async with admin_of(client) as admin:
        assert await admin.create_topics() == []
    assert client.described == 2


async def test_partitions_that_never_appear_are_an_error(admin_of, settings, monkeypatch):
    monkeypatch.setattr(provision, "_VISIBLE_S", 0.0)
    async with admin_of(LateMetadata(late=1_000_000)) as admin:
        with pytest.raises(StreamUnavailable, match=f"no partitions of .*{settings.names.topic(DOCUMENTS.name)}"):
            await admin.create_topics()


async def test_another_partition_count_is_an_error_at_once(admin_of):
    async with admin_of(LateMetadata(late=0, partitions=5)) as admin:
        with pytest.raises(TopicMismatch, match="has 5 partitions, 3 are configured"):
            await admin.create_topics()


async def read_lag(settings):
    async def committed(_group):
        return {}

    admin = StreamAdmin(settings)
    admin._committed = committed
    await admin.lag(DOCUMENTS, "g")


@pytest.mark.parametrize("start", [read_lag, KafkaProducer.open])
async def test_a_cancelled_start_closes_its_client(start, settings):
    connected, unclosed = asyncio.Event(), []

    async def never_answer(_reader, writer):
        connected.set()
        await closing.wait()
        writer.close()

    closing = asyncio.Event()
    server = await asyncio.start_server(never_answer, "127.0.0.1", 0)
    servers = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    settings = settings.model_copy(update={"kafka": KafkaSettings(bootstrap_servers=servers, partitions=PARTITIONS)})
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _loop, context: unclosed.append(context["message"]))
    try:
        starting = asyncio.create_task(start(settings))
        async with asyncio.timeout(10):
            await connected.wait()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        assert starting.cancelled()
        del starting
        gc.collect()
        await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(before)
        closing.set()
        server.close()
        await server.wait_closed()
    assert unclosed == []
