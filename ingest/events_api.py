"""Where accepted events are: asked for once, followed as they go, and for a delete certified."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import ValidationError

from infra.redis.port import CacheUnavailable
from infra.web.bodies import read_body
from infra.web.credentials import AccessOf
from infra.web.problems import ProblemRaised, invalid, invalid_fields, problems_told
from ingest.accept import Documents
from ingest.event_status import EventStatuses
from schemas.documents import (
    MAX_EVENTS_PER_REQUEST,
    DeletionReceipt,
    DocumentKey,
    EventReference,
    EventsRequest,
    EventsResponse,
    EventStatus,
    LifeState,
    Outcome,
    Stage,
)
from schemas.problems import ProblemType
from schemas.search import Access

LOOK_S: Final = 0.1
"""How often the state of a followed event is read: sooner than a person notices, and one small read each."""

FOLLOWED_S: Final = 60.0
"""A stream that lasts longer ends, and its reader connects again, as readers of event streams do by themselves."""

_EVENT_STREAM: Final = "text/event-stream"
_JSON: Final = "application/json"
_UNKNOWN_EVENT: Final = (
    "nothing is recorded of such an event. States are kept in Redis, for a week: an older event, or one whose state "
    "Redis has lost, is in the stream alone. POST /v1/events:batch-get reads it there, given the position of the 202; "
    "GET /v1/documents/{document_id} tells what became of its document"
)
_MAX_BODY_BYTES: Final = 256 * MAX_EVENTS_PER_REQUEST


def event_routes(statuses: EventStatuses, index: Documents, writer: AccessOf) -> APIRouter:
    """The routes."""
    router = APIRouter()
    reader = Depends(writer)

    async def known(access: Access, event_id: str) -> EventStatus:
        status = await statuses.get(access.tenant, event_id)
        if status is None:
            raise ProblemRaised(ProblemType.NOT_FOUND, _UNKNOWN_EVENT)
        return status

    stream: dict[int | str, dict[str, Any]] = {200: {"content": {_EVENT_STREAM: {}}}}

    @router.get(
        "/v1/events/{event_id}", response_model=EventStatus, responses=stream | problems_told(401, 403, 404, 503)
    )
    async def get_event(event_id: str, request: Request, access: Annotated[Access, reader]) -> EventStatus | Response:
        """Where an accepted event is. Known for a week.

        With `Accept: text/event-stream` each change of it is an event of the stream, and its last one, named `ended`,
        has the outcome.
        """
        status = await known(access, event_id)
        if _EVENT_STREAM not in request.headers.get("accept", ""):
            return status
        return EventSourceResponse(_stream(statuses, access.tenant, status), headers={"Cache-Control": "no-store"})

    @router.get("/v1/events/{event_id}/receipt", responses=problems_told(401, 403, 404, 503))
    async def get_receipt(event_id: str, access: Annotated[Access, reader]) -> DeletionReceipt:
        """That the document which this event deleted is gone: no passage of it is found, no cached answer has it."""
        status = await known(access, event_id)
        key = DocumentKey(access.tenant, status.document_id)
        manifest = (await index.manifests([key])).get(key)
        deleted = manifest is not None and manifest.version == status.version and manifest.state is LifeState.DELETED
        purged_ms = status.stages_ms.get(Stage.PURGED)
        if status.outcome is not Outcome.DONE or status.position is None or purged_ms is None or not deleted:
            detail = (
                "only a delete that is done, and that nothing came after, has a receipt; this event has not, or not yet"
            )
            raise ProblemRaised(ProblemType.NOT_FOUND, detail)
        checked_ms = time.time() * 1000
        passages = await index.count_chunks(key)
        if passages:
            detail = f"{passages} passages are found that should be gone; `freshline verify --repair` removes them"
            raise ProblemRaised(ProblemType.UNAVAILABLE, detail)
        return DeletionReceipt(
            event_id=event_id,
            document_id=status.document_id,
            version=status.version,
            position=status.position,
            accepted_ms=status.accepted_ms,
            purged_ms=status.accepted_ms + purged_ms,
            passages=passages,
            checked_ms=checked_ms,
        )

    @router.post(
        "/v1/events:batch-get",
        responses=problems_told(400, 401, 403, 413, 415, 422, 503),
        openapi_extra={"requestBody": {"required": True, "content": {_JSON: {"schema": _events_schema()}}}},
    )
    async def get_events(request: Request, access: Annotated[Access, reader]) -> EventsResponse:
        """Where many accepted events are, in one request.

        With the position of its 202, an event that has ended is found even where Redis has lost its state.
        """
        asked = await _read_events(request)
        found = await statuses.get_many(access.tenant, asked.events)
        names = dict.fromkeys(one.event_id for one in asked.events)
        return EventsResponse(
            events=tuple(found[name] for name in names if name in found),
            unknown=tuple(name for name in names if name not in found),
        )

    return router


async def _read_events(request: Request) -> EventsRequest:
    """The events that a request asks for.

    Raises:
        ProblemRaised: it is no JSON, too large, or has wrong fields.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        raise ProblemRaised(ProblemType.UNSUPPORTED_TYPE, f"send the events as Content-Type: {_JSON}")
    try:
        return EventsRequest.model_validate_json(await read_body(request, _MAX_BODY_BYTES))
    except ValidationError as error:
        raise invalid("the request has wrong fields", invalid_fields(error.errors(include_url=False))) from None


def _events_schema() -> dict[str, Any]:
    """The schema of ``EventsRequest``, without references, which would lead nowhere from inside a description."""
    schema = EventsRequest.model_json_schema()
    del schema["$defs"]
    schema["properties"]["events"]["items"] = EventReference.model_json_schema()
    return schema


async def _stream(statuses: EventStatuses, tenant: str, status: EventStatus) -> AsyncIterator[bytes]:
    async for one in follow(statuses, tenant, status):
        name = "stage" if one.outcome is None else "ended"
        yield format_sse_event(event=name, data_str=one.model_dump_json(), id=one.stage)


async def follow(
    statuses: EventStatuses, tenant: str, status: EventStatus, *, followed_s: float = FOLLOWED_S
) -> AsyncIterator[EventStatus]:
    """The status, then each change of it; ends with its outcome, after a while, or when Redis does not answer."""
    until_s = time.monotonic() + followed_s
    yield status
    while status.outcome is None and time.monotonic() < until_s:
        await asyncio.sleep(LOOK_S)
        try:
            now = await statuses.get(tenant, status.event_id)
        except CacheUnavailable:  # the reader connects again, and is told of it then
            return
        if now is None:
            return
        if now != status:
            yield now
        status = now
