"""Types of content that can be read, and how their files are named."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_OFFICE: Final = "application/vnd.openxmlformats-officedocument"

SUPPORTED_TYPES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "text/markdown": (".md", ".markdown"),
        "text/plain": (".txt", ".text"),
        "text/html": (".html", ".htm"),
        "text/csv": (".csv",),
        "application/pdf": (".pdf",),
        f"{_OFFICE}.wordprocessingml.document": (".docx",),
        f"{_OFFICE}.presentationml.presentation": (".pptx",),
        f"{_OFFICE}.spreadsheetml.sheet": (".xlsx",),
    }
)
"""Media type → file name suffixes in lower case, with their dot."""
