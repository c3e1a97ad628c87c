"""Request bodies with a size limit."""

from collections.abc import AsyncGenerator
from http import HTTPStatus

from fastapi import Request

from infra.web.problems import ProblemRaised
from schemas.problems import InvalidField, ProblemType


async def limited_chunks(request: Request, limit_bytes: int) -> AsyncGenerator[bytes, None]:
    """Stream the body. Yields at most ``limit_bytes``; reads nothing if Content-Length exceeds the limit.

    Raises:
        ProblemRaised: the body exceeds the limit, or its size differs from Content-Length.
    """
    content_length = request.headers.get("content-length", "")
    declared_bytes = int(content_length) if content_length.isdecimal() else None
    if declared_bytes is not None and declared_bytes > limit_bytes:
        raise too_large(limit_bytes)
    received_bytes = 0
    async for chunk in request.stream():
        received_bytes += len(chunk)
        if received_bytes > limit_bytes:
            raise too_large(limit_bytes)
        yield chunk
    if declared_bytes is not None and received_bytes != declared_bytes:
        detail = (
            f"received {received_bytes:,} of {declared_bytes:,} bytes declared by Content-Length; retry the request"
        )
        raise ProblemRaised(ProblemType.INVALID_REQUEST, detail, status=HTTPStatus.BAD_REQUEST)


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """Read the whole body.

    Raises:
        ProblemRaised: see ``limited_chunks``.
    """
    return b"".join([chunk async for chunk in limited_chunks(request, limit_bytes)])


def too_large(limit_bytes: int, field: str = "body") -> ProblemRaised:
    """Problem of content that exceeds the limit."""
    message = f"exceeds the limit of {limit_bytes:,} bytes"
    error = InvalidField(field=field, message=message)
    return ProblemRaised(ProblemType.TOO_LARGE, f"{field}: {message}", errors=(error,))
