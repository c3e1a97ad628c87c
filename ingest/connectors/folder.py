"""A folder as a source: each supported file is a document named by its path below the folder."""

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
from ingest.connectors.sent_log import PERHAPS, SentLog
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
    """Send what changed in the folder since the last run; with ``watch``, go on until cancelled.

    A file that is gone is a deletion, and a renamed one an upload and a deletion. Deletions are sent when all uploads
    are accepted, so that what moved is not missed for longer than it must be. What cannot be read or listed is a
    failure, and no deletion. Unsupported types, names that are not UTF-8 and links that lead out are passed over, and
    named in the summary; hidden files are passed over.

    Args:
        client: the service.
        path: the folder.
        options: name, prefix and rights of the source.
        watch: keep sending changes as they happen.
        yes: delete even if very much is gone.
        progress: called after each request.
        log_path: where to remember what was sent; by default a file of this user, see ``opened_run``.

    Raises:
        NotADirectoryError: there is no such folder.
        OSError: it cannot be listed, which must not look like deletions.
        BadSourceName, SourceInUse, TooManyDeletions: see there.
        ServiceUnavailable: the rest was not sent.
    """
    root = await asyncio.to_thread(_existing, path)
    source = Source.of("folder", root, options)
    summary = Summary()
    async with opened_run(client, source, _mark_of, log_path) as run:
        folder = _Folder(root, source, run.log, summary, confirmed=yes)

        async def send(places: set[Path]) -> None:
            look = await folder.look(places)
            await client.send_all(folder.uploads(look), run.log, summary, progress)
            await client.send_all(folder.removals(look.gone), run.log, summary, progress)
            if places == {root} and await run.finish():
                await client.send_all(folder.removals(folder.gone(look, places)), run.log, summary, progress)
            run.report(summary)
            progress(summary)

        if not watch:
            await send({root})
            return summary
        # The whole folder is looked at once the watch stands, so that nothing changes between the two unseen.
        places = {root}
        watched = awatch(root, watch_filter=None, rust_timeout=_WATCH_PAUSE_MS, yield_on_timeout=True)
        async with aclosing(watched):
            async for changes in watched:
                places |= {Path(name) for _, name in changes}
                if places:
                    await send(places)
                    places = set()
    return summary


class _Look(NamedTuple):
    """What was found.

    Attributes:
        listing: what is there.
        hashes: name → content hash, of what can be read.
        changed: documents that are new or different, as name → file.
        gone: ids of those that are gone.
    """

    listing: Listing
    hashes: dict[str, str]
    changed: dict[str, Path]
    gone: list[str]


class _Folder:
    """The folder as it was sent, and how it differs now."""

    def __init__(self, root: Path, source: Source, log: SentLog, summary: Summary, *, confirmed: bool) -> None:
        self._root = root
        self._source = source
        self._log = log
        self._summary = summary
        self._confirmed = confirmed

    async def look(self, places: set[Path]) -> _Look:
        """Compare what is at or below ``places`` with what was sent.

        All of them at once: what moved from one to another is not lost, and many small losses are a large one.

        Raises:
            TooManyDeletions: see ``guard``.
            OSError: the folder itself cannot be listed.
        """
        listing = await asyncio.to_thread(self._list, places)
        hashes = await asyncio.to_thread(self._hashes, listing.files)
        known = self._log.marks
        changed = {
            name: listing.files[name]
            for name, mark in hashes.items()
            if known.get(self._source.document_id(name)) != mark
        }
        self._summary.skipped += len(hashes) - len(changed)
        look = _Look(listing, hashes, changed, [])
        return look._replace(gone=self.gone(look, places))

    def gone(self, look: _Look, places: set[Path]) -> list[str]:
        """Ids of documents that the log knows at or below ``places`` and that were not found there.

        Raises:
            TooManyDeletions: see ``guard``.
        """
        known = self._log.marks
        gone = [document_id for document_id in known if self._is_gone(document_id, look.listing, places)]
        # What only moved is not lost.
        present = set(look.hashes.values())
        lost = sum(known[document_id] not in present for document_id in gone)
        check_deletions(lost, len(known), confirmed=self._confirmed)
        return sorted(gone)

    async def uploads(self, look: _Look) -> AsyncIterator[Outgoing]:
        """What is new or different, read again: it is the content that is sent whose hash is remembered."""
        for name, file in look.changed.items():
            try:
                content = await asyncio.to_thread(read, file)
            except Unreadable as error:
                self._summary.failed.append(Failure(name, str(error)))
                continue
            yield Outgoing(self._source.upload(name, content), hashlib.sha256(content).hexdigest())

    async def removals(self, gone: list[str]) -> AsyncIterator[Outgoing]:
        """What is gone, by id."""
        for document_id in gone:
            yield Outgoing(self._source.removal(document_id), None)

    def _is_gone(self, document_id: str, listing: Listing, places: set[Path]) -> bool:
        name = self._source.name_of(document_id)
        if name is None:  # sent with another prefix than now
            return self._root in places
        return not listing.may_hold(name) and _is_within(self._root / name, places)

    def _list(self, places: set[Path]) -> Listing:
        outermost = sorted(place for place in places if not _is_within(place.parent, places))
        whole = Listing()
        for place in outermost:
            listing = list_folder(self._root, place)
            whole.files |= listing.files
            whole.problems |= listing.problems
            whole.passed_over |= listing.passed_over
            whole.unlisted |= listing.unlisted
        self._summary.passed_over |= whole.passed_over
        self._summary.failed += [Failure(name, reason) for name, reason in whole.problems.items()]
        return whole

    def _hashes(self, files: Mapping[str, Path]) -> dict[str, str]:
        hashes: dict[str, str] = {}
        for name, file in files.items():
            try:
                hashes[name] = sha256_of(file)
            except Unreadable as error:
                self._summary.failed.append(Failure(name, str(error)))
        return hashes


def _mark_of(document: ListedDocument) -> str:
    return document.content_sha256 or PERHAPS


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is not a folder")
    return path.resolve()


def _is_within(path: Path, places: set[Path]) -> bool:
    return path in places or any(parent in places for parent in path.parents)
