"""Invalid messages are rejected with the name of the field."""

import orjson
import pytest

from infra.kafka.codec import Undecodable, decode, encode_event, header
from schemas.events import BlobRef, Change, ChunkPlan, DocumentEvent

EVENT = DocumentEvent(
    event_id="e1",
    tenant="acme",
    document_id="a.md",
    version=3,
    change=Change.UPSERTED,
    accepted_ms=5.5,
    content=BlobRef(sha256="a" * 64, size_bytes=1),
)
RECORD = encode_event(EVENT)


def with_fields(**fields) -> bytes:
    return orjson.dumps({**orjson.loads(RECORD.value), **fields})


@pytest.mark.parametrize(
    ("value", "headers", "message"),
    [
        (None, (), "the record has no value"),
        (b"", (), "DocumentEvent: value: Invalid JSON"),
        (b"{", (), "DocumentEvent: value: Invalid JSON"),
        (b"\xff\xfe", (), "DocumentEvent: value: Invalid JSON"),
        (b"[]", (), "DocumentEvent: value: "),
        (b"[" * 100_000, (), "DocumentEvent: value: Invalid JSON"),
        (b'{"event_id": "\\ud800"}', (), "DocumentEvent: value: Invalid JSON"),
        (b"{}", (), "DocumentEvent: event_id: Field required"),
        (with_fields(version="x"), (), "DocumentEvent: version: "),
        (with_fields(content={"sha256": "no", "size_bytes": 1}), (), "DocumentEvent: content.sha256: "),
        (with_fields(content=None), (), "an upserted event carries content"),
        (RECORD.value, (("ce_type", b"freshline.chunks.planned.v1"),), "'freshline.chunks.planned.v1', expected"),
        (RECORD.value, (("ce_type", b"freshline.document.changed.v2"),), "'freshline.document.changed.v2', expected"),
        (RECORD.value, (("ce_type", b"\xff"),), "expected 'freshline.document.changed.v1'"),
        (RECORD.value, (("ce_type", b""),), "expected 'freshline.document.changed.v1'"),
    ],
    ids=range(15),
)
def test_what_is_no_message_is_refused_with_the_reason(value, headers, message):
    with pytest.raises(Undecodable) as refused:
        decode(DocumentEvent, value, headers)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 1_000


def test_a_record_of_another_topic_is_refused_by_its_declared_type_and_by_its_fields():
    for headers in (RECORD.headers, ()):
        with pytest.raises(Undecodable):
            decode(ChunkPlan, RECORD.value, headers)


def test_a_newer_writer_may_know_more_and_a_plain_producer_need_not_declare_a_type():
    assert decode(DocumentEvent, with_fields(colour="green"), RECORD.headers) == EVENT
    assert decode(DocumentEvent, RECORD.value, ()) == EVENT


def test_header_is_the_first_of_its_name():
    headers = (("a", b"1"), ("b", b"2"), ("b", b"3"), ("c", b"\xff"))
    assert [header(headers, name) for name in ("a", "b", "c", "d")] == ["1", "2", "\ufffd", None]
