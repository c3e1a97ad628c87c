"""Charsets as senders declare them: the ``charset`` parameter of a Content-Type and the names it may have."""

import codecs
from email.message import Message
from encodings.aliases import aliases
from typing import Final, NamedTuple

import webencodings

_NO_TEXT: Final = frozenset(
    {"base64_codec", "bz2_codec", "hex_codec", "quopri_codec", "rot_13", "uu_codec", "zlib_codec"}
)
_PLATFORM_CODECS: Final = frozenset({"mbcs", "oem"})
_TEXT_CODECS: Final = frozenset(aliases.values()) - _NO_TEXT - _PLATFORM_CODECS
"""Python's codecs that stand for a registered charset; ``idna``, ``unicode_escape`` and their like have no alias."""

_NO_CHARSET: Final = frozenset({"replacement", "x-user-defined"})
"""Entries of the Encoding Standard that decode no text."""


class Charset(NamedTuple):
    """A known charset.

    Attributes:
        name: its canonical name.
        codec: Python's codec for it.
    """

    name: str
    codec: str


def find_charset(label: str) -> Charset | None:
    """The charset that a label names, in any case; ``None`` if there is none.

    The WHATWG Encoding Standard decides first, as in browsers: ``iso-8859-1`` is windows-1252 and ``gb2312`` is GBK,
    since that is what senders write. Other IANA names are those of Python. ``us-ascii`` is not widened.
    """
    try:
        found = codecs.lookup(label.strip())
    except (LookupError, ValueError):  # ValueError: a NUL or a surrogate in it
        found = None
    if found is not None and found.name == "ascii":
        return Charset("us-ascii", "ascii")
    standard = webencodings.lookup(label)
    if standard is not None and standard.name not in _NO_CHARSET:
        return Charset(standard.name, standard.codec_info.name)
    if found is not None and found.name.replace("-", "_") in _TEXT_CODECS:
        return Charset(found.name, found.name)
    return None


def declared_charset(content_type: str | None) -> str | None:
    """The ``charset`` parameter of a Content-Type, unquoted; ``None`` where it has none, or an empty one."""
    message = Message()
    message["Content-Type"] = content_type or ""
    value = message.get_param("charset")
    if isinstance(value, tuple):  # RFC 2231: its own charset, its language, the value
        value = value[2]
    return value.strip(" \t'\"") or None if value else None
