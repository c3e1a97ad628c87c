"""The real steps and the real runner on twins of all stores, which may fail at any await."""

import asyncio
import random
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass

from faults import Fault, Faults
from readers import GROUPS, Reader
from receivers import Receivers, Webhooks
from shaky_twins import (
    BROKEN,
    PARTITIONS,
    REFUSED,
    UNEMBEDDABLE,
    Blobs,
    Cache,
    Embedder,
    Splitter,
    States,
    Streams,
    WatchedIndex,
)
from worker import Worker

from freshline.verify.invariants import Version
from freshline.verify.observed import ObservedHistory
from freshline.verify.served import planned_passages
from infra.kafka.codec import decode, encode_event
from infra.kafka.memory import MemoryStreams
from ingest.event_status import EventStatuses
from query.retrieval.retrieve import Retrieval
from schemas.documents import DocumentKey, EventStatus, Outcome, Stage
from schemas.events import Change, ChunkPlan, DocumentEvent, EventEnded, IndexChange
from schemas.positions import Position
from schemas.topics import CHUNKS, DOCUMENTS, EVENT_ENDS, INDEX_CHANGES
from streams.core.commit_guard import LaneCommits
from streams.runner import Runner
from streams.steps.index import Index
from streams.steps.invalidate import Invalidate
from streams.steps.notify import Notify
from streams.steps.prepare import Prepare
from streams.topology import TOPOLOGY, StepName

GC_DELETES_S = 3_600.0
DOCUMENTS_ALIVE = 3
MOST_EVENTS = 12
SENTENCES = ("Hotels cost 120.", "Hotels cost 150.", "Trains run.", "Leave is paid.", "Ask HR.", "Bring a laptop.")


class Violated(AssertionError):
    """An invariant is violated."""


@dataclass(frozen=True)
class Plan:
    """Parameters of a history. Equal plans give equal histories."""

    seed: int
    events: int = MOST_EVENTS
    faults: frozenset[Fault] = frozenset(Fault)


@dataclass(frozen=True)
class Parts:
    """Parts that a planted mistake may replace.

    Attributes:
        asks_per_s: questions per second; some mistakes are visible for an instant only.
    """

    index: type[WatchedIndex] = WatchedIndex
    lane: type[LaneCommits] = LaneCommits
    prepare: type[Prepare] = Prepare
    step: type[Index] = Index
    invalidate: type[Invalidate] = Invalidate
    notify: type[Notify] = Notify
    runner: type[Runner] = Runner
    cache: type[Cache] = Cache
    retrieval: type[Retrieval] = Retrieval
    statuses: type[EventStatuses] = EventStatuses
    asks_per_s: float = 3


class World:
    """One history, determined by its plan."""

    tenants = ("acme", "umbrella")

    def __init__(self, plan: Plan, parts: Parts) -> None:
        self.plan = plan
        self.rng = random.Random(plan.seed)
        random.seed(plan.seed)  # the runner's jitter
        self.parts = parts
        self.faults = Faults(self.rng, plan.faults)
        loop = asyncio.get_running_loop()
        self.streams = Streams(self.faults)
        self.blobs = Blobs(self.faults)
        self.index = parts.index(self.faults, gc_deletes_s=GC_DELETES_S, now_s=loop.time)
        self.embedder = Embedder(self.faults)
        self.states = States(self.faults)
        self.cache = parts.cache(self.faults, lambda: 1 + int(loop.time() * 1e6))
        self.now_ms = lambda: loop.time() * 1_000
        self.webhooks = Webhooks(self.faults, self.tenants)
        self.receivers = Receivers(self)
        self.committed: dict[tuple[StepName, int], int] = defaultdict(int)
        self._floor: dict[tuple[StepName, int], int] = {}
        self.observed = ObservedHistory()
        self.sent: list[tuple[str, str]] = []
        self._sent_once: list[tuple[str, str]] = []
        self._read_changes = dict.fromkeys(range(PARTITIONS), 0)
        self.index.on_refresh = self._check_index
        self.index.on_advance = self._check_positions
        self.streams.on_placed = self._check_changes
        self.workers: dict[StepName, Worker] = {}
        self.zombies: list[Worker] = []

    # Events and faults

    async def live(self) -> None:
        """Events under faults and crashes, then processing to the end without faults, then a replay of the log."""
        for step in TOPOLOGY:
            self.workers[step] = Worker(self, step)
        asking = asyncio.create_task(Reader(self).ask_until_cancelled())
        keeping = [asyncio.create_task(self._keep(step)) for step in TOPOLOGY]
        chaos = asyncio.create_task(self._chaos())
        for number in range(self.plan.events):
            await asyncio.sleep(self.rng.expovariate(self.rng.choice((1, 20))))
            await self._accept(number)
        await asyncio.sleep(self.rng.uniform(0, 3))
        await _end(chaos)
        if self.faults.happens(Fault.LOST_MANIFEST, 0.5):
            await self._lose_manifests(asking, *keeping)
        await self._finish_all(asking, *keeping)
        self.observed.rested(self._passages())
        self._count_copies()
        await self._read_positions()
        await self._ask_for_events()
        await self._wait_for_messages()
        self._stop_if_violated()
        await _end(asking, *keeping)
        await self._replay()
        await self._end_workers()
        self._stop_if_violated()

    async def _accept(self, number: int, again: DocumentKey | None = None, *, deleted: bool | None = None) -> None:
        """Accept an event as ``ingest`` does: content first, then the event, sometimes twice as after a lost response.

        Args:
            number: number of the event.
            again: document of the event, with a version newer than all before; None chooses one.
            deleted: whether the event deletes it; None chooses.
        """
        key = again or DocumentKey(self.rng.choice(self.tenants), f"doc-{self.rng.randrange(DOCUMENTS_ALIVE)}")
        versions = [one.number for one in self.observed.accepted[key]]
        # Usually increasing; sometimes an old revision, or an existing one.
        version = max(versions, default=0) + 1
        if versions and again is None and self.rng.random() < 0.2:
            version = self.rng.choice((*versions, max(versions) - 1, max(versions) + 3))
        if deleted is None:
            deleted = self.rng.random() < 0.25
        lines = [] if deleted else self.rng.sample(SENTENCES, self.rng.randrange(4))
        if lines and self.rng.random() < 0.2:
            lines.insert(self.rng.randrange(len(lines) + 1), self.rng.choice((UNEMBEDDABLE, REFUSED)))
        is_accepted = UNEMBEDDABLE not in lines  # searches may find a part of a version until it is rejected
        content = "\n".join(lines).encode()
        broken = not deleted and again is None and self.rng.random() < 0.15
        event = DocumentEvent(
            event_id=f"event-{number}",
            tenant=key.tenant,
            document_id=key.document_id,
            version=max(version, 0),
            change=Change.DELETED if deleted else Change.UPSERTED,
            accepted_ms=0,
            content=None if deleted else await self.blobs.put(BROKEN if broken else content),
            title=self.rng.choice((None, None, "Title")),
            groups=self.rng.choice(((), (), GROUPS)),
        )
        planned = [] if deleted or broken else Splitter().split(content.decode(), event.title)
        twice = self.faults.happens(Fault.DUPLICATE, 0.1)
        self.sent.append((key.tenant, event.event_id))
        if not twice:
            self._sent_once.append((key.tenant, event.event_id))
        for _ in range(1 + twice):
            [placed] = await MemoryStreams.send_all(self.streams, [encode_event(event)])
            passages = planned_passages(event.title, event.source, planned)
            readable = not broken and is_accepted
            one = Version(event.version, placed.offset, readable, deleted, passages, frozenset(event.groups))
            self.observed.accept(Position(*placed), key, one)
        await self.states.begin(key.tenant, _accepted(event, Position(*placed)))

    async def _lose_manifests(self, *living: asyncio.Task[None]) -> None:
        """Remove manifests at rest; then upload documents with other groups, and delete most of them, under faults.

        Tombstones are not removed: nothing else records the deletion.
        """
        await self._finish_all(*living)
        lost = [
            key for key in self._passages() if self.index.seen(key) and self.index._manifests[key].manifest.complete
        ]
        # Earlier events are not read again at once: without a manifest, older versions would become current.
        self._floor = dict(self.committed)
        for key in lost:
            self.index.lose_manifest(key)
            self.observed.manifest_lost(key)
        self.faults.calm = False
        chaos = asyncio.create_task(self._chaos())
        number = self.plan.events
        for key in lost:
            for deleted in (False, True) if self.rng.random() < 0.8 else (False,):
                await self._accept(number, key, deleted=deleted)
                number += 1
                await asyncio.sleep(self.rng.choice((0, self.rng.uniform(0, 3))))
        await _end(chaos)

    async def _chaos(self) -> None:
        """Stop workers at any time, not only at faults, and take partitions from workers without their knowledge."""
        while True:
            await asyncio.sleep(self.rng.expovariate(1))
            worker = self.workers[self.rng.choice(list(TOPOLOGY))]
            if self.faults.happens(Fault.ZOMBIE, 0.4):
                worker.lose_partitions()
                self.zombies.append(worker)
            elif self.faults.happens(Fault.CRASH, 1):
                worker.die()
            if self.zombies and self.rng.random() < 0.5:
                await self.zombies.pop(self.rng.randrange(len(self.zombies))).end()

    async def _keep(self, step: StepName) -> None:
        """Replace each stopped worker, as a supervisor and the consumer group do."""
        while True:
            gone = self.workers[step]
            await gone.gone.wait()
            if gone not in self.zombies:
                await gone.end()
            await asyncio.sleep(self.rng.choice((0, self.rng.uniform(0, 3))))
            for number in range(PARTITIONS):
                # From the committed offset; sometimes from a lower one, as after a reset by an operator.
                if self.faults.happens(Fault.REDELIVERY, 0.3):
                    self.committed[step, number] = self.rng.randint(
                        self._floor.get((step, number), 0), self.committed[step, number]
                    )
            self.workers[step] = Worker(self, step)

    async def _finish_all(self, *living: asyncio.Task[None]) -> None:
        self.faults.calm = True
        while self.zombies:
            await asyncio.sleep(self.rng.uniform(0, 10))
            await self.zombies.pop().end()
        async with asyncio.timeout(1_000):
            while any(
                self.committed[step, number] < len(self.streams.log[row.reads.name, number])
                for step, row in TOPOLOGY.items()
                for number in range(PARTITIONS)
            ):
                self._stop_if_violated()
                for task in living:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.1)
        self._stop_if_violated()

    async def _replay(self) -> None:
        """Read the log again from its start or a later offset, after versions of deleted passages have expired."""
        before = self._passages()
        await self._end_workers()
        await asyncio.sleep(2 * GC_DELETES_S)
        for number in range(PARTITIONS):
            ended_event = len(self.streams.log[DOCUMENTS.name, number])
            self.committed[StepName.PREPARE, number] = self.rng.choice((0, 0, self.rng.randint(0, ended_event)))
        self.workers = {step: Worker(self, step) for step in TOPOLOGY}
        asking = asyncio.create_task(Reader(self).ask_until_cancelled())
        await self._finish_all(asking)
        await _end(asking)
        self.observed.replayed(before, self._passages())

    async def _ask_for_events(self) -> None:
        """The reported outcome of each event is correct, although some of its states were lost."""
        statuses = self.parts.statuses(self.states, self.cache, self.streams.read_partition)
        for tenant, event_id in self._sent_once:
            status = await statuses.get(tenant, event_id)
            if status.outcome is None:
                self.observed.lost(f"the outcome of {event_id} is unknown: {status}")
            else:
                self.observed.outcome_reported_again(Position.parse(status.position), status.outcome)

    async def _wait_for_messages(self) -> None:
        """Each webhook receives each outcome at least once."""
        async with asyncio.timeout(1_000):
            while await self.webhooks.waiting():  # noqa: ASYNC110 - the state is in a store
                await asyncio.sleep(0.1)
        for tenant, event_id in self.sent:
            if (tenant, event_id) not in self.receivers.received:
                self.observed.lost(f"no receiver got the outcome of {event_id} of {tenant}")

    async def _end_workers(self) -> None:
        for worker in self.workers.values():
            await worker.end()

    def commit(self, step: StepName, partition: int, offset: int) -> None:
        """A worker commits: the results of all lower records must be in the next stream by now (I5)."""
        self.committed[step, partition] = offset
        self.observed.committed(f"{step} {partition}", offset, self._ended(step, partition))

    # Checks

    def _stop_if_violated(self) -> None:
        # Not at the point of detection: the runner would treat it as a failure of the record.
        if self.observed.violations:
            raise Violated(str(self.observed.violations[0]))

    def _passages(self) -> dict[DocumentKey, dict[str, int]]:
        return {key: self.index.seen(key) for key in self.observed.accepted}

    def _ended(self, step: StepName, partition: int) -> set[int]:
        plans = self._messages(ChunkPlan, CHUNKS.name, partition)
        if step is StepName.PREPARE:
            return {Position.parse(plan.position).offset for plan in plans}
        if step is StepName.NOTIFY:
            ended_events = self._messages(EventEnded, EVENT_ENDS.name, partition)
            kept = self.receivers.received | {
                (self.webhooks._webhooks[one.webhook_id].tenant, one.message_id)
                for one in self.webhooks._waiting.values()
            }
            return {
                at for at, ended_event in enumerate(ended_events) if (ended_event.tenant, ended_event.event_id) in kept
            }
        changes = self._messages(IndexChange, INDEX_CHANGES.name, partition)
        if step is StepName.INDEX:
            reported = {change.position for change in changes}
            return {at for at, plan in enumerate(plans) if plan.position in reported}
        applied = {tenant: one.positions.get(partition, -1) for (tenant, _), one in self.cache._slices.items()}
        return {
            at
            for at, change in enumerate(changes)
            if Position.parse(change.position).offset <= applied.get(change.tenant, -1)
        }

    def _messages(self, model, topic, partition):
        return [decode(model, one.value, one.headers) for one in self.streams.log[topic, partition]]

    def _check_changes(self) -> None:
        """Check new index changes: they must be true at this instant."""
        for partition, read in self._read_changes.items():
            lane = self.streams.log[INDEX_CHANGES.name, partition]
            for record in lane[read:]:
                change = decode(IndexChange, record.value, record.headers)
                key = DocumentKey(change.tenant, change.document_id)
                position = Position.parse(change.position)
                if change.outcome is Outcome.DEAD_LETTER:
                    self._give_up(position)
                self.observed.record_outcome(position, change.outcome, self.index.seen(key))
            self._read_changes[partition] = len(lane)
        self._check_index()

    def _check_index(self) -> None:
        """Check the invariants that hold at every instant."""
        done = self.observed.done_so_far()
        for key in list(self.observed.accepted):
            self.observed.searchable(key, self.index.seen(key), after=done.get(key, ()))
            stored = self.index._manifests.get(key)
            if stored is not None and stored.manifest.completed is not None:
                self.observed.manifest(key, stored.manifest.completed.version)

    def _check_positions(self) -> None:
        """Check the positions in the index, which readers use after a loss of Redis: covered content is searchable."""
        for stored in self.index._manifests.values():
            for failure in stored.manifest.failed:
                self._give_up(Position.parse(failure.position))
        for tenant in self.tenants:
            positions = {at: offset for (of, at), offset in self.index._positions.items() if of == tenant}
            self.observed.advanced(tenant, positions, self._passages())

    def _give_up(self, position: Position) -> None:
        if position not in self.observed.outcomes:
            self.observed.gave_up(position)

    def _count_copies(self) -> None:
        """At rest, each passage is stored once. The invariants would see only one of several copies."""
        for key, passages in self._passages().items():
            stored_copies = [name for name, one in self.index._searchable.items() if one.chunk.key == key]
            if len(stored_copies) > len(passages):
                self.observed.lost(f"{key} has copies and their originals: {stored_copies}")

    async def _read_positions(self) -> None:
        for tenant in self.tenants:
            self.observed.reached_the_end(tenant, await self.index.positions(tenant))


def _accepted(event: DocumentEvent, position: Position) -> EventStatus:
    return EventStatus(
        event_id=event.event_id,
        document_id=event.document_id,
        version=event.version,
        position=str(position),
        stage=Stage.ACCEPTED,
        outcome=None,
        accepted_ms=0,
        stages_ms={Stage.ACCEPTED: 0},
    )


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
