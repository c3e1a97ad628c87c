"""Parses content by type.

Runs in a sandbox process (``sandbox``); only Markdown and plain text are parsed outside of it.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage, MIMEPart
from functools import partial
from io import BytesIO
from pathlib import PurePosixPath
from typing import Final, TypeVar
from zipfile import BadZipFile, ZipFile

from schemas.charsets import declared_charset
from schemas.content_types import (
    ATOM,
    CSV,
    DOCX,
    EMAIL,
    EPUB,
    HTML,
    JSON,
    MARKDOWN,
    NOTEBOOK,
    PDF,
    PLAIN,
    PPTX,
    RSS,
    SUPPORTED_TYPES,
    TEXT_XML,
    XHTML,
    XLSX,
    XML,
)
from schemas.documents import MAX_TITLE_CHARS, IndexedMetadata
from streams.parsing.charsets import CharsetMismatch, decode, unicode_text, with_line_feeds
from streams.parsing.front_matter import read_front_matter
from streams.parsing.markup import html_text, xml_text
from streams.parsing.titles import first_heading

T = TypeVar("T")

PARSER_VERSION: Final = "parse-2"
"""Part of the profile. Changes whenever the same content would yield a different text."""

_CONVERTERS: Final = {
    HTML: "HtmlConverter",
    XHTML: "HtmlConverter",
    CSV: "CsvConverter",
    NOTEBOOK: "IpynbConverter",
    XML: "RssConverter",
    TEXT_XML: "RssConverter",
    RSS: "RssConverter",
    ATOM: "RssConverter",
    EPUB: "EpubConverter",
    PDF: "PdfConverter",
    DOCX: "DocxConverter",
    PPTX: "PptxConverter",
    XLSX: "XlsxConverter",
}
"""Media type → converter of MarkItDown. ``MarkItDown`` itself is not used: it would load a model to guess the type of
every document, open an HTTP session, and try several converters."""

_READ_AS_TEXT: Final[Mapping[str, Callable[[bytes, str | None], str | None]]] = {
    HTML: html_text,
    XHTML: html_text,
    CSV: decode,
    NOTEBOOK: decode,
    XML: xml_text,
    TEXT_XML: xml_text,
    RSS: xml_text,
    ATOM: xml_text,
}
"""Media type → decoder; its converter receives the text as UTF-8. The other types are binary."""
_GENERIC_TYPES: Final = frozenset({"", "application/octet-stream", "binary/octet-stream"})

_OLE_MAGIC: Final = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


class ParseFailed(Exception):
    """The content cannot be read. A retry would not help.

    Attributes:
        kind: short stable name: unsupported, password, broken, too-large, time, memory, crashed.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class ParsedDocument:
    """The result of parsing.

    Attributes:
        text: Markdown or plain text, without lone surrogates or NUL; empty if the document has no text.
        title: title of the document, or None.
        media_type: type as which it was parsed.
        metadata: further attributes, within the limits of metadata.
    """

    text: str
    title: str | None
    media_type: str
    metadata: IndexedMetadata = field(default_factory=dict)


def media_type_of(content: bytes, content_type: str | None, file_name: str | None) -> str:
    """Determine the media type: the declared type, otherwise that of the file name, otherwise that of the first bytes.

    Raises:
        ParseFailed: the type is not supported.
    """
    declared = (content_type or "").partition(";")[0].strip().lower()
    if declared in SUPPORTED_TYPES:
        return declared
    suffix = PurePosixPath(file_name or "").suffix.lower()
    for media_type, suffixes in SUPPORTED_TYPES.items():
        if suffix in suffixes:
            return media_type
    if declared in _GENERIC_TYPES and (found := _by_magic(content, named=bool(suffix))):
        return found
    raise ParseFailed(
        "unsupported",
        f"cannot read {declared or 'content without a type'} named {file_name or '(none)'};"
        f" send one of {', '.join(sorted(SUPPORTED_TYPES))}",
    )


def is_plain(media_type: str) -> bool:
    """Whether a type needs no third-party parser."""
    return media_type in {MARKDOWN, PLAIN}


def parse(content: bytes, media_type: str, charset: str | None = None) -> ParsedDocument:
    """Parse content.

    Args:
        content: the bytes as uploaded.
        media_type: one of ``SUPPORTED_TYPES``.
        charset: charset declared by the sender; for text types.

    Raises:
        ParseFailed: the content cannot be read.
    """
    title: str | None = None
    metadata: IndexedMetadata = {}
    if media_type == MARKDOWN:
        text, title, metadata = _parse_markdown(_clean(_decode_text(content, charset)))
    elif media_type == PLAIN:
        text = _decode_text(content, charset)
    elif media_type == JSON:
        text = _format_json(_decode_text(content, charset))
    elif media_type == EMAIL:
        text, title = _parse_mail(content, charset)
    else:
        text, title = _convert(content, media_type, charset)
    text = _clean(text)
    if not title and media_type != PLAIN:
        title = first_heading(text)
    title = " ".join(_clean(title or "").split())[:MAX_TITLE_CHARS] or None
    return ParsedDocument(text, title, media_type, metadata)


def _decode_text(content: bytes, charset: str | None) -> str:
    return _decode(decode, content, charset)


def _decode(read: Callable[[bytes, str | None], str | None], content: bytes, charset: str | None) -> str:
    try:
        text = read(content, charset)
    except CharsetMismatch as error:
        raise ParseFailed("broken", str(error)) from None
    if text is None:
        raise ParseFailed(
            "broken",
            "not text in any known encoding: send it as UTF-8, or declare its charset, such as"
            " `Content-Type: text/plain; charset=windows-1252`",
        )
    return text


def _clean(text: str) -> str:
    """Normalise line ends to LF, and remove NUL and lone surrogates, which break stores."""
    return with_line_feeds(text).replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _parse_markdown(text: str) -> tuple[str, str | None, IndexedMetadata]:
    """Text, title and metadata. The description in front matter is text for readers, so it is prepended."""
    front = read_front_matter(text)
    if front is None:
        return text, None, {}
    body = text[front.end :]
    if front.description and front.description not in body:
        body = f"{front.description}\n\n{body}"
    return body, front.title, front.metadata


def _format_json(text: str) -> str:
    """Format JSON with one value per line, so that passages can end between values."""
    try:
        return json.dumps(json.loads(text), indent=1, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise ParseFailed("broken", f"not valid JSON: {error}") from error


def _parse_mail(content: bytes, charset: str | None) -> tuple[str, str | None]:
    """Headers for readers, and the body; attachments are named, not opened."""
    message = message_from_bytes(content, policy=policy.default)
    headers = {name: _ignore_errors(partial(message.get, name)) for name in ("From", "To", "Date")}
    names = [_ignore_errors(part.get_filename) for part in message.iter_attachments()]
    lines = [f"{name}: {value}" for name, value in headers.items() if value]
    lines += ["", _mail_body(message, charset), *(f"Attachment: {name}" for name in names if name)]
    return "\n".join(lines).strip(), _ignore_errors(lambda: str(message["Subject"] or "")) or None


def _mail_body(message: EmailMessage, charset: str | None) -> str:
    body = _ignore_errors(lambda: message.get_body(("plain", "html")))
    if body is None:
        return ""
    payload = _ignore_errors(lambda: body.get_payload(decode=True))
    text = _part_text(payload if isinstance(payload, bytes) else b"", body, charset)
    if body.get_content_type() == HTML:
        return _convert(text.encode("utf-8", "replace"), HTML, "utf-8")[0]
    return text


def _part_text(payload: bytes, part: MIMEPart, charset: str | None) -> str:
    """Text of a part. A wrong declaration must not make the message unreadable."""
    own = declared_charset(_ignore_errors(lambda: str(part["Content-Type"] or "")))
    for label in (own or charset, None):
        with suppress(CharsetMismatch):
            text = html_text(payload, label) if part.get_content_type() == HTML else decode(payload, label)
            return with_line_feeds(text or "")
    return ""


def _ignore_errors(read: Callable[[], T]) -> T | None:
    """Result of ``read``, or None if it raises: one invalid header must not make a message unreadable."""
    try:
        return read()
    except (ValueError, LookupError, AttributeError, TypeError):
        return None


def _convert(content: bytes, media_type: str, charset: str | None) -> tuple[str, str | None]:
    """Convert with MarkItDown, which is imported here because only the sandbox process needs it."""
    from markitdown import StreamInfo, converters  # noqa: PLC0415 - takes a second

    _check_protection(content, media_type)
    encoding = None
    if (read := _READ_AS_TEXT.get(media_type)) is not None:
        content, encoding = _decode(read, content, charset).encode("utf-8", "replace"), "utf-8"
    info = StreamInfo(mimetype=media_type, extension=SUPPORTED_TYPES[media_type][0], charset=encoding)
    converter = getattr(converters, _CONVERTERS[media_type])()
    stream = BytesIO(content)
    if media_type in {XML, TEXT_XML} and not converter.accepts(stream, info):
        return _decode_text(content, encoding), None
    try:
        result = converter.convert(stream, info)
    except MemoryError:
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        protected = "password" in message.lower() or "encrypt" in message.lower()
        raise ParseFailed("password" if protected else "broken", f"cannot read the {media_type}: {message}") from error
    return result.markdown, result.title


def _check_protection(content: bytes, media_type: str) -> None:
    """Report protected documents as "password"; converters report them in many ways."""
    if content.startswith(_OLE_MAGIC) and media_type in {DOCX, PPTX, XLSX}:
        raise ParseFailed("password", "the document is protected by a password: upload an unprotected copy")
    if media_type == PDF and b"/Encrypt" in content and _needs_password(content):
        raise ParseFailed("password", "the PDF is protected by a password: upload an unprotected copy")


def _needs_password(content: bytes) -> bool:
    from pdfminer.pdfdocument import PDFDocument, PDFPasswordIncorrect  # noqa: PLC0415 - only in the sandbox process
    from pdfminer.pdfparser import PDFParser  # noqa: PLC0415 - as above

    try:
        PDFDocument(PDFParser(BytesIO(content)))
    except PDFPasswordIncorrect:
        return True
    except Exception:  # noqa: BLE001 - the conversion reports other errors
        return False
    return False


def _by_magic(content: bytes, *, named: bool) -> str | None:
    """Type by the first bytes. Text is recognised only if no file name indicates another type."""
    start = content[:1024].lstrip()
    if start.startswith(b"%PDF-"):
        return PDF
    if start.startswith(b"PK\x03\x04"):
        return _by_archive(content)
    if start[:15].lower().startswith((b"<!doctype html", b"<html")):
        return HTML
    plain = b"\0" not in content and unicode_text(content) is not None
    return PLAIN if start and plain and not named else None


def _by_archive(content: bytes) -> str | None:
    try:
        with ZipFile(BytesIO(content)) as archive:
            names = archive.namelist()
    except BadZipFile:
        return None
    types = {"word/document.xml": DOCX, "ppt/presentation.xml": PPTX, "xl/workbook.xml": XLSX}
    types["META-INF/container.xml"] = EPUB
    return next((media_type for mark, media_type in types.items() if mark in names), None)
