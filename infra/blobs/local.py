"""Blobs as files: ``ab/cd/abcd…``, each complete and on disk before its name exists."""

import asyncio
import contextlib
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from typing_extensions import override

from infra.blobs.port import BlobMissing, BlobStore, BlobStoreUnavailable, checked, ref_of
from schemas.events import BlobRef

P = ParamSpec("P")
T = TypeVar("T")

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_INCOMING: Final = "incoming"
_THREADS: Final = 8
"""An fsync waits for the disk, so more of them than cores run well side by side."""
_LISTED_AT_ONCE: Final = 1_000
_ABANDONED_S: Final = 86_400.0
"""A file is written in seconds. One that is a day old has no writer any more."""


class LocalBlobStore(BlobStore):
    """Blobs in one directory of a local disk, which several processes may share.

    Files being written live in ``incoming/`` of the same file system and are renamed into place when they are on
    disk. A writer that is killed leaves its file there, where no reader ever looks; whoever opens the store later
    removes it.
    """

    def __init__(self, path: Path) -> None:
        """Use ``path``, which is created with its parents where missing."""
        self._path = path
        self._incoming = path / _INCOMING
        self._incoming.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self._incoming, before_s=time.time() - _ABANDONED_S)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="blobs")

    @override
    async def put(self, content: bytes) -> BlobRef:
        return await self._run(self._put, content)

    @override
    async def get(self, ref: BlobRef) -> bytes:
        return await self._run(self._get, ref)

    @override
    async def exists(self, ref: BlobRef) -> bool:
        return await self._run(self._file(ref).is_file)

    @override
    async def delete(self, ref: BlobRef) -> None:
        await self._run(self._file(ref).unlink, missing_ok=True)

    @override
    async def stored(self) -> AsyncIterator[BlobRef]:
        found = self._list()
        while refs := await self._run(_take, found, _LISTED_AT_ONCE):
            for ref in refs:
                yield ref

    @override
    async def close(self) -> None:
        """Let running writes finish and end the threads."""
        await asyncio.to_thread(self._threads.shutdown)

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))
        except OSError as error:
            raise BlobStoreUnavailable(f"blob directory {self._path}: {error.strerror or error}") from error

    def _file(self, ref: BlobRef) -> Path:
        return self._path / ref.sha256[:2] / ref.sha256[2:4] / ref.sha256

    def _put(self, content: bytes) -> BlobRef:
        ref = ref_of(content)
        target = self._file(ref)
        if not _holds(target, ref.size_bytes):
            self._make_directory(target.parent)
            temporary = self._incoming / f"{ref.sha256}.{secrets.token_hex(8)}"
            try:
                with temporary.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        # Also for a file found in place: the writer that put it there may not have come this far yet.
        _sync_directory(target.parent)
        return ref

    def _make_directory(self, leaf: Path) -> None:
        if leaf.is_dir():
            return
        leaf.mkdir(parents=True, exist_ok=True)
        # A directory entry is durable when the directory that holds it is.
        _sync_directory(leaf.parent)
        _sync_directory(self._path)

    def _get(self, ref: BlobRef) -> bytes:
        try:
            content = self._file(ref).read_bytes()
        except FileNotFoundError:
            raise BlobMissing(ref) from None
        return checked(ref, content)

    def _list(self) -> Iterator[BlobRef]:
        for file in self._path.glob("[0-9a-f][0-9a-f]/[0-9a-f][0-9a-f]/*"):
            if _SHA256.fullmatch(file.name):
                try:
                    yield BlobRef(sha256=file.name, size_bytes=file.stat().st_size)
                except FileNotFoundError:  # deleted since it was listed
                    continue


def _take(refs: Iterator[BlobRef], count: int) -> list[BlobRef]:
    return [ref for _, ref in zip(range(count), refs, strict=False)]


def _holds(file: Path, size_bytes: int) -> bool:
    try:
        return file.stat().st_size == size_bytes
    except FileNotFoundError:
        return False


def _remove_abandoned(incoming: Path, *, before_s: float) -> None:
    for file in incoming.iterdir():
        # Another process may put its file in place, or remove an abandoned one, at this instant.
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime < before_s:
                file.unlink()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
