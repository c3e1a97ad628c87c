"""Evaluates the cached answers of a slice against the changes of its tenant.

Any worker that receives a change may evaluate, also several at once: an evaluation is committed only if it starts where
the last committed one ended (``AnswerSlices.commit``). So no slice has an owner, and nothing is handed over when
workers join or leave. An evaluator holds a copy of the evidence in memory. It reloads the copy from Redis whenever the
two do not match.

If an evaluation is impossible, because the index is unavailable or too much has changed at once, the answers of the
slice are dropped.
"""

import asyncio
import time
from collections.abc import Iterable, KeysView, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

import orjson
import structlog

from infra.opensearch.port import IndexUnavailable, SearchIndex, TermIndex
from infra.redis.entry import Entry, UnreadableEntry
from infra.redis.port import AnswerSlices, Pending
from infra.settings import AnswerSettings
from schemas.search import Candidates
from streams.change_loader import ChangeLoader
from streams.core.invalidation.change_log import decode_changes
from streams.core.invalidation.evidence import Change, Evaluation, Evidence, Statistics
from streams.core.invalidation.exact import Exact
from streams.term_cache import TermCache

_UNKNOWN: Final = 0
_EVENTS_LOGGED: Final = 20
_NO_CHANGE: Final = Change(frozenset(), ())
_NO_STATISTICS: Final = Statistics(0, 0)
_ENTRIES_PER_PAGE: Final = 500

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FusionParameters:
    """Parameters of retrieval and fusion. Query service and evaluators have to use the same values.

    Attributes:
        dimension: length of vectors.
        kept: candidates of each retriever that are kept as evidence.
        fused: candidates of each retriever that are fused.
        rrf_k: constant of reciprocal rank fusion.
    """

    dimension: int
    kept: int
    fused: int
    rrf_k: int

    def policy(self) -> Exact:
        """An exact policy without answers."""
        return Exact(dimension=self.dimension, kept=self.kept, fused=self.fused, rrf_k=self.rrf_k)


@dataclass(frozen=True, slots=True)
class EvaluationContext:
    """What the evaluators of all slices share.

    Attributes:
        slices: store of the answers.
        index: index of the documents, for repeated searches.
        loader: loads changes.
        term_cache: terms of passages and questions.
        fusion: parameters of retrieval and fusion.
        settings: limits of evaluations.
    """

    slices: AnswerSlices
    index: SearchIndex
    loader: ChangeLoader
    term_cache: TermCache
    fusion: FusionParameters
    settings: AnswerSettings

    @classmethod
    def of(
        cls,
        slices: AnswerSlices,
        index: SearchIndex,
        terms: TermIndex,
        *,
        fusion: FusionParameters,
        settings: AnswerSettings,
    ) -> Self:
        """A context with an empty term cache."""
        term_cache = TermCache(terms)
        loader = ChangeLoader(terms, term_cache, max_passages=settings.evaluated_passages)
        return cls(slices, index, loader, term_cache, fusion, settings)


class TooMuchChanged(Exception):
    """More passages have changed than are evaluated; the message contains the number."""


class SliceEvaluator:
    """Holds the evidence of one slice's answers and evaluates them.

    Args:
        context: what it shares with other evaluators.
        tenant: owner of the answers.
        number: number of the slice.
        evicts: drop answers that cannot be evaluated. False for a dry run, which raises instead.
    """

    def __init__(self, context: EvaluationContext, tenant: str, number: int, *, evicts: bool = True) -> None:
        self._tenant = tenant
        self._number = number
        self._slices = context.slices
        self._index = context.index
        self._loader = context.loader
        self._term_cache = context.term_cache
        self._fusion = context.fusion
        self._settings = context.settings
        self._evicts = evicts
        self._lock = asyncio.Lock()
        self.active_s = time.monotonic()
        self._reset()

    async def catch_up(self) -> None:
        """Evaluate the slice up to its latest change.

        Raises:
            CacheUnavailable: the evaluation may or may not be committed; the next call finds out.
            IndexUnavailable, TooMuchChanged: the slice cannot be evaluated; only if ``evicts`` is false.
        """
        async with self._lock:
            try:
                while not await self._run_round():
                    pass
            except IndexUnavailable as error:
                if not self._evicts:
                    raise
                # Without a pending change the answers are still current. Answers that were not loaded are loaded by the
                # next call.
                if self._lagging:
                    self._reset()
                    await self._drop_all(str(error))
            except BaseException:
                # The candidates may be ahead of the committed evictions, so only the state in Redis is reliable.
                self._reset()
                raise

    def evaluate(self, change: Change, statistics: Statistics) -> Evaluation:
        """Evaluate a change that is not in the index. The evaluator must not be used afterwards."""
        return self._policy.evaluate(change, statistics)

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the loaded answers."""
        return frozenset(self._fills)

    @property
    def vocabulary(self) -> KeysView[str]:
        """Terms of the questions."""
        return self._policy.vocabulary

    def _reset(self) -> None:
        self._policy = self._fusion.policy()
        self._epoch = _UNKNOWN
        self._floor = _UNKNOWN
        self._last_fill = 0
        self._fills: dict[str, int] = {}
        self._pending_evictions: dict[str, int] = {}
        self._new_terms: set[str] = set()
        self._lagging = False

    async def _run_round(self) -> bool:
        """Run one round. False if another is needed: the copy was outdated, or another worker committed first."""
        pending = await self._slices.pending(
            self._tenant, self._number, after_epoch=self._epoch, after_fill=self._last_fill
        )
        if self._epoch == _UNKNOWN:
            self._floor = pending.floor
        elif not self._is_consecutive(pending):
            self._reset()
            self._term_cache.forget_passages()
            return False
        self._lagging = pending.evaluated != pending.epoch
        encoded = tuple(change.change for change in pending.changes if change.change)
        change_log = decode_changes(encoded)
        self._term_cache.forget(change_log.added)  # also if there are too many of them to be loaded
        if pending.changes or pending.fills:
            self.active_s = time.monotonic()
        if len(change_log) > self._settings.evaluated_passages:
            self._reset()
            await self._drop_all(f"{len(change_log)} passages changed at once")
            return True
        incomplete = await self._load(pending, change_log.removed)
        await self._evaluate(encoded, incomplete)
        self._epoch = pending.epoch
        evictions = [(fill, key) for key, fill in self._pending_evictions.items()]
        if pending.evaluated != pending.epoch or evictions:
            # Pending evictions are kept until they are committed: another worker may have committed a single change
            # first.
            if not await self._slices.commit(
                self._tenant,
                self._number,
                evaluated=pending.evaluated,
                epoch=pending.epoch,
                drop=evictions,
                reason=_reason(pending) if evictions else b"",
            ):
                return False
            self._pending_evictions.clear()
        return True

    def _is_consecutive(self, pending: Pending) -> bool:
        previous = pending.changes[0].previous if pending.changes else pending.epoch
        return pending.floor == self._floor and previous == self._epoch

    async def _drop_all(self, reason: str) -> None:
        if not self._evicts:
            raise TooMuchChanged(reason)
        _log.warning("answers_dropped_unevaluated", tenant=self._tenant, slice=self._number, reason=reason)
        await self._slices.drop_all(self._tenant, self._number, orjson.dumps({"not_evaluated": reason}))

    async def _load(self, pending: Pending, removed: frozenset[str]) -> set[str]:
        """Load the answers stored since the last round.

        Returns:
            Keys of answers that lack a candidate which is not in ``removed``.
        """
        for key, fill in list(self._fills.items()):
            if pending.oldest_fill is not None and fill >= pending.oldest_fill:
                break
            self._discard(key)  # expired
        since = pending.changes[0].previous if pending.changes else pending.epoch
        incomplete: set[str] = set()
        for start in range(0, len(pending.fills), _ENTRIES_PER_PAGE):
            page = pending.fills[start : start + _ENTRIES_PER_PAGE]
            stored = await self._slices.entries(self._tenant, self._number, [key for _, key in page])
            loaded = {key: one for (fill, key), one in zip(page, stored, strict=True) if one and one.fill == fill}
            # An answer can be evaluated only if all changes since its fill are still stored.
            evaluable = {key: one for key, one in loaded.items() if self._epoch != _UNKNOWN or one.epoch >= since}
            entries = {key: entry for key, one in evaluable.items() if (entry := _decode(one.entry)) is not None}
            evidence, incomplete_page = await self.evidence(entries, removed)
            # No await from here on, so each page is loaded completely or not at all.
            for key, one in loaded.items():
                self._discard(key)
                self._fills[key] = one.fill
            for one_evidence in evidence:
                self._put(one_evidence)
            self._evict(loaded.keys() - entries.keys())
            incomplete |= incomplete_page
            self._last_fill = page[-1][0]
        return incomplete

    def _discard(self, key: str) -> None:
        if self._fills.pop(key, None) is not None:
            self._policy.discard(key)

    def _put(self, evidence: Evidence) -> None:
        self._new_terms.update(evidence.terms.keys() - self._policy.vocabulary)
        self._loader.vocabulary.update(evidence.terms)
        self._policy.put(evidence)

    async def evidence(
        self, entries: Mapping[str, Entry], removed: frozenset[str] = frozenset()
    ) -> tuple[list[Evidence], set[str]]:
        """Evidence of cached entries, and the keys of those that lack a candidate which is not in ``removed``."""
        terms = await self._term_cache.questions([entry.search.text for entry in entries.values()])
        counts = await self._term_cache.passages(
            [hit for entry in entries.values() for hit in entry.lexical_candidates]
        )
        evidence, incomplete = [], set()
        for key, entry in entries.items():
            candidates = [
                (hit.chunk_id, counts[hit.chunk_id]) for hit in entry.lexical_candidates if hit.chunk_id in counts
            ]
            search = entry.search
            if len(candidates) < len(entry.lexical_candidates):
                all_known = all(hit.chunk_id in counts or hit.chunk_id in removed for hit in entry.lexical_candidates)
                is_complete = len(entry.lexical_candidates) < search.candidates
                # As if the missing passages had been removed from loaded candidates. A complete list stays complete.
                # For a truncated list further candidates exist, so the rest must be deep enough.
                if (
                    all_known
                    and not is_complete
                    and min(len(candidates), len(entry.vector_candidates)) >= self._depth(entry)
                ):
                    search = replace(search, candidates=len(candidates))
                elif not (all_known and is_complete):
                    incomplete.add(key)
            evidence.append(
                Evidence(
                    key=key,
                    search=search,
                    terms=terms[entry.search.text],
                    top_k=entry.top_k,
                    sources=entry.sources,
                    vector_candidates=tuple((hit.chunk_id, hit.score) for hit in entry.vector_candidates),
                    lexical_candidates=tuple(candidates),
                )
            )
        return evidence, incomplete

    def _depth(self, entry: Entry) -> int:
        return max(self._fusion.fused, entry.top_k)

    async def _evaluate(self, encoded: tuple[bytes, ...], incomplete: set[str]) -> None:
        if not (encoded or incomplete or self._new_terms) or not self._fills:
            return
        change, statistics = await self._loader.read(self._tenant, encoded) if encoded else (_NO_CHANGE, _NO_STATISTICS)
        if self._new_terms or not encoded:
            more = await self._term_cache.statistics(sorted(self._new_terms))
            statistics = replace(more, frequencies={**statistics.frequencies, **more.frequencies})
            self._new_terms.clear()
        verdict = self._policy.evaluate(change, statistics)
        self._evict(verdict.drop)
        await self._recheck(sorted((verdict.recheck | incomplete) - verdict.drop), statistics)

    async def _recheck(self, keys: Sequence[str], statistics: Statistics) -> None:
        """Repeat the search for answers whose candidates do not suffice. If there are too many, evict them."""
        if not keys:
            return
        is_permitted = len(keys) <= self._settings.rechecks or not self._evicts
        try:
            retrieved = await self._search_again(keys) if is_permitted else None
        except IndexUnavailable:
            if not self._evicts:
                raise
            retrieved = None
        if retrieved is None:
            self._evict(keys)
            return
        evidence, incomplete = retrieved
        for one in evidence:
            self._put(one)
        self._evict(incomplete | self._policy.altered({one.key for one in evidence} - incomplete, statistics))

    async def _search_again(self, keys: Sequence[str]) -> tuple[list[Evidence], set[str]]:
        """As ``evidence``, with the current candidates."""
        stored = await self._slices.entries(self._tenant, self._number, keys)
        entries = {}
        for key, one in zip(keys, stored, strict=True):
            if one is not None and one.fill == self._fills[key]:
                entries[key] = Entry.decode(one.entry)
            else:
                self._discard(key)  # expired, or replaced and loaded in the next round
        found = await self._index.search([entry.search for entry in entries.values()])
        fresh = {
            key: _with_candidates(entry, candidates)
            for (key, entry), candidates in zip(entries.items(), found, strict=True)
        }
        return await self.evidence(fresh)

    def _evict(self, keys: Iterable[str]) -> None:
        for key in keys:
            if (fill := self._fills.get(key)) is not None:
                self._pending_evictions[key] = fill
                self._discard(key)


def _reason(pending: Pending) -> bytes:
    """Events that caused the evictions, at most the latest ``_EVENTS_LOGGED``, as JSON.

    An evaluator that has just started also reads changes that others have evaluated. Those caused no eviction.
    """
    change_log = decode_changes(
        tuple(one.change for one in pending.changes if one.change and one.epoch > pending.evaluated)
    )
    return orjson.dumps(
        {"events": change_log.events[-_EVENTS_LOGGED:], "documents": sorted(change_log.documents)[:_EVENTS_LOGGED]}
    )


def _decode(stored: bytes) -> Entry | None:
    try:
        return Entry.decode(stored)
    except UnreadableEntry:
        return None


def _with_candidates(entry: Entry, candidates: Candidates) -> Entry:
    return Entry(
        response=b"",
        search=entry.search,
        top_k=entry.top_k,
        sources=entry.sources,
        vector_candidates=candidates.vector,
        lexical_candidates=candidates.lexical,
        filled_ms=entry.filled_ms,
        positions=entry.positions,
    )
