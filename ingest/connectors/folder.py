"""A folder as a source: each supported file is a document named by its path below the folder."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from watchfiles import awatch

from ingest.connectors.client import Failure, IngestClient, Progress, Summary, begin_with, no_progress
from ingest.connectors.guard import check_deletions
from ingest.connectors.rounds import Outgoing
from ingest.connectors.sent_log import SentLog, default_log_path
from ingest.core.changes import Removal, Upload
from ingest.core.content import TYPE_OF_SUFFIX, why_unsupported
from schemas.documents import DocumentAttributes

LARGEST_BYTES: Final = 100_000_000
"""Files beyond are not even read into memory; the service's own limit is usually lower."""

_WATCH_PAUSE_MS: Final = 250


async def ingest_folder(
    client: IngestClient,
    path: Path,
    *,
    watch: bool = False,
    yes: bool = False,
    progress: Progress = no_progress,
    log_path: Path | None = None,
) -> Summary:
    """Send what changed in the folder since the last run; with ``watch``, go on until cancelled.

    A file that is gone is a deletion, and a renamed one an upload and a deletion. Deletions are sent when all uploads
    are accepted, so that what moved is not missed for longer than it must be. Unsupported types and links that lead out
    are passed over, and named in the summary; hidden files are passed over.

    Args:
        client: the service.
        path: the folder.
        watch: keep sending changes as they happen.
        yes: delete even if very much is gone.
        progress: called after each request.
        log_path: where to remember what was sent; by default a file of this user, one per service and folder.

    Raises:
        NotADirectoryError: there is no such folder.
        PermissionError: a part of it cannot be listed, which must not look like deletions.
        TooManyDeletions: see ``guard``.
        ServiceUnavailable: the rest was not sent.
    """
    root = await asyncio.to_thread(_existing, path)
    summary = Summary()
    with SentLog(log_path or default_log_path(client.url, str(root))) as log:
        await begin_with(client, log)
        folder = _Folder(root, log, summary, confirmed=yes)

        async def send(places: set[Path]) -> None:
            look = await folder.look(places)
            await client.send_all(folder.uploads(look), log, summary, progress)
            await client.send_all(folder.removals(look), log, summary, progress)
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


def list_folder(root: Path, place: Path, passed_over: dict[str, str] | None = None) -> dict[str, Path]:
    """Document id → file of every document at or below ``place``, which lies in ``root``.

    What is neither a document nor hidden is put into ``passed_over``: its path below ``root`` → the reason.
    """
    files = [place] if place.is_file() else _files_below(place)
    named = sorted((file.relative_to(root).as_posix(), file) for file in files)
    documents: dict[str, Path] = {}
    for name, file in named:
        if any(part.startswith(".") for part in PurePosixPath(name).parts):
            continue
        reason = _why_passed_over(root, name, file)
        if reason is None:
            documents[name] = file
        elif passed_over is not None:
            passed_over[name.encode(errors="surrogateescape").decode(errors="backslashreplace")] = reason
    return documents


class _Look(NamedTuple):
    """Documents that are new or different, as id → file, and ids of those that are gone."""

    changed: dict[str, Path]
    gone: list[str]


class _Folder:
    """The folder as it was sent, and how it differs now."""

    def __init__(self, root: Path, log: SentLog, summary: Summary, *, confirmed: bool) -> None:
        self._root = root
        self._log = log
        self._summary = summary
        self._confirmed = confirmed

    async def look(self, places: set[Path]) -> _Look:
        """Compare what is at or below ``places`` with what was sent.

        All of them at once: what moved from one to another is not lost, and many small losses are a large one.

        Raises:
            TooManyDeletions: see ``guard``.
        """
        files = await asyncio.to_thread(self._list, places)
        hashes = await asyncio.to_thread(self._hashes, files)
        known = self._log.marks
        gone = [name for name in known if name not in files and _is_within(self._root / name, places)]
        # What only moved is not lost.
        present = set(hashes.values())
        check_deletions(sum(known[name] not in present for name in gone), len(known), confirmed=self._confirmed)
        changed = {name: files[name] for name, mark in hashes.items() if known.get(name) != mark}
        self._summary.skipped += len(hashes) - len(changed)
        return _Look(changed, sorted(gone))

    async def uploads(self, look: _Look) -> AsyncIterator[Outgoing]:
        """What is new or different, read again: it is the content that is sent whose hash is remembered."""
        for name, file in look.changed.items():
            try:
                content = await asyncio.to_thread(file.read_bytes)
            except OSError as error:
                self._fail(name, error)
                continue
            content_type = TYPE_OF_SUFFIX[PurePosixPath(name).suffix.lower()]
            upload = Upload(name, content, content_type, DocumentAttributes(source=name), file.name)
            yield Outgoing(upload, hashlib.sha256(content).hexdigest())

    async def removals(self, look: _Look) -> AsyncIterator[Outgoing]:
        """What is gone."""
        for name in look.gone:
            yield Outgoing(Removal(name), None)

    def _list(self, places: set[Path]) -> dict[str, Path]:
        outermost = sorted(place for place in places if not _is_within(place.parent, places))
        over = self._summary.passed_over
        return {name: file for place in outermost for name, file in list_folder(self._root, place, over).items()}

    def _hashes(self, listing: Mapping[str, Path]) -> dict[str, str]:
        hashes: dict[str, str] = {}
        for name, file in listing.items():
            try:
                with file.open("rb") as opened:
                    if os.fstat(opened.fileno()).st_size > LARGEST_BYTES:
                        self._summary.failed.append(Failure(name, f"larger than {LARGEST_BYTES:,} bytes"))
                        continue
                    hashes[name] = hashlib.file_digest(opened, "sha256").hexdigest()
            except OSError as error:
                self._fail(name, error)
        return hashes

    def _fail(self, name: str, error: OSError) -> None:
        self._summary.failed.append(Failure(name, f"cannot be read: {error.strerror}"))


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is not a folder")
    return path.resolve()


def _files_below(place: Path) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        # A folder may vanish while it is walked; one that may not be read is no deletion of what is in it.
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for parent, folders, files in os.walk(place, onerror=stop):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        yield from (Path(parent, file) for file in files)


def _why_passed_over(root: Path, name: str, file: Path) -> str | None:
    """Why the file is no document; None where it is one."""
    # Names that are not UTF-8 come as lone surrogates, which no document id can hold.
    if any("\ud800" <= char <= "\udfff" for char in name):
        return "its name is not UTF-8: rename it"
    if (reason := why_unsupported(name)) is not None:
        return reason
    return None if file.resolve().is_relative_to(root) else "it is a link that leads out of the folder"


def _is_within(path: Path, places: set[Path]) -> bool:
    return path in places or any(parent in places for parent in path.parents)
