"""Reciprocal rank fusion."""

from hypothesis import given
from hypothesis import strategies as st

from query.retrieval.fusion import ABSENT, fuse
from schemas.documents import DocumentKey
from schemas.search import Candidates, Hit

CHUNKS = st.lists(st.sampled_from([f"c{number}" for number in range(12)]), unique=True, max_size=12)
KS = st.integers(0, 200)


def hits(chunk_ids, score=1.0):
    return tuple(Hit(chunk_id, DocumentKey("acme", "d"), score / rank) for rank, chunk_id in enumerate(chunk_ids, 1))


def order(vector, lexical, k=60):
    return [fused.hit.chunk_id for fused in fuse(Candidates(hits(vector), hits(lexical)), k=k)]


def test_a_worked_example():
    [first, second, third] = fuse(Candidates(hits(["a", "b"]), hits(["b", "c"])), k=60)
    assert (first.hit.chunk_id, first.vector_rank, first.lexical_rank) == ("b", 2, 1)
    assert first.score == 1 / 62 + 1 / 61
    assert (second.hit.chunk_id, second.score, second.lexical_rank) == ("a", 1 / 61, ABSENT)
    assert (third.hit.chunk_id, third.score, third.vector_rank) == ("c", 1 / 62, ABSENT)


def test_ties_are_broken_by_vector_rank_then_by_id():
    assert order(["a", "b"], ["b", "a"]) == ["a", "b"]
    assert order(["b"], ["a"]) == ["b", "a"]


@given(CHUNKS, CHUNKS, KS)
def test_every_candidate_is_ranked_once_best_first(vector, lexical, k):
    ranking = fuse(Candidates(hits(vector), hits(lexical)), k=k)
    assert sorted(fused.hit.chunk_id for fused in ranking) == sorted({*vector, *lexical})
    scores = [fused.score for fused in ranking]
    assert scores == sorted(scores, reverse=True)
    assert all(score > 0 for score in scores)


@given(CHUNKS, CHUNKS, KS)
def test_the_ranks_explain_the_score(vector, lexical, k):
    for fused in fuse(Candidates(hits(vector), hits(lexical)), k=k):
        chunk_id = fused.hit.chunk_id
        contributions = [
            1 / (k + ranks.index(chunk_id) + 1) if chunk_id in ranks else 0.0 for ranks in (vector, lexical)
        ]
        assert fused.score == sum(contributions)


@given(CHUNKS, CHUNKS, st.floats(0.1, 100))
def test_raw_scores_do_not_matter(vector, lexical, factor):
    scaled = fuse(Candidates(hits(vector, factor), hits(lexical)))
    assert [fused.hit.chunk_id for fused in scaled] == order(vector, lexical)


@given(CHUNKS, CHUNKS, st.data())
def test_a_better_rank_in_one_retriever_never_lowers_the_fused_rank(vector, lexical, data):
    if len(vector) < 2:
        return
    position = data.draw(st.integers(1, len(vector) - 1))
    promoted = [*vector]
    promoted[position - 1], promoted[position] = promoted[position], promoted[position - 1]
    chunk_id = vector[position]
    assert order(promoted, lexical).index(chunk_id) <= order(vector, lexical).index(chunk_id)


@given(CHUNKS)
def test_the_order_of_a_single_retriever_is_kept(chunk_ids):
    assert order(chunk_ids, []) == chunk_ids
    assert order([], chunk_ids) == chunk_ids
