"""Types of content that can be read, and how their files are named."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_OFFICE: Final = "application/vnd.openxmlformats-officedocument"

MARKDOWN: Final = "text/markdown"
PLAIN: Final = "text/plain"
HTML: Final = "text/html"
XHTML: Final = "application/xhtml+xml"
CSV: Final = "text/csv"
JSON: Final = "application/json"
NOTEBOOK: Final = "application/x-ipynb+json"
XML: Final = "application/xml"
TEXT_XML: Final = "text/xml"
RSS: Final = "application/rss+xml"
ATOM: Final = "application/atom+xml"
EMAIL: Final = "message/rfc822"
EPUB: Final = "application/epub+zip"
PDF: Final = "application/pdf"
DOCX: Final = f"{_OFFICE}.wordprocessingml.document"
PPTX: Final = f"{_OFFICE}.presentationml.presentation"
XLSX: Final = f"{_OFFICE}.spreadsheetml.sheet"

SUPPORTED_TYPES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        MARKDOWN: (".md", ".markdown"),
        PLAIN: (".txt", ".text", ".rst", ".org", ".adoc"),
        HTML: (".html", ".htm"),
        XHTML: (".xhtml",),
        CSV: (".csv",),
        JSON: (".json",),
        NOTEBOOK: (".ipynb",),
        XML: (".xml",),
        TEXT_XML: (".xml",),
        RSS: (".rss",),
        ATOM: (".atom",),
        EMAIL: (".eml",),
        EPUB: (".epub",),
        PDF: (".pdf",),
        DOCX: (".docx",),
        PPTX: (".pptx",),
        XLSX: (".xlsx",),
    }
)
"""Media type → file name suffixes in lower case, with their dot."""

BINARY_TYPES: Final = frozenset({EPUB, PDF, DOCX, PPTX, XLSX})
"""Types whose files say how their text is encoded; a declared charset means nothing for them."""

SELF_DESCRIBING_TYPES: Final = BINARY_TYPES | {HTML, XHTML, XML, TEXT_XML, RSS, ATOM, EMAIL}
"""Types whose content may name its encoding; where none is declared, that is asked before UTF-8 is tried."""
