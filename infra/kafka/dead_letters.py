"""Encoding of dead letters and their resolutions in the dead-letter topic.

The id of a dead letter is the position of its record, so a record that fails twice is one dead letter. Its resolution
is written to the same partition after it, so the topic alone determines which dead letters are open.
"""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from infra.kafka.codec import Undecodable, decode, header
from schemas.dead_letters import DEAD_LETTER_HEADERS, DEAD_LETTER_RESOLVED_TYPE, DeadLetterResolved
from schemas.documents import DocumentKey
from schemas.events import EVENT_TYPES, ChunkPlan, DocumentEvent, EventEnded, IndexChange, StreamMessage
from schemas.records import Headers, Record
from schemas.topics import CHUNKS, DEAD_LETTERS, DOCUMENTS, EVENT_ENDS, INDEX_CHANGES, MAX_RECORD_BYTES, Topic

ReadTopic = Callable[[Topic], AsyncIterator[Any]]
"""Reads all records of a topic up to its current end, in order within each partition."""

MAX_REASON_CHARS: Final = 2_000

_INPUT_TOPICS: Final = frozenset({DOCUMENTS.name, CHUNKS.name, INDEX_CHANGES.name, EVENT_ENDS.name})
"""Topics whose records can become dead letters."""

_MAX_KEY_BYTES: Final = 4_000
_MAX_HEADER_BYTES: Final = 50_000
"""Limits for keys and headers of foreign records, which may have any size. A dead letter must fit a record."""

_TOPIC, _PARTITION, _OFFSET, _CONNECTOR, _STAGE, _KIND, _MESSAGE = DEAD_LETTER_HEADERS


@dataclass(frozen=True, slots=True)
class DeadLetterRecord:
    """A dead letter in its topic.

    Attributes:
        topic: topic of the failed record.
        partition: partition of the failed record, and of the dead letter.
        offset: offset of the failed record.
        step: step that failed.
        kind: stable name of the failure.
        reason: description of the failure.
        dead_lettered_ms: epoch milliseconds of the failure.
        headers: headers of the record and of the failure.
        message: decoded message, or None if the record cannot be decoded.
    """

    topic: str
    partition: int
    offset: int
    step: str
    kind: str
    reason: str
    dead_lettered_ms: float
    key: bytes
    value: bytes
    headers: Headers
    message: StreamMessage | None

    @property
    def dead_letter_id(self) -> str:
        """Position of the failed record: ``TOPIC-PARTITION:OFFSET``."""
        return f"{self.topic}-{self.partition}:{self.offset}"

    @property
    def event(self) -> DocumentEvent | None:
        """The failed document event, if the record contains it."""
        match self.message:
            case DocumentEvent() as event:
                return event
            case ChunkPlan(event=event):
                return event
        return None

    @property
    def subject(self) -> DocumentEvent | IndexChange | EventEnded | None:
        """Part of the message with the ids of event and document, and the version; None if it cannot be decoded."""
        return self.message if isinstance(self.message, IndexChange | EventEnded) else self.event

    @property
    def document(self) -> DocumentKey | None:
        """Key of the document; None if the record cannot be decoded."""
        return None if self.subject is None else DocumentKey(self.subject.tenant, self.subject.document_id)

    @property
    def original_headers(self) -> Headers:
        """Headers of the failed record."""
        return tuple((name, value) for name, value in self.headers if name not in DEAD_LETTER_HEADERS)


def encode_dead_letter(record: Record, *, topic: Topic, offset: int, step: str, kind: str, reason: str) -> Record:
    """The dead letter of a failed record.

    Args:
        record: the record, with the partition from which it was read, and the dead-letter topic.
        topic: topic from which it was read.
        offset: its offset.
        step: step that failed.
        kind: stable name of the failure.
        reason: description of the failure.
    """
    values = (topic.name, str(record.partition), str(offset), "freshline", step, kind, reason[:MAX_REASON_CHARS])
    failure = tuple((name, text.encode()) for name, text in zip(DEAD_LETTER_HEADERS, values, strict=True))
    kept: list[tuple[str, bytes]] = []
    remaining_bytes = _MAX_HEADER_BYTES
    for name, value in record.headers:
        size = len(name.encode()) + len(value)
        if size <= remaining_bytes and name not in DEAD_LETTER_HEADERS:
            remaining_bytes -= size
            kept.append((name, value))
    # Truncated, because a dead letter that exceeds the size limit would block its partition.
    key, value = record.key[:_MAX_KEY_BYTES], record.value[:MAX_RECORD_BYTES]
    return Record(record.topic, key, value, (*kept, *failure), record.partition)


def encode_resolution(dead_letter: DeadLetterRecord, resolved: DeadLetterResolved) -> Record:
    """The record that resolves a dead letter."""
    headers = (("content-type", b"application/json"), ("ce_type", DEAD_LETTER_RESOLVED_TYPE.encode()))
    value = resolved.model_dump_json().encode()
    return Record(DEAD_LETTERS.name, dead_letter.key, value, headers, dead_letter.partition)


async def open_dead_letters(read: ReadTopic) -> list[DeadLetterRecord]:
    """Dead letters without a resolution, oldest of each partition first."""
    still_open: dict[str, DeadLetterRecord] = {}
    async for record in read(DEAD_LETTERS):
        if header(record.headers, "ce_type") == DEAD_LETTER_RESOLVED_TYPE and header(record.headers, _TOPIC) is None:
            still_open.pop(_resolved(record.value), None)
        elif (dead_letter := read_dead_letter(record)) is not None:
            # A repeated failure of a record is one dead letter. A failure after the resolution opens it again.
            still_open.setdefault(dead_letter.dead_letter_id, dead_letter)
    return list(still_open.values())


def read_dead_letter(record: Any) -> DeadLetterRecord | None:
    """The dead letter in a record of aiokafka; None if it is not one."""
    headers: Headers = tuple((name, value or b"") for name, value in record.headers)
    topic, offset = header(headers, _TOPIC), header(headers, _OFFSET)
    if topic not in _INPUT_TOPICS or offset is None or not offset.isdecimal():
        return None
    return DeadLetterRecord(
        topic=topic,
        partition=record.partition,
        offset=int(offset),
        step=header(headers, _STAGE) or "",
        kind=header(headers, _KIND) or "",
        reason=header(headers, _MESSAGE) or "",
        dead_lettered_ms=record.timestamp,
        key=record.key or b"",
        value=record.value or b"",
        headers=headers,
        message=_message(headers, record.value),
    )


def _message(headers: Headers, value: bytes | None) -> StreamMessage | None:
    declared = header(headers, "ce_type")
    for model in (DocumentEvent, ChunkPlan, IndexChange, EventEnded):
        if declared == EVENT_TYPES[model]:
            try:
                return decode(model, value, headers)
            except Undecodable:
                return None
    return None


def _resolved(value: bytes | None) -> str:
    try:
        return DeadLetterResolved.model_validate_json(value or b"").dead_letter_id
    except ValidationError:  # a foreign record
        return ""
