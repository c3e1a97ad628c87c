"""In-memory blob store, for tests and simulation."""

from collections.abc import AsyncIterator

from typing_extensions import override

from infra.blobs.port import BlobMissing, BlobStore, checked, ref_of
from schemas.events import BlobRef


class MemoryBlobStore(BlobStore):
    """Blobs of one process."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}

    @override
    async def put(self, content: bytes) -> BlobRef:
        ref = ref_of(content)
        self._contents.setdefault(ref.sha256, content)
        return ref

    @override
    async def get(self, ref: BlobRef) -> bytes:
        content = self._contents.get(ref.sha256)
        if content is None:
            raise BlobMissing(ref)
        return checked(ref, content)

    @override
    async def exists(self, ref: BlobRef) -> bool:
        return ref.sha256 in self._contents

    @override
    async def delete(self, ref: BlobRef) -> None:
        self._contents.pop(ref.sha256, None)

    @override
    async def stored(self) -> AsyncIterator[BlobRef]:
        for sha256, content in list(self._contents.items()):
            yield BlobRef(sha256=sha256, size_bytes=len(content))

    @override
    async def close(self) -> None:
        pass
