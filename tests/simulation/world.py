"""The three real steps and the real runner on twins of all stores, in a world where anything may fail at any await."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import invariants
from invariants import Version
from prometheus_client import CollectorRegistry
from shaky_twins import (
    BROKEN,
    DIMENSION,
    PARTITIONS,
    Blobs,
    Cache,
    Embedder,
    Faults,
    Parsers,
    ReadSide,
    Splitter,
    States,
    Streams,
    WatchedIndex,
)

from infra.embedding.hashing import HashingEmbedder
from infra.kafka.codec import decode, encode_event
from infra.kafka.memory import MemoryStreams
from infra.opensearch.port import Access, IndexUnavailable
from infra.settings import StreamSettings
from ingest.event_status import EventStatuses
from query.metrics import QueryMetrics
from query.retrieval import Retrieval
from schemas.documents import DocumentKey, EventStatus, Outcome, Stage
from schemas.events import Change, ChunkPlan, DocumentEvent, IndexChange
from schemas.positions import Position
from schemas.topics import CHUNKS, DOCUMENTS, INDEX_CHANGES
from streams.core.chunk_identity import chunk_ids
from streams.core.commit_guard import LaneCommits
from streams.progress import StatesProgress
from streams.runner import Delivery, Runner
from streams.steps.index import Index
from streams.steps.invalidate import Invalidate
from streams.steps.prepare import Prepare
from streams.topology import TOPOLOGY, StepName

GC_DELETES_S = 3_600.0
TENANT = "acme"
DOCUMENTS_ALIVE = 3
EVENTS = 12
EVERYTHING = 100
SENTENCES = ("Hotels cost 120.", "Hotels cost 150.", "Trains run.", "Leave is paid.", "Ask HR.", "Bring a laptop.")


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass(frozen=True)
class Parts:
    """What a planted mistake may replace."""

    index: type[WatchedIndex] = WatchedIndex
    lane: type[LaneCommits] = LaneCommits
    prepare: type[Prepare] = Prepare
    step: type[Index] = Index
    retrieval: type[Retrieval] = Retrieval
    statuses: type[EventStatuses] = EventStatuses


class World:
    """One history; everything in it follows from the seed."""

    def __init__(self, seed: int, parts: Parts) -> None:
        self.rng = random.Random(seed)
        random.seed(seed)  # the runner's jitter
        self.parts = parts
        self.faults = Faults(self.rng)
        loop = asyncio.get_running_loop()
        self.streams = Streams(self.faults)
        self.blobs = Blobs(self.faults)
        pause = partial(self.faults.point, IndexUnavailable("no"))
        self.index = parts.index(DIMENSION, gc_deletes_s=GC_DELETES_S, now_s=loop.time, pause=pause)
        self.embedder = Embedder(self.faults)
        self.states = States(self.faults)
        self.cache = Cache(self.faults, lambda: 1 + int(loop.time() * 1e6))
        self.committed: dict[tuple[StepName, int], int] = defaultdict(int)
        self.accepted: dict[DocumentKey, list[Version]] = defaultdict(list)
        self.positions: dict[str, tuple[DocumentKey, Version]] = {}
        self.sent_twice: set[str] = set()
        self.told: dict[DocumentKey, list[Version]] = defaultdict(list)
        self.outcomes: dict[str, Outcome] = {}
        self.manifest_versions: dict[DocumentKey, int] = {}
        self._read_changes = dict.fromkeys(range(PARTITIONS), 0)
        self.index.on_refresh = self.check_searchable
        self.streams.on_placed = self.hear
        self.violations: list[str] = []
        self.workers: dict[StepName, Worker] = {}
        self.zombies: list[Worker] = []
        self.retrieval = parts.retrieval(
            index=ReadSide(self.index, self.faults),
            embedder=HashingEmbedder(DIMENSION),
            metrics=QueryMetrics(CollectorRegistry()),
            window=EVERYTHING,
            rrf_k=60,
        )

    # What happens

    async def live(self) -> None:
        """Events come, things fail, workers die; then it is calm, and everything ends; then the log is read again."""
        for step in TOPOLOGY:
            self.workers[step] = Worker(self, step)
        chaos = asyncio.create_task(self._chaos())
        readers = [asyncio.create_task(self._read_answers()) for _ in range(2)]
        for number in range(EVENTS):
            await asyncio.sleep(self.rng.expovariate(self.rng.choice((1, 20))))
            await self._accept(number)
        await asyncio.sleep(self.rng.uniform(0, 3))
        for task in (chaos, *readers):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await self._settle()
        self.check_rest()
        await self._check_events()
        self._stop_if_violated()
        before = {key: self.index.searchable(key) for key in self.accepted}
        for worker in self.workers.values():
            await worker.crash()
        await asyncio.sleep(2 * GC_DELETES_S)  # deleted passages are forgotten by now
        for number in range(PARTITIONS):
            self.committed[StepName.PREPARE, number] = self.rng.choice((0, 0, min(5, self._end(number))))
        self.workers = {step: Worker(self, step) for step in TOPOLOGY}
        await self._settle()
        for key, passages in before.items():
            if not invariants.replay_is_harmless(passages, self.index.searchable(key)):
                self._violated(f"I6: {key}: {passages} became {self.index.searchable(key)}")
        for worker in self.workers.values():
            await worker.crash()
        self._stop_if_violated()

    async def _accept(self, number: int) -> None:
        """What ingest does: content first, then the event; sometimes twice, as after a lost acknowledgement."""
        key = DocumentKey(TENANT, f"doc-{self.rng.randrange(DOCUMENTS_ALIVE)}")
        versions = [one.number for one in self.accepted[key]]
        # Mostly growing; now and then an old revision, or one that was there already.
        version = max(versions, default=0) + 1
        if versions and self.rng.random() < 0.2:
            version = self.rng.choice((*versions, max(versions) - 1, max(versions) + 3))
        deleted = self.rng.random() < 0.25
        lines = self.rng.sample(SENTENCES, self.rng.randrange(4))
        content = b"" if deleted else "\n".join(lines).encode()
        broken = not deleted and self.rng.random() < 0.15
        event = DocumentEvent(
            event_id=f"event-{number}",
            tenant=TENANT,
            document_id=key.document_id,
            version=max(version, 0),
            change=Change.DELETED if deleted else Change.UPSERTED,
            accepted_ms=0,
            content=None if deleted else await self.blobs.put(BROKEN if broken else content),
            title=self.rng.choice((None, None, "Title")),
            groups=self.rng.choice(((), (), ("hr",))),
        )
        planned = [] if deleted or broken else Splitter().split(content.decode(), event.title)
        for again in (False, True)[: 1 + (self.rng.random() < 0.1)]:
            [placed] = await MemoryStreams.send_all(self.streams, [encode_event(event)])
            one = Version(event.version, placed.offset, not broken, deleted, frozenset(chunk_ids(key, planned)))
            self.accepted[key].append(one)
            self.positions[str(Position(*placed))] = (key, one)
            if again:
                self.sent_twice.add(event.event_id)
        status = EventStatus(
            event_id=event.event_id,
            document_id=key.document_id,
            version=event.version,
            position=str(Position(*placed)),
            stage=Stage.ACCEPTED,
            outcome=None,
            accepted_ms=0,
            stages_ms={Stage.ACCEPTED: 0},
        )
        await self.states.begin(TENANT, status)

    async def _chaos(self) -> None:
        while True:
            await asyncio.sleep(self.rng.expovariate(1))
            step = self.rng.choice(list(TOPOLOGY))
            old = self.workers[step]
            if self.rng.random() < 0.4:
                # It lost its partitions and does not know: it goes on with what it holds, but cannot commit.
                old.lose_partitions()
                self.zombies.append(old)
            else:
                await old.crash()
            # Mostly from what is committed; now and then from further back, as after an operator's reset.
            back = self.rng.choice((0, 0, 0, 3))
            starts = {number: max(0, self.committed[step, number] - back) for number in range(PARTITIONS)}
            await self._restart(step, starts)
            if self.zombies and self.rng.random() < 0.5:
                await self.zombies.pop(self.rng.randrange(len(self.zombies))).crash()

    async def _read_answers(self) -> None:
        """Ask, also in the middle of changes: another document's refresh, which reaches the whole shard, shows them."""
        while True:
            await asyncio.sleep(self.rng.expovariate(3))
            if self.rng.random() < 0.7:
                self.index._refresh(self.accepted)
            told = {key: list(versions) for key, versions in self.told.items()}
            retrieved = await self.retrieval.retrieve("Hotels?", Access(TENANT, ("hr",)), top_k=EVERYTHING, filters={})
            for key, accepted in self.accepted.items():
                answered = {chunk.chunk_id for _, chunk in retrieved.passages if chunk.key == key}
                if not invariants.never_mixed(accepted, answered):
                    self._violated(f"I3: {key}: {answered} of an answer are of no single version of {accepted}")
                if not invariants.never_gone(told.get(key, []), accepted, answered):
                    self._violated(f"I3: {key}: only {answered} is answered after {told[key]}")

    async def _restart(self, step: StepName, starts: Mapping[int, int]) -> None:
        if self.workers[step] not in self.zombies:
            await self.workers[step].crash()
        for number, offset in starts.items():
            self.committed[step, number] = offset
        self.workers[step] = Worker(self, step)

    async def _settle(self) -> None:
        self.faults.calm = True
        while self.zombies:
            await asyncio.sleep(self.rng.uniform(0, 10))
            await self.zombies.pop().crash()
        async with asyncio.timeout(1_000):
            while any(
                self.committed[step, number] < len(self.streams.log[row.reads.name, number])
                for step, row in TOPOLOGY.items()
                for number in range(PARTITIONS)
            ):
                self._stop_if_violated()
                await asyncio.sleep(0.1)
        self._stop_if_violated()

    def _end(self, partition: int) -> int:
        return len(self.streams.log[DOCUMENTS.name, partition])

    def commit(self, step: StepName, partition: int, offset: int) -> None:
        """A worker commits: what became of every record below must be in the next stream by now (I5)."""
        self.committed[step, partition] = offset
        if not invariants.durable_before_commit(offset, self._ended(step, partition)):
            self._violated(f"I5: {step} committed {offset} of partition {partition} past a record that has not ended")

    # What is seen

    def _violated(self, what: str) -> None:
        # Not raised here: the runner would take it for a failure of the record.
        self.violations.append(what)

    def _stop_if_violated(self) -> None:
        if self.violations:
            raise Violation(self.violations[0])

    def _ended(self, step: StepName, partition: int) -> set[int]:
        if step is StepName.INVALIDATE:
            applied = self.cache._slices[TENANT].positions.get(partition, -1) if self.cache._slices else -1
            changes = self._messages(IndexChange, INDEX_CHANGES.name, partition)
            return {at for at, one in enumerate(changes) if Position.parse(one.position).offset <= applied}
        if step is StepName.PREPARE:
            plans = self._messages(ChunkPlan, CHUNKS.name, partition)
            return {Position.parse(one.position).offset for one in plans}
        told = {one.position for one in self._messages(IndexChange, INDEX_CHANGES.name, partition)}
        plans = self._messages(ChunkPlan, CHUNKS.name, partition)
        return {at for at, one in enumerate(plans) if one.position in told}

    def _messages(self, model, topic, partition):
        return [decode(model, one.value, one.headers) for one in self.streams.log[topic, partition]]

    def hear(self) -> None:
        """Read the index changes that came: what they say must be true at this instant."""
        for partition, read in self._read_changes.items():
            lane = self.streams.log[INDEX_CHANGES.name, partition]
            for record in lane[read:]:
                change = decode(IndexChange, record.value, record.headers)
                key, version = self.positions[change.position]
                self.outcomes.setdefault(change.position, change.outcome)
                if change.outcome is Outcome.DONE:
                    self.told[key].append(version)
                    searchable = self.index.searchable(key)
                    if not invariants.told_is_true(version, self.accepted[key], searchable):
                        self._violated(f"I3: {key} {version} was told, and {searchable} is searchable")
            self._read_changes[partition] = len(lane)
        self.check_searchable()

    def check_searchable(self) -> None:
        """What must hold at every instant."""
        for key, accepted in self.accepted.items():
            searchable = self.index.searchable(key)
            if not invariants.not_resurrected(self.told[key], searchable):
                self._violated(f"I2: {key}: {searchable} is searchable after {self.told[key]}")
            if not invariants.never_gone(self.told[key], accepted, searchable):
                self._violated(f"I3: {key}: only {searchable} is searchable after {self.told[key]}")
            standing = self.index._manifests.get(key)
            version = standing.manifest.version if standing else -1
            if not invariants.versions_only_grow(self.manifest_versions.get(key, -1), version):
                self._violated(f"I1: {key} went back to version {version}")
            self.manifest_versions[key] = version

    def check_rest(self) -> None:
        """What must hold once everything has ended."""
        for key, versions in self.accepted.items():
            searchable = self.index.searchable(key)
            if not invariants.newer_wins(versions, searchable):
                self._violated(f"I1: {key}: {searchable} is searchable at rest after {versions}")
        for position, (key, version) in self.positions.items():
            outcome = self.outcomes.get(position)
            if outcome is None or not invariants.right_outcome(version, self.accepted[key], outcome):
                self._violated(f"I5: {key} {version} ended {outcome} among {self.accepted[key]}")

    async def _check_events(self) -> None:
        """What is said of each event, though some of its states were lost, is how it ended."""
        statuses = self.parts.statuses(self.states, self.cache, self.index)
        for number in range(EVENTS):
            status = await statuses.get(TENANT, f"event-{number}")
            if status is None or status.position is None or status.event_id in self.sent_twice:
                continue
            standing = self.index._manifests.get(DocumentKey(TENANT, status.document_id))
            manifest = standing.manifest if standing else None
            # Of an event that something newer followed, nothing may be left to tell how it ended.
            known = {self.outcomes[status.position]} | (
                {None} if manifest is None else {Outcome.SUPERSEDED} if manifest.version > status.version else set()
            )
            if status.outcome not in known:
                self._violated(f"I5: {status} ended {self.outcomes[status.position]}")


class Worker:
    """What a worker process does around the runner, in the place of Faust."""

    def __init__(self, world: World, step: StepName) -> None:
        self._world = world
        self._step = step
        self._owner = True
        self._lanes = {number: world.parts.lane() for number in range(PARTITIONS)}
        settings = StreamSettings(batch_events=world.rng.choice((1, 2, 8)), retry_first_ms=10, retry_max_ms=500)
        self._runner = Runner(self._made(step), world.streams, settings, on_finished=lambda *_: None)
        self._tasks = [asyncio.create_task(one) for one in (self._runner.run(), self._read(), self._commit())]

    def lose_partitions(self) -> None:
        self._owner = False

    async def crash(self) -> None:
        """Stop at whatever await each part is; raises what one of them died of."""
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError):
                raise ended

    def _made(self, step: StepName):
        world = self._world
        progress = StatesProgress(world.states)
        if step is StepName.PREPARE:
            return world.parts.prepare(world.blobs, Parsers(), Splitter(), "profile", progress)
        if step is StepName.INDEX:
            return world.parts.step(world.index, world.embedder, world.blobs, "g1", 3, progress)
        return Invalidate(world.cache, world.states)

    async def _read(self) -> None:
        world, topic = self._world, TOPOLOGY[self._step].reads.name
        offsets = {number: world.committed[self._step, number] for number in range(PARTITIONS)}
        while self._owner:
            for partition in world.rng.sample(range(PARTITIONS), PARTITIONS):
                lane = world.streams.log[topic, partition]
                for record in lane[offsets[partition] : offsets[partition] + world.rng.randint(0, 4)]:
                    offset = offsets[partition]
                    offsets[partition] += 1
                    self._lanes[partition].deliver(offset)
                    done = partial(self._lanes[partition].finish, offset)
                    await self._runner.take(Delivery(partition, offset, record.key, record.value, record.headers, done))
            await asyncio.sleep(world.rng.uniform(0.01, 0.2))
        await asyncio.Event().wait()

    async def _commit(self) -> None:
        world = self._world
        while True:
            await asyncio.sleep(world.rng.uniform(0.02, 0.5))
            for partition, lane in self._lanes.items():
                offset = lane.committable()
                refused = not self._owner or (not world.faults.calm and world.rng.random() < 0.2)
                if offset is not None and not refused:
                    world.commit(self._step, partition, offset)
                    lane.committed(offset)
