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


@dataclass(frozen=True, slots=True)
class Removal:
    """The document shall not be found any more."""

    document_id: str
    revision: int | None = None


DocumentRequest = Upload | Removal
