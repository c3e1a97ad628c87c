"""Dead letters as operators and content teams see them."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, StringConstraints

from schemas.models import Message
from schemas.positions import PositionText

LetterId = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9.-]{1,80}-[0-9]{1,6}:[0-9]{1,18}$"),
    Field(description="Where the record was read, `TOPIC-PARTITION:OFFSET`.", examples=["documents.v1-3:42"]),
]


class Resolution(StrEnum):
    """What was done about a dead letter."""

    REPLAYED = "replayed"
    DROPPED = "dropped"


class LetterResolved(Message):
    """A dead letter was dealt with. Topic ``dead-letters.v1``, in the partition of the letter."""

    letter_id: LetterId
    resolution: Resolution
    at_ms: float = Field(description="Epoch milliseconds.")


class DeadLetter(Message):
    """A record that a step gave up on, and that nobody has dealt with yet."""

    letter_id: LetterId
    step: str = Field(description="The step that gave up.")
    kind: str = Field(description="Short stable name of the failure.")
    reason: str
    parked_ms: float = Field(description="Epoch milliseconds at which it was given up.")
    size_bytes: int
    document_id: str | None = Field(default=None, description="Absent where the record cannot be decoded.")
    event_id: str | None = None
    version: int | None = None


class DeadLetters(Message):
    """Dead letters that wait to be dealt with; the counts are of all of them, whatever part is listed."""

    total: int
    by_kind: dict[str, int]
    by_step: dict[str, int]
    letters: tuple[DeadLetter, ...] = Field(description="The oldest of each partition first.")


class DeadLetterContent(Message):
    """A dead letter with what it holds."""

    letter: DeadLetter
    headers: dict[str, str] = Field(description="As the record had them, with those that say what happened.")
    value: str = Field(description="The record's value as text, cut where it is long.")
    cut: bool = Field(description="Whether the value is longer than is shown.")


class Replayed(Message):
    """What became of a dead letter that was sent once more."""

    letter_id: LetterId
    event_id: str | None = Field(default=None, description="The new event; absent where the record went as it was.")
    position: PositionText | None = Field(default=None, description="Of the new event.")


LETTER_RESOLVED_TYPE: Final = "freshline.dead-letter.resolved.v1"
"""CloudEvents ``type`` of ``LetterResolved``."""

DEAD_LETTER_HEADERS: Final[Mapping[str, str]] = {
    "__connect.errors.topic": "Topic of the record.",
    "__connect.errors.partition": "Its partition.",
    "__connect.errors.offset": "Its offset.",
    "__connect.errors.connector.name": "Always `freshline`.",
    "__connect.errors.stage": "The step that gave up.",
    "__connect.errors.exception.class.name": "Short stable name of the failure.",
    "__connect.errors.exception.message": "What was wrong, for people.",
}
"""Headers that a dead letter has beside those of its record, as Kafka Connect names them."""
