"""Judging the answers of a slice by the changes of its tenant.

Whoever brings a change judges, and may be more than one: a judgement only counts if it begins where the last one ended
(``AnswerSlices.settle``), so there is no owner to be lost, and nothing moves when workers come and go. What a judge
keeps in memory is a copy that can be made anew from Redis at any time; it is, whenever it does not fit what Redis says.

Where a judgement cannot be made, because the index does not answer or too much has changed at once, the slice's answers
are dropped: never kept.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, KeysView, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import orjson
import structlog

from infra.opensearch.port import IndexUnavailable, SearchIndex, TermIndex
from infra.redis.entry import Entry, UnreadableEntry
from infra.redis.port import AnswerSlices, CacheUnavailable, Pending
from infra.settings import AnswerSettings
from schemas.search import Windows
from streams.change_loader import ChangeLoader
from streams.core.invalidation.change_log import read
from streams.core.invalidation.evidence import Change, Evidence, Statistics, Verdict
from streams.core.invalidation.exact import Exact
from streams.term_cache import TermCache

FOLLOW_S: Final = 0.1
"""How often a judge reads what was stored, when no change makes it: mostly it is read before the next change comes."""

QUIET_FOLLOW_S: Final = 2.0
"""The same of a slice to which nothing has come for ``QUIET_AFTER_S``."""

QUIET_AFTER_S: Final = 10.0

_UNKNOWN: Final = 0
_EVENTS_TOLD: Final = 20
_NO_CHANGE: Final = Change(frozenset(), ())
_NO_STATISTICS: Final = Statistics(0, 0)
_ENTRIES_AT_ONCE: Final = 500

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Fusion:
    """How the query tier makes an answer of windows: it and the judges must agree.

    Attributes:
        dimension: length of vectors.
        kept: places of a window that are kept.
        fused: places of a window that are fused.
        rrf_k: constant of the fusion.
    """

    dimension: int
    kept: int
    fused: int
    rrf_k: int

    def policy(self) -> Exact:
        """A policy without answers."""
        return Exact(dimension=self.dimension, kept=self.kept, fused=self.fused, rrf_k=self.rrf_k)


class TooMuchChanged(Exception):
    """More passages have changed than are judged; the message says how many."""


class SliceEvaluator:
    """Keeps the evidence of one slice's answers, and judges them.

    Args:
        tenant: whose answers they are.
        number: of the slice.
        slices: where the answers are.
        index: of the documents.
        news: reads what changes mention.
        lexicon: reads terms.
        fusion: how answers are made.
        settings: how much is judged.
        drops: what cannot be judged is dropped. False for those who want to know, and change nothing.
    """

    def __init__(
        self,
        tenant: str,
        number: int,
        *,
        slices: AnswerSlices,
        index: SearchIndex,
        news: ChangeLoader,
        lexicon: TermCache,
        fusion: Fusion,
        settings: AnswerSettings,
        drops: bool = True,
    ) -> None:
        self._tenant = tenant
        self._number = number
        self._slices = slices
        self._index = index
        self._news = news
        self._lexicon = lexicon
        self._fusion = fusion
        self._settings = settings
        self._drops = drops
        self._one_at_a_time = asyncio.Lock()
        self.active_s = time.monotonic()
        self._forget()

    async def catch_up(self) -> None:
        """Judge the slice up to its latest change.

        Raises:
            CacheUnavailable: it may be judged or not; the next call finds out.
            IndexUnavailable, TooMuchChanged: it cannot be judged; only where that does not drop answers.
        """
        async with self._one_at_a_time:
            try:
                while not await self._judge():
                    pass
            except IndexUnavailable as error:
                if not self._drops:
                    raise
                # Where no change waits, answers are as true as before; what was not taken in is, the next time.
                if self._behind:
                    self._forget()
                    await self._drop_all(str(error))
            except BaseException:
                # Windows may be ahead of what was dropped: only Redis knows now.
                self._forget()
                raise

    def rehearse(self, change: Change, statistics: Statistics) -> Verdict:
        """What a change would mean for the answers; this judge has no use after it."""
        return self._policy.judge(change, statistics)

    @property
    def keys(self) -> frozenset[str]:
        """Of the answers that it knows."""
        return frozenset(self._fills)

    @property
    def vocabulary(self) -> KeysView[str]:
        """Terms of the questions that were asked."""
        return self._policy.vocabulary

    def _forget(self) -> None:
        self._policy = self._fusion.policy()
        self._known = _UNKNOWN
        self._floor = _UNKNOWN
        self._last_fill = 0
        self._fills: dict[str, int] = {}
        self._doomed: dict[str, int] = {}
        self._new_terms: set[str] = set()
        self._behind = False

    async def _judge(self) -> bool:
        """One round; False where another is needed, as the memory did not fit, or another worker was faster."""
        pending = await self._slices.pending(self._tenant, self._number, known=self._known, fill=self._last_fill)
        if self._known == _UNKNOWN:
            self._floor = pending.floor
        elif not self._continues(pending):
            self._forget()
            self._lexicon.forget_passages()
            return False
        self._behind = pending.judged != pending.epoch
        told = tuple(change.change for change in pending.changes if change.change)
        mentions = read(told)
        self._lexicon.forget(mentions.added)  # also of changes that are not read, as they are too many
        if pending.changes or pending.fills:
            self.active_s = time.monotonic()
        if len(mentions) > self._settings.judged_passages:
            self._forget()
            await self._drop_all(f"{len(mentions)} passages changed at once")
            return True
        unclear = await self._load(pending, mentions.removed)
        await self._weigh(told, unclear)
        self._known = pending.epoch
        drop = [(fill, key) for key, fill in self._doomed.items()]
        if pending.judged != pending.epoch or drop:
            # What is to be dropped stays so until it is: another worker may have been faster by one change only.
            if not await self._slices.settle(
                self._tenant,
                self._number,
                judged=pending.judged,
                epoch=pending.epoch,
                drop=drop,
                why=_why(pending) if drop else b"",
            ):
                return False
            self._doomed.clear()
        return True

    def _continues(self, pending: Pending) -> bool:
        previous = pending.changes[0].previous if pending.changes else pending.epoch
        return pending.floor == self._floor and previous == self._known

    async def _drop_all(self, reason: str) -> None:
        if not self._drops:
            raise TooMuchChanged(reason)
        log.warning("answers_dropped_unjudged", tenant=self._tenant, slice=self._number, reason=reason)
        await self._slices.drop_all(self._tenant, self._number, orjson.dumps({"unjudged": reason}))

    async def _load(self, pending: Pending, gone: frozenset[str]) -> set[str]:
        """Take in what was stored since; keys of answers that lack a passage which is not known to be ``gone``."""
        for key, fill in list(self._fills.items()):
            if pending.oldest_fill is not None and fill >= pending.oldest_fill:
                break
            self._let_go(key)  # it has ended by itself
        since = pending.changes[0].previous if pending.changes else pending.epoch
        unclear: set[str] = set()
        for start in range(0, len(pending.fills), _ENTRIES_AT_ONCE):
            page = pending.fills[start : start + _ENTRIES_AT_ONCE]
            stored = await self._slices.entries(self._tenant, self._number, [key for _, key in page])
            there = {key: one for (fill, key), one in zip(page, stored, strict=True) if one and one.fill == fill}
            # An answer can be judged only where all changes after it are remembered.
            judged = {key: one for key, one in there.items() if self._known != _UNKNOWN or one.epoch >= since}
            entries = {key: entry for key, one in judged.items() if (entry := _readable(one.entry)) is not None}
            evidence, partial = await self.evidence(entries, gone)
            # Nothing is waited for from here on: what is taken in is taken in wholly.
            for key, one in there.items():
                self._let_go(key)
                self._fills[key] = one.fill
            for one_evidence in evidence:
                self._put(one_evidence)
            self._doom(there.keys() - entries.keys())
            unclear |= partial
            self._last_fill = page[-1][0]
        return unclear

    def _let_go(self, key: str) -> None:
        if self._fills.pop(key, None) is not None:
            self._policy.discard(key)

    def _put(self, evidence: Evidence) -> None:
        self._new_terms.update(evidence.terms.keys() - self._policy.vocabulary)
        self._news.vocabulary.update(evidence.terms)
        self._policy.put(evidence)

    async def evidence(
        self, entries: Mapping[str, Entry], gone: frozenset[str] = frozenset()
    ) -> tuple[list[Evidence], set[str]]:
        """What entries were made of; and the keys of those that lack a passage which is not known to be ``gone``."""
        terms = await self._lexicon.questions([entry.search.text for entry in entries.values()])
        counts = await self._lexicon.passages([hit for entry in entries.values() for hit in entry.lexical_window])
        found, partial = [], set()
        for key, entry in entries.items():
            there = [(hit.chunk_id, counts[hit.chunk_id]) for hit in entry.lexical_window if hit.chunk_id in counts]
            search = entry.search
            if len(there) < len(entry.lexical_window):
                known = all(hit.chunk_id in counts or hit.chunk_id in gone for hit in entry.lexical_window)
                held_all = len(entry.lexical_window) < search.window
                # As if they had been taken out of a window that was kept. One that held all there was still does; of a
                # full one it is known that there is more below, and it has to be deep enough without.
                if known and not held_all and min(len(there), len(entry.vector_window)) >= self._depth(entry):
                    search = replace(search, window=len(there))
                elif not (known and held_all):
                    partial.add(key)
            found.append(
                Evidence(
                    key=key,
                    search=search,
                    terms=terms[entry.search.text],
                    top_k=entry.top_k,
                    sources=entry.sources,
                    vector_window=tuple((hit.chunk_id, hit.score) for hit in entry.vector_window),
                    lexical_window=tuple(there),
                )
            )
        return found, partial

    def _depth(self, entry: Entry) -> int:
        return max(self._fusion.fused, entry.top_k)

    async def _weigh(self, told: tuple[bytes, ...], unclear: set[str]) -> None:
        if not (told or unclear or self._new_terms) or not self._fills:
            return
        change, statistics = await self._news.read(self._tenant, told) if told else (_NO_CHANGE, _NO_STATISTICS)
        if self._new_terms or not told:
            more = await self._lexicon.statistics(sorted(self._new_terms))
            statistics = replace(more, frequencies={**statistics.frequencies, **more.frequencies})
            self._new_terms.clear()
        verdict = self._policy.judge(change, statistics)
        self._doom(verdict.drop)
        await self._recheck(sorted((verdict.recheck | unclear) - verdict.drop), statistics)

    async def _recheck(self, keys: Sequence[str], statistics: Statistics) -> None:
        """Retrieve again for answers whose windows are too short to tell; too many of them are dropped."""
        if not keys:
            return
        try:
            told = await self._again(keys) if len(keys) <= self._settings.rechecks or not self._drops else None
        except IndexUnavailable:
            if not self._drops:
                raise
            told = None
        if told is None:
            self._doom(keys)
            return
        evidence, partial = told
        for one in evidence:
            self._put(one)
        self._doom(partial | self._policy.altered({one.key for one in evidence} - partial, statistics))

    async def _again(self, keys: Sequence[str]) -> tuple[list[Evidence], set[str]]:
        """As ``evidence``, with the windows of now."""
        stored = await self._slices.entries(self._tenant, self._number, keys)
        entries = {}
        for key, one in zip(keys, stored, strict=True):
            if one is not None and one.fill == self._fills[key]:
                entries[key] = Entry.decode(one.entry)
            else:
                self._let_go(key)  # ended, or filled anew and read in the next round
        found = await self._index.search([entry.search for entry in entries.values()])
        fresh = {key: _retrieved(entry, windows) for (key, entry), windows in zip(entries.items(), found, strict=True)}
        return await self.evidence(fresh)

    def _doom(self, keys: Iterable[str]) -> None:
        for key in keys:
            if (fill := self._fills.get(key)) is not None:
                self._doomed[key] = fill
                self._let_go(key)


def _why(pending: Pending) -> bytes:
    """The events of a judgement, the latest of them where they are many.

    A judge that begins reads changes that others judged before: those have dropped nothing now.
    """
    mentions = read(tuple(one.change for one in pending.changes if one.change and one.epoch > pending.judged))
    return orjson.dumps(
        {"events": mentions.events[-_EVENTS_TOLD:], "documents": sorted(mentions.documents)[:_EVENTS_TOLD]}
    )


def _readable(stored: bytes) -> Entry | None:
    try:
        return Entry.decode(stored)
    except UnreadableEntry:
        return None


def _retrieved(entry: Entry, windows: Windows) -> Entry:
    return Entry(
        response=b"",
        search=entry.search,
        top_k=entry.top_k,
        sources=entry.sources,
        vector_window=windows.vector,
        lexical_window=windows.lexical,
        filled_ms=entry.filled_ms,
        positions=entry.positions,
    )


class SliceEvaluators:
    """The judges of this worker: one for each slice that it has seen a change of."""

    def __init__(
        self,
        slices: AnswerSlices,
        index: SearchIndex,
        terms: TermIndex,
        *,
        fusion: Fusion,
        settings: AnswerSettings,
    ) -> None:
        self._slices = slices
        self._index = index
        self._lexicon = TermCache(terms)
        self._news = ChangeLoader(terms, self._lexicon, most=settings.judged_passages)
        self._fusion = fusion
        self._settings = settings
        self._judges: dict[tuple[str, int], SliceEvaluator] = {}

    def expect(self, tenant: str, told: bytes) -> None:
        """Begin to read what a change has made searchable, while it is appended to the slices."""
        if any(name == tenant for name, _ in self._judges):
            self._news.expect(tenant, (told,))

    async def catch_up(self, tenant: str, number: int) -> None:
        """See ``SliceEvaluator.catch_up``."""
        judge = self._judges.get((tenant, number))
        if judge is None:
            judge = self._judges[tenant, number] = SliceEvaluator(
                tenant,
                number,
                slices=self._slices,
                index=self._index,
                news=self._news,
                lexicon=self._lexicon,
                fusion=self._fusion,
                settings=self._settings,
            )
        await judge.catch_up()

    async def follow(self) -> None:
        """Until cancelled, take in what was stored meanwhile, so that the next change finds little to read."""
        looked_s: dict[tuple[str, int], float] = {}
        while True:
            await asyncio.sleep(FOLLOW_S)
            now_s = time.monotonic()
            due: dict[str, list[SliceEvaluator]] = defaultdict(list)
            for place, judge in self._judges.items():
                if now_s - judge.active_s <= QUIET_AFTER_S or now_s - looked_s.get(place, 0.0) >= QUIET_FOLLOW_S:
                    looked_s[place] = now_s
                    due[place[0]].append(judge)
            for tenant, judges in due.items():
                # Together: what they ask of Redis and of the index goes in few requests.
                looks = await asyncio.gather(*(judge.catch_up() for judge in judges), return_exceptions=True)
                for error in filter(None, looks):
                    if isinstance(error, CacheUnavailable):
                        log.warning("judge_waits_for_redis", tenant=tenant, reason=str(error))
                    else:
                        # Nobody waits for this, so nobody would hear of it; the next change meets what is wrong, too.
                        log.error("judge_failed", tenant=tenant, exc_info=error)

    async def close(self) -> None:
        """End what is being read for changes that nobody waits for any more."""
        await self._news.close()
