"""Sources on the command line, verified by questions: no document is forgotten, confused or wrongly deleted."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from bench.installation import BenchInstallation, installed
from freshline.services import Services, connect_services
from infra.local import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
async def installation(stack: Stack) -> AsyncIterator[BenchInstallation]:
    async with installed(stack, {"FRESHLINE_KAFKA__PARTITIONS": "3"}) as running:
        yield running


@pytest.fixture
async def services(installation: BenchInstallation) -> AsyncIterator[Services]:
    async with connect_services(installation.settings) as connected:
        yield connected


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Folder for the logs of sent documents of the commands of a test."""
    return tmp_path / "state"


@pytest.fixture
def freshline(installation: BenchInstallation, state: Path):
    """Runs a command against an installation; returns its JSON and its standard error."""

    def run(*arguments: object, status: int = 0, on: BenchInstallation = installation) -> tuple[dict, str]:
        command = [sys.executable, "-m", "freshline", *map(str, arguments), "--json"]
        environment = {**on.launcher.environment, "XDG_STATE_HOME": str(state)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == status, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return (json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}), done.stderr

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


def make(root: Path, subject: str, *names: str) -> Path:
    """Create a folder of pages about one subject."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).write_text(f"# {subject}\n\nThe {subject} of {name} is kept in the cupboard.\n")
    return root


async def found(services: Services, subject: str) -> dict[str, str]:
    """Document id → text of the passages found for a subject."""
    answer = await services.ask(f"Where is the {subject} kept?", top_k=50)
    return {one["document_id"]: one["text"] for one in answer["results"] if f"The {subject} of" in one["text"]}


def counts(summary: dict) -> tuple[int, int, int]:
    return summary["sent"], summary["unchanged"], summary["deleted"]


async def test_a_deletion_is_detected_after_the_first_documents_failed_to_parse(services, freshline, tmp_path):
    folder = make(tmp_path / "unreadable", "samovar", "keep.md", "zz-gone.md")
    for name in ("aa", "ab", "ac"):
        (folder / f"{name}.pdf").write_bytes(b"no PDF " + name.encode())
    freshline("ingest", folder, "--wait", status=1)
    assert (await found(services, "samovar")).keys() == {"keep.md", "zz-gone.md"}
    (folder / "zz-gone.md").unlink()
    summary, _ = freshline("ingest", folder, "--wait")
    assert counts(summary) == (0, 4, 1)
    assert (await found(services, "samovar")).keys() == {"keep.md"}


async def test_a_deletion_is_detected_while_workers_lag(services, installation, freshline, tmp_path):
    folder = make(tmp_path / "behind", "teapot", "behind-a.md", "behind-b.md", "behind-c.md", "behind-d.md")
    # Earlier records must not count as lag: they are committed a moment after their outcome.
    await installation.caught_up(timeout_s=60)
    with stopped(installation, "prepare"):
        summary, _ = freshline("ingest", folder, "--no-wait")
        assert counts(summary) == (4, 0, 0)
        (folder / "behind-d.md").unlink()
        summary, _ = freshline("ingest", folder, "--no-wait")
        assert counts(summary) == (0, 3, 1)
    await installation.caught_up(timeout_s=60)
    assert (await found(services, "teapot")).keys() == {"behind-a.md", "behind-b.md", "behind-c.md"}


async def test_file_names_and_contents_of_every_kind(services, freshline, tmp_path):
    names = ["line\u2028end.md", "next\u0085line.md", "form\u2029feed.md", "plain.md"]
    folder = make(tmp_path / "kinds", "kettle", *names)
    (folder / os.fsdecode(b"caf\xe9.md")).write_text("# Kettle\n\nThe kettle of nobody.\n")
    os.mkfifo(folder / "pipe.md")
    (folder / "loop.md").symlink_to("loop.md")
    (folder / "round").symlink_to(".")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.fspath(folder / "socket.md"))
        _, stderr = freshline("ingest", folder, "--wait", status=1)
    for name in ("caf\\xe9.md", "pipe.md", "loop.md", "socket.md"):
        assert f"{name}: " in stderr
    assert (await found(services, "kettle")).keys() == set(names)
    for name in names[:3]:
        (folder / name).unlink()
    (folder / "plain.md").unlink()
    os.mkfifo(folder / "plain.md")
    summary, _ = freshline("ingest", folder, "--wait", status=1)
    assert counts(summary) == (0, 0, 3)
    assert (await found(services, "kettle")).keys() == {"plain.md"}


async def test_two_folders_with_equal_file_names_do_not_affect_each_other(services, freshline, tmp_path):
    ours = make(tmp_path / "ours", "ladder", "ladder.md", "both.md")
    theirs = make(tmp_path / "theirs", "ladder", "ladder.md", "both.md", "other.md")
    (theirs / "ladder.md").write_text("# Ladder\n\nThe ladder of theirs is in the garden.\n")
    freshline("ingest", ours, "--wait")
    owner = (await services.document("ladder.md"))["connector"]
    assert owner.startswith("ours-")
    summary, stderr = freshline("ingest", theirs, "--wait", status=1)
    assert (summary["sent"], summary["failed"]) == (1, 2)
    for option in (owner, "--name", "--prefix", "--take-over"):
        assert option in stderr
    assert "of ladder.md" in (await found(services, "ladder"))["ladder.md"]
    # Deletions in their folder do not affect our documents.
    (theirs / "both.md").unlink()
    (theirs / "other.md").unlink()
    freshline("ingest", theirs, "--wait", status=1)
    assert (await found(services, "ladder")).keys() == {"ladder.md", "both.md"}
    # Both are kept with a prefix,
    freshline("ingest", theirs, "--prefix", "theirs/", "--wait")
    assert (await found(services, "ladder")).keys() == {"ladder.md", "both.md", "theirs/ladder.md"}
    (ours / "ladder.md").unlink()
    freshline("ingest", ours, "--wait")
    assert (await found(services, "ladder")).keys() == {"both.md", "theirs/ladder.md"}
    # or replaced with --take-over.
    make(theirs, "ladder", "both.md")
    (theirs / "both.md").write_text("# Ladder\n\nThe ladder of both is on the roof.\n")
    freshline("ingest", theirs, "--take-over", "--wait")
    texts = await found(services, "ladder")
    assert texts.keys() == {"both.md", "ladder.md"}
    assert "on the roof" in texts["both.md"]
    assert (await services.document("both.md"))["connector"].startswith("theirs-")
    (ours / "both.md").unlink()
    freshline("ingest", ours, "--wait", status=1)
    assert "both.md" in await found(services, "ladder")


def commit(repository: Path, message: str) -> None:
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    for arguments in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", message)):
        subprocess.run(["git", "-C", str(repository), *identity, *arguments], check=True, capture_output=True)


async def test_a_folder_followed_by_a_git_repository_with_the_same_content(services, freshline, tmp_path):
    folder = make(tmp_path / "wiki", "compass", "compass.md", "old.md")
    freshline("ingest", folder, "--wait")
    commit(folder, "first")
    (folder / "compass.md").write_text("# Compass\n\nThe compass of git points north.\n")
    commit(folder, "second")
    summary, stderr = freshline("ingest", "--git", folder, "--wait", status=1)
    assert (summary["sent"], summary["failed"]) == (0, 2)
    assert "--take-over" in stderr
    assert "cupboard" in (await found(services, "compass"))["compass.md"]
    freshline("ingest", "--git", folder, "--take-over", "--wait")
    assert "points north" in (await found(services, "compass"))["compass.md"]
    (folder / "old.md").unlink()
    (folder / "compass.md").write_text("# Compass\n\nThe compass of git points south.\n")
    commit(folder, "third")
    summary, _ = freshline("ingest", "--git", folder, "--wait")
    assert counts(summary) == (1, 0, 1)
    texts = await found(services, "compass")
    assert (texts.keys(), "points south" in texts["compass.md"]) == ({"compass.md"}, True)
    # And back: the version assigned last is the newest, for any sender.
    (folder / "compass.md").write_text("# Compass\n\nThe compass of the folder spins.\n")
    freshline("ingest", folder, "--take-over", "--wait")
    assert "spins" in (await found(services, "compass"))["compass.md"]


async def test_a_revision_that_would_never_be_searchable_is_rejected(services, freshline, tmp_path):
    make(tmp_path / "folder", "anvil", "anvil.md")
    freshline("ingest", tmp_path / "folder", "--wait")
    events = tmp_path / "history.jsonl"
    text = "# Anvil\n\nThe anvil of history is lost.\n"
    line = {"seq": 0, "type": "created", "doc_id": "anvil.md", "path": "anvil.md", "content": text}
    events.write_text(json.dumps(line) + "\n")
    _, stderr = freshline("ingest", "--events", events, "--take-over", "--wait", status=1)
    assert "would never become searchable" in stderr
    assert "cupboard" in (await found(services, "anvil"))["anvil.md"]
    freshline("ingest", "--events", events, "--prefix", "history/", "--wait")
    assert (await found(services, "anvil")).keys() == {"anvil.md", "history/anvil.md"}


async def test_a_deletion_is_detected_after_the_log_was_lost(services, freshline, tmp_path, state):
    names = [f"lost-{number}.md" for number in range(6)]
    folder = make(tmp_path / "lost", "bellows", *names)
    freshline("ingest", folder, "--wait")
    shutil.rmtree(state)
    (folder / names[0]).unlink()
    summary, _ = freshline("ingest", folder, "--wait")
    assert counts(summary) == (0, 5, 1)
    assert (await found(services, "bellows")).keys() == set(names[1:])


async def test_another_installation_receives_all_documents_and_the_first_keeps_its_log(
    services, freshline, tmp_path, stack, installation
):
    folder = make(tmp_path / "anew", "lantern", "a-lantern.md", "b-lantern.md")
    freshline("ingest", folder, "--wait")
    (folder / "a-lantern.md").unlink()
    async with installed(stack, {"FRESHLINE_KAFKA__PARTITIONS": "3"}) as other:
        summary, _ = freshline("ingest", folder, "--wait", on=other)
        assert counts(summary) == (1, 0, 0)
        async with connect_services(other.settings) as others:
            assert (await found(others, "lantern")).keys() == {"b-lantern.md"}
    summary, _ = freshline("ingest", folder, "--wait", on=installation)
    assert counts(summary) == (0, 1, 1)
    assert (await found(services, "lantern")).keys() == {"b-lantern.md"}


async def test_the_index_step_detects_ownership_conflicts_that_acceptance_cannot(services, installation):
    """The events of both sources are accepted before the document is indexed."""
    async with httpx.AsyncClient(base_url=installation.ingest_url, timeout=60) as client:

        async def put(connector: str, place: str) -> str:
            headers = {"Freshline-Connector": connector}
            text = f"# Anchor\n\nThe anchor of {connector} is kept {place}.\n"
            accepted = await client.put("/v1/documents/anchor.md", content=text, headers=headers)
            assert accepted.status_code == 202, accepted.text
            return accepted.json()["event_id"]

        with stopped(installation, "prepare"):
            first, second = await put("first", "below"), await put("second", "above")
            third = await put("first", "ashore")
        statuses = [await services.ended(event) for event in (first, second, third)]
        assert [status["outcome"] for status in statuses] == ["done", "dead_letter", "done"]
        assert "belongs to connector 'first'" in statuses[1]["reason"]
        assert "ashore" in (await found(services, "anchor"))["anchor.md"]
        refused = await client.delete("/v1/documents/anchor.md", headers={"Freshline-Connector": "second"})
        assert (refused.status_code, refused.json()["type"]) == (409, "/problems/conflict")
        # A client that is no connector may write it; then it has no owner.
        await services.ended((await client.delete("/v1/documents/anchor.md")).json()["event_id"])
        await services.ended(await put("second", "above"))
        assert "above" in (await found(services, "anchor"))["anchor.md"]
