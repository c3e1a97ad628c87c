"""Whether index, manifests, contents and the stream agree, document by document.

What is to be expected is computed from the stream alone: of each document the newest version that was not refused.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition
from pydantic import BaseModel, ConfigDict

from infra.blobs import open_blob_store
from infra.kafka.codec import Undecodable, decode
from infra.kafka.security import client_options
from infra.opensearch.port import Hit
from infra.opensearch.store import OpenSearchIndex
from infra.settings import Settings
from schemas.documents import DocumentKey, LifeState, Outcome
from schemas.events import Change, ChunkPlan, DocumentEvent, IndexChange
from schemas.index import Manifest, StoredChunk
from schemas.positions import Position
from schemas.topics import DOCUMENTS, INDEX_CHANGES, Topic

M = TypeVar("M", bound=DocumentEvent | ChunkPlan | IndexChange)


class Report(BaseModel):
    """What was found.

    Attributes:
        findings: kind of disagreement → document or chunk ids.
        repaired: ids that were repaired.
    """

    model_config = ConfigDict(frozen=True)

    documents: int
    tombstones: int
    chunks: int
    findings: dict[str, list[str]]
    repaired: list[str] = []

    @property
    def ok(self) -> bool:
        """True if everything agrees."""
        return not self.findings


@dataclass(frozen=True, slots=True)
class Expected:
    """The newest version of a document that was not refused."""

    version: int
    deleted: bool


async def verify(settings: Settings, *, repair: bool) -> Report:
    """Compare everything. Events still under way show up as disagreements: wait until nothing lags.

    With ``repair``, passages that no manifest knows are removed. Documents that lack passages are reported: sending
    them again, with a new revision, mends them.
    """
    events, changes = await asyncio.gather(
        _read(settings, DOCUMENTS, DocumentEvent), _read(settings, INDEX_CHANGES, IndexChange)
    )
    index = OpenSearchIndex.open(settings)
    blobs = open_blob_store(settings.blobs)
    try:
        manifests = {manifest.key: manifest async for manifest in index.scan_manifests()}
        chunks = [chunk async for chunk in index.scan_chunks()]
        findings = compare(expected(events, changes), manifests, chunks)
        for key, manifest in manifests.items():
            if manifest.content is not None and not await blobs.exists(manifest.content):
                findings["content lost"].append(str(key))
        repaired: list[str] = []
        if repair and (orphans := set(findings.pop("orphan passage", []))):
            lost = [Hit(chunk.chunk_id, chunk.key, 0.0) for chunk in chunks if chunk.chunk_id in orphans]
            await index.delete_chunks(lost)
            repaired = sorted(orphans)
    finally:
        await blobs.close()
        await index.close()
    live = sum(manifest.state is LifeState.LIVE for manifest in manifests.values())
    return Report(
        documents=live,
        tombstones=len(manifests) - live,
        chunks=len(chunks),
        findings={kind: ids for kind, ids in findings.items() if ids},
        repaired=repaired,
    )


def expected(
    events: Mapping[Position, DocumentEvent], changes: Mapping[Position, IndexChange]
) -> dict[DocumentKey, Expected]:
    """What the stream says of each document: the newest version wins, of equal ones the first; refused ones do not."""
    newest: dict[DocumentKey, Expected] = {}
    for position, event in sorted(events.items()):
        refused = position in changes and changes[position].outcome is Outcome.DEAD_LETTER
        known = newest.get(event.key)
        if not refused and (known is None or event.version > known.version):
            newest[event.key] = Expected(event.version, event.change is Change.DELETED)
    return newest


def compare(
    wanted: Mapping[DocumentKey, Expected], manifests: Mapping[DocumentKey, Manifest], chunks: Iterable[StoredChunk]
) -> dict[str, list[str]]:
    """Every disagreement, by kind."""
    findings: dict[str, list[str]] = defaultdict(list)
    for key, one in wanted.items():
        manifest = manifests.get(key)
        if manifest is None:
            findings["not indexed"].append(str(key))
        elif not manifest.complete:
            findings["unfinished change"].append(str(key))
        # A refused version is spent: the manifest is then ahead of the content that it keeps.
        elif manifest.version != one.version and manifest.failure is None:
            findings["wrong version"].append(str(key))
        elif (manifest.state is LifeState.DELETED) != one.deleted:
            findings["not deleted" if one.deleted else "wrongly deleted"].append(str(key))
    findings["unknown to the stream"] += [str(key) for key in manifests.keys() - wanted.keys()]
    owners = {chunk_id: key for key, manifest in manifests.items() for chunk_id in manifest.chunks}
    seen = set()
    for chunk in chunks:
        seen.add(chunk.chunk_id)
        owner = owners.get(chunk.chunk_id)
        if owner is None:
            findings["orphan passage"].append(chunk.chunk_id)
        elif owner != chunk.key:
            findings["passage of another document"].append(chunk.chunk_id)
        elif frozenset(chunk.groups) != frozenset(manifests[owner].groups):
            findings["passage with other groups"].append(chunk.chunk_id)
    findings["missing passage"] += sorted({str(owners[chunk_id]) for chunk_id in owners.keys() - seen})
    return findings


async def _read(settings: Settings, topic: Topic, model: type[M]) -> dict[Position, M]:
    """All messages of a topic up to its present end, by the position of their event in the document stream."""
    name = settings.names.topic(topic.name)
    partitions = [TopicPartition(name, number) for number in range(settings.kafka.partitions)]
    consumer = AIOKafkaConsumer(**client_options(settings.kafka), enable_auto_commit=False)
    await consumer.start()
    try:
        consumer.assign(partitions)
        await consumer.seek_to_beginning()
        ends = await consumer.end_offsets(partitions)
        messages: dict[Position, M] = {}
        for partition in partitions:
            while await consumer.position(partition) < ends[partition]:
                for records in (await consumer.getmany(timeout_ms=1_000)).values():
                    for record in records:
                        try:
                            message = decode(model, record.value, record.headers)
                        except Undecodable:
                            continue  # a dead letter; it names no document
                        at = Position(record.partition, record.offset)
                        position = Position.parse(message.position) if isinstance(message, IndexChange) else at
                        messages[position] = message
        return messages
    finally:
        await consumer.stop()
