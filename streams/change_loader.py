"""What changes made searchable, read from the index once, for all who judge by it."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Final

from infra.opensearch.port import IndexUnavailable, TermIndex
from schemas.documents import DocumentKey
from schemas.search import Hit
from streams.core.invalidation.change_log import ChangeLog, read
from streams.core.invalidation.evidence import Change, Passage, Statistics
from streams.term_cache import TermCache

_REMEMBERED: Final = 64
_LOOKS: Final = 3

_Told = tuple[bytes, ...]
_Read = tuple[Change, Statistics]


class ChangeLoader:
    """Reads changes, each once: slices that judge by the same change share it.

    What was read of a change stays right for those who judge by it later: whatever has changed since is told to them by
    a change of its own.

    Attributes:
        vocabulary: terms of questions, whose frequencies are read along.

    Args:
        terms: what the index makes of texts.
        lexicon: remembers it.
        most: passages of changes that are read before anybody asks.
    """

    def __init__(self, terms: TermIndex, lexicon: TermCache, *, most: int) -> None:
        self.vocabulary: set[str] = set()
        self._terms = terms
        self._lexicon = lexicon
        self._most = most
        self._reading: OrderedDict[tuple[str, _Told], asyncio.Task[_Read]] = OrderedDict()

    def expect(self, tenant: str, told: _Told) -> None:
        """Begin to read changes that somebody will ask for."""
        if len(read(told)) <= self._most:
            self._begin(tenant, told)

    async def read(self, tenant: str, told: _Told) -> tuple[Change, Statistics]:
        """Changes as one, and the statistics of the terms that they share with questions, of about this moment.

        Raises:
            IndexUnavailable: see there.
        """
        return await asyncio.shield(self._begin(tenant, told))

    async def close(self) -> None:
        """End what is under way."""
        tasks = tuple(self._reading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, tenant: str, told: _Told) -> asyncio.Task[_Read]:
        name = (tenant, told)
        task = self._reading.get(name)
        if task is None:
            task = self._reading[name] = asyncio.create_task(self._read(tenant, told), name="read-change")
            task.add_done_callback(lambda done: self._forget_failed(name, done))
            while len(self._reading) > _REMEMBERED:
                self._reading.popitem(last=False)
        return task

    def _forget_failed(self, name: tuple[str, _Told], done: asyncio.Task[_Read]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._reading.get(name) is done:
            del self._reading[name]

    async def _read(self, tenant: str, told: _Told) -> _Read:
        change = await self._change(tenant, read(told))
        added = {term for passage in change.added for term in passage.terms.frequencies}
        return change, await self._lexicon.statistics(sorted(added & self.vocabulary))

    async def _change(self, tenant: str, mentions: ChangeLog) -> Change:
        added = await self._passages(tenant, mentions.added)
        # What was added and is not there any more will be told as removed: it is no part of any answer from now on.
        gone = mentions.added.keys() - added.keys()
        added |= await self._instead(tenant, {mentions.added[chunk_id] for chunk_id in gone})
        there = added.keys()
        return Change(mentions.removed.union(gone).difference(there), tuple(added.values()))

    async def _instead(self, tenant: str, documents: AbstractSet[str]) -> dict[str, Passage]:
        """What stands in place of passages that are gone already: all that there is of their documents.

        An answer counts as true for a change once it is judged by it. One that these passages do not alter is as a
        retrieval of now would find it, so it is true for the later change that took those away as well.
        """
        if not documents:
            return {}
        for _ in range(_LOOKS):
            there = {chunk_id: name for name in documents for chunk_id in await self._ids(tenant, name)}
            if len(there) > self._most:
                raise IndexUnavailable(f"{len(there)} passages stand where others were told")
            found = await self._passages(tenant, there)
            if found.keys() == there.keys():
                return found
        raise IndexUnavailable("documents change more quickly than they can be read")

    async def _ids(self, tenant: str, document: str) -> tuple[str, ...]:
        return await self._terms.chunk_ids(DocumentKey(tenant, document))

    async def _passages(self, tenant: str, documents: Mapping[str, str]) -> dict[str, Passage]:
        """Those of the passages (id → document) that are there."""
        hits = [Hit(chunk_id, DocumentKey(tenant, name), 0.0) for chunk_id, name in documents.items()]
        self._lexicon.forget(documents)  # stored anew, maybe under another title
        found, counts = await asyncio.gather(self._terms.with_vectors(hits), self._lexicon.passages(hits))
        return {
            chunk_id: Passage(one.chunk, one.vector, counts[chunk_id])
            for chunk_id, one in found.items()
            if chunk_id in counts
        }
