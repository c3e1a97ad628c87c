"""Ingest API: documents, event status, dead letters and webhooks."""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Final

import structlog
from fastapi import Depends, FastAPI, Header, Query, Request, Response
from prometheus_client import CollectorRegistry

from infra.settings import Settings
from infra.web.audit import install_audit
from infra.web.credentials import AccessOf, Credentials
from infra.web.metrics import install_metrics
from infra.web.problems import ProblemRaised, install_problems, problem_responses
from infra.webhooks.port import WebhookStore
from ingest.accept import Acceptance, Stores
from ingest.batches import NDJSON, BatchLimits, accept_batch, read_batch
from ingest.core.attributes import FIELDS, header_name
from ingest.core.changes import Removal
from ingest.dead_letters import DeadLetterQueue
from ingest.dead_letters_api import dead_letter_routes
from ingest.event_status import EventStatuses
from ingest.events_api import event_routes
from ingest.metrics import IngestMetrics
from ingest.sources_api import source_routes
from ingest.uploads import checked_content, read_upload
from ingest.webhooks_api import TenantWebhooks, webhook_messages, webhook_routes
from schemas.batches import BatchResponse
from schemas.content_types import SUPPORTED_TYPES
from schemas.credentials import Scope
from schemas.documents import (
    Accepted,
    ConnectorName,
    DocumentId,
    DocumentKey,
    DocumentState,
    DocumentText,
    Version,
)
from schemas.index import NEVER_COMPLETED, Manifest
from schemas.problems import ProblemType
from schemas.search import Access

Check = Callable[[], Awaitable[None]]
"""Raises if a store is not available."""

_JSON: Final = "application/json"
_EMPTY: Final = (
    "Declares that the document is empty. Required for an upload without content, rejected for one with content."
)
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

_log = structlog.get_logger(__name__)


def build_api(
    settings: Settings,
    stores: Stores,
    dead_letters: DeadLetterQueue,
    webhooks: WebhookStore,
    *,
    credentials: Credentials,
    required: Mapping[str, Check],
    useful: Mapping[str, Check],
    registry: CollectorRegistry,
) -> FastAPI:
    """Build the application.

    Args:
        settings: limits.
        stores: stores of acceptance.
        dead_letters: dead-letter queue.
        webhooks: webhook store.
        credentials: authentication.
        required: checks of the stores that acceptance requires; ``/ready`` fails with any of them.
        useful: checks of optional stores; ``/ready`` reports them.
        registry: metrics registry.
    """
    app = FastAPI(title="Freshline ingest", summary="Accepts document changes as events of a stream.", version="1")
    install_problems(app)
    install_audit(app, settings.credentials.audit)
    writer = credentials.requiring(Scope.INGEST)
    _add_documents(app, settings, stores, Acceptance(stores, IngestMetrics(registry)), writer)
    statuses = EventStatuses(stores.states, stores.answers, stores.read_partition)
    app.include_router(source_routes(stores.index, stores.log, writer))
    app.include_router(event_routes(statuses, stores.index, writer))
    app.include_router(dead_letter_routes(dead_letters, writer))
    app.include_router(webhook_routes(TenantWebhooks(webhooks, settings.webhooks), credentials.requiring(Scope.ADMIN)))
    app.webhooks.include_router(webhook_messages())
    _add_operations(app, required, useful)
    install_metrics(app, service="ingest", registry=registry)
    return app


def _add_documents(app: FastAPI, settings: Settings, stores: Stores, acceptance: Acceptance, writer: AccessOf) -> None:
    max_bytes = settings.parse.max_bytes
    limits = BatchLimits(settings.ingest.max_batch_bytes, settings.ingest.max_batch_items, max_bytes)

    # 404: a path with a line break matches no route.
    @app.put(
        "/v1/documents/{document_id:path}",
        status_code=202,
        response_model=Accepted,
        responses=problem_responses(400, 401, 403, 404, 409, 413, 415, 422, 503),
        openapi_extra=_upload_openapi(),
    )
    async def put_document(
        document_id: DocumentId,
        request: Request,
        access: Annotated[Access, Depends(writer)],
        empty: Annotated[bool, Query(description=_EMPTY)] = False,  # noqa: FBT002 - a parameter of the URL
    ) -> Response:
        """Upload or replace a document. 202: the event is durable in the stream."""
        read = await read_upload(request, document_id, max_bytes=max_bytes)
        upload = checked_content(read, empty=empty, how="`?empty=true`")
        return _accepted(await acceptance.accept(access.tenant, upload, traceparent(request)))

    @app.delete(
        "/v1/documents/{document_id:path}",
        status_code=202,
        response_model=Accepted,
        responses=problem_responses(401, 403, 404, 409, 422, 503),
    )
    async def delete_document(
        document_id: DocumentId,
        request: Request,
        access: Annotated[Access, Depends(writer)],
        *,
        freshline_revision: Annotated[Version | None, Header()] = None,
        freshline_connector: Annotated[ConnectorName | None, Header()] = None,
        freshline_take_over: Annotated[bool, Header()] = False,
    ) -> Response:
        """Delete a document. Also accepted for an unknown document: its upload may be in progress."""
        removal = Removal(document_id, freshline_revision, freshline_connector, freshline_take_over)
        return _accepted(await acceptance.accept(access.tenant, removal, traceparent(request)))

    @app.get("/v1/documents/{document_id:path}", responses=problem_responses(401, 403, 404, 422, 503))
    async def get_document(document_id: DocumentId, access: Annotated[Access, Depends(writer)]) -> DocumentState:
        """Get the indexed state of a document."""
        key = DocumentKey(access.tenant, document_id)
        manifest = (await stores.index.manifests([key])).get(key)
        if manifest is None or manifest.version == NEVER_COMPLETED:
            raise ProblemRaised(ProblemType.NOT_FOUND, f"document {document_id!r} is not indexed")
        return _state(manifest)

    @app.post(
        "/v1/documents:batch",
        response_model=BatchResponse,
        responses=problem_responses(400, 401, 403, 413, 415, 422),
        openapi_extra={"requestBody": {"required": True, "content": {NDJSON: {"schema": {"type": "string"}}}}},
    )
    async def post_batch(request: Request, access: Annotated[Access, Depends(writer)]) -> Response:
        """Upload and delete documents in a batch, one JSON object per line. Each line has its own outcome.

        Events of a document keep their order. Outcomes are JSON, or NDJSON if the request accepts it.
        """
        lines = await read_batch(request, limits)
        outcomes = await accept_batch(acceptance, access.tenant, lines, traceparent(request))
        if NDJSON in request.headers.get("accept", ""):
            body = "".join(f"{outcome.model_dump_json(exclude_defaults=True)}\n" for outcome in outcomes)
            return Response(body, media_type=NDJSON)
        accepted = sum(outcome.accepted is not None for outcome in outcomes)
        response = BatchResponse(accepted=accepted, rejected=len(outcomes) - accepted, outcomes=tuple(outcomes))
        return Response(response.model_dump_json(exclude_defaults=True), media_type=_JSON)


def _add_operations(app: FastAPI, required: Mapping[str, Check], useful: Mapping[str, Check]) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Liveness of the process."""
        return {"status": "ok"}

    @app.get("/ready", responses=problem_responses(503))
    async def ready() -> dict[str, str]:
        """Readiness: events can be accepted. Optional stores are reported as `unavailable` if they do not respond."""
        states = {name: await _checked(name, check) for name, check in {**required, **useful}.items()}
        failing = [name for name in required if states[name] != "ok"]
        if failing:
            detail = f"not ready: {', '.join(failing)}"
            raise ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=1.0)
        return states


async def _checked(name: str, check: Check) -> str:
    try:
        await check()
    except Exception as error:  # noqa: BLE001 - any failure means not ready
        _log.warning("store_not_ready", store=name, reason=str(error))
        return "unavailable"
    return "ok"


def traceparent(request: Request) -> str | None:
    """W3C trace context of the request, if well-formed."""
    value = request.headers.get("traceparent", "")
    return value if _TRACEPARENT.fullmatch(value) else None


def _accepted(accepted: Accepted) -> Response:
    location = {"Location": f"/v1/events/{accepted.event_id}"}
    return Response(accepted.model_dump_json(), status_code=202, media_type=_JSON, headers=location)


def _state(manifest: Manifest) -> DocumentState:
    return DocumentState(
        document_id=manifest.document_id,
        version=manifest.version,
        state=manifest.state,
        position=manifest.position,
        title=manifest.title,
        source=manifest.source,
        content_type=manifest.content_type,
        connector=manifest.connector,
        chunks=len(manifest.chunks),
        updated_ms=manifest.updated_ms,
        updating=not manifest.complete,
    )


def _upload_openapi() -> dict[str, Any]:
    """OpenAPI of the three kinds of body and of the attribute headers, which FastAPI cannot derive."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {name: {"type": "string"} for name in FIELDS} | {"file": {"type": "string", "format": "binary"}}
    descriptions = {
        "title": "Title. Text that is not ASCII as in RFC 8187: UTF-8''percent-encoded.",
        "source": "URL or path of the original.",
        "groups": "Groups that can read the document, separated by commas. Default: every reader of the tenant.",
        "metadata": "JSON object of strings, numbers and booleans.",
        "revision": "Monotonic revision number of the source.",
        "connector": "Name of the connector that sends the document and becomes its owner.",
        "take_over": "`true`: replace the document even if another connector owns it.",
        "file_name": "File name. Its suffix determines the type if none is declared.",
    }
    return {
        "parameters": [
            {"name": header_name(name), "in": "header", "description": text, "schema": {"type": "string"}}
            for name, text in descriptions.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                _JSON: {"schema": DocumentText.model_json_schema()},
                "multipart/form-data": {"schema": {"type": "object", "required": ["file"], "properties": form}},
            }
            | {media_type: binary for media_type in sorted(SUPPORTED_TYPES) if media_type != _JSON},
        },
    }
