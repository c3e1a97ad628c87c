"""Dead-letter queue: list, replay and drop."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from infra.kafka.dead_letters import DeadLetterRecord, ReadTopic, encode_resolution, open_letters
from infra.kafka.port import Producer
from ingest.event_log import EventLog
from schemas.dead_letters import DeadLetter, DeadLetterContent, DeadLetters, LetterResolved, Replayed, Resolution
from schemas.records import Record

MAX_SHOWN_CHARS: Final = 20_000


class NoSuchDeadLetter(LookupError):
    """No open dead letter has this id."""


class DeadLetterQueue:
    """The open dead letters of an installation.

    Args:
        read: reads a topic.
        producer: sends replayed records and resolutions.
        event_log: republishes document events.
    """

    def __init__(self, read: ReadTopic, producer: Producer, event_log: EventLog) -> None:
        self._read = read
        self._producer = producer
        self._event_log = event_log

    async def open(self, *, tenant: str | None = None, kind: str | None = None) -> list[DeadLetterRecord]:
        """Open dead letters, optionally of one tenant or kind. Undecodable records have no tenant."""
        return [
            letter
            for letter in await open_letters(self._read)
            if (tenant is None or (letter.document is not None and letter.document.tenant == tenant))
            and (kind is None or letter.kind == kind)
        ]

    async def find(self, letter_id: str, *, tenant: str | None = None) -> DeadLetterRecord:
        """An open dead letter.

        Raises:
            NoSuchDeadLetter: none has this id.
        """
        for letter in await self.open(tenant=tenant):
            if letter.letter_id == letter_id:
                return letter
        raise NoSuchDeadLetter(f"no open dead letter {letter_id}")

    async def replay(self, letter: DeadLetterRecord) -> Replayed:
        """Replay a dead letter and close it. Idempotent: a crash between the two leaves it open.

        A document event is republished as a new event of the same version, and superseded if the document has a newer
        version. Other records, and undecodable ones, are sent unchanged to their topic.

        Raises:
            StreamUnavailable: not acknowledged.
        """
        if letter.event is not None:
            accepted = await self._event_log.republish(letter.event)
            replayed = Replayed(letter_id=letter.letter_id, event_id=accepted.event_id, position=accepted.position)
        else:
            record = Record(letter.topic, letter.key, letter.value, letter.original_headers, letter.partition)
            await self._producer.send(record)
            replayed = Replayed(letter_id=letter.letter_id)
        await self._close(letter, Resolution.REPLAYED)
        return replayed

    async def drop(self, letter: DeadLetterRecord) -> None:
        """Close a dead letter without replaying it.

        Raises:
            StreamUnavailable: not acknowledged.
        """
        await self._close(letter, Resolution.DROPPED)

    async def _close(self, letter: DeadLetterRecord, resolution: Resolution) -> None:
        resolved = LetterResolved(letter_id=letter.letter_id, resolution=resolution, at_ms=time.time() * 1000)
        await self._producer.send(encode_resolution(letter, resolved))


def listed(letters: Sequence[DeadLetterRecord], limit: int) -> DeadLetters:
    """Counts of all dead letters, and the first ``limit`` of them."""
    return DeadLetters(
        total=len(letters),
        by_kind=dict(Counter(letter.kind for letter in letters)),
        by_step=dict(Counter(letter.step for letter in letters)),
        letters=tuple(described(letter) for letter in letters[:limit]),
    )


def described(letter: DeadLetterRecord) -> DeadLetter:
    """A dead letter without its content."""
    subject = letter.subject
    return DeadLetter(
        letter_id=letter.letter_id,
        step=letter.step,
        kind=letter.kind,
        reason=letter.reason,
        parked_ms=letter.parked_ms,
        size_bytes=len(letter.value),
        document_id=letter.document.document_id if letter.document else None,
        event_id=subject.event_id if subject else None,
        version=subject.version if subject else None,
    )


def shown(letter: DeadLetterRecord) -> DeadLetterContent:
    """A dead letter with its content as text."""
    text = letter.value.decode("utf-8", "replace")
    return DeadLetterContent(
        letter=described(letter),
        headers={name: value.decode("utf-8", "replace") for name, value in letter.headers},
        value=text[:MAX_SHOWN_CHARS],
        cut=len(text) > MAX_SHOWN_CHARS,
    )
