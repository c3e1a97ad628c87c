"""Dead letters in their topic: how they are written, and which of them are still open.

A dead_letter is named by where its record was read, so that a record that was given up twice is one dead letter. What is done
about it is written behind it, in the same partition: the topic alone tells what is open, whoever reads it.
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
"""All records of a topic up to its present end, those of a partition in their order."""

MAX_REASON_CHARS: Final = 2_000

_READ: Final = frozenset({DOCUMENTS.name, CHUNKS.name, INDEX_CHANGES.name, EVENT_ENDS.name})
"""Topics whose records can become dead letters."""

_MAX_KEY_BYTES: Final = 4_000
_MAX_HEADER_BYTES: Final = 50_000
"""A stranger's key and headers may be of any size. Ours are far smaller, and a dead letter must fit a record."""

_TOPIC, _PARTITION, _OFFSET, _CONNECTOR, _STAGE, _KIND, _MESSAGE = DEAD_LETTER_HEADERS


@dataclass(frozen=True, slots=True)
class DeadLetterRecord:
    """A dead letter as it lies in its topic.

    Attributes:
        topic: where its record was read.
        partition: of that topic and of this one.
        offset: in that topic.
        step: that gave up.
        kind: short stable name of the failure.
        reason: for people.
        dead_lettered_ms: when it was given up.
        headers: the record's own and those of the failure.
        message: what the record says, or None where it cannot be decoded.
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
        """Its name."""
        return f"{self.topic}-{self.partition}:{self.offset}"

    @property
    def event(self) -> DocumentEvent | None:
        """The document event that was given up, where the record holds it."""
        match self.message:
            case DocumentEvent() as event:
                return event
            case ChunkPlan(event=event):
                return event
        return None

    @property
    def subject(self) -> DocumentEvent | IndexChange | EventEnded | None:
        """What of the record names event, document and version; None where it cannot be decoded."""
        return self.message if isinstance(self.message, IndexChange | EventEnded) else self.event

    @property
    def document(self) -> DocumentKey | None:
        """The document it is of, as far as that is certain."""
        return None if self.subject is None else DocumentKey(self.subject.tenant, self.subject.document_id)

    @property
    def original_headers(self) -> Headers:
        """Those that its record had."""
        return tuple((name, value) for name, value in self.headers if name not in DEAD_LETTER_HEADERS)


def encode_dead_letter(record: Record, *, topic: Topic, offset: int, step: str, kind: str, reason: str) -> Record:
    """The dead letter of a record that is given up.

    Args:
        record: as it was read, with the partition it was read from; its topic is that of the dead letters.
        topic: where it was read.
        offset: where in its partition.
        step: that gives up.
        kind: short stable name of the failure.
        reason: for people.
    """
    told = (topic.name, str(record.partition), str(offset), "freshline", step, kind, reason[:MAX_REASON_CHARS])
    about = tuple((name, text.encode()) for name, text in zip(DEAD_LETTER_HEADERS, told, strict=True))
    kept: list[tuple[str, bytes]] = []
    room = _MAX_HEADER_BYTES
    for name, value in record.headers:
        size = len(name.encode()) + len(value)
        if size <= room and name not in DEAD_LETTER_HEADERS:
            room -= size
            kept.append((name, value))
    # Better cut than in the way for ever.
    key, value = record.key[:_MAX_KEY_BYTES], record.value[:MAX_RECORD_BYTES]
    return Record(record.topic, key, value, (*kept, *about), record.partition)


def encode_resolution(dead_letter: DeadLetterRecord, resolved: DeadLetterResolved) -> Record:
    """The record that closes a dead letter."""
    headers = (("content-type", b"application/json"), ("ce_type", DEAD_LETTER_RESOLVED_TYPE.encode()))
    value = resolved.model_dump_json().encode()
    return Record(DEAD_LETTERS.name, dead_letter.key, value, headers, dead_letter.partition)


async def open_dead_letters(read: ReadTopic) -> list[DeadLetterRecord]:
    """Letters that nobody has dealt with, those of a partition in the order in which they were given up."""
    still_open: dict[str, DeadLetterRecord] = {}
    async for record in read(DEAD_LETTERS):
        if header(record.headers, "ce_type") == DEAD_LETTER_RESOLVED_TYPE and header(record.headers, _TOPIC) is None:
            still_open.pop(_resolved(record.value), None)
        elif (dead_letter := read_dead_letter(record)) is not None:
            # Given up twice is one dead letter; given up once more after it was dealt with is open again.
            still_open.setdefault(dead_letter.dead_letter_id, dead_letter)
    return list(still_open.values())


def read_dead_letter(record: Any) -> DeadLetterRecord | None:
    """The dead letter in a record of aiokafka's; None where it is none."""
    headers: Headers = tuple((name, value or b"") for name, value in record.headers)
    topic, offset = header(headers, _TOPIC), header(headers, _OFFSET)
    if topic not in _READ or offset is None or not offset.isdecimal():
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
    except ValidationError:  # a stranger's
        return ""
