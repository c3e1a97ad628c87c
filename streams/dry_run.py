"""Which cached answers an edit would change, before it is sent. Nothing is written, and nothing is dropped.

The edit goes through the code that would process it: it is prepared, decided on and judged as the steps would, from the
standing manifest and the cached answers of this moment. What differs is that its passages are not in the index: their
terms are asked of the analyser, and the index's statistics are moved as their writing would move them. Answers that the
step would have to retrieve again to judge can only be told as such.
"""

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from infra.blobs.memory import MemoryBlobStore
from infra.embedding.port import Embedder
from infra.kafka.codec import decode
from infra.opensearch.codec import lexical_text
from infra.opensearch.port import DocumentIndex, SearchIndex, TermIndex
from infra.redis.entry import Entry
from infra.redis.port import AnswerSlices, Appended, Dropped, Pending, StoredEntry
from infra.settings import AnswerSettings
from schemas.documents import MetadataValue
from schemas.events import Change as ChangeKind
from schemas.events import ChunkPlan, DocumentEvent
from streams.change_loader import ChangeLoader
from streams.core.chunk_identity import stored_chunks
from streams.core.document_change import Write, decide, found_again
from streams.core.invalidation.entrants import entrant
from streams.core.invalidation.evidence import Change, Evidence, Passage, Statistics, TermCounts
from streams.core.outcomes import DeadLetter
from streams.core.planned_chunks import load_chunks
from streams.core.splitting import Splitter, embedding_text
from streams.evaluation import Fusion, SliceEvaluator, TooMuchChanged
from streams.parsing.sandbox import ParserPool
from streams.progress import NoProgress
from streams.runner import Task
from streams.steps.prepare import Prepare
from streams.term_cache import TermCache

SNIPPET_CHARS: Final = 120
_ENTRIES_AT_ONCE: Final = 500

Why = Literal["cites", "comes_in", "unclear", "unjudged"]
"""A passage that the answer cites goes, or is stored anew; a new one comes into it; only a new retrieval tells; or the
edit changes more at once than is judged, so that the answer is dropped, whatever it says."""


class Unprocessable(Exception):
    """The edit would become a dead letter; the message says why."""


class NotNow(Exception):
    """It cannot be told at this moment what the edit would do; the message says why."""


@dataclass(frozen=True, slots=True)
class Touched:
    """An answer that the edit would drop, or may drop.

    Attributes:
        key: of the answer.
        question: as it was asked, normalised.
        groups: of those who asked.
        filters: of the question.
        top_k: passages of the answer.
        why: see there.
        passage: the beginning of the highest new passage, where one comes in.
        vector_rank: its place in the answer's vector leg, from 1, where it has one.
        lexical_rank: the same of the lexical leg.
    """

    key: str
    question: str
    groups: tuple[str, ...]
    filters: Mapping[str, MetadataValue | tuple[MetadataValue, ...]]
    top_k: int
    why: Why
    passage: str | None = None
    vector_rank: int | None = None
    lexical_rank: int | None = None


@dataclass(frozen=True, slots=True)
class DryRunResult:
    """What an edit would do.

    Attributes:
        version: that it would have, at least.
        added: passages that it would write.
        removed: passages that it would take away.
        kept: passages that it would leave as they are.
        answers: cached answers that were looked at.
        touched: those that it would change, or may change.
    """

    version: int
    added: int
    removed: int
    kept: int
    answers: int
    touched: tuple[Touched, ...]


class DryRun:
    """Rehearses edits of one installation.

    Args:
        index: of the documents.
        searches: the same index, for answers whose windows are not known.
        terms: what it makes of texts.
        slices: of answers.
        embedder: the model of its vectors.
        parsers: started already.
        splitter: as the workers have it.
        profile: as the workers have it.
        fusion: how answers are made.
        settings: how answers are laid out.
    """

    def __init__(
        self,
        *,
        index: DocumentIndex,
        searches: SearchIndex,
        terms: TermIndex,
        slices: AnswerSlices,
        embedder: Embedder,
        parsers: ParserPool,
        splitter: Splitter,
        profile: str,
        fusion: Fusion,
        settings: AnswerSettings,
    ) -> None:
        self._index = index
        self._searches = searches
        self._terms = terms
        self._slices = slices
        self._embedder = embedder
        self._blobs = MemoryBlobStore()
        self._prepare = Prepare(self._blobs, parsers, splitter, profile, NoProgress())
        self._fusion = fusion
        self._settings = settings

    async def rehearse(self, event: DocumentEvent, content: bytes) -> DryRunResult:
        """What the event would change; its version is taken to be the newest, its content is ``content``.

        Raises:
            Unprocessable: see there.
            NotNow: see there.
            IndexUnavailable, CacheUnavailable, EmbeddingError: a store or the model does not answer.
        """
        if event.change is ChangeKind.UPSERTED:
            await self._blobs.put(content)
        standing = (await self._index.standing([event.key])).get(event.key)
        manifest = standing.manifest if standing else None
        if manifest is not None:
            event = event.model_copy(update={"version": max(event.version, manifest.newest_version + 1)})
        plan = await self._planned(event)
        chunks = plan.chunks if plan.chunks_blob is None else load_chunks(await self._blobs.get(plan.chunks_blob))
        passages = stored_chunks(plan, chunks)
        ids = [passage.chunk_id for passage in passages]
        before = manifest.completed if manifest is not None else None
        lost = False
        if manifest is None and (there := (await self._index.passages([event.key])).get(event.key)):
            before = found_again([one.chunk for one in there], fence=0, now_ms=time.time() * 1_000)
            lost = True
        write = decide(plan, ids, before, now_ms=time.time() * 1_000, lost=lost)
        if not isinstance(write, Write):
            raise NotNow("a newer version was sent meanwhile: try again")
        named = zip(passages, write.claim.chunks, strict=True)
        passages = tuple(passage.model_copy(update={"chunk_id": name}) for passage, name in named)
        stored = [passages[number] for number in write.add]
        vectors = await self._embedder.embed_passages([embedding_text(plan.title, one) for one in stored])
        counts = [TermCounts.of(terms) for terms in await self._terms.analysed([lexical_text(one) for one in stored])]
        added = tuple(Passage(*one) for one in zip(stored, vectors, counts, strict=True))
        change = Change(frozenset(write.remove), added)
        answers, touched = 0, []
        for number in range(self._slices.count):
            judged, some = await self._slice(event.tenant, number, change)
            answers += judged
            touched += some
        return DryRunResult(
            version=event.version,
            added=len(write.add),
            removed=len(write.remove),
            kept=len(ids) - len(write.add),
            answers=answers,
            touched=tuple(sorted(touched, key=lambda one: (one.why, one.question, one.key))),
        )

    async def _planned(self, event: DocumentEvent) -> ChunkPlan:
        task = Task(event, partition=0, offset=0, traceparent=None)
        [outcome] = [one async for some in self._prepare.run([task]) for one in some]
        if isinstance(outcome, DeadLetter):
            raise Unprocessable(f"{outcome.kind}: {outcome.reason}")
        [record] = outcome.emit
        return decode(ChunkPlan, record.value, record.headers)

    async def _slice(self, tenant: str, number: int, change: Change) -> tuple[int, list[Touched]]:
        lexicon = TermCache(self._terms)
        judge = SliceEvaluator(
            tenant,
            number,
            slices=_Unchanged(self._slices),
            index=self._searches,
            news=ChangeLoader(self._terms, lexicon, most=self._settings.judged_passages),
            lexicon=lexicon,
            fusion=self._fusion,
            settings=self._settings,
            drops=False,
        )
        try:
            await judge.catch_up()
        except TooMuchChanged as error:
            raise NotNow(f"{error}, and the answers are about to be dropped: try again") from error
        known = judge.keys
        if len(change.removed) + len(change.added) > self._settings.judged_passages:
            doomed: dict[str, Why | None] = dict.fromkeys(known, "unjudged")
        else:
            added = {term for passage in change.added for term in passage.terms.frequencies}
            statistics = await self._statistics(lexicon, added & judge.vocabulary, change)
            verdict = await asyncio.to_thread(judge.rehearse, change, statistics)
            recheck = verdict.recheck - verdict.drop
            unclear: Why = "unclear" if len(recheck) <= self._settings.rechecks else "unjudged"
            doomed = dict.fromkeys(recheck, unclear) | dict.fromkeys(verdict.drop)
        touched: list[Touched] = []
        keys = list(doomed)
        for start in range(0, len(keys), _ENTRIES_AT_ONCE):
            page = keys[start : start + _ENTRIES_AT_ONCE]
            stored = await self._slices.entries(tenant, number, page)
            # One that is not there has ended meanwhile.
            entries = {key: Entry.decode(one.entry) for key, one in zip(page, stored, strict=True) if one is not None}
            evidence, _ = await judge.evidence(entries)
            statistics = await self._statistics(lexicon, {term for one in evidence for term in one.terms}, change)
            touched += [self._touched(entries[one.key], one, change, statistics, doomed[one.key]) for one in evidence]
        return len(known), touched

    def _touched(
        self, entry: Entry, evidence: Evidence, change: Change, statistics: Statistics, why: Why | None
    ) -> Touched:
        told = Touched(
            key=evidence.key,
            question=entry.search.text,
            groups=entry.search.access.groups,
            filters=entry.search.filters,
            top_k=entry.top_k,
            why=why or "comes_in",
        )
        if why is not None:
            return told
        gone = change.removed.union(passage.chunk.chunk_id for passage in change.added)
        if any(chunk_id in gone for chunk_id, _ in entry.sources):
            return replace(told, why="cites")
        new = entrant(evidence, change, statistics, fused=self._fusion.fused, rrf_k=self._fusion.rrf_k)
        if new is None:
            return told
        text = " ".join(new.passage.chunk.text.split())[:SNIPPET_CHARS]
        return replace(told, passage=text, vector_rank=new.vector_rank, lexical_rank=new.lexical_rank)

    @staticmethod
    async def _statistics(lexicon: TermCache, terms: Collection[str], change: Change) -> Statistics:
        """Those of after the change: what is removed is counted until the index merges it away."""
        now = await lexicon.statistics(sorted(terms))
        return Statistics(
            now.document_count + len(change.added),
            now.total_length + sum(passage.terms.length for passage in change.added),
            {
                term: count + sum(term in passage.terms.frequencies for passage in change.added)
                for term, count in now.frequencies.items()
            },
        )


class _Unchanged:
    """Slices that are only read: what is judged is not told to anybody."""

    def __init__(self, slices: AnswerSlices) -> None:
        self._slices = slices

    @property
    def count(self) -> int:
        """See ``AnswerSlices``."""
        return self._slices.count

    async def append(self, tenant: str, number: int, positions: Mapping[int, int], change: bytes) -> Appended:
        """Never asked for."""
        raise NotImplementedError

    async def pending(self, tenant: str, number: int, *, known: int, fill: int) -> Pending:
        """See ``AnswerSlices``."""
        return await self._slices.pending(tenant, number, known=known, fill=fill)

    async def entries(self, tenant: str, number: int, keys: Sequence[str]) -> list[StoredEntry | None]:
        """See ``AnswerSlices``."""
        return await self._slices.entries(tenant, number, keys)

    async def settle(
        self,
        tenant: str,  # noqa: ARG002 - as the port has it, and all that follow
        number: int,  # noqa: ARG002
        *,
        judged: int,  # noqa: ARG002
        epoch: int,  # noqa: ARG002
        drop: Sequence[tuple[int, str]],  # noqa: ARG002
        why: bytes = b"",  # noqa: ARG002
    ) -> bool:
        """Nothing happens."""
        return True

    async def drop_all(self, tenant: str, number: int, why: bytes = b"") -> None:
        """Never asked for."""
        raise NotImplementedError

    async def drops(self, tenant: str, number: int, key: str) -> list[Dropped]:
        """See ``AnswerSlices``."""
        return await self._slices.drops(tenant, number, key)
