"""Parsing, by type. Runs in a limited process, see ``sandbox``; only Markdown and plain text may be read outside it."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from email import message_from_bytes, policy
from email.message import EmailMessage
from functools import partial
from io import BytesIO
from pathlib import PurePosixPath
from typing import Final, TypeVar
from zipfile import BadZipFile, ZipFile

from charset_normalizer import from_bytes

from schemas.content_types import SUPPORTED_TYPES

T = TypeVar("T")

PARSER_VERSION: Final = "parse-1"
"""Part of the profile: changes whenever the same content would yield another text."""

_OFFICE: Final = "application/vnd.openxmlformats-officedocument"
_FRONT_MATTER: Final = re.compile(r"\A---[ \t]*\n(.*?\n)---[ \t]*(?:\n|\Z)", re.DOTALL)
_TITLE_FIELD: Final = re.compile(r"^title:[ \t]*(?:\"(.*)\"|'(.*)'|(.*?))[ \t]*$", re.MULTILINE)
_HEADING: Final = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$", re.MULTILINE)
_MAX_TITLE_CHARS: Final = 500
_OLE_MAGIC: Final = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


class ParseFailed(Exception):
    """The content cannot be read, and trying again will not help.

    Attributes:
        kind: short stable name: unsupported, password, broken, too-large, time, memory, crashed.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class ParsedDocument:
    """What a document says.

    Attributes:
        text: Markdown or plain text, without lone surrogates or NUL; empty where the document holds none.
        title: what the document calls itself, or None.
        media_type: as what it was read.
    """

    text: str
    title: str | None
    media_type: str


def media_type_of(content: bytes, content_type: str | None, file_name: str | None) -> str:
    """As what to read the content: the declared type, else the file name's, else what its first bytes say.

    Raises:
        ParseFailed: none of these is a type that can be read.
    """
    declared = (content_type or "").partition(";")[0].strip().lower()
    if declared in SUPPORTED_TYPES:
        return declared
    suffix = PurePosixPath(file_name or "").suffix.lower()
    for media_type, suffixes in SUPPORTED_TYPES.items():
        if suffix in suffixes:
            return media_type
    if declared in {"", "application/octet-stream"} and not suffix and (found := _by_magic(content)):
        return found
    raise ParseFailed(
        "unsupported", f"cannot read {declared or 'content without a type'} named {file_name or '(none)'}"
    )


def is_plain(media_type: str) -> bool:
    """True for types that need no third-party parser."""
    return media_type in {"text/markdown", "text/plain"}


def parse(content: bytes, media_type: str, file_name: str | None = None) -> ParsedDocument:
    """The text and title of the content.

    Raises:
        ParseFailed: see there.
    """
    title: str | None = None
    match media_type:
        case "text/markdown":
            text, title = _markdown(decode(content))
        case "text/plain":
            text = decode(content)
        case "application/json":
            text = _json(content)
        case "message/rfc822":
            text, title = _mail(content)
        case _:
            text, title = _converted(content, media_type, file_name)
    # NUL and lone surrogates have no place in text and break stores behind us.
    text = text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
    if title is None and media_type != "text/plain" and (heading := _HEADING.search(text)):
        title = heading[1]
    return ParsedDocument(text, title.strip()[:_MAX_TITLE_CHARS] or None if title else None, media_type)


def decode(content: bytes) -> str:
    """Bytes as text: UTF-8 or what a byte order mark says, else the most likely encoding; never fails."""
    for encoding, mark in (("utf-8-sig", b""), ("utf-16", b"\xff\xfe"), ("utf-16", b"\xfe\xff")):
        if content.startswith(mark):
            try:
                return content.decode(encoding).replace("\r\n", "\n")
            except UnicodeDecodeError:
                continue
    # A sample decides: guessing on megabytes takes seconds and finds nothing more.
    best = from_bytes(content[:100_000]).best()
    return content.decode(best.encoding if best else "utf-8", "replace").replace("\r\n", "\n")


def _markdown(text: str) -> tuple[str, str | None]:
    """Text without its front matter, and the title that it gives."""
    front = _FRONT_MATTER.match(text)
    if front is None:
        return text, None
    field = _TITLE_FIELD.search(front[1])
    title = next((part for part in field.groups() if part), None) if field else None
    return text[front.end() :], title


def _json(content: bytes) -> str:
    try:
        return json.dumps(json.loads(decode(content)), indent=1, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        raise ParseFailed("broken", f"no JSON that can be read: {error}") from error


def _mail(content: bytes) -> tuple[str, str | None]:
    """The message's headers that people read, and its body; attachments are named, not opened."""
    message = message_from_bytes(content, policy=policy.default)
    headers = {name: _quietly(partial(message.get, name)) for name in ("From", "To", "Date")}
    names = [_quietly(part.get_filename) for part in message.iter_attachments()]
    lines = [f"{name}: {value}" for name, value in headers.items() if value]
    lines += ["", _mail_body(message), *(f"Attachment: {name}" for name in names if name)]
    return "\n".join(lines).strip(), _quietly(lambda: str(message["Subject"] or "")) or None


def _mail_body(message: EmailMessage) -> str:
    body = _quietly(lambda: message.get_body(("plain", "html")))
    if body is None:
        return ""
    text = _quietly(lambda: str(body.get_content()))
    if text is None:  # an encoding or charset that does not exist
        payload = _quietly(lambda: body.get_payload(decode=True))
        text = decode(payload) if isinstance(payload, bytes) else ""
    return _converted(text.encode(), "text/html", None)[0] if body.get_content_type() == "text/html" else text


def _quietly(read: Callable[[], T]) -> T | None:
    """What ``read`` gives, or None: mail out there breaks every rule, and one bad header must not cost the message."""
    try:
        return read()
    except (ValueError, LookupError, AttributeError, TypeError):
        return None


def _converted(content: bytes, media_type: str, file_name: str | None) -> tuple[str, str | None]:
    """By MarkItDown, imported here because only the limited process ever needs it."""
    from markitdown import FileConversionException, MarkItDown, StreamInfo, UnsupportedFormatException  # noqa: PLC0415

    _check_protection(content, media_type)
    info = StreamInfo(mimetype=media_type, extension=SUPPORTED_TYPES[media_type][0], filename=file_name)
    if media_type in {"text/html", "text/csv"}:
        content, info = decode(content).encode(), info.copy_and_update(charset="utf-8")
    try:
        result = MarkItDown(enable_plugins=False).convert_stream(BytesIO(content), stream_info=info)
    except (FileConversionException, UnsupportedFormatException) as error:
        reason = str(error).strip().splitlines()
        protected = "password" in str(error).lower() or "encrypt" in str(error).lower()
        raise ParseFailed("password" if protected else "broken", reason[-1] if reason else media_type) from error
    return result.markdown, result.title


def _check_protection(content: bytes, media_type: str) -> None:
    """Say "password" where that is what is wrong; converters report it in many words."""
    if content.startswith(_OLE_MAGIC) and media_type.startswith(_OFFICE):
        raise ParseFailed("password", "the document is protected by a password: upload an open copy")
    if media_type == "application/pdf" and b"/Encrypt" in content and _needs_password(content):
        raise ParseFailed("password", "the PDF is protected by a password: upload an open copy")


def _needs_password(content: bytes) -> bool:
    from pdfminer.pdfdocument import PDFDocument, PDFPasswordIncorrect  # noqa: PLC0415 - only the limited process
    from pdfminer.pdfparser import PDFParser  # noqa: PLC0415 - as above

    try:
        PDFDocument(PDFParser(BytesIO(content)))
    except PDFPasswordIncorrect:
        return True
    except Exception:  # noqa: BLE001 - whatever else is wrong with it is for the conversion to say
        return False
    return False


def _by_magic(content: bytes) -> str | None:
    start = content[:1024].lstrip()
    if start.startswith(b"%PDF-"):
        return "application/pdf"
    if start.startswith(b"PK\x03\x04"):
        return _by_archive(content)
    if start[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "text/html"
    if b"\0" not in start and start:
        return "text/plain"
    return None


def _by_archive(content: bytes) -> str | None:
    try:
        with ZipFile(BytesIO(content)) as archive:
            names = archive.namelist()
    except BadZipFile:
        return None
    marks = {
        "word/": f"{_OFFICE}.wordprocessingml.document",
        "ppt/": f"{_OFFICE}.presentationml.presentation",
        "xl/": f"{_OFFICE}.spreadsheetml.sheet",
        "META-INF/container.xml": "application/epub+zip",
    }
    return next((kind for mark, kind in marks.items() if any(name.startswith(mark) for name in names)), None)
