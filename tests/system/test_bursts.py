"""Bursts of changes as in real histories: the newest version wins, and superseded versions are skipped."""

from collections import Counter
from collections.abc import AsyncIterator, Iterable

import httpx
import orjson
import pytest

from bench.installation import BenchInstallation, installed
from freshline.services import Services, connect_services
from freshline.verify.run import verify
from infra.blobs import open_blob_store
from infra.kafka.codec import decode, encode_event
from infra.kafka.producer import KafkaProducer
from infra.kafka.topic_reader import read_to_end
from infra.local import Stack
from schemas.documents import Outcome
from schemas.events import Change, DocumentEvent, IndexChange
from schemas.topics import INDEX_CHANGES

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

BURST = 3_000
FOLDER = 200


@pytest.fixture(scope="module")
async def installation(stack: Stack) -> AsyncIterator[BenchInstallation]:
    async with installed(stack, {"FRESHLINE_KAFKA__PARTITIONS": "3"}) as running:
        yield running


@pytest.fixture
async def services(installation: BenchInstallation) -> AsyncIterator[Services]:
    async with connect_services(installation.settings) as connected:
        yield connected


async def batch(installation: BenchInstallation, lines: Iterable[dict]) -> None:
    """Send a batch, and wait until all steps have processed it."""
    body = b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines)
    async with httpx.AsyncClient(base_url=installation.ingest_url, timeout=120) as client:
        headers = {"content-type": "application/x-ndjson"}
        sent = (await client.post("/v1/documents:batch", content=body, headers=headers)).json()
    assert not sent["rejected"], sent
    await installation.caught_up(timeout_s=200)


async def outcomes(installation: BenchInstallation) -> dict[str, Counter[Outcome]]:
    """Number of events of each document by outcome; an outcome delivered twice counts once."""
    outcome_of: dict[str, tuple[str, Outcome]] = {}
    async for record in read_to_end(installation.settings, INDEX_CHANGES):
        change = decode(IndexChange, record.value, record.headers)
        outcome_of.setdefault(change.event_id, (change.document_id, change.outcome))
    counts: dict[str, Counter[Outcome]] = {}
    for document_id, outcome in outcome_of.values():
        counts.setdefault(document_id, Counter())[outcome] += 1
    return counts


async def test_a_document_updated_thousands_of_times_ends_with_its_newest_version(installation, services):
    blobs = open_blob_store(installation.settings.blobs)
    producer = await KafkaProducer.open(installation.settings)
    events = []
    for version in range(1, BURST + 1):
        content = await blobs.put(f"# Counter\n\nThe counter stands at {version}.\n".encode())
        fields = {"event_id": f"burst-{version}", "tenant": "local", "document_id": "counter.md", "version": version}
        kind = {"change": Change.UPSERTED, "content_type": "text/markdown", "accepted_ms": 0}
        events.append(encode_event(DocumentEvent(content=content, **fields, **kind)))
    before = await installation.embedded_count()
    await producer.send_all(events)
    await installation.caught_up(timeout_s=300)
    await producer.close()
    await blobs.close()
    by_outcome = (await outcomes(installation))["counter.md"]
    assert by_outcome.total() == BURST
    assert set(by_outcome) == {Outcome.DONE, Outcome.SUPERSEDED}
    # Of each batch of a step, at most one event of the document is processed.
    assert await installation.embedded_count() - before == by_outcome[Outcome.DONE] <= BURST / 20
    assert (await services.document("counter.md"))["version"] == BURST
    results = (await services.ask("Where does the counter stand?"))["results"]
    assert [result["text"].splitlines()[-1] for result in results] == [f"The counter stands at {BURST}."]


async def test_a_folder_that_is_renamed_and_then_deleted_is_embedded_once(installation, services):
    pages = {f"old/page-{number}.md": f"# Page {number}\n\nThis is page {number}.\n" for number in range(FOLDER)}
    await batch(installation, ({"document_id": name, "text": text} for name, text in pages.items()))
    before = await installation.embedded_count()
    renamed = {name.replace("old/", "new/"): text for name, text in pages.items()}
    moves = [{"document_id": name, "deleted": True} for name in pages]
    moves += [{"document_id": name, "text": text} for name, text in renamed.items()]
    await batch(installation, moves)
    assert await installation.embedded_count() == before
    results = (await services.ask("This is page 17."))["results"]
    assert results[0]["document_id"] == "new/page-17.md"
    assert not [result for result in results if result["document_id"].startswith("old/")]
    report = await verify(installation.settings, repair=False)
    assert (report.ok, report.documents, report.tombstones) == (True, FOLDER + 1, FOLDER)
    await batch(installation, ({"document_id": name, "deleted": True} for name in renamed))
    assert [result["document_id"] for result in (await services.ask("This is page 17."))["results"]] == ["counter.md"]
    report = await verify(installation.settings, repair=False)
    assert (report.ok, report.chunks, report.tombstones) == (True, 1, 2 * FOLDER)
