"""Bytes of a text as text, whatever encoding they are in.

The order: byte order mark, the charset that the sender declares, the one that the content names (HTML and XML only, see
``markup``), UTF-8 where the bytes are valid, detection.
"""

import codecs
from typing import Final

from schemas.charsets import find_charset

_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DETECTED_BYTES: Final = 100_000
"""A sample decides: detection on megabytes takes seconds and finds nothing more."""

_SHORT_BYTES: Final = 1_000
"""Statistics of a language need more text than this; below it, text that reads as Western European is windows-1252."""

_WESTERN_LETTERS: Final = frozenset("ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøùúûüŒœŸÿªº")
"""Those of windows-1252 but the Icelandic ones, whose bytes are the Turkish and Czech letters of other code pages."""

_WESTERN_SIGNS: Final = frozenset("€£¥§©®°±·«»¡¿–—‘’“”„…•‹›™´\u00a0")  # noqa: RUF001 - as people write

_LINE_SEPARATORS: Final = str.maketrans({"\r": "\n"})


class CharsetMismatch(ValueError):
    """The content is not in the charset that its sender declares."""


def unicode_text(content: bytes, charset: str | None = None) -> str | None:
    """The text where there is no doubt: by its byte order mark, as its sender declares, or as UTF-8; else ``None``.

    Args:
        content: the bytes.
        charset: any label; one that is unknown counts as none, and so does ``us-ascii`` where other bytes occur.

    Raises:
        CharsetMismatch: the declared charset cannot decode the content.
    """
    marked = marked_text(content)
    if marked is not None:
        return marked
    declared = find_charset(charset) if charset else None
    if declared is not None and declared.codec != "ascii":
        try:
            return decode_as(content, declared.codec)
        except UnicodeDecodeError as error:
            raise CharsetMismatch(
                f"its bytes are not {declared.name}, the charset that it was sent with ({error.reason} at byte"
                f" {error.start}): send the charset that it is in, or none to have it detected"
            ) from None
    return _decoded(content, "utf-8")


def decode(content: bytes, charset: str | None = None) -> str | None:
    """The text, with its encoding detected where it has to be; ``None`` if it looks like none in any encoding.

    Raises:
        CharsetMismatch: see ``unicode_text``.
    """
    text = unicode_text(content, charset)
    return detected_text(content) if text is None else text


def marked_text(content: bytes) -> str | None:
    """The text by its byte order mark, without it; ``None`` if it has none, or one that is not true."""
    codec = next((codec for mark, codec in _MARKS if content.startswith(mark)), None)
    return None if codec is None else _decoded(content, codec)


def detected_text(content: bytes) -> str | None:
    """The text in the encoding that it most likely has; ``None`` if it looks like none in any."""
    if len(content) <= _SHORT_BYTES and (western := _western(content)) is not None:
        return western
    from charset_normalizer import from_bytes  # noqa: PLC0415 - most documents never need it

    best = from_bytes(content[:_DETECTED_BYTES]).best()
    return content.decode(best.encoding, "replace") if best else None


def decode_as(content: bytes, codec: str) -> str:
    """The text by a codec, without a byte order mark at its start.

    Raises:
        UnicodeDecodeError: the content is not in that encoding.
    """
    errors = _C1_CONTROLS if codec == "cp1252" else "strict"
    return content.decode(codec, errors).removeprefix("\ufeff")


def with_line_feeds(text: str) -> str:
    """The text with each CR LF and each CR as one LF."""
    return text.replace("\r\n", "\n").translate(_LINE_SEPARATORS) if "\r" in text else text


def _decoded(content: bytes, codec: str) -> str | None:
    try:
        return content.decode(codec)
    except UnicodeDecodeError:
        return None


def _western(content: bytes) -> str | None:
    """The text as windows-1252, if it reads as a Western European language: single accents within plain words."""
    text = _decoded(content, "cp1252")
    if text is None:
        return None
    plain = accented = 0
    before = after = " "
    for number, char in enumerate(text):
        if char.isascii():
            plain += char.isalpha()
        elif char in _WESTERN_LETTERS:
            accented += 1
        else:
            before, after = text[number - 1 : number] or " ", text[number + 1 : number + 2] or " "
            apostrophe = char == "’"  # noqa: RUF001 - as people write
            if char not in _WESTERN_SIGNS or (before.isalpha() and after.isalpha() and not apostrophe):
                return None
    return text if accented <= plain else None


_C1_CONTROLS: Final = "freshline.c1-controls"


def _as_c1_control(error: UnicodeError) -> tuple[str, int]:
    """Five bytes have no character in windows-1252; the Encoding Standard reads them as controls, as Latin-1 does."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error(_C1_CONTROLS, _as_c1_control)
