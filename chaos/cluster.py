"""The installation under test: three brokers, three OpenSearch nodes, Redis, and two of each Freshline process.

Each worker connects to its stores through its own proxies. Services and the checker connect directly. All processes end
with this one in any case.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from chaos.proxies import Proxies
from chaos.recovery import NotRecovered
from freshline.installation import settings_from
from infra.kafka.port import StreamUnavailable
from infra.kafka.provision import StreamAdmin
from infra.kafka.security import client_options
from infra.local import AppProcess, Listener, Phase, Say, Stack, StackConfig
from infra.local.fetch import faketime, toxiproxy
from infra.local.ports import free
from infra.opensearch.client import connect
from infra.settings import Settings
from schemas.topics import DOCUMENTS, TOPICS
from streams.topology import TOPOLOGY, StepName

BROKERS: Final = ("kafka-1", "kafka-2", "kafka-3")
INDEXES: Final = ("opensearch-1", "opensearch-2")
NODES: Final = (*INDEXES, "opensearch-3")
"""OpenSearch nodes; the last one is voting-only."""
REDIS: Final = "redis"
WORKERS: Final = tuple(f"{step}-{number}" for step in StepName for number in (1, 2))
SERVICES: Final = ("ingest-1", "ingest-2", "query-1", "query-2")
PROCESSES: Final = (*WORKERS, *SERVICES, *BROKERS, *NODES, REDIS)
STORES: Final = ("kafka", "opensearch", REDIS)
CLOCKED: Final = "ingest-2"
"""The replica with an adjustable clock."""

_FIRST_PORT: Final = 23_000
_DISK_BYTES: Final = 64_000_000
_PARTITIONS: Final = 4
_START_S: Final = 300.0
"""Start timeout of a process: fifteen processes start concurrently, possibly on two cores."""
_POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Cluster:
    """The running installation.

    Attributes:
        settings: settings for direct connections to the stores.
        disk: file system of the blob store, or the reason why it has none of its own.
        clock: file with the clock offset of one replica.
    """

    stack: Stack
    settings: Settings
    proxies: Proxies
    ingest_urls: tuple[str, ...]
    query_urls: tuple[str, ...]
    disk: Path | str
    clock: Path

    async def pid(self, name: str) -> int:
        """Process id."""
        return await asyncio.to_thread(self.stack.pid, name)

    async def leader(self) -> str:
        """The broker that leads the first partition of the document stream."""
        client = AIOKafkaAdminClient(**client_options(self.settings.kafka))
        try:
            await client.start()
            [found] = await client.describe_topics([self.settings.names.topic(DOCUMENTS.name)])
        finally:
            await client.close()
        return next(f"kafka-{one['leader']}" for one in found["partitions"] if one["partition"] == 0)

    async def index_leader(self) -> str:
        """The OpenSearch node that is cluster manager."""
        client = connect(self.settings.opensearch)
        try:
            [leader] = await client.cat.cluster_manager(params={"format": "json"})
        finally:
            await client.close()
        return str(leader["node"])

    async def lag(self) -> int:
        """Uncommitted records of all steps.

        Raises:
            StreamUnavailable: no broker responds.
        """
        try:
            async with StreamAdmin(self.settings) as admin:
                lags = [await admin.lag(row.reads, self.settings.names.group(step)) for step, row in TOPOLOGY.items()]
        except KafkaError as error:
            raise StreamUnavailable(str(error)) from error
        return sum(one.records for lag in lags for one in lag)

    async def wait_until_drained(self, *, timeout_s: float) -> None:
        """Wait until no step lags.

        Raises:
            NotRecovered: a step still lags after ``timeout_s``.
        """
        await self._until(self._lagging, timeout_s)

    async def wait_until_healthy(self, *, timeout_s: float) -> None:
        """Wait until every process is ready and every replica is in sync.

        Raises:
            NotRecovered: something is missing after ``timeout_s``.
        """
        await self._until(self._missing, timeout_s)

    async def _until(self, missing: Any, timeout_s: float) -> None:
        last = "no observation"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        last = await missing()
                    except (KafkaError, StreamUnavailable, httpx.HTTPError) as error:
                        last = repr(error)
                    if not last:
                        return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise NotRecovered(f"after {timeout_s:.0f} s: {last}") from None

    async def _lagging(self) -> str:
        lag = await self.lag()
        return f"{lag} uncommitted records" if lag else ""

    async def _missing(self) -> str:
        status = await asyncio.to_thread(self.stack.status)
        if not_ready := [one.name for one in status.processes if one.state is not Phase.READY]:
            return f"not ready: {', '.join(not_ready)}"
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            for url in self.settings.opensearch.url.split(","):
                health = (await client.get(f"{url}/_cluster/health")).json()
                if health["status"] != "green" or health["number_of_nodes"] < len(NODES):
                    return f"OpenSearch is {health['status']} with {health['number_of_nodes']} nodes"
            for url in (*self.ingest_urls, *self.query_urls):
                if (await client.get(f"{url}/ready")).is_error:
                    return f"{url} is not ready"
        return await self._unreplicated() or await self._unconsumed()

    async def _unreplicated(self) -> str:
        client = AIOKafkaAdminClient(**client_options(self.settings.kafka))
        try:
            await client.start()
            found = await client.describe_topics([self.settings.names.topic(topic.name) for topic in TOPICS])
        finally:
            await client.close()
        short = [
            f"{topic['topic']} {one['partition']}"
            for topic in found
            for one in topic["partitions"]
            if len(one["isr"]) < len(BROKERS)
        ]
        return f"not in sync: {', '.join(short[:3])}" if short else ""

    async def _unconsumed(self) -> str:
        async with StreamAdmin(self.settings) as admin:
            for step in StepName:
                if not await admin.is_consumed(self.settings.names.group(step)):
                    return f"{step} has no worker"
        return ""


@asynccontextmanager
async def running(home: Path, say: Say) -> AsyncIterator[Cluster]:
    """Start the installation in an empty directory. Everything but the directory is removed with the context.

    Raises:
        StackError: it cannot start, or a fault injection tool is missing.
    """
    program, library = await asyncio.to_thread(lambda: (toxiproxy(say), faketime(say)))
    clock = home / "clock"
    clock.write_text("+0")
    disk = await _own_disk(home / "disk")
    plan = _plan(home, clock, library, disk if isinstance(disk, Path) else home)
    proxies = await Proxies.start(program, plan.control, plan.links, home)
    stack = Stack.open(plan.config)
    try:
        await asyncio.to_thread(lambda: stack.up(say=say))
        environment = stack.environment() | plan.common
        yield Cluster(stack, settings_from(environment), proxies, plan.urls("ingest"), plan.urls("query"), disk, clock)
    finally:
        await asyncio.to_thread(stack.down)
        await proxies.close()
        if isinstance(disk, Path):
            await _run("umount", "-l", str(disk))


@dataclass(frozen=True, slots=True)
class _Plan:
    config: StackConfig
    common: dict[str, str]
    links: Mapping[str, tuple[int, int]]
    control: int
    services: Mapping[str, int]

    def urls(self, service: str) -> tuple[str, ...]:
        return tuple(f"http://127.0.0.1:{self.services[f'{service}-{number}']}" for number in (1, 2))


def _plan(home: Path, clock: Path, library: Path, disk: Path) -> _Plan:
    servers = [*BROKERS, *(f"{name}-controller" for name in BROKERS), *NODES]
    servers += [*(f"{name}-transport" for name in NODES), REDIS]
    stores = (*BROKERS, *INDEXES, REDIS)
    wanted = 1 + len(servers) + len(SERVICES) + len(WORKERS) * (len(stores) + len(BROKERS))
    ports = iter(free(wanted, first=_FIRST_PORT))
    control = next(ports)
    server_ports = {name: next(ports) for name in servers}
    services = {name: next(ports) for name in SERVICES}
    common = {
        "FRESHLINE_KAFKA__PARTITIONS": str(_PARTITIONS),
        "FRESHLINE_OPENSEARCH__SHARDS": "2",
        "FRESHLINE_BLOBS__PATH": str(disk / "blobs"),
        "FRESHLINE_EMBEDDING__THREADS": "1",
        "FRESHLINE_LOG_LEVEL": "warning",
    }
    links: dict[str, tuple[int, int]] = {}
    listeners, apps = [], []
    for worker in WORKERS:
        entries = {name: next(ports) for name in stores}
        targets = {name: next(ports) for name in BROKERS}
        links |= {f"{worker}_{name}": (entries[name], targets.get(name, server_ports.get(name, 0))) for name in stores}
        listeners.append(Listener(name=worker.replace("-", "").upper(), ports=targets, advertised_ports=entries))
        through = {
            "FRESHLINE_KAFKA__BOOTSTRAP_SERVERS": ",".join(f"127.0.0.1:{entries[name]}" for name in BROKERS),
            "FRESHLINE_OPENSEARCH__URL": ",".join(f"http://127.0.0.1:{entries[name]}" for name in INDEXES),
            "FRESHLINE_REDIS__URL": f"redis://127.0.0.1:{entries[REDIS]}/0",
        }
        apps.append(AppProcess(name=worker, argv=_command("worker", worker[:-2]), env=common | through))
    for name, port in services.items():
        service = name[:-2]
        env = common | {f"FRESHLINE_{service.upper()}__PORT": str(port)}
        if name == CLOCKED:
            env |= _faketime(library, clock)
        url = f"http://127.0.0.1:{port}/ready"
        apps.append(AppProcess(name=name, argv=_command("serve", service), env=env, ready_url=url))
    config = StackConfig(
        nodes=3,
        data_dir=home,
        ports=server_ports,
        apps=tuple(apps),
        listeners=tuple(listeners),
        start_timeout_s=_START_S,
    )
    return _Plan(config, common, links, control, services)


def _faketime(library: Path, clock: Path) -> dict[str, str]:
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        # Only the wall clock jumps, as on a real machine.
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def _command(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", "freshline", *arguments)


async def _own_disk(place: Path) -> Path | str:
    """Mount a small file system for the blob store, which can be filled. Returns the reason if that fails."""
    await asyncio.to_thread(place.mkdir)
    if os.geteuid() != 0:
        return "only root can mount a file system to fill"
    error = await _run("mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(place))
    return error or place


async def _run(*command: str) -> str:
    """Run a command. Returns its error output if it fails, else nothing."""
    try:
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"{command[0]} failed"
