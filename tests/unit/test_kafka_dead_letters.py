"""Dead letters in their topic: which are open, and that a dead letter of any record fits."""

import pytest

from infra.kafka.codec import encode_change, encode_event, encode_plan
from infra.kafka.dead_letters import encode_dead_letter, encode_resolution, open_dead_letters
from infra.kafka.memory import MemoryStreams
from schemas.dead_letters import DEAD_LETTER_HEADERS, DeadLetterResolved, Resolution
from schemas.documents import DocumentKey, Outcome
from schemas.events import Change, ChunkPlan, DocumentEvent, IndexChange, StageTimes
from schemas.records import Record
from schemas.topics import CHUNKS, DEAD_LETTERS, DOCUMENTS, INDEX_CHANGES, MAX_RECORD_BYTES, Topic

EVENT = DocumentEvent(event_id="e1", tenant="acme", document_id="a.md", version=3, change=Change.DELETED, accepted_ms=0)
PLAN = ChunkPlan(event=EVENT, position="documents.v1-0:7", profile="p", chunked_ms=0)
CHANGE = IndexChange(
    event_id="e1",
    tenant="acme",
    document_id="a.md",
    version=3,
    position="documents.v1-0:7",
    generation="g1",
    outcome=Outcome.DONE,
    times=StageTimes(accepted_ms=0),
)


def dead_letter(record: Record, topic: Topic = DOCUMENTS, offset: int = 7) -> Record:
    dead_lettered = Record(DEAD_LETTERS.name, record.key, record.value, record.headers, 0)
    return encode_dead_letter(dead_lettered, topic=topic, offset=offset, step="prepare", kind="failed", reason="why")


def closing(open_dead_letter) -> Record:
    resolved = DeadLetterResolved(
        dead_letter_id=open_dead_letter.dead_letter_id, resolution=Resolution.DROPPED, at_ms=0
    )
    return encode_resolution(open_dead_letter, resolved)


async def test_dead_letter_is_open_until_it_is_closed_and_again_when_it_arrives_back():
    streams = MemoryStreams(1)
    await streams.send_all(
        [dead_letter(encode_event(EVENT)), dead_letter(encode_event(EVENT)), dead_letter(encode_event(EVENT), offset=8)]
    )
    first, second = await open_dead_letters(streams.read_to_end)
    assert (first.dead_letter_id, second.dead_letter_id) == ("documents.v1-0:7", "documents.v1-0:8")
    await streams.send(closing(first))
    assert [one.dead_letter_id for one in await open_dead_letters(streams.read_to_end)] == ["documents.v1-0:8"]
    await streams.send(dead_letter(encode_event(EVENT)))
    assert [one.offset for one in await open_dead_letters(streams.read_to_end)] == [8, 7]


@pytest.mark.parametrize(
    ("record", "topic", "event"),
    [
        (encode_event(EVENT), DOCUMENTS, EVENT),
        (encode_plan(PLAN, 0), CHUNKS, EVENT),
        (encode_change(CHANGE, 0), INDEX_CHANGES, None),
    ],
)
async def test_dead_letter_reports_of_its_document(record, topic, event):
    streams = MemoryStreams(1)
    await streams.send(dead_letter(record, topic))
    [found] = await open_dead_letters(streams.read_to_end)
    assert found.event == event
    assert found.document == DocumentKey("acme", "a.md")
    assert (found.subject.event_id, found.subject.version) == ("e1", 3)
    assert found.original_headers == record.headers
    assert (found.topic, found.step, found.kind, found.reason) == (topic.name, "prepare", "failed", "why")


async def test_record_that_cannot_be_decoded_is_a_dead_letter_of_no_document():
    streams = MemoryStreams(1)
    await streams.send(dead_letter(Record("documents.v1", b"\xff", b"\x00\xff", (("ce_type", b"\xff"),))))
    [found] = await open_dead_letters(streams.read_to_end)
    assert (found.message, found.document, found.value) == (None, None, b"\x00\xff")


async def test_what_strangers_write_is_no_dead_letter():
    streams = MemoryStreams(1)
    resolved = (("ce_type", b"freshline.dead-letter.resolved.v1"),)
    reported = tuple((name, b"x") for name in DEAD_LETTER_HEADERS)
    for headers in ((), resolved, reported, (("__connect.errors.topic", b"documents.v1"),)):
        await streams.send(Record(DEAD_LETTERS.name, b"k", b"no JSON", headers, 0))
    assert await open_dead_letters(streams.read_to_end) == []


def test_dead_letter_of_a_record_of_any_shape_fits_and_gives_the_reason():
    reported = (("__connect.errors.topic", b"mine"), ("note", b"kept"), ("huge", b"h" * 200_000), ("small", b"s"))
    huge = Record(DOCUMENTS.name, b"k" * 500_000, b"v" * 2_000_000, reported, 0)
    dead_lettered = dead_letter(huge)
    size = (
        len(dead_lettered.key)
        + len(dead_lettered.value)
        + sum(len(name) + len(value) for name, value in dead_lettered.headers)
    )
    assert size < MAX_RECORD_BYTES + 100_000  # what topics take
    assert len(dead_lettered.value) == MAX_RECORD_BYTES
    headers = dict(dead_lettered.headers)
    assert headers["__connect.errors.topic"] == b"documents.v1"
    assert headers["note"] == b"kept"
    assert "huge" not in headers
