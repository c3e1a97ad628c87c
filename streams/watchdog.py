"""Ends a worker that has quietly stopped working, so that its supervisor starts another."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from infra.kafka.port import StreamUnavailable
from infra.kafka.provision import StreamAdmin
from infra.settings import Settings
from streams.faust_app import FaustWorker
from streams.runner import Runner, TooManyDeadLetters
from streams.topology import TOPOLOGY, StepName

log = structlog.get_logger(__name__)

LAG_EVERY_S: Final = 15.0
"""Brokers are asked anew each time, so not more often than metrics are read."""

_LOOKS_PER_STALL: Final = 6


class WorkerStalled(Exception):
    """A step does not go on although records wait and no store is out of reach."""


@dataclass(frozen=True, slots=True)
class Watched:
    """One step of this worker."""

    step: StepName
    consumer: FaustWorker
    runner: Runner
    running: asyncio.Task[None]


async def watch(settings: Settings, watched: Sequence[Watched]) -> None:
    """Look at the steps until one has ended or stalled.

    Raises:
        WorkerStalled: see there.
        TooManyDeadLetters: see there.
    """
    since = {one.step: (one.runner.finished_count, time.monotonic()) for one in watched}
    while True:
        done, _ = await asyncio.wait(
            [one.running for one in watched], timeout=settings.streams.stall_s / _LOOKS_PER_STALL
        )
        for task in done:
            if isinstance(error := task.exception(), TooManyDeadLetters):
                raise error
            raise WorkerStalled(f"{task.get_name()} ended: {task.exception()!r}") from task.exception()
        for one in watched:
            if one.consumer.crashed is not None:
                raise WorkerStalled(f"the consumer of {one.step} crashed") from one.consumer.crashed
            count, at_s = since[one.step]
            if one.runner.finished_count != count or one.runner.waiting_for is not None:
                since[one.step] = (one.runner.finished_count, time.monotonic())
            elif time.monotonic() - at_s > settings.streams.stall_s:
                since[one.step] = (count, time.monotonic())
                behind = await _behind(settings, one)
                if behind:
                    stall_s = settings.streams.stall_s
                    raise WorkerStalled(f"{one.step} has finished nothing for {stall_s:.0f} s; {behind} records wait")


async def measure_lag(settings: Settings, watched: Sequence[Watched], told: Callable[[StepName, int], None]) -> None:
    """Tell how many records wait in this worker's partitions, now and then, where anybody can read it."""
    while settings.streams.metrics_port:
        for one in watched:
            told(one.step, await _behind(settings, one))
        await asyncio.sleep(LAG_EVERY_S)


async def _behind(settings: Settings, one: Watched) -> int:
    """Records that wait in this worker's own partitions."""
    mine = one.consumer.assigned
    try:
        async with StreamAdmin(settings) as admin:
            lags = await admin.lag(TOPOLOGY[one.step].reads, settings.names.group(one.step))
    except StreamUnavailable as error:
        log.warning("lag is unknown", reason=str(error))
        return 0
    return sum(lag.behind for lag in lags if lag.partition in mine)
