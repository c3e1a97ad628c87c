"""Log of what a connector has sent. The next run sends only changes, and detects deletions."""

import fcntl
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import orjson
import platformdirs
from pydantic import ValidationError

from schemas.models import Message

_NAME_CHARS: Final = 16
_FORMAT: Final = 2

UNCONFIRMED: Final = ""
"""Mark of a document that the service may have in unknown state: its upload started, or another run sent it."""


class SourceInUse(Exception):
    """Another run of the same source is active."""


class LogIdentity(Message):
    """Identity of a log, stored in its first line. A log with another identity is ignored.

    Attributes:
        format: version of the line format.
        kind: connector, which defines the meaning of the marks.
        installation: id of the installation that accepted the documents.
        tenant: tenant of the documents.
        source: name of the source.
    """

    format: int = _FORMAT
    kind: str
    installation: str
    tenant: str
    source: str


class _Header(LogIdentity):
    complete: bool


class SentLog:
    """Document id → mark (content hash or revision) of the accepted documents. A context manager.

    A file of JSON lines to which each acceptance is appended; opening compacts it. A document is logged durably before
    it is sent for the first time, so the log includes every document that the service may have.

    Attributes:
        marks: document id → mark; ``UNCONFIRMED`` if the state of the document is unknown.
        complete: whether ``marks`` has every document of the source that the service may have. False for a log that is
            new, of another identity, or damaged: documents must be listed from the service before any is deleted.
    """

    def __init__(self, path: Path, identity: LogIdentity) -> None:
        self._path = path
        self._identity = identity
        self._file: BinaryIO | None = None
        self._lock: BinaryIO | None = None
        self._begun: set[str] = set()
        self.marks: dict[str, str] = {}
        self.complete = False

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._path.with_suffix(".lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise SourceInUse(
                f"another run on this machine is sending source {self._identity.source!r}: wait for it, or stop it"
            ) from None
        try:
            self.marks, self.complete = _read(self._path, self._identity)
            self._rewrite()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                file.close()

    def begin(self, document_ids: Iterable[str]) -> None:
        """Record documents before they are sent for the first time. Durable on return."""
        new = [document_id for document_id in document_ids if document_id not in self.marks]
        if not new:
            return
        self._begun.update(new)
        self._append(dict.fromkeys(new, UNCONFIRMED))
        if self._file is not None:
            os.fsync(self._file.fileno())

    def note(self, document_id: str, mark: str | None) -> None:
        """Record an accepted document; ``None`` removes it."""
        self._begun.discard(document_id)
        self._append({document_id: mark})

    def note_rejected(self, document_id: str) -> None:
        """Remove a document whose first upload was rejected."""
        if document_id in self._begun:
            self.note(document_id, None)

    def note_listed(self, listed: Mapping[str, str], *, complete: bool) -> None:
        """Add documents that the service listed, as document id → mark. Existing marks are kept.

        Args:
            listed: document id → mark.
            complete: whether the list is complete.
        """
        self.marks = {**listed, **self.marks}
        self.complete = complete
        self._rewrite()

    def _append(self, marks: Mapping[str, str | None]) -> None:
        for document_id, mark in marks.items():
            if mark is None:
                self.marks.pop(document_id, None)
            else:
                self.marks[document_id] = mark
        if self._file is not None:
            self._file.write(b"".join(_line([document_id, mark]) for document_id, mark in marks.items()))
            self._file.flush()

    def _rewrite(self) -> None:
        if self._file is not None:
            self._file.close()
        header = _Header(**self._identity.model_dump(), complete=self.complete)
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb") as file:
            file.write(_line(header.model_dump()))
            file.writelines(_line([document_id, mark]) for document_id, mark in self.marks.items())
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        self._file = self._path.open("ab")


def default_log_path(identity: LogIdentity) -> Path:
    """Path of this user's log for an identity."""
    identity_text = f"{identity.installation}\n{identity.tenant}\n{identity.source}"
    name = hashlib.sha256(identity_text.encode()).hexdigest()[:_NAME_CHARS]
    return platformdirs.user_state_path("freshline") / "sent" / f"{name}.jsonl"


def _line(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def _read(path: Path, identity: LogIdentity) -> tuple[dict[str, str], bool]:
    """Read the marks, and whether they are complete."""
    # Split at line feeds only: document ids may contain other Unicode line separators.
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    try:
        header = _Header.model_validate_json(lines[0] if lines else b"")
    except ValidationError:
        return {}, False
    if LogIdentity.model_validate(header.model_dump()) != identity:
        return {}, False
    marks: dict[str, str] = {}
    damaged = False
    # Text after the last line feed is a partial write of a run that was killed.
    for line in lines[1:-1]:
        try:
            document_id, mark = orjson.loads(line)
        except (ValueError, TypeError):
            damaged = True
            continue
        if mark is None:
            marks.pop(document_id, None)
        else:
            marks[document_id] = mark
    return marks, header.complete and not damaged
