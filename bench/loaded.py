"""An installation with the documents of a recorded history in it, which the next measurement may find again."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from bench.installation import Installation, installed
from freshline.loadtest.edits import Edits, history_of, last_state_of, snapshot_of
from freshline.loadtest.tally import Ledger
from freshline.services import ingest_client
from infra.local import Stack
from infra.redis.connect import connect_redis
from ingest.connectors.client import Summary
from ingest.connectors.event_file import RecordedEvent, ingest_event_file

_LOAD_S: Final = 3_600.0
_SAY_S: Final = 5.0
_SENT: Final = "sent.log"
_EDITED: Final = "edited"

Say = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Ground:
    """What a measurement stands on.

    Attributes:
        stack: a running stack.
        events: the history whose documents are searched.
        say: told of progress.
        overrides: settings other than the stack's.
        keep: see ``installed``.
        processes: of query, behind one address.
    """

    stack: Stack
    events: Path
    say: Say
    overrides: Mapping[str, str] = field(default_factory=dict)
    keep: str | None = None
    processes: int = 1


@asynccontextmanager
async def loaded(ground: Ground, state: Literal["first", "last"] = "first") -> AsyncIterator[Installation]:
    """An installation that has a state of a history, and whose cache is empty.

    A load that was interrupted goes on where it was if its data are kept.

    Args:
        ground: where, and of what.
        state: the snapshot that the history begins with, or what there is at its end.

    Raises:
        BenchmarkFailed: see ``installed``, or the documents were not indexed in an hour.
    """
    installing = installed(ground.stack, ground.overrides, keep=ground.keep, query_processes=ground.processes)
    async with installing as installation:
        await _load(installation, ground.events, ground.say, state)
        await empty_cache(installation)
        yield installation


async def empty_cache(installation: Installation) -> None:
    """Take all answers out of Redis, as if it had been started anew: that is safe at any time."""
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
    installation: Installation, events: Path, ledger: Ledger, *, per_s: float
) -> AsyncIterator[Edits | None]:
    """The edits that follow in the history, behind those that an earlier measurement has sent; None for a rate of 0."""
    if not per_s:
        yield None
        return
    place = installation.home / _EDITED
    after = int(await asyncio.to_thread(place.read_text)) if place.exists() else None
    async with ingest_client(installation.settings) as client:
        history = history_of(events, after=after)
        yield Edits(client, history, ledger, per_s=per_s, sent=lambda seq: _note(place, seq))


async def _load(installation: Installation, events: Path, say: Say, state: Literal["first", "last"]) -> None:
    file = installation.home / f"{state}.jsonl"
    events_of = snapshot_of if state == "first" else last_state_of
    total = await asyncio.to_thread(_write, events_of(events), file)
    said_s = 0.0

    def sent(summary: Summary) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= _SAY_S:
            said_s = time.monotonic()
            say("documents", f"{summary.sent + summary.skipped} of {total} sent")

    def behind(records: int) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= _SAY_S:
            said_s = time.monotonic()
            say("documents", f"{records} on their way through one step")

    async with ingest_client(installation.settings) as client:
        await ingest_event_file(client, file, log_path=installation.home / _SENT, progress=sent)
    await installation.caught_up(timeout_s=_LOAD_S, told=behind)
    say("documents", f"{total} loaded")


def _write(events: Iterable[RecordedEvent], file: Path) -> int:
    lines = [event.model_dump_json(exclude_none=True) for event in events]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def _note(place: Path, seq: int) -> None:
    place.write_text(str(seq), encoding="utf-8")
