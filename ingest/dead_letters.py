"""Dead-letter queue: list, replay and drop."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

from infra.kafka.dead_letters import DeadLetterRecord, ReadTopic, encode_resolution, open_dead_letters
from infra.kafka.port import Producer
from ingest.event_log import EventLog
from schemas.dead_letters import DeadLetter, DeadLetterContent, DeadLetterResolved, DeadLetters, Replayed, Resolution
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
            dead_letter
            for dead_letter in await open_dead_letters(self._read)
            if (tenant is None or (dead_letter.document is not None and dead_letter.document.tenant == tenant))
            and (kind is None or dead_letter.kind == kind)
        ]

    async def find(self, dead_letter_id: str, *, tenant: str | None = None) -> DeadLetterRecord:
        """An open dead letter.

        Raises:
            NoSuchDeadLetter: none has this id.
        """
        for dead_letter in await self.open(tenant=tenant):
            if dead_letter.dead_letter_id == dead_letter_id:
                return dead_letter
        raise NoSuchDeadLetter(f"no open dead letter {dead_letter_id}")

    async def replay(self, dead_letter: DeadLetterRecord) -> Replayed:
        """Replay a dead letter and close it. Idempotent: a crash between the two leaves it open.

        A document event is republished as a new event of the same version, and superseded if the document has a newer
        version. Other records, and undecodable ones, are sent unchanged to their topic.

        Raises:
            StreamUnavailable: not acknowledged.
        """
        if dead_letter.event is not None:
            accepted = await self._event_log.republish(dead_letter.event)
            replayed = Replayed(
                dead_letter_id=dead_letter.dead_letter_id, event_id=accepted.event_id, position=accepted.position
            )
        else:
            record = Record(
                dead_letter.topic,
                dead_letter.key,
                dead_letter.value,
                dead_letter.original_headers,
                dead_letter.partition,
            )
            await self._producer.send(record)
            replayed = Replayed(dead_letter_id=dead_letter.dead_letter_id)
        await self._close(dead_letter, Resolution.REPLAYED)
        return replayed

    async def drop(self, dead_letter: DeadLetterRecord) -> None:
        """Close a dead letter without replaying it.

        Raises:
            StreamUnavailable: not acknowledged.
        """
        await self._close(dead_letter, Resolution.DROPPED)

    async def _close(self, dead_letter: DeadLetterRecord, resolution: Resolution) -> None:
        resolved = DeadLetterResolved(
            dead_letter_id=dead_letter.dead_letter_id, resolution=resolution, at_ms=time.time() * 1000
        )
        await self._producer.send(encode_resolution(dead_letter, resolved))


def listed(dead_letters: Sequence[DeadLetterRecord], limit: int) -> DeadLetters:
    """Counts of all dead letters, and the first ``limit`` of them."""
    return DeadLetters(
        total=len(dead_letters),
        by_kind=dict(Counter(dead_letter.kind for dead_letter in dead_letters)),
        by_step=dict(Counter(dead_letter.step for dead_letter in dead_letters)),
        dead_letters=tuple(described(dead_letter) for dead_letter in dead_letters[:limit]),
    )


def described(dead_letter: DeadLetterRecord) -> DeadLetter:
    """A dead letter without its content."""
    subject = dead_letter.subject
    return DeadLetter(
        dead_letter_id=dead_letter.dead_letter_id,
        step=dead_letter.step,
        kind=dead_letter.kind,
        reason=dead_letter.reason,
        dead_lettered_ms=dead_letter.dead_lettered_ms,
        size_bytes=len(dead_letter.value),
        document_id=dead_letter.document.document_id if dead_letter.document else None,
        event_id=subject.event_id if subject else None,
        version=subject.version if subject else None,
    )


def shown(dead_letter: DeadLetterRecord) -> DeadLetterContent:
    """A dead letter with its content as text."""
    text = dead_letter.value.decode("utf-8", "replace")
    return DeadLetterContent(
        dead_letter=described(dead_letter),
        headers={name: value.decode("utf-8", "replace") for name, value in dead_letter.headers},
        value=text[:MAX_SHOWN_CHARS],
        cut=len(text) > MAX_SHOWN_CHARS,
    )
