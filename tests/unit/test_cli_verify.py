from typing import Any

import pytest

from freshline.verify.agreement import (
    ADVICE,
    Kind,
    PassageContent,
    compare,
    compare_passages,
    expected,
    rejected,
    to_rewrite,
)
from schemas.documents import DocumentKey, LifeState, Outcome
from schemas.events import BlobRef, Change, ChunkPlan, DocumentEvent
from schemas.index import NEVER_COMPLETED, FailedVersion, Manifest, StoredChunk
from schemas.positions import Position

KEY = DocumentKey("local", "travel.md")
DEAD, DONE, SUPERSEDED = Outcome.DEAD_LETTER, Outcome.DONE, Outcome.SUPERSEDED


def blob(number: int) -> BlobRef:
    return BlobRef(sha256=f"{number:064x}", size_bytes=1)


def event(version: int, **fields: Any) -> DocumentEvent:
    deleted = fields.get("change") is Change.DELETED
    reported = {
        "event_id": f"e{version}",
        "tenant": KEY.tenant,
        "document_id": KEY.document_id,
        "version": version,
        "change": Change.UPSERTED,
        "accepted_ms": 0,
        "content": None if deleted else blob(version),
    }
    return DocumentEvent(**reported | fields)


def manifest(version: int, **fields: Any) -> Manifest:
    return Manifest(
        tenant=KEY.tenant,
        document_id=KEY.document_id,
        version=version,
        position="documents.v1-0:0",
        profile="p",
        updated_ms=0,
        **{"complete": True, "state": LifeState.LIVE, "content": blob(version), "chunks": ("c1", "c2")} | fields,
    )


def chunk(chunk_id: str, **fields: Any) -> StoredChunk:
    reported = {
        "tenant": KEY.tenant,
        "document_id": KEY.document_id,
        "version": 1,
        "position": "documents.v1-0:0",
        "text": "",
        "text_sha256": "",
        "start": 0,
        "end": 1,
    }
    return StoredChunk(chunk_id=chunk_id, **reported | fields)


def planned(**fields: Any) -> ChunkPlan:
    return ChunkPlan(event=event(2), position="documents.v1-0:0", profile="p", chunked_ms=0, **fields)


def stream(*ends: tuple[DocumentEvent, Outcome | None]) -> tuple[dict, dict]:
    events = {Position(0, offset): event for offset, (event, _) in enumerate(ends)}
    outcomes = {Position(0, offset): outcome for offset, (_, outcome) in enumerate(ends) if outcome is not None}
    return events, outcomes


def current_version(*ends: tuple[DocumentEvent, Outcome | None]) -> int | None:
    current = expected(*stream(*ends))[KEY]
    return current.version if current else None


def found(wanted: DocumentEvent | None, there: Manifest | None, *chunks: StoredChunk) -> dict[Kind, list[str]]:
    return compare({KEY: wanted}, {} if there is None else {KEY: there}, chunks)


def test_newest_version_remains_whatever_the_order() -> None:
    assert current_version((event(1), DONE), (event(3), DONE), (event(2), SUPERSEDED)) == 3
    assert current_version((event(1), None), (event(2), None)) == 2


def test_first_of_equal_versions_remains() -> None:
    events, outcomes = stream((event(1, content=blob(7)), DONE), (event(1, content=blob(8)), SUPERSEDED))
    assert expected(events, outcomes)[KEY].content == blob(7)


def test_refused_version_leaves_the_one_before() -> None:
    assert current_version((event(1), DONE), (event(2), DEAD)) == 1
    assert current_version((event(1), DEAD)) is None


def test_version_that_gave_way_to_a_refused_one_does_not_remain() -> None:
    assert current_version((event(1), DONE), (event(2), SUPERSEDED), (event(3), DEAD)) == 1


def test_version_that_gave_way_to_nothing_refused_is_still_expected() -> None:
    assert current_version((event(1), DONE), (event(2), SUPERSEDED)) == 2


def test_refused_documents_are_those_whose_newest_version_was() -> None:
    assert rejected(*stream((event(1), DONE), (event(2), DEAD))) == ["local/travel.md"]
    assert rejected(*stream((event(1), DEAD), (event(2), DONE))) == []


def test_version_that_was_replayed_with_success_is_refused_no_more() -> None:
    again = event(1, event_id="again", rewrite=True)
    events, outcomes = stream((event(1), DEAD), (again, DONE))
    assert rejected(events, outcomes) == []
    assert expected(events, outcomes)[KEY] == again
    assert rejected(*stream((event(1), DEAD), (again, DEAD))) == ["local/travel.md"]


def test_rewrite_that_was_refused_leaves_its_version_current() -> None:
    assert current_version((event(1), SUPERSEDED), (event(1, rewrite=True), DEAD)) == 1


def test_documents_are_written_again_unless_their_content_is_lost() -> None:
    other = DocumentKey("local", "a b.md")
    wanted = {KEY: event(1), other: event(1, document_id="a b.md"), DocumentKey("local", "c"): None}
    findings = {
        Kind.MISSING_PASSAGES: ["local/travel.md"],
        Kind.OTHER_GROUPS: ["local/a b.md c1", "local/a b.md c2"],
        Kind.ORPHAN: ["local/c c9"],
        Kind.AHEAD: ["local/c"],
    }
    assert set(to_rewrite(findings, wanted)) == {KEY, other}
    assert set(to_rewrite(findings | {Kind.CONTENT_LOST: ["local/travel.md"]}, wanted)) == {other}


def test_agreement_finds_nothing() -> None:
    assert found(event(1), manifest(1), chunk("c1"), chunk("c2")) == {}
    gone = manifest(2, state=LifeState.DELETED, content=None, chunks=())
    assert found(event(2, change=Change.DELETED), gone) == {}
    failed = FailedVersion(version=2, position="documents.v1-0:9", kind="refused", reason="the index refused it")
    assert found(event(1), manifest(1, failed=(failed,)), chunk("c1"), chunk("c2")) == {}
    assert found(None, None) == {}
    nothing = manifest(1, state=LifeState.DELETED, content=None, chunks=(), failed=(failed,))
    assert found(None, nothing.model_copy(update={"version": NEVER_COMPLETED})) == {}


def test_a_claim_that_is_left_is_one_finding_whichever_of_its_passages_are_there() -> None:
    """Those that it was to replace may be all that serves: they are no orphans, which a repair would remove."""
    before = manifest(1, groups=("hr",), chunks=("c1", "c2"))
    claim = manifest(2, complete=False, chunks=("c2", "c3"), added=("c3",), removed=("c1",), previous=before)
    old = [chunk(name, groups=("hr",)) for name in ("c1", "c2")]
    claim = claim.model_copy(update={"groups": ("hr",)})
    new = chunk("c3", groups=("hr",), version=2)
    for there in (old, [*old, new], [old[1], new], [old[1]]):
        assert found(event(2, groups=("hr",)), claim, *there) == {Kind.UNFINISHED: ["local/travel.md"]}
    other = chunk("c1", groups=("all",))
    assert found(event(2, groups=("hr",)), claim, other)[Kind.OTHER_GROUPS] == ["local/travel.md c1"]


def test_a_copy_is_compared_as_what_it_is_a_copy_of() -> None:
    original = chunk("c1", text="Hotels cost 120.")
    copies = {"c1~ab": PassageContent.of(original.model_copy(update={"chunk_id": "c1~ab"}))}
    there = manifest(1, chunks=("c1~ab",))
    assert found(event(1), there, chunk("c1~ab")) == {}
    assert compare_passages(there, planned(), [original], copies) == {}
    other = original.model_copy(update={"text": "Hotels cost 150."})
    assert compare_passages(there, planned(), [other], copies) == {Kind.OTHER_PASSAGE: ["local/travel.md c1~ab"]}


@pytest.mark.parametrize(
    ("wanted", "there", "kind"),
    [
        (event(1), None, Kind.NOT_INDEXED),
        (event(2), manifest(1), Kind.OUTDATED),
        (event(1), manifest(1, complete=False), Kind.UNFINISHED),
        (event(1), manifest(2), Kind.AHEAD),
        (None, manifest(1), Kind.AHEAD),
        (event(1, change=Change.DELETED), manifest(1), Kind.NOT_DELETED),
        (event(1), manifest(1, state=LifeState.DELETED), Kind.WRONGLY_DELETED),
        (event(1), manifest(1, content=blob(9)), Kind.OTHER_CONTENT),
        (event(1, groups=("legal",)), manifest(1), Kind.OTHER_CONTENT),
        (event(1, metadata={"a": 1}), manifest(1), Kind.OTHER_CONTENT),
        (event(1, metadata={"a": 1}), manifest(1, metadata={"a": True}), Kind.OTHER_CONTENT),
        (event(1, content_type="text/plain"), manifest(1), Kind.OTHER_CONTENT),
    ],
)
def test_document_that_is_not_as_the_stream_states(
    wanted: DocumentEvent | None, there: Manifest | None, kind: Kind
) -> None:
    chunks = [] if there is None else [chunk("c1"), chunk("c2")]
    assert found(wanted, there, *chunks) == {kind: ["local/travel.md"]}


def test_manifest_without_any_event_is_unknown() -> None:
    assert compare({}, {KEY: manifest(1)}, [chunk("c1"), chunk("c2")]) == {Kind.UNKNOWN: ["local/travel.md"]}


@pytest.mark.parametrize(
    ("chunks", "findings"),
    [
        ([chunk("c1")], {Kind.MISSING_PASSAGES: ["local/travel.md"]}),
        ([chunk("c1"), chunk("c2"), chunk("c3")], {Kind.ORPHAN: ["local/travel.md c3"]}),
        ([chunk("c1"), chunk("c2", document_id="b")], {Kind.FOREIGN: ["local/b c2"]}),
        ([chunk("c1"), chunk("c2", tenant="other")], {Kind.FOREIGN: ["other/travel.md c2"]}),
        ([chunk("c1"), chunk("c2", groups=("legal",))], {Kind.OTHER_GROUPS: ["local/travel.md c2"]}),
        ([chunk("c1"), chunk("c2", version=2)], {Kind.NEWER: ["local/travel.md c2"]}),
    ],
)
def test_passages_that_the_manifest_does_not_have_so(
    chunks: list[StoredChunk], findings: dict[Kind, list[str]]
) -> None:
    assert found(event(1), manifest(1), *chunks) == findings


def test_every_kind_arrives_with_advice() -> None:
    assert ADVICE.keys() == set(Kind)


def contents(*chunks: StoredChunk) -> dict[str, PassageContent]:
    return {one.chunk_id: PassageContent.of(one) for one in chunks}


WANTED = [chunk("", version=2, text="one", heading_path=("H",)), chunk("", version=2, text="two", start=5, end=8)]
STORED = [one.model_copy(update={"chunk_id": f"c{number}"}) for number, one in enumerate(WANTED, start=1)]


def test_passages_that_are_what_their_content_makes_agree() -> None:
    assert compare_passages(manifest(2), planned(), WANTED, contents(*STORED)) == {}
    kept = STORED[1].model_copy(update={"version": 1, "position": "documents.v1-0:1", "start": 1, "end": 4})
    assert compare_passages(manifest(2), planned(), WANTED, contents(STORED[0], kept)) == {}
    assert compare_passages(manifest(2), planned(), WANTED, contents(STORED[0])) == {}, (
        "one that is missing is found apart"
    )


@pytest.mark.parametrize(
    "damage",
    [
        {"text": "three"},
        {"heading_path": ("H",)},
        {"title": "T"},
        {"source": "s"},
        {"groups": ("hr",)},
        {"metadata": {"a": 1}},
        {"text_sha256": "0"},
        {"start": 4},
        {"end": 9},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_passage_that_differs_in_any_field_is_named(damage: dict[str, Any]) -> None:
    damaged = STORED[1].model_copy(update=damage)
    found = compare_passages(manifest(2), planned(), WANTED, contents(STORED[0], damaged))
    assert found == {Kind.OTHER_PASSAGE: ["local/travel.md c2"]}
    assert set(to_rewrite(found, {KEY: event(2)})) == {KEY}


def test_passage_whose_searched_fields_are_not_its_own_is_named() -> None:
    stored = contents(STORED[0]) | {"c2": PassageContent.of(STORED[1], consistent=False)}
    assert compare_passages(manifest(2), planned(), WANTED, stored) == {Kind.OTHER_PASSAGE: ["local/travel.md c2"]}


def test_document_with_another_title_or_number_of_passages_is_named() -> None:
    assert compare_passages(manifest(2), planned(title="T"), WANTED, contents(*STORED)) == {
        Kind.OTHER_CONTENT: ["local/travel.md"]
    }
    tagged = planned(content_metadata={"tags": ("a",)})
    assert compare_passages(manifest(2), tagged, WANTED, contents(*STORED)) == {Kind.OTHER_CONTENT: ["local/travel.md"]}
    assert compare_passages(manifest(2), planned(), WANTED[:1], contents(*STORED)) == {
        Kind.OTHER_CONTENT: ["local/travel.md"]
    }
