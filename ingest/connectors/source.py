"""Identity of a source. It owns the documents that it sends, and does not change those of other sources."""

import hashlib
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from ingest.core.changes import Removal, Upload
from ingest.core.content import TYPE_OF_SUFFIX
from schemas.documents import ConnectorName, DocumentAttributes

_MACHINE_ID_FILES: Final = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
_SLUG_CHARS: Final = 40
_HASH_CHARS: Final = 6


class BadSourceName(ValueError):
    """Invalid source name; the message has the allowed form."""


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Options of a source.

    Attributes:
        name: connector name that owns the documents. Default: derived from kind, machine and path.
        prefix: prefix of every document id; separates sources with equal paths.
        take_over: replace and delete documents of other connectors too, and become their owner.
    """

    name: str | None = None
    prefix: str = ""
    take_over: bool = False


BY_DEFAULT: Final = SourceOptions()


@dataclass(frozen=True, slots=True)
class Source:
    """A source with resolved options.

    Attributes:
        kind: connector that reads it, which defines the form of the marks in its log.
        name: connector name that owns the documents.
        prefix: prefix of every document id.
        take_over: see ``SourceOptions``.
    """

    kind: str
    name: str
    prefix: str
    take_over: bool

    @classmethod
    def of(cls, kind: str, path: Path, options: SourceOptions) -> "Source":
        """Source of ``kind`` at the resolved ``path``.

        Raises:
            BadSourceName: the name is invalid.
        """
        name = options.name or default_name(kind, path)
        try:
            TypeAdapter(ConnectorName).validate_python(name)
        except ValidationError:
            raise BadSourceName(
                f"{name!r} is not a valid source name: use up to 100 letters, digits, dots, hyphens and underscores, "
                "starting with a letter or digit"
            ) from None
        return cls(kind, name, options.prefix, options.take_over)

    def document_id(self, name: str) -> str:
        """Document id of a name in the source."""
        return f"{self.prefix}{name}"

    def name_of(self, document_id: str) -> str | None:
        """Name in the source of a document id; None if the id has another prefix."""
        return document_id.removeprefix(self.prefix) if document_id.startswith(self.prefix) else None

    def upload(
        self,
        name: str,
        content: bytes,
        *,
        path: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        revision: int | None = None,
    ) -> Upload:
        """Upload of the document ``name``.

        Args:
            name: name in the source.
            content: content.
            path: source attribute. Default: the name.
            metadata: metadata attribute.
            revision: revision of the source, if it has any.

        Raises:
            KeyError: the suffix of the path has no supported type.
        """
        file = PurePosixPath(path or name)
        attributes = DocumentAttributes(
            source=str(path or name),
            metadata=dict(metadata or {}),
            revision=revision,
            connector=self.name,
            take_over=self.take_over,
        )
        content_type = TYPE_OF_SUFFIX[file.suffix.lower()]
        return Upload(self.document_id(name), content, content_type, attributes, file.name)

    def removal(self, document_id: str, revision: int | None = None) -> Removal:
        """Removal of a document."""
        return Removal(document_id, revision, self.name, self.take_over)


def default_name(kind: str, path: Path) -> str:
    """Readable name that is stable between runs, and unique per machine, kind and path."""
    slug = re.sub(r"[^a-z0-9]+", "-", path.name.lower()).strip("-")[:_SLUG_CHARS].rstrip("-") or kind
    identity = "\0".join((_machine_id(), kind, str(path))).encode(errors="surrogateescape")
    return f"{slug}-{hashlib.sha256(identity).hexdigest()[:_HASH_CHARS]}"


def _machine_id() -> str:
    for file in _MACHINE_ID_FILES:
        try:
            if text := file.read_text(encoding="ascii").strip():
                return text
        except (OSError, UnicodeDecodeError):
            continue
    return platform.node()
