"""Connector for folders. Each supported file is a document; its id is the path relative to the folder."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Final, NamedTuple

from watchfiles import awatch

from ingest.connectors.client import Failure, IngestClient, Progress, Summary, no_progress
from ingest.connectors.files import Listing, Unreadable, list_folder, read, sha256_of
from ingest.connectors.guard import check_deletions
from ingest.connectors.reconcile import opened_run
from ingest.connectors.rounds import Outgoing
from ingest.connectors.sent_log import UNCONFIRMED, SentLog
from ingest.connectors.source import BY_DEFAULT, Source, SourceOptions
from schemas.documents import ListedDocument

_WATCH_PAUSE_MS: Final = 250


async def ingest_folder(
    client: IngestClient,
    path: Path,
    options: SourceOptions = BY_DEFAULT,
    *,
    watch: bool = False,
    yes: bool = False,
    progress: Progress = no_progress,
    log_path: Path | None = None,
) -> Summary:
    """Send the changes in the folder since the last run; with ``watch``, continue until cancelled.

    A missing file is a deletion, a renamed one an upload and a deletion. Deletions are sent after all uploads are
    accepted, so that moved content stays searchable. Files and folders that cannot be read are failures, not
    deletions. Unsupported types, names that are not UTF-8 and links to targets outside are skipped and listed in the
    summary. Hidden files are ignored.

    Args:
        client: the service.
        path: the folder.
        options: name, prefix and ownership of the source.
        watch: keep sending changes as they happen.
        yes: confirm mass deletions, see ``guard``.
        progress: called after each request.
        log_path: path of the sent log; None for the default path of this user.

    Raises:
        NotADirectoryError: the folder does not exist.
        OSError: it cannot be listed.
        BadSourceName: the name is invalid.
        SourceInUse: another run of this source is active.
        TooManyDeletions: nothing was deleted; requires ``yes``.
        ServiceUnavailable: the rest was not sent.
    """
    root = await asyncio.to_thread(_existing, path)
    source = Source.of("folder", root, options)
    summary = Summary()
    async with opened_run(client, source, _mark_of, log_path) as run:
        folder = _Folder(root, source, run.log, summary, confirmed=yes)

        async def send(paths: set[Path]) -> None:
            scan = await folder.scan(paths)
            await client.send_all(folder.uploads(scan), run.log, summary, progress)
            await client.send_all(folder.removals(scan.deleted), run.log, summary, progress)
            if paths == {root} and await run.finish():
                await client.send_all(folder.removals(folder.deleted(scan, paths)), run.log, summary, progress)
            run.report(summary)
            progress(summary)

        if not watch:
            await send({root})
            return summary
        # The first scan of the whole folder starts after the watch, so that no change in between is missed.
        paths = {root}
        watched = awatch(root, watch_filter=None, rust_timeout=_WATCH_PAUSE_MS, yield_on_timeout=True)
        async with aclosing(watched):
            async for changes in watched:
                paths |= {Path(name) for _, name in changes}
                if paths:
                    await send(paths)
                    paths = set()
    return summary


class _Scan(NamedTuple):
    """Result of a scan.

    Attributes:
        listing: the files.
        hashes: name → content hash of the readable files.
        changed: new or changed documents, as name → file.
        deleted: ids of the deleted documents.
    """

    listing: Listing
    hashes: dict[str, str]
    changed: dict[str, Path]
    deleted: list[str]


class _Folder:
    """Compares the folder with the sent log."""

    def __init__(self, root: Path, source: Source, log: SentLog, summary: Summary, *, confirmed: bool) -> None:
        self._root = root
        self._source = source
        self._log = log
        self._summary = summary
        self._confirmed = confirmed

    async def scan(self, paths: set[Path]) -> _Scan:
        """Compare the files at or below ``paths`` with the sent log.

        Pass all changed paths in one call, so that moves are recognized and the deletion guard sees the total.

        Raises:
            TooManyDeletions: see ``guard``.
            OSError: the folder itself cannot be listed.
        """
        listing = await asyncio.to_thread(self._list, paths)
        hashes = await asyncio.to_thread(self._hashes, listing.files)
        marks = self._log.marks
        changed = {
            name: listing.files[name]
            for name, mark in hashes.items()
            if marks.get(self._source.document_id(name)) != mark
        }
        self._summary.skipped += len(hashes) - len(changed)
        scan = _Scan(listing, hashes, changed, [])
        return scan._replace(deleted=self.deleted(scan, paths))

    def deleted(self, scan: _Scan, paths: set[Path]) -> list[str]:
        """Ids of logged documents at or below ``paths`` that the scan did not find.

        Raises:
            TooManyDeletions: see ``guard``.
        """
        marks = self._log.marks
        deleted = [document_id for document_id in marks if self._is_deleted(document_id, scan.listing, paths)]
        # Moved content does not count as lost.
        present = set(scan.hashes.values())
        lost = sum(marks[document_id] not in present for document_id in deleted)
        check_deletions(lost, len(marks), confirmed=self._confirmed)
        return sorted(deleted)

    async def uploads(self, scan: _Scan) -> AsyncIterator[Outgoing]:
        """Uploads of new and changed files, read again so that the logged hash is that of the content sent."""
        for name, file in scan.changed.items():
            try:
                content = await asyncio.to_thread(read, file)
            except Unreadable as error:
                self._summary.failed.append(Failure(name, str(error)))
                continue
            yield Outgoing(self._source.upload(name, content), hashlib.sha256(content).hexdigest())

    async def removals(self, document_ids: list[str]) -> AsyncIterator[Outgoing]:
        """Removals of these documents."""
        for document_id in document_ids:
            yield Outgoing(self._source.removal(document_id), None)

    def _is_deleted(self, document_id: str, listing: Listing, paths: set[Path]) -> bool:
        name = self._source.name_of(document_id)
        if name is None:  # sent with another prefix
            return self._root in paths
        return not listing.may_hold(name) and _is_within(self._root / name, paths)

    def _list(self, paths: set[Path]) -> Listing:
        outermost = sorted(path for path in paths if not _is_within(path.parent, paths))
        merged = Listing()
        for path in outermost:
            listing = list_folder(self._root, path)
            merged.files |= listing.files
            merged.problems |= listing.problems
            merged.ignored_files |= listing.ignored_files
            merged.unlisted |= listing.unlisted
        self._summary.ignored_files |= merged.ignored_files
        self._summary.failed += [Failure(name, reason) for name, reason in merged.problems.items()]
        return merged

    def _hashes(self, files: Mapping[str, Path]) -> dict[str, str]:
        hashes: dict[str, str] = {}
        for name, file in files.items():
            try:
                hashes[name] = sha256_of(file)
            except Unreadable as error:
                self._summary.failed.append(Failure(name, str(error)))
        return hashes


def _mark_of(document: ListedDocument) -> str:
    return document.content_sha256 or UNCONFIRMED


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is not a folder")
    return path.resolve()


def _is_within(path: Path, paths: set[Path]) -> bool:
    return path in paths or any(parent in paths for parent in path.parents)
