"""Passages that are read once for each write of them."""

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


def test_the_write_that_was_read_is_found_and_no_other():
    kept = PassageCache(max_bytes=100_000)
    kept.put(hit(), passage())
    assert kept.get(hit()) == passage()
    assert kept.get(hit(offset=8)) is None
    assert kept.get(hit(index="chunks-g2")) is None
    assert kept.get(Hit("c1", TRAVEL, 0.5)) is None


def test_what_was_written_anew_between_search_and_reading_is_not_kept_under_the_old_name():
    kept = PassageCache(max_bytes=100_000)
    kept.put(hit(offset=7), passage(offset=8, text="train"))
    assert kept.get(hit(offset=7)) is None
    assert kept.get(hit(offset=8)) is None


def test_those_not_asked_for_longest_give_way():
    kept = PassageCache(max_bytes=4_000)
    first, second, third = (hit(chunk_id=f"c{number}") for number in range(3))
    kept.put(first, passage())
    kept.put(second, passage())
    assert kept.get(first)
    kept.put(third, passage())
    assert kept.get(second) is None
    assert kept.get(first)
    assert kept.get(third)
