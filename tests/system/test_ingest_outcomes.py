"""What ``freshline ingest`` says of a run, and its exit code, beside what is found by a question afterwards."""

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
    """Starts a command with a log of sent documents of its own."""
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
    """Runs a command; its JSON and what it says beside it."""

    def run(*arguments: object, status: int) -> tuple[dict, str]:
        process = start(*arguments, "--json")
        told, said = process.communicate(timeout=200)
        assert process.returncode == status, (told, said)
        return (json.loads(told.splitlines()[-1]) if told else {}), said

    return run


@contextmanager
def stopped(installation: BenchInstallation, step: str) -> Iterator[None]:
    """No event goes past a step while the context lasts."""
    pid = installation.pids[f"worker {step}"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def pdf_without_text() -> bytes:
    """A page as a scanner makes it, with nothing on it that is text."""
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


async def test_every_event_is_asked_for_and_what_cannot_be_found_is_named(services, freshline, folder):
    for number in range(GOOD):
        # Some before and some after what is broken, so that the last event of each partition is a good one.
        (folder / f"page-{number:02}.md").write_text(f"# Page {number}\n\nThe room {number} has {number * 7} chairs.\n")
    for number in range(BROKEN):
        (folder / f"broken-{number}.pdf").write_bytes(b"no PDF at all %d" % number)
    (folder / "a-scan.pdf").write_bytes(pdf_without_text())
    (folder / "blank.md").write_text(" \n\n")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "photo.png").write_bytes(b"\x89PNG")
    told, said = freshline("ingest", folder, "--wait", status=1)
    assert (told["sent"], told["failed"], told["searchable"]) == (GOOD + BROKEN + 3, BROKEN, False)
    assert told["outcomes"] == {"done": GOOD + 3, "dead_letter": BROKEN}
    assert names(told["failures"]) == [f"broken-{number}.pdf" for number in range(BROKEN)]
    assert all("cannot read the application/pdf" in one["reason"] for one in told["failures"])
    why = {one["document_id"]: one["reason"] for one in told["without_passages"]}
    assert why.pop("a-scan.pdf").startswith("no text layer")
    assert why == {"blank.md": "no text", "empty.txt": "the document is empty"}
    assert told["passed_over"] == [{"path": "photo.png", "reason": "files named .png are not supported"}]
    assert told["under_way"] == told["superseded"] == []
    for line in ("a-scan.pdf: 0 passages: no text layer", "not processed: broken-3.pdf: ", "skipped: photo.png: "):
        assert line in said
    answers = set(await found(services, "How many chairs has the room?"))
    assert "page-37.md" in await found(services, "How many chairs has the room 37?")
    assert answers <= {f"page-{number:02}.md" for number in range(GOOD)}
    # Nothing is sent, so nothing is claimed but what the listing shows.
    again, _ = freshline("ingest", folder, "--wait", status=4)
    assert (again["sent"], again["unchanged"]) == (0, GOOD + BROKEN + 3)


async def test_good_documents_alone_are_a_success(services, freshline, folder):
    (folder / "otters.md").write_text("# Otters\n\nOtters sleep hand in hand.\n")
    told, said = freshline("ingest", folder, "--wait", status=0)
    assert (told["searchable"], told["outcomes"], told["failed"]) == (True, {"done": 1}, 0)
    assert "not" not in said
    assert (await found(services, "How do otters sleep?"))[0] == "otters.md"
    (folder / "otters.md").unlink()
    told, _ = freshline("ingest", folder, "--wait", status=0)
    assert (told["deleted"], told["searchable"], told["without_passages"]) == (1, True, [])
    assert "otters.md" not in await found(services, "How do otters sleep?")


def test_what_was_left_out_has_an_exit_code_that_can_be_allowed(freshline, folder):
    (folder / "blank-2.md").write_text("\n")
    (folder / "sheet.numbers").write_bytes(b"x")
    told, _ = freshline("ingest", folder, "--wait", status=4)
    assert (told["failed"], told["searchable"], names(told["without_passages"])) == (0, False, ["blank-2.md"])
    told, _ = freshline("ingest", folder, "--wait", "--allow-partial", status=0)
    assert [one["path"] for one in told["passed_over"]] == ["sheet.numbers"]


def test_without_waiting_what_is_known_counts(freshline, folder):
    (folder / "fine.md").write_text("# Fine\n\nIt is fine.\n")
    told, _ = freshline("ingest", folder, "--no-wait", status=0)
    assert (told["sent"], told["searchable"], told["outcomes"]) == (1, False, {})
    (folder / "movie.mov").write_bytes(b"x")
    freshline("ingest", folder, "--no-wait", status=4)
    (folder / "large.md").write_text("x" * (MAX_BYTES + 1))
    told, said = freshline("ingest", folder, "--no-wait", status=1)
    assert names(told["failures"]) == ["large.md"]
    assert "not sent: large.md: " in said


def history(path: Path, *lines: dict) -> Path:
    told = [{"path": line["doc_id"], "type": "updated", **line} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in told))
    return path


async def test_a_version_of_another_sender_is_told_apart_from_a_later_one_of_the_run(
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
    told, said = freshline("ingest", "--events", mine, "--wait", status=4)
    assert (names(told["superseded"]), told["failed"], told["searchable"]) == (["gate.md"], 0, False)
    assert told["superseded"][0]["reason"] == "version 2 is not newer than version 10"
    assert "superseded: gate.md: " in said
    assert told["outcomes"]["done"] + told["replaced"] == 2
    texts = [result["text"] for result in (await services.ask("Which colour have gate and door?"))["results"]]
    assert any("gate is green" in text for text in texts)
    assert any("door is blue" in text for text in texts)
    assert not any("is red" in text for text in texts)
    ours = history(tmp_path / "two.jsonl", {"seq": 20, "doc_id": "gate.md", "content": "# Gate\n\nIt is gold.\n"})
    told, _ = freshline("ingest", "--events", ours, "--wait", status=0)
    assert told["searchable"]


async def test_events_that_have_not_ended_in_time_are_named_and_go_on(installation, services, freshline, folder):
    for number in range(3):
        (folder / f"late-{number}.md").write_text(f"# Late {number}\n\nThe heron number {number} waits.\n")
    with stopped(installation, "prepare"):
        told, said = freshline("ingest", folder, "--wait", "--timeout", "0.5", status=3)
    assert names(told["under_way"]) == ["late-0.md", "late-1.md", "late-2.md"]
    assert (told["searchable"], told["outcomes"], told["failed"]) == (False, {}, 0)
    assert "3 events have no known outcome yet (timeout of 0.5 s)" in said
    assert "freshline lag" in said
    for one in told["under_way"]:
        assert (await services.ended(one["event_id"], one["position"]))["passages"] == 1
    assert set(names(told["under_way"])) <= set(await found(services, "Which heron waits?"))


async def state_of(store, namespace: str, document_id: str) -> bytes | None:
    """Key of the state of a document's event."""
    async for key in store.scan_iter(f"{namespace}:*:event:*", count=1_000):
        if await store.hget(key, "document_id") == document_id.encode():
            return key
    return None


async def test_a_redis_that_loses_the_states_of_events_costs_no_outcome(
    installation, services, freshline, start, folder
):
    (folder / "stork.md").write_text("# Stork\n\nThe stork stands on one leg.\n")
    (folder / "torn.pdf").write_bytes(b"no PDF")
    namespace = installation.settings.namespace
    async with redis.asyncio.Redis.from_url(installation.settings.redis.url) as store:
        with stopped(installation, "prepare"):
            told, _ = freshline("ingest", folder, "--wait", "--timeout", "0", status=3)
            for one in told["under_way"]:
                assert await store.delete(f"{namespace}:{{local}}:event:{one['event_id']}")
            other = folder.with_name("other")
            other.mkdir()
            (other / "crane.md").write_text("# Crane\n\nThe crane dances.\n")
            running = start("ingest", other, "--wait", "--json")
            while not (key := await state_of(store, namespace, "crane.md")):
                assert running.poll() is None
            await store.delete(key)
        out, said = running.communicate(timeout=200)
        assert running.returncode == 0, said
        assert json.loads(out)["outcomes"] == {"done": 1}
        asked = [{"event_id": one["event_id"], "position": one["position"]} for one in told["under_way"]]
        async with httpx.AsyncClient(base_url=installation.ingest_url, timeout=60) as client:
            for one in asked:
                await services.ended(one["event_id"], one["position"])
            read = (await client.post("/v1/events:batch-get", json={"events": asked})).json()
            outcomes = {one["document_id"]: (one["outcome"], one["passages"]) for one in read["events"]}
            assert outcomes == {"stork.md": ("done", 1), "torn.pdf": ("dead_letter", None)}
            await store.delete(*[f"{namespace}:{{local}}:event:{one['event_id']}" for one in asked])
            blind = [{"event_id": one["event_id"]} for one in asked]
            read = (await client.post("/v1/events:batch-get", json={"events": blind})).json()
            assert (read["events"], read["unknown"]) == ([], [one["event_id"] for one in asked])


async def test_a_deletion_that_changes_nothing_is_no_success(installation, services, freshline):
    await services.ended((await services.put("kept.md", b"# Kept\n\nOld toad.\n", "text/markdown"))["event_id"])
    headers = {"content-type": "text/markdown", "freshline-revision": str(2**52)}
    async with httpx.AsyncClient(base_url=installation.ingest_url) as client:
        newer = await client.put("/v1/documents/kept.md", content="# Kept\n\nThe toad sings.\n", headers=headers)
    assert newer.status_code == 202, newer.text
    await services.ended(newer.json()["event_id"])
    told, said = freshline("delete", "kept.md", status=1)
    assert told["outcome"] == "superseded"
    assert "kept.md is not deleted: superseded: " in said
    assert (await found(services, "Which toad sings?"))[0] == "kept.md"
    with stopped(installation, "prepare"):
        assert freshline("delete", "other.md", "--no-wait", status=0)[0]["document_id"] == "other.md"


def test_a_replayed_dead_letter_that_fails_again_is_told(freshline, folder):
    (folder / "still.pdf").write_bytes(b"no PDF still")
    freshline("ingest", folder, "--wait", status=1)
    dead_letters = freshline("dead-letters", "list", "--kind", "broken", status=0)[0]["dead_letters"]
    [dead_letter] = [one["dead_letter_id"] for one in dead_letters if one["document_id"] == "still.pdf"]
    told, said = freshline("dead-letters", "replay", dead_letter, "--wait", status=1)
    assert [one["outcome"] for one in told["replayed"]] == ["dead_letter"]
    assert "1 failed again" in said


def test_a_watched_folder_tells_how_each_event_ended(start, folder):
    (folder / "torn-1.pdf").write_bytes(b"no PDF")
    process = start("ingest", folder, "--watch")
    too_late = threading.Timer(90, process.kill)
    too_late.start()
    said = ""
    wanted = {"torn-1.pdf": "not processed: torn-1.pdf: ", "void.md": "void.md: 0 passages: no text"}
    for name, line in wanted.items():
        while line not in said:
            read = process.stderr.readline()
            assert read, said
            said += read
        if name == "torn-1.pdf":
            (folder / "void.md").write_text("\n")
    too_late.cancel()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
