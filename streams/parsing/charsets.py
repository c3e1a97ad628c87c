"""Decodes text of any encoding.

Order of precedence: byte order mark, charset declared by the sender, charset named by the content (HTML and XML only,
see ``markup``), UTF-8 if the bytes are valid, detection.
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
"""Size of the sample for detection. On megabytes, detection takes seconds and is not more accurate."""

_SHORT_BYTES: Final = 1_000
"""Statistical detection needs longer texts. A shorter text that is plausible Western European is windows-1252."""

_WESTERN_LETTERS: Final = frozenset("ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøùúûüŒœŸÿªº")
"""Letters of windows-1252 without the Icelandic ones, whose bytes are Turkish and Czech letters in other code pages."""

_WESTERN_SIGNS: Final = frozenset("€£¥§©®°±·«»¡¿–—‘’“”„…•‹›™´\u00a0")  # noqa: RUF001 - typographic signs

_LINE_SEPARATORS: Final = str.maketrans({"\r": "\n"})


class CharsetMismatch(ValueError):
    """The content is not in the charset that the sender declares."""


def unicode_text(content: bytes, charset: str | None = None) -> str | None:
    """Decode by byte order mark, declared charset or UTF-8; ``None`` if none of them applies.

    Args:
        content: the bytes.
        charset: any label. Unknown labels are ignored, and so is ``us-ascii`` for content with other bytes.

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
                f"the bytes are not {declared.name}, the declared charset ({error.reason} at byte {error.start}):"
                " declare the correct charset, or none for detection"
            ) from None
    return _decoded(content, "utf-8")


def decode(content: bytes, charset: str | None = None) -> str | None:
    """Decode, with detection as the last resort; ``None`` if the content is not text in any known encoding.

    Raises:
        CharsetMismatch: the declared charset cannot decode the content.
    """
    text = unicode_text(content, charset)
    return detected_text(content) if text is None else text


def marked_text(content: bytes) -> str | None:
    """Decode by byte order mark, and remove it; ``None`` without a valid one."""
    codec = next((codec for mark, codec in _MARKS if content.startswith(mark)), None)
    return None if codec is None else _decoded(content, codec)


def detected_text(content: bytes) -> str | None:
    """Decode with the most probable encoding; ``None`` if the content is not text."""
    if len(content) <= _SHORT_BYTES and (western := _western(content)) is not None:
        return western
    from charset_normalizer import from_bytes  # noqa: PLC0415 - most documents do not need it

    best = from_bytes(content[:_DETECTED_BYTES]).best()
    return content.decode(best.encoding, "replace") if best else None


def decode_as(content: bytes, codec: str) -> str:
    """Decode with a codec, and remove a byte order mark.

    Raises:
        UnicodeDecodeError: the content is not in that encoding.
    """
    errors = _C1_CONTROLS if codec == "cp1252" else "strict"
    return content.decode(codec, errors).removeprefix("\ufeff")


def with_line_feeds(text: str) -> str:
    """Replace each CR LF and each CR with LF."""
    return text.replace("\r\n", "\n").translate(_LINE_SEPARATORS) if "\r" in text else text


def _decoded(content: bytes, codec: str) -> str | None:
    try:
        return content.decode(codec)
    except UnicodeDecodeError:
        return None


def _western(content: bytes) -> str | None:
    """Decode as windows-1252 if the result is plausible Western European: single accents within plain words."""
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
            apostrophe = char == "’"  # noqa: RUF001 - a typographic apostrophe
            if char not in _WESTERN_SIGNS or (before.isalpha() and after.isalpha() and not apostrophe):
                return None
    return text if accented <= plain else None


_C1_CONTROLS: Final = "freshline.c1-controls"


def _as_c1_control(error: UnicodeError) -> tuple[str, int]:
    """Decode the five bytes without a character in windows-1252 as controls, as the Encoding Standard does."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error(_C1_CONTROLS, _as_c1_control)
