"""The contract of DocumentIndex and SearchIndex, run on the twin and on an OpenSearch server."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
from index_servers import DIMENSION, small
from only_writer import put_over
from pydantic import TypeAdapter

from infra.opensearch.client import connect
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.index_bodies import chunks_index_body
from infra.opensearch.memory import MemoryIndex
from infra.opensearch.port import ChunkChange, ChunkWrite, IndexUnavailable, ManifestWrite, ScannedChunk, StoredManifest
from infra.opensearch.provision import IndexMismatch, create_indices
from infra.settings import Settings
from schemas.documents import (
    MAX_METADATA_VALUE_CHARS,
    MAX_TITLE_CHARS,
    MAX_VERSION,
    DocumentAttributes,
    DocumentKey,
    Groups,
    LifeState,
)
from schemas.events import BlobRef
from schemas.index import LAYOUT, Manifest, StoredChunk
from schemas.search import Access, Hit, HybridSearch, allows

TRAVEL, LEAVE = DocumentKey("acme", "hr/travel.md"), DocumentKey("acme", "hr/leave ä.md")


def vector(*direction: float) -> np.ndarray:
    full = np.array([*direction, *[0.0] * (DIMENSION - len(direction))], dtype=np.float32)
    return full / np.linalg.norm(full)


def write(key: DocumentKey, name: str, version: int, text: str, direction=(1.0,), **attributes) -> ChunkWrite:
    chunk = StoredChunk(
        chunk_id=f"{key.document_id.rsplit('/', 1)[-1][:2]}-{name}",
        tenant=key.tenant,
        document_id=key.document_id,
        version=version,
        position=f"documents.v1-1:{version}",
        text=text,
        text_sha256="5" * 64,
        start=0,
        end=len(text),
        **attributes,
    )
    return ChunkWrite(chunk, vector(*direction))


def change(key: DocumentKey, version: int, *put: ChunkWrite, remove=()) -> ChunkChange:
    return ChunkChange(key, version, put, tuple(remove))


def claim(key: DocumentKey, version: int, *, offset: int = 0, partition: int = 1, **fields) -> Manifest:
    return Manifest(
        tenant=key.tenant,
        document_id=key.document_id,
        version=version,
        complete=False,
        state=LifeState.LIVE,
        position=f"documents.v1-{partition}:{offset}",
        profile="p",
        updated_ms=1.5,
        **fields,
    )


def complete(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"complete": True})


def question(text="hotel", direction=(1.0,), *, tenant="acme", groups=(), candidates=10, **filters) -> HybridSearch:
    return HybridSearch(text, vector(*direction), Access(tenant, groups), candidates, filters)


async def found(index, search: HybridSearch | None = None) -> tuple[list[str], list[str]]:
    """Ids that the vector and the lexical retriever find, best first."""
    [candidates] = await index.search([search or question()])
    return [hit.chunk_id for hit in candidates.vector], [hit.chunk_id for hit in candidates.lexical]


async def both_find(index, *ids: str, search: HybridSearch | None = None) -> None:
    assert tuple(map(sorted, await found(index, search))) == (sorted(ids), sorted(ids))


async def ids_and_scores(index, search: HybridSearch):
    [candidates] = await index.search([search])
    return [[(hit.chunk_id, round(hit.score, 5)) for hit in hits] for hits in (candidates.vector, candidates.lexical)]


# Manifests


async def test_a_manifest_is_readable_completely_and_immediately(index):
    full = claim(
        TRAVEL,
        MAX_VERSION,
        title="Travel — «rules»",
        source="https://example.org/ä?x=1",
        groups=("hr", "all staff"),
        metadata={"owner": "Zoë", "final": True, "year": 2024, "share": 0.25},
        content=BlobRef(sha256="a" * 64, size_bytes=3),
        content_type="text/markdown",
        chunks=("a", "b"),
        added=("b",),
        removed=("c",),
    )
    await put_over(index, full)
    assert await index.manifests([TRAVEL, LEAVE]) == {TRAVEL: full}
    await put_over(index, complete(full))
    assert await index.manifests([TRAVEL]) == {TRAVEL: complete(full)}


async def test_empty_requests_return_nothing(index):
    assert await index.manifests([]) == {}
    assert await index.put_manifests([]) == []
    assert await index.apply([]) == []
    assert await index.search([]) == []
    assert await index.fetch([]) == {}
    assert await index.stored_vectors([]) == {}
    await index.store_vectors({})
    await index.delete_chunks([])


async def test_a_manifest_replaces_exactly_the_one_that_was_read(index):
    [first] = await index.put_manifests([ManifestWrite(claim(TRAVEL, 5), None)])
    assert await index.put_manifests([ManifestWrite(claim(TRAVEL, 6), None)]) == [None], "a manifest exists by now"
    stored = (await index.stored_manifests([TRAVEL, LEAVE]))[TRAVEL]
    assert stored == StoredManifest(claim(TRAVEL, 5), first)
    [second] = await index.put_manifests([ManifestWrite(claim(TRAVEL, 6), first)])
    late = ManifestWrite(complete(claim(TRAVEL, 5)), first)
    assert await index.put_manifests([late]) == [None]
    assert await index.manifests([TRAVEL]) == {TRAVEL: claim(TRAVEL, 6)}
    [third] = await index.put_manifests([ManifestWrite(complete(claim(TRAVEL, 6)), second)])
    assert len({first, second, third}) == 3
    assert await index.stored_manifests([TRAVEL]) == {TRAVEL: StoredManifest(complete(claim(TRAVEL, 6)), third)}


async def test_a_rejected_manifest_does_not_affect_the_others(index):
    [revision] = await index.put_manifests([ManifestWrite(claim(TRAVEL, 5), None)])
    writes = [(claim(TRAVEL, 6), None), (claim(LEAVE, 1), None), (claim(TRAVEL, 7), revision)]
    put = await index.put_manifests([ManifestWrite(*one) for one in writes])
    assert [written is not None for written in put] == [False, True, True]


async def test_the_longest_accepted_document_id_has_a_manifest(index):
    # The limits of the server are in bytes, those of the API in characters.
    for document_id in ("x" * 512, "ä" * 512, "𝄞" * 512):
        key = DocumentKey("a" * 63, document_id)
        other = DocumentKey("a" * 63, document_id[:-1] + "y")
        await put_over(index, claim(key, 1), claim(other, 2))
        assert {key: one.version for key, one in (await index.manifests([key, other])).items()} == {key: 1, other: 2}
        passage = write(key, "0", 1, "A hotel.")
        assert await index.apply([change(key, 1, passage)]) == [None]
        assert await index.apply([change(key, 2, remove=[passage.chunk.chunk_id])]) == [None]


# Passages


async def test_a_change_is_searchable_when_apply_returns(index):
    assert await index.apply([change(TRAVEL, 1, write(TRAVEL, "0", 1, "A hotel costs 120 dollars."))]) == [None]
    await both_find(index, "tr-0")
    assert await index.apply([change(TRAVEL, 2, write(TRAVEL, "1", 2, "No hotel."), remove=["tr-0"])]) == [None]
    await both_find(index, "tr-1")
    assert await index.apply([change(TRAVEL, 3, remove=["tr-1"])]) == [None]
    await both_find(index)


async def test_a_fetched_passage_equals_the_written_one(index):
    passage = write(
        TRAVEL,
        "0",
        7,
        "A hotel\ncosts «120» dollars.",
        title="Travel",
        source="https://example.org/travel",
        heading_path=("Travel", "Hotels"),
        groups=("hr",),
        metadata={"owner": "Zoë", "final": True, "year": 2024, "share": 0.25},
    )
    await index.apply([change(TRAVEL, 7, passage)])
    [candidates] = await index.search([question(groups=("hr",))])
    fetched = await index.fetch(candidates.vector)
    assert fetched == {"tr-0": passage.chunk.model_copy(update={"text_sha256": ""})}
    assert fetched["tr-0"].key == TRAVEL


async def test_fetch_omits_passages_removed_since_the_search(index):
    await index.apply([change(TRAVEL, 1, write(TRAVEL, "0", 1, "hotel"), write(TRAVEL, "1", 1, "hotel too"))])
    [candidates] = await index.search([question()])
    await index.apply([change(TRAVEL, 2, remove=["tr-0"])])
    assert set(await index.fetch(candidates.vector)) == {"tr-1"}
    assert await index.fetch([Hit("never", LEAVE, 1.0)]) == {}


async def test_stale_writes_and_removals_are_ignored_and_count_as_done(index):
    await index.apply([change(TRAVEL, 5, write(TRAVEL, "0", 5, "hotel, new"), write(TRAVEL, "1", 5, "hotel, kept"))])
    stale = change(TRAVEL, 4, write(TRAVEL, "0", 4, "hotel, old"), remove=["tr-1"])
    assert await index.apply([stale]) == [None]
    await both_find(index, "tr-0", "tr-1")
    fetched = await index.fetch([Hit("tr-0", TRAVEL, 0), Hit("tr-1", TRAVEL, 0)])
    assert {one.text for one in fetched.values()} == {"hotel, new", "hotel, kept"}


async def test_an_older_version_does_not_write_a_passage_removed_by_a_newer_one(index):
    await index.apply([change(TRAVEL, 1, write(TRAVEL, "0", 1, "hotel"))])
    await index.apply([change(TRAVEL, 5, remove=["tr-0", "tr-never-was"])])
    late = change(TRAVEL, 4, write(TRAVEL, "0", 4, "hotel"), write(TRAVEL, "never-was", 4, "hotel"))
    assert await index.apply([late]) == [None]
    await both_find(index)


async def test_writes_are_ordered_by_the_write_version_not_the_document_version(index):
    # As the index step assigns them: the version of the document, and the number of the write.
    await index.apply([change(TRAVEL, 384, write(TRAVEL, "0", 3, "hotel, new"))])
    await index.apply([change(TRAVEL, 256, write(TRAVEL, "0", 2, "hotel, old"), remove=["tr-0"])])
    await both_find(index, "tr-0")
    assert (await index.fetch([Hit("tr-0", TRAVEL, 0)]))["tr-0"].text == "hotel, new"


async def test_a_newer_version_restores_a_removed_passage(index):
    for version, is_stored in ((1, True), (2, False), (3, True), (4, False), (5, True)):
        puts = [write(TRAVEL, "0", version, "hotel")] if is_stored else []
        await index.apply([change(TRAVEL, version, *puts, remove=() if is_stored else ["tr-0"])])
        await both_find(index, *(["tr-0"] if is_stored else []))


async def test_applying_a_change_twice_changes_nothing(index):
    await index.apply([change(TRAVEL, 1, write(TRAVEL, "0", 1, "hotel, old"))])
    twice = change(TRAVEL, 2, write(TRAVEL, "1", 2, "hotel, new"), remove=["tr-0"])
    for _ in range(2):
        assert await index.apply([twice]) == [None]
        await both_find(index, "tr-1")


@pytest.mark.parametrize("removing", [True, False])
async def test_rejected_content_leaves_the_old_passages(index, removing):
    await index.apply([change(TRAVEL, 1, write(TRAVEL, "0", 1, "hotel, old"))])
    wrong = ChunkWrite(write(TRAVEL, "2", 2, "hotel, wrong").chunk, np.ones(DIMENSION - 1, np.float32))
    refused = change(TRAVEL, 2, write(TRAVEL, "1", 2, "hotel, new"), wrong, remove=["tr-0"] if removing else [])
    fine = change(LEAVE, 3, write(LEAVE, "0", 3, "hotel, other"))
    [reason, nothing] = await index.apply([refused, fine])
    assert "vector" in reason.lower()
    assert nothing is None
    await both_find(index, "tr-0", "le-0")


async def test_a_rejected_change_leaves_no_passages(index):
    old = write(TRAVEL, "0", 1, "hotel", (1.0, 1.0), groups=("hr",))
    await index.apply([change(TRAVEL, 1, old, write(TRAVEL, "1", 1, "hotel, kept"))])
    wrong = ChunkWrite(write(TRAVEL, "2", 2, "hotel, wrong").chunk, np.ones(DIMENSION - 1, np.float32))
    copy = write(TRAVEL, "0.copy", 2, "hotel", (1.0, 1.0))
    [reason] = await index.apply([ChunkChange(TRAVEL, 2, (copy, wrong), ("tr-0",))])
    assert reason is not None
    await both_find(index, "tr-1")
    await both_find(index, "tr-0", "tr-1", search=question(groups=("hr",)))
    assert (await index.fetch([Hit("tr-0", TRAVEL, 0.0)]))["tr-0"] == old.chunk.model_copy(update={"text_sha256": ""})
    # A late writer does not restore it either.
    await index.apply([change(TRAVEL, 1, copy)])
    await both_find(index, "tr-1")


async def test_enforced_passages_override_writes_begun_before(index):
    original, late = (
        write(TRAVEL, "0", 1, "hotel", (1.0, 1.0), groups=("hr",), metadata={"n": 1}),
        write(TRAVEL, "1", 2, ""),
    )
    await index.apply([change(TRAVEL, 1, original)])
    read = await index.read_passages([Hit("tr-0", TRAVEL, 0.0), Hit("tr-1", TRAVEL, 0.0)])
    assert {name: one.chunk for name, one in read.items()} == {"tr-0": original.chunk}
    assert np.allclose(read["tr-0"].vector, original.vector)
    await index.enforce(ChunkChange(TRAVEL, 5, tuple(read.values()), ("tr-1",)))
    await index.apply([change(TRAVEL, 2, late, remove=["tr-0"])])
    await both_find(index, "tr-0", search=question(groups=("hr",)))
    assert (await index.read_passages([Hit("tr-0", TRAVEL, 0.0)]))["tr-0"].chunk == original.chunk
    for removed in ((), ("tr-0",)):
        await index.enforce(ChunkChange(TRAVEL, 6, (late,), removed))
        assert "tr-1" in await index.chunk_ids(TRAVEL)
    assert await index.chunk_ids(TRAVEL) == ("tr-1",)


async def test_stored_passages_are_readable_before_the_refresh_and_removed_ones_are_not(index):
    """The recovery of a claim depends on stored passages, not on refreshes."""
    hits = [Hit(f"tr-{number:04}", TRAVEL, 0.0) for number in range(1_100)]
    many = tuple(write(TRAVEL, f"{number:04}", 1, "hotel") for number in range(1_100))
    await index.enforce(ChunkChange(TRAVEL, 1, many, ()))
    assert len(await index.read_passages(hits)) == 1_100
    [found] = (await index.passages([TRAVEL, LEAVE])).values()
    assert {one.chunk.chunk_id for one in found} == {hit.chunk_id for hit in hits}
    await index.apply([change(TRAVEL, 2, remove=[hit.chunk_id for hit in hits[:600]])])
    assert set(await index.read_passages(hits)) == {hit.chunk_id for hit in hits[600:]}


async def test_passages_of_documents_are_listed_with_their_write_versions(index):
    other_tenant = DocumentKey("umbrella", TRAVEL.document_id)
    mine = write(TRAVEL, "0", 3, "hotel", groups=("hr",), title="Travel", metadata={"n": 1})
    await index.apply([change(TRAVEL, 384, mine), change(other_tenant, 1, write(other_tenant, "x", 1, "hotel"))])
    await index.apply([change(LEAVE, 9, write(LEAVE, "0", 1, "hotel"))])
    found = await index.passages([TRAVEL, LEAVE, DocumentKey("acme", "never.md")])
    assert {key: [(one.chunk.chunk_id, one.write_version) for one in some] for key, some in found.items()} == {
        TRAVEL: [("tr-0", 384)],
        LEAVE: [("le-0", 9)],
    }
    assert found[TRAVEL][0].chunk == mine.chunk.model_copy(update={"text": ""})


async def test_chunk_ids_are_the_searchable_passages_of_the_document_only(index):
    other_tenant = DocumentKey("umbrella", TRAVEL.document_id)
    passages = [write(TRAVEL, f"{number:02}", 1, "hotel") for number in range(25)]
    await index.apply([change(TRAVEL, 1, *passages), change(LEAVE, 1, write(LEAVE, "0", 1, "hotel"))])
    await index.apply([change(TRAVEL, 2, remove=["tr-03"])])
    expected = {one.chunk.chunk_id for one in passages} - {"tr-03"}
    named = await index.chunk_ids(TRAVEL)
    assert (len(named), set(named)) == (24, expected)
    assert await index.chunk_ids(other_tenant) == ()


async def test_many_changes_in_one_call_are_all_searchable(index):
    keys = [DocumentKey("acme", f"n/{number:03}") for number in range(120)]
    names = {key: [f"{key.document_id}-{part}" for part in "ab"] for key in keys}
    await index.apply([change(key, 1, *(write(key, name, 1, "hotel") for name in names[key])) for key in keys])
    hits, _ = await found(index, question(candidates=300))
    assert len(set(hits)) == len(hits) == 240


async def test_repair_removes_passages_without_a_manifest(index):
    await index.apply([change(TRAVEL, 1, write(TRAVEL, "0", 1, "hotel"), write(TRAVEL, "1", 1, "hotel"))])
    await index.delete_chunks([Hit("tr-0", TRAVEL, 0.0), Hit("never", LEAVE, 0.0)])
    await both_find(index, "tr-1")
    await index.apply([change(TRAVEL, 3, write(TRAVEL, "0", 3, "hotel"))])
    await both_find(index, "tr-0", "tr-1")


async def test_scans_return_every_manifest_and_every_searchable_passage(index):
    keys = [DocumentKey("acme", f"{number:03}/x") for number in range(30)]
    tombstone = claim(LEAVE, 9).model_copy(update={"state": LifeState.DELETED, "complete": True})
    await put_over(index, *(claim(key, 1) for key in keys), tombstone)
    attributes = {
        "title": "T",
        "heading_path": ("H", "I"),
        "groups": ("hr",),
        "metadata": {"a": True, "b": 1.0, "c": 1},
    }
    puts = {key: write(key, key.document_id, 1, "hotel", **attributes) for key in keys}
    await index.apply([change(key, 1, put) for key, put in puts.items()])
    manifests = {manifest.key: manifest async for manifest in index.scan_manifests()}
    assert manifests == {key: claim(key, 1) for key in keys} | {LEAVE: tombstone}
    passages = [chunk async for chunk in index.scan_chunks()]
    expected = [ScannedChunk(put.chunk) for put in puts.values()]
    assert sorted(passages, key=lambda one: one.chunk.chunk_id) == sorted(expected, key=lambda one: one.chunk.chunk_id)


# Search


async def test_each_retriever_ranks_by_its_own_score(index):
    near, middle, far = (1.0, 0.1), (1.0, 1.0), (0.0, 1.0)
    await index.apply(
        [
            change(
                TRAVEL,
                1,
                write(TRAVEL, "near", 1, "hotel and flights and trains and buses and much more text", near),
                write(TRAVEL, "middle", 1, "no such word", middle),
                write(TRAVEL, "far", 1, "hotel hotel hotel", far),
            )
        ]
    )
    by_vector, by_text = await found(index)
    assert by_vector == ["tr-near", "tr-middle", "tr-far"]
    assert by_text == ["tr-far", "tr-near"]
    [candidates] = await index.search([question()])
    cosines = [float(vector(*one) @ vector(1.0)) for one in (near, middle, far)]
    assert [hit.score for hit in candidates.vector] == pytest.approx([(1 + one) / 2 for one in cosines], abs=1e-5)
    assert all(hit.key == TRAVEL for hit in (*candidates.vector, *candidates.lexical))
    assert [hit.score for hit in candidates.lexical] == sorted((hit.score for hit in candidates.lexical), reverse=True)


async def test_the_lexical_retriever_searches_title_and_headings(index):
    titled = write(TRAVEL, "0", 1, "It costs 120 dollars.", title="Hotels", heading_path=("Lodging",))
    await index.apply([change(TRAVEL, 1, titled)])
    for word in ("hotel", "lodging", "dollars"):
        _, by_text = await found(index, question(word))
        assert by_text == ["tr-0"], word
    assert (await found(index, question("zeppelin")))[1] == []


async def test_each_retriever_returns_at_most_the_requested_candidates(index):
    puts = [write(TRAVEL, f"{number}", 1, "hotel " * (number + 1), (1.0, number / 10)) for number in range(9)]
    await index.apply([change(TRAVEL, 1, *puts)])
    by_vector, by_text = await found(index, question(candidates=4))
    assert by_vector == ["tr-0", "tr-1", "tr-2", "tr-3"]
    assert len(by_text) == 4


async def test_both_retrievers_separate_tenants_and_groups(index):
    other = DocumentKey("umbrella", TRAVEL.document_id)
    secret, public = DocumentKey("acme", "s/secret"), DocumentKey("acme", "p/public")
    await index.apply(
        [
            change(other, 1, *(write(other, f"{number}", 1, "hotel") for number in range(20))),
            change(secret, 1, write(secret, "0", 1, "hotel", groups=("hr", "board"))),
            change(public, 1, write(public, "0", 1, "hotel", (0.0, 1.0))),
        ]
    )
    await both_find(index, "pu-0", search=question(candidates=3))
    await both_find(index, "pu-0", search=question(groups=("sales",)))
    await both_find(index, "pu-0", "se-0", search=question(groups=("sales", "board")))
    await both_find(index, search=question(tenant="nobody", groups=("hr", "board")))


SPECIAL_GROUPS = (
    "*",
    "?",
    "**",
    "_all",
    "everyone",
    "public",
    "null",
    "None",
    "[]",
    "()",
    "{}",
    "/.*/",
    "\\",
    '"',
    "%",
    "🎉",
)
"""Names that a store or a query language may misinterpret."""


async def test_group_names_are_compared_literally(index):
    assert TypeAdapter(Groups).validate_python(SPECIAL_GROUPS) == SPECIAL_GROUPS
    closed = {name: write(TRAVEL, f"{at:02}", 1, "hotel", groups=(name,)) for at, name in enumerate(SPECIAL_GROUPS)}
    everyones = write(TRAVEL, "open", 1, "hotel")
    passages = (*closed.values(), everyones)
    await index.apply([change(TRAVEL, 1, *passages)])
    readers = {(): {"tr-open"}, ("nobody's",): {"tr-open"}}
    readers |= {(name,): {"tr-open", one.chunk.chunk_id} for name, one in closed.items()}
    for groups, found_by in zip(
        readers, await index.search([question(groups=one, candidates=40) for one in readers]), strict=True
    ):
        for hits in (found_by.vector, found_by.lexical):
            assert {hit.chunk_id for hit in hits} == readers[groups], groups
        allowed = {one.chunk.chunk_id for one in passages if allows(question(groups=groups), one.chunk)}
        assert allowed == readers[groups], groups
    fetched = await index.fetch([Hit(one.chunk.chunk_id, TRAVEL, 0.0) for one in passages])
    assert {fetched[one.chunk.chunk_id].groups for one in passages} == {(), *((name,) for name in SPECIAL_GROUPS)}


PAIRS = (("a", "b=c"), ("a=b", "c"), ("a\\", "b=c"), ("a\\=b", "c"), ("a", "=b=c"), ("a=", "b=c"), ("a=b=c", ""))
"""Names and values that are ambiguous if joined by a separator that either may contain."""


async def test_a_filter_matches_its_exact_name_and_value(index):
    passages = [write(TRAVEL, f"{at}", 1, "hotel", metadata=dict([pair])) for at, pair in enumerate(PAIRS)]
    await index.apply([change(TRAVEL, 1, *passages)])
    for at, (name, value) in enumerate(PAIRS):
        search = question(**{f"metadata.{name}": value})
        await both_find(index, f"tr-{at}", search=search)
        assert [allows(search, one.chunk) for one in passages] == [number == at for number in range(len(PAIRS))]


async def test_attributes_of_maximum_length_can_be_filtered_by(index):
    """Limits of attributes are in characters, those of the index in UTF-16 units and bytes."""
    for at, character in enumerate("xé€𝄞"):
        given = DocumentAttributes(
            title=character * MAX_TITLE_CHARS,
            source=character * 2_000,
            groups=(character * 128,),
            metadata={
                "=" * 128: character * MAX_METADATA_VALUE_CHARS,
                character * 128: "\\" * MAX_METADATA_VALUE_CHARS,
            },
        )
        attributes = {name: getattr(given, name) for name in ("title", "source", "groups", "metadata")}
        await index.apply([change(TRAVEL, at, write(TRAVEL, f"{at}", at, "hotel", **attributes))])
        filters = {"title": given.title, "source": given.source}
        filters |= {f"metadata.{name}": value for name, value in given.metadata.items()}
        for name, value in filters.items():
            await both_find(index, f"tr-{at}", search=question(groups=given.groups, **{name: value}))
            await both_find(index, search=question(groups=given.groups, **{name: value[:-1]}))
            await both_find(index, search=question(**{name: value}))


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ({"document_id": TRAVEL.document_id}, ["tr-0"]),
        ({"document_id": (TRAVEL.document_id, LEAVE.document_id)}, ["tr-0", "le-0"]),
        ({"title": "Leave"}, ["le-0"]),
        ({"source": "git:travel"}, ["tr-0"]),
        ({"metadata.year": 2024}, ["tr-0", "le-0"]),
        ({"metadata.year": (2023, 2025)}, []),
        ({"metadata.final": True}, ["tr-0"]),
        ({"metadata.final": True, "title": "Leave"}, []),
        ({"metadata.owner": "Zoë Q"}, ["le-0"]),
        ({"metadata.unknown": "x"}, []),
    ],
    ids=str,
)
async def test_both_retrievers_apply_filters(index, filters, ids):
    travel = {"title": "Travel", "source": "git:travel", "metadata": {"year": 2024, "final": True}}
    leave = {"title": "Leave", "metadata": {"year": 2024, "final": False, "owner": "Zoë Q"}}
    await index.apply(
        [
            change(TRAVEL, 1, write(TRAVEL, "0", 1, "hotel", **travel)),
            change(LEAVE, 1, write(LEAVE, "0", 1, "hotel", **leave)),
        ]
    )
    await both_find(index, *ids, search=question(**filters))


async def test_an_exact_search_returns_the_same_hits_and_scores(index):
    """With few passages, of which the approximate search misses none."""
    seen = [write(TRAVEL, str(number), 1, "hotel", (1.0, number / 4)) for number in range(6)]
    hidden = write(LEAVE, "0", 1, "hotel", groups=("board",))
    await index.apply([change(TRAVEL, 1, *seen), change(LEAVE, 1, hidden)])
    for search in (question(), question(candidates=3), question(source="nowhere")):
        assert await ids_and_scores(index, replace(search, exact=True)) == await ids_and_scores(index, search)


async def test_several_searches_in_one_call_return_separate_results(index):
    await index.apply(
        [
            change(TRAVEL, 1, write(TRAVEL, "0", 1, "hotel", (1.0,)), write(TRAVEL, "1", 1, "flight", (0.0, 1.0))),
            change(LEAVE, 1, write(LEAVE, "0", 1, "sabbatical", (0.0, 0.0, 1.0))),
        ]
    )
    searches = [
        question("flight", (0.0, 1.0), candidates=1),
        question("nothing", (1.0,), candidates=1, tenant="nobody"),
        question("sabbatical", (0.0, 0.0, 1.0), candidates=1),
    ]
    candidates = await index.search(searches)
    ids = [[[hit.chunk_id for hit in hits] for hits in (one.vector, one.lexical)] for one in candidates]
    assert ids == [[["tr-1"], ["tr-1"]], [[], []], [["le-0"], ["le-0"]]]


# Positions


async def refreshed(index) -> None:
    """Manifests on a server are searchable after up to a second; a scan refreshes them."""
    async for _ in index.scan_manifests():
        pass


async def test_positions_are_those_recorded_for_the_tenant(index):
    await index.advance({("acme", 0): 9, ("acme", 2): 0, ("umbrella", 0): 99})
    await index.advance({})
    await refreshed(index)
    assert await index.positions("acme") == {0: 9, 2: 0}
    assert await index.positions("nobody") == {}


async def test_positions_never_decrease(index):
    """A worker that has lost its partition continues to record positions."""
    await index.advance({("acme", 0): 9})
    await index.advance({("acme", 0): 4, ("acme", 1): 5})
    await index.advance({("acme", 1): 5})
    await refreshed(index)
    assert await index.positions("acme") == {0: 9, 1: 5}


async def test_manifests_and_positions_are_separate(index):
    await put_over(index, complete(claim(TRAVEL, 1, offset=9)), claim(LEAVE, 1, offset=6))
    await index.advance({("acme", 1): 3})
    await refreshed(index)
    assert await index.positions("acme") == {1: 3}
    assert {manifest.key async for manifest in index.scan_manifests()} == {TRAVEL, LEAVE}


# Stored vectors


async def test_stored_vectors_are_returned_bit_by_bit(index):
    random = np.random.default_rng(7)
    vectors = {f"model-1:{number}": random.standard_normal(DIMENSION).astype(np.float32) for number in range(20)}
    vectors["model-1:odd"] = np.array([0.1, -0.0, 1e-45, 3.4e38, 1 / 3, -1, 0, 2**-126], dtype=np.float32)
    await index.store_vectors(vectors)
    stored = await index.stored_vectors([*vectors, "model-2:0"])
    assert stored.keys() == vectors.keys()
    for key, kept in stored.items():
        assert kept.dtype == np.float32
        assert kept.tobytes() == vectors[key].tobytes()


# Behaviour that only one implementation can show


async def test_the_twin_searches_only_refreshed_passages():
    class Stopped(Exception):
        pass

    writes_left = 2

    async def stop_after_two_writes():
        nonlocal writes_left
        writes_left -= 1
        if writes_left < 0:
            raise Stopped

    index = MemoryIndex(DIMENSION, pause=stop_after_two_writes)
    puts = [write(TRAVEL, f"{number}", 1, "hotel") for number in range(3)]
    with pytest.raises(Stopped):
        await index.apply([change(TRAVEL, 1, *puts)])
    await both_find(index)
    writes_left = 99
    await index.apply([change(TRAVEL, 1, puts[2])])
    await both_find(index, "tr-0", "tr-1", "tr-2")


async def test_the_twin_expires_versions_of_deleted_passages():
    now_s = 0.0
    index = MemoryIndex(DIMENSION, gc_deletes_s=60, now_s=lambda: now_s)
    await index.apply([change(TRAVEL, 5, remove=["tr-0"])])
    late = change(TRAVEL, 4, write(TRAVEL, "0", 4, "hotel"))
    now_s = 60.0
    await index.apply([late])
    await both_find(index)
    now_s = 60.1
    await index.apply([late])
    await both_find(index, "tr-0")


@pytest.mark.stack
async def test_the_server_searches_only_refreshed_passages(settings):
    settings = small(settings)
    await create_indices(settings)
    index = OpenSearchIndex.open(settings)
    try:
        written = change(TRAVEL, 1, write(TRAVEL, "0", 1, "hotel"), write(TRAVEL, "1", 1, "hotel"))
        assert await index._put([written], refresh=False) == [None]
        await both_find(index)
        assert await index.fetch([Hit("tr-0", TRAVEL, 0.0)]) == {}
        assert await index.apply([change(TRAVEL, 1, written.put[0])]) == [None]
        await both_find(index, "tr-0", "tr-1")
    finally:
        await index.close()


@pytest.mark.stack
async def test_the_server_expires_versions_of_deleted_passages(settings):
    """The reason for tombstones: after the version has expired, a late writer would restore the passage."""
    settings = small(settings)
    await create_indices(settings)
    index = OpenSearchIndex.open(settings)
    late = change(TRAVEL, 4, write(TRAVEL, "0", 4, "hotel"))
    try:
        await index.apply([change(TRAVEL, 5, write(TRAVEL, "0", 5, "hotel"))])
        await index.apply([change(TRAVEL, 6, remove=["tr-0"])])
        await index.apply([late])
        await both_find(index)
        name = settings.names.chunks_index(settings.generation)
        await index._client.indices.put_settings(index=name, body={"index.gc_deletes": "200ms"})
        async with asyncio.timeout(30):
            while await found(index) == ([], []):
                await index.apply([late, change(LEAVE, 1, remove=["none"])])
        await both_find(index, "tr-0")
    finally:
        await index.close()


async def test_a_failing_server_is_unavailable():
    index = MemoryIndex(DIMENSION)
    index.available = False
    opensearch = Settings().opensearch.model_copy(update={"url": "http://127.0.0.1:1"})
    unreachable = OpenSearchIndex.open(Settings(opensearch=opensearch))
    try:
        for one in (index, unreachable):
            for call in (
                one.search([question()]),
                one.fetch([Hit("a", TRAVEL, 0.0)]),
                one.positions("acme"),
                one.manifests([TRAVEL]),
                one.put_manifests([ManifestWrite(claim(TRAVEL, 1), None)]),
                one.apply([change(TRAVEL, 1, write(TRAVEL, "0", 1, "hotel"))]),
                one.stored_vectors(["a"]),
                one.store_vectors({"a": vector(1.0)}),
                one.delete_chunks([Hit("a", TRAVEL, 0.0)]),
            ):
                with pytest.raises(IndexUnavailable):
                    await call
    finally:
        await unreachable.close()


@pytest.mark.stack
async def test_an_unreachable_node_is_skipped(settings):
    settings = small(settings)
    await create_indices(settings)
    urls = f"http://127.0.0.1:1,{settings.opensearch.url},http://127.0.0.1:2"
    several = settings.model_copy(update={"opensearch": settings.opensearch.model_copy(update={"url": urls})})
    index = OpenSearchIndex.open(several)
    try:
        for version in range(1, 7):
            assert await index.apply([change(TRAVEL, version, write(TRAVEL, "0", version, "hotel"))]) == [None]
            await both_find(index, "tr-0")
    finally:
        await index.close()


async def test_a_search_and_its_fetch_read_the_same_copies():
    preferences = []

    class Copies:
        async def msearch(self, *, index, body):
            preferences.extend(json.loads(line)["preference"] for line in body.splitlines()[::2])
            whole = {"_shards": {"total": 2, "successful": 2}, "timed_out": False, "hits": {"hits": []}}
            return {"index": index, "responses": [whole, whole]}

        async def mget(self, *, index, body, params):
            preferences.append(params["preference"])
            return {"index": index, "docs": [doc | {"found": False} for doc in body["docs"]]}

    readers = [OpenSearchIndex(Copies(), Settings()) for _ in range(2)]
    for reader in readers:
        await reader.search([question()])
        await reader.fetch([Hit("tr-0", TRAVEL, 0.0)])
    first, second = preferences[:3], preferences[3:]
    assert len(set(first)) == len(set(second)) == 1
    assert first != second, "different readers use different copies"


async def test_a_scan_with_failed_shards_raises():
    class SomeShards:
        async def create_pit(self, *, index, params):
            assert params["allow_partial_pit_creation"] == "false"
            return {"pit_id": index}

        async def search(self, *, body):
            answered = 2 if "search_after" in body else 1
            return {"_shards": {"total": 2, "successful": answered}, "timed_out": False, "hits": {"hits": []}}

        async def delete_pit(self, *, body):
            assert body["pit_id"]

    with pytest.raises(IndexUnavailable, match="some shards did not respond"):
        [chunk async for chunk in OpenSearchIndex(SomeShards(), Settings()).scan_chunks()]


@pytest.mark.stack
async def test_a_deleted_index_is_unavailable_and_changes_are_not_done(settings):
    settings = small(settings)
    index = OpenSearchIndex.open(settings)
    try:
        with pytest.raises(IndexUnavailable):
            await index.apply([change(TRAVEL, 1, write(TRAVEL, "0", 1, "hotel"))])
        with pytest.raises(IndexUnavailable):
            await index.put_manifests([ManifestWrite(claim(TRAVEL, 1), None)])
        with pytest.raises(IndexUnavailable):
            await index.ready()
        await create_indices(settings)
        await create_indices(settings)
        await index.ready()
    finally:
        await index.close()


@pytest.mark.stack
async def test_an_index_with_another_layout_is_rejected(settings):
    small_settings = small(settings)
    body = chunks_index_body(shards=1, replicas=0, dimension=DIMENSION, engine=small_settings.opensearch.engine)
    body["mappings"]["_meta"] = {"layout": LAYOUT - 1}
    client = connect(small_settings.opensearch)
    try:
        await client.indices.create(index=small_settings.names.chunks_index(small_settings.generation), body=body)
    finally:
        await client.close()
    with pytest.raises(IndexMismatch, match=f"has layout {LAYOUT - 1}, this release requires {LAYOUT}"):
        await create_indices(small_settings)


@pytest.mark.stack
async def test_an_index_of_another_model_is_not_written(settings):
    await create_indices(small(settings))
    with pytest.raises(IndexMismatch, match="length 8, the model produces 384"):
        await create_indices(settings)


async def test_passages_of_a_document_are_counted_when_searchable(index):
    change = ChunkChange(TRAVEL, 1, (write(TRAVEL, "a", 1, "one"), write(TRAVEL, "b", 1, "two")), ())
    assert await index.apply([change, ChunkChange(LEAVE, 1, (write(LEAVE, "a", 1, "one"),), ())]) == [None, None]
    assert [await index.count_chunks(key) for key in (TRAVEL, LEAVE, DocumentKey("other", "hr/travel.md"))] == [2, 1, 0]
    await index.apply([ChunkChange(TRAVEL, 2, (), tuple(one.chunk.chunk_id for one in change.put))])
    assert await index.count_chunks(TRAVEL) == 0


async def test_live_documents_of_a_source_are_listed_by_id_in_pages(index):
    names = [f"{name}.md" for name in ("B", "a", "a\u2028", "a\u0085", "ä", "\U0001f600", "\uff5e", "z")]
    keys = [DocumentKey("acme", name) for name in names]
    others = [
        complete(claim(DocumentKey("acme", "other.md"), 1, connector="other")),
        complete(claim(DocumentKey("acme", "nobody.md"), 1)),
        complete(claim(DocumentKey("rival", "rival.md"), 1, connector="mine")),
        complete(claim(DocumentKey("acme", "gone.md"), 1, connector="mine")).model_copy(
            update={"state": LifeState.DELETED}
        ),
    ]
    # A claim counts as its new version, unless it replaces a complete manifest: then that one counts.
    mine = [claim(key, 1, connector="mine", content=BlobRef(sha256="0" * 64, size_bytes=1)) for key in keys]
    mine[0] = claim(keys[0], 2, connector="other", previous=complete(mine[0]))
    mine[1] = mine[1].model_copy(update={"state": LifeState.DELETED, "previous": complete(mine[1])})
    await index.put_manifests([ManifestWrite(manifest, None) for manifest in (*mine, *others)])
    listed, after = [], None
    while page := await index.live_documents("acme", connector="mine", after=after, limit=3):
        assert len(page) <= 3
        listed += [manifest.document_id for manifest in page]
        assert {(manifest.connector, manifest.version) for manifest in page} == {("mine", 1)}
        after = listed[-1]
    assert listed == sorted(names, key=str.encode)
    everything = await index.live_documents("acme", connector=None, after=None, limit=100)
    assert {manifest.document_id for manifest in everything} == {*names, "other.md", "nobody.md"}
