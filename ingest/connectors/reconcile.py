"""A run of a connector begins: its log of this installation is opened, and what it lacks is asked of the service."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from ingest.connectors.client import Failure, IngestClient, Summary
from ingest.connectors.sent_log import PERHAPS, LogIdentity, SentLog, default_log_path
from ingest.connectors.source import Source
from schemas.documents import ListedDocument

LIST_WAIT_S: Final = 20.0
"""How long the service may take to index what it has accepted, before what it lists does not count as everything."""

MarkOf = Callable[[ListedDocument], str]
"""What the log would have noted of a document, as far as the service can tell; else ``PERHAPS``."""


@asynccontextmanager
async def opened_log(
    client: IngestClient, source: Source, summary: Summary, mark_of: MarkOf, log_path: Path | None
) -> AsyncIterator[SentLog]:
    """The log of the source, from which no document is missing that the service may have.

    A log of this installation that is whole is believed. In place of any other, and where documents are to be taken
    over, the service lists what it has of the source. While it has accepted events that it has not indexed, that list
    may lack some: what is listed is used, the summary names the rest as a failure, and the next run lists again.

    Args:
        client: the service.
        source: whose log.
        summary: gets the failure.
        mark_of: see there.
        log_path: where the log is, other than usual.

    Raises:
        SourceInUse: another run has it open.
        ServiceUnavailable: the service cannot say what it has.
    """
    installation = await client.installation()
    identity = LogIdentity(
        kind=source.kind,
        installation=installation.installation_id,
        tenant=installation.tenant,
        source=source.name,
    )
    with SentLog(log_path or default_log_path(identity), identity) as log:
        if not log.complete or source.take_over:
            await _reconcile(client, source, log, summary, mark_of)
        yield log


async def _reconcile(client: IngestClient, source: Source, log: SentLog, summary: Summary, mark_of: MarkOf) -> None:
    listed, complete = await client.documents_of(source.name, wait_s=LIST_WAIT_S)
    if source.take_over:
        # What another source owns by now was sent once, and is to be sent again.
        for document_id in [name for name in log.marks if name not in listed]:
            log.note(document_id, PERHAPS)
    log.note_listed({name: mark_of(document) for name, document in listed.items()}, complete=complete or log.complete)
    if not log.complete:
        reason = (
            "the service has accepted documents that it has not indexed: those that are gone from the source may not "
            "all be found. Are the workers running? Run this again when they have caught up"
        )
        summary.failed.append(Failure(f"source {source.name}", reason))
