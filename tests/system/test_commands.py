"""The commands as typed, on an installation that ``freshline up`` started."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from freshline.installation import find
from infra.settings import Settings

pytestmark = pytest.mark.stack

LEAVE = "# Leave\n\nAsk your lead for leave two weeks before.\n"
TRAVEL = "# Travel\n\nYou may work from abroad for 30 days a year.\n"
ABROAD = "How long may I work from abroad?"


def freshline(*arguments: str, status: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "freshline", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == status, (ended.stdout, ended.stderr)
    assert "Traceback" not in ended.stderr
    return ended


def output(*arguments: str, status: int = 0) -> dict:
    return json.loads(freshline(*arguments, "--json", status=status).stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """Data directory of a running installation, which the commands use by default."""
    data_dir = Path(tempfile.mkdtemp(prefix="freshline-tests-", dir="/var/tmp"))
    data_dir.chmod(0o711)
    before = dict(os.environ)
    # No variable of other tests may point the commands or the installation elsewhere.
    for name in before:
        if name.startswith("FRESHLINE_") and name != "FRESHLINE_CACHE":
            del os.environ[name]
    os.environ["FRESHLINE_HOME"] = str(data_dir)
    try:
        freshline("up", "--detach")
        yield data_dir
        pids = [process["pid"] for process in output("status")["processes"]]
        freshline("down")
        assert [pid for pid in pids if psutil.pid_exists(pid)] == []
        freshline("status", status=1)
    finally:
        freshline("down")
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(data_dir)


@pytest.fixture(scope="module")
def handbook(home: Path) -> Path:
    """An ingested folder."""
    folder = home / "handbook"
    folder.mkdir()
    (folder / "travel.md").write_text(TRAVEL)
    (folder / "leave.md").write_text(LEAVE)
    summary = output("ingest", str(folder), "--wait")
    assert (summary["sent"], summary["failed"], summary["searchable"]) == (2, 0, True)
    return folder


@pytest.fixture
def settings(handbook: Path) -> Settings:  # noqa: ARG001 - requires the ingested folder
    return find()


def index(settings: Settings) -> httpx.Client:
    return httpx.Client(base_url=settings.opensearch.url, trust_env=False)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("home")
def test_a_second_up_changes_nothing() -> None:
    before = {process["name"]: process["pid"] for process in output("status")["processes"]}
    steps = {"prepare", "index", "invalidate", "notify"}
    assert before.keys() == steps | {"kafka-1", "opensearch-1", "redis", "ingest", "query"}
    after = {process["name"]: process["pid"] for process in output("up")["processes"]}
    assert after == before


@pytest.mark.timeout(300)
def test_the_commands_use_the_required_key(settings: Settings) -> None:
    answer = output("ask", ABROAD)
    assert answer["results"][0]["document_id"] == "travel.md"
    assert "30 days" in answer["answer"]
    url = f"http://127.0.0.1:{settings.query.port}/v1/query"
    assert httpx.post(url, json={"query": ABROAD}, trust_env=False).status_code == 401


def test_only_changes_of_the_folder_are_sent(handbook: Path) -> None:
    (handbook / "leave.md").write_text(LEAVE.replace("two weeks", "one month"))
    summary = output("ingest", str(handbook), "--wait")
    assert (summary["sent"], summary["unchanged"], summary["deleted"]) == (1, 1, 0)
    assert "one month" in output("ask", "When do I ask for leave?")["answer"]


@pytest.mark.timeout(300)
def test_explain_cache_reports_a_cached_answer_and_its_drop(handbook: Path, settings: Settings) -> None:
    question = "How many days from abroad may it be?"
    before = output("explain-cache", question)
    assert (before["stored"], before["near"]) == (None, False)
    assert "Not cached." in freshline("explain-cache", question).stdout
    output("ask", question)
    assert output("ask", question)["cached"]
    cached = output("explain-cache", question)
    stored = cached["stored"]
    assert cached["near"]
    assert stored["sources"][0]["document_id"] == "travel.md"
    assert stored["size_bytes"] > 1_500
    assert 0 < stored["ttl_ms"] <= 3_600_000
    for retriever in ("vector_candidates", "lexical_candidates"):
        assert 1 <= stored[retriever]["fused"] <= stored[retriever]["kept"] <= stored[retriever]["requested"]
    assert -1 <= stored["vector_candidates"]["lowest_kept_score"] <= 1
    # Other options belong to another answer.
    assert output("explain-cache", question, "--top-k", "1")["stored"] is None
    (handbook / "travel.md").write_text(TRAVEL.replace("30 days", "40 days"))
    output("ingest", str(handbook), "--wait")
    after = output("explain-cache", question)
    assert (after["key"], after["stored"], after["near"]) == (cached["key"], None, False)
    drop = after["drops"][0]
    [event] = drop["events"]
    assert (drop["everything"], drop["documents"], event["document_id"]) == (False, ["travel.md"], "travel.md")
    assert cached["as_of"]["checked_ms"] < event["searchable_ms"] <= drop["at_ms"] + 1
    partition, _, offset = event["position"].rpartition("-")[2].partition(":")
    assert after["as_of"]["positions"][partition] >= int(offset)
    assert event["event_id"] in freshline("explain-cache", question).stdout
    (handbook / "travel.md").write_text(TRAVEL)
    output("ingest", str(handbook), "--wait")
    key = httpx.post(
        f"http://127.0.0.1:{settings.query.port}/v1/cache:explain", json={"query": question}, trust_env=False
    )
    assert key.status_code == 401


@pytest.mark.usefixtures("handbook")
def test_a_document_that_cannot_be_parsed_fails_the_command(home: Path) -> None:
    folder = home / "broken"
    folder.mkdir()
    (folder / "broken.pdf").write_bytes(b"no PDF")
    summary = output("ingest", str(folder), "--wait", status=1)
    assert summary["outcomes"] == {"dead_letter": 1}
    report = output("verify")
    assert report["ok"]
    assert report["rejected"]["examples"] == ["local/broken.pdf"]


@pytest.mark.usefixtures("handbook")
def test_lag_lists_every_step() -> None:
    lag = output("lag")
    assert lag.keys() == {"prepare", "index", "invalidate", "notify"}
    assert all(step["consumed"] for step in lag.values())


def test_an_orphaned_passage_is_found_and_removed_with_its_answers(settings: Settings) -> None:
    chunks = settings.names.chunks_alias
    with index(settings) as client:
        passage = {"query": {"term": {"document_id": "travel.md"}}}
        [hit] = client.post(f"/{chunks}/_search", json=passage).json()["hits"]["hits"]
        orphan = hit["_source"] | {"chunk_id": "stray", "document_id": "stray.md"}
        where = {"routing": "local/stray.md", "refresh": "true"}
        client.put(f"/{chunks}/_doc/stray", json=orphan, params=where).raise_for_status()
    question = "For how many days may I be abroad?"
    assert "stray.md" in [result["document_id"] for result in output("ask", question)["results"]]
    report = output("verify", status=1)
    assert report["findings"].keys() == {"orphaned_passage"}
    assert report["findings"]["orphaned_passage"]["examples"] == ["local/stray.md stray"]
    assert output("verify", "--repair")["repaired"] == {"passages removed": 1, "events sent again": 0}
    assert output("verify")["ok"]
    answer = output("ask", question)
    assert not answer["cached"]
    assert "stray.md" not in [result["document_id"] for result in answer["results"]]


@pytest.mark.usefixtures("handbook")
def test_a_deleted_document_is_not_found_after_the_command_returns() -> None:
    assert output("ask", ABROAD)["results"][0]["document_id"] == "travel.md"
    accepted = output("delete", "travel.md")
    assert accepted["document_id"] == "travel.md"
    assert "travel.md" not in [result["document_id"] for result in output("ask", ABROAD)["results"]]
    report = output("verify")
    assert report["ok"]
    assert report["tombstones"] == 1
