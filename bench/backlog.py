"""Memory of the workers during a backlog."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypedDict

import psutil

from bench.installation import BenchInstallation, installed
from infra.blobs import open_blob_store
from infra.kafka.codec import encode_event
from infra.kafka.producer import KafkaProducer
from infra.kafka.provision import StreamAdmin
from infra.local import Stack
from schemas.events import Change, DocumentEvent
from streams.topology import TOPOLOGY

_TEXTS: Final = 500
"""Distinct contents. More would spend the time on embedding without affecting memory."""

_BATCH: Final = 1_000
_SAMPLED_S: Final = 0.25
_LIMIT_S: Final = 3_600.0
_MIB: Final = 1024 * 1024


class WorkerRss(TypedDict):
    """Resident memory of a worker in MiB: before, at most during, and after a round."""

    before: float
    max: float
    after: float


class BacklogRound(TypedDict):
    """Results of a round.

    Attributes:
        events: events sent.
        sent_s: time to send them.
        seconds: time until the lag was zero.
        events_per_s: events per second of it.
        max_lag: step → maximum lag, in records.
        rss_mib: worker → resident memory.
    """

    events: int
    sent_s: float
    seconds: float
    events_per_s: float
    max_lag: dict[str, int]
    rss_mib: dict[str, WorkerRss]


class BacklogResults(TypedDict):
    """Results of the benchmark."""

    rounds: list[BacklogRound]


async def bench_backlog(stack: Stack, *, waiting: Sequence[int], say: Callable[[str, str], None]) -> BacklogResults:
    """Send events much faster than they are processed, and sample worker memory until the lag is zero.

    Args:
        stack: a running stack.
        waiting: number of events of each round; each round has its own documents.
        say: reports progress.

    Raises:
        BenchmarkFailed: the installation did not start, or still lags after an hour.
    """
    async with installed(stack) as installation:
        return {"rounds": [await backlog(installation, number, events, say) for number, events in enumerate(waiting)]}


async def backlog(
    installation: BenchInstallation, number: int, events: int, say: Callable[[str, str], None]
) -> BacklogRound:
    """One round: maximum lag, and resident memory of each worker before, at maximum, and after."""
    workers = {name: psutil.Process(pid) for name, pid in installation.pids.items() if name.startswith("worker")}
    before = {name: process.memory_info().rss for name, process in workers.items()}
    maximum = dict(before)
    max_lag: dict[str, int] = {}
    began_s = time.monotonic()
    async with _sampled(installation, workers, maximum, max_lag):
        await _send(installation, number, events)
        sent_s = time.monotonic() - began_s
        say("events", f"{events} sent in {sent_s:.1f} s")
        await installation.caught_up(timeout_s=_LIMIT_S, on_lag=lambda lag: say("lag", str(lag)))
    took_s = time.monotonic() - began_s
    return {
        "events": events,
        "sent_s": round(sent_s, 1),
        "seconds": round(took_s, 1),
        "events_per_s": round(events / took_s, 1),
        "max_lag": max_lag,
        "rss_mib": {
            name: {
                "before": round(before[name] / _MIB, 1),
                "max": round(maximum[name] / _MIB, 1),
                "after": round(process.memory_info().rss / _MIB, 1),
            }
            for name, process in workers.items()
        },
    }


async def _send(installation: BenchInstallation, number: int, events: int) -> None:
    settings = installation.settings
    blobs = open_blob_store(settings.blobs)
    producer = await KafkaProducer.open(settings)
    try:
        contents = [
            await blobs.put(f"# Page {text}\n\nThe page {text} of round {number} contains {text * 7}.\n".encode())
            for text in range(_TEXTS)
        ]
        for start in range(0, events, _BATCH):
            await producer.send_all(
                [
                    encode_event(
                        DocumentEvent(
                            event_id=f"backlog-{number}-{at}",
                            tenant=settings.tenant.default,
                            document_id=f"backlog-{number}/{at}.md",
                            version=1,
                            change=Change.UPSERTED,
                            content=contents[at % _TEXTS],
                            content_type="text/markdown",
                            accepted_ms=time.time() * 1_000,
                        )
                    )
                    for at in range(start, min(start + _BATCH, events))
                ]
            )
    finally:
        await producer.close()
        await blobs.close()


@asynccontextmanager
async def _sampled(
    installation: BenchInstallation,
    workers: dict[str, psutil.Process],
    maximum: dict[str, int],
    max_lag: dict[str, int],
) -> AsyncIterator[None]:
    async def sample() -> None:
        async with StreamAdmin(installation.settings) as admin:
            while True:
                for name, process in workers.items():
                    maximum[name] = max(maximum[name], process.memory_info().rss)
                for step, row in TOPOLOGY.items():
                    lags = await admin.lag(row.reads, installation.settings.names.group(step))
                    max_lag[str(step)] = max(max_lag.get(str(step), 0), sum(lag.records for lag in lags))
                await asyncio.sleep(_SAMPLED_S)

    sampling = asyncio.create_task(sample())
    try:
        yield
    finally:
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling
