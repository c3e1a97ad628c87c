"""Explanation of a cached answer and its invalidations. Read-only; does not count as a hit."""

import time
from typing import Annotated, Final

from fastapi import Depends, FastAPI, Request

from infra.redis.port import Dropped, Lookup
from infra.web.credentials import Credentials
from infra.web.problems import problem_responses
from query.answers.question import question_openapi, read_question
from query.cache.freshness import FreshnessReader
from query.cache.key import AnswerMaker, cache_key
from query.cache.near_cache import NearCache
from query.operations.answer_records import AnswerRecords, readable, reason_of
from schemas.credentials import Scope
from schemas.documents import EventStatus, Stage
from schemas.explanations import CacheExplanation, CandidatesReport, DropEvent, DropReport, SourceReport, StoredReport
from schemas.positions import AsOf
from schemas.queries import QueryRequest
from schemas.search import Access, Hit

MAX_DROPS: Final = 10


class AnswerExplainer:
    """Explains what is cached for a question.

    Args:
        records: entries, invalidations and events.
        near: in-process answer cache.
        freshness: decides which tenants bypass the cache.
        maker: identifies everything besides question and reader that decides an answer.
        candidates: candidates of each retriever that are fused.
    """

    def __init__(
        self,
        *,
        records: AnswerRecords,
        near: NearCache,
        freshness: FreshnessReader,
        maker: AnswerMaker,
        candidates: int,
    ) -> None:
        self._records = records
        self._near = near
        self._freshness = freshness
        self._maker = maker
        self._candidates = candidates

    async def explain(self, request: QueryRequest, access: Access) -> CacheExplanation:
        """Explain the answer that ``access`` would get. ``min_position`` is ignored.

        Raises:
            CacheUnavailable: Redis is unavailable.
        """
        tenant, key = access.tenant, cache_key(request, access, self._maker)
        read_ms = round(time.time() * 1_000, 3)
        lookup = await self._records.cache.lookup(tenant, key, with_evidence=True)
        drops = await self._records.drops(tenant, key)
        return CacheExplanation(
            key=key,
            tenant=tenant,
            slice=self._records.slice_of(key),
            as_of=AsOf(positions=dict(lookup.positions), checked_ms=read_ms),
            bypassed=self._freshness.is_bypassed(tenant),
            near=self._near.holds(key),
            stored=self._stored(lookup),
            drops=tuple([await self._drop(tenant, drop) for drop in drops[:MAX_DROPS]]),
        )

    def _stored(self, lookup: Lookup) -> StoredReport | None:
        entry = readable(lookup.entry)
        if lookup.entry is None or entry is None:
            return None
        documents = {hit.chunk_id: hit.key.document_id for hit in (*entry.vector_candidates, *entry.lexical_candidates)}
        fused = max(self._candidates, entry.top_k)
        return StoredReport(
            filled_ms=entry.filled_ms,
            filled_at=dict(entry.positions),
            ttl_ms=lookup.ttl_ms,
            size_bytes=len(lookup.entry),
            sources=tuple(
                SourceReport(document_id=documents[chunk_id], chunk_id=chunk_id, version=version)
                for chunk_id, version in entry.sources
            ),
            vector_candidates=_candidates_report(entry.vector_candidates, entry.search.candidates, fused, scored=True),
            lexical_candidates=_candidates_report(
                entry.lexical_candidates, entry.search.candidates, fused, scored=False
            ),
        )

    async def _drop(self, tenant: str, drop: Dropped) -> DropReport:
        reason = reason_of(drop)
        event_ids = reason.get("events", ())
        statuses = await self._records.events(tenant, event_ids)
        return DropReport(
            at_ms=drop.at_ms,
            everything=drop.whole_slice,
            not_evaluated=reason.get("not_evaluated"),
            documents=tuple(reason.get("documents", ())),
            events=tuple(_event(event_id, status) for event_id, status in zip(event_ids, statuses, strict=True)),
        )


def add_explain_route(app: FastAPI, explainer: AnswerExplainer, credentials: Credentials) -> None:
    """Add ``/v1/cache:explain``."""

    @app.post(
        "/v1/cache:explain",
        responses=problem_responses(401, 403, 413, 415, 422, 503),
        openapi_extra=question_openapi(),
    )
    async def explain_cache(
        request: Request, access: Annotated[Access, Depends(credentials.requiring(Scope.ADMIN))]
    ) -> CacheExplanation:
        """Explain what is cached for the caller's question: sources, candidates, and recent invalidations."""
        return await explainer.explain(await read_question(request), access)


def _event(event_id: str, status: EventStatus | None) -> DropEvent:
    if status is None:
        return DropEvent(event_id=event_id, document_id=None, version=None, position=None, searchable_ms=None)
    after_ms = status.stages_ms.get(Stage.SEARCHABLE)
    return DropEvent(
        event_id=event_id,
        document_id=status.document_id,
        version=status.version,
        position=status.position,
        searchable_ms=None if after_ms is None else status.accepted_ms + after_ms,
    )


def _candidates_report(hits: tuple[Hit, ...], requested: int, fused: int, *, scored: bool) -> CandidatesReport:
    fused = min(fused, len(hits))
    return CandidatesReport(
        kept=len(hits),
        requested=requested,
        fused=fused,
        lowest_fused_score=hits[fused - 1].score if scored and fused else None,
        lowest_kept_score=hits[-1].score if scored and hits else None,
    )
