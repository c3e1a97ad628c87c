"""Keeps passages of two versions of a document out of one answer (I3).

A change writes its passages, removes those that it replaces, and refreshes. A refresh for another document that comes
in between makes a part of it searchable. The manifest, read in real time, tells the two versions apart. It is asked
only for documents whose passages were written by several versions, and once for each version of them.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from infra.opensearch.port import SearchIndex
from query.retrieval.version_rules import belong_together, in_doubt
from schemas.documents import DocumentKey
from schemas.index import Manifest, StoredChunk
from schemas.search import Hit

IDS_KEPT: Final = 200_000
"""Ids of passages known to belong together, in all; about 20 MB."""


class VersionCheck:
    """Tells which passages of a document may stand in one answer.

    Args:
        index: whose manifests decide.
    """

    def __init__(self, index: SearchIndex) -> None:
        self._index = index
        self._together: OrderedDict[DocumentKey, frozenset[str]] = OrderedDict()
        self._ids = 0

    async def mixed(self, passages: Iterable[StoredChunk]) -> list[Manifest]:
        """Manifests of the documents whose passages are of two versions.

        Raises:
            IndexUnavailable: see there.
        """
        doubtful = {key: ids for key, ids in in_doubt(passages).items() if not self._known(key) >= ids}
        if not doubtful:
            return []
        # A document without a manifest has lost it: there is nothing to go by, and its passages are all there is.
        manifests = await self._index.manifests(list(doubtful))
        for manifest in manifests.values():
            self._remember(manifest)
        return [found for key, found in manifests.items() if not belong_together(doubtful[key], found)]

    async def serving(self, claim: Manifest) -> frozenset[str] | None:
        """Ids of all passages of the version that serves while the claim is under way; they are there.

        They have been there all the time: that version was complete before anything of the claim was written. None if
        the claim's removals have begun: all of its own passages were written before, and whoever searches from now on
        finds them.

        Raises:
            IndexUnavailable: see there.
        """
        if claim.previous is None:
            return None
        version = frozenset(claim.previous.chunks)
        hits = [Hit(chunk_id, claim.key, 0.0) for chunk_id in claim.removed if chunk_id in version]
        return version if len(await self._index.fetch(hits)) == len(hits) else None

    def _known(self, key: DocumentKey) -> frozenset[str]:
        if key in self._together:
            self._together.move_to_end(key)
        return self._together.get(key, frozenset())

    def _remember(self, manifest: Manifest) -> None:
        """They were of one version once, and are for ever, whatever becomes of the document."""
        self._ids += len(manifest.chunks) - len(self._together.pop(manifest.key, ()))
        self._together[manifest.key] = frozenset(manifest.chunks)
        while self._ids > IDS_KEPT:
            _, forgotten = self._together.popitem(last=False)
            self._ids -= len(forgotten)
