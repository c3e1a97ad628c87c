"""What a connector has sent, so that the next run sends only what changed since, and finds what is gone."""

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

PERHAPS: Final = ""
"""Mark of a document that the service may have, in whatever state: it was being sent, or another run sent it."""


class SourceInUse(Exception):
    """Another run of the same source is under way."""


class LogIdentity(Message):
    """Whose log it is, as its first line says. A log of anybody else is not read.

    Attributes:
        format: of the lines.
        kind: of the connector, which alone knows what its marks mean.
        installation: id of the installation that accepted what is noted.
        tenant: whose documents they are.
        source: name of the source.
    """

    format: int = _FORMAT
    kind: str
    installation: str
    tenant: str
    source: str


class _Head(LogIdentity):
    complete: bool


class SentLog:
    """Document id → mark (a content hash, or a revision) of what the service accepted; a context manager.

    A file of JSON lines, to which each acceptance is appended; opening rewrites it without what is obsolete. A document
    is noted, durably, before it is sent for the first time, so none that the service may have is ever unknown.

    Attributes:
        marks: document id → mark; ``PERHAPS`` where the state of the document is not known.
        complete: every document of the source that the service may have is in ``marks``. False for a log that is new,
            of somebody else, or damaged: what it lacks is to be asked of the service before anything counts as gone.
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
                f"source {self._identity.source!r} is being sent by another run on this machine: "
                "wait for its end, or end it"
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
        """Note, before they are sent, documents that the service will perhaps have; on disk when this returns."""
        new = [document_id for document_id in document_ids if document_id not in self.marks]
        if not new:
            return
        self._begun.update(new)
        self._append(dict.fromkeys(new, PERHAPS))
        if self._file is not None:
            os.fsync(self._file.fileno())

    def note(self, document_id: str, mark: str | None) -> None:
        """Remember what was accepted; ``None`` for a document that is not there any more."""
        self._begun.discard(document_id)
        self._append({document_id: mark})

    def note_refused(self, document_id: str) -> None:
        """Forget a document that was begun for the first time and is certainly not accepted."""
        if document_id in self._begun:
            self.note(document_id, None)

    def note_listed(self, listed: Mapping[str, str], *, complete: bool) -> None:
        """Note what the service has of the source, document id → mark, and whether it lacks nothing.

        What is noted already stays as it is.
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
        head = _Head(**self._identity.model_dump(), complete=self.complete)
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb") as file:
            file.write(_line(head.model_dump()))
            file.writelines(_line([document_id, mark]) for document_id, mark in self.marks.items())
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        self._file = self._path.open("ab")


def default_log_path(identity: LogIdentity) -> Path:
    """Where this user's log of one source, sent to one tenant of one installation, is kept."""
    whose = f"{identity.installation}\n{identity.tenant}\n{identity.source}"
    name = hashlib.sha256(whose.encode()).hexdigest()[:_NAME_CHARS]
    return platformdirs.user_state_path("freshline") / "sent" / f"{name}.jsonl"


def _line(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def _read(path: Path, identity: LogIdentity) -> tuple[dict[str, str], bool]:
    """The marks of the log, and whether all that was noted is among them."""
    # JSON lines end with a line feed. Other line ends of Unicode occur in document ids as they are.
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    try:
        head = _Head.model_validate_json(lines[0] if lines else b"")
    except ValidationError:
        return {}, False
    if LogIdentity.model_validate(head.model_dump()) != identity:
        return {}, False
    marks: dict[str, str] = {}
    damaged = False
    # What follows the last line feed is the end that a killed run left: of an event that it had begun.
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
    return marks, head.complete and not damaged
