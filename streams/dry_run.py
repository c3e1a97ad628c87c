"""Dry run: reports which cached answers an edit would change. Writes and drops nothing.

The edit passes through the production code: it is prepared, compared with the current manifest, and evaluated against
the current cached answers. There is one difference: its passages are not in the index. Their terms come from the
analyser of the index, and the term statistics are adjusted as if the passages had been written. Answers for which the
step would repeat the search are reported as uncertain.
"""

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from typing_extensions import override

from infra.blobs.memory import MemoryBlobStore
from infra.embedding.port import Embedder
from infra.kafka.codec import decode
from infra.opensearch.codec import lexical_text
from infra.opensearch.port import DocumentIndex, TermIndex
from infra.redis.entry import Entry
from infra.redis.port import AnswerSlices, Appended, Dropped, Pending, StoredEntry
from schemas.documents import MetadataValue
from schemas.events import Change as ChangeKind
from schemas.events import ChunkPlan, DocumentEvent
from streams.core.chunk_identity import stored_chunks
from streams.core.document_change import Write, decide, rebuilt_manifest
from streams.core.invalidation.entrants import entrant
from streams.core.invalidation.evidence import Change, Evidence, Passage, Statistics, TermCounts
from streams.core.outcomes import DeadLetter
from streams.core.planned_chunks import load_chunks
from streams.core.splitting import Splitter, embedding_text
from streams.evaluation import EvaluationContext, SliceEvaluator, TooMuchChanged
from streams.parsing.sandbox import ParserPool
from streams.progress import NoProgress
from streams.runner import Task
from streams.steps.prepare import Prepare
from streams.term_cache import TermCache

SNIPPET_CHARS: Final = 120
_ENTRIES_PER_PAGE: Final = 500

Reason = Literal["source_changed", "enters_results", "uncertain", "not_evaluated"]
"""Why an answer is affected.

``source_changed``: the edit removes or rewrites a passage that the answer cites. ``enters_results``: a new passage
enters the results. ``uncertain``: only a repeated search decides. ``not_evaluated``: the edit changes more passages
than are evaluated, so the answer is dropped without evaluation."""


class Unprocessable(Exception):
    """The edit would become a dead letter; the message contains the reason."""


class DryRunUnavailable(Exception):
    """The result cannot be determined at this moment; the message contains the reason."""


@dataclass(frozen=True, slots=True)
class AffectedAnswer:
    """A cached answer that the edit would drop, or may drop.

    Attributes:
        key: cache key of the answer.
        question: the normalised question.
        groups: groups of the reader.
        filters: filters of the question.
        top_k: number of passages of the answer.
        reason: why the answer is affected.
        passage: beginning of the highest new passage, for ``enters_results``.
        vector_rank: rank of that passage in the vector search, from 1, if it is a candidate there.
        lexical_rank: the same for the lexical search.
    """

    key: str
    question: str
    groups: tuple[str, ...]
    filters: Mapping[str, MetadataValue | tuple[MetadataValue, ...]]
    top_k: int
    reason: Reason
    passage: str | None = None
    vector_rank: int | None = None
    lexical_rank: int | None = None


@dataclass(frozen=True, slots=True)
class DryRunResult:
    """The effect of an edit.

    Attributes:
        version: lowest version that the edit would get.
        added: number of passages that it would write.
        removed: number of passages that it would remove.
        kept: number of passages that it would keep.
        answers: number of cached answers that were evaluated.
        affected: answers that it would change, or may change.
    """

    version: int
    added: int
    removed: int
    kept: int
    answers: int
    affected: tuple[AffectedAnswer, ...]


@dataclass(frozen=True, slots=True)
class Preparation:
    """How workers turn contents into embedded passages.

    Attributes:
        parsers: parser pool, started.
        splitter: splitter of the workers.
        profile: profile of the workers.
        embedder: embedding model of the index.
    """

    parsers: ParserPool
    splitter: Splitter
    profile: str
    embedder: Embedder


class DryRun:
    """Evaluates edits without applying them.

    Args:
        index: index of the documents.
        terms: analyser and term statistics of the index.
        preparation: how workers prepare documents.
        context: cached answers and their evaluation. Nothing is written.
    """

    def __init__(
        self, *, index: DocumentIndex, terms: TermIndex, preparation: Preparation, context: EvaluationContext
    ) -> None:
        self._index = index
        self._terms = terms
        self._embedder = preparation.embedder
        self._context = replace(context, slices=_ReadOnlySlices(context.slices))
        self._blobs = MemoryBlobStore()
        self._prepare = Prepare(
            self._blobs, preparation.parsers, preparation.splitter, preparation.profile, NoProgress()
        )

    async def run(self, event: DocumentEvent, content: bytes) -> DryRunResult:
        """Evaluate an event as the newest version of its document.

        Args:
            event: the event; its version is raised above that of the current manifest.
            content: content of an upsert.

        Raises:
            Unprocessable: the edit would become a dead letter.
            DryRunUnavailable: the result cannot be determined at this moment.
            IndexUnavailable, CacheUnavailable, EmbeddingError: a store or the model is unavailable.
        """
        if event.change is ChangeKind.UPSERTED:
            await self._blobs.put(content)
        stored = (await self._index.stored_manifests([event.key])).get(event.key)
        manifest = stored.manifest if stored else None
        if manifest is not None:
            event = event.model_copy(update={"version": max(event.version, manifest.newest_version + 1)})
        plan = await self._plan(event)
        chunks = plan.chunks if plan.chunks_blob is None else load_chunks(await self._blobs.get(plan.chunks_blob))
        passages = stored_chunks(plan, chunks)
        ids = [passage.chunk_id for passage in passages]
        current = manifest.completed if manifest is not None else None
        lost = False
        if manifest is None and (stored_passages := (await self._index.passages([event.key])).get(event.key)):
            current = rebuilt_manifest([one.chunk for one in stored_passages], fence=0, now_ms=time.time() * 1_000)
            lost = True
        write = decide(plan, ids, current, now_ms=time.time() * 1_000, lost=lost)
        if not isinstance(write, Write):
            raise DryRunUnavailable("a newer version was sent in the meantime: try again")
        named = zip(passages, write.claim.chunks, strict=True)
        passages = tuple(passage.model_copy(update={"chunk_id": name}) for passage, name in named)
        new = [passages[number] for number in write.add]
        vectors = await self._embedder.embed_passages([embedding_text(plan.title, one) for one in new])
        counts = [TermCounts.of(terms) for terms in await self._terms.analyze([lexical_text(one) for one in new])]
        added = tuple(Passage(*one) for one in zip(new, vectors, counts, strict=True))
        change = Change(frozenset(write.remove), added)
        answers, affected = 0, []
        for number in range(self._context.slices.count):
            evaluated, found = await self._evaluate_slice(event.tenant, number, change)
            answers += evaluated
            affected += found
        return DryRunResult(
            version=event.version,
            added=len(write.add),
            removed=len(write.remove),
            kept=len(ids) - len(write.add),
            answers=answers,
            affected=tuple(sorted(affected, key=lambda one: (one.reason, one.question, one.key))),
        )

    async def _plan(self, event: DocumentEvent) -> ChunkPlan:
        task = Task(event, partition=0, offset=0, traceparent=None)
        [outcome] = [one async for outcomes in self._prepare.run([task]) for one in outcomes]
        if isinstance(outcome, DeadLetter):
            raise Unprocessable(f"{outcome.kind}: {outcome.reason}")
        [record] = outcome.emit
        return decode(ChunkPlan, record.value, record.headers)

    async def _evaluate_slice(self, tenant: str, number: int, change: Change) -> tuple[int, list[AffectedAnswer]]:
        term_cache, settings = self._context.term_cache, self._context.settings
        evaluator = SliceEvaluator(self._context, tenant, number, evicts=False)
        try:
            await evaluator.catch_up()
        except TooMuchChanged as error:
            raise DryRunUnavailable(f"{error}, and the answers are about to be dropped: try again") from error
        keys = evaluator.keys
        if len(change.removed) + len(change.added) > settings.evaluated_passages:
            reasons: dict[str, Reason | None] = dict.fromkeys(keys, "not_evaluated")
        else:
            added = {term for passage in change.added for term in passage.terms.frequencies}
            statistics = await self._statistics(term_cache, added & evaluator.vocabulary, change)
            verdict = await asyncio.to_thread(evaluator.evaluate, change, statistics)
            recheck = verdict.recheck - verdict.drop
            undecided: Reason = "uncertain" if len(recheck) <= settings.rechecks else "not_evaluated"
            reasons = dict.fromkeys(recheck, undecided) | dict.fromkeys(verdict.drop)
        affected: list[AffectedAnswer] = []
        reported = list(reasons)
        for start in range(0, len(reported), _ENTRIES_PER_PAGE):
            page = reported[start : start + _ENTRIES_PER_PAGE]
            stored = await self._context.slices.entries(tenant, number, page)
            # Entries that are missing have expired in the meantime.
            entries = {key: Entry.decode(one.entry) for key, one in zip(page, stored, strict=True) if one is not None}
            evidence, _ = await evaluator.evidence(entries)
            statistics = await self._statistics(term_cache, {term for one in evidence for term in one.terms}, change)
            affected += [
                self._affected(entries[one.key], one, change, statistics, reasons[one.key]) for one in evidence
            ]
        return len(keys), affected

    def _affected(
        self, entry: Entry, evidence: Evidence, change: Change, statistics: Statistics, reason: Reason | None
    ) -> AffectedAnswer:
        answer = AffectedAnswer(
            key=evidence.key,
            question=entry.search.text,
            groups=entry.search.access.groups,
            filters=entry.search.filters,
            top_k=entry.top_k,
            reason=reason or "enters_results",
        )
        if reason is not None:
            return answer
        gone = change.removed.union(passage.chunk.chunk_id for passage in change.added)
        if any(chunk_id in gone for chunk_id, _ in entry.sources):
            return replace(answer, reason="source_changed")
        new = entrant(evidence, change, statistics, fused=self._context.fusion.fused, rrf_k=self._context.fusion.rrf_k)
        if new is None:
            return answer
        text = " ".join(new.passage.chunk.text.split())[:SNIPPET_CHARS]
        return replace(answer, passage=text, vector_rank=new.vector_rank, lexical_rank=new.lexical_rank)

    @staticmethod
    async def _statistics(term_cache: TermCache, terms: Collection[str], change: Change) -> Statistics:
        """Statistics after the change. Removed passages are counted until the index merges them away."""
        now = await term_cache.statistics(sorted(terms))
        return Statistics(
            now.document_count + len(change.added),
            now.total_length + sum(passage.terms.length for passage in change.added),
            {
                term: count + sum(term in passage.terms.frequencies for passage in change.added)
                for term, count in now.frequencies.items()
            },
        )


class _ReadOnlySlices(AnswerSlices):
    """Read-only slices: evaluations are not committed."""

    def __init__(self, slices: AnswerSlices) -> None:
        self._slices = slices

    @property
    @override
    def count(self) -> int:
        return self._slices.count

    @override
    async def append(self, tenant: str, number: int, positions: Mapping[int, int], change: bytes) -> Appended:
        raise NotImplementedError

    @override
    async def pending(self, tenant: str, number: int, *, after_epoch: int, after_fill: int) -> Pending:
        return await self._slices.pending(tenant, number, after_epoch=after_epoch, after_fill=after_fill)

    @override
    async def entries(self, tenant: str, number: int, keys: Sequence[str]) -> list[StoredEntry | None]:
        return await self._slices.entries(tenant, number, keys)

    @override
    async def commit(
        self,
        tenant: str,
        number: int,
        *,
        evaluated: int,
        epoch: int,
        drop: Sequence[tuple[int, str]],
        reason: bytes = b"",
    ) -> bool:
        return True

    @override
    async def drop_all(self, tenant: str, number: int, reason: bytes = b"") -> None:
        raise NotImplementedError

    @override
    async def drops(self, tenant: str, number: int, key: str) -> list[Dropped]:
        return await self._slices.drops(tenant, number, key)
