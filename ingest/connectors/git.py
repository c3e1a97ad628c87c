"""Connector for git repositories. Each supported file of a branch is a document; its id is its path.

A commit is sent as the difference between its tree and the sent log. An interrupted run, a rewritten branch, a shallow
clone and an ordinary commit are therefore the same case. Versions are assigned on acceptance, so each event is newer
than all earlier ones of its document, from any source.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple, Self

from ingest.connectors.client import Failure, IngestClient, Progress, Summary, no_progress
from ingest.connectors.files import shown, why_no_document
from ingest.connectors.guard import check_deletions
from ingest.connectors.reconcile import opened_run
from ingest.connectors.rounds import Outgoing
from ingest.connectors.sent_log import UNCONFIRMED, SentLog
from ingest.connectors.source import BY_DEFAULT, Source, SourceOptions
from schemas.documents import ListedDocument

_SUBMODULE: Final = b"160000 "

POLL_S: Final = 2.0
"""Interval at which ``follow`` polls for new commits."""

_FILE_MODES: Final = frozenset({b"100644", b"100755"})
"""Modes of regular files. Links and submodules have no content."""


class GitFailed(Exception):
    """A git command failed; the message is that of git."""


async def ingest_git(
    client: IngestClient,
    repository: Path,
    options: SourceOptions = BY_DEFAULT,
    *,
    start: str | None = None,
    follow: bool = False,
    yes: bool = False,
    progress: Progress = no_progress,
    log_path: Path | None = None,
) -> Summary:
    """Send the checked-out branch.

    Args:
        client: the service.
        repository: a clone, with or without a work tree.
        options: name, prefix and ownership of the source.
        start: first revision to send, followed by each first-parent commit after it. Default: the latest commit only.
        follow: keep sending new commits until cancelled.
        yes: confirm mass deletions, see ``guard``.
        progress: called after each request.
        log_path: path of the sent log; None for the default path of this user.

    Raises:
        GitFailed: not a repository, or no such revision.
        BadSourceName: the name is invalid.
        SourceInUse: another run of this source is active.
        TooManyDeletions: nothing was deleted; requires ``yes``.
        ServiceUnavailable: the rest was not sent.
    """
    summary = Summary()
    source = Source.of("git", await asyncio.to_thread(repository.resolve), options)
    async with (
        opened_run(client, source, _mark_of, log_path) as run,
        aclosing(await GitObjects.open(repository)) as objects,
    ):
        tree = _SentTree(objects, source, run.log, summary, confirmed=yes)
        latest = await _commit(repository, start or "HEAD")
        commits = [latest, *await _commits_after(repository, latest)]
        while True:
            await client.send_all(_outgoing(repository, tree, commits), run.log, summary, progress)
            if await run.finish():
                tree.merge(run.log)
                await client.send_all(_outgoing(repository, tree, commits[-1:] or [latest]), run.log, summary, progress)
            run.report(summary)
            if not follow:
                return summary
            latest = commits[-1] if commits else latest
            await asyncio.sleep(POLL_S)
            commits = await _commits_after(repository, latest)


class _Tree(NamedTuple):
    """Files of a commit.

    Attributes:
        blobs: path → blob of every document, sorted.
        ignored_files: path → why the file is not a document. Hidden files are not included.
    """

    blobs: dict[str, str]
    ignored_files: dict[str, str]


class GitObjects:
    """Reads file contents through a long-running ``git cat-file``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def open(cls, repository: Path) -> Self:
        """Start the process."""
        await _git(repository, "rev-parse", "--git-dir")
        command = ("git", "-C", str(repository), "cat-file", "--batch")
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, env=_environment()))

    async def read(self, blob: str) -> bytes:
        """Content of a blob."""
        reading, writing = self._process.stdout, self._process.stdin
        if reading is None or writing is None:
            raise GitFailed("git cat-file has no pipes")
        writing.write(f"{blob}\n".encode())
        await writing.drain()
        head = (await reading.readline()).split()
        if len(head) != 3:  # noqa: PLR2004 - name, type, size
            raise GitFailed(f"git has no object {blob}: is the clone complete?")
        content = await reading.readexactly(int(head[2]))
        await reading.readexactly(1)
        return content

    async def aclose(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()


class _SentTree:
    """Sent state as document id → blob, and its difference to a tree."""

    def __init__(self, objects: GitObjects, source: Source, log: SentLog, summary: Summary, *, confirmed: bool) -> None:
        self._objects = objects
        self._source = source
        self._summary = summary
        self._confirmed = confirmed
        self._blobs = dict(log.marks)

    def merge(self, log: SentLog) -> None:
        """Add documents that were added to the log since."""
        self._blobs = {**log.marks, **self._blobs}

    async def changes_to(self, tree: _Tree) -> AsyncIterator[Outgoing]:
        """Uploads and deletions that change the sent state to ``tree``."""
        self._summary.ignored_files = tree.ignored_files
        blobs = {self._source.document_id(path): blob for path, blob in tree.blobs.items()}
        deleted = [document_id for document_id in self._blobs if document_id not in blobs]
        present = set(blobs.values())
        lost = sum(self._blobs[document_id] not in present for document_id in deleted)
        check_deletions(lost, len(self._blobs), confirmed=self._confirmed)
        before, self._blobs = self._blobs, blobs
        for path, blob in tree.blobs.items():
            document_id = self._source.document_id(path)
            if before.get(document_id) == blob:
                continue
            try:
                content = await self._objects.read(blob)
            except GitFailed as error:
                self._summary.failed.append(Failure(path, str(error)))
                # Retried with the next commit.
                self._blobs[document_id] = before.get(document_id, UNCONFIRMED)
                continue
            yield Outgoing(self._source.upload(path, content), blob)
        for document_id in deleted:
            yield Outgoing(self._source.removal(document_id), None)


async def _outgoing(repository: Path, sent: _SentTree, commits: list[str]) -> AsyncIterator[Outgoing]:
    for commit in commits:
        async for item in sent.changes_to(await _tree(repository, commit)):
            yield item


def _mark_of(_document: ListedDocument) -> str:
    return UNCONFIRMED  # the service does not store blob names


async def _commit(repository: Path, revision: str) -> str:
    name = f"{revision}^{{commit}}"
    commit = await _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", name, may_fail=True)
    if not commit:
        shallow = await _git(repository, "rev-parse", "--is-shallow-repository") == "true"
        advice = "the clone is shallow: `git fetch --unshallow`" if shallow else "see `git log`"
        raise GitFailed(f"{repository} has no commit {revision!r}: {advice}")
    return commit


async def _commits_after(repository: Path, commit: str) -> list[str]:
    """First-parent commits of HEAD after ``commit``, oldest first; HEAD alone if ``commit`` is not an ancestor."""
    head = await _git(repository, "rev-parse", "HEAD")
    if await _git(repository, "merge-base", commit, head, may_fail=True) != commit:
        return [head]
    listed = await _git(repository, "rev-list", "--first-parent", "--reverse", f"{commit}..{head}")
    return listed.split()


async def _tree(repository: Path, commit: str) -> _Tree:
    """List the files of a commit."""
    listed = await _git_bytes(repository, "ls-tree", "-r", "-z", "--full-tree", commit)
    tree = _Tree({}, {})
    for entry in listed.split(b"\0"):
        head, _, raw_path = entry.partition(b"\t")
        mode, _, blob = head.partition(b" blob ")
        path = os.fsdecode(raw_path)
        if head.startswith(_SUBMODULE):
            tree.ignored_files[shown(path)] = "a submodule: send it as a source of its own"
        if mode not in _FILE_MODES:
            continue
        if (reason := why_no_document(path)) is None:
            tree.blobs[path] = blob.decode()
        elif not any(part.startswith(".") for part in PurePosixPath(path).parts):
            tree.ignored_files[shown(path)] = reason
    return tree


def _environment() -> dict[str, str]:
    """Environment without password prompts, which a partial clone would otherwise show for missing contents."""
    return os.environ | {"GIT_TERMINAL_PROMPT": "0"}


async def _git(repository: Path, *arguments: str, may_fail: bool = False) -> str:
    return (await _git_bytes(repository, *arguments, may_fail=may_fail)).decode().strip()


async def _git_bytes(repository: Path, *arguments: str, may_fail: bool = False) -> bytes:
    pipe = asyncio.subprocess.PIPE
    command = ("git", "-C", str(repository), *arguments)
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=_environment()
    )
    output, errors = await process.communicate()
    if process.returncode and not may_fail:
        raise GitFailed(f"git {arguments[0]}: {errors.decode(errors='replace').strip()}")
    return output
