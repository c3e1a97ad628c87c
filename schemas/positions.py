"""Positions in the document stream: freshness tokens, and the positions that an answer reflects."""

import re
from typing import Annotated, Final, NamedTuple, Self

from pydantic import AfterValidator, Field

from schemas.models import Message
from schemas.topics import DOCUMENTS

_POSITION: Final = re.compile(re.escape(DOCUMENTS.name) + r"-(\d{1,6}):(\d{1,18})")


class Position(NamedTuple):
    """Position of an event in the document topic. Text form: ``documents.v1-PARTITION:OFFSET``."""

    partition: int
    offset: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the text form.

        Raises:
            ValueError: the text is not a position.
        """
        match = _POSITION.fullmatch(text)
        if not match:
            raise ValueError(f"{text[:60]!r} is not a position such as {DOCUMENTS.name}-3:42")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{DOCUMENTS.name}-{self.partition}:{self.offset}"


def _check_position(text: str) -> str:
    Position.parse(text)
    return text


PositionText = Annotated[
    str,
    AfterValidator(_check_position),
    Field(description="Freshness token: a position in the document stream.", examples=[f"{DOCUMENTS.name}-3:42"]),
]


class AsOf(Message):
    """Positions that an answer reflects.

    The answer reflects every change of the tenant at or before these offsets. It may reflect later ones.
    """

    positions: dict[int, int] = Field(description="Partition of the document stream → last offset reflected.")
    checked_ms: float = Field(description="Epoch milliseconds. Every change applied before is included.")

    def covers(self, position: Position) -> bool:
        """Whether the event at ``position`` is reflected."""
        return self.positions.get(position.partition, -1) >= position.offset
