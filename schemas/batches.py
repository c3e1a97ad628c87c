"""Response of a batch upload: one outcome per line, in order."""

from pydantic import Field

from schemas.documents import Accepted
from schemas.models import Message
from schemas.problems import Problem


class LineOutcome(Message):
    """Outcome of a line: either ``accepted`` or ``problem``."""

    line: int = Field(ge=1, description="Number of the line in the batch, from 1.")
    document_id: str | None = Field(default=None, description="Null if the line has no valid id.")
    accepted: Accepted | None = None
    problem: Problem | None = None


class BatchResponse(Message):
    """Outcomes of all lines. Lines are independent of each other."""

    accepted: int = Field(description="Number of lines whose event is in the stream.")
    rejected: int = Field(description="Number of lines without effect.")
    outcomes: tuple[LineOutcome, ...]
