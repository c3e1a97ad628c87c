"""A git repository as a source: each supported file of a branch is a document named by its path.

A commit is sent as the difference between its tree and what was sent before, so that a broken run, a rewritten branch
and an ordinary commit are all the same case. Revisions are the commit's ordinal on the first-parent history.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path, PurePosixPath
from typing import Final, Self

from ingest.connectors.client import IngestClient, Progress, Summary, begin_with, no_progress
from ingest.connectors.guard import check_deletions
from ingest.connectors.rounds import Outgoing
from ingest.connectors.sent_log import SentLog, default_log_path
from ingest.core.changes import Removal, Upload
from ingest.core.content import TYPE_OF_SUFFIX, why_unsupported
from schemas.documents import DocumentAttributes

POLL_S: Final = 2.0
"""How often ``follow`` looks for new commits."""

_FILE_MODES: Final = frozenset({b"100644", b"100755"})
"""Ordinary files; links and submodules are no content."""


class GitFailed(Exception):
    """git refused; the message is its own."""


async def ingest_git(
    client: IngestClient,
    repository: Path,
    *,
    start: str | None = None,
    follow: bool = False,
    yes: bool = False,
    progress: Progress = no_progress,
    log_path: Path | None = None,
) -> Summary:
    """Send the branch that is checked out.

    Args:
        client: the service.
        repository: a clone, with or without a work tree.
        start: send this revision first, then each first-parent commit after it; by default the newest state only.
        follow: go on with new commits until cancelled.
        yes: delete even if a commit takes very much away.
        progress: called after each request.
        log_path: where to remember what was sent; by default a file of this user, one per service and repository.

    Raises:
        GitFailed: no repository, or no such revision.
        TooManyDeletions: see ``guard``.
        ServiceUnavailable: the rest was not sent.
    """
    summary = Summary()
    source = await asyncio.to_thread(repository.resolve)
    with SentLog(log_path or default_log_path(client.url, str(source))) as log:
        await begin_with(client, log)
        async with aclosing(await GitObjects.open(repository)) as objects:
            tree = _SentTree(objects, log, confirmed=yes)
            seen = await _commit(repository, start or "HEAD")
            commits = [seen, *await _commits_after(repository, seen)]
            while True:
                await client.send_all(_outgoing(repository, tree, commits, summary), log, summary, progress)
                if not follow:
                    return summary
                seen = commits[-1] if commits else seen
                await asyncio.sleep(POLL_S)
                commits = await _commits_after(repository, seen)


class GitObjects:
    """Reads file contents through one long-running ``git cat-file``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def open(cls, repository: Path) -> Self:
        """Start reading."""
        await _git(repository, "rev-parse", "--git-dir")
        command = ("git", "-C", str(repository), "cat-file", "--batch")
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))

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
    """What has been sent, as path → blob, and how a tree differs from it."""

    def __init__(self, objects: GitObjects, log: SentLog, *, confirmed: bool) -> None:
        marks = {path: mark.partition(":") for path, mark in log.marks.items()}
        self._objects = objects
        self._confirmed = confirmed
        self._blobs = {path: blob for path, (_, _, blob) in marks.items()}
        self._revision = max((int(revision) for revision, _, _ in marks.values()), default=0)

    async def changes_to(self, tree: dict[str, str], ordinal: int) -> AsyncIterator[Outgoing]:
        """Uploads and deletions that lead from what was sent to ``tree``."""
        changed = {path: blob for path, blob in tree.items() if self._blobs.get(path) != blob}
        gone = [path for path in self._blobs if path not in tree]
        if not changed and not gone:
            return
        present = set(tree.values())
        lost = sum(self._blobs[path] not in present for path in gone)
        check_deletions(lost, len(self._blobs), confirmed=self._confirmed)
        # A branch that was rewritten to be shorter still has to be newer than what was sent of it.
        self._revision = max(ordinal, self._revision + 1)
        self._blobs = tree
        for path, blob in changed.items():
            name = PurePosixPath(path)
            attributes = DocumentAttributes(source=path, revision=self._revision)
            content = await self._objects.read(blob)
            upload = Upload(path, content, TYPE_OF_SUFFIX[name.suffix.lower()], attributes, name.name)
            yield Outgoing(upload, f"{self._revision}:{blob}")
        for path in gone:
            yield Outgoing(Removal(path, self._revision), None)


async def _outgoing(repository: Path, sent: _SentTree, commits: list[str], summary: Summary) -> AsyncIterator[Outgoing]:
    if not commits:
        return
    ordinal = int(await _git(repository, "rev-list", "--count", "--first-parent", commits[0]))
    for place, commit in enumerate(commits):
        tree = await _tree(repository, commit, summary.passed_over)
        async for item in sent.changes_to(tree, ordinal + place):
            yield item


async def _commit(repository: Path, revision: str) -> str:
    name = f"{revision}^{{commit}}"
    commit = await _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", name, may_fail=True)
    if not commit:
        raise GitFailed(f"{repository} has no commit {revision!r}: see `git log` for what it has")
    return commit


async def _commits_after(repository: Path, commit: str) -> list[str]:
    """First-parent commits of HEAD after ``commit``, oldest first; HEAD alone where ``commit`` is not in its past."""
    head = await _git(repository, "rev-parse", "HEAD")
    if await _git(repository, "merge-base", commit, head, may_fail=True) != commit:
        return [head]
    listed = await _git(repository, "rev-list", "--first-parent", "--reverse", f"{commit}..{head}")
    return listed.split()


async def _tree(repository: Path, commit: str, passed_over: dict[str, str]) -> dict[str, str]:
    """Path → blob of every document of a commit, sorted by path.

    What the commit has beside them, and is not hidden, replaces what is in ``passed_over``: path → reason.
    """
    passed_over.clear()
    listed = await _git_bytes(repository, "ls-tree", "-r", "-z", "--full-tree", commit)
    tree: dict[str, str] = {}
    for entry in listed.split(b"\0"):
        head, _, raw_path = entry.partition(b"\t")
        mode, _, blob = head.partition(b" blob ")
        try:
            path = raw_path.decode()
        except UnicodeDecodeError:  # a document id is text
            passed_over[raw_path.decode(errors="backslashreplace")] = "its name is not UTF-8: rename it"
            continue
        if mode not in _FILE_MODES:
            continue
        if (reason := why_unsupported(path)) is None:
            tree[path] = blob.decode()
        elif not any(part.startswith(".") for part in PurePosixPath(path).parts):
            passed_over[path] = reason
    return tree


async def _git(repository: Path, *arguments: str, may_fail: bool = False) -> str:
    return (await _git_bytes(repository, *arguments, may_fail=may_fail)).decode().strip()


async def _git_bytes(repository: Path, *arguments: str, may_fail: bool = False) -> bytes:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec("git", "-C", str(repository), *arguments, stdout=pipe, stderr=pipe)
    output, errors = await process.communicate()
    if process.returncode and not may_fail:
        raise GitFailed(f"git {arguments[0]}: {errors.decode(errors='replace').strip()}")
    return output
