"""The chaos command on real processes, in a short run."""

import json
import subprocess
import sys

import psutil
import pytest

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

COMMAND = (sys.executable, "-m", "freshline", "chaos", "--json")


def remaining_processes() -> list[psutil.Process]:
    """Processes of any run: their arguments or environment name its directory."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if any("/freshline-chaos-" in word for word in words):
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def no_remaining_processes():
    before = remaining_processes()
    yield
    _, alive = psutil.wait_procs([process for process in remaining_processes() if process not in before], timeout=30)
    assert alive == []


def test_all_guarantees_hold_under_faults():
    ended = subprocess.run([*COMMAND, "--seed", "7", "--minutes", "0.6"], capture_output=True, text=True, check=False)
    assert ended.stdout, ended.stderr
    report = json.loads(ended.stdout.splitlines()[-1])
    assert ended.returncode == 0, report
    assert (report["lost"], report["stale"], report["resurrected"], report["other_violations"]) == (0, 0, 0, 0)
    assert report["not_recovered"] == []
    assert report["seed"] == 7
    assert report["faults"] >= 2
    assert "full replay" in report["by_fault"]
    assert report["events"] >= report["accepted"] > 0
    assert sum(report["outcomes"].values()) == report["events"]
    assert report["queries"] > report["failed_queries"]
    assert report["index_checks"] > 0
    assert "seed 7" in ended.stderr


def test_a_stopped_run_leaves_no_process():
    with subprocess.Popen([*COMMAND, "--seed", "1"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith("redis: ready"):
                run.terminate()
        assert run.wait(timeout=120) == 130
