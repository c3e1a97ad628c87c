"""The pipeline from upload to answer, on real servers and processes."""

import os
import signal
from collections.abc import AsyncIterator

import httpx
import pytest

from bench.installation import BenchInstallation, installed
from chaos.checker import checking
from chaos.clients import ClientHistory
from freshline.services import Services, connect_services
from freshline.verify.observed import Harm
from freshline.verify.run import verify
from infra.local import Stack
from schemas.documents import DocumentKey

pytestmark = pytest.mark.stack

PAGE = "# Travel\n\n## Flights\n\nThe travel office books flights.\n\n## Hotels\n\nHotels cost at most {} a night.\n"


@pytest.fixture(scope="module")
async def installation(stack: Stack) -> AsyncIterator[BenchInstallation]:
    async with installed(stack, {"FRESHLINE_OPENSEARCH__SHARDS": "2", "FRESHLINE_KAFKA__PARTITIONS": "4"}) as running:
        yield running


@pytest.fixture
async def services(installation: BenchInstallation) -> AsyncIterator[Services]:
    async with connect_services(installation.settings) as connected:
        yield connected


async def put(services: Services, document: str, text: str, **wanted: str) -> dict:
    accepted = await services.put(document, text.encode(), "text/markdown")
    status = await services.ended(accepted["event_id"])
    assert status["outcome"] == wanted.get("outcome", "done"), status
    return accepted


def texts(answer: dict) -> str:
    return "\n".join(result["text"] for result in answer["results"])


async def test_an_edit_changes_the_cached_answer_and_a_delete_removes_it(services):
    question = "How much may a hotel cost?"
    await put(services, "travel.md", PAGE.format("120 dollars"))
    first = await services.ask(question, generate=True)
    assert "120 dollars" in first["answer"]
    assert (await services.ask(question, generate=True))["cached"]

    accepted = await services.put("travel.md", PAGE.format("150 dollars").encode(), "text/markdown")
    answer = await services.ask(question, generate=True, min_position=accepted["position"])
    assert "150 dollars" in answer["answer"]
    assert "120 dollars" not in texts(answer)
    assert not answer["cached"]

    deleted = await services.delete("travel.md")
    answer = await services.ask(question, generate=True, min_position=deleted["position"])
    assert "travel.md" not in [result["document_id"] for result in answer["results"]]
    assert (await services.document("travel.md"))["state"] == "deleted"


async def test_every_stage_of_an_event_is_reported(services):
    accepted = await put(services, "stages.md", "# Stages\n\nOne passage.\n")
    status = await services.ended(accepted["event_id"])
    times = [status["stages_ms"][stage] for stage in ("accepted", "chunked", "embedded", "searchable", "purged")]
    assert times == sorted(times)
    assert times[0] == 0


async def test_a_deletion_has_an_outcome_and_a_receipt(services, installation):
    await put(services, "secret.md", "# Secret\n\nThe code is 4711.\n")
    assert "4711" in texts(await services.ask("What is the code?", filters={"document_id": "secret.md"}))
    deleted = await services.delete("secret.md")
    async with httpx.AsyncClient(base_url=installation.ingest_url, timeout=60) as client:
        path = f"/v1/events/{deleted['event_id']}"
        followed = await client.get(path, headers={"accept": "text/event-stream"})
        assert followed.text.strip().split("\n\n")[-1].startswith("event: ended")
        receipt = (await client.get(f"{path}/receipt")).json()
        assert (receipt["document_id"], receipt["passages"]) == ("secret.md", 0)
        assert receipt["position"] == deleted["position"]
        assert receipt["accepted_ms"] <= receipt["purged_ms"] <= receipt["checked_ms"]
        await put(services, "secret.md", "# Secret\n\nAgain.\n")
        assert (await client.get(f"{path}/receipt")).status_code == 404


async def test_an_older_revision_is_superseded_and_changes_nothing(services, installation):
    async with httpx.AsyncClient(base_url=installation.ingest_url) as client:
        for revision, text, outcome in ((7, "seven", "done"), (6, "six", "superseded"), (7, "again", "superseded")):
            accepted = await client.put(
                "/v1/documents/revised.md",
                content=f"# Revised\n\nThe revision is {text}.\n",
                headers={"content-type": "text/markdown", "freshline-revision": str(revision)},
            )
            assert accepted.status_code == 202, accepted.text
            assert (await services.ended(accepted.json()["event_id"]))["outcome"] == outcome
    answer = await services.ask("Which revision is it?")
    assert "The revision is seven." in texts(answer)
    assert "six" not in texts(answer)


async def test_an_unreadable_document_is_a_dead_letter_and_its_next_version_is_indexed(services):
    accepted = await services.put("broken.pdf", b"%PDF-1.4 and nothing more", "application/pdf")
    status = await services.ended(accepted["event_id"])
    assert status["outcome"] == "dead_letter"
    assert status["reason"]
    await put(services, "broken.pdf", "# Mended\n\nNow it is Markdown about zebras.\n")
    assert "zebras" in texts(await services.ask("zebras"))


async def test_restored_content_is_embedded_once(services, installation):
    a, b = ("# Flip\n\nThe gate is open on weekdays.\n", "# Flip\n\nThe gate is closed for repairs.\n")
    await put(services, "flip.md", a)
    await put(services, "flip.md", b)
    before = await installation.embedded_count()
    await put(services, "flip.md", a)
    await put(services, "copy-of-flip.md", a)
    assert await installation.embedded_count() == before
    answer = texts(await services.ask("Is the gate open?", filters={"document_id": "flip.md"}))
    assert "open on weekdays" in answer
    assert "repairs" not in answer


async def test_killed_workers_lose_nothing(stack):
    """SIGKILL of all workers while records wait; new workers of the same groups process the rest."""
    async with installed(stack, {"FRESHLINE_KAFKA__PARTITIONS": "4"}) as installation:
        async with connect_services(installation.settings) as services:
            events = [
                (await services.put(f"doc-{number}.md", PAGE.format(number).encode(), "text/markdown"))["event_id"]
                for number in range(40)
            ]
            for name, pid in installation.pids.items():
                if name.startswith("worker"):
                    os.kill(pid, signal.SIGKILL)
            async with installation.workers():
                outcomes = [(await services.ended(event))["outcome"] for event in events]
                await installation.caught_up(timeout_s=60)
            assert outcomes == ["done"] * 40
        async with checking(installation.settings, ClientHistory()) as checker:
            checker.observed.rested(await checker.check())
            assert checker.observed.violations == []
            assert len(checker.observed.accepted) == 40
        report = await verify(installation.settings, repair=False)
        assert report.ok, report
        assert report.documents == 40


async def test_the_checker_reports_damage(installation, services):
    """The checker must detect a missing passage, a restored one and an additional one."""
    for name in ("gone.md", "back.md", "old.md"):
        await put(services, name, f"# Kept\n\nThe page {name} tells of storks.\n")
    await services.ended((await services.delete("back.md"))["event_id"])
    await put(services, "old.md", "# Kept\n\nNow it tells of herons.\n")
    await installation.caught_up(timeout_s=60)
    tenant = installation.settings.tenant.default
    gone, back, old = (DocumentKey(tenant, name) for name in ("gone.md", "back.md", "old.md"))
    async with checking(installation.settings, ClientHistory()) as checker:
        searchable = await checker.check()
        checker.observed.rested(searchable)
        assert checker.observed.violations == []
        versions = checker.observed.accepted
        damaged = searchable | {
            gone: {},
            back: dict.fromkeys(versions[back][0].passages, versions[back][0].number),
            old: searchable[old] | dict.fromkeys(versions[old][0].passages, versions[old][0].number),
        }
        checker.observed.rested(damaged)
        found = [(violation.harm, violation.what.partition(":")[0]) for violation in checker.observed.violations]
        assert sorted(found) == [(Harm.LOST, str(gone)), (Harm.RESURRECTED, str(back)), (Harm.STALE, str(old))]


async def test_the_index_agrees_with_the_stream(installation, services):
    await put(services, "last.md", "# Last\n\nThe last one.\n")
    await installation.caught_up(timeout_s=60)
    report = await verify(installation.settings, repair=False)
    assert report.ok, report
    assert report.tombstones >= 1
