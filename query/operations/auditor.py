"""Looking again, now and then, whether an answer from the cache is what the index says: what is promised, measured.

Of the hits that go out a share is drawn before anything is done for it. Each is retrieved afresh, one after the other,
only while the index has room, and no more than some in a second; what does not find room is counted and let go. Nothing
is repaired here: a violation is a mistake of invalidation, and is told.
"""

import asyncio
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
import structlog

from infra.embedding.port import EmbeddingError
from infra.opensearch.port import IndexUnavailable, SearchIndex
from infra.redis.entry import Entry, UnreadableEntry
from infra.redis.port import AnswerCache, AnswerSlices, CacheUnavailable, Dropped, EventStates
from query.cache.invalidation_lag import OBJECTIVE_S
from query.cache.near_cache import PROOF_S
from query.retrieval.retrieve import Retrieval, Retrieved
from query.telemetry.audit_verdicts import Altered, Finding, Source, Verdict, difference, judged, stale_ms
from query.telemetry.metrics import QueryMetrics
from schemas.cache_keys import slice_of
from schemas.documents import Stage
from schemas.index import Manifest
from schemas.positions import Position
from schemas.search import Hit

WAITING: Final = 8
"""Answers that wait to be looked at. Few: what waits for long was dropped meanwhile, and tells less."""

_DROPS_TOLD: Final = 3

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """A hit that went out.

    Attributes:
        tenant: whose.
        key: of the answer.
        body: that was served, without its stamp.
        positions: partition → offset, that it was served with.
        served_ms: epoch milliseconds.
    """

    tenant: str
    key: str
    body: bytes
    positions: Mapping[int, int]
    served_ms: float


class Auditor:
    """Audits hits; ``run`` does the work.

    Args:
        share: of hits to look at, 0 to 1.
        per_s: most of them in a second.
        cache: holds the answers' evidence.
        slices: remember what was dropped, and why; the same store.
        index: says what became of passages.
        retrieval: finds afresh.
        states: know when events became searchable.
        metrics: where findings are counted.
        rng: draws.
    """

    def __init__(
        self,
        *,
        share: float,
        per_s: float,
        cache: AnswerCache,
        slices: AnswerSlices,
        index: SearchIndex,
        retrieval: Retrieval,
        states: EventStates,
        metrics: QueryMetrics,
        rng: random.Random | None = None,
    ) -> None:
        self._share = share
        self._pause_s = 1 / per_s
        self._cache = cache
        self._slices = slices
        self._index = index
        self._retrieval = retrieval
        self._states = states
        self._metrics = metrics
        self._rng = rng or random.Random()  # noqa: S311 - a sample, not a secret
        self._waiting: asyncio.Queue[Seen] = asyncio.Queue(WAITING)
        self._passes = self._drawn()

    def saw(self, tenant: str, key: str, body: bytes, positions: Mapping[int, int]) -> None:
        """A hit goes out. Costs next to nothing for one that is not drawn."""
        self._passes -= 1
        if self._passes >= 0:
            return
        self._passes = self._drawn()
        if self._waiting.full():
            self._metrics.unaudited.labels("full").inc()
            return
        self._waiting.put_nowait(Seen(tenant, key, body, positions, time.time() * 1_000))

    async def run(self) -> None:
        """Look at what was drawn, until cancelled."""
        while True:
            seen = await self._waiting.get()
            if self._retrieval.has_room:
                await self._look(seen)
                await asyncio.sleep(self._pause_s)
            else:
                self._metrics.unaudited.labels("busy").inc()

    async def _look(self, seen: Seen) -> None:
        try:
            await self.audit(seen)
        except (CacheUnavailable, IndexUnavailable, EmbeddingError) as error:
            self._metrics.unaudited.labels("failed").inc()
            _log.info("not_audited", reason=str(error))
        except Exception:  # noqa: BLE001 - as the next line says
            self._metrics.unaudited.labels("failed").inc()
            _log.exception("audit_failed")  # the next one may do better, and nobody else would tell

    async def audit(self, seen: Seen) -> Finding:
        """Look at one answer, and count and tell what is found.

        Raises:
            CacheUnavailable, IndexUnavailable, EmbeddingError: it cannot be told.
        """
        entry = _readable((await self._cache.lookup(seen.tenant, seen.key, whole=True)).entry)
        if entry is None or entry.response != seen.body:
            finding = Finding(Verdict.GONE, stale_ms=await self._stale_when_dropped(seen))
            self._count(seen, finding)
            return finding
        finding, fresh = await self._compared(seen, entry)
        if finding.verdict is Verdict.VIOLATION:
            # A search in the middle of a change may lack what the next one finds. And one that walks a graph misses
            # better passages now and then, so that it finds what rightly did not come in.
            finding, fresh = await self._compared(seen, entry, exact=True)
        if finding.verdict is Verdict.VIOLATION:
            await self._tell(seen, entry, finding, fresh)
        self._count(seen, finding)
        return finding

    async def _compared(self, seen: Seen, entry: Entry, *, exact: bool = False) -> tuple[Finding, Retrieved]:
        search = entry.search
        found = await self._retrieval.retrieve(
            search.text, search.access, top_k=entry.top_k, filters=dict(search.filters), exact=exact
        )
        finding = judged(
            entry.sources,
            found.sources,
            await self._altered(entry, found),
            as_of=seen.positions,
            filled_at=entry.positions,
            served_ms=seen.served_ms,
        )
        return finding, found

    async def _altered(self, entry: Entry, found: Retrieved) -> list[Altered]:
        lost, come = difference(entry.sources, found.sources)
        if not lost and not come:
            return []
        keys = {hit.chunk_id: hit.key for window in (entry.vector_window, entry.lexical_window) for hit in window}
        chunks = {(chunk.chunk_id, chunk.version): chunk for _, chunk in found.passages}
        there = await self._index.fetch([Hit(chunk_id, keys[chunk_id], 0.0) for chunk_id, _ in lost])
        touched = {keys[chunk_id] for chunk_id, _ in lost} | {chunks[source].key for source in come}
        manifests = await self._index.manifests(sorted(touched))
        altered = [
            Altered(
                source,
                chunks[source].document_id,
                added=True,
                position=Position.parse(chunks[source].position),
                searchable_ms=_searchable_ms(manifests.get(chunks[source].key), version=source[1]),
            )
            for source in come
        ]
        for source in lost:
            chunk_id, version = source
            now, key = there.get(chunk_id), keys[chunk_id]
            if now is not None and now.version == version:
                continue
            manifest = manifests.get(key)
            position = now.position if now is not None else manifest.position if manifest is not None else None
            altered.append(
                Altered(
                    source,
                    key.document_id,
                    added=False,
                    position=Position.parse(position) if position is not None else None,
                    searchable_ms=_searchable_ms(manifest, version=now.version if now is not None else None),
                )
            )
        return altered

    async def _stale_when_dropped(self, seen: Seen) -> float | None:
        """For how long the first of the changes that dropped it had been searchable when it was served.

        They were judged together, and not each of them altered it, so it is that at most.
        """
        latest = (await self._drops(seen))[:1]
        # A copy may have been served for as long after the drop as copies go without a proof.
        if not latest or latest[0].at_ms < seen.served_ms - PROOF_S * 1_000:
            return None
        states = [await self._states.get(seen.tenant, event_id) for event_id in _why(latest[0]).get("events", ())]
        return stale_ms(
            [
                state.accepted_ms + state.stages_ms[Stage.SEARCHABLE]
                for state in states
                if state is not None and Stage.SEARCHABLE in state.stages_ms
            ],
            seen.served_ms,
        )

    async def _drops(self, seen: Seen) -> list[Dropped]:
        return await self._slices.drops(seen.tenant, slice_of(seen.key, self._slices.count), seen.key)

    async def _tell(self, seen: Seen, entry: Entry, finding: Finding, fresh: Retrieved) -> None:
        # Neither the question nor texts: logs are read by others than answers are.
        _log.error(
            "stale_answer_served",
            tenant=seen.tenant,
            key=seen.key,
            served_ms=seen.served_ms,
            filled_ms=entry.filled_ms,
            stale_ms=finding.stale_ms,
            as_of=dict(seen.positions),
            filled_at=dict(entry.positions),
            served=_with_ranks(entry.sources, entry.vector_window, entry.lexical_window),
            fresh=_with_ranks(fresh.sources, fresh.windows.vector, fresh.windows.lexical),
            changes=[
                {
                    "document_id": one.document_id,
                    "source": one.source,
                    "change": "added" if one.added else "gone",
                    "position": str(one.position) if one.position is not None else None,
                    "searchable_ms": one.searchable_ms,
                }
                for one in finding.because
            ],
            drops=[{"at_ms": drop.at_ms, **_why(drop)} for drop in (await self._drops(seen))[:_DROPS_TOLD]],
        )

    def _count(self, seen: Seen, finding: Finding) -> None:
        past = finding.stale_ms is not None and finding.stale_ms > OBJECTIVE_S * 1_000
        self._metrics.audited(finding.verdict, finding.stale_ms, past_objective=past)
        if past:
            _log.warning(
                "served_past_objective",
                tenant=seen.tenant,
                key=seen.key,
                verdict=finding.verdict,
                stale_ms=finding.stale_ms,
            )

    def _drawn(self) -> float:
        """How many hits pass before the next is looked at: each is drawn by itself, with the same chance."""
        if self._share <= 0:
            return math.inf
        if self._share >= 1:
            return 0
        return int(math.log(1 - self._rng.random()) / math.log1p(-self._share))


def _searchable_ms(manifest: Manifest | None, *, version: int | None) -> float | None:
    """When the change was seen to be searchable, if the manifest still tells of it."""
    if manifest is None or not manifest.complete or (version is not None and manifest.version != version):
        return None
    return manifest.updated_ms


def _with_ranks(sources: Sequence[Source], *legs: Sequence[Hit]) -> list[tuple[str, int, list[int | None]]]:
    """Chunk id, version, and the place in each leg's window, from 1: near the last that is fused, drift is likely."""
    ranks = [{hit.chunk_id: rank for rank, hit in enumerate(leg, start=1)} for leg in legs]
    return [(chunk_id, version, [leg.get(chunk_id) for leg in ranks]) for chunk_id, version in sources]


def _why(drop: Dropped) -> dict[str, Any]:
    return dict(orjson.loads(drop.why)) if drop.why else {}


def _readable(stored: bytes | None) -> Entry | None:
    try:
        return Entry.decode(stored) if stored is not None else None
    except UnreadableEntry:
        return None
