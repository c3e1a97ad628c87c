"""Decodes HTML and XML, which can declare their encoding. Only for the sandbox process: bs4 is a third-party parser."""

import re
from typing import Final

from schemas.charsets import find_charset
from streams.parsing.charsets import decode, decode_as, marked_text

_XML_DECLARATION: Final = re.compile(r"\A\s*<\?xml\b[^>]{0,500}\?>")
_XML_ENCODING: Final = re.compile(r"""\s+encoding\s*=\s*(?:"([^"]*)"|'([^']*)')""")
_XML_UTF16: Final = ((b"<\0?\0", "utf-16-le"), (b"\0<\0?", "utf-16-be"))
_HEAD_BYTES: Final = 1_000


def html_text(content: bytes, charset: str | None) -> str | None:
    """Decode HTML in the order of its standard: byte order mark, declared charset, ``meta``, then detection.

    A ``meta`` that cannot be correct is ignored. Without one, UTF-8 is tried before detection.

    Raises:
        CharsetMismatch: the declared charset cannot decode the content.
    """
    text = decode(content, charset) if _is_declared(charset) else _named(content, _meta_charset(content))
    # XHTML can have an XML declaration, which HTML parsers treat as text.
    return None if text is None else _XML_DECLARATION.sub("", text, count=1)


def xml_text(content: bytes, charset: str | None) -> str | None:
    """Decode XML in the order of RFC 7303: byte order mark, declared charset, XML declaration, UTF-8, detection.

    The encoding is removed from the XML declaration, so that a parser can read the text encoded as UTF-8.

    Raises:
        CharsetMismatch: the declared charset cannot decode the content.
    """
    text = decode(content, charset) if _is_declared(charset) else _named(content, _xml_charset(content))
    return None if text is None else _XML_DECLARATION.sub(lambda found: _XML_ENCODING.sub("", found[0]), text, count=1)


def _is_declared(charset: str | None) -> bool:
    found = find_charset(charset) if charset else None
    return found is not None and found.codec != "ascii"


def _named(content: bytes, label: str | None) -> str | None:
    """Decode by byte order mark, the charset that the content names, UTF-8, or detection, in this order."""
    if (marked := marked_text(content)) is not None:
        return marked
    found = find_charset(label) if label else None
    # An ASCII-compatible declaration of "utf-16" cannot be correct; the standard treats it as UTF-8.
    codec = None if found is None or found.codec == "ascii" else found.codec
    if codec is not None and codec.startswith(("utf-16", "utf-32")) and b"\0" not in content[:_HEAD_BYTES]:
        codec = "utf-8"
    if codec is not None:
        try:
            return decode_as(content, codec)
        except UnicodeDecodeError:
            pass
    return decode(content)


def _meta_charset(content: bytes) -> str | None:
    from bs4.dammit import EncodingDetector  # noqa: PLC0415 - only in the sandbox process

    return EncodingDetector.find_declared_encoding(content, is_html=True)


def _xml_charset(content: bytes) -> str | None:
    start = content[:_HEAD_BYTES]
    for head, codec in _XML_UTF16:
        if start.startswith(head):
            return codec
    declaration = _XML_DECLARATION.match(start.decode("latin-1"))
    found = _XML_ENCODING.search(declaration[0]) if declaration else None
    return (found[1] or found[2]) if found else None
