"""Cache of the terms of passages and questions, as the index analyses them."""

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from sys import intern
from typing import Final, TypeVar

from infra.opensearch.port import TermIndex
from schemas.search import Hit
from streams.core.invalidation.evidence import Statistics, TermCounts

T = TypeVar("T")

PASSAGES_KEPT: Final = 20_000
QUESTIONS_KEPT: Final = 20_000


class TermCache:
    """Terms of passages and questions, each requested from the index once.

    The analyser of an index never changes, so the terms of a question stay valid. The terms of a passage change when it
    is rewritten under the same id with another title or other headings; the caller has to invalidate them then
    (``forget``).
    """

    def __init__(self, index: TermIndex) -> None:
        self._index = index
        self._passages: OrderedDict[str, TermCounts] = OrderedDict()
        self._questions: OrderedDict[str, Mapping[str, int]] = OrderedDict()
        self._pending_reads: dict[str, asyncio.Task[dict[str, TermCounts]]] = {}

    async def passages(self, hits: Sequence[Hit]) -> dict[str, TermCounts]:
        """Terms by chunk id. Passages that no longer exist may be absent.

        Raises:
            IndexUnavailable: the index does not respond.
        """
        wanted = {hit.chunk_id: hit for hit in hits}
        # Copied first: the same call may evict some of these entries to make room.
        found = {chunk_id: self._passages[chunk_id] for chunk_id in wanted if chunk_id in self._passages}
        missing = [chunk_id for chunk_id in wanted if chunk_id not in found]
        if unread := [wanted[chunk_id] for chunk_id in missing if chunk_id not in self._pending_reads]:
            reading = asyncio.create_task(self._read(unread), name="read-terms")
            self._pending_reads |= {hit.chunk_id: reading for hit in unread}
        pending = dict.fromkeys(self._pending_reads[chunk_id] for chunk_id in missing)
        # Shielded, because other callers wait for the same reads.
        for terms in await asyncio.gather(*map(asyncio.shield, pending)):
            found |= {chunk_id: terms[chunk_id] for chunk_id in missing if chunk_id in terms}
        # A read that another caller started may be older than changes that are searchable by now.
        requested = {hit.chunk_id for hit in unread}
        if absent := [wanted[chunk_id] for chunk_id in missing if chunk_id not in found and chunk_id not in requested]:
            found |= await self.passages(absent)
        _mark_used(self._passages, found)
        return found

    def cached_terms(self, chunk_ids: Iterable[str]) -> frozenset[str]:
        """Distinct terms of those passages whose terms are cached, whether or not they still exist."""
        cached = (self._passages[chunk_id] for chunk_id in chunk_ids if chunk_id in self._passages)
        return frozenset(term for counts in cached for term in counts.frequencies)

    def forget(self, chunk_ids: Iterable[str]) -> None:
        """Discard the terms of passages that were written, possibly under ids that existed before."""
        for chunk_id in chunk_ids:
            self._passages.pop(chunk_id, None)
            self._pending_reads.pop(chunk_id, None)

    def forget_passages(self) -> None:
        """Discard the terms of all passages, because changes may have been missed."""
        self._passages.clear()
        self._pending_reads.clear()

    async def _read(self, hits: Sequence[Hit]) -> dict[str, TermCounts]:
        task = asyncio.current_task()
        try:
            stored = await self._index.term_counts(hits)
        finally:
            # Terms of a passage that was discarded during the read are too old to be kept.
            current = frozenset(hit.chunk_id for hit in hits if self._pending_reads.get(hit.chunk_id) is task)
            for chunk_id in current:
                del self._pending_reads[chunk_id]
        found = {
            chunk_id: TermCounts.of({intern(term): count for term, count in counts.items()})
            for chunk_id, counts in stored.items()
        }
        _keep(self._passages, {chunk_id: found[chunk_id] for chunk_id in found if chunk_id in current}, PASSAGES_KEPT)
        return found

    async def questions(self, texts: Collection[str]) -> dict[str, Mapping[str, int]]:
        """Terms of each question.

        Raises:
            IndexUnavailable: the index does not respond.
        """
        missing = [text for text in dict.fromkeys(texts) if text not in self._questions]
        found = {text: self._questions[text] for text in texts if text in self._questions}
        found |= zip(missing, await self._index.analyze(missing), strict=True)
        _keep(self._questions, found, QUESTIONS_KEPT)
        return found

    async def statistics(self, terms: Collection[str]) -> Statistics:
        """Current statistics of terms.

        Raises:
            IndexUnavailable: the index does not respond.
        """
        current = await self._index.statistics(terms)
        return Statistics(current.document_count, current.total_length, current.frequencies)


def _mark_used(cache: OrderedDict[str, T], found: Iterable[str]) -> None:
    """Mark entries as the most recently used ones."""
    for key in found:
        if key in cache:
            cache.move_to_end(key)


def _keep(cache: OrderedDict[str, T], found: Mapping[str, T], capacity: int) -> None:
    """Add entries, and evict the least recently used ones. Concurrent calls may have evicted any of them."""
    for key, entry in found.items():
        cache[key] = entry
        cache.move_to_end(key)
    while len(cache) > capacity:
        cache.popitem(last=False)
