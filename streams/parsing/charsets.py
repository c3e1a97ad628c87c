"""Bytes of a text as text, whatever encoding they are in."""

import codecs
from typing import Final

_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it starts with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GUESSED_BYTES: Final = 100_000
"""A sample decides: guessing on megabytes takes seconds and finds nothing more."""


def unicode_text(content: bytes, charset: str | None = None) -> str | None:
    """The text where there is no doubt: by its byte order mark, as its sender says, or as UTF-8; else ``None``."""
    marked = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    for encoding in filter(None, (marked, charset, "utf-8")):
        try:
            return content.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
    return None


def decode(content: bytes, charset: str | None = None) -> str | None:
    """The text, with its encoding guessed where it has to be; ``None`` if it looks like none in any encoding."""
    text = unicode_text(content, charset)
    if text is not None:
        return text
    from charset_normalizer import from_bytes  # noqa: PLC0415 - most documents never need it

    best = from_bytes(content[:_GUESSED_BYTES]).best()
    return content.decode(best.encoding, "replace") if best else None
