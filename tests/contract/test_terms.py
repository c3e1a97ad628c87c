"""The contract of TermIndex, run on the twin and on an OpenSearch server; and its scores, computed here."""

from collections import Counter
from contextlib import asynccontextmanager

import numpy as np
import pytest

from infra.opensearch.client import connect
from infra.opensearch.memory import MemoryIndex
from infra.opensearch.port import Access, ChunkChange, ChunkWrite, Hit, HybridSearch, IndexUnavailable
from infra.opensearch.provision import create_indices
from infra.opensearch.store import OpenSearchIndex
from infra.opensearch.terms import OpenSearchTerms
from infra.settings import Settings
from schemas.documents import DocumentKey
from schemas.index import StoredChunk
from streams.core.invalidation.bm25 import idf, length_code, length_norms

DIMENSION = 8
TEXTS = ("Hotels cost 120 dollars.", "The hotel is closed.", "Trains run at night, and trains run by day.", "Ask HR.")


def passage(number, text, version=1):
    chunk = StoredChunk(
        chunk_id=f"c{number}",
        tenant="acme",
        document_id=f"doc {number % 5}",
        version=version,
        position="documents.v1-0:0",
        text=text,
        text_sha256="5" * 64,
        title="Travel",
        start=0,
        end=len(text),
        groups=("hr",) if number % 3 == 0 else (),
        metadata={"year": 2024},
    )
    return ChunkWrite(chunk, np.eye(DIMENSION, dtype=np.float32)[number % DIMENSION])


async def put(index, *writes, remove=()):
    for write in writes:
        assert await index.apply([ChunkChange(write.chunk.key, write.chunk.version, (write,), ())]) == [None]
    for hit in remove:
        await index.apply([ChunkChange(hit.key, 9, (), (hit.chunk_id,))])


def hit(number):
    return Hit(f"c{number}", DocumentKey("acme", f"doc {number % 5}"), 0.0)


def small(settings: Settings) -> Settings:
    embedding = settings.embedding.model_copy(update={"dimension": DIMENSION})
    return settings.model_copy(update={"embedding": embedding})


@asynccontextmanager
async def opened(settings):
    index, client = OpenSearchIndex.open(settings), connect(settings.opensearch)
    try:
        yield index, OpenSearchTerms(client, settings)
    finally:
        await client.close()
        await index.close()


@pytest.fixture(params=["memory", pytest.param("opensearch", marks=pytest.mark.stack)])
def server(request) -> Settings | None:
    return None if request.param == "memory" else small(request.getfixturevalue("settings"))


@pytest.fixture
async def parts(server):
    """Index and terms of the same passages."""
    if server is None:
        twin = MemoryIndex(DIMENSION)
        yield twin, twin
        return
    await create_indices(server)
    async with opened(server) as both:
        yield both


async def test_nothing_asked_is_nothing_answered(parts):
    _, terms = parts
    assert await terms.with_vectors([]) == {}
    assert await terms.term_counts([]) == {}
    assert await terms.analysed([]) == []
    assert await terms.statistics([]) == await terms.statistics(())
    assert (await terms.statistics(["hotel"])).frequencies == {"hotel": 0}


async def test_passages_come_back_with_their_vectors_and_those_that_are_gone_do_not(parts):
    index, terms = parts
    written = [passage(number, text) for number, text in enumerate(TEXTS)]
    await put(index, *written, remove=[hit(1)])
    found = await terms.with_vectors([hit(0), hit(1), hit(3), hit(77)])
    assert sorted(found) == ["c0", "c3"]
    assert found["c0"].chunk == written[0].chunk
    np.testing.assert_array_equal(found["c3"].vector, written[3].vector)


async def test_the_passages_of_a_document_are_named_and_no_others(parts):
    index, terms = parts
    await put(
        index, passage(0, "hotel"), passage(5, "train"), passage(1, "leave"), passage(10, "gone"), remove=[hit(10)]
    )
    assert sorted(await terms.chunk_ids(hit(0).key)) == ["c0", "c5"]
    assert await terms.chunk_ids(DocumentKey("umbrella", "doc 0")) == ()
    assert await terms.chunk_ids(hit(2).key) == ()


async def test_terms_of_passages_and_questions_are_the_analysers(parts):
    index, terms = parts
    await put(index, *(passage(number, text) for number, text in enumerate(TEXTS)))
    counted = await terms.term_counts([hit(1), hit(2), hit(77)])
    assert sorted(counted) == ["c1", "c2"]
    assert counted["c1"]["hotel"] == 1
    assert "the" not in counted["c1"]
    assert counted["c2"]["train"] == 2
    assert [dict(one) for one in await terms.analysed(["Hotel, hotels: the hotel!", "the"])] == [{"hotel": 3}, {}]


async def test_statistics_count_what_is_searchable(parts):
    index, terms = parts
    await put(index, *(passage(number, text) for number, text in enumerate(TEXTS)))
    told = await terms.statistics(["hotel", "train", "nothing"])
    assert told.document_count == 4
    assert told.frequencies == {"hotel": 2, "train": 1, "nothing": 0}
    counted = await terms.term_counts([hit(number) for number in range(4)])
    assert told.total_length == sum(sum(one.values()) for one in counted.values())


@pytest.mark.stack
async def test_scores_computed_here_are_those_of_the_server(settings):
    """To the precision of a float, over several shards, with lengths that lose precision and with removed passages."""
    await create_indices(small(settings))
    async with opened(small(settings)) as (index, terms):
        await compare_scores(index, terms)


async def compare_scores(index, terms):
    words = ["hotel", "train", "budget", "night", "laptop"]
    rng = np.random.default_rng(7)
    texts = [" ".join(rng.choice(words, size=size)) for size in (1, 3, 24, 39, 40, 41, 57, 130, 301, 999)] * 3
    await put(index, *(passage(number, text) for number, text in enumerate(texts)), remove=[hit(4), hit(11)])
    search = HybridSearch("Hotels, hotels at night", np.ones(DIMENSION, dtype=np.float32), Access("acme", ("hr",)), 50)
    [windows] = await index.search([search])
    [asked] = await terms.analysed([search.text])
    statistics = await terms.statistics(asked)
    assert statistics.document_count == 30, "what is removed counts until it is merged away"
    norms = length_norms(statistics.total_length / statistics.document_count)
    counted = await terms.term_counts(windows.lexical)
    weights = dict(zip(asked, idf(np.array(list(statistics.frequencies.values())), 30), strict=True))
    assert len(windows.lexical) > 20
    for found in windows.lexical:
        has = Counter(counted[found.chunk_id])
        norm = norms[length_code(has.total())]
        score = sum(repeats * weights[term] * has[term] / (has[term] + norm) for term, repeats in asked.items())
        assert score == pytest.approx(found.score, rel=1e-6)
    found = await terms.with_vectors(windows.vector)
    for one in windows.vector:
        cosine = float(found[one.chunk_id].vector @ search.vector) / np.sqrt(DIMENSION)
        assert (1 + cosine) / 2 == pytest.approx(one.score, rel=1e-6)


@pytest.mark.parametrize(
    "ask",
    [
        lambda terms: terms.with_vectors([hit(0)]),
        lambda terms: terms.term_counts([hit(0)]),
        lambda terms: terms.analysed(["a"]),
        lambda terms: terms.statistics(["a"]),
    ],
)
async def test_an_index_that_is_not_there_is_unavailable(settings, ask):
    async with opened(settings) as (_, terms):
        with pytest.raises(IndexUnavailable):
            await ask(terms)
