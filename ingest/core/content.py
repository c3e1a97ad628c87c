"""Content type and charset of an upload, from its declaration and name."""

from pathlib import PurePosixPath
from typing import Final

from schemas.charsets import declared_charset, find_charset
from schemas.content_types import BINARY_TYPES, SUPPORTED_TYPES

_UNSPECIFIC_TYPES: Final = frozenset({"", "application/octet-stream", "application/x-www-form-urlencoded"})
"""Default types of HTTP clients. The suffix of the name determines the type instead."""

TYPE_OF_SUFFIX: Final = {suffix: media_type for media_type, suffixes in SUPPORTED_TYPES.items() for suffix in suffixes}
"""File name suffix in lower case, with its dot → media type."""


class UnsupportedType(ValueError):
    """The content type is not supported."""


class UnknownCharset(ValueError):
    """The declared charset cannot be decoded."""


def choose_content_type(declared: str | None, name: str | None) -> str:
    """Content type for the stream: the media type, with the charset if one is declared for text.

    Args:
        declared: Content-Type, with or without parameters.
        name: file name, path or URL. Its suffix determines the type if ``declared`` does not.

    Returns:
        For example ``text/plain; charset=koi8-r``. The charset has its canonical name. Other parameters are omitted,
        as is ``us-ascii``: senders declare it by default, and it does not preclude detection.

    Raises:
        UnsupportedType: neither argument has a supported type.
        UnknownCharset: the declared charset of text is unknown.
    """
    media_type = _media_type(declared, name)
    label = declared_charset(declared)
    if label is None or media_type in BINARY_TYPES:
        return media_type
    charset = find_charset(label)
    if charset is None:
        raise UnknownCharset(
            f"unknown charset {label[:60]!r}; declare a charset of the WHATWG Encoding Standard or of IANA, such as"
            " utf-8, windows-1252 or shift_jis, or none to detect it"
        )
    return media_type if charset.codec == "ascii" else f"{media_type}; charset={charset.name}"


def _media_type(declared: str | None, name: str | None) -> str:
    media_type = (declared or "").partition(";")[0].strip().lower()
    if media_type in SUPPORTED_TYPES:
        return media_type
    suffix = PurePosixPath(name or "").suffix.lower()
    if media_type in _UNSPECIFIC_TYPES and suffix in TYPE_OF_SUFFIX:
        return TYPE_OF_SUFFIX[suffix]
    subject = (
        media_type if media_type not in _UNSPECIFIC_TYPES else f"content without a type, named {(name or '')[-60:]!r},"
    )
    raise UnsupportedType(f"{subject} is not supported; send one of {', '.join(sorted(SUPPORTED_TYPES))}")


def why_unsupported(path: str) -> str | None:
    """Reason why a file of this path is not supported; None if it is."""
    suffix = PurePosixPath(path).suffix
    if suffix.lower() in TYPE_OF_SUFFIX:
        return None
    return f"files {f'named {suffix}' if suffix else 'without a suffix'} are not supported"
