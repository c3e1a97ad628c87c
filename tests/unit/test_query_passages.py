"""The passage cache returns a passage only for the write that was fetched."""

from query.retrieval.passage_cache import PassageCache
from schemas.documents import DocumentKey
from schemas.index import StoredChunk
from schemas.search import Hit

TRAVEL = DocumentKey("acme", "travel.md")


def passage(offset=7, text="hotel"):
    return StoredChunk(
        chunk_id="c1",
        tenant="acme",
        document_id="travel.md",
        version=2,
        position=f"documents.v1-0:{offset}",
        text=text,
        text_sha256="",
        start=0,
        end=len(text),
    )


def hit(offset=7, index="chunks-g1", chunk_id="c1"):
    return Hit(chunk_id, TRAVEL, 0.5, (index, f"documents.v1-0:{offset}"))


def test_only_the_write_that_was_fetched_is_returned():
    cache = PassageCache(max_bytes=100_000)
    cache.put(hit(), passage())
    assert cache.get(hit()) == passage()
    assert cache.get(hit(offset=8)) is None
    assert cache.get(hit(index="chunks-g2")) is None
    assert cache.get(Hit("c1", TRAVEL, 0.5)) is None


def test_a_passage_rewritten_between_search_and_fetch_is_not_stored():
    cache = PassageCache(max_bytes=100_000)
    cache.put(hit(offset=7), passage(offset=8, text="train"))
    assert cache.get(hit(offset=7)) is None
    assert cache.get(hit(offset=8)) is None


def test_the_least_recently_used_passage_is_evicted():
    cache = PassageCache(max_bytes=4_000)
    first, second, third = (hit(chunk_id=f"c{number}") for number in range(3))
    cache.put(first, passage())
    cache.put(second, passage())
    assert cache.get(first)
    cache.put(third, passage())
    assert cache.get(second) is None
    assert cache.get(first)
    assert cache.get(third)
