"""An installation that contains the documents of a recorded history, optionally kept for later measurements."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from bench.installation import BenchInstallation, installed
from freshline.loadtest.edits import EditSender, final_state_of, history_of, snapshot_of
from freshline.loadtest.load_statistics import FreshnessSlo
from freshline.services import ingest_client
from infra.local import Stack
from infra.redis.connect import connect_redis
from ingest.connectors.client import Summary
from ingest.connectors.event_file import RecordedEvent, ingest_event_file

_LOAD_S: Final = 3_600.0
_REPORT_INTERVAL_S: Final = 5.0
_SENT: Final = "sent.log"
_EDITED: Final = "edited"

Say = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class BenchmarkSetup:
    """Common parameters of measurements.

    Attributes:
        stack: a running stack.
        events: recorded history whose documents are searched.
        say: reports progress.
        overrides: settings that override those of the stack.
        keep: see ``installed``.
        processes: query processes behind one address.
    """

    stack: Stack
    events: Path
    say: Say
    overrides: Mapping[str, str] = field(default_factory=dict)
    keep: str | None = None
    processes: int = 1


@asynccontextmanager
async def preloaded(
    setup: BenchmarkSetup, state: Literal["snapshot", "final"] = "snapshot"
) -> AsyncIterator[BenchInstallation]:
    """An installation with the documents of a history and an empty cache.

    With ``keep``, an interrupted load is resumed.

    Args:
        setup: parameters.
        state: the initial snapshot of the history, or its final state.

    Raises:
        BenchmarkFailed: see ``installed``, or the documents were not indexed within an hour.
    """
    installing = installed(setup.stack, setup.overrides, keep=setup.keep, query_processes=setup.processes)
    async with installing as installation:
        await _load(installation, setup.events, setup.say, state)
        await empty_cache(installation)
        yield installation


async def empty_cache(installation: BenchInstallation) -> None:
    """Delete all answers from Redis. Safe at any time, like a restart of Redis without data."""
    settings = installation.settings
    redis = connect_redis(settings.redis)
    try:
        tenant = settings.tenant.default
        slices = [settings.names.answer_slice(tenant, number) for number in range(settings.answers.slices)]
        keys = [key for prefix in slices async for key in redis.scan_iter(match=f"{prefix}:*", count=1_000)]
        for first in range(0, len(keys), 1_000):
            await redis.delete(*keys[first : first + 1_000])
    finally:
        await redis.aclose()


@asynccontextmanager
async def edits_of(
    installation: BenchInstallation, events: Path, slo: FreshnessSlo, *, per_s: float
) -> AsyncIterator[EditSender | None]:
    """Sender of the edits that follow the snapshot and those of earlier measurements. None for a rate of 0."""
    if not per_s:
        yield None
        return
    file = installation.home / _EDITED
    after = int(await asyncio.to_thread(file.read_text)) if file.exists() else None
    async with ingest_client(installation.settings) as client:
        history = history_of(events, after=after)
        yield EditSender(client, history, slo, per_s=per_s, sent=lambda seq: _write_seq(file, seq))


async def _load(installation: BenchInstallation, events: Path, say: Say, state: Literal["snapshot", "final"]) -> None:
    file = installation.home / f"{state}.jsonl"
    events_of = snapshot_of if state == "snapshot" else final_state_of
    total = await asyncio.to_thread(_write, events_of(events), file)
    reported_s = 0.0

    def sent(summary: Summary) -> None:
        nonlocal reported_s
        if time.monotonic() - reported_s >= _REPORT_INTERVAL_S:
            reported_s = time.monotonic()
            say("documents", f"{summary.sent + summary.skipped} of {total} sent")

    def lagging(records: int) -> None:
        nonlocal reported_s
        if time.monotonic() - reported_s >= _REPORT_INTERVAL_S:
            reported_s = time.monotonic()
            say("documents", f"{records} records to process")

    async with ingest_client(installation.settings) as client:
        await ingest_event_file(client, file, log_path=installation.home / _SENT, progress=sent)
    await installation.caught_up(timeout_s=_LOAD_S, on_lag=lagging)
    say("documents", f"{total} loaded")


def _write(events: Iterable[RecordedEvent], file: Path) -> int:
    lines = [event.model_dump_json(exclude_none=True) for event in events]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def _write_seq(file: Path, seq: int) -> None:
    file.write_text(str(seq), encoding="utf-8")
