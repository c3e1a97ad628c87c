"""Resolves claims whose writer stopped, or may have stopped: rolls them back, or forward.

The passages of a claim are written before the passages that it replaces are removed. So while all passages that it
removes exist, the version before it is complete; if some are missing, all passages of the claim were written, and it is
complete. The complete version is written again, unchanged, under a fence that the stopped writer does not have, and the
passages of the other one are removed under this fence. From then on, no earlier writer can change either, and exactly
one of the two versions is searchable.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from infra.opensearch.port import (
    ChunkChange,
    ChunkWrite,
    DocumentIndex,
    IndexUnavailable,
    ManifestWrite,
    Revision,
    StoredManifest,
)
from schemas.documents import DocumentKey
from schemas.index import Manifest
from schemas.search import Hit
from streams.core.document_change import rebuilt_manifest, rolled_back, rolled_forward, taken_over

PATIENCE_S: Final = 1.0
"""Maximum wait for an unchanged claim of another worker. Taking over a claim is always safe, but two workers that take
over each other's claims would keep each other from finishing."""

_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class Found:
    """The searchable state of a document.

    Attributes:
        manifest: complete; None if nothing is searchable.
        replaces: revision of the manifest that the next one replaces; None if there is no manifest.
        saved: False if an open claim is resolved but not closed. A caller that does not replace it with its own claim
            writes ``manifest`` in its place.
        lost: the manifest was missing, and was rebuilt from the stored passages.
    """

    manifest: Manifest | None
    replaces: Revision | None
    saved: bool = True
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Recovery:
    """Determines what is searchable, and resolves open claims.

    Attributes:
        writer: name of this worker; its own claims are from attempts that have ended.
    """

    index: DocumentIndex
    writer: str

    async def found(self, keys: Sequence[DocumentKey], *, now_ms: float) -> dict[DocumentKey, Found]:
        """Determine the searchable state of each document; open claims are resolved.

        Raises:
            IndexUnavailable: the index is unavailable, or other workers keep changing a document.
        """
        manifests = await self.index.stored_manifests(keys)
        resolved = await asyncio.gather(*(self._resolve(one, now_ms=now_ms) for one in manifests.values()))
        found = {key: one for key, one in zip(manifests, resolved, strict=True) if one is not None}
        # Most of the other documents never existed; but a manifest may be lost, and then the stored passages count.
        missing = [key for key in keys if key not in found]
        passages = await self.index.passages(missing) if missing else {}
        for key in missing:
            stored = passages.get(key)
            if stored:
                fence = max(one.write_version for one in stored)
                rebuilt = rebuilt_manifest([one.chunk for one in stored], fence=fence, now_ms=now_ms)
                found[key] = Found(rebuilt, None, lost=True)
            else:
                found[key] = Found(None, None)
        return found

    async def _resolve(self, read: StoredManifest, *, now_ms: float) -> Found | None:
        """Resolve a manifest; None if it no longer exists."""
        one: StoredManifest | None = read
        for _ in range(_ATTEMPTS):
            if one is None:
                return None
            if one.manifest.complete:
                return Found(one.manifest, one.revision)
            if one.manifest.writer != self.writer:
                await asyncio.sleep(random.uniform(0.3, 1.0) * PATIENCE_S)  # noqa: S311 - no secret
                again = await self._read(one.manifest.key)
                if again is None or again.revision != one.revision:
                    one = again
                    continue
            claim = taken_over(one.manifest, self.writer)
            [revision] = await self.index.put_manifests([ManifestWrite(claim, one.revision)])
            if revision is not None:
                return Found(await self._roll(claim, now_ms=now_ms), revision, saved=False)
            one = await self._read(claim.key)
        raise IndexUnavailable(f"other workers keep writing {read.manifest.key}; retrying")

    async def _read(self, key: DocumentKey) -> StoredManifest | None:
        return (await self.index.stored_manifests([key])).get(key)

    async def _roll(self, claim: Manifest, *, now_ms: float) -> Manifest:
        if claim.previous is None:
            # There was no version before, or it is unknown (earlier releases did not record it).
            found = [one.chunk.chunk_id for one in (await self.index.passages([claim.key])).get(claim.key, ())]
            gone = tuple(dict.fromkeys((*claim.added, *claim.removed, *found)))
            await self._enforce(claim, (), gone)
            return rolled_back(claim.model_copy(update={"added": gone}), now_ms=now_ms)
        for _ in range(_ATTEMPTS):
            # In this order: if a passage to remove is missing, all passages to add had been written.
            old = await self._existing(claim, claim.removed)
            if len(old) == len(claim.removed):
                break
            new = await self._existing(claim, claim.added)
            if len(new) == len(claim.added):
                await self._enforce(claim, new, claim.removed)
                return rolled_forward(claim, now_ms=now_ms)
        # If neither version is complete, and stays so, the version before was damaged by another cause. Restore it as
        # it was.
        await self._enforce(claim, old, claim.added)
        return rolled_back(claim, now_ms=now_ms)

    async def _existing(self, claim: Manifest, chunk_ids: tuple[str, ...]) -> tuple[ChunkWrite, ...]:
        """The passages that exist at this moment."""
        found = await self.index.read_passages([Hit(chunk_id, claim.key, 0.0) for chunk_id in chunk_ids])
        return tuple(found[chunk_id] for chunk_id in chunk_ids if chunk_id in found)

    async def _enforce(self, claim: Manifest, put: tuple[ChunkWrite, ...], remove: tuple[str, ...]) -> None:
        await self.index.enforce(ChunkChange(claim.key, claim.write_version, put, remove))
