"""The judge: reads the streams and the index by itself, replays the stream in a model, and applies the invariants."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import httpx
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from chaos.recovery import NotRecovered
from chaos.traffic import MOST_RESULTS, Promise, Seen
from freshline.verify.invariants import Version
from freshline.verify.observed import Observed
from freshline.verify.served import planned_passages, served_passages, stored_passages
from infra.blobs import open_blob_store
from infra.kafka.codec import decode
from infra.kafka.port import StreamUnavailable
from infra.kafka.provision import StreamAdmin
from infra.kafka.reading import read_lane
from infra.kafka.security import client_options
from infra.opensearch.port import IndexUnavailable
from infra.opensearch.store import OpenSearchIndex
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from infra.redis.event_states import RedisEventStates
from infra.settings import Settings
from ingest.event_status import EventStatuses
from schemas.documents import DocumentKey
from schemas.events import Change, ChunkPlan, DocumentEvent, IndexChange
from schemas.index import StoredChunk
from schemas.positions import Position
from schemas.topics import CHUNKS, DOCUMENTS, INDEX_CHANGES, Topic
from streams.parsing.sandbox import ParseFailed, ParserPool
from streams.progress import NoProgress
from streams.steps.prepare import Prepare
from streams.topology import StepName
from streams.worker import profile, splitter

UNREACHABLE: Final = (IndexUnavailable, KafkaError, StreamUnavailable, TimeoutError, httpx.TransportError)
"""The judge cannot look now; it looks again later."""

_NOWHERE: Final = str(Position(0, 0))
"""The model of an event does not depend on its position."""
_LOOK_S: Final = 20.0
_REST_S: Final = 60.0
_BETWEEN_LOOKS_S: Final = 1.0
_ORDER: Final = (DOCUMENTS, CHUNKS, INDEX_CHANGES)
"""Read in this order, up to ends asked for in the opposite one: what a record stems from is known before it."""


class Model:
    """What each event should make searchable, had it been the only one: the pure parts of the pipeline, one by one."""

    def __init__(self, settings: Settings) -> None:
        self._blobs = open_blob_store(settings.blobs)
        self._parsers = ParserPool(settings.parse)
        self._prepare = Prepare(self._blobs, self._parsers, splitter(settings), profile(settings), NoProgress())

    async def start(self) -> None:
        """Start the parser."""
        await self._parsers.start()

    async def version(self, event: DocumentEvent, place: int) -> Version:
        """The event as the invariants see it."""
        deleted = event.change is Change.DELETED
        passages: frozenset[str] | None = frozenset() if deleted else await self._passages(event)
        return Version(
            event.version, place, passages is not None, deleted, passages or frozenset(), frozenset(event.groups)
        )

    async def close(self) -> None:
        """End the parser."""
        await self._parsers.close()
        await self._blobs.close()

    async def _passages(self, event: DocumentEvent) -> frozenset[str] | None:
        try:
            plan, chunks = await self._prepare.planned(event, _NOWHERE)
        except ParseFailed:
            return None
        return planned_passages(plan.title, event.source, chunks)


class Judge:
    """Looks all the time while it runs, and thoroughly when everything is at rest.

    Attributes:
        observed: the history so far, with its violations.
        looks: how often the index was seen.
        untold: events that ended, and whose senders cannot learn it.
    """

    def __init__(self, settings: Settings, seen: Seen) -> None:
        self.observed = Observed()
        self.looks = 0
        self.untold = 0
        self._settings = settings
        self._seen = seen
        self._model = Model(settings)
        self._index = OpenSearchIndex.open(settings)
        self._read: dict[tuple[str, int], int] = {}
        self._events: dict[Position, str] = {}
        self._planned: dict[int, list[str]] = {}
        self._told: set[str] = set()
        self._judged_promises = 0
        self._redis = connect_redis(settings.redis)
        self._statuses = EventStatuses(
            RedisEventStates(self._redis, settings.names),
            RedisAnswerCache(self._redis, settings.names, settings.answers),
            partial(read_lane, settings),
        )
        self._looking = asyncio.Lock()

    async def start(self) -> None:
        """Be ready to look."""
        await self._model.start()

    async def watch(self) -> None:
        """Look until cancelled. What is out of reach because of a fault is looked at the next time."""
        while True:
            await asyncio.sleep(_BETWEEN_LOOKS_S)
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self.look()
            except UNREACHABLE:
                continue

    async def look(self) -> dict[DocumentKey, dict[str, int]]:
        """See commits, index and streams, in the order that makes what is seen judgeable.

        Returns:
            What is searchable.

        Raises:
            one of UNREACHABLE.
        """
        async with self._looking:
            committed = await self._committed()
            await self._catch_up()
            for (step, partition), offset in committed.items():
                self.observed.committed(f"{step} {partition}", offset, self._ended(step, partition))
            done = self.observed.done_so_far()
            chunks: dict[DocumentKey, list[StoredChunk]] = defaultdict(list)
            async for scanned in self._index.scan_chunks():
                chunks[scanned.chunk.key].append(scanned.chunk)
            passages = {key: stored_passages(mine) for key, mine in chunks.items()}
            await self._catch_up()
            for key in self.observed.accepted:
                self.observed.searchable(key, passages.get(key, {}), after=done.get(key, ()))
            self.looks += 1
            return passages

    async def rest(self, ask: Callable[..., Awaitable[dict[str, Any] | None]]) -> dict[DocumentKey, dict[str, int]]:
        """Everything has ended: judge all that was promised, served and is searchable.

        Args:
            ask: asks for everything there is of a document.
        """
        passages = await self._look_at_last()
        # Not under faults: a read in real time may see a write that the node holding it has not replicated yet, and
        # that is lost, unacknowledged, with that node.
        for key, manifest in (await self._index.manifests(list(self.observed.accepted))).items():
            if manifest.completed is not None:
                self.observed.manifest(key, manifest.completed.version)
        await self._judge_promises(self._seen.promises[self._judged_promises :])
        self._judged_promises = len(self._seen.promises)
        self.observed.rested(passages)
        heads = {position.partition: position for position in sorted(self._events)}
        for key in sorted(self.observed.accepted):
            # At or beyond its last event: what is served now must be what is searchable.
            head = heads[self.observed.partitions[key]]
            await ask(key.document_id, min_position=str(head))
        self._judge_answers()
        return passages

    async def _look_at_last(self) -> dict[DocumentKey, dict[str, int]]:
        """At rest the judge can look, if not at once."""
        until_s = time.monotonic() + _REST_S
        while True:
            try:
                return await self.look()
            except UNREACHABLE as error:
                if time.monotonic() > until_s:
                    raise NotRecovered(f"the judge cannot look: {error!r}") from error
                await asyncio.sleep(_BETWEEN_LOOKS_S)

    async def close(self) -> None:
        """Close connections."""
        await self._index.close()
        await self._redis.aclose()
        await self._model.close()

    async def _judge_promises(self, promises: Sequence[Promise]) -> None:
        for promise in promises:
            accepted, tenant = promise.accepted, self._settings.tenant.default
            position = Position.parse(accepted.position)
            found = self._events.get(position)
            if found != accepted.event_id:
                self.observed.lost(f"{accepted} was promised, and {found} is at its position")
            if promise.assigned:
                self.observed.assigned(DocumentKey(tenant, accepted.document_id), accepted.version)
            status = await self._statuses.get(tenant, accepted.event_id)
            if status is None or status.outcome is None:
                self.untold += 1
            else:
                self.observed.told_again(position, status.outcome)

    def _judge_answers(self) -> None:
        tenant = self._settings.tenant.default
        for document_id, answer in self._seen.answers:
            as_of = {int(partition): offset for partition, offset in answer["as_of"]["positions"].items()}
            served = served_passages(answer["results"], tenant)
            for key, passages in served.items():
                self.observed.answered(as_of, tenant, (), key, passages)
            key = DocumentKey(tenant, document_id or "")
            if document_id is not None and self._fits(key):
                self.observed.answered_whole(as_of, key, served.get(key, {}))
        self._seen.answers.clear()

    def _fits(self, key: DocumentKey) -> bool:
        return all(len(version.passages) <= MOST_RESULTS for version in self.observed.accepted[key])

    async def _committed(self) -> Mapping[tuple[StepName, int], int]:
        steps = {StepName.PREPARE: DOCUMENTS, StepName.INDEX: CHUNKS}
        async with StreamAdmin(self._settings) as admin:
            return {
                (step, lag.partition): lag.committed
                for step, topic in steps.items()
                for lag in await admin.lag(topic, self._settings.names.group(step))
            }

    def _ended(self, step: StepName, partition: int) -> set[int]:
        plans = self._planned.get(partition, [])
        if step is StepName.PREPARE:
            return {Position.parse(position).offset for position in plans}
        return {offset for offset, position in enumerate(plans) if position in self._told}

    async def _catch_up(self) -> None:
        """Read the streams up to their present ends."""
        consumer = AIOKafkaConsumer(**client_options(self._settings.kafka), enable_auto_commit=False)
        await consumer.start()
        try:
            ends: dict[str, dict[TopicPartition, int]] = {}
            for topic in reversed(_ORDER):
                ends[topic.name] = await consumer.end_offsets(self._partitions(topic))
            for topic in _ORDER:
                for partition, end in ends[topic.name].items():
                    await self._read_to(consumer, topic, partition, end)
        finally:
            await consumer.stop()

    async def _read_to(self, consumer: Any, topic: Topic, partition: TopicPartition, end: int) -> None:
        place = (topic.name, partition.partition)
        if self._read.get(place, 0) >= end:
            return
        consumer.assign([partition])
        consumer.seek(partition, self._read.get(place, 0))
        while self._read.get(place, 0) < end:
            got = await consumer.getmany(partition, timeout_ms=1_000)
            for record in got.get(partition, ()):
                if record.offset >= end:  # later than what it stems from was read up to
                    return
                await self._take(topic, record)
                self._read[place] = record.offset + 1

    async def _take(self, topic: Topic, record: Any) -> None:
        if topic is DOCUMENTS:
            event = decode(DocumentEvent, record.value, record.headers)
            position = Position(record.partition, record.offset)
            version = await self._model.version(event, record.offset)
            self._events[position] = event.event_id
            self.observed.accept(position, event.key, version)
        elif topic is CHUNKS:
            plan = decode(ChunkPlan, record.value, record.headers)
            self._planned.setdefault(record.partition, []).append(plan.position)
        else:
            change = decode(IndexChange, record.value, record.headers)
            self._told.add(change.position)
            self.observed.told(Position.parse(change.position), change.outcome)

    def _partitions(self, topic: Topic) -> list[TopicPartition]:
        name = self._settings.names.topic(topic.name)
        return [TopicPartition(name, number) for number in range(self._settings.kafka.partitions)]


@asynccontextmanager
async def judging(settings: Settings, seen: Seen) -> AsyncIterator[Judge]:
    """A judge who is ready to look."""
    judge = Judge(settings, seen)
    try:
        await judge.start()
        yield judge
    finally:
        await judge.close()
