"""Request encoding of connectors: attributes as headers, and requests as lines of a batch."""

import base64
from typing import Any
from urllib.parse import quote

import orjson

from ingest.core.attributes import header_name
from ingest.core.changes import DocumentRequest, Removal, Upload
from schemas.charsets import declared_charset
from schemas.content_types import SELF_DESCRIBING_TYPES


def upload_headers(upload: Upload) -> dict[str, str]:
    """Headers with the content type and attributes of an upload."""
    attributes = upload.attributes
    texts = {
        "title": attributes.title,
        "source": attributes.source,
        "groups": ",".join(attributes.groups) or None,
        "metadata": orjson.dumps(attributes.metadata).decode() if attributes.metadata else None,
        "connector": attributes.connector,
        "take_over": "true" if attributes.take_over else None,
        "file_name": upload.file_name,
    }
    headers = {header_name(name): header_value(text) for name, text in texts.items() if text is not None}
    return {"Content-Type": upload.content_type} | headers | revision_header(attributes.revision)


def batch_line(request: DocumentRequest) -> bytes:
    """Encode a request as a line of a batch."""
    if isinstance(request, Removal):
        fields: dict[str, Any] = {"document_id": request.document_id, "deleted": True, "revision": request.revision}
        fields |= {"connector": request.connector, "take_over": request.take_over or None}
        fields = {name: value for name, value in fields.items() if value is not None}
    else:
        fields = request.attributes.model_dump(exclude_defaults=True) | {
            "document_id": request.document_id,
            "content_type": request.content_type,
            "file_name": request.file_name,
        }
        text = _text(request)
        if text is None:
            fields["content_b64"] = base64.b64encode(request.content).decode()
        else:
            fields["text"] = text
        if not request.content:
            fields["empty"] = True
    return orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)


def _text(upload: Upload) -> str | None:
    """Content as text if it is UTF-8 and neither its type nor the content itself can declare another charset."""
    if upload.content_type in SELF_DESCRIBING_TYPES or declared_charset(upload.content_type) is not None:
        return None
    try:
        return upload.content.decode()
    except UnicodeDecodeError:
        return None


def header_value(text: str) -> str:
    """Encode text as a header value: verbatim where that is unambiguous, else as in RFC 8187."""
    plain = text.isascii() and text.isprintable() and text == text.strip() and not text.lower().startswith("utf-8'")
    return text if plain else f"UTF-8''{quote(text, safe='')}"


def document_path(document_id: str) -> str:
    """Path of a document below the service's address."""
    return f"/v1/documents/{quote(document_id, safe='')}"


def upload_path(upload: Upload) -> str:
    """Path and query of an upload. Empty content is declared with ``empty=true``."""
    return document_path(upload.document_id) + ("" if upload.content else "?empty=true")


def removal_headers(removal: Removal) -> dict[str, str]:
    """Headers of a removal."""
    connector = {} if removal.connector is None else {header_name("connector"): removal.connector}
    take_over = {header_name("take_over"): "true"} if removal.take_over else {}
    return revision_header(removal.revision) | connector | take_over


def revision_header(revision: int | None) -> dict[str, str]:
    """Header of a revision, if any."""
    return {} if revision is None else {header_name("revision"): str(revision)}
