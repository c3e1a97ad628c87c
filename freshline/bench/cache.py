"""What invalidation is worth: cached answers under several policies along one recorded history, against the truth.

Real: the contents are parsed, split and embedded by the product's code, and written to an OpenSearch index of this
run's own, whose analyser makes the terms of passages and questions; the policies are those of the last step of the
stream.

Computed: fresh retrievals, of which there is one for each question after each change, to fill answers and to compare
them all with (``truth``); and with them the term statistics that the policies are told. On a sample of them the real
index is searched too, and the share of equal sources is told: what differs are the graph of approximate k-NN,
statistics that count removed passages, and ties.

Nothing waits here: each change is judged before the next question. So an answer that is served although it is
content-stale is one that its policy kept, however long one waits. The protocol of fills and changes that meet is not
part of this measurement.

Memory: all passages that are there, with eight bytes for each pair of passage and term of a question; a few kB for each
answer of each policy.
"""

import asyncio
import gzip
import random
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Self

import orjson
from opensearchpy import AsyncOpenSearch

from freshline.bench.installation import BenchmarkFailed
from freshline.bench.staleness import Answers, Moment, Source
from freshline.bench.truth import Found, Question, Truth
from freshline.installation import settings_from
from infra.embedding.onnx import load_tokenizer
from infra.embedding.opening import open_embedder
from infra.embedding.port import Embedder
from infra.local import Stack
from infra.opensearch.client import connect
from infra.opensearch.port import Access, ChunkChange, ChunkWrite, HybridSearch, Windows
from infra.opensearch.provision import create_indices, delete_indices
from infra.opensearch.store import OpenSearchIndex
from infra.settings import Settings
from ingest.connectors.event_file import RecordedEvent, read_events
from query.core.cache_key import normalised
from query.core.fusion import fuse
from schemas.documents import DocumentKey
from schemas.index import StoredChunk
from streams.core.chunk_identity import chunk_ids
from streams.core.invalidation.evidence import Change, Evidence, Passage, TermCounts
from streams.core.invalidation.exact import Exact
from streams.core.invalidation.policy import SIMPLE, Policy
from streams.core.splitting import Splitter, embedding_text
from streams.parsing.sandbox import ParserPool

POLICIES: Final = ("exact", *SIMPLE)

_TENANT: Final = "bench"
_ACCESS: Final = Access(_TENANT)
_WINDOW_KEPT: Final = 120
"""Places of each leg that a policy may keep: more than are fused, for removals make windows shorter."""
_TOP_K: Final = 5
_SKEW: Final = 1.0
_SEED: Final = 1
_ANALYSED_AT_ONCE: Final = 8
_CHANGES_BETWEEN_LOOKS: Final = 20
_QUESTIONS_OF_A_LOOK: Final = 25

Say = Callable[[str, str], None]


async def bench_cache(
    stack: Stack,
    events: Path,
    questions: Path,
    *,
    policies: Sequence[str] = POLICIES,
    edits: int | None = None,
    requests: int = 10_000,
    say: Say,
) -> list[dict[str, Any]]:
    """Replay a history; one object of figures for each policy.

    Args:
        stack: a running stack.
        events: the history; the creations at its start are the snapshot.
        questions: a JSON object with ``text`` on each line; .jsonl or .jsonl.gz.
        policies: names out of ``POLICIES``.
        edits: how many events after the snapshot; all by default.
        requests: asked in all, spread evenly over the history, with Zipf's skew.
        say: told what is being done.

    Raises:
        BenchmarkFailed: the files are of no use.
        BadEventFile: see there.
    """
    texts = read_questions(questions)
    snapshot, history = _parts(events, edits)
    settings = settings_from(stack.environment() | {"FRESHLINE_NAMESPACE": f"bench-{secrets.token_hex(4)}"})
    async with _Corpus.opened(settings) as corpus:
        say("snapshot", f"{len(snapshot)} documents, {len(texts)} questions")
        asked = [await corpus.question(text) for text in texts]
        replay = _Replay(
            settings,
            corpus=corpus,
            texts=texts,
            asked=asked,
            policies=policies,
            requests_between=requests / (len(history) + 1),
        )
        for event in snapshot:
            replay.apply(await corpus.change(event))
        replay.begin()
        for number, event in enumerate(history, start=1):
            change = await corpus.change(event)
            replay.step(number, change)
            if number % _CHANGES_BETWEEN_LOOKS == 0 or number == len(history):
                await replay.look()
                say(f"edit {number} of {len(history)}", replay.standing())
    return replay.figures(documents=len(snapshot), edits=len(history))


def read_questions(path: Path) -> list[str]:
    """Distinct questions, as they are searched.

    Raises:
        BenchmarkFailed: a line is no question, or there is none.
    """
    texts: dict[str, None] = {}
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = orjson.loads(line)["text"]
            except (orjson.JSONDecodeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str) or not normalised(text):
                raise BenchmarkFailed(f'{path.name} line {number} is no question: {{"text": …}} is expected')
            texts.setdefault(normalised(text))
    if not texts:
        raise BenchmarkFailed(f"{path.name} has no questions")
    return list(texts)


def _parts(events: Path, edits: int | None) -> tuple[list[RecordedEvent], list[RecordedEvent]]:
    snapshot: list[RecordedEvent] = []
    history: list[RecordedEvent] = []
    for event in read_events(events):
        if event.type == "created" and not history:
            snapshot.append(event)
        elif edits is None or len(history) < edits:
            history.append(event)
        else:
            break
    if not history:
        raise BenchmarkFailed(f"{events.name} has no events after its snapshot")
    return snapshot, history


@dataclass(slots=True)
class _Corpus:
    """The documents as they are now, in a real index too."""

    index: OpenSearchIndex
    client: AsyncOpenSearch
    embedder: Embedder
    parsers: ParserPool
    splitter: Splitter
    analysed_in: str
    _contents: dict[str, bytes] = field(default_factory=dict)
    _standing: dict[str, dict[str, StoredChunk]] = field(default_factory=dict)

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: Settings) -> AsyncIterator[Self]:
        tokenizer = load_tokenizer(settings.embedding.models_path, settings.embedding.model)
        splitter = Splitter(tokenizer.to_str(), settings.split.chunk_tokens, settings.split.overlap_tokens)
        async with AsyncExitStack() as leaving:
            leaving.push_async_callback(delete_indices, settings)
            await create_indices(settings)
            index, client = OpenSearchIndex.open(settings), connect(settings.opensearch)
            leaving.push_async_callback(index.close)
            leaving.push_async_callback(client.close)
            embedder, parsers = open_embedder(settings.embedding), ParserPool(settings.parse)
            leaving.push_async_callback(embedder.close)
            leaving.push_async_callback(parsers.close)
            await parsers.start()
            yield cls(index, client, embedder, parsers, splitter, settings.names.chunks_alias)

    async def question(self, text: str) -> Question:
        return Question(await self.embedder.embed_query(text), await self._terms(text))

    async def change(self, event: RecordedEvent) -> Change:
        """Apply an event to the index; what it changed, searchable when this returns."""
        key = DocumentKey(_TENANT, event.doc_id)
        version = event.seq + 1
        wanted, texts = await self._passages(key, event, version)
        standing = self._standing.pop(event.doc_id, {})
        # As the index step does: another title or source has every passage stored anew.
        kept = {
            chunk_id: chunk
            for chunk_id, chunk in standing.items()
            if chunk_id in wanted and (chunk.title, chunk.source) == (wanted[chunk_id].title, wanted[chunk_id].source)
        }
        put = [chunk for chunk_id, chunk in wanted.items() if chunk_id not in kept]
        vectors = await self.embedder.embed_passages([texts[chunk.chunk_id] for chunk in put])
        writes = tuple(ChunkWrite(chunk, vector) for chunk, vector in zip(put, vectors, strict=True))
        removed = frozenset(standing.keys() - wanted.keys())
        [refusal] = await self.index.apply([ChunkChange(key, version, writes, tuple(sorted(removed)))])
        if refusal is not None:
            raise BenchmarkFailed(f"the index refused {event.doc_id} of event {event.seq}: {refusal}")
        if wanted:
            self._standing[event.doc_id] = {chunk_id: kept.get(chunk_id, chunk) for chunk_id, chunk in wanted.items()}
        free = asyncio.Semaphore(_ANALYSED_AT_ONCE)

        async def passage(write: ChunkWrite) -> Passage:
            async with free:
                # Title and headings stand in the lexical field in lines of their own before the text.
                field_text = "\n".join(
                    part for part in (write.chunk.title, *write.chunk.heading_path, write.chunk.text) if part
                )
                return Passage(write.chunk, write.vector, TermCounts.of(await self._terms(field_text)))

        added = tuple(await asyncio.gather(*map(passage, writes)))
        return Change(frozenset((event.doc_id,)), removed, added)

    async def search(self, search: HybridSearch) -> Windows:
        [windows] = await self.index.search([search])
        return windows

    async def _passages(
        self, key: DocumentKey, event: RecordedEvent, version: int
    ) -> tuple[dict[str, StoredChunk], dict[str, str]]:
        """The passages of the document after the event, and what is embedded of each, by id."""
        if event.type == "deleted":
            self._contents.pop(event.doc_id, None)
            return {}, {}
        content = event.new_content()
        if content is None:
            content = self._contents.get(event.doc_id, b"")
        self._contents[event.doc_id] = content
        parsed = await self.parsers.parse(content, "text/markdown", event.path)
        chunks = self.splitter.split(parsed.text, parsed.title)
        planned = dict(zip(chunk_ids(key, chunks), chunks, strict=True))
        stored = {
            chunk_id: StoredChunk(
                chunk_id=chunk_id,
                tenant=key.tenant,
                document_id=key.document_id,
                version=version,
                position=f"documents.v1-0:{event.seq}",
                title=parsed.title,
                source=event.path,
                **chunk.model_dump(),
            )
            for chunk_id, chunk in planned.items()
        }
        return stored, {chunk_id: embedding_text(parsed.title, chunk) for chunk_id, chunk in planned.items()}

    async def _terms(self, text: str) -> Mapping[str, int]:
        body = {"field": "lexical", "text": text}
        counts: dict[str, int] = {}
        for token in (await self.client.indices.analyze(index=self.analysed_in, body=body))["tokens"]:
            counts[token["token"]] = counts.get(token["token"], 0) + 1
        return counts


class _Replay:
    """The truth, and the answers of every policy, at rest and in traffic."""

    def __init__(
        self,
        settings: Settings,
        *,
        corpus: _Corpus,
        texts: Sequence[str],
        asked: Sequence[Question],
        policies: Sequence[str],
        requests_between: float,
    ) -> None:
        query = settings.query
        self._corpus = corpus
        self._texts = texts
        self._asked = asked
        self._kept, self._fused, self._rrf_k = _WINDOW_KEPT, query.window, query.rrf_k
        self._truth = Truth(asked, fused=self._fused, kept=self._kept, top_k=_TOP_K, rrf_k=self._rrf_k)
        self._passages: dict[str, Passage] = {}
        self._born: dict[Source, int] = {}
        self._numbers = {text: number for number, text in enumerate(texts)}
        self._found: list[Found] = []
        names = list(dict.fromkeys(policies))
        self._rest = {name: Answers(self._policy(name), refills_at_once=True) for name in names}
        # What no policy invalidates is asked in any case: hit shares are compared with it.
        asked_of = dict.fromkeys([*names, "none"])
        self._traffic = {name: Answers(self._policy(name), refills_at_once=False) for name in asked_of}
        self._requests = _zipf(texts)
        self._requests_between = requests_between
        self._requests_due = 0.0
        self._moment: Moment | None = None
        self._rng = random.Random(_SEED)  # noqa: S311 - a sample
        self._looked = 0
        self._agreed = 0
        self._curve: list[dict[str, float]] = []

    def _policy(self, name: str) -> Policy:
        if name == "exact":
            dimension = len(self._asked[0].vector)
            return Exact(dimension=dimension, kept=self._kept, fused=self._fused, rrf_k=self._rrf_k)
        return SIMPLE[name]()

    def apply(self, change: Change, number: int = 0) -> None:
        """Let the truth follow a change."""
        ids = [passage.chunk.chunk_id for passage in change.added]
        gone = [chunk_id for chunk_id in (*change.removed, *ids) if chunk_id in self._passages]
        for chunk_id in gone:
            chunk = self._passages.pop(chunk_id).chunk
            del self._born[chunk_id, chunk.version]
        added = {passage.chunk.chunk_id: passage for passage in change.added}
        self._passages |= added
        self._born |= {(chunk_id, one.chunk.version): number for chunk_id, one in added.items()}
        self._truth.change(gone, {name: (one.vector, one.terms.frequencies) for name, one in added.items()})

    def begin(self) -> None:
        """Fill one answer for each question, then ask."""
        moment = self._moment = self._now(0)
        for answers in self._rest.values():
            for text in self._texts:
                answers.fill(moment.evidence(text), 0)
        self._ask(moment)

    def step(self, number: int, change: Change) -> None:
        """One change: all policies judge, all answers are compared, then some questions are asked."""
        self.apply(change, number)
        moment = self._moment = self._now(number)
        for answers in (*self._rest.values(), *self._traffic.values()):
            answers.change(change, moment)
        self._curve.append({name: answers.stale_now() for name, answers in self._rest.items()})
        self._ask(moment)

    async def look(self) -> None:
        """Search the real index for some questions, and see whether it finds what the truth says."""
        for number in self._rng.sample(range(len(self._texts)), min(_QUESTIONS_OF_A_LOOK, len(self._texts))):
            windows = await self._corpus.search(self._search(self._texts[number]))
            fused = Windows(windows.vector[: self._fused], windows.lexical[: self._fused])
            real = {one.hit.chunk_id for one in fuse(fused, k=self._rrf_k)[:_TOP_K]}
            self._looked += 1
            self._agreed += real == set(self._found[number].top)

    def standing(self) -> str:
        """For the progress line."""
        shares = ", ".join(f"{name} {answers.stale_now():.2%}" for name, answers in self._rest.items())
        return f"{len(self._passages)} passages; content-stale now: {shares}"

    def figures(self, *, documents: int, edits: int) -> list[dict[str, Any]]:
        """One object for each policy."""
        never = self._traffic["none"].in_traffic()["hit_share"]
        return [
            {
                "policy": name,
                **answers.at_rest(),
                **(asked := self._traffic[name].in_traffic()),
                "hit_share_behind_none": never - asked["hit_share"],
                "distinct_questions": len(self._texts),
                "zipf_s": _SKEW,
                "documents": documents,
                "edits": edits,
                "passages": len(self._passages),
                "real_searches_agree_share": self._agreed / self._looked,
                "real_searches": self._looked,
                "stale_share_after_each_edit": [round(shares[name], 5) for shares in self._curve],
            }
            for name, answers in self._rest.items()
        ]

    def _now(self, number: int) -> Moment:
        self._found = self._truth.find()
        fresh = {text: self._sources(found) for text, found in zip(self._texts, self._found, strict=True)}
        return Moment(
            number=number,
            fresh=fresh,
            evidence=self._evidence,
            born=self._born,
            frequencies=self._truth.frequencies(),
            document_count=len(self._truth),
            total_length=self._truth.total_length,
        )

    def _sources(self, found: Found) -> tuple[Source, ...]:
        return tuple((chunk_id, self._passages[chunk_id].chunk.version) for chunk_id in found.top)

    def _evidence(self, text: str) -> Evidence:
        number = self._numbers[text]
        found = self._found[number]
        return Evidence(
            key=text,
            search=self._search(text),
            terms=self._asked[number].terms,
            top_k=_TOP_K,
            sources=self._sources(found),
            documents=frozenset(self._passages[chunk_id].chunk.document_id for chunk_id in found.top),
            vector_window=found.vector.window(),
            lexical_window=tuple((chunk_id, self._passages[chunk_id].terms) for chunk_id, _ in found.lexical.window()),
        )

    def _search(self, text: str) -> HybridSearch:
        return HybridSearch(text, self._asked[self._numbers[text]].vector, _ACCESS, self._kept)

    def _ask(self, moment: Moment) -> None:
        self._requests_due += self._requests_between
        while self._requests_due >= 1:
            self._requests_due -= 1
            text = next(self._requests)
            for answers in self._traffic.values():
                answers.ask(text, moment)


def _zipf(texts: Sequence[str]) -> Iterator[str]:
    """Questions for ever; the one at rank r comes with weight r to the power of minus the skew."""
    rng = random.Random(_SEED)  # noqa: S311 - a sample
    ranked = rng.sample(texts, len(texts))
    weights = list(accumulate(rank**-_SKEW for rank in range(1, len(ranked) + 1)))
    while True:
        yield rng.choices(ranked, cum_weights=weights)[0]
