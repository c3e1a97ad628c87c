"""The demo command with real servers and documents."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.local import Stack, StackConfig

pytestmark = pytest.mark.stack

COMMAND = (sys.executable, "-m", "freshline", "demo", "--once", "--json", "--data")


@pytest.fixture
def home() -> Iterator[Path]:
    """Data directory of the demo, accessible to servers of another user."""
    folder = Path(tempfile.mkdtemp(prefix="freshline-tests-", dir="/var/tmp"))
    folder.chmod(0o711)
    yield folder / "demo"
    if (folder / "demo").exists():
        Stack.open(StackConfig(data_dir=folder / "demo")).down()
    shutil.rmtree(folder)


@pytest.fixture
def handbook(tmp_path: Path) -> Path:
    folder = tmp_path / "handbook"
    folder.mkdir()
    (folder / "travel.md").write_text("# Travel\n\nYou may work from abroad for 30 days a year.\n")
    (folder / "leave.md").write_text("# Leave\n\nAsk your lead for leave two weeks before.\n")
    return folder


def processes(home: Path) -> list[psutil.Process]:
    """The supervisor and its processes, from its state file."""
    state = json.loads((home / "state.json").read_text(encoding="utf-8"))
    identities = [state["supervisor"], *(process["identity"] for process in state["processes"])]
    return [psutil.Process(one["pid"]) for one in identities if one is not None and psutil.pid_exists(one["pid"])]


def run(home: Path, *options: str) -> dict:
    ended = subprocess.run([*COMMAND, str(home), *options], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.timeout(600)
def test_documentation_of_the_standard_library(home: Path) -> None:
    report = run(home)
    assert report["documents"] >= 200
    assert report["chunks"] > report["documents"]
    assert report["questions"] == len(report["answers"]) >= 3
    assert all(answer["sources"] and answer["repeated_from_cache"] for answer in report["answers"])
    assert {"p50", "p95", "max"} <= report["freshness_ms"].keys()
    assert 0 < report["freshness_ms"]["p50"] <= report["freshness_ms"]["p95"] <= report["freshness_ms"]["max"]
    assert report["deleted_ms"] > 0
    stages = list(report["stages_ms"].values())
    assert list(report["stages_ms"]) == ["accepted", "chunked", "embedded", "searchable", "purged"]
    assert stages == sorted(stages)
    assert processes(home) == []


@pytest.mark.timeout(600)
def test_run_after_a_killed_one(home: Path, handbook: Path) -> None:
    command = [*COMMAND, str(home), "--docs", str(handbook)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as killed:
        assert killed.stderr is not None
        for line in killed.stderr:  # ends with the process at the latest
            if line.startswith("opensearch-1: ready"):
                break
        left = processes(home)
        killed.send_signal(signal.SIGKILL)
    question = "How long may I work from abroad?"
    report = run(home, "--docs", str(handbook), "--question", question)
    assert report["documents"] == 2
    assert [answer["question"] for answer in report["answers"]] == [question]
    assert "30 days" in report["answers"][0]["answer"]
    _, alive = psutil.wait_procs(left, timeout=30)
    assert alive == []


def test_sigterm_leaves_no_process(home: Path, handbook: Path) -> None:
    demo = subprocess.Popen(
        [*COMMAND, str(home), "--docs", str(handbook)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline_s = time.monotonic() + 60
    while not (home / "state.json").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    started = processes(home)
    demo.terminate()
    assert demo.wait(timeout=120) == 130
    _, alive = psutil.wait_procs(started, timeout=30)
    assert alive == []
    assert processes(home) == []


def test_a_directory_with_other_content_is_not_changed(home: Path) -> None:
    home.mkdir()
    (home / "installation.json").write_text("{}")
    ended = subprocess.run([*COMMAND, str(home)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: {home} has other content")
    assert [file.name for file in home.iterdir()] == ["installation.json"]
