"""Terms of passages and questions, as the index makes them, asked for once."""

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
    """What the index makes of texts.

    The analyser of an index never changes, so terms of a question never age. Those of a passage do when it is stored
    anew under its old id, with another title or other headings: whoever hears of that has to say so (``forget``).
    """

    def __init__(self, index: TermIndex) -> None:
        self._index = index
        self._passages: OrderedDict[str, TermCounts] = OrderedDict()
        self._questions: OrderedDict[str, Mapping[str, int]] = OrderedDict()
        self._under_way: dict[str, asyncio.Task[dict[str, TermCounts]]] = {}

    async def passages(self, hits: Sequence[Hit]) -> dict[str, TermCounts]:
        """Terms by chunk id; a passage that is not there any more may be absent.

        Raises:
            IndexUnavailable: see there.
        """
        wanted = {hit.chunk_id: hit for hit in hits}
        # Of these alone: what is let go of to make room may be wanted in the same call.
        found = {chunk_id: self._passages[chunk_id] for chunk_id in wanted if chunk_id in self._passages}
        missing = [chunk_id for chunk_id in wanted if chunk_id not in found]
        if fresh := [wanted[chunk_id] for chunk_id in missing if chunk_id not in self._under_way]:
            reading = asyncio.create_task(self._read(fresh), name="read-terms")
            self._under_way |= {hit.chunk_id: reading for hit in fresh}
        readings = dict.fromkeys(self._under_way[chunk_id] for chunk_id in missing)
        # Others wait for them too, so they go on when this one is told to stop.
        for told in await asyncio.gather(*map(asyncio.shield, readings)):
            found |= {chunk_id: told[chunk_id] for chunk_id in missing if chunk_id in told}
        # A read that others began may be older than what has become searchable since.
        asked = {hit.chunk_id for hit in fresh}
        if absent := [wanted[chunk_id] for chunk_id in missing if chunk_id not in found and chunk_id not in asked]:
            found |= await self.passages(absent)
        _use(self._passages, found)
        return found

    def forget(self, chunk_ids: Iterable[str]) -> None:
        """Read these passages anew, whoever asks from now on: they were stored, under ids that may have had others."""
        for chunk_id in chunk_ids:
            self._passages.pop(chunk_id, None)
            self._under_way.pop(chunk_id, None)

    def forget_passages(self) -> None:
        """Read all passages anew, for what was stored may have been missed."""
        self._passages.clear()
        self._under_way.clear()

    async def _read(self, hits: Sequence[Hit]) -> dict[str, TermCounts]:
        own = asyncio.current_task()
        try:
            told = await self._index.term_counts(hits)
        finally:
            # What was forgotten meanwhile was read too early to be kept.
            current = frozenset(hit.chunk_id for hit in hits if self._under_way.get(hit.chunk_id) is own)
            for chunk_id in current:
                del self._under_way[chunk_id]
        found = {
            chunk_id: TermCounts.of({intern(term): count for term, count in counts.items()})
            for chunk_id, counts in told.items()
        }
        _keep(self._passages, {chunk_id: found[chunk_id] for chunk_id in found if chunk_id in current}, PASSAGES_KEPT)
        return found

    async def questions(self, texts: Collection[str]) -> dict[str, Mapping[str, int]]:
        """Terms of each question.

        Raises:
            IndexUnavailable: see there.
        """
        missing = [text for text in dict.fromkeys(texts) if text not in self._questions]
        found = {text: self._questions[text] for text in texts if text in self._questions}
        found |= zip(missing, await self._index.analysed(missing), strict=True)
        _keep(self._questions, found, QUESTIONS_KEPT)
        return found

    async def statistics(self, terms: Collection[str]) -> Statistics:
        """Statistics of this moment.

        Raises:
            IndexUnavailable: see there.
        """
        told = await self._index.statistics(terms)
        return Statistics(told.document_count, told.total_length, told.frequencies)


def _use(kept: OrderedDict[str, T], found: Iterable[str]) -> None:
    """What was used last stays."""
    for name in found:
        if name in kept:
            kept.move_to_end(name)


def _keep(kept: OrderedDict[str, T], found: Mapping[str, T], most: int) -> None:
    """What was used last stays. Another call may have let go of any of it meanwhile."""
    for name, one in found.items():
        kept[name] = one
        kept.move_to_end(name)
    while len(kept) > most:
        kept.popitem(last=False)
