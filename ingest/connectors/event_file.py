"""A recorded history as a source: one JSON event per line, plain or gzipped, in order.

Each line has ``seq``, ``type`` (created, updated, renamed, deleted), ``doc_id``, ``path`` and, where the content is
new, ``content`` or ``content_b64``. The document keeps its id when it is renamed; its path is its source.
"""

import asyncio
import gzip
from collections.abc import AsyncIterator, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, cast

from pydantic import Base64Bytes, Field, ValidationError

from ingest.connectors.client import Failure, IngestClient, Progress, Summary, no_progress
from ingest.connectors.reconcile import opened_run
from ingest.connectors.rounds import Outgoing
from ingest.connectors.sent_log import SentLog
from ingest.connectors.source import BY_DEFAULT, Source, SourceOptions
from ingest.core.changes import Removal, Upload
from ingest.core.content import TYPE_OF_SUFFIX
from schemas.documents import DocumentId, ListedDocument
from schemas.models import Message


class BadEventFile(ValueError):
    """A line of the file is no event; the message tells which line and why."""


class RecordedEvent(Message):
    """One line."""

    seq: int = Field(ge=0)
    type: Literal["created", "updated", "renamed", "deleted"]
    doc_id: DocumentId
    path: str
    content: str | None = None
    content_b64: Base64Bytes | None = None

    def new_content(self) -> bytes | None:
        """The content that comes with the event."""
        return self.content_b64 if self.content is None else self.content.encode()


async def ingest_event_file(
    client: IngestClient,
    path: Path,
    options: SourceOptions = BY_DEFAULT,
    *,
    progress: Progress = no_progress,
    log_path: Path | None = None,
) -> Summary:
    """Send the events of the file, each with ``seq + 1`` as its revision; those sent by an earlier run are skipped.

    A document that the file does not speak of is not gone: only a deletion in the file is one.

    Args:
        client: the service.
        path: the file.
        options: name, prefix and rights of the source.
        progress: called after each request.
        log_path: where to remember what was sent; by default a file of this user, see ``opened_run``.

    Raises:
        BadEventFile: see there; events before that line are sent.
        BadSourceName, SourceInUse: see there.
        ServiceUnavailable: the rest was not sent.
    """
    summary = Summary()
    source = Source.of("events", await asyncio.to_thread(path.resolve), options)
    async with opened_run(client, source, _mark_of, log_path) as run:
        # What the file does not speak of is not gone, so the log need not be complete.
        await client.send_all(_outgoing(path, source, run.log, summary), run.log, summary, progress)
    return summary


def read_events(path: Path) -> Iterator[RecordedEvent]:
    """The events of a ``.jsonl`` or ``.jsonl.gz`` file, one line in memory at a time."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                yield RecordedEvent.model_validate_json(line)
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(str(part) for part in first["loc"])
                raise BadEventFile(f"{path.name} line {number}: {where}: {first['msg']}") from None


async def _outgoing(path: Path, source: Source, log: SentLog, summary: Summary) -> AsyncIterator[Outgoing]:
    """What to send. A rename without content sends the content that the document had, at its new path."""
    sent = {document_id: int(mark) if mark else 0 for document_id, mark in log.marks.items()}
    contents: dict[str, bytes] = {}
    for event in read_events(path):
        content = event.new_content()
        if content is None and event.type != "deleted":
            content = contents.get(event.doc_id)
        contents.pop(event.doc_id, None)
        if content is not None:
            contents[event.doc_id] = content
        revision = event.seq + 1
        if revision <= sent.get(source.document_id(event.doc_id), 0):
            summary.skipped += 1
            continue
        request = _request(source, event, content, revision)
        if isinstance(request, Failure):
            summary.failed.append(request)
        else:
            # Deletions are remembered too: the file tells of them again in the next run.
            yield Outgoing(request, str(revision))


def _request(source: Source, event: RecordedEvent, content: bytes | None, revision: int) -> Upload | Removal | Failure:
    if event.type == "deleted":
        return source.removal(source.document_id(event.doc_id), revision)
    if content is None:
        return Failure(event.doc_id, f"event {event.seq} has no content, and no event before it has")
    suffix = PurePosixPath(event.path).suffix
    if suffix.lower() not in TYPE_OF_SUFFIX:
        return Failure(event.doc_id, f"{event.path}: files named {suffix or 'without a suffix'} are not supported")
    metadata = {"path": event.path}
    return source.upload(event.doc_id, content, path=event.path, metadata=metadata, revision=revision)


def _mark_of(document: ListedDocument) -> str:
    return str(document.version)


def _opened(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
