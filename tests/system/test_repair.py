"""Edits leave only the last version in the index; ``freshline verify`` finds and repairs damage."""

from collections.abc import AsyncIterator

import httpx
import pytest

from bench.installation import BenchInstallation, installed
from freshline.services import Services, connect_services
from freshline.verify.agreement import Kind
from freshline.verify.run import Report, verify
from infra.local import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

PAGE = "# Page {0}\n\n## First\n\nThe first of page {0}.\n\n## Second\n\n" + "The second goes on. " * 100 + "\n"


@pytest.fixture(scope="module")
async def installation(stack: Stack) -> AsyncIterator[BenchInstallation]:
    async with installed(stack, {"FRESHLINE_KAFKA__PARTITIONS": "3"}) as running:
        yield running


@pytest.fixture(scope="module")
async def services(installation: BenchInstallation) -> AsyncIterator[Services]:
    async with connect_services(installation.settings) as connected:
        for number in range(8):
            await put(connected, f"page-{number}.md", PAGE.format(number))
        await connected.ended((await connected.delete("page-7.md"))["event_id"])
        yield connected


@pytest.fixture
async def index(installation: BenchInstallation, services: Services) -> AsyncIterator[httpx.AsyncClient]:  # noqa: ARG001
    async with httpx.AsyncClient(base_url=installation.settings.opensearch.url, trust_env=False) as client:
        yield client


async def put(services: Services, document_id: str, text: str) -> None:
    accepted = await services.put(document_id, text.encode(), "text/markdown")
    assert (await services.ended(accepted["event_id"]))["outcome"] == "done"


async def found(installation: BenchInstallation) -> set[str]:
    await installation.caught_up(timeout_s=60)
    return set((await verify(installation.settings, repair=False)).findings)


async def repaired(installation: BenchInstallation, services: Services) -> Report:
    """Repair, and check that the index is in the state before the damage."""
    report = await verify(installation.settings, repair=True)
    assert report.ok, report
    assert (report.documents, report.tombstones) == (7, 1)
    for number in range(7):
        results = (await services.ask(f"first of page {number}", filters={"document_id": f"page-{number}.md"}))[
            "results"
        ]
        assert f"The first of page {number}." in "".join(result["text"] for result in results)
        assert len({result["text"] for result in results}) == len(results) >= 2
    assert (await services.ask("page 7", filters={"document_id": "page-7.md"}))["results"] == []
    return report


class Damage:
    """Damage to the index by programs other than Freshline."""

    def __init__(self, installation: BenchInstallation, index: httpx.AsyncClient) -> None:
        self._index = index
        names, generation = installation.settings.names, installation.settings.generation
        self.chunks, self.manifests = names.chunks_index(generation), names.manifests_index(generation)

    async def passages(self, document_id: str) -> list[dict]:
        body = {"query": {"term": {"document_id": document_id}}}
        return (await self._index.post(f"/{self.chunks}/_search", json=body)).json()["hits"]["hits"]

    async def remove(self, document_id: str) -> None:
        hit = (await self.passages(document_id))[0]
        where = {"routing": f"local/{document_id}", "refresh": "true"}
        (await self._index.delete(f"/{self.chunks}/_doc/{hit['_id']}", params=where)).raise_for_status()

    async def write(self, document_id: str, passage: str | None = None, **changes: object) -> None:
        """Overwrite a passage of the document, or write it under another id."""
        hit = (await self.passages(document_id))[0]
        changed = hit["_source"] | {"chunk_id": passage or hit["_id"]} | changes
        where = {"routing": f"local/{document_id}", "refresh": "true"}
        path = f"/{self.chunks}/_doc/{changed['chunk_id']}"
        (await self._index.put(path, json=changed, params=where)).raise_for_status()

    async def manifest(self, document_id: str, **changes: object) -> None:
        path = f"/{self.manifests}/_doc/local%2F{document_id}"
        source = (await self._index.get(path)).json()["_source"]
        source["manifest"] |= changes
        (await self._index.put(path, json=source, params={"refresh": "true"})).raise_for_status()


@pytest.fixture
def damage(installation, index) -> Damage:
    return Damage(installation, index)


async def test_missing_passages_are_rewritten_without_embedding(installation, services, damage):
    before = await installation.embedded_count()
    await damage.remove("page-0.md")
    await damage.remove("page-1.md")
    assert await found(installation) == {Kind.MISSING_PASSAGES}
    report = await repaired(installation, services)
    assert report.repaired == {"events sent again": 2, "passages removed": 0}
    assert await installation.embedded_count() == before


async def test_an_orphaned_passage_is_removed(installation, services, damage):
    await damage.write("page-2.md", passage="stray")
    assert await found(installation) == {Kind.ORPHAN}
    assert (await repaired(installation, services)).repaired["passages removed"] == 1


async def test_wrong_versions_are_repaired(installation, services, damage):
    """A manifest older than the stream, and a passage newer than its document."""
    await damage.manifest("page-3.md", version=1)
    assert Kind.OUTDATED in await found(installation)
    await repaired(installation, services)
    await damage.write("page-4.md", version=2**52)
    assert await found(installation) == {Kind.NEWER}
    await repaired(installation, services)


async def test_wrong_deletion_states_are_repaired(installation, services, damage):
    await damage.manifest("page-5.md", state="deleted")
    assert await found(installation) == {Kind.WRONGLY_DELETED}
    await repaired(installation, services)
    await damage.manifest("page-7.md", state="live")
    assert await found(installation) == {Kind.NOT_DELETED}
    await repaired(installation, services)


async def test_a_passage_with_extended_access_is_repaired(installation, services, damage):
    await damage.write("page-6.md", groups=["legal"])
    assert await found(installation) == {Kind.OTHER_GROUPS}
    await repaired(installation, services)


async def test_passages_that_differ_from_their_content_are_repaired(installation, services, damage):
    await damage.write("page-0.md", heading_path=["Another"])
    await damage.write("page-1.md", text="Not what was uploaded.")
    await damage.write("page-2.md", lexical="found by other words")
    await damage.write("page-3.md", metadata={"year": 1}, metadata_terms=["year=1"])
    await damage.write("page-4.md", end=1_000)
    report = await verify(installation.settings, repair=False)
    assert set(report.findings) == {Kind.OTHER_PASSAGE}
    examples = report.findings[Kind.OTHER_PASSAGE].examples
    assert [example.split()[0] for example in examples] == [f"local/page-{number}.md" for number in range(5)]
    assert report.not_compared.count == 0
    assert (await repaired(installation, services)).repaired["events sent again"] == 5
    await damage.manifest("page-5.md", title="Another")
    assert await found(installation) == {Kind.OTHER_CONTENT}
    await repaired(installation, services)


async def test_a_repaired_document_can_be_edited(installation, services):
    for number in range(7):
        await put(services, f"page-{number}.md", PAGE.format(number) + "\nOne line more.\n")
    assert await found(installation) == set()


async def test_lost_content_is_reported_and_searchable_passages_are_kept(installation, services, damage):
    lost = PAGE.format(0) + "\nOnly here.\n"
    await put(services, "page-0.md", lost)
    shelf = installation.settings.blobs.path
    [blob] = [file for file in shelf.rglob("*") if file.is_file() and file.read_bytes() == lost.encode()]
    blob.unlink()
    await damage.remove("page-0.md")
    report = await verify(installation.settings, repair=True)
    assert set(report.findings) == {Kind.CONTENT_LOST, Kind.MISSING_PASSAGES}
    assert report.findings[Kind.CONTENT_LOST].examples == ("local/page-0.md",)
    assert report.repaired == {}
    blob.write_bytes(b"something else")
    assert await found(installation) == {Kind.CONTENT_LOST, Kind.MISSING_PASSAGES}
    blob.write_bytes(lost.encode())
    assert (await verify(installation.settings, repair=True)).ok


# Edits


class Edited:
    """A document that is uploaded repeatedly with attributes, and its searchable passages."""

    def __init__(self, installation: BenchInstallation, services: Services, http: httpx.AsyncClient, name: str) -> None:
        self._installation, self._services, self._http, self._name = installation, services, http, name

    async def put(self, text: str, **attributes: object) -> None:
        url = f"{self._installation.ingest_url}/v1/documents/{self._name}"
        accepted = await self._http.put(url, json={"text": text, **attributes})
        assert accepted.status_code == 202, accepted.text
        assert (await self._services.ended(accepted.json()["event_id"]))["outcome"] == "done"

    async def passages(self) -> list[dict]:
        answer = await self._services.ask("word and sentence", top_k=50, filters={"document_id": self._name})
        return answer["results"]


@pytest.fixture
def edited(installation, services, index):
    return lambda name: Edited(installation, services, index, name)


BODY = "\n\n".join(f"Sentence {number} has a word. " * 24 for number in range(8))


async def test_a_renamed_heading_is_found_below_long_headings(installation, edited):
    first, second = "# " + "F" * 125, "## " + "S" * 120
    document = edited("headings.md")
    await document.put(f"{first}\n\n{second}\n\n### {'t' * 54} old\n\n{BODY}")
    before = await document.passages()
    assert len(before) >= 8
    assert sum("t" * 54 + " old" in result["heading_path"] for result in before) >= 7
    embedded = await installation.embedded_count()
    await document.put(f"{first}\n\n{second}\n\n### {'t' * 54} new\n\n{BODY}")
    after = await document.passages()
    renamed = [
        {**result, "heading_path": [one.replace(" old", " new") for one in result["heading_path"]]} for result in before
    ]
    assert sorted(result["heading_path"] for result in after) == sorted(result["heading_path"] for result in renamed)
    assert not any(" old" in result["text"] for result in after)
    assert await installation.embedded_count() == embedded + 1, "only the passage with the heading has another vector"
    assert await found(installation) == set()


async def test_each_attribute_is_that_of_the_last_upload(installation, edited):
    document = edited("attributes.md")
    text = f"# A > B\n\n{BODY}"
    uploads = [
        {"title": "A"},
        {"title": "A > B"},
        {"title": "A", "source": "s3://old"},
        {"title": "A", "source": "s3://new"},
        {"title": "A", "source": "s3://new", "metadata": {"checked": 1}},
        {"title": "A", "source": "s3://new", "metadata": {"checked": True}},
    ]
    for attributes in uploads:
        await document.put(text, **attributes)
        wanted = (attributes["title"], attributes.get("source"), attributes.get("metadata", {}))
        shown = [(one["title"], one["source"], one["metadata"]) for one in await document.passages()]
        assert str(shown) == str([wanted] * len(shown)), "1 is not True"
        assert len(shown) >= 8
    # Joined by " > ", the heading paths of both are equal.
    for headings in ("# A\n\n## B", "# A > B"):
        await document.put(f"{headings}\n\n{BODY}", title="T")
    assert {tuple(one["heading_path"]) for one in await document.passages()} <= {(), ("A > B",)}
    await document.put(f"# A > B\n\n{BODY}", title="T", groups=["hr"])
    assert await document.passages() == []
    await document.put(f"# A > B\n\n{BODY}", title="T")
    assert len(await document.passages()) >= 8
    assert await found(installation) == set()


async def test_an_edit_at_the_top_keeps_the_passages_below(edited):
    document = edited("top.md")
    sections = "\n\n".join(f"## Part {number}\n\n{part}" for number, part in enumerate(BODY.split("\n\n")))
    first = f"# Top\n\nShort.\n\n{sections}\n"
    await document.put(first)
    before = {result["text"]: result for result in await document.passages()}
    second = first.replace("Short.", "Short, and a little longer. " * 20)
    await document.put(second)
    after = await document.passages()
    kept = [result for result in after if result["text"] in before]
    assert len(kept) >= 7
    for result in kept:
        assert {**result, "score": 0} == {**before[result["text"]], "score": 0}
    versions = {before[result["text"]]["version"]: first for result in kept}
    for result in after:
        start, end = result["span"]
        assert versions.get(result["version"], second)[start:end] == result["text"], (
            "spans refer to the text of their version"
        )
