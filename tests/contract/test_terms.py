"""The contract of TermIndex, run on the twin and on an OpenSearch server; and its scores, computed in Python."""

from collections import Counter
from contextlib import asynccontextmanager

import numpy as np
import pytest

from infra.opensearch import codec
from infra.opensearch.client import connect
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.memory import MemoryIndex
from infra.opensearch.port import ChunkChange, ChunkWrite, IndexUnavailable
from infra.opensearch.provision import create_indices
from infra.opensearch.terms import OpenSearchTerms
from infra.settings import Settings
from schemas.documents import DocumentKey
from schemas.index import StoredChunk
from schemas.search import Access, Hit, HybridSearch
from streams.core.invalidation.bm25 import idf, inverse_norms, length_code, term_score
from streams.core.invalidation.compiled import dot_product
from streams.core.invalidation.sweep import SCORE_TOLERANCE

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
    """The index and the term index of the same passages."""
    if server is None:
        twin = MemoryIndex(DIMENSION)
        yield twin, twin
        return
    await create_indices(server)
    async with opened(server) as both:
        yield both


async def test_empty_requests_return_nothing(parts):
    _, terms = parts
    assert await terms.with_vectors([]) == {}
    assert await terms.term_counts([]) == {}
    assert await terms.analyze([]) == []
    assert await terms.statistics([]) == await terms.statistics(())
    assert (await terms.statistics(["hotel"])).frequencies == {"hotel": 0}


async def test_stored_passages_are_returned_with_vectors_and_removed_ones_are_not(parts):
    index, terms = parts
    written = [passage(number, text) for number, text in enumerate(TEXTS)]
    await put(index, *written, remove=[hit(1)])
    found = await terms.with_vectors([hit(0), hit(1), hit(3), hit(77)])
    assert sorted(found) == ["c0", "c3"]
    assert found["c0"].chunk == written[0].chunk
    np.testing.assert_array_equal(found["c3"].vector, written[3].vector)


async def test_chunk_ids_are_those_of_the_document_only(parts):
    index, terms = parts
    await put(
        index, passage(0, "hotel"), passage(5, "train"), passage(1, "leave"), passage(10, "gone"), remove=[hit(10)]
    )
    assert sorted(await terms.chunk_ids(hit(0).key)) == ["c0", "c5"]
    assert await terms.chunk_ids(DocumentKey("umbrella", "doc 0")) == ()
    assert await terms.chunk_ids(hit(2).key) == ()


async def test_terms_of_passages_and_questions_are_those_of_the_analyser(parts):
    index, terms = parts
    await put(index, *(passage(number, text) for number, text in enumerate(TEXTS)))
    counted = await terms.term_counts([hit(1), hit(2), hit(77)])
    assert sorted(counted) == ["c1", "c2"]
    assert counted["c1"]["hotel"] == 1
    assert "the" not in counted["c1"]
    assert counted["c2"]["train"] == 2
    assert [dict(one) for one in await terms.analyze(["Hotel, hotels: the hotel!", "the"])] == [{"hotel": 3}, {}]


async def test_statistics_count_searchable_passages(parts):
    index, terms = parts
    await put(index, *(passage(number, text) for number, text in enumerate(TEXTS)))
    statistics = await terms.statistics(["hotel", "train", "nothing"])
    assert statistics.document_count == 4
    assert statistics.frequencies == {"hotel": 2, "train": 1, "nothing": 0}
    counted = await terms.term_counts([hit(number) for number in range(4)])
    assert statistics.total_length == sum(sum(one.values()) for one in counted.values())


OFTEN = (1, 2, 23, 24, 25, 39, 40, 41, 254, 255, 256, 257, 300, 3_000, 32_767, 32_768, 65_535, 65_536, 70_000)
"""Occurrences of a word in a passage, around the limits of each integer width and each step of a stored length."""

WORDS = ("hotel", "train", "budget", "night", "laptop")


def extreme_texts():
    """Passages with one very frequent word, with many words, or without words of the question."""
    rng = np.random.default_rng(7)
    yield from (" ".join(rng.choice(WORDS, size=size)) for size in (1, 3, 24, 39, 40, 41, 57, 130, 301, 999) * 3)
    yield from ("hotel " * often + "train" for often in OFTEN)
    yield from ("hotel night " + "desk " * often for often in OFTEN)
    yield " ".join(f"word{number}" for number in range(1_000)) + " train"
    yield " ".join(f"word{number}" for number in range(40_000)) + " hotel"


@pytest.mark.stack
async def test_lexical_scores_computed_in_python_equal_those_of_the_server(settings):
    """Bit by bit, over several shards, with rounded lengths, extreme lengths and removed passages."""
    await create_indices(small(settings))
    texts = list(extreme_texts())
    async with opened(small(settings)) as (index, terms):
        await put(index, *(passage(number, text) for number, text in enumerate(texts)), remove=[hit(4), hit(11)])
        for question in ("Hotels", "Hotels, hotels, hotels at night", " ".join((*WORDS, "hotel", "word7", "desk"))):
            await compare_scores(index, terms, question, len(texts))


async def compare_scores(index, terms, question, count):
    search = HybridSearch(question, np.ones(DIMENSION, dtype=np.float32), Access("acme", ("hr",)), 200)
    [candidates] = await index.search([search])
    [terms_of_question] = await terms.analyze([search.text])
    statistics = await terms.statistics(terms_of_question)
    assert statistics.document_count == count, "removed passages count until segments are merged"
    inverses = inverse_norms(statistics.total_length / statistics.document_count)
    counted = await terms.term_counts(candidates.lexical)
    weights = dict(
        zip(
            terms_of_question,
            idf(np.array([statistics.frequencies[term] for term in terms_of_question]), count),
            strict=True,
        )
    )
    assert len(candidates.lexical) > 40
    for found in candidates.lexical:
        has = Counter(counted[found.chunk_id])
        inverse = inverses[length_code(has.total())]
        worth = [
            term_score(weights[term] * np.float32(repeats), np.float32(has[term]), inverse)
            for term, repeats in terms_of_question.items()
        ]
        assert np.float32(np.array(worth).sum(dtype=np.float64)) == np.float32(found.score), (has, found)
    found = await terms.with_vectors(candidates.vector)
    for one in candidates.vector:
        cosine = float(found[one.chunk_id].vector @ search.vector) / np.sqrt(DIMENSION)
        assert (1 + cosine) / 2 == pytest.approx(one.score, rel=1e-6)


@pytest.mark.stack
async def test_terms_are_counted_as_stored_for_any_spelling(settings):
    """Each counted term of a passage is a term of the index field."""
    texts = [
        "x" * 254 + " " + "y" * 255 + " " + "z" * 256 + " " + "w" * 1_000,
        "a" * 254 + "\U00010428 " + "\U00010428" * 127 + "a\U00010428 " + "\U00010428" * 300,
        "zero\u200bwidth joined\u200dword soft\u00adhyphen mark\ufeffed mongolian\u180evowel",
        "no\u00a0break line\u2028break para\u2029graph next\u0085line unit\u001fseparator \u0001 \u0001a",
        "東京都 ไทย ภาษา Straße İstanbul ﬁnance Ⅷ ½ e\u0301 é 👩‍👩‍👧 🇩🇪 a.b_c d'e l\u2019eau 1,000.5 C++ me@x.org",
    ]
    await create_indices(small(settings))
    async with opened(small(settings)) as (index, terms):
        await put(index, *(passage(number, text) for number, text in enumerate(texts)))
        counted = await terms.term_counts([hit(number) for number in range(len(texts))])
        held = Counter(term for one in counted.values() for term in one)
        assert (await terms.statistics(sorted(held))).frequencies == held
        assert [dict(one) for one in await terms.analyze([f"Travel\n{text}" for text in texts])] == [
            dict(counted[f"c{number}"]) for number in range(len(texts))
        ]


@pytest.mark.stack
@pytest.mark.parametrize("dimension", [384, 1_536])
async def test_vector_scores_computed_in_python_are_within_the_tolerance_of_the_evaluation(settings, dimension):
    embedding = settings.embedding.model_copy(update={"dimension": dimension})
    settings = settings.model_copy(update={"embedding": embedding})
    await create_indices(settings)
    rng = np.random.default_rng(3)

    def unit():
        vector = rng.standard_normal(dimension).astype(np.float32)
        return vector / np.linalg.norm(vector)

    question = unit()
    # From similar to opposite: sums of products with one sign, and sums that cancel out.
    directions = [question * near + unit() * (1 - abs(near)) for near in np.linspace(-1, 1, 60, dtype=np.float32)]
    vectors = np.array([one / np.linalg.norm(one) for one in directions], dtype=np.float32)
    async with opened(settings) as (index, _):
        await put(index, *(ChunkWrite(passage(n, "hotel").chunk, vector) for n, vector in enumerate(vectors)))
        [candidates] = await index.search([HybridSearch("hotel", question, Access("acme", ("hr",)), 100)])
    assert len(candidates.vector) == len(vectors)
    for found in candidates.vector:
        score = (1 + float(dot_product(question, vectors[int(found.chunk_id[1:])]))) / 2
        assert abs(found.score - score) < SCORE_TOLERANCE / 2


@pytest.mark.stack
async def test_all_chunk_ids_of_a_document_are_returned_over_several_requests(settings, monkeypatch):
    monkeypatch.setattr(codec, "MAX_RESULTS", 3)
    await create_indices(small(settings))
    async with opened(small(settings)) as (index, terms):
        for count in range(1, 8):
            await put(index, passage(5 * count, "hotel"))
            expected = sorted(f"c{5 * number}" for number in range(1, count + 1))
            assert sorted(await terms.chunk_ids(hit(0).key)) == sorted(await index.chunk_ids(hit(0).key)) == expected


@pytest.mark.parametrize(
    "ask",
    [
        lambda terms: terms.with_vectors([hit(0)]),
        lambda terms: terms.term_counts([hit(0)]),
        lambda terms: terms.analyze(["a"]),
        lambda terms: terms.statistics(["a"]),
    ],
)
async def test_a_missing_index_is_unavailable(settings, ask):
    async with opened(settings) as (_, terms):
        with pytest.raises(IndexUnavailable):
            await ask(terms)
