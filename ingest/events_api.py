"""Event API: status, status stream, and deletion receipts."""

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
from infra.web.problems import ProblemRaised, invalid, invalid_fields, problem_responses
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

POLL_S: Final = 0.1
"""Poll interval of a status stream."""

STREAM_MAX_S: Final = 60.0
"""Maximum duration of a status stream. Clients of server-sent events reconnect automatically."""

_EVENT_STREAM: Final = "text/event-stream"
_JSON: Final = "application/json"
_UNKNOWN_EVENT: Final = (
    "unknown event. States are retained in Redis for a week. For an older event, or one whose state was lost in Redis, "
    "use POST /v1/events:batch-get with the position of the 202, which reads the stream; "
    "GET /v1/documents/{document_id} returns the state of its document"
)
_MAX_BODY_BYTES: Final = 256 * MAX_EVENTS_PER_REQUEST


def event_routes(statuses: EventStatuses, index: Documents, writer: AccessOf) -> APIRouter:
    """Routes of the event API."""
    router = APIRouter()
    reader = Depends(writer)

    async def status_of(access: Access, event_id: str) -> EventStatus:
        status = await statuses.get(access.tenant, event_id)
        if status is None:
            raise ProblemRaised(ProblemType.NOT_FOUND, _UNKNOWN_EVENT)
        return status

    stream: dict[int | str, dict[str, Any]] = {200: {"content": {_EVENT_STREAM: {}}}}

    @router.get(
        "/v1/events/{event_id}", response_model=EventStatus, responses=stream | problem_responses(401, 403, 404, 503)
    )
    async def get_event(event_id: str, request: Request, access: Annotated[Access, reader]) -> EventStatus | Response:
        """Get the status of an accepted event. Statuses are retained for a week.

        With `Accept: text/event-stream`, the response streams each change of the status. The last event of the stream,
        `ended`, has the outcome.
        """
        status = await status_of(access, event_id)
        if _EVENT_STREAM not in request.headers.get("accept", ""):
            return status
        return EventSourceResponse(_stream(statuses, access.tenant, status), headers={"Cache-Control": "no-store"})

    @router.get("/v1/events/{event_id}/receipt", responses=problem_responses(401, 403, 404, 503))
    async def get_receipt(event_id: str, access: Annotated[Access, reader]) -> DeletionReceipt:
        """Get the receipt of a deletion: no passage of the document is searchable, no cached answer contains it."""
        status = await status_of(access, event_id)
        key = DocumentKey(access.tenant, status.document_id)
        manifest = (await index.manifests([key])).get(key)
        deleted = manifest is not None and manifest.version == status.version and manifest.state is LifeState.DELETED
        purged_ms = status.stages_ms.get(Stage.PURGED)
        if status.outcome is not Outcome.DONE or status.position is None or purged_ms is None or not deleted:
            detail = (
                "only a completed deletion without later events of its document has a receipt; this event is not, or "
                "not yet, one"
            )
            raise ProblemRaised(ProblemType.NOT_FOUND, detail)
        checked_ms = time.time() * 1000
        passages = await index.count_chunks(key)
        if passages:
            detail = f"{passages} deleted passages are still searchable; `freshline verify --repair` removes them"
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
        responses=problem_responses(400, 401, 403, 413, 415, 422, 503),
        openapi_extra={"requestBody": {"required": True, "content": {_JSON: {"schema": _events_schema()}}}},
    )
    async def get_events(request: Request, access: Annotated[Access, reader]) -> EventsResponse:
        """Get the statuses of several accepted events.

        With the position of its 202, an ended event is found even if its state was lost in Redis.
        """
        requested = (await _read_events(request)).events
        by_id = await statuses.get_many(access.tenant, requested)
        event_ids = dict.fromkeys(reference.event_id for reference in requested)
        return EventsResponse(
            events=tuple(by_id[event_id] for event_id in event_ids if event_id in by_id),
            unknown=tuple(event_id for event_id in event_ids if event_id not in by_id),
        )

    return router


async def _read_events(request: Request) -> EventsRequest:
    """Parse the body of a batch request.

    Raises:
        ProblemRaised: not JSON, too large, or with invalid fields.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        raise ProblemRaised(ProblemType.UNSUPPORTED_TYPE, f"send the events as Content-Type: {_JSON}")
    try:
        return EventsRequest.model_validate_json(await read_body(request, _MAX_BODY_BYTES))
    except ValidationError as error:
        raise invalid("the request has invalid fields", invalid_fields(error.errors(include_url=False))) from None


def _events_schema() -> dict[str, Any]:
    """Schema of ``EventsRequest`` with inlined references, which cannot be resolved inside ``openapi_extra``."""
    schema = EventsRequest.model_json_schema()
    del schema["$defs"]
    schema["properties"]["events"]["items"] = EventReference.model_json_schema()
    return schema


async def _stream(statuses: EventStatuses, tenant: str, status: EventStatus) -> AsyncIterator[bytes]:
    async for current in follow(statuses, tenant, status):
        name = "stage" if current.outcome is None else "ended"
        yield format_sse_event(event=name, data_str=current.model_dump_json(), id=current.stage)


async def follow(
    statuses: EventStatuses, tenant: str, status: EventStatus, *, max_s: float = STREAM_MAX_S
) -> AsyncIterator[EventStatus]:
    """Yield the status, then each change. Ends with the outcome, after the maximum duration, or if Redis fails."""
    deadline_s = time.monotonic() + max_s
    yield status
    while status.outcome is None and time.monotonic() < deadline_s:
        await asyncio.sleep(POLL_S)
        try:
            current = await statuses.get(tenant, status.event_id)
        except CacheUnavailable:  # the client reconnects, and gets the error then
            return
        if current is None:
            return
        if current != status:
            yield current
        status = current
