"""Port of blob stores. One contract suite tests every implementation."""

import hashlib
from collections.abc import AsyncIterator
from typing import Protocol

from schemas.events import BlobRef


class BlobMissing(LookupError):
    """No content is stored under this reference."""

    def __init__(self, ref: BlobRef) -> None:
        super().__init__(f"blob {ref.sha256} is not in the store; upload the content again or restore it from a backup")
        self.ref = ref


class BlobCorrupt(ValueError):
    """The stored content does not match its reference."""

    def __init__(self, ref: BlobRef) -> None:
        super().__init__(f"blob {ref.sha256} does not match its hash; delete it and upload the content again")
        self.ref = ref


class BlobStoreUnavailable(ConnectionError):
    """The store did not complete the operation; a retry may succeed."""


class BlobStore(Protocol):
    """Immutable contents, addressed by their SHA-256.

    Every method may raise ``BlobStoreUnavailable``.
    """

    async def put(self, content: bytes) -> BlobRef:
        """Store ``content`` durably: after the call it survives a crash or power failure. Idempotent."""
        ...

    async def get(self, ref: BlobRef) -> bytes:
        """Return the content, after verification of its hash.

        Raises:
            BlobMissing: no content is stored under ``ref``.
            BlobCorrupt: the stored content has another hash.
        """
        ...

    async def exists(self, ref: BlobRef) -> bool:
        """Whether content is stored under ``ref``. Does not verify its hash."""
        ...

    async def delete(self, ref: BlobRef) -> None:
        """Delete the content, if it exists."""
        ...

    def stored(self) -> AsyncIterator[BlobRef]:
        """References of all contents, unordered. Concurrent changes may or may not be included."""
        ...

    async def close(self) -> None:
        """Release connections and threads."""
        ...


def ref_of(content: bytes) -> BlobRef:
    """Reference of ``content``."""
    return BlobRef(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


def checked(ref: BlobRef, content: bytes) -> bytes:
    """Return ``content`` if it matches ``ref``.

    Raises:
        BlobCorrupt: it does not match.
    """
    if ref_of(content).sha256 != ref.sha256:
        raise BlobCorrupt(ref)
    return content
