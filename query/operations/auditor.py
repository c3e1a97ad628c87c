"""Freshness auditor: compares a sample of cache hits with a new retrieval.

Hits are sampled as they are sent. Samples are retrieved again one at a time, at a bounded rate, and only while there is
spare capacity for retrieval; the others are counted and dropped. The auditor repairs nothing: a violation is a defect
of invalidation, and is logged and counted.
"""

import asyncio
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from infra.embedding.port import EmbeddingError
from infra.opensearch.port import IndexUnavailable, SearchIndex
from infra.redis.entry import Entry
from infra.redis.port import CacheUnavailable
from query.cache.invalidation_lag import OBJECTIVE_S
from query.cache.near_cache import MAX_HEARTBEAT_AGE_S
from query.operations.answer_records import AnswerRecords, readable, reason_of
from query.retrieval.retrieve import Retrieval, Retrieved
from query.telemetry.audit_verdicts import (
    AuditResult,
    AuditVerdict,
    Source,
    SourceChange,
    difference,
    evaluate,
    staleness_ms,
)
from query.telemetry.metrics import QueryMetrics
from schemas.documents import Stage
from schemas.index import Manifest
from schemas.positions import Position
from schemas.search import Hit

QUEUE_SIZE: Final = 8
"""Samples that wait for their audit. A long queue is of no use: by then most answers are invalidated."""

_LOGGED_DROPS: Final = 3

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AuditPolicy:
    """How many hits are audited.

    Attributes:
        sample_rate: fraction of hits to audit, 0 to 1.
        per_s: maximum audits per second.
    """

    sample_rate: float
    per_s: float


@dataclass(frozen=True, slots=True)
class ServedHit:
    """A sampled cache hit.

    Attributes:
        tenant: tenant of the answer.
        key: key of the answer.
        body: response body without the per-request fields.
        positions: partition → offset that it was served with.
        served_ms: epoch milliseconds.
    """

    tenant: str
    key: str
    body: bytes
    positions: Mapping[int, int]
    served_ms: float


class Auditor:
    """Samples hits; ``run`` audits them.

    Args:
        policy: sample rate and audit rate.
        records: entries, invalidations and events.
        index: current state of passages.
        retrieval: repeats the retrieval of an answer.
        metrics: counts audits.
        rng: source of the samples.
    """

    def __init__(
        self,
        policy: AuditPolicy,
        *,
        records: AnswerRecords,
        index: SearchIndex,
        retrieval: Retrieval,
        metrics: QueryMetrics,
        rng: random.Random | None = None,
    ) -> None:
        self._policy = policy
        self._records = records
        self._index = index
        self._retrieval = retrieval
        self._metrics = metrics
        self._rng = rng or random.Random()  # noqa: S311 - a sample, not a secret
        self._queue: asyncio.Queue[ServedHit] = asyncio.Queue(QUEUE_SIZE)
        self._hits_to_skip = self._next_gap()

    def on_hit(self, tenant: str, key: str, body: bytes, positions: Mapping[int, int]) -> None:
        """Sample a hit. Costs next to nothing for hits outside the sample."""
        self._hits_to_skip -= 1
        if self._hits_to_skip >= 0:
            return
        self._hits_to_skip = self._next_gap()
        if self._queue.full():
            self._metrics.audits_skipped.labels("queue_full").inc()
            return
        self._queue.put_nowait(ServedHit(tenant, key, body, positions, time.time() * 1_000))

    async def run(self) -> None:
        """Audit sampled hits until cancelled."""
        while True:
            hit = await self._queue.get()
            if self._retrieval.has_spare_capacity:
                await self._audit_or_skip(hit)
                await asyncio.sleep(1 / self._policy.per_s)
            else:
                self._metrics.audits_skipped.labels("busy").inc()

    async def _audit_or_skip(self, hit: ServedHit) -> None:
        try:
            await self.audit(hit)
        except (CacheUnavailable, IndexUnavailable, EmbeddingError) as error:
            self._metrics.audits_skipped.labels("failed").inc()
            _log.info("audit_skipped", reason=str(error))
        except Exception:  # noqa: BLE001 - logged; the auditor must not end, and the next audit may succeed
            self._metrics.audits_skipped.labels("failed").inc()
            _log.exception("audit_failed")

    async def audit(self, hit: ServedHit) -> AuditResult:
        """Audit one hit; counts the result and logs a violation.

        Raises:
            CacheUnavailable, IndexUnavailable, EmbeddingError: the hit cannot be audited.
        """
        entry = readable((await self._records.cache.lookup(hit.tenant, hit.key, with_evidence=True)).entry)
        if entry is None or entry.response != hit.body:
            result = AuditResult(AuditVerdict.GONE, staleness_ms=await self._staleness_when_invalidated(hit))
            self._count(hit, result)
            return result
        result, fresh = await self._compare(hit, entry)
        if result.verdict is AuditVerdict.VIOLATION:
            # Confirm with an exact search: the first one may have seen a partial change, and approximate k-NN sometimes
            # misses better passages, so that it returns ones that were rightly not among the sources.
            result, fresh = await self._compare(hit, entry, exact=True)
        if result.verdict is AuditVerdict.VIOLATION:
            await self._log_violation(hit, entry, result, fresh)
        self._count(hit, result)
        return result

    async def _compare(self, hit: ServedHit, entry: Entry, *, exact: bool = False) -> tuple[AuditResult, Retrieved]:
        search = entry.search
        fresh = await self._retrieval.retrieve(
            search.text, search.access, top_k=entry.top_k, filters=dict(search.filters), exact=exact
        )
        result = evaluate(
            entry.sources,
            fresh.sources,
            await self._changes(entry, fresh),
            as_of=hit.positions,
            filled_at=entry.positions,
            served_ms=hit.served_ms,
        )
        return result, fresh

    async def _changes(self, entry: Entry, fresh: Retrieved) -> list[SourceChange]:
        """Added and removed passages among the sources that differ."""
        missing, added = difference(entry.sources, fresh.sources)
        if not missing and not added:
            return []
        keys = {hit.chunk_id: hit.key for found in (entry.vector_candidates, entry.lexical_candidates) for hit in found}
        chunks = {(chunk.chunk_id, chunk.version): chunk for _, chunk in fresh.passages}
        current = await self._index.fetch([Hit(chunk_id, keys[chunk_id], 0.0) for chunk_id, _ in missing])
        documents = {keys[chunk_id] for chunk_id, _ in missing} | {chunks[source].key for source in added}
        manifests = await self._index.manifests(sorted(documents))
        changes = [
            SourceChange(
                source,
                chunks[source].document_id,
                added=True,
                position=Position.parse(chunks[source].position),
                searchable_ms=_searchable_ms(manifests.get(chunks[source].key), version=source[1]),
            )
            for source in added
        ]
        for source in missing:
            chunk_id, version = source
            chunk, key = current.get(chunk_id), keys[chunk_id]
            if chunk is not None and chunk.version == version:
                continue
            manifest = manifests.get(key)
            position = chunk.position if chunk is not None else manifest.position if manifest is not None else None
            changes.append(
                SourceChange(
                    source,
                    key.document_id,
                    added=False,
                    position=Position.parse(position) if position is not None else None,
                    searchable_ms=_searchable_ms(manifest, version=chunk.version if chunk is not None else None),
                )
            )
        return changes

    async def _staleness_when_invalidated(self, hit: ServedHit) -> float | None:
        """Upper bound of the hit's staleness, from the events that invalidated the answer.

        The events were evaluated together, and not each of them altered the answer.
        """
        latest = (await self._records.drops(hit.tenant, hit.key))[:1]
        # The near cache may serve an answer for this long after its invalidation in Redis.
        if not latest or latest[0].at_ms < hit.served_ms - MAX_HEARTBEAT_AGE_S * 1_000:
            return None
        statuses = await self._records.events(hit.tenant, reason_of(latest[0]).get("events", ()))
        return staleness_ms(
            [
                status.accepted_ms + status.stages_ms[Stage.SEARCHABLE]
                for status in statuses
                if status is not None and Stage.SEARCHABLE in status.stages_ms
            ],
            hit.served_ms,
        )

    async def _log_violation(self, hit: ServedHit, entry: Entry, result: AuditResult, fresh: Retrieved) -> None:
        # Neither question nor passage text: readers of logs need not be allowed to read the documents.
        drops = (await self._records.drops(hit.tenant, hit.key))[:_LOGGED_DROPS]
        _log.error(
            "stale_answer_served",
            tenant=hit.tenant,
            key=hit.key,
            served_ms=hit.served_ms,
            filled_ms=entry.filled_ms,
            staleness_ms=result.staleness_ms,
            as_of=dict(hit.positions),
            filled_at=dict(entry.positions),
            served=_with_ranks(entry.sources, entry.vector_candidates, entry.lexical_candidates),
            fresh=_with_ranks(fresh.sources, fresh.candidates.vector, fresh.candidates.lexical),
            changes=[
                {
                    "document_id": change.document_id,
                    "source": change.source,
                    "change": "added" if change.added else "removed",
                    "position": str(change.position) if change.position is not None else None,
                    "searchable_ms": change.searchable_ms,
                }
                for change in result.changes
            ],
            drops=[{"at_ms": drop.at_ms, **reason_of(drop)} for drop in drops],
        )

    def _count(self, hit: ServedHit, result: AuditResult) -> None:
        violates_slo = result.staleness_ms is not None and result.staleness_ms > OBJECTIVE_S * 1_000
        self._metrics.count_audit(result.verdict, result.staleness_ms, violates_slo=violates_slo)
        if violates_slo:
            _log.warning(
                "freshness_slo_violated",
                tenant=hit.tenant,
                key=hit.key,
                verdict=result.verdict,
                staleness_ms=result.staleness_ms,
            )

    def _next_gap(self) -> float:
        """Number of hits before the next sample: geometric, so that each hit is sampled independently."""
        rate = self._policy.sample_rate
        if rate <= 0:
            return math.inf
        if rate >= 1:
            return 0
        return int(math.log(1 - self._rng.random()) / math.log1p(-rate))


def _searchable_ms(manifest: Manifest | None, *, version: int | None) -> float | None:
    """When the change was observed to be searchable, if the manifest still records it."""
    if manifest is None or not manifest.complete or (version is not None and manifest.version != version):
        return None
    return manifest.updated_ms


def _with_ranks(sources: Sequence[Source], *retrievers: Sequence[Hit]) -> list[tuple[str, int, list[int | None]]]:
    """Chunk id, version, and the rank in each retriever's candidates, from 1. Ranks near the cut-off suggest drift."""
    ranks = [{hit.chunk_id: rank for rank, hit in enumerate(hits, start=1)} for hits in retrievers]
    return [(chunk_id, version, [by_id.get(chunk_id) for by_id in ranks]) for chunk_id, version in sources]
