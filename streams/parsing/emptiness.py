"""Explains why a readable document has no passages."""

from typing import Final

from schemas.content_types import DOCX, EPUB, PDF, PPTX

_MAY_CONTAIN_ONLY_IMAGES: Final = frozenset({DOCX, EPUB, PPTX})
"""Types whose documents often contain only images."""


def why_empty(content: bytes, media_type: str) -> str:
    """The reason, and the remedy if there is one.

    Args:
        content: the document as uploaded.
        media_type: type as which it was parsed, without any text.
    """
    if not content:
        return "the document is empty"
    if media_type == PDF:
        return "no text layer: run text recognition (OCR) on scans before uploading"
    return "no text; text in images is not recognised" if media_type in _MAY_CONTAIN_ONLY_IMAGES else "no text"
