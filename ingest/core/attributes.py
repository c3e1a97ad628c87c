"""Decoding of document attributes in HTTP headers and form fields."""

import re
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote

HEADER_PREFIX: Final = "freshline-"
FIELDS: Final = ("title", "source", "groups", "metadata", "revision", "connector", "take_over", "file_name")
"""Attributes of an upload; the header of ``file_name`` is ``Freshline-File-Name``."""

_PLAIN: Final = ("title", "source", "revision", "connector", "take_over")

_EXTENDED: Final = re.compile(r"utf-8'[a-z0-9-]*'(.*)", re.IGNORECASE | re.DOTALL)


def header_name(field: str) -> str:
    """Header name of a field, in canonical case."""
    return f"{HEADER_PREFIX}{field.replace('_', '-')}".title()


def from_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Decode the attributes in ``headers`` (names in lower case)."""
    names = {field: header_name(field).lower() for field in FIELDS}
    return {field: header_text(headers[name]) for field, name in names.items() if name in headers}


def header_text(value: str) -> str:
    """Decode a header value that the server read as Latin-1.

    Supports RFC 8187 (``UTF-8''%D0%97…``), and raw UTF-8 bytes, which are not standard but common. A percent sign
    without that prefix is literal.
    """
    extended = _EXTENDED.fullmatch(value)
    if extended:
        return unquote(extended[1])
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return value


def as_attributes(texts: Mapping[str, str], parsed_metadata: Any) -> dict[str, Any]:
    """Convert texts to fields of ``DocumentAttributes``, not validated.

    Args:
        texts: field → text.
        parsed_metadata: JSON value of the ``metadata`` text, parsed by the caller.
    """
    attributes: dict[str, Any] = {name: texts[name] for name in _PLAIN if texts.get(name, "") != ""}
    if texts.get("groups", "").strip() != "":
        attributes["groups"] = texts["groups"].split(",")
    if "metadata" in texts:
        attributes["metadata"] = parsed_metadata
    return attributes
