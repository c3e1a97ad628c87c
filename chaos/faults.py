"""Faults, done and undone."""

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
"""Whichever broker leads at the moment."""

INDEX_LEADER: Final = "opensearch-leader"
"""Whichever OpenSearch node leads."""

TARGETS: Final = (*PROCESSES, LEADER, INDEX_LEADER)
LINKS: Final = tuple(
    f"{worker} {store}"
    for worker in WORKERS
    for store in STORES
    if store != "opensearch" or not worker.startswith("prepare")  # the only step that asks nothing of it
)
_CLOCK_JUMPS_S: Final = (-86_400, -3_600, 3_600, 86_400)
_WHOLE_S: Final = 180.0


def single_targets(cluster: Cluster) -> dict[Kind, Sequence[str]]:
    """Kinds that strike one thing only, and which of them are possible here."""
    possible: dict[Kind, Sequence[str]] = {Kind.CLOCK_JUMP: (CLOCKED,), Kind.ROLLING_RESTART: ("",)}
    return possible | ({Kind.DISK_FULL: ("blobs",)} if isinstance(cluster.disk, Path) else {})


def impossible(cluster: Cluster) -> Mapping[str, str]:
    """Kinds that cannot be done here, and why."""
    return {} if isinstance(cluster.disk, Path) else {str(Kind.DISK_FULL): cluster.disk}


@asynccontextmanager
async def injected(cluster: Cluster, fault: Fault) -> AsyncIterator[str]:
    """The fault, until the context is left; yields what was struck."""
    undo: Callable[[], Awaitable[object]] = _nothing
    match fault.kind:
        case Kind.KILL:
            struck = await _struck(cluster, fault)
            _signal(await cluster.pid(struck), signal.SIGKILL)
        case Kind.PAUSE:
            struck = await _struck(cluster, fault)
            pid = await cluster.pid(struck)
            _signal(pid, signal.SIGSTOP)
            undo = partial(asyncio.to_thread, _signal, pid, signal.SIGCONT)
        case Kind.DISK_FULL:
            struck = "blobs"
            filler = _disk(cluster) / "filler"
            await asyncio.to_thread(_fill, filler)
            undo = partial(asyncio.to_thread, filler.unlink)
        case Kind.CLOCK_JUMP:
            offset_s = _CLOCK_JUMPS_S[fault.number % len(_CLOCK_JUMPS_S)]
            struck = f"{CLOCKED} by {offset_s:+d} s"
            cluster.clock.write_text(f"{offset_s:+d}")
            undo = partial(asyncio.to_thread, cluster.clock.write_text, "+0")
        case Kind.ROLLING_RESTART:
            struck = "everything"
            await _restart_all(cluster)
        case _:
            struck = fault.target
            for name in _proxied(*struck.split()):
                await cluster.proxies.spoil(name, fault.kind)
            undo = cluster.proxies.mend
    try:
        yield struck
    finally:
        await undo()


async def _nothing() -> None:
    """What undoes a kill: its supervisor does."""


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself, and another was started
        os.kill(pid, number)


async def _struck(cluster: Cluster, fault: Fault) -> str:
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
        raise TypeError(f"there is no disk to fill: {cluster.disk}")
    return cluster.disk


async def _restart_all(cluster: Cluster) -> None:
    """One after the other, each when the one before is back, as a careful operator does."""
    for name in PROCESSES:
        await asyncio.to_thread(cluster.stack.restart, name)
        if name in {*BROKERS, *NODES}:
            await cluster.whole(timeout_s=_WHOLE_S)
