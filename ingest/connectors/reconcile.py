"""A connector run: opens the sent log of the source, and completes it from the service."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from ingest.connectors.client import IngestClient, Summary
from ingest.connectors.sent_log import UNCONFIRMED, LogIdentity, SentLog, default_log_path
from ingest.connectors.source import Source
from schemas.documents import ListedDocument

BEGIN_WAIT_S: Final = 1.0
"""Longest wait for the service to index accepted events, before a run starts with a possibly incomplete list."""

END_WAIT_S: Final = 20.0
"""The same at the end of the run, before its list is treated as incomplete."""

MarkOf = Callable[[ListedDocument], str]
"""Mark of a listed document, if it can be derived; else ``UNCONFIRMED``."""


class SourceRun:
    """A run of one source.

    A complete log of this installation is trusted. Otherwise, and with ``take_over``, the documents of the source are
    listed from the service. The list may lack accepted events that are not indexed yet; it is then read again at the
    end of the run.

    Attributes:
        log: sent log of the source.
    """

    def __init__(self, client: IngestClient, source: Source, log: SentLog, mark_of: MarkOf) -> None:
        self.log = log
        self._client = client
        self._source = source
        self._mark_of = mark_of

    async def begin(self) -> None:
        """Complete the log from the service if necessary."""
        if self.log.complete and not self._source.take_over:
            return
        listed = await self._list(BEGIN_WAIT_S)
        if self._source.take_over:
            # Logged documents that another source owns now are sent again.
            for document_id in [name for name in self.log.marks if name not in listed]:
                self.log.note(document_id, UNCONFIRMED)

    async def finish(self) -> bool:
        """List again if the first list may be incomplete; returns whether documents were added to the log."""
        if self.log.complete:
            return False
        before = set(self.log.marks)
        await self._list(END_WAIT_S)
        return not before.issuperset(self.log.marks)

    def report(self, summary: Summary) -> None:
        """Add a note to the summary if deletions may have been missed. The next run lists again."""
        subject = f"source {self._source.name}"
        summary.ignored_files.pop(subject, None)
        if not self.log.complete:
            summary.ignored_files[subject] = (
                "accepted documents are not indexed yet, so deletions may have been missed. Check for active workers "
                "with `freshline lag`, and run this again when there is no lag"
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
    """Open a run of the source.

    Args:
        client: the service.
        source: the source.
        mark_of: mark of a listed document.
        log_path: path of the sent log; None for the default path of this user.

    Raises:
        SourceInUse: another run of this source is active.
        ServiceUnavailable: the documents of the source cannot be listed.
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
