"""Connector for recorded event histories: one JSON event per line, plain or gzipped, in order.

Each line has ``seq``, ``type`` (created, updated, renamed, deleted), ``doc_id``, ``path`` and, if the content is new,
``content`` or ``content_b64``. A renamed document keeps its id; its path is its source attribute.
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
    """A line is not a valid event; the message has its number and the reason."""


class RecordedEvent(Message):
    """A line of the file."""

    seq: int = Field(ge=0)
    type: Literal["created", "updated", "renamed", "deleted"]
    doc_id: DocumentId
    path: str
    content: str | None = None
    content_b64: Base64Bytes | None = None

    def new_content(self) -> bytes | None:
        """Content of the event, if any."""
        return self.content_b64 if self.content is None else self.content.encode()


async def ingest_event_file(
    client: IngestClient,
    path: Path,
    options: SourceOptions = BY_DEFAULT,
    *,
    progress: Progress = no_progress,
    log_path: Path | None = None,
) -> Summary:
    """Send the events of the file, each with revision ``seq + 1``; skip those that an earlier run sent.

    Only deletion events delete: a document without events in the file is left unchanged.

    Args:
        client: the service.
        path: the file.
        options: name, prefix and ownership of the source.
        progress: called after each request.
        log_path: path of the sent log; None for the default path of this user.

    Raises:
        BadEventFile: a line is invalid; the events before it were sent.
        BadSourceName: the name is invalid.
        SourceInUse: another run of this source is active.
        ServiceUnavailable: the rest was not sent.
    """
    summary = Summary()
    source = Source.of("events", await asyncio.to_thread(path.resolve), options)
    async with opened_run(client, source, _mark_of, log_path) as run:
        # Documents missing from the file are not deleted, so the log does not have to be complete.
        await client.send_all(_outgoing(path, source, run.log, summary), run.log, summary, progress)
    return summary


def read_events(path: Path) -> Iterator[RecordedEvent]:
    """Read a ``.jsonl`` or ``.jsonl.gz`` file lazily, line by line."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                yield RecordedEvent.model_validate_json(line)
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(str(part) for part in first["loc"])
                raise BadEventFile(f"{path.name} line {number}: {where}: {first['msg']}") from None


async def _outgoing(path: Path, source: Source, log: SentLog, summary: Summary) -> AsyncIterator[Outgoing]:
    """Events to send. A rename without content sends the document's previous content with the new path."""
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
            # Deletions are kept in the log too: the next run reads them again.
            yield Outgoing(request, str(revision))


def _request(source: Source, event: RecordedEvent, content: bytes | None, revision: int) -> Upload | Removal | Failure:
    if event.type == "deleted":
        return source.removal(source.document_id(event.doc_id), revision)
    if content is None:
        return Failure(event.doc_id, f"event {event.seq} has no content, and neither has any earlier event")
    suffix = PurePosixPath(event.path).suffix
    if suffix.lower() not in TYPE_OF_SUFFIX:
        return Failure(event.doc_id, f"{event.path}: files named {suffix or 'without a suffix'} are not supported")
    metadata = {"path": event.path}
    return source.upload(event.doc_id, content, path=event.path, metadata=metadata, revision=revision)


def _mark_of(document: ListedDocument) -> str:
    return str(document.version)


def _opened(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
