"""Client of the ingest API for connectors: batched and concurrent, in order per document, with retries."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple, cast
from urllib.parse import urlencode

import httpx
import stamina
from pydantic import ValidationError

from ingest.connectors.encoding import batch_line, document_path, removal_headers, upload_headers, upload_path
from ingest.connectors.rounds import Outgoing, rounds
from ingest.connectors.sent_log import SentLog
from ingest.core.changes import DocumentRequest, Removal, Upload
from schemas.batches import BatchResponse
from schemas.documents import (
    Accepted,
    DocumentList,
    EventReference,
    EventsRequest,
    EventsResponse,
    EventStatus,
    InstallationState,
    ListedDocument,
)
from schemas.positions import Position
from schemas.problems import Problem

RETRY_STATUSES: Final = frozenset({429, 502, 503, 504})
RETRY_TIMEOUT_S: Final = 120.0
_CONNECTIONS: Final = 16
_WAIT_MAX_S: Final = 10.0
_NDJSON: Final = "application/x-ndjson"
_JSON: Final = "application/json"


class ServiceUnavailable(Exception):
    """The service did not accept an event within the retry timeout."""


class Rejected(Exception):
    """The service rejected the event permanently."""


class Conflict(Rejected):
    """Another source owns the document."""


class TooLarge(Rejected):
    """The request exceeds a size limit of the service."""


_ERROR_BY_STATUS: Final[dict[int, type[Rejected]]] = {409: Conflict, 413: TooLarge}


class _Retryable(Exception):
    """Some events of a batch failed with a retryable status."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A document that was not sent, and the reason."""

    document_id: str
    reason: str


class SentEvent(NamedTuple):
    """An accepted event."""

    event_id: str
    document_id: str
    version: int
    position: Position
    deleted: bool


@dataclass(slots=True)
class Summary:
    """Progress of a connector.

    Attributes:
        sent: number of accepted uploads.
        skipped: number of unchanged documents.
        deleted: number of accepted deletions.
        failed: rejected or unreadable documents. They do not block others.
        ignored_files: files that are not sent: id or path → reason.
        positions: partition → highest accepted offset.
        events: accepted events, in order of acceptance.
    """

    sent: int = 0
    skipped: int = 0
    deleted: int = 0
    failed: list[Failure] = field(default_factory=list)
    ignored_files: dict[str, str] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    events: list[SentEvent] = field(default_factory=list)

    def note_accepted(self, accepted: Accepted, *, deleted: bool) -> None:
        """Count an accepted event and record it."""
        self.deleted += deleted
        self.sent += not deleted
        position = Position.parse(accepted.position)
        if position.offset > self.positions.get(position.partition, -1):
            self.positions[position.partition] = position.offset
        self.events.append(SentEvent(accepted.event_id, accepted.document_id, accepted.version, position, deleted))


Progress = Callable[[Summary], None]
"""Called with the summary after each request."""


_OnResult = Callable[[Outgoing, Accepted | Rejected], None]
"""Called with the result of sending an event."""


def no_progress(_summary: Summary) -> None:
    """Ignore progress."""


class IngestClient:
    """Client of the ingest API. Open one with ``connect_ingest``."""

    def __init__(self, http: httpx.AsyncClient, *, retry_timeout_s: float = RETRY_TIMEOUT_S) -> None:
        self._http = http
        self._retry_timeout_s = retry_timeout_s

    @property
    def url(self) -> str:
        """Address of the service."""
        return str(self._http.base_url)

    async def send(self, request: DocumentRequest) -> Accepted:
        """Send one event.

        Raises:
            Rejected: the service rejected it.
            ServiceUnavailable: it was not accepted within the retry timeout.
        """
        if isinstance(request, Removal):
            path = document_path(request.document_id)
            response = await self._call("DELETE", path, headers=removal_headers(request))
        else:
            path = upload_path(request)
            response = await self._call("PUT", path, headers=upload_headers(request), content=request.content)
        return Accepted.model_validate_json(response.content)

    async def send_all(
        self, outgoing: AsyncIterable[Outgoing], log: SentLog, summary: Summary, progress: Progress
    ) -> None:
        """Send everything; accepted events are recorded in ``log`` and ``summary``.

        Raises:
            ServiceUnavailable: the rest was not sent. A later run resumes from the log.
            Exception: raised by ``outgoing``; everything before it was sent.
        """

        def on_result(event: Outgoing, result: Accepted | Rejected) -> None:
            document_id, deleted = event.request.document_id, isinstance(event.request, Removal)
            if isinstance(result, Accepted):
                log.note(document_id, event.mark)
                summary.note_accepted(result, deleted=deleted)
                return
            summary.failed.append(Failure(document_id, str(result)))
            if deleted and isinstance(result, Conflict):
                # Another source owns it now: this source no longer has to delete it.
                log.note(document_id, None)
            else:
                log.note_rejected(document_id)

        async for current in rounds(outgoing):
            log.begin(event.request.document_id for event in current.events if isinstance(event.request, Upload))
            try:
                async with asyncio.TaskGroup() as requests:
                    if current.batched:
                        requests.create_task(self._send_batch(current.batched, on_result))
                    for event in current.alone:
                        requests.create_task(self._send_alone(event, on_result))
            except ExceptionGroup as errors:
                # The first failure cancelled the other requests: it is the cause.
                raise errors.exceptions[0] from None
            finally:
                progress(summary)

    async def _send_alone(self, event: Outgoing, on_result: _OnResult) -> None:
        try:
            on_result(event, await self.send(event.request))
        except Rejected as error:
            on_result(event, error)

    async def _send_batch(self, events: Sequence[Outgoing], on_result: _OnResult) -> None:
        """Send events in one request; retry those that failed with a retryable status."""
        pending = list(events)
        try:
            async for attempt in stamina.retry_context(
                on=_Retryable, attempts=None, timeout=self._retry_timeout_s, wait_max=_WAIT_MAX_S
            ):
                with attempt:
                    await self._post_batch(pending, on_result)
        except _Retryable as error:
            raise ServiceUnavailable(f"{self.url}: {error}") from error
        except TooLarge:
            # The batch limit of the service is lower than ours.
            if len(pending) == 1:
                await self._send_alone(pending[0], on_result)
                return
            middle = len(pending) // 2
            await self._send_batch(pending[:middle], on_result)
            await self._send_batch(pending[middle:], on_result)
        except Rejected as error:
            for event in pending:
                on_result(event, error)

    async def _post_batch(self, pending: list[Outgoing], on_result: _OnResult) -> None:
        """Send once; removes the accepted and rejected events from ``pending``.

        Raises:
            _Retryable: some events are still pending.
        """
        content = b"".join(batch_line(event.request) for event in pending)
        response = await self._call("POST", "/v1/documents:batch", headers={"Content-Type": _NDJSON}, content=content)
        outcomes = BatchResponse.model_validate_json(response.content).outcomes
        retryable = ""
        for event, outcome in zip(tuple(pending), outcomes, strict=True):
            problem = outcome.problem
            if problem is not None and problem.status in RETRY_STATUSES:
                retryable = summary_of(problem)
                continue
            on_result(event, cast("Accepted", outcome.accepted) if problem is None else _rejected(problem))
            pending.remove(event)
        if retryable:
            raise _Retryable(retryable)

    async def status(self, event_id: str) -> EventStatus | None:
        """Status of an event; None if unknown or expired."""
        response = await self._call("GET", f"/v1/events/{event_id}", missing_ok=True)
        return EventStatus.model_validate_json(response.content) if response.is_success else None

    async def statuses(self, events: Sequence[SentEvent]) -> dict[str, EventStatus]:
        """Event id → status, without unknown or expired events.

        Args:
            events: at most ``MAX_EVENTS_PER_REQUEST``.
        """
        references = [EventReference(event_id=event.event_id, position=str(event.position)) for event in events]
        content = EventsRequest(events=tuple(references)).model_dump_json().encode()
        response = await self._call("POST", "/v1/events:batch-get", headers={"Content-Type": _JSON}, content=content)
        return {status.event_id: status for status in EventsResponse.model_validate_json(response.content).events}

    async def installation(self) -> InstallationState:
        """Identity of the installation."""
        response = await self._call("GET", "/v1/installation")
        return InstallationState.model_validate_json(response.content)

    async def documents_of(self, connector: str, *, wait_s: float) -> tuple[dict[str, ListedDocument], bool]:
        """List the live documents that a connector owns.

        Args:
            connector: name of the connector.
            wait_s: longest time that the service waits for accepted events that are not indexed yet.

        Returns:
            Documents by id, and whether the list is complete.
        """
        documents: dict[str, ListedDocument] = {}
        complete = False
        page: dict[str, str] = {"connector": connector, "wait_s": str(wait_s)}
        while True:
            response = await self._call("GET", f"/v1/documents?{urlencode(page)}")
            listed = DocumentList.model_validate_json(response.content)
            documents |= {document.document_id: document for document in listed.documents}
            complete = complete or bool(listed.complete)
            if listed.next_after is None:
                return documents, complete
            page = {"connector": connector, "after": listed.next_after}

    async def _call(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        content: bytes | None = None,
        missing_ok: bool = False,
    ) -> httpx.Response:
        try:
            async for attempt in stamina.retry_context(
                on=_retry, attempts=None, timeout=self._retry_timeout_s, wait_max=_WAIT_MAX_S
            ):
                with attempt:
                    response = await self._http.request(method, path, headers=headers, content=content)
                    if response.status_code in RETRY_STATUSES:
                        response.raise_for_status()
        except httpx.HTTPStatusError as error:
            raise ServiceUnavailable(f"{self.url}: {problem_text(error.response)}") from error
        except httpx.TransportError as error:
            raise ServiceUnavailable(f"{self.url} does not answer ({error!r}): is the service running?") from error
        if not response.is_success and not (missing_ok and response.status_code == httpx.codes.NOT_FOUND):
            raise _ERROR_BY_STATUS.get(response.status_code, Rejected)(problem_text(response))
        return response


@asynccontextmanager
async def connect_ingest(url: str, api_key: str | None = None) -> AsyncIterator[IngestClient]:
    """Open a client of the service at ``url``."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=30.0) as http:
        yield IngestClient(http)


def problem_text(response: httpx.Response) -> str:
    """Summarize an error response in one line."""
    try:
        return summary_of(Problem.model_validate_json(response.content))
    except ValidationError:
        return f"HTTP {response.status_code}"


def summary_of(problem: Problem) -> str:
    """Summarize a problem in one line."""
    return f"{problem.title}: {problem.detail}"


def _rejected(problem: Problem) -> Rejected:
    return _ERROR_BY_STATUS.get(problem.status, Rejected)(summary_of(problem))


def _retry(error: Exception) -> bool | float:
    """Whether to retry; the delay in seconds if the response has ``Retry-After``."""
    if isinstance(error, httpx.HTTPStatusError):
        retry_after = error.response.headers.get("retry-after", "")
        return float(retry_after) if retry_after.isdecimal() else True
    return isinstance(error, httpx.TransportError)
