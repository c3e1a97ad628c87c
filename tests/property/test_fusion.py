from hypothesis import given
from hypothesis import strategies as st

from query.retrieval.fusion import ABSENT, fuse
from schemas.documents import DocumentKey
from schemas.search import Hit, Windows

CHUNKS = st.lists(st.sampled_from([f"c{number}" for number in range(12)]), unique=True, max_size=12)
KS = st.integers(0, 200)


def window(chunk_ids, score=1.0):
    return tuple(Hit(chunk_id, DocumentKey("acme", "d"), score / rank) for rank, chunk_id in enumerate(chunk_ids, 1))


def order(vector, lexical, k=60):
    return [candidate.hit.chunk_id for candidate in fuse(Windows(window(vector), window(lexical)), k=k)]


def test_a_worked_example():
    [first, second, third] = fuse(Windows(window(["a", "b"]), window(["b", "c"])), k=60)
    assert (first.hit.chunk_id, first.vector_rank, first.lexical_rank) == ("b", 2, 1)
    assert first.score == 1 / 62 + 1 / 61
    assert (second.hit.chunk_id, second.score, second.lexical_rank) == ("a", 1 / 61, ABSENT)
    assert (third.hit.chunk_id, third.score, third.vector_rank) == ("c", 1 / 62, ABSENT)


def test_equal_scores_go_by_vector_rank_then_by_id():
    assert order(["a", "b"], ["b", "a"]) == ["a", "b"]
    assert order(["b"], ["a"]) == ["b", "a"]


@given(CHUNKS, CHUNKS, KS)
def test_every_passage_comes_once_and_best_first(vector, lexical, k):
    fused = fuse(Windows(window(vector), window(lexical)), k=k)
    assert sorted(candidate.hit.chunk_id for candidate in fused) == sorted({*vector, *lexical})
    scores = [candidate.score for candidate in fused]
    assert scores == sorted(scores, reverse=True)
    assert all(score > 0 for score in scores)


@given(CHUNKS, CHUNKS, KS)
def test_the_ranks_explain_the_score(vector, lexical, k):
    for candidate in fuse(Windows(window(vector), window(lexical)), k=k):
        chunk_id = candidate.hit.chunk_id
        shares = [1 / (k + leg.index(chunk_id) + 1) if chunk_id in leg else 0.0 for leg in (vector, lexical)]
        assert candidate.score == sum(shares)


@given(CHUNKS, CHUNKS, st.floats(0.1, 100))
def test_raw_scores_do_not_matter(vector, lexical, factor):
    scaled = fuse(Windows(window(vector, factor), window(lexical)))
    assert [candidate.hit.chunk_id for candidate in scaled] == order(vector, lexical)


@given(CHUNKS, CHUNKS, st.data())
def test_a_passage_that_rises_in_one_leg_never_falls(vector, lexical, data):
    if len(vector) < 2:
        return
    place = data.draw(st.integers(1, len(vector) - 1))
    risen = [*vector]
    risen[place - 1], risen[place] = risen[place], risen[place - 1]
    chunk_id = vector[place]
    assert order(risen, lexical).index(chunk_id) <= order(vector, lexical).index(chunk_id)


@given(CHUNKS)
def test_one_leg_alone_keeps_its_order(chunk_ids):
    assert order(chunk_ids, []) == chunk_ids
    assert order([], chunk_ids) == chunk_ids
