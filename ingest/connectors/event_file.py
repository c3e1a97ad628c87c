"""A recorded history as a source: one JSON event per line, plain or gzipped, in order.

Each line has ``seq``, ``type`` (created, updated, renamed, deleted), ``doc_id``, ``path`` and, where the content is
new, ``content`` or ``content_b64``. The document keeps its id when it is renamed; its path is its source.
"""

import asyncio
import gzip
from collections.abc import AsyncIterator, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast

from pydantic import Base64Bytes, Field, ValidationError

from ingest.connectors.client import Failure, IngestClient, Progress, Summary, begin_with, no_progress
from ingest.connectors.rounds import Outgoing
from ingest.connectors.sent_log import SentLog, default_log_path
from ingest.core.changes import Removal, Upload
from ingest.core.content import TYPE_OF_SUFFIX
from schemas.documents import DocumentAttributes, DocumentId
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
    *,
    progress: Progress = no_progress,
    log_path: Path | None = None,
) -> Summary:
    """Send the events of the file, each with ``seq + 1`` as its revision; those sent by an earlier run are skipped.

    Args:
        client: the service.
        path: the file.
        progress: called after each request.
        log_path: where to remember what was sent; by default a file of this user, one per service and event file.

    Raises:
        BadEventFile: see there; events before that line are sent.
        ServiceUnavailable: the rest was not sent.
    """
    summary = Summary()
    source = await asyncio.to_thread(path.resolve)
    with SentLog(log_path or default_log_path(client.url, str(source))) as log:
        await begin_with(client, log)
        await client.send_all(_outgoing(path, log, summary), log, summary, progress)
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


async def _outgoing(path: Path, log: SentLog, summary: Summary) -> AsyncIterator[Outgoing]:
    """What to send. A rename without content sends the content that the document had, at its new path."""
    sent = {document_id: int(mark) for document_id, mark in log.marks.items()}
    contents: dict[str, bytes] = {}
    for event in read_events(path):
        content = event.new_content()
        if content is None and event.type != "deleted":
            content = contents.get(event.doc_id)
        contents.pop(event.doc_id, None)
        if content is not None:
            contents[event.doc_id] = content
        revision = event.seq + 1
        if revision <= sent.get(event.doc_id, 0):
            summary.skipped += 1
            continue
        request = _request(event, content, revision)
        if isinstance(request, Failure):
            summary.failed.append(request)
        else:
            # Deletions are remembered too: the file tells of them again in the next run.
            yield Outgoing(request, str(revision))


def _request(event: RecordedEvent, content: bytes | None, revision: int) -> Upload | Removal | Failure:
    if event.type == "deleted":
        return Removal(event.doc_id, revision)
    if content is None:
        return Failure(event.doc_id, f"event {event.seq} has no content, and no event before it has")
    path = PurePosixPath(event.path)
    content_type = TYPE_OF_SUFFIX.get(path.suffix.lower())
    if content_type is None:
        return Failure(event.doc_id, f"{event.path}: files named {path.suffix or 'without a suffix'} are not supported")
    metadata: dict[str, Any] = {"path": event.path}
    attributes = DocumentAttributes(source=event.path, metadata=metadata, revision=revision)
    return Upload(event.doc_id, content, content_type, attributes, path.name)


def _opened(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
