"""Settles claims whose writer was stopped, or may have been: rolls them back, or forward.

A claim's passages are written before anything that it replaces is removed. So while all that it is to remove is there,
the version before is whole; where some of it is gone, the claim's own passages were all taken, and it is whole. What is
found whole is written once more, as it is, under a fencing token that the stopped writer does not have, and what is not
wanted is removed under it: from then on nobody can change either, and one of the two versions stands for certain.
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
"""How long the claim of another worker is left alone, at most, while it does not change. It is no limit of any kind:
taking a claim over is safe at any time, but two workers that did so at once would keep each other from finishing."""

_LOOKS: Final = 5


@dataclass(frozen=True, slots=True)
class Found:
    """What is searchable of a document, for certain.

    Attributes:
        manifest: complete; None where there is nothing.
        replaces: the write of the manifest that the next one is to replace; None where there is no manifest.
        saved: False where a claim still stands, which is settled but not closed: whoever does not replace it by a claim
            of its own writes ``manifest`` in its place.
        lost: there is no manifest, and this one was made from the passages that are there.
    """

    manifest: Manifest | None
    replaces: Revision | None
    saved: bool = True
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Recovery:
    """Finds out what is searchable, whatever was left by whom.

    Attributes:
        writer: names this worker; its own claims are left from tries that have ended.
    """

    index: DocumentIndex
    writer: str

    async def found(self, keys: Sequence[DocumentKey], *, now_ms: float) -> dict[DocumentKey, Found]:
        """What is searchable of each document; claims that stand are settled.

        Raises:
            IndexUnavailable: see there; also while other workers keep changing a document.
        """
        standing = await self.index.standing(keys)
        settled = await asyncio.gather(*(self._settled(one, now_ms=now_ms) for one in standing.values()))
        found = {key: one for key, one in zip(standing, settled, strict=True) if one is not None}
        # Of most others there never was anything; but a manifest may be lost, and then what is there must be known.
        missing = [key for key in keys if key not in found]
        passages = await self.index.passages(missing) if missing else {}
        for key in missing:
            there = passages.get(key)
            if there:
                fence = max(one.write_version for one in there)
                again = rebuilt_manifest([one.chunk for one in there], fence=fence, now_ms=now_ms)
                found[key] = Found(again, None, lost=True)
            else:
                found[key] = Found(None, None)
        return found

    async def _settled(self, standing: StoredManifest, *, now_ms: float) -> Found | None:
        """What is searchable, whoever has written last; None if the manifest is gone by now."""
        one: StoredManifest | None = standing
        for _ in range(_LOOKS):
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
                return Found(await self._settle(claim, now_ms=now_ms), revision, saved=False)
            one = await self._read(claim.key)
        raise IndexUnavailable(f"other workers keep writing {standing.manifest.key}: it is tried again")

    async def _read(self, key: DocumentKey) -> StoredManifest | None:
        return (await self.index.standing([key])).get(key)

    async def _settle(self, claim: Manifest, *, now_ms: float) -> Manifest:
        if claim.previous is None:
            # Nothing was there before it, or nobody knows what (releases before this one did not say).
            found = [one.chunk.chunk_id for one in (await self.index.passages([claim.key])).get(claim.key, ())]
            gone = tuple(dict.fromkeys((*claim.added, *claim.removed, *found)))
            await self._enforce(claim, (), gone)
            return rolled_back(claim.model_copy(update={"added": gone}), now_ms=now_ms)
        for _ in range(_LOOKS):
            # In this order: where something is gone that was to be removed, all that was to be added had been written.
            old = await self._there(claim, claim.removed)
            if len(old) == len(claim.removed):
                break
            new = await self._there(claim, claim.added)
            if len(new) == len(claim.added):
                await self._enforce(claim, new, claim.removed)
                return rolled_forward(claim, now_ms=now_ms)
        # Where neither is whole, and stays so, something else has damaged the version before: it is as it was.
        await self._enforce(claim, old, claim.added)
        return rolled_back(claim, now_ms=now_ms)

    async def _there(self, claim: Manifest, chunk_ids: tuple[str, ...]) -> tuple[ChunkWrite, ...]:
        """Those of the passages that are there at this moment."""
        found = await self.index.read_passages([Hit(chunk_id, claim.key, 0.0) for chunk_id in chunk_ids])
        return tuple(found[chunk_id] for chunk_id in chunk_ids if chunk_id in found)

    async def _enforce(self, claim: Manifest, put: tuple[ChunkWrite, ...], remove: tuple[str, ...]) -> None:
        await self.index.enforce(ChunkChange(claim.key, claim.write_version, put, remove))
