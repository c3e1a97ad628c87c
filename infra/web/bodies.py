"""Reading request bodies that may be larger than anybody wants."""

from collections.abc import AsyncGenerator
from http import HTTPStatus

from fastapi import Request

from infra.web.problems import ProblemRaised
from schemas.problems import InvalidField, ProblemType


async def limited_chunks(request: Request, limit_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body as it arrives. Never yields more than ``limit_bytes``, and reads nothing where more is declared.

    Raises:
        ProblemRaised: the body is larger, by its own word or by what came; or it has not as many bytes as it declared.
    """
    content_length = request.headers.get("content-length", "")
    declared_bytes = int(content_length) if content_length.isdecimal() else None
    if declared_bytes is not None and declared_bytes > limit_bytes:
        raise too_large(limit_bytes)
    taken_bytes = 0
    async for chunk in request.stream():
        taken_bytes += len(chunk)
        if taken_bytes > limit_bytes:
            raise too_large(limit_bytes)
        yield chunk
    if declared_bytes is not None and taken_bytes != declared_bytes:
        detail = f"{taken_bytes:,} bytes of the body came and Content-Length says {declared_bytes:,}; send it again"
        raise ProblemRaised(ProblemType.INVALID_REQUEST, detail, status=HTTPStatus.BAD_REQUEST)


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body.

    Raises:
        ProblemRaised: see ``limited_chunks``.
    """
    return b"".join([chunk async for chunk in limited_chunks(request, limit_bytes)])


def too_large(limit_bytes: int, field: str = "body") -> ProblemRaised:
    """The problem of content beyond the limit."""
    message = f"at most {limit_bytes:,} bytes are taken"
    error = InvalidField(field=field, message=message)
    return ProblemRaised(ProblemType.TOO_LARGE, f"{field}: {message}", errors=(error,))
