"""Loads what index changes added and removed. All slices that evaluate the same change share one read."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Final

from infra.opensearch.port import IndexUnavailable, TermIndex
from schemas.documents import DocumentKey
from schemas.search import Hit
from streams.core.invalidation.change_log import ChangeLog, decode_changes
from streams.core.invalidation.evidence import Change, Passage, Statistics
from streams.term_cache import TermCache

_READS_KEPT: Final = 64
_READ_ATTEMPTS: Final = 3

_EncodedChanges = tuple[bytes, ...]
_Loaded = tuple[Change, Statistics]


class ChangeLoader:
    """Loads changes, each only once. Slices that evaluate the same change share the result.

    A loaded change stays valid for later evaluations: whatever changed since is part of a later change.

    Attributes:
        vocabulary: terms of the questions; the loader reads their frequencies with each change.

    Args:
        terms: index that analyses texts and returns term statistics.
        term_cache: cache in front of ``terms``.
        max_passages: largest change that is prefetched, in passages.
    """

    def __init__(self, terms: TermIndex, term_cache: TermCache, *, max_passages: int) -> None:
        self.vocabulary: set[str] = set()
        self._terms = terms
        self._term_cache = term_cache
        self._max_passages = max_passages
        self._reads: OrderedDict[tuple[str, _EncodedChanges], asyncio.Task[_Loaded]] = OrderedDict()

    def prefetch(self, tenant: str, encoded: _EncodedChanges) -> None:
        """Start to load a change that slices are about to evaluate."""
        if len(decode_changes(encoded)) <= self._max_passages:
            self._start_read(tenant, encoded)

    async def read(self, tenant: str, encoded: _EncodedChanges) -> tuple[Change, Statistics]:
        """Load changes, merged into one, with the current statistics of the terms that they share with questions.

        Raises:
            IndexUnavailable: the index does not respond.
        """
        return await asyncio.shield(self._start_read(tenant, encoded))

    async def close(self) -> None:
        """Cancel pending reads."""
        tasks = tuple(self._reads.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start_read(self, tenant: str, encoded: _EncodedChanges) -> asyncio.Task[_Loaded]:
        key = (tenant, encoded)
        task = self._reads.get(key)
        if task is None:
            task = self._reads[key] = asyncio.create_task(self._read(tenant, encoded), name="read-change")
            task.add_done_callback(lambda done: self._discard_failed(key, done))
            while len(self._reads) > _READS_KEPT:
                self._reads.popitem(last=False)
        return task

    def _discard_failed(self, key: tuple[str, _EncodedChanges], done: asyncio.Task[_Loaded]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._reads.get(key) is done:
            del self._reads[key]

    async def _read(self, tenant: str, encoded: _EncodedChanges) -> _Loaded:
        change = await self._load_change(tenant, decode_changes(encoded))
        # Removals change document frequencies too, as soon as the index has merged its segments.
        terms = self._term_cache.cached_terms(change.removed)
        terms = terms.union(*(passage.terms.frequencies for passage in change.added))
        return change, await self._term_cache.statistics(sorted(terms & self.vocabulary))

    async def _load_change(self, tenant: str, change_log: ChangeLog) -> Change:
        added = await self._passages(tenant, change_log.added)
        # A passage that was added and is missing by now appears as removed in a later change. No answer contains it
        # from now on.
        missing = change_log.added.keys() - added.keys()
        added |= await self._current_passages(tenant, {change_log.added[chunk_id] for chunk_id in missing})
        return Change(change_log.removed.union(missing).difference(added.keys()), tuple(added.values()))

    async def _current_passages(self, tenant: str, documents: AbstractSet[str]) -> dict[str, Passage]:
        """The current passages of documents whose added passages are already gone.

        An evaluated answer counts as current for the change. If these passages do not alter it, it equals the result of
        a new retrieval, so it is also current for the later change that removed the missing passages.
        """
        if not documents:
            return {}
        for _ in range(_READ_ATTEMPTS):
            current = {
                chunk_id: document for document in documents for chunk_id in await self._chunk_ids(tenant, document)
            }
            if len(current) > self._max_passages:
                raise IndexUnavailable(f"{len(current)} passages replace those of the change, more than are evaluated")
            found = await self._passages(tenant, current)
            if found.keys() == current.keys():
                return found
        raise IndexUnavailable("documents change faster than they can be read")

    async def _chunk_ids(self, tenant: str, document: str) -> tuple[str, ...]:
        return await self._terms.chunk_ids(DocumentKey(tenant, document))

    async def _passages(self, tenant: str, documents: Mapping[str, str]) -> dict[str, Passage]:
        """The passages (id → document) that exist in the index."""
        hits = [Hit(chunk_id, DocumentKey(tenant, document), 0.0) for chunk_id, document in documents.items()]
        # They may have been rewritten with another title.
        self._term_cache.forget(documents)
        found, counts = await asyncio.gather(self._terms.with_vectors(hits), self._term_cache.passages(hits))
        return {
            chunk_id: Passage(stored.chunk, stored.vector, counts[chunk_id])
            for chunk_id, stored in found.items()
            if chunk_id in counts
        }
