"""Sending documents to the ingest API: many at once, each document's events in order, patient with a busy service."""

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
    """The service did not take an event for as long as one should try."""


class Refused(Exception):
    """The service will not take this event, however often it is sent."""


class Conflict(Refused):
    """The document belongs to another source."""


class TooLarge(Refused):
    """The service will not take so much at once."""


_REFUSED_AS: Final[dict[int, type[Refused]]] = {409: Conflict, 413: TooLarge}


class _Busy(Exception):
    """The service could not take some events of a batch now."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A document that could not be sent, and why."""

    document_id: str
    reason: str


class SentEvent(NamedTuple):
    """An event that the service accepted."""

    event_id: str
    document_id: str
    version: int
    position: Position
    deleted: bool


@dataclass(slots=True)
class Summary:
    """What a connector has done so far.

    Attributes:
        sent: uploads accepted.
        skipped: documents that had not changed.
        deleted: deletions accepted.
        failed: documents that were refused; the others do not wait for them.
        passed_over: what the source has beside its documents, and why it is not sent: id or path → reason.
        positions: partition → last offset accepted.
        events: accepted events, in the order of their acceptance.
    """

    sent: int = 0
    skipped: int = 0
    deleted: int = 0
    failed: list[Failure] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    events: list[SentEvent] = field(default_factory=list)

    def note_accepted(self, accepted: Accepted, *, deleted: bool) -> None:
        """Count an acceptance, and keep the event."""
        self.deleted += deleted
        self.sent += not deleted
        position = Position.parse(accepted.position)
        if position.offset > self.positions.get(position.partition, -1):
            self.positions[position.partition] = position.offset
        self.events.append(SentEvent(accepted.event_id, accepted.document_id, accepted.version, position, deleted))


Progress = Callable[[Summary], None]
"""Called after each request with the summary so far."""


_Note = Callable[[Outgoing, Accepted | Refused], None]
"""Told how the sending of an event ended: accepted, or refused and why."""


def no_progress(_summary: Summary) -> None:
    """Tell nobody."""


class IngestClient:
    """The ingest API, as seen by connectors. Make one with ``connect_ingest``."""

    def __init__(self, http: httpx.AsyncClient, *, retry_timeout_s: float = RETRY_TIMEOUT_S) -> None:
        self._http = http
        self._retry_timeout_s = retry_timeout_s

    @property
    def url(self) -> str:
        """Address of the service."""
        return str(self._http.base_url)

    async def send(self, request: DocumentRequest) -> Accepted:
        """Send one event and return what the service promises of it.

        Raises:
            Refused: the service says that it is wrong.
            ServiceUnavailable: it did not take it in time.
        """
        if isinstance(request, Removal):
            path = document_path(request.document_id)
            response = await self._call("DELETE", path, headers=removal_headers(request))
        else:
            path = upload_path(request)
            response = await self._call("PUT", path, headers=upload_headers(request), content=request.content)
        return Accepted.model_validate_json(response.content)

    async def send_all(self, outgoing: AsyncIterable[Outgoing], log: SentLog, summary: Summary, told: Progress) -> None:
        """Send everything; what is accepted is noted in ``log`` and ``summary``.

        Raises:
            ServiceUnavailable: the rest was not sent; a later run goes on from the log.
            Exception: what ``outgoing`` raised, once everything before it is sent.
        """

        def note(event: Outgoing, end: Accepted | Refused) -> None:
            document_id, deleted = event.request.document_id, isinstance(event.request, Removal)
            if isinstance(end, Accepted):
                log.note(document_id, event.mark)
                summary.note_accepted(end, deleted=deleted)
                return
            summary.failed.append(Failure(document_id, str(end)))
            if deleted and isinstance(end, Conflict):
                # It belongs to another source by now, so that it is gone from this one is of no interest any more.
                log.note(document_id, None)
            else:
                log.note_refused(document_id)

        async for together in rounds(outgoing):
            log.begin(event.request.document_id for event in together.events if isinstance(event.request, Upload))
            try:
                async with asyncio.TaskGroup() as requests:
                    if together.batched:
                        requests.create_task(self._send_batch(together.batched, note))
                    for event in together.alone:
                        requests.create_task(self._send_alone(event, note))
            except ExceptionGroup as errors:
                # The first failure ended the others; it alone says why.
                raise errors.exceptions[0] from None
            finally:
                told(summary)

    async def _send_alone(self, event: Outgoing, note: _Note) -> None:
        try:
            note(event, await self.send(event.request))
        except Refused as error:
            note(event, error)

    async def _send_batch(self, events: Sequence[Outgoing], note: _Note) -> None:
        """Send in one request; what the service cannot take now is tried again, without what it took."""
        waiting = list(events)
        try:
            async for attempt in stamina.retry_context(
                on=_Busy, attempts=None, timeout=self._retry_timeout_s, wait_max=_WAIT_MAX_S
            ):
                with attempt:
                    await self._post_batch(waiting, note)
        except _Busy as error:
            raise ServiceUnavailable(f"{self.url}: {error}") from error
        except TooLarge:
            # The service is set to smaller batches than ours.
            if len(waiting) == 1:
                await self._send_alone(waiting[0], note)
                return
            middle = len(waiting) // 2
            await self._send_batch(waiting[:middle], note)
            await self._send_batch(waiting[middle:], note)
        except Refused as error:
            for event in waiting:
                note(event, error)

    async def _post_batch(self, waiting: list[Outgoing], note: _Note) -> None:
        """Send once; events that ended are taken out of ``waiting``.

        Raises:
            _Busy: some did not.
        """
        content = b"".join(batch_line(event.request) for event in waiting)
        response = await self._call("POST", "/v1/documents:batch", headers={"Content-Type": _NDJSON}, content=content)
        outcomes = BatchResponse.model_validate_json(response.content).outcomes
        busy = ""
        for event, outcome in zip(tuple(waiting), outcomes, strict=True):
            if outcome.problem is not None and outcome.problem.status in RETRY_STATUSES:
                busy = said(outcome.problem)
                continue
            note(event, cast("Accepted", outcome.accepted) if outcome.problem is None else _refused(outcome.problem))
            waiting.remove(event)
        if busy:
            raise _Busy(busy)

    async def status(self, event_id: str) -> EventStatus | None:
        """Where an event is; None where the service does not know it (any more)."""
        response = await self._call("GET", f"/v1/events/{event_id}", missing_ok=True)
        return EventStatus.model_validate_json(response.content) if response.is_success else None

    async def statuses(self, events: Sequence[SentEvent]) -> dict[str, EventStatus]:
        """Event id → where the event is, without those that the service does not know (any more).

        Args:
            events: at most ``MAX_EVENTS_PER_REQUEST``.
        """
        references = [EventReference(event_id=one.event_id, position=str(one.position)) for one in events]
        content = EventsRequest(events=tuple(references)).model_dump_json().encode()
        response = await self._call("POST", "/v1/events:batch-get", headers={"Content-Type": _JSON}, content=content)
        return {one.event_id: one for one in EventsResponse.model_validate_json(response.content).events}

    async def installation(self) -> InstallationState:
        """Which installation the service is of."""
        response = await self._call("GET", "/v1/installation")
        return InstallationState.model_validate_json(response.content)

    async def documents_of(self, connector: str, *, wait_s: float) -> tuple[dict[str, ListedDocument], bool]:
        """The live documents that a connector owns, by id, and whether none is missing.

        The service waits up to ``wait_s`` for what it has accepted and not indexed yet; one may be missing after that.
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
            raise _REFUSED_AS.get(response.status_code, Refused)(problem_text(response))
        return response


@asynccontextmanager
async def connect_ingest(url: str, api_key: str | None = None) -> AsyncIterator[IngestClient]:
    """A client of the service at ``url``."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=30.0) as http:
        yield IngestClient(http)


def problem_text(response: httpx.Response) -> str:
    """What an error response says, in one line."""
    try:
        return said(Problem.model_validate_json(response.content))
    except ValidationError:
        return f"HTTP {response.status_code}"


def said(problem: Problem) -> str:
    """What a problem says, in one line."""
    return f"{problem.title}: {problem.detail}"


def _refused(problem: Problem) -> Refused:
    return _REFUSED_AS.get(problem.status, Refused)(said(problem))


def _retry(error: Exception) -> bool | float:
    """Whether trying again may help, and after how many seconds where the service says so."""
    if isinstance(error, httpx.HTTPStatusError):
        advised = error.response.headers.get("retry-after", "")
        return float(advised) if advised.isdecimal() else True
    return isinstance(error, httpx.TransportError)
