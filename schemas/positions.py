"""Positions in the document stream: the freshness tokens that people hold, and what an answer is true for."""

import re
from typing import Annotated, Final, NamedTuple, Self

from pydantic import AfterValidator, Field

from schemas.models import Message
from schemas.topics import DOCUMENTS

_POSITION: Final = re.compile(re.escape(DOCUMENTS.name) + r"-(\d{1,6}):(\d{1,18})")


class Position(NamedTuple):
    """The place of one event in the document topic. Written ``documents.v1-PARTITION:OFFSET``."""

    partition: int
    offset: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a written position.

        Raises:
            ValueError: the text is no position.
        """
        match = _POSITION.fullmatch(text)
        if not match:
            raise ValueError(f"a position looks like {DOCUMENTS.name}-3:42, not {text[:60]!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{DOCUMENTS.name}-{self.partition}:{self.offset}"


def _check_position(text: str) -> str:
    Position.parse(text)
    return text


PositionText = Annotated[
    str,
    AfterValidator(_check_position),
    Field(description="Freshness token: a place in the document stream.", examples=[f"{DOCUMENTS.name}-3:42"]),
]


class AsOf(Message):
    """What an answer is true for.

    Every change of the tenant at or before these offsets is reflected in the answer; later ones may be.
    """

    positions: dict[int, int] = Field(description="Partition of the document stream → last offset reflected.")
    checked_ms: float = Field(description="Every change applied before this moment is among them; epoch milliseconds.")

    def covers(self, position: Position) -> bool:
        """True if the event at ``position`` is reflected."""
        return self.positions.get(position.partition, -1) >= position.offset
