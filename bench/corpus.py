"""The documents of a recorded history after each event, in a real, dedicated index.

Contents are parsed, split and embedded by the product's code. The analyzer of the index produces the terms of passages
and questions.
"""

import asyncio
import gzip
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import orjson
from opensearchpy import AsyncOpenSearch

from bench.ground_truth import AnalyzedQuestion
from bench.installation import BenchmarkFailed
from bench.policies import DocumentChange
from infra.embedding.factory import open_embedder, open_tokenizer
from infra.embedding.port import Embedder
from infra.opensearch.client import connect
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.port import ChunkChange, ChunkWrite
from infra.opensearch.provision import create_indices, delete_indices
from infra.settings import Settings
from ingest.connectors.event_file import RecordedEvent, read_events
from query.cache.key import normalised
from schemas.documents import DocumentKey
from schemas.index import StoredChunk
from schemas.search import Access, Candidates, HybridSearch
from streams.core.chunk_identity import with_ids
from streams.core.invalidation.evidence import Passage, TermCounts
from streams.core.splitting import Splitter, embedding_text
from streams.parsing.parse import ParseFailed
from streams.parsing.sandbox import ParserPool

TENANT: Final = "bench"
ACCESS: Final = Access(TENANT)
_CONCURRENT_ANALYSES: Final = 8
_PROFILE: Final = "bench"
"""One run has one parser, splitter and model."""


def read_questions(paths: Sequence[Path]) -> list[str]:
    """Distinct normalised questions of all files.

    Raises:
        BenchmarkFailed: a line is no question, or there are none.
    """
    texts: dict[str, None] = {}
    for path in paths:
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
        raise BenchmarkFailed(f"{', '.join(path.name for path in paths)}: no questions")
    return list(texts)


def parts_of(events: Path, edits: int | None) -> tuple[list[RecordedEvent], list[RecordedEvent]]:
    """The snapshot (the leading creations of the history) and the following events, at most ``edits``.

    Raises:
        BenchmarkFailed: no event follows the snapshot.
        BadEventFile: a line is no event.
    """
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
class Corpus:
    """The current documents, also in a real index."""

    index: OpenSearchIndex
    client: AsyncOpenSearch
    embedder: Embedder
    parsers: ParserPool
    splitter: Splitter
    analyzer_index: str
    _contents: dict[str, bytes] = field(default_factory=dict)
    _chunks: dict[str, dict[str, StoredChunk]] = field(default_factory=dict)

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: Settings) -> AsyncIterator[Self]:
        """Create the index and start the parsers, for the duration of the context."""
        tokenizer = open_tokenizer(settings.embedding)
        splitter = Splitter(tokenizer, settings.split.chunk_tokens, settings.split.overlap_tokens)
        async with AsyncExitStack() as exit_stack:
            exit_stack.push_async_callback(delete_indices, settings)
            await create_indices(settings)
            index, client = OpenSearchIndex.open(settings), connect(settings.opensearch)
            exit_stack.push_async_callback(index.close)
            exit_stack.push_async_callback(client.close)
            embedder, parsers = open_embedder(settings.embedding), ParserPool(settings.parse)
            exit_stack.push_async_callback(embedder.close)
            exit_stack.push_async_callback(parsers.close)
            await parsers.start()
            yield cls(index, client, embedder, parsers, splitter, settings.names.chunks_alias)

    async def question(self, text: str) -> AnalyzedQuestion:
        """A question as it is searched."""
        return AnalyzedQuestion(await self.embedder.embed_query(text), await self._terms(text))

    async def change(self, event: RecordedEvent) -> DocumentChange:
        """Apply an event to the index. Returns the change, searchable by then; empty for unparseable content."""
        key = DocumentKey(TENANT, event.doc_id)
        version = event.seq + 1
        try:
            wanted, texts = await self._passages(key, event, version)
        except ParseFailed:
            return DocumentChange(frozenset(), (), frozenset())
        current = self._chunks.pop(event.doc_id, {})
        kept = {chunk_id: chunk for chunk_id, chunk in current.items() if chunk_id in wanted}
        put = [chunk for chunk_id, chunk in wanted.items() if chunk_id not in kept]
        vectors = await self.embedder.embed_passages([texts[chunk.chunk_id] for chunk in put])
        writes = tuple(ChunkWrite(chunk, vector) for chunk, vector in zip(put, vectors, strict=True))
        removed = frozenset(current.keys() - wanted.keys())
        [rejection] = await self.index.apply([ChunkChange(key, version, writes, tuple(sorted(removed)))])
        if rejection is not None:
            raise BenchmarkFailed(f"the index rejected {event.doc_id} of event {event.seq}: {rejection}")
        if wanted:
            self._chunks[event.doc_id] = {chunk_id: kept.get(chunk_id, chunk) for chunk_id, chunk in wanted.items()}
        slots = asyncio.Semaphore(_CONCURRENT_ANALYSES)

        async def passage(write: ChunkWrite) -> Passage:
            async with slots:
                # The lexical field has title and headings on lines before the text.
                field_text = "\n".join(
                    part for part in (write.chunk.title, *write.chunk.heading_path, write.chunk.text) if part
                )
                return Passage(write.chunk, write.vector, TermCounts.of(await self._terms(field_text)))

        added = tuple(await asyncio.gather(*map(passage, writes)))
        return DocumentChange(removed, added, frozenset((event.doc_id,)))

    async def search(self, search: HybridSearch) -> Candidates:
        """Search the real index."""
        [candidates] = await self.index.search([search])
        return candidates

    async def _passages(
        self, key: DocumentKey, event: RecordedEvent, version: int
    ) -> tuple[dict[str, StoredChunk], dict[str, str]]:
        """The passages of the document after the event, and their embedded texts, by id."""
        if event.type == "deleted":
            self._contents.pop(event.doc_id, None)
            return {}, {}
        content = event.new_content()
        if content is None:
            content = self._contents.get(event.doc_id, b"")
        self._contents[event.doc_id] = content
        parsed = await self.parsers.parse(content, "text/markdown", event.path)
        chunks = self.splitter.split(parsed.text, parsed.title)
        bare = [
            StoredChunk(
                chunk_id="",
                tenant=key.tenant,
                document_id=key.document_id,
                version=version,
                position=f"documents.v1-0:{event.seq}",
                title=parsed.title,
                source=event.path,
                **dict(chunk),
            )
            for chunk in chunks
        ]
        stored = {chunk.chunk_id: chunk for chunk in with_ids(bare, _PROFILE)}
        return stored, {chunk_id: embedding_text(parsed.title, chunk) for chunk_id, chunk in stored.items()}

    async def _terms(self, text: str) -> Mapping[str, int]:
        body = {"field": "lexical", "text": text}
        counts: dict[str, int] = {}
        for token in (await self.client.indices.analyze(index=self.analyzer_index, body=body))["tokens"]:
            counts[token["token"]] = counts.get(token["token"], 0) + 1
        return counts
