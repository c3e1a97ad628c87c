"""Dead letters: requests and responses."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, StringConstraints

from schemas.models import Message
from schemas.positions import PositionText

DeadLetterId = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9.-]{1,80}-[0-9]{1,6}:[0-9]{1,18}$"),
    Field(description="Position of the failed record: `TOPIC-PARTITION:OFFSET`.", examples=["documents.v1-3:42"]),
]


class Resolution(StrEnum):
    """How a dead letter was closed."""

    REPLAYED = "replayed"
    DROPPED = "dropped"


class DeadLetterResolved(Message):
    """A dead letter was closed. Topic ``dead-letters.v1``, in the partition of the dead letter."""

    dead_letter_id: DeadLetterId
    resolution: Resolution
    at_ms: float = Field(description="Epoch milliseconds.")


class DeadLetter(Message):
    """An open dead letter: a record that a step could not process."""

    dead_letter_id: DeadLetterId
    step: str = Field(description="Step that failed.")
    kind: str = Field(description="Stable name of the failure.")
    reason: str
    dead_lettered_ms: float = Field(description="Epoch milliseconds of the failure.")
    size_bytes: int
    document_id: str | None = Field(default=None, description="Null if the record cannot be decoded.")
    event_id: str | None = None
    version: int | None = None


class DeadLetters(Message):
    """Open dead letters. The counts include those that are not listed."""

    total: int
    by_kind: dict[str, int]
    by_step: dict[str, int]
    dead_letters: tuple[DeadLetter, ...] = Field(description="Oldest of each partition first.")


class DeadLetterContent(Message):
    """A dead letter with its content."""

    dead_letter: DeadLetter
    headers: dict[str, str] = Field(description="Headers of the record, with those that describe the failure.")
    value: str = Field(description="Value of the record as text, truncated if long.")
    cut: bool = Field(description="Whether the value is truncated.")


class Replayed(Message):
    """Result of a replay."""

    dead_letter_id: DeadLetterId
    event_id: str | None = Field(
        default=None, description="Id of the new event. Null if the record was sent unchanged."
    )
    position: PositionText | None = Field(default=None, description="Position of the new event.")


DEAD_LETTER_RESOLVED_TYPE: Final = "freshline.dead-letter.resolved.v1"
"""CloudEvents ``type`` of ``DeadLetterResolved``."""

DEAD_LETTER_HEADERS: Final[Mapping[str, str]] = {
    "__connect.errors.topic": "Topic of the record.",
    "__connect.errors.partition": "Its partition.",
    "__connect.errors.offset": "Its offset.",
    "__connect.errors.connector.name": "Always `freshline`.",
    "__connect.errors.stage": "Step that failed.",
    "__connect.errors.exception.class.name": "Stable name of the failure.",
    "__connect.errors.exception.message": "Error message.",
}
"""Headers of a dead letter besides those of its record, with the names of Kafka Connect."""
