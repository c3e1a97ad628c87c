"""Telling what is known of a cached answer, and why it was dropped. Drops and fills nothing, and counts as no hit."""

import time
from collections.abc import Callable
from typing import Annotated, Any, Final

import orjson
from fastapi import Depends, FastAPI, Request

from infra.redis.entry import Entry, UnreadableEntry
from infra.redis.port import AnswerCache, AnswerSlices, Dropped, EventStates, Lookup
from infra.web.credentials import Credentials
from infra.web.problems import problems_told
from query.answers.question import question_described, read_question
from query.cache.key import AnswerMaker, cache_key
from query.cache.near_cache import NearCache
from schemas.cache_keys import slice_of
from schemas.credentials import Scope
from schemas.documents import Stage
from schemas.explanations import CacheExplanation, DropEvent, DropReport, SourceReport, StoredReport, WindowReport
from schemas.positions import AsOf
from schemas.queries import QueryRequest
from schemas.search import Access, Hit

DROPS_TOLD: Final = 10


class AnswerExplainer:
    """The use case.

    Args:
        cache: holds the answers.
        slices: remember what was dropped; the same store.
        near: copies of answers in this process.
        states: tell of events.
        maker: what decides an answer besides the question.
        window: places of each leg that are fused.
        behind: whether a tenant's cached answers are left aside.
    """

    def __init__(
        self,
        *,
        cache: AnswerCache,
        slices: AnswerSlices,
        near: NearCache,
        states: EventStates,
        maker: AnswerMaker,
        window: int,
        behind: Callable[[str], bool],
    ) -> None:
        self._cache = cache
        self._slices = slices
        self._near = near
        self._states = states
        self._maker = maker
        self._window = window
        self._behind = behind

    async def explain(self, request: QueryRequest, access: Access) -> CacheExplanation:
        """What is known of the answer that ``access`` would get; ``min_position`` makes no difference.

        Raises:
            CacheUnavailable: Redis does not tell.
        """
        tenant, key = access.tenant, cache_key(request, access, self._maker)
        number = slice_of(key, self._slices.count)
        looked_ms = round(time.time() * 1_000, 3)
        look = await self._cache.lookup(tenant, key, whole=True)
        drops = await self._slices.drops(tenant, number, key)
        return CacheExplanation(
            key=key,
            tenant=tenant,
            slice=number,
            as_of=AsOf(positions=dict(look.positions), checked_ms=looked_ms),
            left_aside=self._behind(tenant),
            near=self._near.holds(key),
            stored=self._stored(look),
            drops=tuple([await self._drop(tenant, drop) for drop in drops[:DROPS_TOLD]]),
        )

    def _stored(self, look: Lookup) -> StoredReport | None:
        if look.entry is None:
            return None
        try:
            entry = Entry.decode(look.entry)
        except UnreadableEntry:
            return None  # as good as none: it is not served
        documents = {hit.chunk_id: hit.key.document_id for hit in (*entry.vector_window, *entry.lexical_window)}
        fused = max(self._window, entry.top_k)
        return StoredReport(
            filled_ms=entry.filled_ms,
            filled_at=dict(entry.positions),
            ends_in_ms=look.ends_ms,
            size_bytes=len(look.entry),
            sources=tuple(
                SourceReport(document_id=documents[chunk_id], chunk_id=chunk_id, version=version)
                for chunk_id, version in entry.sources
            ),
            vector_window=_window(entry.vector_window, entry.search.window, fused, scored=True),
            lexical_window=_window(entry.lexical_window, entry.search.window, fused, scored=False),
        )

    async def _drop(self, tenant: str, drop: Dropped) -> DropReport:
        why: dict[str, Any] = orjson.loads(drop.why) if drop.why else {}
        return DropReport(
            at_ms=drop.at_ms,
            everything=drop.everything,
            unjudged=why.get("unjudged"),
            documents=tuple(why.get("documents", ())),
            events=tuple([await self._event(tenant, event_id) for event_id in why.get("events", ())]),
        )

    async def _event(self, tenant: str, event_id: str) -> DropEvent:
        status = await self._states.get(tenant, event_id)
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


def add_explaining(app: FastAPI, explaining: AnswerExplainer, credentials: Credentials) -> None:
    """Serve it at ``/v1/cache:explain``."""

    @app.post(
        "/v1/cache:explain",
        responses=problems_told(401, 403, 413, 415, 422, 503),
        openapi_extra=question_described(),
    )
    async def explain_cache(
        request: Request, access: Annotated[Access, Depends(credentials.requiring(Scope.ADMIN))]
    ) -> CacheExplanation:
        """What is cached for a question as the caller would ask it, what it stands on, and why it was last dropped."""
        return await explaining.explain(await read_question(request), access)


def _window(hits: tuple[Hit, ...], asked: int, fused: int, *, scored: bool) -> WindowReport:
    fused = min(fused, len(hits))
    return WindowReport(
        places=len(hits),
        asked=asked,
        fused=fused,
        fused_edge_score=hits[fused - 1].score if scored and fused else None,
        edge_score=hits[-1].score if scored and hits else None,
    )
