"""A history of a tenant's passages: changes, fills and evaluations, with cached answers compared to fresh retrievals.

Runs on any implementation of the ports. Vectors and lengths are random, so that equal scores are rare.
"""

import random
from dataclasses import dataclass, field
from itertools import pairwise
from zlib import crc32

import numpy as np
from prometheus_client import CollectorRegistry

from infra.embedding.hashing import HashingEmbedder
from infra.opensearch.port import ChunkChange, ChunkWrite
from infra.redis.entry import Entry
from query.cache.key import normalised
from query.retrieval.retrieve import FusionPolicy, Retrieval
from query.telemetry.metrics import QueryMetrics
from schemas.documents import DocumentKey, Outcome
from schemas.events import IndexChange, StageTimes
from schemas.index import StoredChunk
from schemas.search import Access
from streams.evaluation import FusionParameters
from streams.runner import Task
from streams.slice_evaluators import SliceEvaluators
from streams.steps.invalidate import Invalidate

TENANT = "acme"
DIMENSION = 16
DOCUMENTS = 6
FUSION = FusionParameters(DIMENSION, kept=12, fused=5, rrf_k=60)
WORDS = ["hotel", "train", "leave", "laptop", "budget", "policy", "night", "visa", "badge", "desk"]
READERS = (Access(TENANT), Access(TENANT, ("hr",)))


class RandomEmbedder(HashingEmbedder):
    """Gives each text a random vector of its own."""

    def __init__(self):
        super().__init__(DIMENSION)

    async def embed_query(self, text):
        vector = np.random.default_rng(crc32(text.encode())).standard_normal(DIMENSION).astype(np.float32)
        return vector / np.linalg.norm(vector)


@dataclass
class Question:
    text: str
    access: Access
    top_k: int
    filters: dict[str, str]

    @property
    def key(self):
        return f"{self.text}/{self.access.groups}/{self.top_k}/{self.filters}"


@dataclass
class History:
    """One writer, one reader, and any number of workers with an evaluator each."""

    rng: random.Random
    index: object
    terms: object
    cache: object
    states: object
    settings: object
    workers: list[Invalidate] = field(default_factory=list)
    passages: dict[str, dict[str, StoredChunk]] = field(default_factory=dict)
    offset: int = 0
    dropped: int = 0
    needed: int = 0
    stale: list[str] = field(default_factory=list)
    drifted: list[str] = field(default_factory=list)
    checked: int = 0

    def __post_init__(self):
        self.embedder = RandomEmbedder()
        metrics = QueryMetrics(CollectorRegistry())
        self.retrieval = Retrieval(
            index=self.index,
            embedder=self.embedder,
            metrics=metrics,
            policy=FusionPolicy(candidates=FUSION.fused, kept=FUSION.kept, rrf_k=60),
        )
        self.questions = [self._question() for _ in range(10)]
        # Sources of each stored answer, and the passages changed since.
        self.answers: dict[str, tuple[tuple[str, int], ...]] = {}
        self.touched: dict[str, set[str]] = {}
        self.changed: set[str] = set()

    def add_worker(self):
        """Add a worker with empty state."""
        evaluators = SliceEvaluators(self.cache, self.index, self.terms, fusion=FUSION, settings=self.settings)
        self.workers.append(Invalidate(self.cache, evaluators, self.states))

    async def fill(self):
        """Store an answer for every question that has none."""
        for question in self.questions:
            lookup = await self.cache.lookup(TENANT, question.key)
            if lookup.entry is None:
                found = await self.retrieve(question)
                entry = Entry(
                    response=b"{}",
                    search=found.search,
                    top_k=question.top_k,
                    sources=found.sources,
                    vector_candidates=found.candidates.vector,
                    lexical_candidates=found.candidates.lexical,
                    filled_ms=0.0,
                )
                first, evidence = entry.encode()
                stored = await self.cache.store(
                    TENANT, question.key, first, epoch=lookup.epoch, ttl_s=600, evidence=evidence
                )
                if stored:
                    self.answers[question.key] = found.sources
                    self.touched[question.key] = set()

    async def retrieve(self, question):
        return await self.retrieval.retrieve(
            normalised(question.text), question.access, top_k=question.top_k, filters=question.filters
        )

    async def change(self, name=None):
        """Create, edit or delete one document in the order of the write path; return the task for a worker."""
        name = name or f"doc-{self.rng.randrange(DOCUMENTS)}"
        key = DocumentKey(TENANT, name)
        self.offset += 1
        stored_passages = self.passages.get(name, {})
        removed = [chunk_id for chunk_id in stored_passages if self.rng.random() < 0.4]
        # The same id with another version has the same content, because the id covers all content (decision 0042).
        rewritten = [chunk_id for chunk_id in stored_passages if chunk_id not in removed and self.rng.random() < 0.2]
        write = {"version": self.offset, "position": f"documents.v1-0:{self.offset}"}
        put = [stored_passages[chunk_id].model_copy(update=write) for chunk_id in rewritten]
        put += [self._passage(key) for _ in range(self.rng.randint(0, 3))]
        writes = [ChunkWrite(chunk, await self.embedder.embed_query(chunk.text)) for chunk in put]
        assert await self.index.apply([ChunkChange(key, self.offset, tuple(writes), tuple(removed))]) == [None]
        kept = {chunk_id: chunk for chunk_id, chunk in stored_passages.items() if chunk_id not in removed}
        self.passages[name] = kept | {chunk.chunk_id: chunk for chunk in put}
        change = IndexChange(
            event_id=f"e{self.offset}",
            tenant=TENANT,
            document_id=name,
            version=self.offset,
            position=f"documents.v1-0:{self.offset}",
            generation="g1",
            outcome=Outcome.DONE,
            added=tuple(chunk.chunk_id for chunk in put),
            removed=tuple(removed),
            times=StageTimes(accepted_ms=0.0),
        )
        for touched in (*self.touched.values(), self.changed):
            touched.update(change.added, change.removed)
        return Task(change, 0, self.offset, None)

    async def check(self):
        """Compare each cached answer with a fresh retrieval; differences in unchanged passages count as drift."""
        for question in self.questions:
            before = self.answers.get(question.key)
            if before is None:
                continue
            lookup = await self.cache.lookup(TENANT, question.key)
            assert lookup.positions.get(0, self.offset) == self.offset
            found = await self.retrieve(question)
            now = found.sources
            # A source with another version was rewritten: a fresh answer shows other attributes.
            differing = {chunk_id for chunk_id, _ in set(before) ^ set(now)}
            needed = bool(differing & self.touched[question.key])
            if lookup.entry is None:
                self.dropped += 1
                self.needed += needed
                del self.answers[question.key]
            elif needed and not _tied(found.candidates):
                # A passage of an earlier change that enters only now: the statistics of the index have moved.
                differences = self.stale if differing & self.changed else self.drifted
                differences.append(f"{question.key}: {before} would be {now}")
            self.checked += 1
        self.changed.clear()

    def _question(self):
        words = " ".join(self.rng.choice(WORDS) for _ in range(self.rng.randint(1, 3)))
        filters = self.rng.choice(({}, {}, {"metadata.kind": "a"}))
        return Question(words, self.rng.choice(READERS), self.rng.choice((1, 3)), filters)

    def _passage(self, key):
        text = " ".join(self.rng.choice(WORDS) for _ in range(self.rng.randint(3, 39)))
        return StoredChunk(
            chunk_id=f"{key.document_id}-{crc32(text.encode()):08x}",
            tenant=TENANT,
            document_id=key.document_id,
            version=self.offset,
            position=f"documents.v1-0:{self.offset}",
            text=text,
            text_sha256="0" * 64,
            start=0,
            end=len(text),
            groups=self.rng.choice(((), (), ("hr",))),
            metadata={"kind": self.rng.choice("ab")},
        )


def _tied(candidates):
    """Whether two candidates have equal scores, whose order is not defined."""
    return any(
        above.score - below.score < 1e-6
        for hits in (candidates.vector, candidates.lexical)
        for above, below in pairwise(hits)
    )


async def finished(worker, tasks):
    return [outcome async for some in worker.run(tasks) for outcome in some]


async def live(history, steps):
    """Apply changes, mostly one at a time, while workers start and stop and miss evaluations of the others."""
    history.add_worker()
    for _ in range(steps):
        await history.fill()
        tasks = [await history.change() for _ in range(history.rng.choice((1, 1, 1, 2, 3)))]
        if history.rng.random() < 0.15:
            history.add_worker()
        if history.rng.random() < 0.1:
            history.workers = history.workers[1:] or history.workers
        if history.rng.random() < 0.1:
            await history.fill()  # after the change became searchable, before its epoch
        worker = history.rng.choice(history.workers)
        await finished(worker, tasks)
        if history.rng.random() < 0.1:
            await finished(history.rng.choice(history.workers), tasks)  # redelivered
        await history.check()
