"""Fault injection and its reversal."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from chaos.cluster import BROKERS, CLOCKED, INDEXES, NODES, PROCESSES, STORES, WORKERS, Cluster
from chaos.schedule import Fault, Kind

LEADER: Final = "kafka-leader"
"""The broker that leads at that time."""

INDEX_LEADER: Final = "opensearch-leader"
"""The OpenSearch node that is cluster manager at that time."""

TARGETS: Final = (*PROCESSES, LEADER, INDEX_LEADER)
LINKS: Final = tuple(
    f"{worker} {store}"
    for worker in WORKERS
    for store in STORES
    if store != "opensearch" or not worker.startswith("prepare")  # the only step without OpenSearch
)
_CLOCK_JUMPS_S: Final = (-86_400, -3_600, 3_600, 86_400)
_HEALTHY_S: Final = 180.0


def single_targets(cluster: Cluster) -> dict[Kind, Sequence[str]]:
    """Supported kinds that apply to neither processes nor links, with their targets."""
    possible: dict[Kind, Sequence[str]] = {Kind.CLOCK_JUMP: (CLOCKED,), Kind.ROLLING_RESTART: ("",)}
    return possible | ({Kind.DISK_FULL: ("blobs",)} if isinstance(cluster.disk, Path) else {})


def unsupported_faults(cluster: Cluster) -> Mapping[str, str]:
    """Kinds that are not supported here → reason."""
    return {} if isinstance(cluster.disk, Path) else {str(Kind.DISK_FULL): cluster.disk}


@asynccontextmanager
async def injected(cluster: Cluster, fault: Fault) -> AsyncIterator[str]:
    """Inject a fault for the duration of the context. Yields the actual target."""
    undo: Callable[[], Awaitable[object]] = _nothing
    match fault.kind:
        case Kind.KILL:
            target = await _resolve_target(cluster, fault)
            _signal(await cluster.pid(target), signal.SIGKILL)
        case Kind.PAUSE:
            target = await _resolve_target(cluster, fault)
            pid = await cluster.pid(target)
            _signal(pid, signal.SIGSTOP)
            undo = partial(asyncio.to_thread, _signal, pid, signal.SIGCONT)
        case Kind.DISK_FULL:
            target = "blobs"
            filler = _disk(cluster) / "filler"
            await asyncio.to_thread(_fill, filler)
            undo = partial(asyncio.to_thread, filler.unlink)
        case Kind.CLOCK_JUMP:
            offset_s = _CLOCK_JUMPS_S[fault.number % len(_CLOCK_JUMPS_S)]
            target = f"{CLOCKED} by {offset_s:+d} s"
            cluster.clock.write_text(f"{offset_s:+d}")
            undo = partial(asyncio.to_thread, cluster.clock.write_text, "+0")
        case Kind.ROLLING_RESTART:
            target = "everything"
            await _restart_all(cluster)
        case _:
            target = fault.target
            for name in _proxied(*target.split()):
                await cluster.proxies.inject(name, fault.kind)
            undo = cluster.proxies.reset
    try:
        yield target
    finally:
        await undo()


async def _nothing() -> None:
    """A killed process is restarted by its supervisor."""


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended and was replaced
        os.kill(pid, number)


async def _resolve_target(cluster: Cluster, fault: Fault) -> str:
    if fault.target == LEADER:
        return await cluster.leader()
    return await cluster.index_leader() if fault.target == INDEX_LEADER else fault.target


def _proxied(worker: str, store: str) -> list[str]:
    nodes = {"kafka": BROKERS, "opensearch": INDEXES}.get(store, (store,))
    return [f"{worker}_{node}" for node in nodes]


def _fill(filler: Path) -> None:
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65_536))


def _disk(cluster: Cluster) -> Path:
    if not isinstance(cluster.disk, Path):
        raise TypeError(f"no file system to fill: {cluster.disk}")
    return cluster.disk


async def _restart_all(cluster: Cluster) -> None:
    """Rolling restart: servers are restarted only while the cluster is healthy."""
    for name in PROCESSES:
        await asyncio.to_thread(cluster.stack.restart, name)
        if name in {*BROKERS, *NODES}:
            await cluster.wait_until_healthy(timeout_s=_HEALTHY_S)
