"""Acceptance: what it promises when everything works, and when each store does not."""

import asyncio
import re
import time
from uuid import UUID

import pytest
from prometheus_client import CollectorRegistry

from infra.blobs.memory import MemoryBlobStore
from infra.blobs.port import BlobStoreUnavailable, ref_of
from infra.kafka.codec import decode, header
from infra.kafka.memory import MemoryStreams
from infra.kafka.port import StreamUnavailable
from infra.opensearch.port import IndexUnavailable
from infra.redis.memory_answers import MemoryAnswerCache
from infra.redis.memory_states import MemoryEventStates, MemoryVersions
from infra.web.problems import ProblemRaised
from ingest.accept import PARALLEL_ITEMS, Acceptance, Stores
from ingest.core.changes import Removal, Upload
from ingest.core.event_ids import RANDOM_BITS, event_id
from ingest.metrics import IngestMetrics
from schemas.documents import MAX_VERSION, DocumentAttributes, DocumentKey, LifeState, Stage
from schemas.events import Change, DocumentEvent
from schemas.index import Manifest
from schemas.positions import Position
from schemas.topics import DOCUMENTS

TENANT = "t1"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Index:
    def __init__(self):
        self.known: dict[DocumentKey, Manifest] = {}
        self.available = True
        self.asked = 0

    async def manifests(self, keys):
        self.asked += 1
        if not self.available:
            raise IndexUnavailable("off")
        return {key: self.known[key] for key in keys if key in self.known}


class Streams(MemoryStreams):
    """The twin, which can be down or slow, and which inspects the blobs when it receives a record."""

    def __init__(self, blobs):
        super().__init__(partitions=3)
        self.blobs = blobs
        self.failing = False
        self.sends = 0
        self.in_progress = self.most_in_progress = 0

    async def send(self, record):
        self.sends += 1
        if self.failing:
            raise StreamUnavailable("off")
        event = decode(DocumentEvent, record.value, record.headers)
        assert event.content is None or await self.blobs.exists(event.content), "the event came before its content"
        self.in_progress += 1
        self.most_in_progress = max(self.most_in_progress, self.in_progress)
        await asyncio.sleep(0)
        self.in_progress -= 1
        return await super().send(record)

    @property
    def records(self):
        return [record for (topic, _), lane in self.log.items() for record in lane if topic == DOCUMENTS.name]

    @property
    def events(self):
        return [decode(DocumentEvent, record.value, record.headers) for record in self.records]


class World:
    def __init__(self):
        self.blobs = MemoryBlobStore()
        self.streams = Streams(self.blobs)
        self.versions = MemoryVersions()
        self.states = MemoryEventStates()
        self.index = Index()
        self.answers = MemoryAnswerCache()
        self.registry = CollectorRegistry()
        stores = Stores(
            self.blobs, self.streams, self.versions, self.states, self.index, self.answers, None, self.streams
        )
        self.acceptance = Acceptance(stores, IngestMetrics(self.registry))

    async def accept(self, request, traceparent=None):
        return await self.acceptance.accept(TENANT, request, traceparent)


@pytest.fixture
def world():
    return World()


def upload(document_id="a/b.md", content=b"# Text", **attributes):
    return Upload(document_id, content, "text/markdown", DocumentAttributes(**attributes), "b.md")


async def test_upload_becomes_an_event_with_everything_the_sender_stated(world):
    request = upload(title="T", source="https://x", groups=("g",), metadata={"n": 1, "ok": True})
    before_ms = time.time() * 1000
    accepted = await world.accept(request, TRACE)
    (record,) = world.streams.records
    (event,) = world.streams.events
    assert event.key == DocumentKey(TENANT, "a/b.md")
    assert record.key == b"t1/a/b.md"
    assert (event.change, event.content, event.content_type) == (Change.UPSERTED, ref_of(b"# Text"), "text/markdown")
    assert (event.title, event.source, event.groups, event.file_name) == ("T", "https://x", ("g",), "b.md")
    assert event.metadata == {"n": 1, "ok": True}
    assert before_ms <= event.accepted_ms <= time.time() * 1000
    assert (accepted.event_id, accepted.version) == (event.event_id, event.version)
    assert header(record.headers, "ce_id") == event.event_id
    assert header(record.headers, "traceparent") == TRACE
    position = Position.parse(accepted.position)
    assert world.streams.log[DOCUMENTS.name, position.partition][position.offset] is record


async def test_removal_becomes_an_event_without_content(world):
    await world.accept(Removal("a"))
    (event,) = world.streams.events
    assert (event.change, event.content, event.metadata) == (Change.DELETED, None, {})


async def test_acceptance_is_recorded(world):
    accepted = await world.accept(upload())
    status = await world.states.get(TENANT, accepted.event_id)
    assert (status.stage, status.position, status.version) == (Stage.ACCEPTED, accepted.position, accepted.version)


async def test_versions_grow_and_revisions_are_taken_as_they_are(world):
    first = await world.accept(upload())
    second = await world.accept(Removal("a/b.md"))
    given = await world.accept(upload(revision=7))
    assert second.version > first.version > 1e15
    assert given.version == 7


def manifest(version):
    return Manifest(
        tenant=TENANT,
        document_id="a/b.md",
        version=version,
        complete=True,
        state=LifeState.LIVE,
        position="documents.v1-0:0",
        profile="p",
        updated_ms=0,
    )


async def test_version_is_above_what_the_index_has(world):
    floor = 8 * 10**15
    world.index.known[DocumentKey(TENANT, "a/b.md")] = manifest(floor)
    assert (await world.accept(upload())).version == floor + 1
    assert (await world.accept(upload())).version == floor + 2
    assert world.index.asked == 1


async def test_no_version_above_the_largest(world):
    world.index.known[DocumentKey(TENANT, "a/b.md")] = manifest(MAX_VERSION)
    with pytest.raises(ProblemRaised, match=str(MAX_VERSION)) as raised:
        await world.accept(upload())
    assert raised.value.problem.status == 422
    assert world.streams.sends == 0


async def test_without_the_index_events_are_accepted(world):
    world.index.available = False
    accepted = await world.accept(upload())
    assert accepted.version > 1e15


async def test_without_redis_only_events_with_a_revision_are_accepted(world):
    world.versions.available = world.states.available = False
    with pytest.raises(ProblemRaised, match="revision") as raised:
        await world.accept(upload())
    assert (raised.value.problem.status, raised.value.problem.retry_after_s) == (503, 1)
    assert world.streams.sends == 0
    assert (await world.accept(upload(revision=3))).version == 3
    assert len(world.streams.events) == 1


async def test_without_the_stream_nothing_is_accepted_or_recorded(world):
    world.streams.failing = True
    with pytest.raises(StreamUnavailable):
        await world.accept(upload())
    assert not world.states._fields


async def test_without_the_blob_store_no_event_is_sent(world, monkeypatch):
    async def put(_content):
        raise BlobStoreUnavailable("off")

    monkeypatch.setattr(world.blobs, "put", put)
    with pytest.raises(BlobStoreUnavailable):
        await world.accept(upload())
    assert world.streams.sends == 0


async def test_outcomes_are_counted(world):
    await world.accept(upload())
    await world.accept(Removal("a"))
    world.streams.failing = True
    with pytest.raises(StreamUnavailable):
        await world.accept(upload())
    count = world.registry.get_sample_value
    assert count("freshline_events_accepted_total", {"change": "upserted"}) == 1
    assert count("freshline_events_accepted_total", {"change": "deleted"}) == 1
    assert count("freshline_events_rejected_total", {"problem": "unavailable"}) == 1
    assert count("freshline_content_bytes_total") == len(b"# Text")
    assert count("freshline_accept_seconds_count") == 3


async def test_batch_keeps_the_order_of_each_document(world):
    requests = [
        upload(f"doc-{number % 5}", f"text {number}".encode()) if number % 7 else Removal(f"doc-{number % 5}")
        for number in range(100)
    ]
    outcomes = await world.acceptance.accept_many(TENANT, requests)
    assert [outcome.document_id for outcome in outcomes] == [request.document_id for request in requests]
    for document in range(5):
        mine = [outcome for outcome in outcomes if outcome.document_id == f"doc-{document}"]
        versions = [outcome.version for outcome in mine]
        offsets = [Position.parse(outcome.position).offset for outcome in mine]
        assert versions == sorted(set(versions))
        assert offsets == sorted(set(offsets))


async def test_batch_runs_documents_side_by_side_within_bounds(world):
    await world.acceptance.accept_many(TENANT, [upload(f"doc-{number}") for number in range(200)])
    assert 1 < world.streams.most_in_progress <= PARALLEL_ITEMS


async def test_one_bad_item_is_its_own_outcome(world):
    world.index.known[DocumentKey(TENANT, "a/b.md")] = manifest(MAX_VERSION)
    outcomes = await world.acceptance.accept_many(TENANT, [upload("x"), upload(), upload("y")])
    assert [type(outcome).__name__ for outcome in outcomes] == ["Accepted", "ProblemRaised", "Accepted"]


async def test_batch_stops_trying_when_the_stream_is_down(world):
    world.streams.failing = True
    outcomes = await world.acceptance.accept_many(TENANT, [upload(f"doc-{number}") for number in range(200)])
    assert all(isinstance(outcome, StreamUnavailable) for outcome in outcomes)
    assert len(outcomes) == 200
    assert world.streams.sends <= PARALLEL_ITEMS


def test_event_ids_are_uuid_7_and_sort_by_time():
    most = 2**RANDOM_BITS - 1
    for random in (0, most, most // 3):
        made = UUID(event_id(1_700_000_000_123, random))
        assert (made.version, made.variant, made.int >> 80) == (7, "specified in RFC 4122", 1_700_000_000_123)
    assert event_id(5, most) < event_id(6, 0)
    assert event_id(5, 1) != event_id(5, 2)
    assert re.fullmatch(r"[0-9a-f-]{36}", event_id(5, 1))


async def test_owners_are_looked_up_once_for_a_batch_and_left_to_the_index_step_where_they_cannot_be(world):
    requests = [upload(f"{number}.md", revision=number + 1, connector="mine") for number in range(5)]
    outcomes = await world.acceptance.accept_many(TENANT, requests)
    assert (len(outcomes), world.index.asked) == (5, 1)
    world.index.available = False
    assert (await world.accept(upload(revision=9, connector="mine"))).version == 9
