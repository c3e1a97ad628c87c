"""Whether stream, index and contents agree, document by document; and how to mend what can be mended.

What is to be expected is computed from the stream alone. The index is only read, unless repair is asked for.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from freshline.verify.agreement import ADVICE, Kind, PassageContent, compare, expected, refused, to_rewrite
from freshline.verify.contents import compare_with_contents
from infra.blobs import open_blob_store
from infra.blobs.port import BlobStore
from infra.kafka.codec import Undecodable, decode
from infra.kafka.dead_letters import read_letter
from infra.kafka.producer import KafkaProducer
from infra.kafka.provision import StreamAdmin
from infra.kafka.reading import read_to_end
from infra.opensearch.store import OpenSearchIndex
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
"""A passage that could not be replaced under its name loses its name in the first, and is removed in the second."""
_PROCESSED_S: Final = 300.0
_POLL_S: Final = 0.2


class EventsUnderWay(Exception):
    """There is something to repair, and workers are busy: what is found may be what they are just doing."""


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
        not_compared: documents whose passages were not compared with their content.
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
    not_compared: Finding
    findings: dict[str, Finding]
    repaired: dict[str, int] = {}

    @property
    def ok(self) -> bool:
        """True if everything agrees."""
        return not self.findings


@dataclass(frozen=True, slots=True)
class _Seen:
    """One look at everything.

    Attributes:
        anew: events to be sent once more, by document.
        orphans: passages that no manifest names.
    """

    report: Report
    anew: Mapping[DocumentKey, DocumentEvent]
    orphans: tuple[Hit, ...]


async def verify(settings: Settings, *, repair: bool) -> Report:
    """Compare everything; what is found last is reported.

    With ``repair``, the workers are told to write documents anew that are not as the stream says, passages that no
    manifest names are removed, and after the workers are through, everything is compared again.

    Raises:
        EventsUnderWay: something is to be repaired while workers have something to do; or what was sent to them was
            not processed in time.
    """
    seen = await _look(settings)
    repaired: Counter[str] = Counter()
    for _ in range(_ROUNDS if repair else 0):
        if not seen.anew and not seen.orphans:
            break
        if seen.report.under_way:
            raise EventsUnderWay(
                f"{seen.report.under_way} events are under way: repair when `freshline lag` shows none"
            )
        repaired.update(await _repair(settings, seen))
        await _until_processed(settings)
        seen = await _look(settings)
    return seen.report.model_copy(update={"repaired": dict(repaired)})


async def _look(settings: Settings) -> _Seen:
    under_way, events, outcomes = await asyncio.gather(_under_way(settings), _events(settings), _outcomes(settings))
    index = OpenSearchIndex.open(settings)
    blobs = open_blob_store(settings.blobs)
    try:
        # Passages first: whatever is seen of a change that comes now, its manifest was written before it. Their texts
        # are not kept: there may be more than fits into memory.
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
        under_way=under_way,
        refused=_finding(refused(events, outcomes), "`GET /v1/events/ID` says why; upload what can be read"),
        not_compared=_finding(
            not_compared,
            "indexed with another parser, splitter or model, or not readable within its limits now; the next event of "
            "each writes it anew",
        ),
        findings={str(kind): _finding(found, ADVICE[kind]) for kind, found in findings.items()},
    )
    names = set(findings.get(Kind.ORPHAN, ()))
    orphans = (Hit(chunk.chunk_id, chunk.key, 0.0) for chunk in chunks if f"{chunk.key} {chunk.chunk_id}" in names)
    return _Seen(report, to_rewrite(findings, wanted), tuple(orphans))


def _finding(found: Sequence[str], advice: str) -> Finding:
    return Finding(count=len(found), examples=tuple(found[:MAX_EXAMPLES]), advice=advice)


async def _repair(settings: Settings, seen: _Seen) -> Counter[str]:
    redis = connect_redis(settings.redis)
    producer = await KafkaProducer.open(settings)
    index = OpenSearchIndex.open(settings)
    try:
        if seen.orphans:
            await index.delete_chunks(seen.orphans)
            # Cached answers may stand on what was removed, and no event tells of it.
            cache = RedisAnswerCache(redis, settings.names, settings.answers)
            for tenant in {hit.key.tenant for hit in seen.orphans}:
                await cache.apply(tenant, {}, drop=True)
        placing = EventLog(producer, RedisEventStates(redis, settings.names))
        for event in seen.anew.values():
            await placing.republish(event)
    finally:
        await index.close()
        await producer.close()
        await redis.aclose()
    return Counter({"passages removed": len(seen.orphans), "events sent again": len(seen.anew)})


async def _until_processed(settings: Settings) -> None:
    """Wait until no step has anything to do."""
    try:
        async with asyncio.timeout(_PROCESSED_S):
            while await _under_way(settings):  # noqa: ASYNC110 - brokers do not tell
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise EventsUnderWay(
            f"the repair was sent, but the workers were not through with it after {_PROCESSED_S:.0f} s: look at "
            "`freshline lag`, and verify again when it shows none"
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
        try:
            change = decode(IndexChange, record.value, record.headers)
        except Undecodable:
            continue
        outcomes[Position.parse(change.position)] = change.outcome
    return outcomes


def _refused_position(record: Any) -> Position | None:
    """The event that a dead letter is of; None where the event did become searchable, or cannot be told."""
    letter = read_letter(record)
    if letter is None:
        return None
    if letter.topic == DOCUMENTS.name:
        return Position(letter.partition, letter.offset)
    return Position.parse(letter.message.position) if isinstance(letter.message, ChunkPlan) else None
