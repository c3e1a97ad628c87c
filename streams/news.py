"""What changes made searchable, read from the index once, for all who judge by it."""

import asyncio
from collections import OrderedDict
from typing import Final

from infra.opensearch.port import Hit, TermIndex
from schemas.documents import DocumentKey
from streams.core.invalidation.evidence import Change, Passage, Statistics
from streams.core.invalidation.mentions import Mentions, read
from streams.lexicon import Lexicon

_REMEMBERED: Final = 64

_Told = tuple[bytes, ...]
_Read = tuple[Change, Statistics]


class News:
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

    def __init__(self, terms: TermIndex, lexicon: Lexicon, *, most: int) -> None:
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

    async def _change(self, tenant: str, mentions: Mentions) -> Change:
        hits = [Hit(chunk_id, DocumentKey(tenant, name), 0.0) for chunk_id, name in mentions.added.items()]
        passages, counts = await asyncio.gather(self._terms.with_vectors(hits), self._lexicon.passages(hits))
        # What was added and is not there any more will be told as removed: it is no part of any answer from now on.
        there = [chunk_id for chunk_id in passages if chunk_id in counts]
        added = tuple(Passage(passages[name].chunk, passages[name].vector, counts[name]) for name in there)
        return Change(mentions.documents, mentions.removed.union(mentions.added).difference(there), added)
