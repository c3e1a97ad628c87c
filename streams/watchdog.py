"""Stops a worker that makes no progress, so that its supervisor restarts it."""

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

_log = structlog.get_logger(__name__)

LAG_EVERY_S: Final = 15.0
"""Each measurement queries the brokers, so it is not more frequent than the metrics are scraped."""

STALL_S: Final = 60.0
"""Time without progress after which a worker with pending records is stopped."""

_CHECKS_PER_STALL: Final = 6


class WorkerStalled(Exception):
    """A step makes no progress although records are pending and all stores are available."""


@dataclass(frozen=True, slots=True)
class WatchedStep:
    """A running step of this worker."""

    name: StepName
    consumer: FaustWorker
    runner: Runner
    running: asyncio.Task[None]


async def watch(settings: Settings, watched: Sequence[WatchedStep]) -> None:
    """Monitor the steps until one ends or stalls.

    Raises:
        WorkerStalled: a step crashed or makes no progress.
        TooManyDeadLetters: a step would give up most of its records.
    """
    progress = {step.name: (step.runner.finished_count, time.monotonic()) for step in watched}
    while True:
        done, _ = await asyncio.wait([step.running for step in watched], timeout=STALL_S / _CHECKS_PER_STALL)
        for task in done:
            if isinstance(error := task.exception(), TooManyDeadLetters):
                raise error
            raise WorkerStalled(f"{task.get_name()} ended: {task.exception()!r}") from task.exception()
        for step in watched:
            if step.consumer.crashed is not None:
                raise WorkerStalled(f"the consumer of {step.name} crashed") from step.consumer.crashed
            count, since_s = progress[step.name]
            if step.runner.finished_count != count or step.runner.waiting_for is not None:
                progress[step.name] = (step.runner.finished_count, time.monotonic())
            elif time.monotonic() - since_s > STALL_S:
                progress[step.name] = (count, time.monotonic())
                lag = await _lag(settings, step)
                if lag:
                    raise WorkerStalled(
                        f"{step.name} has finished nothing for {STALL_S:.0f} s; {lag} records are pending"
                    )


async def measure_lag(
    settings: Settings, watched: Sequence[WatchedStep], report_lag: Callable[[StepName, int], None]
) -> None:
    """Report the lag of each step in this worker's partitions, while metrics are exported."""
    while settings.streams.metrics_port:
        for step in watched:
            if (lag := await _lag(settings, step)) is not None:
                report_lag(step.name, lag)
        await asyncio.sleep(LAG_EVERY_S)


async def _lag(settings: Settings, step: WatchedStep) -> int | None:
    """Unfinished records in this worker's partitions; None if no broker responds."""
    assigned = step.consumer.assigned
    try:
        async with StreamAdmin(settings) as admin:
            lags = await admin.lag(TOPOLOGY[step.name].reads, settings.names.group(step.name))
    except StreamUnavailable as error:
        _log.warning("lag_not_read", reason=str(error))
        return None
    return sum(one.records for one in lags if one.partition in assigned)
