"""The blob store's twin: same promises, kept in memory."""

from collections.abc import AsyncIterator

from infra.blobs.port import BlobMissing, checked, ref_of
from schemas.events import BlobRef


class MemoryBlobStore:
    """Blobs of one process, for simulations and unit tests."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}

    async def put(self, content: bytes) -> BlobRef:
        """Store ``content``; see ``BlobStore``."""
        ref = ref_of(content)
        self._contents.setdefault(ref.sha256, content)
        return ref

    async def get(self, ref: BlobRef) -> bytes:
        """Return the content; see ``BlobStore``."""
        content = self._contents.get(ref.sha256)
        if content is None:
            raise BlobMissing(ref)
        return checked(ref, content)

    async def exists(self, ref: BlobRef) -> bool:
        """Tell whether something is stored; see ``BlobStore``."""
        return ref.sha256 in self._contents

    async def delete(self, ref: BlobRef) -> None:
        """Remove the content; see ``BlobStore``."""
        self._contents.pop(ref.sha256, None)

    async def stored(self) -> AsyncIterator[BlobRef]:
        """Go through everything stored; see ``BlobStore``."""
        for sha256, content in list(self._contents.items()):
            yield BlobRef(sha256=sha256, size_bytes=len(content))

    async def close(self) -> None:
        """Hold nothing to release."""
