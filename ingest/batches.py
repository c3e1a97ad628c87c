"""Batch uploads: NDJSON requests with one outcome per line."""

import base64
import binascii
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from fastapi import Request
from pydantic import ValidationError

from infra.web.bodies import limited_chunks, too_large
from infra.web.problems import ProblemRaised, as_problem, invalid, invalid_fields
from ingest.accept import Acceptance
from ingest.core.changes import DocumentRequest, Removal, Upload
from ingest.uploads import checked_content, content_type_or_problem, text_content_type
from schemas.batches import LineOutcome
from schemas.documents import Accepted, BatchItem, DocumentAttributes
from schemas.problems import InvalidField, ProblemType

NDJSON: Final = "application/x-ndjson"
_CONTENT_FIELDS: Final = ("text", "content_b64", "deleted")


@dataclass(frozen=True, slots=True)
class Line:
    """A parsed line of a batch: a request or a problem.

    Attributes:
        number: line number from 1; blank lines count.
    """

    number: int
    document_id: str | None
    request: DocumentRequest | ProblemRaised


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Limits of a batch.

    Attributes:
        max_bytes: size of the body.
        max_items: number of lines that are not blank.
        max_content_bytes: content size of a line.
    """

    max_bytes: int
    max_items: int
    max_content_bytes: int


async def read_batch(request: Request, limits: BatchLimits) -> list[Line]:
    """Read the whole batch before any event is accepted, so that a batch that exceeds a limit has no effect.

    Raises:
        ProblemRaised: not NDJSON, or a limit of the batch is exceeded. Problems of a line are in its ``request``.
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared != NDJSON:
        detail = f"send one JSON object per line as {NDJSON}, not {declared or 'without a content type'}"
        raise ProblemRaised(ProblemType.UNSUPPORTED_TYPE, detail)
    lines: list[Line] = []
    number = 0
    async for text in _split(request, limits.max_bytes):
        number += 1
        if text.isspace() or not text:
            continue
        if len(lines) == limits.max_items:
            message = f"exceeds the limit of {limits.max_items:,} lines; send several batches"
            error = InvalidField(field="body", message=message)
            raise ProblemRaised(ProblemType.TOO_LARGE, f"body: {message}", errors=(error,))
        lines.append(read_line(number, text, limits.max_content_bytes))
    return lines


def read_line(number: int, text: bytes, max_content_bytes: int) -> Line:
    """Parse a line."""
    try:
        item = BatchItem.model_validate_json(text)
    except ValidationError as error:
        fields = invalid_fields(error.errors(include_url=False))
        return Line(number, None, invalid("the line has invalid fields", fields))
    try:
        return Line(number, item.document_id, _request(item, max_content_bytes))
    except ProblemRaised as problem:
        return Line(number, item.document_id, problem)


async def accept_batch(
    acceptance: Acceptance, tenant: str, lines: list[Line], traceparent: str | None = None
) -> list[LineOutcome]:
    """Accept the valid lines; returns an outcome for each line, in order."""
    readable = [line.request for line in lines if not isinstance(line.request, ProblemRaised)]
    accepted = iter(await acceptance.accept_many(tenant, readable, traceparent))
    return [
        _outcome(line, line.request if isinstance(line.request, ProblemRaised) else next(accepted)) for line in lines
    ]


def _outcome(line: Line, result: Accepted | Exception) -> LineOutcome:
    if isinstance(result, Accepted):
        return LineOutcome(line=line.number, document_id=line.document_id, accepted=result)
    return LineOutcome(line=line.number, document_id=line.document_id, problem=as_problem(result))


def _request(item: BatchItem, max_content_bytes: int) -> DocumentRequest:
    present = [name for name in _CONTENT_FIELDS if getattr(item, name) not in {None, False}]
    if len(present) != 1:
        message = f"exactly one of {', '.join(_CONTENT_FIELDS)} is required"
        fields = [InvalidField(field=name, message=message) for name in present or _CONTENT_FIELDS]
        raise invalid("the line has invalid fields", fields)
    if item.deleted and item.empty:
        fields = [InvalidField(field="empty", message="applies to uploads, not to deletions")]
        raise invalid("the line has invalid fields", fields)
    if item.deleted:
        return Removal(item.document_id, item.revision, item.connector, item.take_over)
    content = item.text.encode() if item.text is not None else _decoded(item.content_b64 or "")
    if len(content) > max_content_bytes:
        raise too_large(max_content_bytes, present[0])
    name = item.file_name or item.document_id
    if item.text is not None:
        content_type = text_content_type(item.content_type or "text/markdown", name)
    else:
        content_type = content_type_or_problem(item.content_type, name, "content_type")
    attributes = DocumentAttributes.model_construct(
        title=item.title,
        source=item.source,
        groups=item.groups,
        metadata=item.metadata,
        revision=item.revision,
        connector=item.connector,
        take_over=item.take_over,
    )
    upload = Upload(item.document_id, content, content_type, attributes, item.file_name)
    return checked_content(upload, empty=item.empty, how='`"empty": true`')


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        field = InvalidField(field="content_b64", message=f"must be standard base64: {error}")
        raise invalid("the line has invalid fields", [field]) from None


async def _split(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """Stream the lines; the last may end without a line break."""
    pieces: list[bytes] = []
    async for chunk in limited_chunks(request, max_bytes):
        first, *rest = chunk.split(b"\n")
        pieces.append(first)
        for piece in rest:
            yield b"".join(pieces)
            pieces = [piece]
    yield b"".join(pieces)
