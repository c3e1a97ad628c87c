"""Reports and exit codes of ``freshline ingest``, compared with what questions find afterwards."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import redis.asyncio

from bench.installation import BenchInstallation, installed
from freshline.services import Services, connect_services
from infra.local import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

GOOD = 60
BROKEN = 5
MAX_BYTES = 200_000


@pytest.fixture(scope="module")
async def installation(stack: Stack) -> AsyncIterator[BenchInstallation]:
    limits = {"FRESHLINE_KAFKA__PARTITIONS": "3", "FRESHLINE_PARSE__MAX_BYTES": str(MAX_BYTES)}
    async with installed(stack, limits) as running:
        yield running


@pytest.fixture
async def services(installation: BenchInstallation) -> AsyncIterator[Services]:
    async with connect_services(installation.settings) as connected:
        yield connected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "documents"
    made.mkdir()
    return made


@pytest.fixture
def start(installation: BenchInstallation, tmp_path: Path):
    """Starts a command with its own log of sent documents."""
    environment = {**installation.launcher.environment, "XDG_STATE_HOME": str(tmp_path / "state")}

    running: list[subprocess.Popen] = []

    def run(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "freshline", *map(str, arguments)]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def freshline(start):
    """Runs a command; returns its JSON and its standard error."""

    def run(*arguments: object, status: int) -> tuple[dict, str]:
        process = start(*arguments, "--json")
        report, stderr = process.communicate(timeout=200)
        assert process.returncode == status, (report, stderr)
        return (json.loads(report.splitlines()[-1]) if report else {}), stderr

    return run


@contextmanager
def stopped(installation: BenchInstallation, step: str) -> Iterator[None]:
    """Stop the workers of a step, so that no event passes it within the context."""
    pid = installation.pids[f"worker {step}"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def pdf_without_text() -> bytes:
    """A page as a scanner produces it, without text."""
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R >>"
    drawn = b"<< /Length 12 >>\nstream\n0 0 9 9 re f\nendstream"
    objects = (b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>", page, drawn)
    content, offsets = b"%PDF-1.4\n", []
    for number, one in enumerate(objects, start=1):
        offsets.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, one)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    xref = b"xref\n0 5\n0000000000 65535 f \n" + table
    return content + xref + b"trailer << /Root 1 0 R /Size 5 >>\nstartxref\n%d\n%%%%EOF\n" % len(content)


def names(entries: list[dict]) -> list[str]:
    return sorted(one["document_id"] for one in entries)


async def found(services: Services, question: str) -> list[str]:
    return [result["document_id"] for result in (await services.ask(question, top_k=50))["results"]]


async def test_the_report_lists_every_document_that_is_not_searchable(services, freshline, folder):
    for number in range(GOOD):
        # Good documents before and after the broken ones, so that the last event of each partition is good.
        (folder / f"page-{number:02}.md").write_text(f"# Page {number}\n\nThe room {number} has {number * 7} chairs.\n")
    for number in range(BROKEN):
        (folder / f"broken-{number}.pdf").write_bytes(b"no PDF at all %d" % number)
    (folder / "a-scan.pdf").write_bytes(pdf_without_text())
    (folder / "blank.md").write_text(" \n\n")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "photo.png").write_bytes(b"\x89PNG")
    report, stderr = freshline("ingest", folder, "--wait", status=1)
    assert (report["sent"], report["failed"], report["searchable"]) == (GOOD + BROKEN + 3, BROKEN, False)
    assert report["outcomes"] == {"done": GOOD + 3, "dead_letter": BROKEN}
    assert names(report["failures"]) == [f"broken-{number}.pdf" for number in range(BROKEN)]
    assert all("cannot read the application/pdf" in one["reason"] for one in report["failures"])
    why = {one["document_id"]: one["reason"] for one in report["without_passages"]}
    assert why.pop("a-scan.pdf").startswith("no text layer")
    assert why == {"blank.md": "no text", "empty.txt": "the document is empty"}
    assert report["ignored_files"] == [{"path": "photo.png", "reason": "files named .png are not supported"}]
    assert report["in_progress"] == report["superseded"] == []
    for line in ("a-scan.pdf: 0 passages: no text layer", "not processed: broken-3.pdf: ", "skipped: photo.png: "):
        assert line in stderr
    answers = set(await found(services, "How many chairs has the room?"))
    assert "page-37.md" in await found(services, "How many chairs has the room 37?")
    assert answers <= {f"page-{number:02}.md" for number in range(GOOD)}
    # Nothing is sent, so the report contains only what the listing shows.
    again, _ = freshline("ingest", folder, "--wait", status=4)
    assert (again["sent"], again["unchanged"]) == (0, GOOD + BROKEN + 3)


async def test_ingesting_good_documents_succeeds(services, freshline, folder):
    (folder / "otters.md").write_text("# Otters\n\nOtters sleep hand in hand.\n")
    report, stderr = freshline("ingest", folder, "--wait", status=0)
    assert (report["searchable"], report["outcomes"], report["failed"]) == (True, {"done": 1}, 0)
    assert "not" not in stderr
    assert (await found(services, "How do otters sleep?"))[0] == "otters.md"
    (folder / "otters.md").unlink()
    report, _ = freshline("ingest", folder, "--wait", status=0)
    assert (report["deleted"], report["searchable"], report["without_passages"]) == (1, True, [])
    assert "otters.md" not in await found(services, "How do otters sleep?")


def test_omitted_documents_have_an_exit_code_that_can_be_allowed(freshline, folder):
    (folder / "blank-2.md").write_text("\n")
    (folder / "sheet.numbers").write_bytes(b"x")
    report, _ = freshline("ingest", folder, "--wait", status=4)
    assert (report["failed"], report["searchable"], names(report["without_passages"])) == (0, False, ["blank-2.md"])
    report, _ = freshline("ingest", folder, "--wait", "--allow-partial", status=0)
    assert [one["path"] for one in report["ignored_files"]] == ["sheet.numbers"]


def test_without_wait_the_exit_code_reflects_acceptance(freshline, folder):
    (folder / "fine.md").write_text("# Fine\n\nIt is fine.\n")
    report, _ = freshline("ingest", folder, "--no-wait", status=0)
    assert (report["sent"], report["searchable"], report["outcomes"]) == (1, False, {})
    (folder / "movie.mov").write_bytes(b"x")
    freshline("ingest", folder, "--no-wait", status=4)
    (folder / "large.md").write_text("x" * (MAX_BYTES + 1))
    report, stderr = freshline("ingest", folder, "--no-wait", status=1)
    assert names(report["failures"]) == ["large.md"]
    assert "not sent: large.md: " in stderr


def history(path: Path, *lines: dict) -> Path:
    records = [{"path": line["doc_id"], "type": "updated", **line} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in records))
    return path


async def test_a_version_superseded_by_another_sender_is_reported_and_one_replaced_in_the_run_is_not(
    installation, services, freshline, tmp_path
):
    headers = {"content-type": "text/markdown", "freshline-revision": "10"}
    async with httpx.AsyncClient(base_url=installation.ingest_url) as client:
        newer = await client.put("/v1/documents/gate.md", content="# Gate\n\nThe gate is green.\n", headers=headers)
    await services.ended(newer.json()["event_id"])
    mine = history(
        tmp_path / "one.jsonl",
        {"seq": 1, "doc_id": "gate.md", "content": "# Gate\n\nThe gate is red.\n"},
        {"seq": 2, "doc_id": "door.md", "content": "# Door\n\nThe door is red.\n"},
        {"seq": 3, "doc_id": "door.md", "content": "# Door\n\nThe door is blue.\n"},
    )
    report, stderr = freshline("ingest", "--events", mine, "--wait", status=4)
    assert (names(report["superseded"]), report["failed"], report["searchable"]) == (["gate.md"], 0, False)
    assert report["superseded"][0]["reason"] == "version 2 is not newer than version 10"
    assert "superseded: gate.md: " in stderr
    assert report["outcomes"]["done"] + report["replaced"] == 2
    texts = [result["text"] for result in (await services.ask("Which colour have gate and door?"))["results"]]
    assert any("gate is green" in text for text in texts)
    assert any("door is blue" in text for text in texts)
    assert not any("is red" in text for text in texts)
    ours = history(tmp_path / "two.jsonl", {"seq": 20, "doc_id": "gate.md", "content": "# Gate\n\nIt is gold.\n"})
    report, _ = freshline("ingest", "--events", ours, "--wait", status=0)
    assert report["searchable"]


async def test_events_without_an_outcome_at_the_timeout_are_listed_and_continue(
    installation, services, freshline, folder
):
    for number in range(3):
        (folder / f"late-{number}.md").write_text(f"# Late {number}\n\nThe heron number {number} waits.\n")
    with stopped(installation, "prepare"):
        report, stderr = freshline("ingest", folder, "--wait", "--timeout", "0.5", status=3)
    assert names(report["in_progress"]) == ["late-0.md", "late-1.md", "late-2.md"]
    assert (report["searchable"], report["outcomes"], report["failed"]) == (False, {}, 0)
    assert "3 events have no known outcome yet (timeout of 0.5 s)" in stderr
    assert "freshline lag" in stderr
    for one in report["in_progress"]:
        assert (await services.ended(one["event_id"], one["position"]))["passages"] == 1
    assert set(names(report["in_progress"])) <= set(await found(services, "Which heron waits?"))


async def state_of(store, namespace: str, document_id: str) -> bytes | None:
    """Redis key of the event state of a document."""
    async for key in store.scan_iter(f"{namespace}:*:event:*", count=1_000):
        if await store.hget(key, "document_id") == document_id.encode():
            return key
    return None


async def test_outcomes_are_found_after_redis_lost_the_event_states(installation, services, freshline, start, folder):
    (folder / "stork.md").write_text("# Stork\n\nThe stork stands on one leg.\n")
    (folder / "torn.pdf").write_bytes(b"no PDF")
    namespace = installation.settings.namespace
    async with redis.asyncio.Redis.from_url(installation.settings.redis.url) as store:
        with stopped(installation, "prepare"):
            report, _ = freshline("ingest", folder, "--wait", "--timeout", "0", status=3)
            for one in report["in_progress"]:
                assert await store.delete(f"{namespace}:{{local}}:event:{one['event_id']}")
            other = folder.with_name("other")
            other.mkdir()
            (other / "crane.md").write_text("# Crane\n\nThe crane dances.\n")
            running = start("ingest", other, "--wait", "--json")
            while not (key := await state_of(store, namespace, "crane.md")):
                assert running.poll() is None
            await store.delete(key)
        stdout, stderr = running.communicate(timeout=200)
        assert running.returncode == 0, stderr
        assert json.loads(stdout)["outcomes"] == {"done": 1}
        requests = [{"event_id": one["event_id"], "position": one["position"]} for one in report["in_progress"]]
        async with httpx.AsyncClient(base_url=installation.ingest_url, timeout=60) as client:
            for one in requests:
                await services.ended(one["event_id"], one["position"])
            read = (await client.post("/v1/events:batch-get", json={"events": requests})).json()
            outcomes = {one["document_id"]: (one["outcome"], one["passages"]) for one in read["events"]}
            assert outcomes == {"stork.md": ("done", 1), "torn.pdf": ("dead_letter", None)}
            await store.delete(*[f"{namespace}:{{local}}:event:{one['event_id']}" for one in requests])
            blind = [{"event_id": one["event_id"]} for one in requests]
            read = (await client.post("/v1/events:batch-get", json={"events": blind})).json()
            assert (read["events"], read["unknown"]) == ([], [one["event_id"] for one in requests])


async def test_a_superseded_deletion_fails(installation, services, freshline):
    await services.ended((await services.put("kept.md", b"# Kept\n\nOld toad.\n", "text/markdown"))["event_id"])
    headers = {"content-type": "text/markdown", "freshline-revision": str(2**52)}
    async with httpx.AsyncClient(base_url=installation.ingest_url) as client:
        newer = await client.put("/v1/documents/kept.md", content="# Kept\n\nThe toad sings.\n", headers=headers)
    assert newer.status_code == 202, newer.text
    await services.ended(newer.json()["event_id"])
    report, stderr = freshline("delete", "kept.md", status=1)
    assert report["outcome"] == "superseded"
    assert "kept.md is not deleted: superseded: " in stderr
    assert (await found(services, "Which toad sings?"))[0] == "kept.md"
    with stopped(installation, "prepare"):
        assert freshline("delete", "other.md", "--no-wait", status=0)[0]["document_id"] == "other.md"


def test_a_replayed_dead_letter_that_fails_again_is_reported(freshline, folder):
    (folder / "still.pdf").write_bytes(b"no PDF still")
    freshline("ingest", folder, "--wait", status=1)
    dead_letters = freshline("dead-letters", "list", "--kind", "broken", status=0)[0]["dead_letters"]
    [dead_letter] = [one["dead_letter_id"] for one in dead_letters if one["document_id"] == "still.pdf"]
    report, stderr = freshline("dead-letters", "replay", dead_letter, "--wait", status=1)
    assert [one["outcome"] for one in report["replayed"]] == ["dead_letter"]
    assert "1 failed again" in stderr


def test_a_watched_folder_reports_the_outcome_of_each_event(start, folder):
    (folder / "torn-1.pdf").write_bytes(b"no PDF")
    process = start("ingest", folder, "--watch")
    too_late = threading.Timer(90, process.kill)
    too_late.start()
    stderr = ""
    wanted = {"torn-1.pdf": "not processed: torn-1.pdf: ", "void.md": "void.md: 0 passages: no text"}
    for name, line in wanted.items():
        while line not in stderr:
            read = process.stderr.readline()
            assert read, stderr
            stderr += read
        if name == "torn-1.pdf":
            (folder / "void.md").write_text("\n")
    too_late.cancel()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
