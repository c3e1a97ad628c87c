"""What a blob store promises. One contract suite holds every implementation to it."""

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
    """What is stored under this reference is not what was put there."""

    def __init__(self, ref: BlobRef) -> None:
        super().__init__(f"blob {ref.sha256} does not match its hash; delete it and upload the content again")
        self.ref = ref


class BlobStoreUnavailable(ConnectionError):
    """The store did not do what was asked, and may do it when asked again."""


class BlobStore(Protocol):
    """Contents named by their SHA-256: immutable, stored once however often they are put.

    Every method may raise ``BlobStoreUnavailable``.
    """

    async def put(self, content: bytes) -> BlobRef:
        """Store ``content``; when this returns, a crash or power cut no longer loses it. Idempotent."""
        ...

    async def get(self, ref: BlobRef) -> bytes:
        """Return the content, checked against its hash.

        Raises:
            BlobMissing: nothing is stored under ``ref``.
            BlobCorrupt: what is stored is something else.
        """
        ...

    async def exists(self, ref: BlobRef) -> bool:
        """Tell whether something is stored under ``ref``, without checking its hash."""
        ...

    async def delete(self, ref: BlobRef) -> None:
        """Remove the content; nothing happens where there is none."""
        ...

    def stored(self) -> AsyncIterator[BlobRef]:
        """Go through everything stored, in no order; what is put or deleted meanwhile may be seen or not."""
        ...

    async def close(self) -> None:
        """Release connections and threads."""
        ...


def ref_of(content: bytes) -> BlobRef:
    """Return the only reference that ``content`` can have."""
    return BlobRef(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


def checked(ref: BlobRef, content: bytes) -> bytes:
    """Return ``content`` if it is what ``ref`` names.

    Raises:
        BlobCorrupt: it is not.
    """
    if ref_of(content).sha256 != ref.sha256:
        raise BlobCorrupt(ref)
    return content
