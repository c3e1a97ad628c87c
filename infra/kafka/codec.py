"""Encoding of messages as Kafka records: JSON values, with CloudEvents 1.0 attributes in binary mode.

See https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final, TypeVar, cast

from pydantic import ValidationError

from schemas.documents import DocumentKey
from schemas.events import EVENT_TYPES, ChunkPlan, DocumentEvent, EventEnded, IndexChange, StreamMessage
from schemas.records import Headers, Record
from schemas.topics import CHUNKS, DOCUMENTS, EVENT_ENDS, INDEX_CHANGES

TRACEPARENT: Final = "traceparent"
_SOURCE: Final = b"/freshline"

M = TypeVar("M", bound=StreamMessage)


class Undecodable(ValueError):
    """The record is not a message of the expected type and version. Retries are useless."""


def encode_event(event: DocumentEvent, traceparent: str | None = None) -> Record:
    """The record of an accepted event."""
    headers = _headers(DocumentEvent, event.event_id, event.key, event.accepted_ms, traceparent)
    return Record(DOCUMENTS.name, _key(event.key), event.model_dump_json(exclude_defaults=True).encode(), headers)


def encode_plan(plan: ChunkPlan, partition: int, traceparent: str | None = None) -> Record:
    """The record of a chunk plan, in the partition of its event."""
    event = plan.event
    headers = _headers(ChunkPlan, event.event_id, event.key, plan.chunked_ms, traceparent)
    value = plan.model_dump_json(exclude_defaults=True).encode()
    return Record(CHUNKS.name, _key(event.key), value, headers, partition)


def encode_change(change: IndexChange, partition: int, traceparent: str | None = None) -> Record:
    """The record of an index change, in the partition of its event."""
    key = DocumentKey(change.tenant, change.document_id)
    at_ms = change.times.searchable_ms or change.times.accepted_ms
    headers = _headers(IndexChange, change.event_id, key, at_ms, traceparent)
    value = change.model_dump_json(exclude_defaults=True).encode()
    return Record(INDEX_CHANGES.name, _key(key), value, headers, partition)


def encode_ended(ended: EventEnded, partition: int, traceparent: str | None = None) -> Record:
    """The record of an event's end, in the partition of the event."""
    key = DocumentKey(ended.tenant, ended.document_id)
    status = ended.status
    at_ms = status.accepted_ms + max(status.stages_ms.values(), default=0.0)
    headers = _headers(EventEnded, ended.event_id, key, at_ms, traceparent)
    value = ended.model_dump_json(exclude_defaults=True).encode()
    return Record(EVENT_ENDS.name, _key(key), value, headers, partition)


def decode(model: type[M], value: bytes | None, headers: Iterable[tuple[str, bytes]]) -> M:
    """Decode the message of a record.

    Raises:
        Undecodable: the type or version differs, the value is not JSON, or the named field is missing or invalid.
    """
    declared = header(headers, "ce_type")
    expected = EVENT_TYPES[model]
    if declared is not None and declared != expected:
        raise Undecodable(f"the record has type {declared!r}, expected {expected!r}")
    if value is None:
        raise Undecodable("the record has no value")
    try:
        return cast("M", model.model_validate_json(value))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "value"
        raise Undecodable(f"{model.__name__}: {field}: {first['msg']}") from error


def header(headers: Iterable[tuple[str, bytes]], name: str) -> str | None:
    """Value of a header as text, or None."""
    for key, value in headers:
        if key == name:
            return value.decode("utf-8", "replace")
    return None


def _key(key: DocumentKey) -> bytes:
    return str(key).encode()


def _headers(
    model: type[StreamMessage],
    event_id: str,
    key: DocumentKey,
    at_ms: float,
    traceparent: str | None,
) -> Headers:
    headers = [
        ("content-type", b"application/json"),
        ("ce_specversion", b"1.0"),
        ("ce_id", event_id.encode()),
        ("ce_source", _SOURCE),
        ("ce_type", EVENT_TYPES[model].encode()),
        ("ce_subject", str(key).encode()),
        ("ce_time", datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").encode()),
    ]
    if traceparent is not None:
        headers.append((TRACEPARENT, traceparent.encode()))
    return tuple(headers)
