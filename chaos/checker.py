"""The checker: reads streams and index, replays the stream in a reference model, and evaluates the invariants."""

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

from chaos.clients import MAX_RESULTS, Acknowledgement, ClientHistory
from chaos.recovery import NotRecovered
from freshline.verify.invariants import Version
from freshline.verify.observed import ObservedHistory
from freshline.verify.served import planned_passages, served_passages, stored_passages
from infra.blobs import open_blob_store
from infra.kafka.codec import decode
from infra.kafka.port import StreamUnavailable
from infra.kafka.provision import StreamAdmin
from infra.kafka.security import client_options
from infra.kafka.topic_reader import read_partition
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.port import IndexUnavailable
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
"""A check is not possible now; it is repeated later."""

_NO_POSITION: Final = str(Position(0, 0))
"""The model of an event does not depend on its position."""
_CHECK_TIMEOUT_S: Final = 20.0
_FINAL_CHECK_S: Final = 60.0
_CHECK_INTERVAL_S: Final = 1.0
_ORDER: Final = (DOCUMENTS, CHUNKS, INDEX_CHANGES)
"""Reading order. End offsets are read in the opposite order, so that the cause of a record is read before it."""


class ReferenceModel:
    """What each event would make searchable on its own, by the pure parts of the pipeline."""

    def __init__(self, settings: Settings) -> None:
        self._blobs = open_blob_store(settings.blobs)
        self._parsers = ParserPool(settings.parse)
        self._prepare = Prepare(self._blobs, self._parsers, splitter(settings), profile(settings), NoProgress())

    async def start(self) -> None:
        """Start the parser."""
        await self._parsers.start()

    async def version(self, event: DocumentEvent, place: int) -> Version:
        """The event, as the invariants take it."""
        deleted = event.change is Change.DELETED
        passages: frozenset[str] | None = frozenset() if deleted else await self._passages(event)
        return Version(
            event.version, place, passages is not None, deleted, passages or frozenset(), frozenset(event.groups)
        )

    async def close(self) -> None:
        """Stop the parser."""
        await self._parsers.close()
        await self._blobs.close()

    async def _passages(self, event: DocumentEvent) -> frozenset[str] | None:
        try:
            plan, chunks = await self._prepare.plan(event, _NO_POSITION)
        except ParseFailed:
            return None
        return planned_passages(plan.title, event.source, chunks)


class Checker:
    """Checks continuously while it runs, and completely when the installation is idle.

    Attributes:
        observed: the history so far, with its violations.
        checks: number of completed index scans.
        unreported: completed events whose outcome is not available to their senders.
    """

    def __init__(self, settings: Settings, history: ClientHistory) -> None:
        self.observed = ObservedHistory()
        self.checks = 0
        self.unreported = 0
        self._settings = settings
        self._history = history
        self._reference = ReferenceModel(settings)
        self._index = OpenSearchIndex.open(settings)
        self._read: dict[tuple[str, int], int] = {}
        self._events: dict[Position, str] = {}
        self._planned: dict[int, list[str]] = {}
        self._completed: set[str] = set()
        self._acknowledgements_checked = 0
        self._redis = connect_redis(settings.redis)
        self._statuses = EventStatuses(
            RedisEventStates(self._redis, settings.names),
            RedisAnswerCache(self._redis, settings.names, settings.answers),
            partial(read_partition, settings),
        )
        self._checking = asyncio.Lock()

    async def start(self) -> None:
        """Start the reference model."""
        await self._reference.start()

    async def watch(self) -> None:
        """Check until cancelled. Checks that fail because of a fault are repeated later."""
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            try:
                async with asyncio.timeout(_CHECK_TIMEOUT_S):
                    await self.check()
            except UNREACHABLE:
                continue

    async def check(self) -> dict[DocumentKey, dict[str, int]]:
        """Read commits, index and streams, in an order in which they can be compared, and evaluate them.

        Returns:
            Searchable passages of each document.

        Raises:
            One of UNREACHABLE.
        """
        async with self._checking:
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
            self.checks += 1
            return passages

    async def rest(self, ask: Callable[..., Awaitable[dict[str, Any] | None]]) -> dict[DocumentKey, dict[str, int]]:
        """Evaluate everything that was acknowledged, answered and is searchable, after all events have completed.

        Args:
            ask: asks for all passages of a document.

        Raises:
            NotRecovered: the stores cannot be read.
        """
        passages = await self._final_check()
        # Only when idle: under faults, a real-time read may return an unreplicated write that is lost with its node.
        for key, manifest in (await self._index.manifests(list(self.observed.accepted))).items():
            if manifest.completed is not None:
                self.observed.manifest(key, manifest.completed.version)
        await self._check_acknowledgements(self._history.acknowledgements[self._acknowledgements_checked :])
        self._acknowledgements_checked = len(self._history.acknowledgements)
        self.observed.rested(passages)
        heads = {position.partition: position for position in sorted(self._events)}
        for key in sorted(self.observed.accepted):
            # At or beyond its last event, an answer must match the index.
            head = heads[self.observed.partitions[key]]
            await ask(key.document_id, min_position=str(head))
        self._check_answers()
        return passages

    async def _final_check(self) -> dict[DocumentKey, dict[str, int]]:
        """Check, with retries: an idle installation becomes reachable."""
        until_s = time.monotonic() + _FINAL_CHECK_S
        while True:
            try:
                return await self.check()
            except UNREACHABLE as error:
                if time.monotonic() > until_s:
                    raise NotRecovered(f"the checker cannot read the stores: {error!r}") from error
                await asyncio.sleep(_CHECK_INTERVAL_S)

    async def close(self) -> None:
        """Close connections."""
        await self._index.close()
        await self._redis.aclose()
        await self._reference.close()

    async def _check_acknowledgements(self, acknowledgements: Sequence[Acknowledgement]) -> None:
        for acknowledgement in acknowledgements:
            accepted, tenant = acknowledgement.accepted, self._settings.tenant.default
            position = Position.parse(accepted.position)
            event_id = self._events.get(position)
            if event_id != accepted.event_id:
                self.observed.lost(f"{accepted} was acknowledged, but {event_id} is at its position")
            if acknowledgement.assigned:
                self.observed.assigned(DocumentKey(tenant, accepted.document_id), accepted.version)
            status = await self._statuses.get(tenant, accepted.event_id)
            if status is None or status.outcome is None:
                self.unreported += 1
            else:
                self.observed.outcome_reported_again(position, status.outcome)

    def _check_answers(self) -> None:
        tenant = self._settings.tenant.default
        for document_id, answer in self._history.answers:
            as_of = {int(partition): offset for partition, offset in answer["as_of"]["positions"].items()}
            served = served_passages(answer["results"], tenant)
            for key, passages in served.items():
                self.observed.answered(as_of, tenant, (), key, passages)
            key = DocumentKey(tenant, document_id or "")
            if document_id is not None and self._fits(key):
                self.observed.answered_whole(as_of, key, served.get(key, {}))
        self._history.answers.clear()

    def _fits(self, key: DocumentKey) -> bool:
        return all(len(version.passages) <= MAX_RESULTS for version in self.observed.accepted[key])

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
        return {offset for offset, position in enumerate(plans) if position in self._completed}

    async def _catch_up(self) -> None:
        """Read the streams up to their current ends."""
        consumer = AIOKafkaConsumer(**client_options(self._settings.kafka), enable_auto_commit=False)
        try:
            await consumer.start()
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
            records = await consumer.getmany(partition, timeout_ms=1_000)
            for record in records.get(partition, ()):
                if record.offset >= end:  # its cause may not have been read
                    return
                await self._take(topic, record)
                self._read[place] = record.offset + 1

    async def _take(self, topic: Topic, record: Any) -> None:
        if topic is DOCUMENTS:
            event = decode(DocumentEvent, record.value, record.headers)
            position = Position(record.partition, record.offset)
            version = await self._reference.version(event, record.offset)
            self._events[position] = event.event_id
            self.observed.accept(position, event.key, version)
        elif topic is CHUNKS:
            plan = decode(ChunkPlan, record.value, record.headers)
            self._planned.setdefault(record.partition, []).append(plan.position)
        else:
            change = decode(IndexChange, record.value, record.headers)
            self._completed.add(change.position)
            self.observed.record_outcome(Position.parse(change.position), change.outcome)

    def _partitions(self, topic: Topic) -> list[TopicPartition]:
        name = self._settings.names.topic(topic.name)
        return [TopicPartition(name, number) for number in range(self._settings.kafka.partitions)]


@asynccontextmanager
async def checking(settings: Settings, history: ClientHistory) -> AsyncIterator[Checker]:
    """A started checker."""
    checker = Checker(settings, history)
    try:
        await checker.start()
        yield checker
    finally:
        await checker.close()
