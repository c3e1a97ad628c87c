"""Whether stream, index and contents agree, document by document; and how to mend what can be mended.

What is to be expected is computed from the stream alone. The index is only read, unless repair is asked for.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from freshline.agreement import ADVICE, SENT_AGAIN, Findings, Kind, compare, expected, refused
from infra.blobs import open_blob_store
from infra.blobs.port import BlobStore
from infra.kafka.codec import Undecodable, decode, encode_event, header
from infra.kafka.producer import KafkaProducer
from infra.kafka.provision import StreamAdmin
from infra.kafka.reading import read_to_end
from infra.opensearch.port import Hit
from infra.opensearch.store import OpenSearchIndex
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from infra.settings import Settings
from schemas.documents import DocumentKey, LifeState, Outcome
from schemas.events import ChunkPlan, DocumentEvent, IndexChange
from schemas.index import Manifest, StoredChunk
from schemas.positions import Position
from schemas.topics import CHUNKS, DEAD_LETTERS, DOCUMENTS, INDEX_CHANGES
from streams.topology import TOPOLOGY, StepName

MAX_EXAMPLES: Final = 20
_AT_A_TIME: Final = 32


class EventsUnderWay(Exception):
    """Repair now could undo what a worker is just doing."""


class Finding(BaseModel):
    """One kind of disagreement.

    Attributes:
        examples: the first of them, at most ``MAX_EXAMPLES``.
        advice: what to do about it.
    """

    model_config = ConfigDict(frozen=True)

    count: int
    examples: tuple[str, ...]
    advice: str


class Report(BaseModel):
    """What was found.

    Attributes:
        events: in the document stream.
        documents: that are searchable.
        tombstones: documents that are deleted.
        chunks: searchable passages.
        under_way: records that a step has not finished; each may be the cause of a finding.
        refused: documents whose newest version could not be processed; as it should be, they keep the one before.
        findings: kind of disagreement → what was found.
        repaired: what was done → how often.
    """

    model_config = ConfigDict(frozen=True)

    events: int
    documents: int
    tombstones: int
    chunks: int
    under_way: int
    refused: Finding
    findings: dict[str, Finding]
    repaired: dict[str, int] = {}

    @property
    def ok(self) -> bool:
        """True if everything agrees."""
        return not self.findings


async def verify(settings: Settings, *, repair: bool) -> Report:
    """Compare everything.

    With ``repair``, the newest events of documents that lack them are sent once more, and passages that no manifest
    knows are removed. What was removed is no finding any more; what was sent again is one until it has been processed.

    Raises:
        EventsUnderWay: something is to be repaired while workers have something to do.
    """
    under_way, events, outcomes = await asyncio.gather(_under_way(settings), _events(settings), _outcomes(settings))
    index = OpenSearchIndex.open(settings)
    blobs = open_blob_store(settings.blobs)
    try:
        # Passages first: whatever is seen of a change that comes now, its manifest was written before it.
        chunks = [chunk async for chunk in index.scan_chunks()]
        manifests = {manifest.key: manifest async for manifest in index.scan_manifests()}
        wanted = expected(events, outcomes)
        findings = compare(wanted, manifests, chunks)
        if lost := await _lost(blobs, manifests.values()):
            findings[Kind.CONTENT_LOST] = lost
        repaired: dict[str, int] = {}
        if repair and findings.keys() & {*SENT_AGAIN, Kind.ORPHAN}:
            if under_way:
                raise EventsUnderWay(f"{under_way} events are under way: repair when `freshline lag` shows none")
            repaired = await _repair(settings, index, findings, wanted, chunks)
            findings.pop(Kind.ORPHAN, None)
    finally:
        await blobs.close()
        await index.close()
    live = sum(manifest.state is LifeState.LIVE for manifest in manifests.values())
    return Report(
        events=len(events),
        documents=live,
        tombstones=len(manifests) - live,
        chunks=len(chunks),
        under_way=under_way,
        refused=_finding(refused(events, outcomes), "`GET /v1/events/ID` says why; upload what can be read"),
        findings={str(kind): _finding(found, ADVICE[kind]) for kind, found in findings.items()},
        repaired=repaired,
    )


def _finding(found: Sequence[str], advice: str) -> Finding:
    return Finding(count=len(found), examples=tuple(found[:MAX_EXAMPLES]), advice=advice)


async def _repair(
    settings: Settings,
    index: OpenSearchIndex,
    findings: Findings,
    wanted: Mapping[DocumentKey, DocumentEvent | None],
    chunks: Iterable[StoredChunk],
) -> dict[str, int]:
    orphans = set(findings.get(Kind.ORPHAN, ()))
    hits = [Hit(chunk.chunk_id, chunk.key, 0.0) for chunk in chunks if f"{chunk.key} {chunk.chunk_id}" in orphans]
    if hits:
        await index.delete_chunks(hits)
        await _drop_answers(settings, {hit.key.tenant for hit in hits})
    keys = [DocumentKey.parse(name) for kind in SENT_AGAIN for name in findings.get(kind, ())]
    again = [event for key in keys if (event := wanted[key]) is not None]
    if again:
        producer = await KafkaProducer.open(settings)
        try:
            await producer.send_all([encode_event(event) for event in again])
        finally:
            await producer.close()
    return {"passages removed": len(hits), "events sent again": len(again)}


async def _drop_answers(settings: Settings, tenants: Iterable[str]) -> None:
    """Cached answers may stand on what was removed, and no event tells of it."""
    redis = connect_redis(settings.redis)
    try:
        cache = RedisAnswerCache(redis, settings.names)
        for tenant in tenants:
            await cache.apply(tenant, {}, drop=True)
    finally:
        await redis.aclose()


async def _lost(blobs: BlobStore, manifests: Iterable[Manifest]) -> list[str]:
    """Documents whose content is not in the store."""
    stored = [(manifest.key, manifest.content) for manifest in manifests if manifest.content is not None]
    lost: list[str] = []
    for start in range(0, len(stored), _AT_A_TIME):
        some = stored[start : start + _AT_A_TIME]
        there = await asyncio.gather(*(blobs.exists(content) for _, content in some))
        lost += [str(key) for (key, _), exists in zip(some, there, strict=True) if not exists]
    return sorted(lost)


async def _under_way(settings: Settings) -> int:
    async with StreamAdmin(settings) as admin:
        lags = [await admin.lag(row.reads, settings.names.group(step)) for step, row in TOPOLOGY.items()]
    return sum(one.behind for lag in lags for one in lag)


async def _events(settings: Settings) -> dict[Position, DocumentEvent]:
    events = {}
    async for record in read_to_end(settings, DOCUMENTS):
        try:
            event = decode(DocumentEvent, record.value, record.headers)
        except Undecodable:  # it is a dead letter, and names no document
            continue
        events[Position(record.partition, record.offset)] = event
    return events


async def _outcomes(settings: Settings) -> dict[Position, Outcome]:
    """How events ended, as far back as these topics go. Dead letters are kept longer than index changes."""
    outcomes: dict[Position, Outcome] = {}
    async for record in read_to_end(settings, DEAD_LETTERS):
        if (position := _refused_position(record)) is not None:
            outcomes[position] = Outcome.DEAD_LETTER
    async for record in read_to_end(settings, INDEX_CHANGES):
        change = decode(IndexChange, record.value, record.headers)
        outcomes[Position.parse(change.position)] = change.outcome
    return outcomes


def _refused_position(record: Any) -> Position | None:
    """The event that a dead letter is of; None where the event did become searchable, or cannot be told."""
    topic = header(record.headers, "__connect.errors.topic")
    if topic == TOPOLOGY[StepName.PREPARE].reads.name:
        return Position(record.partition, int(header(record.headers, "__connect.errors.offset") or -1))
    if topic != CHUNKS.name:
        return None
    try:
        return Position.parse(decode(ChunkPlan, record.value, record.headers).position)
    except Undecodable:
        return None
