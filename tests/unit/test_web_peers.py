"""Processes of one address answer for each other."""

import asyncio
import socket
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import orjson
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from infra.web import peers as module
from infra.web.metrics import page_of_all
from infra.web.peers import PeerProcesses
from query.operations.endpoints import Operations
from query.telemetry.rolling_stats import RequestOutcome, RollingStats


@pytest.fixture
def directory():
    # Names of sockets are short; those of a test's own directory are not.
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


async def test_each_is_reported_what_the_others_know(directory):
    own = [PeerProcesses(directory, pid) for pid in (1, 2, 3)]
    async with AsyncExitStack() as ending:
        for one in own:
            await ending.enter_async_context(one.listening({"say": lambda rest, pid=one.pid: f"{pid} {rest}".encode()}))
        assert await own[0].ask("say", "hello") == {2: b"2 hello", 3: b"3 hello"}
        assert await own[0].ask("what") == {}
    assert list(directory.iterdir()) == []
    assert await own[0].ask("say") == {}


async def test_one_process_alone_asks_no_caller():
    alone = PeerProcesses()
    async with alone.listening({}):
        assert (alone.shares, await alone.ask("say")) == (False, {})


async def test_who_was_killed_is_forgotten_and_who_is_stuck_is_left_out(directory, monkeypatch):
    monkeypatch.setattr(module, "_TIMEOUT_S", 0.2)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(directory / "7.sock"))
    stuck = socket.socket(socket.AF_UNIX)
    stuck.bind(str(directory / "8.sock"))
    stuck.listen()
    with stuck:
        async with PeerProcesses(directory, 2).listening({"say": lambda _: b"here"}):
            assert await PeerProcesses(directory, 1).ask("say") == {2: b"here"}
    assert not (directory / "7.sock").exists()


async def test_a_directory_whose_name_is_too_long_leaves_each_alone(directory):
    deep = directory / ("d" * 120)
    deep.mkdir()
    async with PeerProcesses(deep, 2).listening({"say": lambda _: b"here"}):
        assert await PeerProcesses(deep, 1).ask("say") == {}


async def test_a_summary_is_of_all_processes_that_are_understood(directory):
    recents = [RollingStats(), RollingStats()]
    operations = [Operations({}, recent, peers=PeerProcesses(directory, pid)) for pid, recent in enumerate(recents)]
    now_s = asyncio.get_running_loop().time()
    for recent, took_ms in zip(recents, (10, 90), strict=True):
        recent.record_request(RequestOutcome.ANSWERED, took_ms, now_s=now_s)
    async with AsyncExitStack() as ending:
        for one in operations:
            await ending.enter_async_context(one.peers.listening(one.peer_handlers))
        await ending.enter_async_context(
            PeerProcesses(directory, 9).listening({"window_counts": lambda _: orjson.dumps({"of": "another release"})})
        )
        for one in operations:
            summary = await one.summary(60)
            assert (summary.processes, summary.requests, summary.times.mean_ms) == (2, 2, 50.0)


def registry_of(count):
    registry = CollectorRegistry()
    Counter("asked_total", "Questions.", ("by",), registry=registry).labels('a "friend"').inc(count)
    Gauge("standing", "Things.", registry=registry).set(count)
    Histogram("took_seconds", "Times.", buckets=(1, 2), registry=registry).observe(count)
    return registry


def test_samples_of_all_processes_are_on_one_page():
    pages = {pid: generate_latest(registry_of(count)) for pid, count in ((11, 1), (12, 3))}
    page = page_of_all(pages).decode()
    assert page.count("# TYPE asked_total counter") == 1
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    for process, count in (("11", 1), ("12", 3)):
        assert samples["asked_total", ("by", 'a "friend"'), ("process", process)] == count
        assert samples["standing", ("process", process)] == count
        assert samples["took_seconds_count", ("process", process)] == 1
        assert samples["took_seconds_bucket", ("le", "2.0"), ("process", process)] == (count <= 2)
