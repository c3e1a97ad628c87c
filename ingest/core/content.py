"""Which of the supported types and charsets content has, from what its sender declares and how it is named."""

from pathlib import PurePosixPath
from typing import Final

from schemas.charsets import declared_charset, find_charset
from schemas.content_types import BINARY_TYPES, SUPPORTED_TYPES

_SAYS_NOTHING: Final = frozenset({"", "application/octet-stream", "application/x-www-form-urlencoded"})
"""What clients send by default where nobody chose a type; then the name decides."""

TYPE_OF_SUFFIX: Final = {suffix: media_type for media_type, suffixes in SUPPORTED_TYPES.items() for suffix in suffixes}
"""File name suffix in lower case, with its dot → media type."""


class UnsupportedType(ValueError):
    """Freshline does not read this type of content."""


class UnknownCharset(ValueError):
    """The declared charset is none that can be decoded."""


def choose_content_type(declared: str | None, name: str | None) -> str:
    """The content type to carry on the stream: the media type, and the charset where one is declared for text.

    Args:
        declared: a Content-Type, with or without parameters.
        name: a file name, path or URL; its suffix decides where ``declared`` gives no type.

    Returns:
        Such as ``text/plain; charset=koi8-r``. The charset has its canonical name; other parameters are left out, and
        so is ``us-ascii``, which senders declare by default and which excludes no later detection.

    Raises:
        UnsupportedType: neither gives a supported type; the message names those that are.
        UnknownCharset: of text.
    """
    media_type = _media_type(declared, name)
    label = declared_charset(declared)
    if label is None or media_type in BINARY_TYPES:
        return media_type
    charset = find_charset(label)
    if charset is None:
        raise UnknownCharset(
            f"the charset {label[:60]!r} is not known; declare one of the WHATWG Encoding Standard or of IANA, such as"
            " utf-8, windows-1252 or shift_jis, or none to have it detected"
        )
    return media_type if charset.codec == "ascii" else f"{media_type}; charset={charset.name}"


def _media_type(declared: str | None, name: str | None) -> str:
    media_type = (declared or "").partition(";")[0].strip().lower()
    if media_type in SUPPORTED_TYPES:
        return media_type
    suffix = PurePosixPath(name or "").suffix.lower()
    if media_type in _SAYS_NOTHING and suffix in TYPE_OF_SUFFIX:
        return TYPE_OF_SUFFIX[suffix]
    what = media_type if media_type not in _SAYS_NOTHING else f"content without a type, named {(name or '')[-60:]!r},"
    raise UnsupportedType(f"{what} is not supported; send one of {', '.join(sorted(SUPPORTED_TYPES))}")


def why_unsupported(path: str) -> str | None:
    """Why a file of this path cannot be a document by its name; None where it can."""
    suffix = PurePosixPath(path).suffix
    if suffix.lower() in TYPE_OF_SUFFIX:
        return None
    return f"files {f'named {suffix}' if suffix else 'without a suffix'} are not supported"
