"""Source API for connectors: identity of the installation, and the documents of a source."""

from typing import Annotated, Final

from fastapi import APIRouter, Depends, Query

from infra.kafka.port import DocumentLog
from infra.web.credentials import AccessOf
from infra.web.problems import problem_responses
from ingest.accept import Documents
from schemas.documents import ConnectorName, DocumentId, DocumentList, InstallationState, ListedDocument
from schemas.search import Access

MAX_PAGE: Final = 1_000
MAX_WAIT_S: Final = 20.0


def source_routes(index: Documents, log: DocumentLog, writer: AccessOf) -> APIRouter:
    """Routes of the source API; ``writer`` authorizes senders of documents."""
    routes = APIRouter()

    @routes.get("/v1/installation", responses=problem_responses(401, 403, 503))
    async def get_installation(access: Annotated[Access, Depends(writer)]) -> InstallationState:
        """Get the identity of the installation. A connector's sent log is valid for one installation only."""
        return InstallationState(installation_id=await log.log_id(), tenant=access.tenant)

    @routes.get("/v1/documents", responses=problem_responses(401, 403, 422, 503))
    async def list_documents(
        access: Annotated[Access, Depends(writer)],
        connector: ConnectorName | None = None,
        after: DocumentId | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
        wait_s: Annotated[float, Query(ge=0, le=MAX_WAIT_S)] = 0,
    ) -> DocumentList:
        """List the live documents of the tenant by id, optionally those of one connector.

        The first page waits up to `wait_s` seconds for accepted events that are not indexed yet, and reports in
        `complete` whether all are reflected.
        """
        complete = await log.is_indexed(timeout_s=wait_s) if after is None else None
        manifests = await index.live_documents(access.tenant, connector=connector, after=after, limit=limit)
        documents = tuple(
            ListedDocument(
                document_id=manifest.document_id,
                version=manifest.version,
                content_sha256=manifest.content.sha256 if manifest.content else None,
            )
            for manifest in manifests
        )
        next_after = documents[-1].document_id if len(documents) == limit else None
        return DocumentList(documents=documents, next_after=next_after, complete=complete)

    return routes
