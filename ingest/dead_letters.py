"""What operators and content teams do about dead letters: look, send again, give up for good."""

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
    """No open dead letter has this name."""


class DeadLetterQueue:
    """The open dead letters of an installation.

    Args:
        read: reads a topic.
        producer: of what is sent again, and of what is closed.
        placing: of events that are sent again.
    """

    def __init__(self, read: ReadTopic, producer: Producer, placing: EventLog) -> None:
        self._read = read
        self._producer = producer
        self._placing = placing

    async def open(self, *, tenant: str | None = None, kind: str | None = None) -> list[DeadLetterRecord]:
        """All open letters, of a tenant or a kind where one is named. A tenant sees none that cannot be decoded."""
        return [
            letter
            for letter in await open_letters(self._read)
            if (tenant is None or (letter.document is not None and letter.document.tenant == tenant))
            and (kind is None or letter.kind == kind)
        ]

    async def find(self, letter_id: str, *, tenant: str | None = None) -> DeadLetterRecord:
        """One open letter.

        Raises:
            NoSuchDeadLetter: see there.
        """
        for letter in await self.open(tenant=tenant):
            if letter.letter_id == letter_id:
                return letter
        raise NoSuchDeadLetter(f"there is no open dead letter {letter_id}")

    async def replay(self, letter: DeadLetterRecord) -> Replayed:
        """Send it once more and close it. A stop between the two leaves it open, and sending it again is harmless.

        An event begins its way anew, as a new event of the same version: where the document has moved on, it is
        superseded. What is no document event, or cannot be decoded, goes as it was to where it came from.

        Raises:
            StreamUnavailable: it was not acknowledged.
        """
        if letter.event is not None:
            accepted = await self._placing.republish(letter.event)
            done = Replayed(letter_id=letter.letter_id, event_id=accepted.event_id, position=accepted.position)
        else:
            again = Record(letter.topic, letter.key, letter.value, letter.original_headers, letter.partition)
            await self._producer.send(again)
            done = Replayed(letter_id=letter.letter_id)
        await self._close(letter, Resolution.REPLAYED)
        return done

    async def drop(self, letter: DeadLetterRecord) -> None:
        """Close it, and do nothing else: its document stays as it is.

        Raises:
            StreamUnavailable: it was not acknowledged.
        """
        await self._close(letter, Resolution.DROPPED)

    async def _close(self, letter: DeadLetterRecord, resolution: Resolution) -> None:
        resolved = LetterResolved(letter_id=letter.letter_id, resolution=resolution, at_ms=time.time() * 1000)
        await self._producer.send(encode_resolution(letter, resolved))


def listed(letters: Sequence[DeadLetterRecord], limit: int) -> DeadLetters:
    """The counts of all letters, and the first of them."""
    return DeadLetters(
        total=len(letters),
        by_kind=dict(Counter(letter.kind for letter in letters)),
        by_step=dict(Counter(letter.step for letter in letters)),
        letters=tuple(told(letter) for letter in letters[:limit]),
    )


def told(letter: DeadLetterRecord) -> DeadLetter:
    """A letter without its content."""
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
    """A letter with its content, as text."""
    text = letter.value.decode("utf-8", "replace")
    return DeadLetterContent(
        letter=told(letter),
        headers={name: value.decode("utf-8", "replace") for name, value in letter.headers},
        value=text[:MAX_SHOWN_CHARS],
        cut=len(text) > MAX_SHOWN_CHARS,
    )
