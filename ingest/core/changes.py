"""What a sender asks for, checked and decoded, however it came."""

from dataclasses import dataclass

from schemas.documents import DocumentAttributes


@dataclass(frozen=True, slots=True)
class Upload:
    """Content that shall be searchable from now on, in place of what the document was.

    Attributes:
        content_type: one of the supported media types; with ``charset`` where text is declared to be in one.
        file_name: the name that the content had at its sender.
    """

    document_id: str
    content: bytes
    content_type: str
    attributes: DocumentAttributes
    file_name: str | None = None

    @property
    def revision(self) -> int | None:
        """The source's own revision."""
        return self.attributes.revision

    @property
    def connector(self) -> str | None:
        """Name of the connector that sends it."""
        return self.attributes.connector

    @property
    def take_over(self) -> bool:
        """Whether it is meant for a document of another connector too."""
        return self.attributes.take_over


@dataclass(frozen=True, slots=True)
class Removal:
    """The document shall not be found any more."""

    document_id: str
    revision: int | None = None
    connector: str | None = None
    take_over: bool = False


DocumentRequest = Upload | Removal
