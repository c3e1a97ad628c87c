"""What a batch upload returns: one outcome for each line, in the order of the lines."""

from pydantic import Field

from schemas.documents import Accepted
from schemas.models import Message
from schemas.problems import Problem


class LineOutcome(Message):
    """What became of one line: exactly one of ``accepted`` and ``problem``."""

    line: int = Field(ge=1, description="Number of the line in the batch, from 1.")
    document_id: str | None = Field(default=None, description="Absent where the line does not tell.")
    accepted: Accepted | None = None
    problem: Problem | None = None


class BatchResponse(Message):
    """All outcomes. A batch has no outcome of its own: each line stands for itself."""

    accepted: int = Field(description="Lines whose event is in the stream.")
    refused: int = Field(description="Lines that changed nothing.")
    outcomes: tuple[LineOutcome, ...]
