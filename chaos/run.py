"""A chaos run: injects faults under load, checks after each, and finally replays the complete stream."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from chaos.checker import Checker, checking
from chaos.clients import ClientHistory, Readers, Senders
from chaos.cluster import WORKERS, Cluster, running
from chaos.faults import LINKS, TARGETS, injected, single_targets, unsupported_faults
from chaos.recovery import NotRecovered
from chaos.schedule import Fault, schedule
from chaos.workload import generated, recorded
from freshline.verify.observed import Harm, Passages
from infra.kafka.provision import StreamAdmin
from infra.kafka.security import client_options
from infra.local import Say
from infra.opensearch.client import connect
from schemas.documents import DocumentKey
from schemas.topics import DOCUMENTS
from streams.topology import StepName

RECOVERY_S: Final = 120.0
"""Maximum time from the end of a fault until no step lags."""

_EVENTS_PER_S: Final = 6.0
_LEAD_S: Final = 3.0
"""Traffic before each fault, so that records are in flight."""
_GC_DELETES_S: Final = 5
"""Retention of the versions of deleted passages in the index, so that late writes find no version to conflict with."""
_REWIND_S: Final = 60.0
_REPLAY: Final = "full replay"
_POLL_S: Final = 0.2


@dataclass(slots=True)
class FaultSummary:
    """Totals of all faults of one name."""

    times: int = 0
    in_flight: int = 0
    harms: Counter[Harm] = field(default_factory=Counter)
    recovery_s: float = 0.0
    failed_queries: int = 0

    def figures(self) -> dict[str, Any]:
        """Row of the report."""
        harms = {str(harm): self.harms[harm] for harm in (Harm.LOST, Harm.STALE, Harm.RESURRECTED)}
        other = sum(self.harms.values()) - sum(harms.values())
        return {
            "times": self.times,
            "in_flight": self.in_flight,
            **harms,
            "other": other,
            "recovery_s": round(self.recovery_s, 1),
            "failed_queries": self.failed_queries,
        }


class ChaosRun:
    """A run on a running installation."""

    def __init__(
        self, cluster: Cluster, checker: Checker, history: ClientHistory, *, seed: int, events: Path | None, say: Say
    ) -> None:
        self._cluster = cluster
        self._seed = seed
        self._say = say
        self._history = history
        requests = recorded(events) if events else generated(seed)
        self._senders = Senders(cluster.ingest_urls, requests, _EVENTS_PER_S, self._history)
        self._readers = Readers(cluster.query_urls, seed, self._history)
        self._checker = checker
        self._rows: dict[str, FaultSummary] = {}
        self._reported_violations = 0
        self._not_recovered: list[str] = []

    async def go(self, *, minutes: float) -> dict[str, Any]:
        """Inject faults for ``minutes``. Returns the report."""
        await self._cluster.wait_until_healthy(timeout_s=RECOVERY_S)
        await self._shorten_delete_retention()
        sending = asyncio.create_task(self._senders.run())
        watching = asyncio.create_task(self._checker.watch())
        try:
            async with self._readers.asking():
                await self._under_faults(minutes, (sending, watching))
                if not self._not_recovered:
                    await self._replay_all()
        finally:
            for task in (sending, watching):
                task.cancel()
            await asyncio.gather(sending, watching, return_exceptions=True)
        return self._report()

    async def _under_faults(self, minutes: float, alive: tuple[asyncio.Task[None], ...]) -> None:
        self._senders.go()
        until_s = time.monotonic() + minutes * 60
        faults = schedule(self._seed, processes=TARGETS, links=LINKS, single=single_targets(self._cluster))
        for fault in faults:
            if time.monotonic() >= until_s or self._not_recovered:
                return
            await self._row(fault.name, partial(self._strike, fault))
            for task in alive:
                if task.done():
                    task.result()

    async def _row(
        self, name: str, action: Callable[[], Awaitable[int]], before: Mapping[DocumentKey, Passages] | None = None
    ) -> None:
        """Perform an action, wait until all events are processed, and check.

        Args:
            name: row of the report.
            action: performs the action; returns the records in flight.
            before: searchable passages that must not change, if any.
        """
        row = self._rows.setdefault(name, FaultSummary())
        failed, harms = sum(self._history.failed.values()), self._checker.observed.harms()
        try:
            row.in_flight += await action()
            began_s = time.monotonic()
            await self._senders.rest()
            await self._cluster.wait_until_drained(timeout_s=RECOVERY_S)
            took_s = time.monotonic() - began_s
            await self._cluster.wait_until_healthy(timeout_s=RECOVERY_S)
            after = await self._checker.rest(self._readers.ask)
            if before is not None:
                self._checker.observed.replayed(before, after)
        except NotRecovered as error:
            self._not_recovered.append(f"{name}: {error}")
            took_s = RECOVERY_S
        row.times += 1
        row.recovery_s = max(row.recovery_s, took_s)
        row.failed_queries += sum(self._history.failed.values()) - failed
        row.harms += self._checker.observed.harms() - harms
        for violation in self._checker.observed.violations[self._reported_violations :]:
            self._say("violation", str(violation))
        self._reported_violations = len(self._checker.observed.violations)
        self._say(name, f"recovered in {took_s:.1f} s")

    async def _strike(self, fault: Fault) -> int:
        self._senders.go()
        await asyncio.sleep(_LEAD_S)
        in_flight = await self._cluster.lag()
        self._say(fault.name, f"{fault.target}, {in_flight} records in flight")
        async with injected(self._cluster, fault):
            await asyncio.sleep(fault.duration_s)
        return in_flight

    async def _replay_all(self) -> None:
        """Replay the complete stream after the index has forgotten the versions of deleted passages."""
        before = await self._checker.rest(self._readers.ask)
        await asyncio.sleep(2 * _GC_DELETES_S)
        await self._row(_REPLAY, self._replay, before)

    async def _replay(self) -> int:
        pids = [await self._cluster.pid(name) for name in WORKERS if name.startswith(StepName.PREPARE)]
        try:
            # Offsets of a group can be set once the sessions of its paused members have expired.
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            await self._rewind()
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        count = len(self._checker.observed.outcomes)
        self._say(_REPLAY, f"{count} events replayed")
        return count

    async def _rewind(self) -> None:
        settings = self._cluster.settings
        topic = settings.names.topic(DOCUMENTS.name)
        start = {TopicPartition(topic, number): 0 for number in range(settings.kafka.partitions)}
        group = settings.names.group(StepName.PREPARE)
        consumer = AIOKafkaConsumer(**client_options(settings.kafka), group_id=group, enable_auto_commit=False)
        try:
            await consumer.start()
            consumer.assign(list(start))
            async with asyncio.timeout(_REWIND_S):
                while True:
                    try:
                        await consumer.commit(start)
                    except KafkaError:  # the group still has members
                        await asyncio.sleep(_POLL_S)
                    else:
                        break
        finally:
            await consumer.stop()
        async with StreamAdmin(settings) as admin:
            committed = [lag.committed for lag in await admin.lag(DOCUMENTS, group)]
        if any(committed):
            raise AssertionError(f"the group is at {committed}, not at the start")

    async def _shorten_delete_retention(self) -> None:
        client = connect(self._cluster.settings.opensearch)
        try:
            index = self._cluster.settings.names.chunks_alias
            await client.indices.put_settings(index=index, body={"index.gc_deletes": f"{_GC_DELETES_S}s"})
        finally:
            await client.close()

    def _report(self) -> dict[str, Any]:
        observed = self._checker.observed
        harms = observed.harms()
        outcomes = Counter(str(outcome) for outcome in observed.outcomes.values())
        return {
            "ok": not observed.violations and not self._not_recovered,
            "seed": self._seed,
            "faults": sum(row.times for name, row in self._rows.items() if name != _REPLAY),
            "lost": harms[Harm.LOST],
            "stale": harms[Harm.STALE],
            "resurrected": harms[Harm.RESURRECTED],
            "other_violations": harms[Harm.LEAKED] + harms[Harm.MISREPORTED],
            "failed_queries": sum(self._history.failed.values()),
            "recovery_s": max((round(row.recovery_s, 1) for row in self._rows.values()), default=0.0),
            "accepted": len(self._history.acknowledgements),
            "resent": self._history.resent,
            "events": len(observed.outcomes),
            "outcomes": dict(sorted(outcomes.items())),
            "unreported_outcomes": self._checker.unreported,
            "queries": self._history.asked,
            "answered_on_retry": sum(self._history.retried.values()),
            "slowest_answer_s": round(self._history.slowest_s, 1),
            "index_checks": self._checker.checks,
            "failure_reasons": dict(self._history.failed),
            "retry_reasons": dict(self._history.retried),
            "not_recovered": self._not_recovered,
            "unsupported_faults": unsupported_faults(self._cluster),
            "violations": [str(violation) for violation in observed.violations[:20]],
            "by_fault": {name: row.figures() for name, row in sorted(self._rows.items())},
        }


async def run(home: Path, *, seed: int, minutes: float, events: Path | None, say: Say) -> dict[str, Any]:
    """Start an installation in an empty directory, inject faults, and stop it. Returns the report.

    Raises:
        StackError: it cannot start, or a fault injection tool is missing.
    """
    history = ClientHistory()
    async with running(home, say) as cluster, checking(cluster.settings, history) as checker:
        return await ChaosRun(cluster, checker, history, seed=seed, events=events, say=say).go(minutes=minutes)
