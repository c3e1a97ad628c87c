"""A source of documents by its name: what it sends is its own, and nobody else's is touched."""

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
    """A name that a source cannot have; the message says which it can."""


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """How a source's documents are sent.

    Attributes:
        name: connector name that owns them; by default made of the kind, the machine and the path.
        prefix: put before every document id, as it is: two sources with different prefixes do not meet.
        take_over: replace and delete documents of other connectors too, and own them from then on.
    """

    name: str | None = None
    prefix: str = ""
    take_over: bool = False


BY_DEFAULT: Final = SourceOptions()


@dataclass(frozen=True, slots=True)
class Source:
    """A source, ready to send.

    Attributes:
        kind: which connector reads it: what its log remembers has another form for each.
        name: see ``SourceOptions``.
        prefix: see there.
        take_over: see there.
    """

    kind: str
    name: str
    prefix: str
    take_over: bool

    @classmethod
    def of(cls, kind: str, path: Path, options: SourceOptions) -> "Source":
        """The source of ``kind`` at ``path``, which is resolved.

        Raises:
            BadSourceName: the name is not one.
        """
        name = options.name or default_name(kind, path)
        try:
            TypeAdapter(ConnectorName).validate_python(name)
        except ValidationError:
            raise BadSourceName(
                f"{name!r} cannot be the name of a source: use up to 100 letters, digits, dots, hyphens and "
                "underscores, the first of them a letter or digit"
            ) from None
        return cls(kind, name, options.prefix, options.take_over)

    def document_id(self, name: str) -> str:
        """Id of the document that is called ``name`` in the source."""
        return f"{self.prefix}{name}"

    def name_of(self, document_id: str) -> str | None:
        """What the document is called in the source; None where its id has another prefix."""
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
        """An upload of the document ``name``, which a person finds at ``path``, by default the name.

        Raises:
            KeyError: the suffix of the path is of no supported type.
        """
        place = PurePosixPath(path or name)
        attributes = DocumentAttributes(
            source=str(path or name),
            metadata=dict(metadata or {}),
            revision=revision,
            connector=self.name,
            take_over=self.take_over,
        )
        content_type = TYPE_OF_SUFFIX[place.suffix.lower()]
        return Upload(self.document_id(name), content, content_type, attributes, place.name)

    def removal(self, document_id: str, revision: int | None = None) -> Removal:
        """The end of a document."""
        return Removal(document_id, revision, self.name, self.take_over)


def default_name(kind: str, path: Path) -> str:
    """A readable name that the same source has in every run, and none of another machine, kind or path."""
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
