"""Consistency check of stream, index and contents per document, with repair.

The expected state is computed from the stream alone. Without repair, the index is only read.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from freshline.verify.agreement import ADVICE, Kind, PassageContent, compare, expected, rejected, to_rewrite
from freshline.verify.contents import compare_with_contents
from infra.blobs import open_blob_store
from infra.blobs.port import BlobStore
from infra.kafka.codec import Undecodable, decode
from infra.kafka.dead_letters import read_dead_letter
from infra.kafka.producer import KafkaProducer
from infra.kafka.provision import StreamAdmin
from infra.kafka.topic_reader import read_to_end
from infra.opensearch.index import OpenSearchIndex
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from infra.redis.event_states import RedisEventStates
from infra.settings import Settings
from ingest.event_log import EventLog
from schemas.documents import DocumentKey, LifeState, Outcome
from schemas.events import BlobRef, ChunkPlan, DocumentEvent, IndexChange
from schemas.index import StoredChunk
from schemas.positions import Position
from schemas.search import Hit
from schemas.topics import DEAD_LETTERS, DOCUMENTS, INDEX_CHANGES
from streams.topology import TOPOLOGY

MAX_EXAMPLES: Final = 20
_AT_A_TIME: Final = 32
_ROUNDS: Final = 2
"""A passage that cannot be replaced under its id becomes an orphan in the first round, removed in the second."""
_PROCESSED_S: Final = 300.0
_POLL_S: Final = 0.2


class EventsUnderWay(Exception):
    """Repair is not possible while events are in progress: they may be the cause of the findings."""


class Finding(BaseModel):
    """A kind of inconsistency.

    Attributes:
        examples: the first of them, at most ``MAX_EXAMPLES``.
        advice: recommended action.
    """

    model_config = ConfigDict(frozen=True)

    count: int
    examples: tuple[str, ...]
    advice: str


class Report(BaseModel):
    """Result of a check.

    Attributes:
        events: number of events in the document stream.
        documents: number of searchable documents.
        tombstones: number of deleted documents.
        chunks: number of searchable passages.
        in_progress: records that a step has not finished; each may be the cause of a finding.
        rejected: documents whose newest version could not be processed. They correctly keep the previous one.
        not_compared: documents whose passages were not compared with their content.
        findings: kind of inconsistency → finding.
        repaired: action → count.
    """

    model_config = ConfigDict(frozen=True)

    events: int
    documents: int
    tombstones: int
    chunks: int
    in_progress: int
    rejected: Finding
    not_compared: Finding
    findings: dict[str, Finding]
    repaired: dict[str, int] = {}

    @property
    def ok(self) -> bool:
        """Whether everything is consistent."""
        return not self.findings


@dataclass(frozen=True, slots=True)
class _Check:
    """Result of one comparison.

    Attributes:
        rewrites: events to republish, by document.
        orphans: passages without a manifest.
    """

    report: Report
    rewrites: Mapping[DocumentKey, DocumentEvent]
    orphans: tuple[Hit, ...]


async def verify(settings: Settings, *, repair: bool) -> Report:
    """Compare everything; returns the report of the last comparison.

    With ``repair``, inconsistent documents are rewritten by the workers, orphaned passages are removed, and everything
    is compared again when the workers have finished.

    Raises:
        EventsUnderWay: repair is required while events are in progress, or did not finish in time.
    """
    check = await _check(settings)
    repaired: Counter[str] = Counter()
    for _ in range(_ROUNDS if repair else 0):
        if not check.rewrites and not check.orphans:
            break
        if check.report.in_progress:
            raise EventsUnderWay(
                f"{check.report.in_progress} events are in progress: repair when `freshline lag` shows no lag"
            )
        repaired.update(await _repair(settings, check))
        await _until_processed(settings)
        check = await _check(settings)
    return check.report.model_copy(update={"repaired": dict(repaired)})


async def _check(settings: Settings) -> _Check:
    in_progress, events, outcomes = await asyncio.gather(_in_progress(settings), _events(settings), _outcomes(settings))
    index = OpenSearchIndex.open(settings)
    blobs = open_blob_store(settings.blobs)
    try:
        # Passages first: a concurrent change writes its manifest before its passages. Texts are not kept, to bound
        # memory.
        chunks: list[StoredChunk] = []
        passages: dict[str, PassageContent] = {}
        async for one in index.scan_chunks():
            passages[one.chunk.chunk_id] = PassageContent.of(one.chunk, consistent=one.consistent)
            chunks.append(one.chunk.model_copy(update={"text": ""}))
        manifests = {manifest.key: manifest async for manifest in index.scan_manifests()}
        wanted = expected(events, outcomes)
        findings = compare(wanted, manifests, chunks)
        contents = [(manifest.key, manifest.content) for manifest in manifests.values()]
        contents += [(key, event.content) for key, event in wanted.items() if event is not None]
        if lost := await _lost(blobs, contents):
            findings[Kind.CONTENT_LOST] = lost
        differing, not_compared = await compare_with_contents(
            settings, blobs, wanted=wanted, manifests=manifests, stored=passages, findings=findings
        )
        for kind, found in differing.items():
            findings[kind] = sorted({*findings.get(kind, ()), *found})
    finally:
        await blobs.close()
        await index.close()
    live = sum(manifest.state is LifeState.LIVE for manifest in manifests.values())
    report = Report(
        events=len(events),
        documents=live,
        tombstones=len(manifests) - live,
        chunks=len(chunks),
        in_progress=in_progress,
        rejected=_finding(
            rejected(events, outcomes), "`GET /v1/events/ID` returns the reason; upload a readable version"
        ),
        not_compared=_finding(
            not_compared,
            "indexed with another parser, splitter or model, or no longer readable within the limits; the next event "
            "of each document rewrites it",
        ),
        findings={str(kind): _finding(found, ADVICE[kind]) for kind, found in findings.items()},
    )
    names = set(findings.get(Kind.ORPHAN, ()))
    orphans = (Hit(chunk.chunk_id, chunk.key, 0.0) for chunk in chunks if f"{chunk.key} {chunk.chunk_id}" in names)
    return _Check(report, to_rewrite(findings, wanted), tuple(orphans))


def _finding(found: Sequence[str], advice: str) -> Finding:
    return Finding(count=len(found), examples=tuple(found[:MAX_EXAMPLES]), advice=advice)


async def _repair(settings: Settings, check: _Check) -> Counter[str]:
    redis = connect_redis(settings.redis)
    producer = await KafkaProducer.open(settings)
    index = OpenSearchIndex.open(settings)
    try:
        if check.orphans:
            await index.delete_chunks(check.orphans)
            # Cached answers may include the removed passages, and no event invalidates them.
            cache = RedisAnswerCache(redis, settings.names, settings.answers)
            for tenant in {hit.key.tenant for hit in check.orphans}:
                await cache.apply(tenant, {}, drop=True)
        event_log = EventLog(producer, RedisEventStates(redis, settings.names))
        for event in check.rewrites.values():
            await event_log.republish(event)
    finally:
        await index.close()
        await producer.close()
        await redis.aclose()
    return Counter({"passages removed": len(check.orphans), "events sent again": len(check.rewrites)})


async def _until_processed(settings: Settings) -> None:
    """Wait until no step has lag."""
    try:
        async with asyncio.timeout(_PROCESSED_S):
            while await _in_progress(settings):  # noqa: ASYNC110 - lag can only be polled
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise EventsUnderWay(
            f"the repair was sent, but not processed within {_PROCESSED_S:.0f} s: verify again when `freshline lag` "
            "shows no lag"
        ) from None


async def _lost(blobs: BlobStore, contents: Iterable[tuple[DocumentKey, BlobRef | None]]) -> list[str]:
    """Documents whose content is not in the store."""
    named = [(key, content) for key, content in dict.fromkeys(contents) if content is not None]
    lost: set[str] = set()
    for start in range(0, len(named), _AT_A_TIME):
        some = named[start : start + _AT_A_TIME]
        there = await asyncio.gather(*(blobs.exists(content) for _, content in some))
        lost |= {str(key) for (key, _), exists in zip(some, there, strict=True) if not exists}
    return sorted(lost)


async def _in_progress(settings: Settings) -> int:
    async with StreamAdmin(settings) as admin:
        lags = [await admin.lag(row.reads, settings.names.group(step)) for step, row in TOPOLOGY.items()]
    return sum(one.records for lag in lags for one in lag)


async def _events(settings: Settings) -> dict[Position, DocumentEvent]:
    events = {}
    async for record in read_to_end(settings, DOCUMENTS):
        try:
            event = decode(DocumentEvent, record.value, record.headers)
        except Undecodable:  # a dead letter without a document
            continue
        events[Position(record.partition, record.offset)] = event
    return events


async def _outcomes(settings: Settings) -> dict[Position, Outcome]:
    """Outcomes of events, within the retention of the topics. Dead letters are retained longer than index changes."""
    outcomes: dict[Position, Outcome] = {}
    async for record in read_to_end(settings, DEAD_LETTERS):
        if (position := _rejected_position(record)) is not None:
            outcomes[position] = Outcome.DEAD_LETTER
    async for record in read_to_end(settings, INDEX_CHANGES):
        try:
            change = decode(IndexChange, record.value, record.headers)
        except Undecodable:
            continue
        outcomes[Position.parse(change.position)] = change.outcome
    return outcomes


def _rejected_position(record: Any) -> Position | None:
    """Position of a dead letter's event; None if the event became searchable, or is unknown."""
    dead_letter = read_dead_letter(record)
    if dead_letter is None:
        return None
    if dead_letter.topic == DOCUMENTS.name:
        return Position(dead_letter.partition, dead_letter.offset)
    return Position.parse(dead_letter.message.position) if isinstance(dead_letter.message, ChunkPlan) else None
