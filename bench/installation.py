"""A complete installation for one measurement, with its own namespace and processes, removed afterwards."""

import asyncio
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import psutil

from freshline.installation import settings_from
from infra.kafka.provision import StreamAdmin
from infra.local import Stack
from infra.opensearch.client import connect
from infra.opensearch.provision import delete_indices
from infra.settings import Settings
from streams.topology import TOPOLOGY

_READY_S: Final = 240.0
_STOP_S: Final = 20.0
_POLL_S: Final = 0.05
_POLL_MAX_S: Final = 0.5


class BenchmarkFailed(Exception):
    """The measurement failed. The message describes what to check."""


@dataclass(frozen=True, slots=True)
class BenchInstallation:
    """A running installation.

    Attributes:
        settings: settings of its processes.
        ingest_url: base URL of the ingest service.
        query_url: base URL of the query service.
        pids: process ids of servers and Freshline processes.
        launcher: starts additional processes.
        home: directory of its logs and blobs.
    """

    settings: Settings
    ingest_url: str
    query_url: str
    pids: Mapping[str, int]
    launcher: "ProcessLauncher"
    home: Path

    @asynccontextmanager
    async def workers(self) -> AsyncIterator[None]:
        """One additional worker per step for the duration of the context."""
        started = [await self.launcher.start("worker", str(step)) for step in TOPOLOGY]
        try:
            yield
        finally:
            await _end(started)

    def cpu_s(self) -> dict[str, float]:
        """Processor time used so far by each process with its children, and by this process."""
        return {name: cpu_s(pid) for name, pid in {**self.pids, "this benchmark": os.getpid()}.items()}

    async def caught_up(self, *, timeout_s: float, on_lag: Callable[[int], None] = lambda _lag: None) -> None:
        """Wait until every step has committed all records.

        Args:
            timeout_s: maximum time.
            on_lag: called with the lag of a step, at each poll.

        Raises:
            BenchmarkFailed: a step still lags after ``timeout_s``.
        """
        try:
            async with asyncio.timeout(timeout_s), StreamAdmin(self.settings) as admin:
                for step, row in TOPOLOGY.items():
                    group = self.settings.names.group(step)
                    while lag := sum(one.records for one in await admin.lag(row.reads, group)):
                        on_lag(lag)
                        # Polling costs the brokers time: the interval grows with the lag.
                        await asyncio.sleep(min(_POLL_S * (1 + lag / 10), _POLL_MAX_S))
        except TimeoutError:
            raise BenchmarkFailed(f"the workers still lag after {timeout_s:.0f} s") from None

    async def embedded_count(self) -> int:
        """Number of texts embedded so far. Each leaves one stored vector."""
        client = connect(self.settings.opensearch)
        try:
            index = self.settings.names.vectors_index
            await client.indices.refresh(index=index)
            return int((await client.count(index=index))["count"])
        finally:
            await client.close()


@asynccontextmanager
async def installed(
    stack: Stack,
    overrides: Mapping[str, str] | None = None,
    *,
    keep: str | None = None,
    query_processes: int = 1,
) -> AsyncIterator[BenchInstallation]:
    """Start ingest, query and one worker per step on a running stack; remove everything with the context.

    Args:
        stack: a running stack.
        overrides: settings that override those of the stack.
        keep: name under which the data remains on the stack, for reuse. Without it, the data is removed.
        query_processes: query processes behind one address.

    Raises:
        BenchmarkFailed: a process did not become ready. The message contains the end of its log.
    """
    home = await asyncio.to_thread(_home, stack, keep)
    ports = {"INGEST": free_port(), "QUERY": free_port()}
    environment = stack.environment() | {
        "FRESHLINE_NAMESPACE": f"bench-{keep or secrets.token_hex(4)}",
        "FRESHLINE_BLOBS__PATH": str(home / "blobs"),
        "FRESHLINE_INGEST__PORT": str(ports["INGEST"]),
        "FRESHLINE_QUERY__PORT": str(ports["QUERY"]),
        "FRESHLINE_LOG_LEVEL": "warning",
        **(overrides or {}),
    }
    launcher = ProcessLauncher(home, os.environ | environment)
    settings = settings_from(environment)
    processes: list[asyncio.subprocess.Process] = []
    try:
        # One worker process per step, as in a default installation.
        commands = [("worker", str(step)) for step in TOPOLOGY] + [("serve", "ingest"), _query_command(query_processes)]
        processes += [await launcher.start(*command) for command in commands]
        pids = {one.name: one.pid for one in stack.status().processes if one.pid is not None}
        pids |= {" ".join(command[:2]): process.pid for command, process in zip(commands, processes, strict=True)}
        ingest_url, query_url = (f"http://127.0.0.1:{ports[name]}" for name in ("INGEST", "QUERY"))
        installation = BenchInstallation(settings, ingest_url, query_url, pids, launcher, home)
        await _await_ready(installation, processes, home)
        yield installation
    finally:
        await _end(processes)
        if keep is None:
            await _remove(settings)
            await asyncio.to_thread(shutil.rmtree, home)


def _query_command(processes: int) -> tuple[str, ...]:
    return ("serve", "query") if processes == 1 else ("serve", "query", "--processes", str(processes))


def cpu_s(pid: int) -> float:
    """Processor time used so far by a process and its children, ended ones included."""
    root = psutil.Process(pid)
    times = root.cpu_times()
    used = times.user + times.system + times.children_user + times.children_system
    running = [one.cpu_times() for one in root.children(recursive=True)] if pid != os.getpid() else []
    return used + sum(one.user + one.system for one in running)


def _home(stack: Stack, keep: str | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="freshline-bench-"))
    home = stack.config.data_dir / "bench" / keep
    home.mkdir(parents=True, exist_ok=True)
    return home


@dataclass(frozen=True, slots=True)
class ProcessLauncher:
    """Starts processes of an installation.

    Attributes:
        home: directory of their logs.
        environment: their environment, with all settings.
    """

    home: Path
    environment: Mapping[str, str]

    async def start(self, *command: str) -> asyncio.subprocess.Process:
        """Start a freshline command."""
        with (self.home / f"{'-'.join(command)}.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-m", "freshline", *command, env=self.environment, stdout=log, stderr=log
            )


async def _end(processes: Sequence[asyncio.subprocess.Process]) -> None:
    for process in processes:
        if process.returncode is None:
            process.terminate()
    for process in processes:
        try:
            await asyncio.wait_for(process.wait(), _STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _await_ready(
    installation: BenchInstallation, processes: Sequence[asyncio.subprocess.Process], home: Path
) -> None:
    try:
        async with (
            asyncio.timeout(_READY_S),
            httpx.AsyncClient() as client,
            StreamAdmin(installation.settings) as admin,
        ):
            while not await _is_ready(installation, client, admin):
                if any(process.returncode is not None for process in processes):
                    raise BenchmarkFailed(f"a process ended while starting:\n{_log_tails(home)}")
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise BenchmarkFailed(f"not ready after {_READY_S:.0f} s:\n{_log_tails(home)}") from None


async def _is_ready(installation: BenchInstallation, client: httpx.AsyncClient, admin: StreamAdmin) -> bool:
    """Both services are ready, and each step has partitions, so that the first event does not wait for a rebalance."""
    for url in (installation.ingest_url, installation.query_url):
        if not await _answers(client, url):
            return False
    groups = [installation.settings.names.group(step) for step in TOPOLOGY]
    return all([await admin.is_consumed(group) for group in groups])


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/ready")).is_success
    except httpx.TransportError:
        return False


async def _remove(settings: Settings) -> None:
    async with StreamAdmin(settings) as admin:
        await admin.delete_topics()
    await delete_indices(settings)


def free_port() -> int:
    """A free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _log_tails(home: Path) -> str:
    tails = []
    for log in sorted(home.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-8:]
        tails.append("\n".join([f"--- {log.name}", *lines]))
    return "\n".join(tails)
