"""Clients of the ingest and query services."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from freshline.loadtest.connection import Target
from infra.settings import HttpSettings, Settings
from ingest.connectors.client import IngestClient, connect_ingest
from ingest.connectors.encoding import upload_headers, upload_path
from ingest.core.changes import Upload
from schemas.documents import DocumentAttributes
from schemas.problems import Problem

_END_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.01
_BUSY_S: Final = 1.0


class ServiceFailed(Exception):
    """A service rejected a request or did not respond. The message contains the reason."""


class NotEnded(ServiceFailed):
    """An event is still under way."""


class ServiceBusy(ServiceFailed):
    """A service rejected a request temporarily.

    Attributes:
        after_s: delay before a retry.
    """

    def __init__(self, message: str, *, after_s: float) -> None:
        super().__init__(message)
        self.after_s = after_s


class Services:
    """Ingest and query of one installation. Created by ``connect_services``."""

    def __init__(self, http: httpx.AsyncClient, ingest_url: str, query_url: str) -> None:
        self._http = http
        self.ingest_url = ingest_url
        self.query_url = query_url

    async def put(self, document_id: str, content: bytes, content_type: str) -> dict[str, Any]:
        """Upload a document; its id is its source. Returns the 202 response."""
        upload = Upload(document_id, content, content_type, DocumentAttributes(source=document_id))
        url = f"{self.ingest_url}{upload_path(upload)}"
        return await self._call("PUT", url, content=content, headers=upload_headers(upload))

    async def delete(self, document_id: str) -> dict[str, Any]:
        """Delete a document. Returns the 202 response."""
        return await self._call("DELETE", self._document(document_id))

    async def document(self, document_id: str) -> dict[str, Any]:
        """State of a document."""
        return await self._call("GET", self._document(document_id))

    async def ask(self, question: str, **parameters: Any) -> dict[str, Any]:
        """Ask a question."""
        return await self._call("POST", f"{self.query_url}/v1/query", json={"query": question, **parameters})

    async def explained(self, question: str, **parameters: Any) -> dict[str, Any]:
        """State of the cached answer to a question."""
        return await self._call("POST", f"{self.query_url}/v1/cache:explain", json={"query": question, **parameters})

    async def event(self, event_id: str) -> dict[str, Any]:
        """State of an event."""
        return await self._call("GET", f"{self.ingest_url}/v1/events/{event_id}")

    async def ended(self, event_id: str, position: str | None = None) -> dict[str, Any]:
        """Wait until an event has ended. Returns its state; ``position`` finds it even if Redis has lost its state.

        Raises:
            NotEnded: it has not ended within a minute.
        """
        until_s = time.monotonic() + _END_TIMEOUT_S
        while time.monotonic() < until_s:
            status = await (self.event(event_id) if position is None else self._found(event_id, position))
            if status["outcome"] is not None:
                return status
            await asyncio.sleep(_POLL_S)
        raise NotEnded(f"event {event_id} has not ended after {_END_TIMEOUT_S:.0f} s: check `freshline lag`")

    async def _found(self, event_id: str, position: str) -> dict[str, Any]:
        body = {"events": [{"event_id": event_id, "position": position}]}
        response = await self._call("POST", f"{self.ingest_url}/v1/events:batch-get", json=body)
        return dict(response["events"][0]) if response["events"] else {"outcome": None}

    def _document(self, document_id: str) -> str:
        return f"{self.ingest_url}/v1/documents/{quote(document_id, safe='')}"

    async def _call(self, method: str, url: str, **request: Any) -> dict[str, Any]:
        try:
            response = await self._http.request(method, url, **request)
        except httpx.TransportError as error:
            raise ServiceFailed(
                f"{url} does not answer ({type(error).__name__}): start it with `freshline up`, or set "
                "FRESHLINE_INGEST__HOST, __PORT and FRESHLINE_QUERY__HOST, __PORT to its address"
            ) from error
        if response.status_code in (httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.TOO_MANY_REQUESTS):
            retry_after = response.headers.get("retry-after", "")
            raise ServiceBusy(
                _error_message(response), after_s=float(retry_after) if retry_after.isdecimal() else _BUSY_S
            )
        if response.is_error:
            raise ServiceFailed(_error_message(response))
        return dict(response.json())


def _error_message(response: httpx.Response) -> str:
    """Message of an error response. Responses of a proxy may not be problem documents."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        return f"{response.url} answered {response.status_code}"
    fields = ", ".join(f"{one.field}: {one.message}" for one in problem.errors)
    return f"{problem.title}: {problem.detail}" + (f" ({fields})" if fields else "")


@asynccontextmanager
async def connect_services(settings: Settings) -> AsyncIterator[Services]:
    """Connections to the services of an installation."""
    key = settings.tenant.api_key
    headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    async with httpx.AsyncClient(headers=headers, timeout=60) as http:
        yield Services(http, _url(settings.ingest), _url(settings.query))


def console_url(settings: Settings) -> str:
    """URL of the console. The key, if any, is in the fragment, which browsers do not send."""
    key = settings.tenant.api_key
    return f"{_url(settings.query)}/" + (f"#key={quote(key.get_secret_value(), safe='')}" if key else "")


def ingest_client(settings: Settings) -> AbstractAsyncContextManager[IngestClient]:
    """Ingest client of the connectors."""
    key = settings.tenant.api_key
    return connect_ingest(_url(settings.ingest), key.get_secret_value() if key else None)


def query_target(settings: Settings) -> Target:
    """Target of a load on the query service, with credentials."""
    key = settings.tenant.api_key
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    return Target(f"{_url(settings.query)}/v1/query", headers)


def _url(http: HttpSettings) -> str:
    return f"http://{http.host}:{http.port}"
