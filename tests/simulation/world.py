"""The real steps and the real runner on twins of all stores, in a world where anything may fail at any await."""

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
    """An invariant does not hold."""


@dataclass(frozen=True)
class Plan:
    """A history to come; equal plans give equal histories."""

    seed: int
    events: int = MOST_EVENTS
    faults: frozenset[Fault] = frozenset(Fault)


@dataclass(frozen=True)
class Parts:
    """What a planted mistake may replace.

    Attributes:
        asks_per_s: how often somebody asks; some mistakes show for an instant only.
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
    """One history; everything in it follows from the plan."""

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
        self.index.on_refresh = self._look
        self.index.on_advance = self._look_at_positions
        self.streams.on_placed = self._hear
        self.workers: dict[StepName, Worker] = {}
        self.zombies: list[Worker] = []

    # What happens

    async def live(self) -> None:
        """Events come, things fail, workers die; then it is calm, and everything ends; then the log is read again."""
        for step in TOPOLOGY:
            self.workers[step] = Worker(self, step)
        asking = asyncio.create_task(Reader(self).ask_for_ever())
        keeping = [asyncio.create_task(self._keep(step)) for step in TOPOLOGY]
        chaos = asyncio.create_task(self._chaos())
        for number in range(self.plan.events):
            await asyncio.sleep(self.rng.expovariate(self.rng.choice((1, 20))))
            await self._accept(number)
        await asyncio.sleep(self.rng.uniform(0, 3))
        await _end(chaos)
        if self.faults.happens(Fault.LOST_MANIFEST, 0.5):
            await self._lose_manifests(asking, *keeping)
        await self._settle(asking, *keeping)
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
        """What ingest does: content first, then the event; sometimes twice, as after a lost acknowledgement.

        Args:
            number: of the event.
            again: the document, for a version that is newer than all before; any, if None.
            deleted: whether it is deleted; as it happens, if None.
        """
        key = again or DocumentKey(self.rng.choice(self.tenants), f"doc-{self.rng.randrange(DOCUMENTS_ALIVE)}")
        versions = [one.number for one in self.observed.accepted[key]]
        # Mostly growing; now and then an old revision, or one that was there already.
        version = max(versions, default=0) + 1
        if versions and again is None and self.rng.random() < 0.2:
            version = self.rng.choice((*versions, max(versions) - 1, max(versions) + 3))
        if deleted is None:
            deleted = self.rng.random() < 0.25
        lines = [] if deleted else self.rng.sample(SENTENCES, self.rng.randrange(4))
        if lines and self.rng.random() < 0.2:
            lines.insert(self.rng.randrange(len(lines) + 1), self.rng.choice((UNEMBEDDABLE, REFUSED)))
        taken = UNEMBEDDABLE not in lines  # Of what is refused searches may find a part, until it is
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
            readable = not broken and taken
            one = Version(event.version, placed.offset, readable, deleted, passages, frozenset(event.groups))
            self.observed.accept(Position(*placed), key, one)
        await self.states.begin(key.tenant, _accepted(event, Position(*placed)))

    async def _lose_manifests(self, *living: asyncio.Task[None]) -> None:
        """At rest manifests vanish. Then documents are uploaded for others to see, and most are deleted, under faults.

        Not those of deleted documents: nothing else would tell that they were.
        """
        await self._settle(*living)
        lost = [
            key for key in self._passages() if self.index.seen(key) and self.index._manifests[key].manifest.complete
        ]
        # What came before is not read again at once: without a manifest older versions stand until the newer ones do.
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
        """Workers that die between awaits, not only at them, and such as lose their partitions and do not know."""
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
        """Start another worker for each that is gone, as a supervisor and the group do."""
        while True:
            gone = self.workers[step]
            await gone.gone.wait()
            if gone not in self.zombies:
                await gone.end()
            await asyncio.sleep(self.rng.choice((0, self.rng.uniform(0, 3))))
            for number in range(PARTITIONS):
                # From what is committed; now and then from anywhere before it, as after an operator's reset.
                if self.faults.happens(Fault.REDELIVERY, 0.3):
                    self.committed[step, number] = self.rng.randint(
                        self._floor.get((step, number), 0), self.committed[step, number]
                    )
            self.workers[step] = Worker(self, step)

    async def _settle(self, *living: asyncio.Task[None]) -> None:
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
        """Read the log again, from its start or from within, when versions of deleted passages are forgotten."""
        before = self._passages()
        await self._end_workers()
        await asyncio.sleep(2 * GC_DELETES_S)
        for number in range(PARTITIONS):
            end = len(self.streams.log[DOCUMENTS.name, number])
            self.committed[StepName.PREPARE, number] = self.rng.choice((0, 0, self.rng.randint(0, end)))
        self.workers = {step: Worker(self, step) for step in TOPOLOGY}
        asking = asyncio.create_task(Reader(self).ask_for_ever())
        await self._settle(asking)
        await _end(asking)
        self.observed.replayed(before, self._passages())

    async def _ask_for_events(self) -> None:
        """What is said of each event, though some of its states were lost, is how it ended."""
        statuses = self.parts.statuses(self.states, self.cache, self.streams.read_partition)
        for tenant, event_id in self._sent_once:
            status = await statuses.get(tenant, event_id)
            if status.outcome is None:
                self.observed.lost(f"nobody can tell how {event_id} ended: {status}")
            else:
                self.observed.outcome_reported_again(Position.parse(status.position), status.outcome)

    async def _wait_for_messages(self) -> None:
        """Whoever asked for it is told of each end, once at least."""
        async with asyncio.timeout(1_000):
            while await self.webhooks.waiting():  # noqa: ASYNC110 - what is waited for is in a store
                await asyncio.sleep(0.1)
        for tenant, event_id in self.sent:
            if (tenant, event_id) not in self.receivers.told:
                self.observed.lost(f"nobody was told how {event_id} of {tenant} ended")

    async def _end_workers(self) -> None:
        for worker in self.workers.values():
            await worker.end()

    def commit(self, step: StepName, partition: int, offset: int) -> None:
        """A worker commits: what became of every record below must be in the next stream by now (I5)."""
        self.committed[step, partition] = offset
        self.observed.committed(f"{step} {partition}", offset, self._ended(step, partition))

    # What is seen

    def _stop_if_violated(self) -> None:
        # Not where it is seen: the runner would take it for a failure of the record.
        if self.observed.violations:
            raise Violated(str(self.observed.violations[0]))

    def _passages(self) -> dict[DocumentKey, dict[str, int]]:
        return {key: self.index.seen(key) for key in self.observed.accepted}

    def _ended(self, step: StepName, partition: int) -> set[int]:
        plans = self._messages(ChunkPlan, CHUNKS.name, partition)
        if step is StepName.PREPARE:
            return {Position.parse(plan.position).offset for plan in plans}
        if step is StepName.NOTIFY:
            ends = self._messages(EventEnded, EVENT_ENDS.name, partition)
            kept = self.receivers.told | {
                (self.webhooks._webhooks[one.webhook_id].tenant, one.message_id)
                for one in self.webhooks._waiting.values()
            }
            return {at for at, end in enumerate(ends) if (end.tenant, end.event_id) in kept}
        changes = self._messages(IndexChange, INDEX_CHANGES.name, partition)
        if step is StepName.INDEX:
            told = {change.position for change in changes}
            return {at for at, plan in enumerate(plans) if plan.position in told}
        applied = {tenant: one.positions.get(partition, -1) for (tenant, _), one in self.cache._slices.items()}
        return {
            at
            for at, change in enumerate(changes)
            if Position.parse(change.position).offset <= applied.get(change.tenant, -1)
        }

    def _messages(self, model, topic, partition):
        return [decode(model, one.value, one.headers) for one in self.streams.log[topic, partition]]

    def _hear(self) -> None:
        """Read the index changes that came: what they say must be true at this instant."""
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
        self._look()

    def _look(self) -> None:
        """What must hold at every instant."""
        done = self.observed.done_so_far()
        for key in list(self.observed.accepted):
            self.observed.searchable(key, self.index.seen(key), after=done.get(key, ()))
            standing = self.index._manifests.get(key)
            if standing is not None and standing.manifest.completed is not None:
                self.observed.manifest(key, standing.manifest.completed.version)

    def _look_at_positions(self) -> None:
        """Whoever has lost all positions reads them from the index: what they cover is there."""
        for standing in self.index._manifests.values():
            for failure in standing.manifest.failed:
                self._give_up(Position.parse(failure.position))
        for tenant in self.tenants:
            positions = {at: offset for (of, at), offset in self.index._positions.items() if of == tenant}
            self.observed.advanced(tenant, positions, self._passages())

    def _give_up(self, position: Position) -> None:
        if position not in self.observed.outcomes:
            self.observed.gave_up(position)

    def _count_copies(self) -> None:
        """At rest each passage is there once: of copies with other groups the invariants would see one only."""
        for key, passages in self._passages().items():
            there = [name for name, one in self.index._searchable.items() if one.chunk.key == key]
            if len(there) > len(passages):
                self.observed.lost(f"{key} has copies beside what they replace: {there}")

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
