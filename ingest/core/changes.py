"""Validated document requests, independent of their encoding."""

from dataclasses import dataclass

from schemas.documents import DocumentAttributes


@dataclass(frozen=True, slots=True)
class Upload:
    """Creates or replaces a document.

    Attributes:
        content_type: supported media type, with ``charset`` if one is declared for text.
        file_name: file name at the sender.
    """

    document_id: str
    content: bytes
    content_type: str
    attributes: DocumentAttributes
    file_name: str | None = None

    @property
    def revision(self) -> int | None:
        """Revision of the source."""
        return self.attributes.revision

    @property
    def connector(self) -> str | None:
        """Name of the sending connector."""
        return self.attributes.connector

    @property
    def take_over(self) -> bool:
        """Whether it may replace a document of another connector."""
        return self.attributes.take_over


@dataclass(frozen=True, slots=True)
class Removal:
    """Deletes a document."""

    document_id: str
    revision: int | None = None
    connector: str | None = None
    take_over: bool = False


DocumentRequest = Upload | Removal
