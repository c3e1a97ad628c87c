"""Ids of passages: the same exactly where everything stored under them is the same."""

import pytest

from schemas.events import BlobRef, Change, ChunkPlan, DocumentEvent, PlannedChunk
from schemas.index import StoredChunk
from streams.core.chunk_identity import PROVENANCE, stored_chunks

BLOB = BlobRef(sha256="0" * 64, size_bytes=1)


def passage(text, **fields):
    return PlannedChunk(**{"text": text, "start": 0, "end": 1, "text_sha256": "one for all"} | fields)


def plan(*, title=None, profile="p", version=1, offset=1, **fields):
    event = DocumentEvent(
        **{
            "event_id": "e",
            "tenant": "acme",
            "document_id": "pay/raises.md",
            "version": version,
            "change": Change.UPSERTED,
            "accepted_ms": 0,
            "content": BLOB,
        }
        | fields
    )
    return ChunkPlan(event=event, position=f"documents.v1-0:{offset}", profile=profile, chunked_ms=0, title=title)


def ids(one, *chunks):
    return [chunk.chunk_id for chunk in stored_chunks(one, chunks or (passage("a"),))]


def test_ids_depend_on_place_among_equals_only():
    named = ids(plan(), *(passage(text) for text in ("a", "b", "a", "a")))
    assert len(set(named)) == 4
    assert ids(plan(), passage("b"), passage("a"), passage("a")) == [named[1], named[0], named[2]]
    assert all(len(one) == 26 and one.isalnum() and one == one.lower() for one in named)


@pytest.mark.parametrize(
    "other",
    [
        {"document_id": "pay"},
        {"tenant": "acm", "document_id": "e/pay/raises.md"},
        {"tenant": "acme2"},
        {"document_id": "raises.md"},
    ],
)
def test_ids_of_two_documents_differ(other):
    assert ids(plan()) != ids(plan(**other))


DIFFERENT = {
    "plain": plan(),
    "titled": plan(title="A"),
    "titled with nothing": plan(title=""),
    "title as source": plan(source="A"),
    "other profile": plan(profile="q"),
    "in one group": plan(groups=("a",)),
    "in two groups": plan(groups=("a", "b")),
    "an integer": plan(metadata={"a": 1}),
    "a fraction": plan(metadata={"a": 1.0}),
    "a truth": plan(metadata={"a": True}),
    "a text": plan(metadata={"a": "1"}),
    "a null in words": plan(metadata={"a": "null"}),
}


def test_whatever_is_stored_is_in_the_id():
    named = {tuple(ids(one)): what for what, one in DIFFERENT.items()}
    assert sorted(named.values()) == sorted(DIFFERENT), "those that are missing have the id of another"


def test_a_rewrite_names_the_same_content_alike():
    """Its passages are copies, which go by these ids (``streams.core.chunk_copies``)."""
    assert ids(plan(rewrite=True, offset=2)) == ids(plan())


def test_headings_that_are_embedded_alike_have_ids_of_their_own():
    """``text_sha256`` is the same for all, as if the embedded text had been cut before the difference."""
    paths = [(), ("A",), ("A", "B"), ("A > B",), ("A", "", "B"), ("h" * 400 + "1",), ("h" * 400 + "2",)]
    named = {tuple(ids(plan(title="A"), passage("a", heading_path=path))): path for path in paths}
    assert sorted(named.values()) == sorted(paths)


def test_which_write_it_was_and_where_it_was_is_not_in_the_id():
    moved = passage("a", start=7, end=8)
    assert ids(plan(version=2, offset=9), moved) == ids(plan())
    [one] = stored_chunks(plan(version=2, offset=9), [moved])
    [other] = stored_chunks(plan(), [passage("a")])
    same = one.model_dump(exclude=set(PROVENANCE)) == other.model_dump(exclude=set(PROVENANCE))
    assert same
    assert set(StoredChunk.model_fields) >= PROVENANCE


def test_order_of_groups_and_of_metadata_means_nothing():
    one = plan(groups=("a", "b"), metadata={"x": 1, "y": 2})
    other = plan(groups=("b", "a", "b"), metadata={"y": 2, "x": 1})
    assert stored_chunks(one, [passage("a")]) == stored_chunks(other, [passage("a")])
