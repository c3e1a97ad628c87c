"""Error responses as RFC 9457 problem details."""

from enum import StrEnum
from typing import Final

from pydantic import Field

from schemas.models import Message

PROBLEM_MEDIA_TYPE: Final = "application/problem+json"


class ProblemType(StrEnum):
    """Stable problem names; the ``type`` member is ``/problems/NAME``."""

    INVALID_REQUEST = "invalid-request"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not-found"
    CONFLICT = "conflict"
    TOO_LARGE = "too-large"
    UNSUPPORTED_TYPE = "unsupported-type"
    RATE_LIMITED = "rate-limited"
    UNAVAILABLE = "unavailable"
    POSITION_NOT_REACHED = "position-not-reached"
    INTERNAL = "internal"


class InvalidField(Message):
    """An invalid field, with the reason or the limit."""

    field: str
    message: str


class Problem(Message):
    """The body of every error response."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    errors: tuple[InvalidField, ...] = ()
    retry_after_s: float | None = None
    as_of: dict[int, int] | None = Field(
        default=None, description="Current positions, if the requested position is not reached."
    )
