"""Which cached answers an edit would change, before it is sent. Nothing is written, and nothing is dropped.

The edit goes through the code that would process it: it is prepared, decided on and judged as the steps would, from the
standing manifest and the cached answers of this moment. What differs is that its passages are not in the index: their
terms are asked of the analyser, and the index's statistics are moved as their writing would move them. Answers that the
step would have to retrieve again to judge can only be told as such.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from infra.blobs.memory import MemoryBlobStore
from infra.embedding.port import Embedder
from infra.kafka.codec import decode
from infra.opensearch.codec import lexical_text
from infra.opensearch.port import DocumentIndex, SearchIndex, TermIndex
from infra.redis.entry import Entry
from infra.redis.port import AnswerSlices, Dropped, Pending, StoredEntry
from infra.settings import AnswerSettings
from schemas.documents import MetadataValue, Stage
from schemas.events import Change as ChangeKind
from schemas.events import ChunkPlan, DocumentEvent
from streams.core.chunk_identity import chunk_ids
from streams.core.document_change import Write, decide
from streams.core.invalidation.evidence import Change, Passage, Statistics, TermCounts
from streams.core.outcomes import DeadLetter
from streams.core.planned_chunks import load_chunks
from streams.core.splitting import Splitter, embedding_text
from streams.judging import Fusion, SliceJudge
from streams.lexicon import Lexicon
from streams.news import News
from streams.parsing.sandbox import ParserPool
from streams.runner import Task
from streams.steps.index import stored_chunk
from streams.steps.prepare import Prepare

SNIPPET_CHARS: Final = 120
_ENTRIES_AT_ONCE: Final = 500

Why = Literal["cites", "comes_in", "unclear"]
"""A passage that the answer cites goes, or is stored anew; a new one comes into it; or only a new retrieval tells."""


class Unprocessable(Exception):
    """The edit would become a dead letter; the message says why."""


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
        passage: the beginning of the new passage that is nearest to the question, where one comes in.
    """

    key: str
    question: str
    groups: tuple[str, ...]
    filters: Mapping[str, MetadataValue | tuple[MetadataValue, ...]]
    top_k: int
    why: Why
    passage: str | None


@dataclass(frozen=True, slots=True)
class Rehearsed:
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


class Rehearsal:
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
        self._prepare = Prepare(self._blobs, parsers, splitter, profile, _Nobody())
        self._fusion = fusion
        self._settings = settings

    async def rehearse(self, event: DocumentEvent, content: bytes) -> Rehearsed:
        """What the event would change; its version is taken to be the newest, its content is ``content``.

        Raises:
            Unprocessable: see there.
            IndexUnavailable, CacheUnavailable, EmbeddingError: a store or the model does not answer.
        """
        if event.change is ChangeKind.UPSERTED:
            await self._blobs.put(content)
        standing = (await self._index.standing([event.key])).get(event.key)
        manifest = standing.manifest if standing else None
        if manifest is not None:
            event = event.model_copy(update={"version": max(event.version, manifest.version + 1)})
        plan = await self._planned(event)
        chunks = plan.chunks if plan.chunks_blob is None else load_chunks(await self._blobs.get(plan.chunks_blob))
        strays = await self._index.chunk_ids(event.key) if manifest is None else ()
        ids = chunk_ids(event.key, chunks)
        write = decide(plan, ids, manifest, now_ms=time.time() * 1_000, strays=strays)
        if not isinstance(write, Write):
            raise Unprocessable("a newer version was sent meanwhile: try again")
        stored = [stored_chunk(write.claim, number, chunks[number], write.claim) for number in write.add]
        vectors = await self._embedder.embed_passages(
            [embedding_text(plan.title, chunks[number]) for number in write.add]
        )
        counts = [TermCounts.of(terms) for terms in await self._terms.analysed([lexical_text(one) for one in stored])]
        passages = tuple(Passage(*one) for one in zip(stored, vectors, counts, strict=True))
        change = Change(frozenset({event.document_id}), frozenset(write.remove), passages)
        answers, touched = 0, []
        for number in range(self._slices.count):
            judged, some = await self._slice(event.tenant, number, change)
            answers += judged
            touched += some
        return Rehearsed(
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
        slices = _Unchanged(self._slices)
        lexicon = Lexicon(self._terms)
        judge = SliceJudge(
            tenant,
            number,
            slices=slices,
            index=self._searches,
            news=News(self._terms, lexicon, most=self._settings.judged_passages),
            lexicon=lexicon,
            fusion=self._fusion,
            settings=self._settings,
        )
        await judge.catch_up()
        statistics = await self._statistics(lexicon, judge, change)
        verdict = await asyncio.to_thread(judge.rehearse, change, statistics)
        touched: list[Touched] = []
        keys = [*((key, True) for key in verdict.drop), *((key, False) for key in verdict.recheck - verdict.drop)]
        for start in range(0, len(keys), _ENTRIES_AT_ONCE):
            page = keys[start : start + _ENTRIES_AT_ONCE]
            entries = await self._slices.entries(tenant, number, [key for key, _ in page])
            touched += [
                _touched(key, Entry.decode(one.entry), change, is_certain=is_certain)
                for (key, is_certain), one in zip(page, entries, strict=True)
                if one is not None  # it ended meanwhile
            ]
        return slices.seen, touched

    @staticmethod
    async def _statistics(lexicon: Lexicon, judge: SliceJudge, change: Change) -> Statistics:
        """Those of after the change: what is removed is counted until the index merges it away."""
        added = {term for passage in change.added for term in passage.terms.frequencies}
        now = await lexicon.statistics(sorted(added & judge.vocabulary))
        return Statistics(
            now.document_count + len(change.added),
            now.total_length + sum(passage.terms.length for passage in change.added),
            {
                term: count + sum(term in passage.terms.frequencies for passage in change.added)
                for term, count in now.frequencies.items()
            },
        )


def _touched(key: str, entry: Entry, change: Change, *, is_certain: bool) -> Touched:
    gone = change.removed.union(passage.chunk.chunk_id for passage in change.added)
    cites = any(chunk_id in gone for chunk_id, _ in entry.sources)
    nearest = max(change.added, key=lambda one: float(one.vector @ entry.search.vector), default=None)
    why: Why = "unclear" if not is_certain else "cites" if cites else "comes_in"
    return Touched(
        key=key,
        question=entry.search.text,
        groups=entry.search.access.groups,
        filters=entry.search.filters,
        top_k=entry.top_k,
        why=why,
        passage=" ".join(nearest.chunk.text.split())[:SNIPPET_CHARS] if nearest and why != "cites" else None,
    )


class _Unchanged:
    """Slices that are only read: what is judged is not told to anybody.

    Attributes:
        seen: answers that were read.
    """

    def __init__(self, slices: AnswerSlices) -> None:
        self._slices = slices
        self.seen = 0

    @property
    def count(self) -> int:
        """See ``AnswerSlices``."""
        return self._slices.count

    async def append(self, tenant: str, number: int, positions: Mapping[int, int], change: bytes) -> bool:
        """Never asked for."""
        raise NotImplementedError

    async def pending(self, tenant: str, number: int, *, known: int, fill: int) -> Pending:
        """See ``AnswerSlices``."""
        return await self._slices.pending(tenant, number, known=known, fill=fill)

    async def entries(self, tenant: str, number: int, keys: Sequence[str]) -> list[StoredEntry | None]:
        """See ``AnswerSlices``."""
        found = await self._slices.entries(tenant, number, keys)
        self.seen += sum(one is not None for one in found)
        return found

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
        """Nothing happens."""

    async def drops(self, tenant: str, number: int, key: str) -> list[Dropped]:
        """See ``AnswerSlices``."""
        return await self._slices.drops(tenant, number, key)


class _Nobody:
    """Whom nothing has to be reported to."""

    def reached(self, event: DocumentEvent, stage: Stage, at_ms: float) -> None:
        """See ``ProgressLog``."""
