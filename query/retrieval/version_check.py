"""Prevents passages of two versions of a document in one answer (I3).

A change writes its passages, removes the replaced ones, and refreshes. A refresh caused by another document in between
makes a part of the change searchable. The manifest, read in real time, distinguishes the two versions. It is read only
for documents whose passages were written by several versions, and once per version.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from infra.opensearch.port import SearchIndex
from query.retrieval.version_rules import are_of_one_version, written_by_several_events
from schemas.documents import DocumentKey
from schemas.index import Manifest, StoredChunk
from schemas.search import Hit

MAX_CACHED_IDS: Final = 200_000
"""Total number of passage ids in the cache of consistent sets; about 20 MB."""


class VersionCheck:
    """Checks which passages of a document may be returned together.

    Args:
        index: source of manifests.
    """

    def __init__(self, index: SearchIndex) -> None:
        self._index = index
        self._consistent: OrderedDict[DocumentKey, frozenset[str]] = OrderedDict()
        self._cached_ids = 0

    async def mixed(self, passages: Iterable[StoredChunk]) -> list[Manifest]:
        """Manifests of the documents whose passages belong to two versions.

        Raises:
            IndexUnavailable: the manifests cannot be read.
        """
        unverified = {
            key: ids for key, ids in written_by_several_events(passages).items() if not self._verified(key) >= ids
        }
        if not unverified:
            return []
        # Without a manifest, which was lost, nothing can be checked: all passages of the document are returned.
        manifests = await self._index.manifests(list(unverified))
        for manifest in manifests.values():
            self._remember(manifest)
        return [manifest for key, manifest in manifests.items() if not are_of_one_version(unverified[key], manifest)]

    async def searchable_version(self, claim: Manifest) -> frozenset[str] | None:
        """Ids of all passages of the version that is searchable while the claim is in progress.

        That version was complete before the claim's first write, so its passages have existed throughout. None if the
        claim has begun to remove passages: by then all its own passages are written, and a new search finds them.

        Raises:
            IndexUnavailable: the passages cannot be read.
        """
        if claim.previous is None:
            return None
        version = frozenset(claim.previous.chunks)
        hits = [Hit(chunk_id, claim.key, 0.0) for chunk_id in claim.removed if chunk_id in version]
        return version if len(await self._index.fetch(hits)) == len(hits) else None

    def _verified(self, key: DocumentKey) -> frozenset[str]:
        if key in self._consistent:
            self._consistent.move_to_end(key)
        return self._consistent.get(key, frozenset())

    def _remember(self, manifest: Manifest) -> None:
        """Cache the passages of a version. They stay consistent, whatever happens to the document later."""
        self._cached_ids += len(manifest.chunks) - len(self._consistent.pop(manifest.key, ()))
        self._consistent[manifest.key] = frozenset(manifest.chunks)
        while self._cached_ids > MAX_CACHED_IDS:
            _, evicted = self._consistent.popitem(last=False)
            self._cached_ids -= len(evicted)
