"""The ingest service on real servers, verified in Kafka, the blob store and Redis."""

import asyncio
import os
import signal
import socket
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import orjson
import pytest
import redis.asyncio
from aiokafka import AIOKafkaConsumer, TopicPartition
from pydantic import SecretStr

from infra.blobs import open_blob_store
from infra.blobs.port import ref_of
from infra.kafka.codec import decode
from infra.kafka.provision import StreamAdmin
from infra.opensearch.provision import create_indices
from infra.settings import IngestSettings, ParseSettings, RedisSettings, TenantSettings
from infra.web.server import listening
from ingest.connectors.client import connect_ingest
from ingest.connectors.event_file import ingest_event_file, read_events
from ingest.connectors.folder import ingest_folder
from ingest.core.changes import Removal
from ingest.main import opened
from schemas.documents import EventStatus, Stage
from schemas.events import Change, DocumentEvent
from schemas.positions import Position
from schemas.problems import PROBLEM_MEDIA_TYPE, Problem
from schemas.topics import DOCUMENTS

pytestmark = pytest.mark.stack

MAX_BYTES = 20_000
WAIT_S = 30
NDJSON = {"Content-Type": "application/x-ndjson"}
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
async def settings(settings):
    """Settings of the stack with created topics and low limits."""
    async with StreamAdmin(settings) as admin:
        await admin.create_topics()
    return settings.model_copy(update={"ingest": IngestSettings(port=0), "parse": ParseSettings(max_bytes=MAX_BYTES)})


@asynccontextmanager
async def serving(settings):
    async with (
        opened(settings) as app,
        listening(app, settings.ingest, settings) as url,
        httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client,
    ):
        yield client


@pytest.fixture
async def client(settings):
    async with serving(settings) as client:
        yield client


async def record_at(settings, position: str):
    at = Position.parse(position)
    (record,) = await records_until(settings, at, first=at.offset)
    return record


async def records_until(settings, last: Position, *, first: int = 0):
    """Records of one partition of the document stream."""
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.kafka.bootstrap_servers)
    await consumer.start()
    try:
        partition = TopicPartition(settings.names.topic(DOCUMENTS.name), last.partition)
        consumer.assign([partition])
        consumer.seek(partition, first)
        async with asyncio.timeout(WAIT_S):
            return [await consumer.getone(partition) for _ in range(first, last.offset + 1)]
    finally:
        await consumer.stop()


async def record_count(settings) -> int:
    """Number of records in the document stream."""
    async with StreamAdmin(settings) as admin:
        return sum(lag.end for lag in await admin.lag(DOCUMENTS, settings.names.group("nobody")))


def problem_of(response: httpx.Response, status: int) -> Problem:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM_MEDIA_TYPE
    return Problem.model_validate_json(response.content)


async def test_an_accepted_event_is_at_its_position(settings, client):
    headers = {"Freshline-Title": "UTF-8''Gr%C3%B6%C3%9Fe", "Freshline-Groups": "a,b", "traceparent": TRACE}
    response = await client.put("/v1/documents/a/b%20c.md", content=b"# Text", headers=headers)
    assert response.status_code == 202
    accepted = response.json()
    record = await record_at(settings, accepted["position"])
    assert record.key == b"local/a/b c.md"
    event = decode(DocumentEvent, record.value, record.headers)
    assert (event.event_id, event.version) == (accepted["event_id"], accepted["version"])
    assert (event.title, event.groups, event.content) == ("Größe", ("a", "b"), ref_of(b"# Text"))
    headers = dict(record.headers)
    assert headers["ce_id"].decode() == accepted["event_id"]
    assert (headers["ce_specversion"], headers["ce_type"]) == (b"1.0", b"freshline.document.changed.v1")
    assert headers["traceparent"].decode() == TRACE

    status = EventStatus.model_validate_json((await client.get(response.headers["location"])).content)
    assert (status.stage, status.outcome, status.position) == (Stage.ACCEPTED, None, accepted["position"])


async def test_content_is_stored_before_the_event_is_in_the_stream(settings):
    """A reader of the stream finds the content of each event immediately."""
    store = open_blob_store(settings.blobs)
    topic = settings.names.topic(DOCUMENTS.name)
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=settings.kafka.bootstrap_servers, auto_offset_reset="earliest")
    async with AsyncExitStack() as closing:
        closing.push_async_callback(store.close)
        await consumer.start()
        closing.push_async_callback(consumer.stop)
        client = await closing.enter_async_context(serving(settings))
        contents = [os.urandom(1_000) for _ in range(50)]

        async def follow():
            for _ in contents:
                record = await consumer.getone()
                event = decode(DocumentEvent, record.value, record.headers)
                assert await store.get(event.content) in contents

        following = asyncio.create_task(follow())

        async def put(name, content):
            # A busy machine may exceed the timeout of Redis; then nothing was accepted.
            while (response := await client.put(name, content=content)).status_code == 503:
                continue
            assert response.status_code == 202

        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*(put(f"/v1/documents/{n}.md", content) for n, content in enumerate(contents)))
        await asyncio.wait_for(following, WAIT_S)


async def test_delete_and_upload_of_a_document_share_a_partition(settings, client):
    responses = [
        await client.put("/v1/documents/a.md", content=b"1"),
        await client.delete("/v1/documents/a.md"),
        await client.put("/v1/documents/a.md", json={"text": "2"}),
        await client.put("/v1/documents/a.md", files={"file": ("a.pdf", b"%PDF", "application/pdf")}),
    ]
    accepted = [response.json() for response in responses]
    positions = [Position.parse(one["position"]) for one in accepted]
    versions = [one["version"] for one in accepted]
    assert positions == [Position(positions[0].partition, offset) for offset in range(4)]
    assert versions == sorted(set(versions))
    record = await record_at(settings, accepted[1]["position"])
    assert decode(DocumentEvent, record.value, record.headers).change is Change.DELETED


async def test_rejected_requests_send_no_records(settings, client):
    async def endless():
        for _ in range(100):
            yield b"x" * MAX_BYTES

    for too_large in (b"x" * (MAX_BYTES + 1), endless()):
        problem = problem_of(await client.put("/v1/documents/a.md", content=too_large), 413)
        assert f"{MAX_BYTES:,}" in problem.detail
    zipped = {"Content-Type": "application/zip"}
    assert "text/markdown" in problem_of(await client.put("/v1/documents/a", content=b"PK", headers=zipped), 415).detail
    wrong = {"Freshline-Title": "x" * 501}
    problem = problem_of(await client.put("/v1/documents/a.md", content=b"x", headers=wrong), 422)
    assert problem.errors[0].field == "Freshline-Title"
    assert await record_count(settings) == 0


async def test_a_batch_with_invalid_lines(settings, client):
    lines = [orjson.dumps({"document_id": f"doc-{number % 10}", "text": f"text {number}"}) for number in range(200)]
    lines[17] = b"{"
    lines[50] = orjson.dumps({"document_id": "doc-0", "text": "x" * (MAX_BYTES + 1)})
    response = await client.post("/v1/documents:batch", content=b"\n".join(lines), headers=NDJSON)
    result = response.json()
    assert (result["accepted"], result["rejected"]) == (198, 2)
    assert {o["line"]: o["problem"]["status"] for o in result["outcomes"] if "problem" in o} == {18: 422, 51: 413}
    for document in range(10):
        mine = [
            o["accepted"] for o in result["outcomes"] if o.get("document_id") == f"doc-{document}" and "accepted" in o
        ]
        offsets = [Position.parse(one["position"]).offset for one in mine]
        versions = [one["version"] for one in mine]
        assert offsets == sorted(set(offsets))
        assert versions == sorted(set(versions))
    assert await record_count(settings) == 198


async def test_without_redis_events_with_a_revision_are_accepted(settings):
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        unreachable = RedisSettings(url=f"redis://127.0.0.1:{reserved.getsockname()[1]}/0", timeout_s=0.3)
    async with serving(settings.model_copy(update={"redis": unreachable})) as client:
        response = await client.put("/v1/documents/a.md", content=b"x")
        assert "revision" in problem_of(response, 503).detail
        assert response.headers["retry-after"] == "1"
        response = await client.put("/v1/documents/a.md", content=b"x", headers={"Freshline-Revision": "4"})
        assert response.status_code == 202
        record = await record_at(settings, response.json()["position"])
        assert decode(DocumentEvent, record.value, record.headers).version == 4
        problem_of(await client.get(response.headers["location"]), 503)
        assert (await client.get("/ready")).json()["redis"] == "unavailable"
    assert await record_count(settings) == 1


async def test_versions_do_not_decrease_after_redis_lost_all_data(settings, client):
    first = (await client.put("/v1/documents/a.md", content=b"1")).json()
    async with redis.asyncio.Redis.from_url(settings.redis.url) as store:
        keys = [key async for key in store.scan_iter(f"{settings.namespace}:*", count=1_000)]
        assert keys
        await store.delete(*keys)
    second = (await client.put("/v1/documents/a.md", content=b"2")).json()
    assert second["version"] > first["version"]
    problem_of(await client.get(f"/v1/events/{first['event_id']}"), 404)


async def test_a_stream_without_acknowledgements_is_503(settings, monkeypatch):
    monkeypatch.setattr("infra.kafka.producer.SEND_TIMEOUT_S", 1.0)
    # The topics of this namespace do not exist, and brokers do not create topics automatically.
    topicless = settings.model_copy(update={"namespace": f"{settings.namespace}-x"})
    async with serving(topicless) as client:
        response = await client.put("/v1/documents/a.md", content=b"x")
        assert "stream" in problem_of(response, 503).detail
        assert response.headers["retry-after"] == "1"
        lines = b"\n".join(orjson.dumps({"document_id": f"doc-{number}", "text": "x"}) for number in range(100))
        result = (await client.post("/v1/documents:batch", content=lines, headers=NDJSON)).json()
        assert (result["accepted"], result["rejected"]) == (0, 100)


async def test_a_configured_key_is_required(settings):
    closed = settings.model_copy(update={"tenant": TenantSettings(default="acme", api_key=SecretStr("k" * 20))})
    async with serving(closed) as client:
        problem_of(await client.put("/v1/documents/a.md", content=b"x"), 401)
        assert await record_count(settings) == 0
        async with connect_ingest(str(client.base_url), "k" * 20) as authorised:
            accepted = await authorised.send(Removal("a.md"))
    record = await record_at(settings, accepted.position)
    assert record.key == b"acme/a.md"


async def test_small_document_is_accepted_in_milliseconds(client):
    content = os.urandom(5_000).hex().encode()
    took_ms = []
    for number in range(60):
        began = time.perf_counter()
        response = await client.put(f"/v1/documents/{number % 20}.md", content=content + str(number).encode())
        took_ms.append((time.perf_counter() - began) * 1000)
        assert response.status_code == 202
    # The target is 10 ms. A delayed TCP segment (40 ms each way) would delay all requests, a busy machine only most.
    assert sorted(took_ms)[len(took_ms) // 10] < 40


async def test_a_folder_is_sent_completely(settings, client, tmp_path):
    root = tmp_path / "docs"
    root.mkdir()
    for number in range(40):
        (root / f"{number}.md").write_text(f"text {number}")
    await create_indices(settings)
    async with connect_ingest(str(client.base_url)) as sender:
        summary = await ingest_folder(sender, root, log_path=tmp_path / "sent.jsonl")
    assert (summary.sent, summary.failed) == (40, [])
    assert sum(offset + 1 for offset in summary.positions.values()) == await record_count(settings) == 40


async def test_the_installation_id_is_stable_until_the_topic_is_recreated(settings):
    async def installation():
        async with serving(settings) as client:
            return (await client.get("/v1/installation")).json()

    first = await installation()
    assert first["tenant"] == "local"
    async with redis.asyncio.Redis.from_url(settings.redis.url) as emptied:
        if keys := [key async for key in emptied.scan_iter(f"{settings.namespace}:*")]:
            await emptied.delete(*keys)
    assert await installation() == first
    async with StreamAdmin(settings) as admin:
        await admin.delete_topics()
        async with asyncio.timeout(WAIT_S):
            # The name of a deleted topic is free after a delay.
            while DOCUMENTS.name not in "".join(await admin.create_topics()):  # noqa: ASYNC110 - brokers send no notification
                await asyncio.sleep(0.05)
    assert (await installation())["installation_id"] != first["installation_id"]


async def test_accepted_events_that_are_not_indexed_make_a_list_incomplete(settings, client):
    await create_indices(settings)
    listing = (await client.get("/v1/documents?connector=mine")).json()
    assert (listing["documents"], listing["complete"]) == ([], True)
    await client.put("/v1/documents/a.md", content=b"x", headers={"Freshline-Connector": "mine"})
    listing = (await client.get("/v1/documents?connector=mine&wait_s=0.5")).json()
    assert (listing["documents"], listing["complete"]) == ([], False)


HISTORY = Path(__file__).parents[3] / "shared/corpora/handbook-18f.events.jsonl.gz"


@pytest.mark.skipif(not HISTORY.exists(), reason="the recorded history is not beside the repository")
async def test_a_recorded_history_is_sent_in_order_and_once(settings, tmp_path):
    settings = settings.model_copy(update={"parse": ParseSettings()})
    await create_indices(settings)
    async with serving(settings) as client, connect_ingest(str(client.base_url)) as sender:
        summary = await ingest_event_file(sender, HISTORY, log_path=tmp_path / "sent.jsonl")
    events = list(read_events(HISTORY))
    assert summary.failed == []
    assert summary.sent + summary.deleted == len(events) == await record_count(settings)
    newest: dict[str, int] = {}
    for partition, offset in summary.positions.items():
        for record in await records_until(settings, Position(partition, offset)):
            event = decode(DocumentEvent, record.value, record.headers)
            assert event.version > newest.get(event.document_id, 0)
            newest[event.document_id] = event.version
    assert newest == {event.doc_id: event.seq + 1 for event in events}


SERVE = """
import asyncio
from infra.settings import Settings
from ingest.main import serve
asyncio.run(serve(Settings()))
"""


@asynccontextmanager
async def process(**environment):
    """The service as a separate process, with the environment of the settings fixture."""
    pipe = asyncio.subprocess.PIPE

    process_environment = os.environ | {"FRESHLINE_INGEST__PORT": "0"} | environment
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVE, stderr=pipe, env=process_environment)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stopped_process_finishes_requests_in_progress_and_exits_cleanly(settings, number):
    async with process() as child:
        async with asyncio.timeout(WAIT_S):
            while (line := orjson.loads(await child.stderr.readline()))["event"] != "ingest_listening":
                pass
        signalled, stopping = asyncio.Event(), asyncio.Event()

        async def slow_body():
            yield b"first half, "
            signalled.set()
            await stopping.wait()
            yield b"second half"

        async with httpx.AsyncClient(base_url=line["url"], timeout=WAIT_S) as client:
            putting = asyncio.create_task(client.put("/v1/documents/a.md", content=slow_body()))
            await signalled.wait()
            child.send_signal(number)
            async with asyncio.timeout(WAIT_S):
                while orjson.loads(await child.stderr.readline())["event"] != "ingest_stopping":
                    pass
            stopping.set()
            response = await putting
        assert response.status_code == 202
        record = await record_at(settings, response.json()["position"])
        event = decode(DocumentEvent, record.value, record.headers)
        assert event.content == ref_of(b"first half, second half")
        assert await asyncio.wait_for(child.wait(), WAIT_S) == 0


@pytest.mark.usefixtures("settings")
async def test_a_process_without_a_key_listens_on_loopback_only():
    async with process(FRESHLINE_INGEST__HOST="0.0.0.0") as child:
        _, errors = await asyncio.wait_for(child.communicate(), WAIT_S)
        assert child.returncode != 0
        assert b"cannot listen on 0.0.0.0 without an API key" in errors
