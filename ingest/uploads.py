"""Parsing of uploads: a raw body, JSON with the text, or a form with a file."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Final

import orjson
from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from infra.web.bodies import limited_chunks, read_body, too_large
from infra.web.problems import ProblemRaised, invalid, invalid_fields
from ingest.core.attributes import FIELDS, as_attributes, from_headers, header_name
from ingest.core.changes import Upload
from ingest.core.content import UnknownCharset, UnsupportedType, choose_content_type
from schemas.content_types import BINARY_TYPES
from schemas.documents import DocumentAttributes, DocumentText
from schemas.problems import InvalidField, ProblemType

ATTRIBUTES_BYTES: Final = 500_000
"""Allowance besides the content, for attributes at their limits and form boundaries."""

_JSON_GROWTH: Final = 2
"""Maximum ratio of JSON-escaped text to its UTF-8."""


async def read_upload(request: Request, document_id: str, *, max_bytes: int) -> Upload:
    """Read an upload; ``max_bytes`` limits its content.

    Raises:
        ProblemRaised: too large, of an unsupported type, or with an invalid attribute.
    """
    declared = request.headers.get("content-type", "")
    media_type = declared.partition(";")[0].strip().lower()
    if media_type == "application/json":
        return await _from_json(request, document_id, max_bytes)
    if media_type == "multipart/form-data":
        return await _from_form(request, document_id, max_bytes)
    texts = from_headers(request.headers)
    attributes = _attributes(texts, names={field: header_name(field) for field in FIELDS})
    # Before the body, so that an unsupported upload is rejected before it is transferred.
    content_type = content_type_or_problem(declared, texts.get("file_name") or document_id, "Content-Type")
    content = await read_body(request, max_bytes)
    return Upload(document_id, content, content_type, attributes, texts.get("file_name"))


def checked_content(upload: Upload, *, empty: bool, how: str) -> Upload:
    """Check that an upload is empty if and only if it is declared empty.

    A truncated body would otherwise remove all passages of the document.

    Args:
        upload: the upload.
        empty: the upload is declared empty.
        how: how to declare it, for the message.

    Raises:
        ProblemRaised: empty without the declaration, or the reverse.
    """
    if bool(upload.content) is not empty:
        return upload
    message = (
        f"{how} declares an empty document, but the request has content: omit it"
        if empty
        else f"no content; declare an empty document with {how}, or delete the document"
    )
    raise invalid("the content does not match its declaration", [InvalidField(field="body", message=message)])


def content_type_or_problem(declared: str | None, file_name: str | None, field: str) -> str:
    """Content type of an upload, with charset.

    Args:
        declared: declared Content-Type.
        file_name: file name, or another name with a suffix.
        field: field that contained ``declared``, for the problem.

    Raises:
        ProblemRaised: unsupported type, or unknown charset.
    """
    try:
        return choose_content_type(declared, file_name)
    except UnsupportedType as error:
        raise ProblemRaised(ProblemType.UNSUPPORTED_TYPE, str(error)) from None
    except UnknownCharset as error:
        raise invalid("the declared charset is unknown", [InvalidField(field=field, message=str(error))]) from None


def text_content_type(declared: str, file_name: str | None) -> str:
    """Content type of text in JSON: as declared, with UTF-8, in which it is stored.

    Raises:
        ProblemRaised: see ``content_type_or_problem``.
    """
    media_type = content_type_or_problem(declared, file_name, "content_type").partition(";")[0]
    return media_type if media_type in BINARY_TYPES else f"{media_type}; charset=utf-8"


async def _from_json(request: Request, document_id: str, max_bytes: int) -> Upload:
    body = await read_body(request, _JSON_GROWTH * max_bytes + ATTRIBUTES_BYTES)
    try:
        document = DocumentText.model_validate_json(body)
    except ValidationError as error:
        raise invalid("the document has invalid fields", invalid_fields(error.errors(include_url=False))) from None
    content = document.text.encode()
    if len(content) > max_bytes:
        raise too_large(max_bytes, "text")
    content_type = text_content_type(document.content_type, None)
    attributes = DocumentAttributes.model_construct(
        title=document.title,
        source=document.source,
        groups=document.groups,
        metadata=document.metadata,
        revision=document.revision,
        connector=document.connector,
        take_over=document.take_over,
    )
    return Upload(document_id, content, content_type, attributes)


async def _from_form(request: Request, document_id: str, max_bytes: int) -> Upload:
    async with aclosing(_form_chunks(request, max_bytes + ATTRIBUTES_BYTES)) as chunks:
        parser = MultiPartParser(
            request.headers, chunks, max_files=1, max_fields=len(FIELDS), max_part_size=ATTRIBUTES_BYTES
        )
        try:
            form = await parser.parse()
        except MultiPartException as error:
            if isinstance(error.__cause__, ProblemRaised | ClientDisconnect):
                raise error.__cause__ from None
            message = f"{error.message}; send one part `file` and any of {', '.join(FIELDS)}"
            raise invalid("the form is malformed", [InvalidField(field="body", message=message)]) from None
    try:
        return await _from_parts(document_id, max_bytes, dict(form))
    finally:
        await form.close()


async def _form_chunks(request: Request, limit_bytes: int) -> AsyncGenerator[bytes, None]:
    """Stream the body. Errors are raised as ``MultiPartException``, on which the parser closes its temporary files."""
    try:
        async for chunk in limited_chunks(request, limit_bytes):
            yield chunk
    except (ProblemRaised, ClientDisconnect) as error:
        raise MultiPartException("truncated") from error


async def _from_parts(document_id: str, max_bytes: int, parts: dict[str, UploadFile | str]) -> Upload:
    file = parts.pop("file", None)
    if not isinstance(file, UploadFile):
        raise invalid("the form has no content", [InvalidField(field="file", message="send a part `file` with a file")])
    texts = {name: value for name, value in parts.items() if isinstance(value, str)}
    unknown = [name for name in parts if name not in FIELDS or name not in texts]
    if unknown:
        message = f"not an attribute; use {', '.join(FIELDS)}"
        raise invalid("the form has invalid fields", [InvalidField(field=name, message=message) for name in unknown])
    file_name = texts.get("file_name") or file.filename or None
    content_type = content_type_or_problem(file.content_type, file_name or document_id, "file")
    content = await file.read()
    if len(content) > max_bytes:
        raise too_large(max_bytes, "file")
    return Upload(document_id, content, content_type, _attributes(texts, names={}), file_name)


def _attributes(texts: Mapping[str, str], names: Mapping[str, str]) -> DocumentAttributes:
    """Validate attributes; ``names`` maps fields to the names in the request, for problems."""
    metadata: Any = None
    if "metadata" in texts:
        try:
            metadata = orjson.loads(texts["metadata"])
        except orjson.JSONDecodeError as error:
            field = InvalidField(field=names.get("metadata", "metadata"), message=f"must be a JSON object: {error}")
            raise invalid("invalid attribute", [field]) from None
    try:
        return DocumentAttributes.model_validate(as_attributes(texts, metadata))
    except ValidationError as error:
        fields = [_renamed(field, names) for field in invalid_fields(error.errors(include_url=False))]
        raise invalid("invalid attribute", fields) from None


def _renamed(field: InvalidField, names: Mapping[str, str]) -> InvalidField:
    first, dot, rest = field.field.partition(".")
    return InvalidField(field=f"{names.get(first, first)}{dot}{rest}", message=field.message)
