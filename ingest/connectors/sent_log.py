"""What a connector has sent, so that the next run sends only what changed since."""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TextIO

import orjson
import platformdirs

_NAME_CHARS: Final = 16


class SentLog:
    """Document id → mark (a content hash, or a revision) of what the service accepted; a context manager.

    A file of JSON lines, to which each acceptance is appended; opening rewrites it without what is obsolete. Losing its
    end, or all of it, makes a connector send again what the service has, which changes nothing there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self.marks: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.marks = _read(self._path)
        self._rewrite()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def note(self, document_id: str, mark: str | None) -> None:
        """Remember what was accepted; ``None`` for a deletion."""
        if mark is None:
            self.marks.pop(document_id, None)
        else:
            self.marks[document_id] = mark
        if self._file is not None:
            self._file.write(_line(document_id, mark))
            self._file.flush()

    def forget(self) -> None:
        """Begin anew: the service does not have what was sent."""
        self.marks = {}
        self._rewrite()

    def _rewrite(self) -> None:
        if self._file is not None:
            self._file.close()
        fresh = self._path.with_suffix(".new")
        fresh.write_text("".join(_line(name, mark) for name, mark in self.marks.items()), encoding="utf-8")
        fresh.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")


def default_log_path(service_url: str, source: str) -> Path:
    """Where the log of one source, sent to one service, is kept for this user."""
    name = hashlib.sha256(f"{service_url}\n{source}".encode()).hexdigest()[:_NAME_CHARS]
    return platformdirs.user_state_path("freshline") / "sent" / f"{name}.jsonl"


def _line(document_id: str, mark: str | None) -> str:
    return orjson.dumps([document_id, mark]).decode() + "\n"


def _read(path: Path) -> dict[str, str]:
    marks: dict[str, str] = {}
    if not path.exists():
        return marks
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            document_id, mark = orjson.loads(line)
        except ValueError:  # the end that a killed run left
            continue
        if mark is None:
            marks.pop(document_id, None)
        else:
            marks[document_id] = mark
    return marks
