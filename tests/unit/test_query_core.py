"""Cache keys, cache entries and response bodies."""

import json
from dataclasses import replace

import numpy as np
import pytest

from infra.redis.entry import Entry, UnreadableEntry, stored_response
from query.answers.response import response_body, stamped
from query.cache.key import AnswerMaker, cache_key, normalised
from query.retrieval.fusion import FusedHit
from schemas.documents import DocumentKey
from schemas.index import StoredChunk
from schemas.positions import AsOf
from schemas.queries import Citation, GeneratedAnswer, QueryRequest, QueryResponse
from schemas.search import Access, Hit, HybridSearch

MAKER = AnswerMaker("g1", "bge@1", "extractive", "rrf 60 of 50")
READER = Access("acme", ("hr", "it"))


def key(query="How long?", access=READER, maker=MAKER, **fields):
    return cache_key(QueryRequest.model_validate({"query": query, **fields}), access, maker)


@pytest.mark.parametrize("query", ["how long?", "HOW  LONG?", " How\tlong? ", "How long\uff1f", "\uff28ow long?"])
def test_spellings_of_one_question_share_a_key(query):
    assert key(query) == key()


def test_normalisation_keeps_differences_that_the_analyser_keeps():
    assert normalised("Straße") == "straße"
    assert normalised("\ufb01nd  ME") == "find me"
    assert normalised(normalised("Ⅷ İx")) == normalised("Ⅷ İx")


@pytest.mark.parametrize(
    "other",
    [
        {"query": "How short?"},
        {"access": Access("umbrella", ("hr", "it"))},
        {"access": Access("acme", ("hr",))},
        {"access": Access("acme", ("hr,it",))},
        {"maker": AnswerMaker("g2", "bge@1", "extractive", "rrf 60 of 50")},
        {"maker": AnswerMaker("g1", "bge@2", "extractive", "rrf 60 of 50")},
        {"maker": AnswerMaker("g1", "bge@1", "extractive", "rrf 60 of 90")},
        {"top_k": 6},
        {"include_metadata": False},
        {"generate": True},
        {"filters": {"title": "a"}},
    ],
)
def test_everything_that_may_change_the_answer_changes_the_key(other):
    assert key(**other) != key()


def test_nothing_else_changes_the_key():
    assert key(access=Access("acme", ("it", "hr", "it"))) == key()
    assert key(min_position="documents.v1-3:42") == key()
    assert key(filters={}) == key(filters=None)
    # The generator matters only to requests for a generated answer.
    other = AnswerMaker("g1", "bge@1", "another", "rrf 60 of 50")
    assert key(maker=other) == key()
    assert key(maker=other, generate=True) != key(generate=True)


def test_filters_are_compared_as_the_index_does():
    filtered = key(filters={"title": ["b", "a"], "metadata.year": 2024})
    assert filtered == key(filters={"metadata.year": "2024", "title": ["a", "b", "a"]})
    assert filtered != key(filters={"title": ["a"], "metadata.year": 2024})
    assert key(filters={"title": "a"}) != key(filters={"source": "a"})
    assert key(filters={"metadata.on": True}) == key(filters={"metadata.on": "true"})


def entry():
    travel, leave = DocumentKey("acme", "travel.md"), DocumentKey("acme", "leave ä.md")
    vector = np.array([0.6, -0.8, 1 / 3], dtype=np.float32)
    access = Access("acme", ("hr", "it"))
    return Entry(
        response=b'{"results":[]}',
        search=HybridSearch("days?", vector, access, 120, {"title": ("a", "b"), "metadata.year": 2024}),
        top_k=5,
        sources=(("c1", 7),),
        vector_candidates=(Hit("c1", travel, 0.875), Hit("c2", leave, 0.5)),
        lexical_candidates=(Hit("c2", leave, 0.0), Hit("c3", travel, 0.0)),
        filled_ms=1_767_225_600_123.5,
        positions={0: 41, 11: 7},
    )


def test_an_entry_round_trips():
    before, after = entry(), Entry.decode(b"".join(entry().encode()))
    np.testing.assert_array_equal(after.search.vector, before.search.vector)
    assert after.search.vector.dtype == np.float32
    assert replace(after, search=replace(after.search, vector=None)) == replace(
        before, search=replace(before.search, vector=None)
    )
    assert stored_response(b"".join(before.encode())) == before.response


def test_a_hit_needs_only_the_first_part_of_an_entry():
    first, _ = entry().encode()
    assert stored_response(first) == entry().response
    with pytest.raises(UnreadableEntry):
        Entry.decode(first)


def test_an_entry_without_candidates_round_trips():
    bare = replace(entry(), vector_candidates=(), lexical_candidates=(), sources=())
    after = Entry.decode(b"".join(bare.encode()))
    np.testing.assert_array_equal(after.search.vector, bare.search.vector)
    assert (after.vector_candidates, after.lexical_candidates, after.sources) == ((), (), ())


@pytest.mark.parametrize("corrupt", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b"\x63" + b[1:], lambda _: b""])
def test_a_corrupt_entry_is_rejected(corrupt):
    corrupted = corrupt(b"".join(entry().encode()))
    with pytest.raises(UnreadableEntry):
        stored_response(corrupted)
    with pytest.raises(UnreadableEntry):
        Entry.decode(corrupted)


def passages():
    chunk = StoredChunk(
        chunk_id="c1",
        tenant="acme",
        document_id="travel.md",
        version=7,
        position="documents.v1-3:42",
        text="Thirty „days“.",
        text_sha256="0",
        title="Travel",
        heading_path=("Abroad",),
        start=10,
        end=24,
        metadata={"team": "people", "year": 2024},
    )
    return [(FusedHit(Hit("c1", chunk.key, 0.9), 1 / 61, 1, float("inf")), chunk)]


@pytest.mark.parametrize("generated", [None, GeneratedAnswer("Thirty [1]", (Citation(source=1, quote="Thirty"),))])
@pytest.mark.parametrize("include_metadata", [True, False])
def test_a_stamped_body_is_a_query_response(generated, include_metadata):
    body = response_body(passages(), generated, include_metadata=include_metadata)
    as_of = AsOf(positions={3: 42, 11: 0}, checked_ms=1_767_225_600_000.5)
    text = stamped(body, query_time_ms=1.23456, cached=True, as_of=as_of)
    assert set(json.loads(text)) == set(QueryResponse.model_fields)
    response = QueryResponse.model_validate_json(text)
    assert (response.as_of, response.cached, response.query_time_ms) == (as_of, True, 1.235)
    [result] = response.results
    assert (result.text, result.span, result.heading_path) == ("Thirty „days“.", (10, 24), ("Abroad",))
    assert result.metadata == ({"team": "people", "year": 2024} if include_metadata else None)
    assert response.answer == (generated.text if generated else None)
    assert response.citations == (generated.citations if generated else None)
