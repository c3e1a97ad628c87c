"""Document attributes in HTTP headers and form fields, where everything is text."""

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote

HEADER_PREFIX: Final = "freshline-"
FIELDS: Final = ("title", "source", "groups", "metadata", "revision", "connector", "take_over", "file_name")
"""Attributes that may be given beside content; the header of ``file_name`` is ``Freshline-File-Name``."""

_PLAIN: Final = ("title", "source", "revision", "connector", "take_over")

_EXTENDED: Final = re.compile(r"utf-8'[a-z0-9-]*'(.*)", re.IGNORECASE | re.DOTALL)


def header_name(field: str) -> str:
    """The header that carries ``field``, as people write it."""
    return f"{HEADER_PREFIX}{field.replace('_', '-')}".title()


def from_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The attributes given in ``headers`` (names in lower case), decoded to text."""
    names = {field: header_name(field).lower() for field in FIELDS}
    return {field: header_text(headers[name]) for field, name in names.items() if name in headers}


def header_text(value: str) -> str:
    """Text of a header value that the server read as Latin-1.

    Senders write other alphabets as RFC 8187 says, ``UTF-8''%D0%97…``, or as bare UTF-8 bytes, which no standard allows
    and many do. A percent sign without that prefix is just a percent sign.
    """
    extended = _EXTENDED.fullmatch(value)
    if extended:
        return unquote(extended[1])
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return value


def as_attributes(texts: Mapping[str, str], parsed_metadata: Any) -> dict[str, Any]:
    """The texts as fields of ``DocumentAttributes``, still to be validated.

    ``parsed_metadata`` is the JSON value of the ``metadata`` text; parsing is the caller's, as are its errors.
    """
    attributes: dict[str, Any] = {name: texts[name] for name in _PLAIN if texts.get(name, "") != ""}
    if texts.get("groups", "").strip() != "":
        attributes["groups"] = texts["groups"].split(",")
    if "metadata" in texts:
        attributes["metadata"] = parsed_metadata
    return attributes
