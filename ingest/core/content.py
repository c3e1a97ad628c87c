"""Which of the supported types content has, from what its sender says and how it is named."""

from pathlib import PurePosixPath
from typing import Final

from schemas.content_types import SUPPORTED_TYPES

_SAYS_NOTHING: Final = frozenset({"", "application/octet-stream", "application/x-www-form-urlencoded"})
"""What clients send by default where nobody chose a type; then the name decides."""

TYPE_OF_SUFFIX: Final = {suffix: media_type for media_type, suffixes in SUPPORTED_TYPES.items() for suffix in suffixes}
"""File name suffix in lower case, with its dot → media type."""


class UnsupportedType(ValueError):
    """Freshline does not read this type of content."""


def choose_content_type(declared: str | None, name: str | None) -> str:
    """The media type of content: as declared, else by the suffix of ``name`` (a file name, path or URL).

    Raises:
        UnsupportedType: neither gives a supported type; the message names those that are.
    """
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
