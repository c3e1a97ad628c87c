"""Why a document that could be read has no passages."""

from typing import Final

from schemas.content_types import DOCX, EPUB, PDF, PPTX

_MAY_BE_PICTURES: Final = frozenset({DOCX, EPUB, PPTX})
"""Types whose documents often hold pictures alone."""


def why_empty(content: bytes, media_type: str) -> str:
    """The reason, and where there is one the remedy, for the document's owner.

    Args:
        content: the document, as it was sent.
        media_type: as what it was read without finding any text.
    """
    if not content:
        return "the document is empty"
    if media_type == PDF:
        return "no text layer: a scan is found only after text recognition (OCR)"
    return "no text, pictures are not read" if media_type in _MAY_BE_PICTURES else "no text"
