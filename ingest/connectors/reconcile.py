"""A run of a connector: its log of this installation is opened, and what it lacks is asked of the service."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from ingest.connectors.client import IngestClient, Summary
from ingest.connectors.sent_log import PERHAPS, LogIdentity, SentLog, default_log_path
from ingest.connectors.source import Source
from schemas.documents import ListedDocument

BEGIN_WAIT_S: Final = 1.0
"""How long the service may take to index what it has accepted, before a run begins with what it lists by then."""

END_WAIT_S: Final = 20.0
"""The same at the end of such a run, before its list does not count as everything."""

MarkOf = Callable[[ListedDocument], str]
"""What the log would have noted of a document, as far as the service can tell; else ``PERHAPS``."""


class SourceRun:
    """A run of one source.

    A log of this installation that is whole is believed. In place of any other, and where documents are to be taken
    over, the service lists what it has of the source. While it has accepted events that it has not indexed, that list
    may lack some: what is listed is used, and at the end of the run it lists again.

    Attributes:
        log: of the source.
    """

    def __init__(self, client: IngestClient, source: Source, log: SentLog, mark_of: MarkOf) -> None:
        self.log = log
        self._client = client
        self._source = source
        self._mark_of = mark_of

    async def begin(self) -> None:
        """List what the service has, if the log does not say."""
        if self.log.complete and not self._source.take_over:
            return
        listed = await self._list(BEGIN_WAIT_S)
        if self._source.take_over:
            # What another source owns by now was sent once, and is to be sent again.
            for document_id in [name for name in self.log.marks if name not in listed]:
                self.log.note(document_id, PERHAPS)

    async def finish(self) -> bool:
        """List once more if the first list may have lacked documents; whether the log has new ones from it."""
        if self.log.complete:
            return False
        known = set(self.log.marks)
        await self._list(END_WAIT_S)
        return not known.issuperset(self.log.marks)

    def report(self, summary: Summary) -> None:
        """Say in the summary whether documents may be gone from the source unseen; then the next run lists again."""
        what = f"source {self._source.name}"
        summary.passed_over.pop(what, None)
        if not self.log.complete:
            summary.passed_over[what] = (
                "the service has accepted documents that it has not indexed, so those that are gone from the source "
                "may not all be found. Are the workers running? Run this again when they have caught up"
            )

    async def _list(self, wait_s: float) -> dict[str, ListedDocument]:
        listed, complete = await self._client.documents_of(self._source.name, wait_s=wait_s)
        marks = {name: self._mark_of(document) for name, document in listed.items()}
        self.log.note_listed(marks, complete=complete or self.log.complete)
        return listed


@asynccontextmanager
async def opened_run(
    client: IngestClient, source: Source, mark_of: MarkOf, log_path: Path | None
) -> AsyncIterator[SourceRun]:
    """A run of the source, begun.

    Args:
        client: the service.
        source: whose log.
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
        run = SourceRun(client, source, log, mark_of)
        await run.begin()
        yield run
