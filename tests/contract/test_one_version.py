"""No answer mixes passages of two versions of a document; run on the twin and on an OpenSearch server."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from index_servers import DIMENSION
from only_writer import put_over
from prometheus_client import CollectorRegistry

from infra.embedding.hashing import HashingEmbedder
from infra.opensearch.port import ChunkChange, ChunkWrite
from query.retrieval.retrieve import FusionPolicy, Retrieval
from query.telemetry.metrics import QueryMetrics
from schemas.documents import DocumentKey, LifeState
from schemas.index import Manifest, StoredChunk
from schemas.search import Access

KEY = DocumentKey("acme", "travel.md")
OLD = {"kept": 1, "hotel old": 2, "train old": 3}
"""Text of each passage → version that wrote it."""


@dataclass
class Reader:
    """Retrieves, and records the calls to the index."""

    index: object

    def __post_init__(self):
        self.embedder = HashingEmbedder(DIMENSION)
        self.calls = []
        sides = {name: self._counted(name) for name in ("search", "fetch", "manifests", "positions")}
        metrics = QueryMetrics(CollectorRegistry())
        self.retrieval = Retrieval(
            index=SimpleNamespace(**sides),
            embedder=self.embedder,
            metrics=metrics,
            policy=FusionPolicy(candidates=20, kept=20, rrf_k=60),
        )

    def _counted(self, name):
        async def call(argument):
            self.calls.append(name)
            return await getattr(self.index, name)(argument)

        return call

    async def texts(self, *, top_k=10):
        self.calls.clear()
        found = await self.retrieval.retrieve("hotel or train?", Access("acme"), top_k=top_k, filters={})
        return sorted(chunk.text for _, chunk in found.passages)

    async def put(self, version, *texts, key=KEY):
        vectors = await self.embedder.embed_passages(list(texts))
        chunks = [
            StoredChunk(
                chunk_id=chunk_id(text, key),
                tenant=key.tenant,
                document_id=key.document_id,
                version=version,
                position=f"documents.v1-0:{version}",
                text=text,
                text_sha256="0",
                start=0,
                end=9,
            )
            for text in texts
        ]
        writes = tuple(map(ChunkWrite, chunks, vectors))
        assert await self.index.apply([ChunkChange(key, version, writes, ())]) == [None]

    async def remove(self, version, *texts):
        gone = tuple(map(chunk_id, texts))
        assert await self.index.apply([ChunkChange(KEY, version, (), gone)]) == [None]

    async def manifest(self, version, texts, *, complete=True, key=KEY, **fields):
        await put_over(self.index, self.manifest_of(version, texts, complete=complete, key=key, **fields))

    def manifest_of(self, version, texts, *, complete=True, key=KEY, **fields):
        return Manifest(
            tenant=key.tenant,
            document_id=key.document_id,
            version=version,
            complete=complete,
            state=LifeState.LIVE,
            position=f"documents.v1-0:{version}",
            profile="p",
            chunks=tuple(chunk_id(text, key) for text in texts),
            updated_ms=1,
            **fields,
        )


def chunk_id(text, key=KEY):
    return f"{key.document_id}-{text.replace(' ', '-')}"


def ids(*texts):
    return tuple(map(chunk_id, texts))


@pytest.fixture
async def reader(index):
    """A document with a complete third version, of which each version wrote one passage."""
    reader = Reader(index)
    for text, version in OLD.items():
        await reader.put(version, text)
    await reader.manifest(3, OLD)
    return reader


NEW = ("kept", "hotel new", "train new")


async def claim(reader, **fields):
    added, removed = ids("hotel new", "train new"), ids("hotel old", "train old")
    claimed = {"added": added, "removed": removed, "previous": reader.manifest_of(3, OLD)} | fields
    await reader.manifest(4, NEW, complete=False, **claimed)


async def test_the_old_version_is_served_until_the_new_one_is_complete(reader):
    await claim(reader)
    await reader.put(4, "hotel new")
    assert await reader.texts() == sorted(OLD)
    assert reader.calls.count("search") == 1
    assert len(await reader.texts(top_k=3)) == 3, "other passages replace the omitted ones"
    await reader.put(4, "train new")
    assert await reader.texts() == sorted(OLD)


async def test_the_new_version_is_served_once_passages_of_the_old_one_are_removed(reader):
    await claim(reader)
    await reader.put(4, "hotel new", "train new")
    await reader.remove(4, "hotel old")
    assert await reader.texts() == sorted(NEW)
    await reader.remove(4, "train old")
    assert await reader.texts() == sorted(NEW)
    assert reader.calls == ["search"], "the passages are known to form one version"
    await reader.manifest(4, NEW)
    assert await reader.texts() == sorted(NEW)


async def test_the_search_is_repeated_after_a_concurrent_completion(reader):
    await reader.put(4, "hotel new", "train new")
    assert await reader.texts(top_k=3)
    search = reader.retrieval._index.search

    async def completed_meanwhile(searches):
        found = await search(searches)
        if reader.calls.count("search") == 1:
            await reader.remove(4, "hotel old", "train old")
            await reader.manifest(4, NEW)
        return found

    reader.retrieval._index.search = completed_meanwhile
    assert await reader.texts() == sorted(NEW)
    assert reader.calls.count("search") == 2


def rolled_forward(reader):
    """The fourth version, rolled forward after its first writer was interrupted during its removals."""
    return reader.manifest_of(4, NEW, gone=ids("hotel old", "train old"))


async def test_a_rolled_forward_version_is_served_until_the_next_one_is_complete(reader):
    await claim(reader)
    await reader.put(4, "hotel new", "train new")
    await reader.remove(4, "hotel old", "train old")
    newest = {"added": ids("hotel newest"), "removed": ids("hotel new"), "previous": rolled_forward(reader)}
    await reader.manifest(5, ("kept", "hotel newest", "train new"), complete=False, **newest)
    await reader.put(5, "hotel newest")
    assert await reader.texts() == sorted(NEW)


async def test_the_search_is_repeated_if_the_version_became_complete_after_it(reader):
    """Its first writer resumes during a search and is interrupted; another rolls it forward and claims the next one."""
    await claim(reader)
    await reader.put(4, "hotel new")
    assert await reader.texts(top_k=9) == sorted(OLD), "all passages have been read once"
    search = reader.retrieval._index.search

    async def resumed_meanwhile(searches):
        found = await search(searches)
        if reader.calls.count("search") == 1:
            await reader.put(4, "train new")
            await reader.remove(4, "hotel old", "train old")
            newest = {"added": ids("hotel newest"), "removed": ids("hotel new"), "previous": rolled_forward(reader)}
            await reader.manifest(5, ("kept", "hotel newest", "train new"), complete=False, **newest)
        return found

    reader.retrieval._index.search = resumed_meanwhile
    assert await reader.texts() == sorted(NEW)
    assert reader.calls.count("search") == 2


async def test_a_document_without_a_manifest_is_served_as_stored(reader):
    other = DocumentKey("acme", "other.md")
    for version, text in enumerate(("hotel one", "train two"), start=1):
        await reader.put(version, text, key=other)
    assert {"hotel one", "train two"} <= set(await reader.texts())


async def test_manifests_are_read_once_and_only_for_passages_of_several_versions(reader):
    assert await reader.texts() == sorted(OLD)
    assert reader.calls == ["search", "fetch", "manifests"]
    await reader.put(1, "hotel", "train", key=DocumentKey("acme", "never-edited.md"))
    assert len(await reader.texts()) == 5
    assert reader.calls == ["search", "fetch"]
