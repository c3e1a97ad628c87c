"""Blobs as files ``ab/cd/abcd…``. A file is complete and on disk before it gets its name."""

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
"""More than cores, because an fsync waits for the disk."""
_LIST_PAGE: Final = 1_000
_ABANDONED_S: Final = 86_400.0
"""Age after which an incomplete file is deleted. Its writer has ended: a write takes seconds."""


class LocalBlobStore(BlobStore):
    """Blobs in a directory of a local disk, which several processes may share.

    A file is written in ``incoming/`` of the same file system, synced, and renamed. A writer that is killed leaves its
    file there; the next process that opens the store deletes it after a day. Readers ignore ``incoming/``.
    """

    def __init__(self, path: Path) -> None:
        """Use the directory ``path``; creates it and its parents if missing."""
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
        listing = self._list()
        while refs := await self._run(_take, listing, _LIST_PAGE):
            for ref in refs:
                yield ref

    @override
    async def close(self) -> None:

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
        if not _has_size(target, ref.size_bytes):
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
        # Also if the file existed: its writer may not have synced the directory yet.
        _sync_directory(target.parent)
        return ref

    def _make_directory(self, leaf: Path) -> None:
        if leaf.is_dir():
            return
        leaf.mkdir(parents=True, exist_ok=True)
        # A directory entry is durable once its directory is synced.
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
                except FileNotFoundError:  # deleted after it was listed
                    continue


def _take(refs: Iterator[BlobRef], count: int) -> list[BlobRef]:
    return [ref for _, ref in zip(range(count), refs, strict=False)]


def _has_size(file: Path, size_bytes: int) -> bool:
    try:
        return file.stat().st_size == size_bytes
    except FileNotFoundError:
        return False


def _remove_abandoned(incoming: Path, *, before_s: float) -> None:
    for file in incoming.iterdir():
        # Another process may rename its file, or delete an abandoned one, at the same time.
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime < before_s:
                file.unlink()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
